"""What a running job tells its operators: Prometheus metrics, and log lines with the run id.

Ray exports the metrics on each node with the prefix `ray_`; `cluster/grafana-dashboard.json`
draws them. Their tags are few and fixed: no key, no patient, no run id.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

from lungopacity.words import printable

log = logging.getLogger(__name__)

NAMES = {
    "images": "images finished, by status and error code",
    "fetch_seconds": "seconds that requests to object storage took",
    "fetched_bytes": "bytes fetched from object storage",
    "decode_seconds": "CPU seconds of decoding",
    "model_seconds": "seconds of forward passes",
    "objects_planned": "objects that the newest run has to screen",
    "objects_waiting": "objects that the newest run has not finished",
    "images_done": "images that the newest run has finished since it last began to read",
}
"""Each metric and its meaning. Exported as `ray_lungopacity_<name>`, counters with `_total`."""
DEBUG_VARIABLE = "LUNGOPACITY_DEBUG"
_TAGS = {"images": ("status", "error_code")}
_run_id = "-"


def count(name: str, value: float, tags: Mapping[str, str] | None = None) -> None:
    """Add to a counter. Does nothing outside Ray."""
    if value > 0:
        _counter(name).inc(value, dict(tags or {}))


def gauge(name: str, value: float) -> None:
    """Set a gauge."""
    _gauge(name).set(value)


@cache
def _counter(name: str) -> Any:
    from ray.util.metrics import Counter

    return Counter(f"lungopacity_{name}", NAMES[name], _TAGS.get(name, ()))


@cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(f"lungopacity_{name}", NAMES[name])


def set_run(run_id: str) -> None:
    """Set the run id that this process's log lines carry from now on."""
    global _run_id
    _run_id = run_id


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, run_id, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "run_id": _run_id,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextLines(logging.Formatter):
    """Time of day and message, on one line whatever names it quotes; any traceback below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - as logging has it
        record.message = printable(record.message)
        return super().formatMessage(record)


_as_json = False


def log_lines(output_format: str) -> None:
    """Log to standard error, Python's warnings included, as `text` for people or as `json` for
    log collectors."""
    global _as_json
    _as_json = output_format == "json"
    logging.basicConfig(level=logging.WARNING, force=True)
    (handler,) = logging.getLogger().handlers
    as_text = TextLines("%(asctime)s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonLines() if _as_json else as_text)
    warnings.showwarning = _log_warning
    debugging = os.environ.get(DEBUG_VARIABLE)
    logging.getLogger("lungopacity").setLevel(logging.DEBUG if debugging else logging.INFO)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    """Replaces `warnings.showwarning`, which would print quoted names unescaped."""
    logging.getLogger("py.warnings").warning(
        "%s:%d: %s: %s", filename, lineno, category.__name__, message
    )


def tell_end(why: str) -> bool:
    """Log why a command ends without success, if log lines are JSON. False: they are for people,
    to whom the caller prints the reason without the time of day."""
    if _as_json:
        log.error("%s", why)
    return _as_json
