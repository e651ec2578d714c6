"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from lungopacity.errors import NOTICE, UserError

EPILOG = f"{NOTICE} A URI is a path, file:// or s3://bucket/prefix; for S3, set the AWS variables."

_MOST_OBJECTS = 10**12


class _Count(click.types.IntParamType):
    """A count that a database can hold. Not `IntRange`, which shows its limit in `--help`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        count = int(super().convert(value, param, ctx))
        if count > _MOST_OBJECTS:
            self.fail(f"{count} is more than {_MOST_OBJECTS}.", param, ctx)
        return count


OBJECTS = _Count()


class _Filled(click.types.StringParamType):
    """A text that is not empty: `--output "$OUT"` with OUT unset would mean the current folder, the
    default, or `none`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "" and param is not None:
            fix = "give it a value" + ("" if param.required else ", or leave it out")
            fix = "say none" if param.callback is words_of else fix
            raise UserError(f"{param.opts[0]} is empty; {fix}")
        return super().convert(value, param, ctx)


def refuse_empty_texts(command: click.Command) -> None:
    """Refuse them in every option and argument of the command and of its subcommands."""
    for parameter in command.params:
        if parameter.type is click.STRING:
            parameter.type = _Filled()
    if isinstance(command, click.Group):
        for below in command.commands.values():
            refuse_empty_texts(below)


images_option = click.option(
    "--images",
    "images",
    metavar="URI",
    multiple=True,
    required=True,
    help="Prefix of loose images and shards, one shard, or one image. May be given more than once.",
)
labels_option = click.option(
    "--labels", metavar="FILE", required=True, help="CSV or Parquet with image, label, split, …"
)
model_option = click.option("--model", metavar="URI", required=True, help="Model folder.")


def _limits(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> dict[str, float]:
    """`CPU=80,GPU=4`, for `runtime.grows_to`."""
    try:
        pairs = [word.split("=") for word in (text or "").split(",") if word]
        limits = {name.strip().upper(): float(number) for name, number in pairs}
    except ValueError:
        limits = {"": 0.0}
    if not set(limits) <= {"CPU", "GPU"}:
        raise click.BadParameter(f"'{text}' is not of the form CPU=80,GPU=4")
    if not all(0 <= number < math.inf for number in limits.values()):
        raise click.BadParameter(f"'{text}': give numbers of 0 or more")
    return limits


def gpu_option(command: Any) -> Any:
    """Add the options about the Ray cluster that the command runs on."""

    @functools.wraps(command)
    def on_such_a_cluster(*arguments: Any, grows_to: dict[str, float], **options: Any) -> Any:
        from lungopacity import runtime

        with runtime.grows_to(grows_to):
            return command(*arguments, **options)

    use = click.option(
        "--use-gpu/--no-gpu", default=None, help="Default: use GPUs if the Ray cluster has any."
    )
    grows = click.option(
        "--grows-to",
        metavar="CPU=N,GPU=N",
        default=None,
        callback=_limits,
        help="What the Ray cluster may autoscale to. Default: what it has now.",
    )
    return use(grows(on_such_a_cluster))


operating_point_option = click.option(
    "--operating-point",
    metavar="NAME",
    default=None,
    help="How scores become decisions: youden (the default), sensitivity=0.95, "
    "specificity=0.95, cost=5, band=0.99,0.95, or a name given to `lungopacity threshold`.",
)
hmac_key_option = click.option(
    "--hmac-key", metavar="FILE", default=None, help="Key for patient_hmac and study_hmac."
)


def words_of(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> list[str] | None:
    """`blank,colour` as a list; `none` as an empty one."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise click.BadParameter(f"'{text}' holds no word; say none")
    return [word for word in words if word != "none"]


def rule_options(command: Any) -> Any:
    """Add the options for which films are read but not scored, the same wherever films are read."""
    accept = click.option(
        "--accept",
        metavar="CODES",
        default="none",
        callback=words_of,
        help="Accept films despite these codes: for_processing, lateral_view, wrong_body_part, "
        "wrong_modality.",
    )
    reject = click.option(
        "--reject-quality",
        metavar="FLAGS",
        default=None,
        callback=words_of,
        help="Quality flags that reject a film, or none. Default: blank, nearly_black, "
        "nearly_white, too_small, inverted, colour. The others: child, heavy_borders, "
        "low_contrast, odd_aspect and, for a model, out_of_distribution.",
    )
    return accept(reject(command))


def classes_of(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> tuple[str, ...] | None:
    """The words of `A,B`, at least one: no word would mean every label."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise click.BadParameter(f"'{text}' names no class")
    return names


def workers_of(text: str) -> int | tuple[int, int]:
    """`4`, or `2:8`."""
    try:
        numbers = [int(word) for word in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise click.BadParameter(f"'{text}' is not of the form 4 or 2:8")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def pairs_of(words: Sequence[str], form: str = "NAME=VALUE") -> dict[str, str]:
    """Words of a form such as `NAME=VALUE` as a mapping."""
    pairs = [word.partition("=") for word in words]
    for name, sign, _ in pairs:
        if not name or not sign:
            raise click.BadParameter(f"'{name}' is not of the form {form}")
    for name, times in Counter(name.strip() for name, _, _ in pairs).items():
        if times > 1:
            raise click.BadParameter(f"'{name}' is given {times} times")
    return {name.strip(): value.strip() for name, _, value in pairs}
