"""The model folder: what training writes, and evaluation and screening read.

model.safetensors          the weights, no pickle
model.json                 everything else that determines a score, and the model's metrics
distribution.safetensors   where the training films lie in the model's feature space
compiled.safetensors       the network compiled for CPUs, where that is faster; see `compiled`
history.parquet            loss and accuracy by epoch; an ensemble has none
validation.parquet         the kept weights' raw logits of each validation film, one column per
                           class, with content_sha256 and label; for thresholds and ensembles. In an
                           ensemble they are the mean of its members' calibrated logits, each of the
                           film decoded at the member's size
training_films.parquet     content_sha256 of the films that it learnt from, and of those that the
                           model of its first weights knew: none of them may be used to test it
operating_points/NAME.json thresholds of sites, added later by `lungopacity threshold` and not
                           listed in SHA256SUMS. See `site_points`
SHA256SUMS                 checksums of the files above, written last: a folder without it is
                           unfinished. Every load checks them; so does `sha256sum -c SHA256SUMS`
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.errors import NOTICE, ImageError, UserError
from lungopacity.models.model import ModelSpec, OperatingPoint, TrainedModel, document_of, sha256
from lungopacity.radiograph import Preprocessing
from lungopacity.storage import Store, open_store
from lungopacity.storage.parquet import parquet_bytes

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
SPEC_FILE = "model.json"
DISTRIBUTION_FILE = "distribution.safetensors"
COMPILED_FILE = "compiled.safetensors"
HISTORY_FILE = "history.parquet"
VALIDATION_FILE = "validation.parquet"
TRAINING_FILMS_FILE = "training_films.parquet"
_VIEW = "view_position"
SUMS_FILE = "SHA256SUMS"
_OPTIONAL = (
    DISTRIBUTION_FILE,
    COMPILED_FILE,
    HISTORY_FILE,
    VALIDATION_FILE,
    TRAINING_FILMS_FILE,
)
FORMAT_VERSION = 4
"""Format 1 had no distribution, 2 no validation.parquet and no label map, 3 no class biases and no
training_films.parquet. Such folders are still read, and so are those without a compiled network."""


@dataclass(frozen=True)
class KnownFilms:
    """content_sha256 of the films that a model was trained and validated on."""

    learnt_from: frozenset[str] = frozenset()
    chosen_by: frozenset[str] = frozenset()
    """Validation films, which chose its epoch, calibration and operating points."""

    @property
    def all(self) -> frozenset[str]:
        return self.learnt_from | self.chosen_by


def save_model(
    uri: str,
    model: TrainedModel,
    history_parquet: bytes | None = None,
    validation_parquet: bytes | None = None,
    training_films_parquet: bytes | None = None,
) -> None:
    """Writes a model folder, `SHA256SUMS` last: an interrupted write does not count as a model."""
    store = open_store(uri)
    document = {
        "format_version": FORMAT_VERSION,
        "notice": NOTICE,
        "model_id": model.model_id,
        **document_of(model.spec),
    }
    files = {
        WEIGHTS_FILE: model.weights,
        SPEC_FILE: json.dumps(document, indent=2, sort_keys=True).encode() + b"\n",
    }
    more = {
        DISTRIBUTION_FILE: model.distribution,
        COMPILED_FILE: model.compiled,
        HISTORY_FILE: history_parquet,
        VALIDATION_FILE: validation_parquet,
        TRAINING_FILMS_FILE: training_films_parquet,
    }
    files |= {name: data for name, data in more.items() if data is not None}
    for name, data in files.items():
        store.write(name, data)
    sums = "".join(f"{sha256(data)}  {name}\n" for name, data in files.items())
    store.write(SUMS_FILE, sums.encode())


def validation_parquet(
    digests: Sequence[str],
    labels: Sequence[str],
    logits_VK: npt.NDArray[np.float32],
    logit_columns: Sequence[str],
    views: Sequence[str | None] | None = None,
) -> bytes:
    """The file `validation.parquet`. digests: content_sha256 of the films; labels: their classes;
    logits_VK: raw, (films, classes); logit_columns: what the column of each class is called; views:
    of the films, by labels or header; None if no view is known."""
    columns = {
        "content_sha256": pa.array(digests, pa.string()),
        "label": pa.array(labels),
        _VIEW: pa.nulls(len(digests), pa.string())
        if views is None
        else pa.array(views, pa.string()),
    }
    for index, name in enumerate(logit_columns):
        columns[name] = pa.array(logits_VK[:, index], pa.float32())
    return parquet_bytes(pa.table(columns).replace_schema_metadata({"notice": NOTICE}))


def training_films_parquet(digests: Sequence[str]) -> bytes:
    """The file `training_films.parquet`."""
    table = pa.table({"content_sha256": pa.array(digests, pa.string())})
    return parquet_bytes(table.replace_schema_metadata({"notice": NOTICE}))


def is_model(uri: str) -> bool:
    """Whether a finished model folder is there."""
    return open_store(uri).head(SUMS_FILE) is not None


def refuse_model(output: str, advice: str = "choose another --output, or remove it") -> None:
    """Raises `UserError` where `output` is a finished model folder already. advice: what to do."""
    if is_model(output):
        raise UserError(f"{output}: holds a finished model; {advice}")


def load_model(uri: str) -> TrainedModel:
    """Reads and verifies a model folder.

    Raises `UserError` where it is absent, unfinished, altered, or in a newer format.
    """
    store = open_store(uri)
    files = _verified_files(store, uri)
    try:
        document = json.loads(files[SPEC_FILE])
        if document["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{uri}: model format {document['format_version']} is newer than {FORMAT_VERSION}, "
                "the newest that this version reads; upgrade lungopacity"
            )
        spec, model_id = _spec_of(document), document["model_id"]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{uri}: {SPEC_FILE} is damaged ({why}); restore the folder or train again"
        ) from error
    model = TrainedModel(
        spec, files[WEIGHTS_FILE], files.get(DISTRIBUTION_FILE), files.get(COMPILED_FILE)
    )
    if model.model_id != model_id:
        raise UserError(
            f"{uri}: {SPEC_FILE} names model {model_id}, but its contents are model "
            f"{model.model_id}; restore the folder or train again"
        )
    return model


def _spec_of(document: dict[str, Any]) -> ModelSpec:
    # Fields that older folders lack take their defaults.
    known = {name: document[name] for name in ModelSpec.__dataclass_fields__ if name in document}
    biases = known.get("class_biases")
    return ModelSpec(
        **{
            **known,
            "class_names": tuple(known["class_names"]),
            "class_biases": None if biases is None else tuple(biases),
            "preprocessing": Preprocessing(**known["preprocessing"]),
            "operating_point": OperatingPoint.of(known["operating_point"]),
            "operating_points": {
                name: OperatingPoint.of(point)
                for name, point in known.get("operating_points", {}).items()
            },
        }
    )


def read_history(uri: str) -> bytes | None:
    """The folder's `history.parquet`, verified; None for an ensemble."""
    return _verified_files(open_store(uri), uri).get(HISTORY_FILE)


def read_validation(uri: str) -> bytes:
    """The folder's `validation.parquet`, verified. Raises `UserError` for an older folder without
    it."""
    found = find_validation(uri)
    if found is None:
        raise UserError(f"{uri}: has no {VALIDATION_FILE} (an older folder); train it again")
    return found


def validation_films(uri: str) -> tuple[pd.DataFrame, npt.NDArray[np.float32]]:
    """The validation films of the folder, with `content_sha256`, `label` and `view_position` (None
    where it is unknown, as in older folders), and their raw logits, (films, classes). Raises as
    `read_validation` does."""
    import pandas as pd  # here, because processes that only score do without it

    kept = pd.read_parquet(io.BytesIO(read_validation(uri)))
    told = kept[_VIEW] if _VIEW in kept else [None] * len(kept)
    kept[_VIEW] = pd.Series([None if pd.isna(view) else view for view in told], dtype=object)
    facts = ["content_sha256", "label", _VIEW]
    # By place, because older folders name the columns of logits otherwise.
    return kept[facts], kept.drop(columns=facts).to_numpy(np.float32)


def find_validation(uri: str) -> bytes | None:
    """The same; None for an older folder without it."""
    return _verified_files(open_store(uri), uri).get(VALIDATION_FILE)


def find_training_films(uri: str) -> bytes | None:
    """The folder's `training_films.parquet`, verified; None for an older folder without it."""
    return _verified_files(open_store(uri), uri).get(TRAINING_FILMS_FILE)


def films_known_to(uri: str) -> frozenset[str]:
    """content_sha256 of the films that the model in the folder was trained or validated on. An
    older folder does not tell which it was trained on; a warning says so."""
    return known_films(uri).all


def known_films(uri: str) -> KnownFilms:
    """The same, training and validation films apart."""
    kept = _verified_files(open_store(uri), uri)
    if TRAINING_FILMS_FILE not in kept:
        log.warning(
            "%s does not tell which films it learnt from; figures on any of those would flatter it",
            uri,
        )
    return KnownFilms(
        *(_digests(kept.get(name)) for name in (TRAINING_FILMS_FILE, VALIDATION_FILE))
    )


def _digests(parquet: bytes | None) -> frozenset[str]:
    if parquet is None:
        return frozenset()
    table = pq.read_table(pa.BufferReader(parquet), columns=["content_sha256"])
    return frozenset(table[0].to_pylist())


def _verified_files(store: Store, uri: str) -> dict[str, bytes]:
    if store.head(SUMS_FILE) is None:
        unfinished = store.head(WEIGHTS_FILE) is not None
        raise UserError(
            f"{uri}: the model folder is unfinished (no {SUMS_FILE}); "
            "run the same train command again"
            if unfinished
            else f"{uri}: is not a model folder; give the --output of `lungopacity train`"
        )
    try:
        lines = store.read(SUMS_FILE).decode("ascii").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        required = {name: sums[name] for name in (WEIGHTS_FILE, SPEC_FILE)}
        expected = required | {name: sums[name] for name in _OPTIONAL if name in sums}
        files = {name: store.read(name) for name in expected}
    except ImageError as error:
        raise UserError(
            f"{uri}: cannot be read completely ({error.message}); {error.advice}"
        ) from error
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{uri}: {SUMS_FILE} is damaged; restore the folder or train again"
        ) from error
    for name, data in files.items():
        if sha256(data) != expected[name]:
            raise UserError(
                f"{uri}: {name} was altered after training (SHA-256 differs); "
                "restore the folder or train again"
            )
    return files
