"""The model folder: what training writes, and evaluation and screening read.

model.safetensors          the weights, no pickle
model.json                 everything else that decides a score, and what the model earned
distribution.safetensors   where the training films lie in the model's feature space
compiled.safetensors       the network as CPUs run it, where that is faster; see `compiled`
history.parquet            loss and accuracy by epoch; an ensemble has none
validation.parquet         what the kept weights say of each validation film, for thresholds and
                           ensembles: content_sha256, label, and a raw logit a class. An ensemble's
                           is what its members say, each of the film decoded at its own size
training_films.parquet     content_sha256 of the films that it learnt from, or that the model knew
                           whose weights it began with: no test of it has them
operating_points/NAME.json thresholds of sites, added later by `lungopacity threshold`; not among
                           the sums. See `site_points`
SHA256SUMS                 of the files above, written last: a folder without it is unfinished.
                           `sha256sum -c SHA256SUMS` checks it, and so does every load.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.errors import NOTICE, ImageError, UserError
from lungopacity.models.model import ModelSpec, OperatingPoint, TrainedModel, sha256
from lungopacity.radiograph import Preprocessing
from lungopacity.storage import Store, open_store
from lungopacity.storage.parquet import parquet_bytes

log = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
SPEC_FILE = "model.json"
DISTRIBUTION_FILE = "distribution.safetensors"
COMPILED_FILE = "compiled.safetensors"
HISTORY_FILE = "history.parquet"
VALIDATION_FILE = "validation.parquet"
TRAINING_FILMS_FILE = "training_films.parquet"
SUMS_FILE = "SHA256SUMS"
_OPTIONAL = (
    DISTRIBUTION_FILE,
    COMPILED_FILE,
    HISTORY_FILE,
    VALIDATION_FILE,
    TRAINING_FILMS_FILE,
)
FORMAT_VERSION = 4
"""1 had no distribution, 2 no validation.parquet and no label map, 3 no class biases and no
training_films.parquet; such folders are still read, and those without a compiled network."""


@dataclass(frozen=True)
class KnownFilms:
    """content_sha256 of the films that a model has met."""

    learnt_from: frozenset[str] = frozenset()
    chosen_by: frozenset[str] = frozenset()
    """Those of validation: its epoch, calibration and operating points were."""

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
    """Write a model folder; `SHA256SUMS` last, so that an interrupted write is no model."""
    store = open_store(uri)
    document = {
        "format_version": FORMAT_VERSION,
        "notice": NOTICE,
        "model_id": model.model_id,
        **asdict(model.spec),
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
    class_names: Sequence[str],
) -> bytes:
    """The file `validation.parquet`: digests of the films' files, their classes, and raw logits."""
    columns = {"content_sha256": pa.array(digests, pa.string()), "label": pa.array(labels)}
    for index, name in enumerate(class_names):
        columns[f"logit_{name}"] = pa.array(logits_VK[:, index], pa.float32())
    return parquet_bytes(pa.table(columns).replace_schema_metadata({"notice": NOTICE}))


def training_films_parquet(digests: Sequence[str]) -> bytes:
    """The file `training_films.parquet`."""
    table = pa.table({"content_sha256": pa.array(digests, pa.string())})
    return parquet_bytes(table.replace_schema_metadata({"notice": NOTICE}))


def is_model(uri: str) -> bool:
    """Whether a finished model folder lies there."""
    return open_store(uri).head(SUMS_FILE) is not None


def refuse_model(output: str, mend: str = "choose another --output, or remove it") -> None:
    """Raises `UserError` where a finished model folder lies at the URI that is to become one."""
    if is_model(output):
        raise UserError(f"{output}: holds a finished model; {mend}")


def load_model(uri: str) -> TrainedModel:
    """Read and verify a model folder.

    Raises `UserError` where it is absent, unfinished, altered, or of a newer format.
    """
    store = open_store(uri)
    files = _verified_files(store, uri)
    try:
        document = json.loads(files[SPEC_FILE])
        if document["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{uri}: model format {document['format_version']} is newer than {FORMAT_VERSION}, "
                "the newest that this lungopacity reads; upgrade it"
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
            f"{uri}: {SPEC_FILE} says model {model_id}, its contents are {model.model_id}; restore "
            "the folder or train again"
        )
    return model


def _spec_of(document: dict[str, Any]) -> ModelSpec:
    # What older folders lack has a default.
    known = {name: document[name] for name in ModelSpec.__dataclass_fields__ if name in document}
    biases = known.get("class_biases")
    return ModelSpec(
        **{
            **known,
            "class_names": tuple(known["class_names"]),
            "class_biases": None if biases is None else tuple(biases),
            "preprocessing": Preprocessing(**known["preprocessing"]),
            "operating_point": OperatingPoint(**known["operating_point"]),
            "operating_points": {
                name: OperatingPoint(**point)
                for name, point in known.get("operating_points", {}).items()
            },
        }
    )


def read_history(uri: str) -> bytes | None:
    """The folder's `history.parquet`, verified; None for an ensemble."""
    return _verified_files(open_store(uri), uri).get(HISTORY_FILE)


def read_validation(uri: str) -> bytes:
    """The folder's `validation.parquet`, verified. Raises `UserError` where an older lungopacity
    wrote the folder."""
    found = find_validation(uri)
    if found is None:
        raise UserError(f"{uri}: has no {VALIDATION_FILE} (an older folder); train it again")
    return found


def find_validation(uri: str) -> bytes | None:
    """The same; None where an older lungopacity wrote the folder."""
    return _verified_files(open_store(uri), uri).get(VALIDATION_FILE)


def find_training_films(uri: str) -> bytes | None:
    """The folder's `training_films.parquet`, verified; None where an older lungopacity wrote it."""
    return _verified_files(open_store(uri), uri).get(TRAINING_FILMS_FILE)


def films_known_to(uri: str) -> frozenset[str]:
    """content_sha256 of the films that the model in the folder learnt from, or was chosen and
    calibrated by, as far as the folder tells; a warning says what it does not."""
    return known_films(uri).all


def known_films(uri: str) -> KnownFilms:
    """The same, told apart."""
    kept = _verified_files(open_store(uri), uri)
    if TRAINING_FILMS_FILE not in kept:
        log.warning(
            "%s does not tell which films it learnt from: figures of any of them would flatter it",
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
            else f"{uri}: no model folder there; give the --output of `lungopacity train`"
        )
    try:
        lines = store.read(SUMS_FILE).decode("ascii").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        required = {name: sums[name] for name in (WEIGHTS_FILE, SPEC_FILE)}
        told = required | {name: sums[name] for name in _OPTIONAL if name in sums}
        files = {name: store.read(name) for name in told}
    except ImageError as error:
        raise UserError(f"{uri}: cannot be read whole ({error.message}); {error.mend}") from error
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{uri}: {SUMS_FILE} is damaged; restore the folder or train again"
        ) from error
    for name, data in files.items():
        if sha256(data) != told[name]:
            raise UserError(
                f"{uri}: {name} was altered after training (SHA-256 differs); "
                "restore the folder or train again"
            )
    return files
