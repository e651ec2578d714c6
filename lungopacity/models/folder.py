"""The model folder: what training writes, and evaluation and screening read.

model.safetensors          the weights, no pickle
model.json                 everything else that decides a score, and what the model earned
distribution.safetensors   where the training films lie in the model's feature space
compiled.safetensors       the network as CPUs run it, where that is faster; see `compiled`
history.parquet            loss and accuracy by epoch; an ensemble has none
validation.parquet         what the kept weights say of each validation film, for thresholds and
                           ensembles: content_sha256, label, and a raw logit a class
training_films.parquet     content_sha256 of the films that it learnt from: no test of it has them
operating_points/NAME.json thresholds of sites, added later by `lungopacity threshold`; bound to
                           the model by its id, and not among the sums
SHA256SUMS                 of the files above, written last: a folder without it is unfinished.
                           `sha256sum -c SHA256SUMS` checks it, and so does every load.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.errors import NOTICE, ImageError, UserError
from lungopacity.models.distribution import (
    JointDistribution,
    TrainingDistribution,
    distribution_of_bytes,
)
from lungopacity.models.probabilities import calibrated_logits, softmax
from lungopacity.radiograph import Preprocessing
from lungopacity.storage import ConflictError, Store, open_store

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "model.safetensors"
SPEC_FILE = "model.json"
DISTRIBUTION_FILE = "distribution.safetensors"
COMPILED_FILE = "compiled.safetensors"
HISTORY_FILE = "history.parquet"
VALIDATION_FILE = "validation.parquet"
TRAINING_FILMS_FILE = "training_films.parquet"
OPERATING_POINTS = "operating_points"
_POINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
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
class OperatingPoint:
    """Where a score becomes a decision. Probabilities are of the positive class, 0 … 1."""

    threshold: float
    """At or above: `positive`."""
    review_from: float | None = None
    """At or above, and below `threshold`: `review`. None: no review band."""
    chosen_by: str = ""
    """The rule, as in 'Youden J on validation'."""
    sensitivity: float | None = None
    """At `threshold`, on the images it was chosen on."""
    specificity: float | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold must be from 0 to 1, not {self.threshold}")
        if self.review_from is not None and not 0.0 <= self.review_from <= self.threshold:
            raise ValueError(f"review_from must be from 0 to the threshold, not {self.review_from}")

    def decide(self, probability: float) -> str:
        """negative, review or positive."""
        if probability >= self.threshold:
            return "positive"
        if self.review_from is not None and probability >= self.review_from:
            return "review"
        return "negative"


@dataclass(frozen=True)
class ModelSpec:
    """All of `model.json` but the hashes."""

    architecture: str
    """A name that `lungopacity.models.build_network` knows."""
    architecture_settings: Mapping[str, Any]
    class_names: tuple[str, ...]
    """In the order of the logits."""
    positive_class: str
    """The class whose probability the operating point judges."""
    preprocessing: Preprocessing
    operating_point: OperatingPoint
    """Decides, unless another is asked for by name."""
    operating_points: Mapping[str, OperatingPoint] = field(default_factory=dict)
    """By name: the rules that chose them, as sensitivity=0.95."""
    label_map: Mapping[str, str] = field(default_factory=dict)
    """Label to class, where labels were merged or renamed."""
    temperature: float = 1.0
    """Logits are divided by it before the softmax (Guo et al. 2017)."""
    class_biases: tuple[float, ...] | None = None
    """Added then, one a class; None: none. See `calibrated_logits`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """On validation, at the kept epoch."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Settings, data fingerprint and versions."""
    synthetic: bool = False
    """Trained on phantoms: every output of the model says so."""

    def __post_init__(self) -> None:
        if len(self.class_names) < 2 or len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"class_names must be two or more different names: {self.class_names}")
        if self.positive_class not in self.class_names:
            raise ValueError(f"positive_class {self.positive_class!r} is none of the class names")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if self.class_biases is not None and len(self.class_biases) != len(self.class_names):
            raise ValueError(f"class_biases must be one a class: {self.class_biases}")

    @property
    def class_of_label(self) -> dict[str, str]:
        """Of every label that means a class: its own name, and those that were merged into it."""
        return {name: name for name in self.class_names} | dict(self.label_map)

    @property
    def positive_index(self) -> int:
        return self.class_names.index(self.positive_class)

    def calibrated(self, logits_NK: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """(n, classes) raw logits, calibrated."""
        return calibrated_logits(logits_NK, self.temperature, self.class_biases)

    def probabilities(self, logits_NK: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Calibrated class probabilities of (n, classes) raw logits: rows sum to 1."""
        return softmax(self.calibrated(logits_NK)).astype(np.float32)


@dataclass(frozen=True)
class TrainedModel:
    """A spec with its weights, as they lie in a folder. Ray carries it to the workers by pickle."""

    spec: ModelSpec
    weights: bytes
    """The safetensors file."""
    distribution: bytes | None = None
    """Of `TrainingDistribution`, or of an ensemble's `JointDistribution`, another."""
    compiled: bytes | None = None
    """See `lungopacity.models.compiled`; None: CPUs run the network in torch, too. Not in the id:
    its scores are torch's but for rounding."""

    @property
    def model_id(self) -> str:
        """16 hex digits over everything that can change a score."""
        preprocessing = asdict(self.spec.preprocessing)
        if not preprocessing["crop_borders"]:
            # Folders of before there was a choice keep their ids.
            del preprocessing["crop_borders"]
        decides = {
            "architecture": self.spec.architecture,
            "architecture_settings": dict(self.spec.architecture_settings),
            "class_names": self.spec.class_names,
            "preprocessing": preprocessing,
            "temperature": self.spec.temperature,
            "weights_sha256": _sha256(self.weights),
        }
        if self.spec.class_biases is not None:
            decides["class_biases"] = self.spec.class_biases
        if self.distribution is not None:
            # It decides a flag of each film, and may reject it.
            decides["distribution_sha256"] = _sha256(self.distribution)
        return _sha256(json.dumps(decides, sort_keys=True).encode())[:16]

    def training_distribution(self) -> TrainingDistribution | JointDistribution | None:
        """Where the training films lie; None for a folder of format 1."""
        if self.distribution is None:
            return None
        return distribution_of_bytes(self.distribution)

    def network(self) -> torch.nn.Module:
        """The network with its weights, in evaluation mode, on the CPU."""
        import safetensors.torch

        from lungopacity.models.networks import build_network

        network = build_network(
            self.spec.architecture, len(self.spec.class_names), self.spec.architecture_settings
        )
        network.load_state_dict(safetensors.torch.load(self.weights))
        return network.eval()


def weights_of(network: torch.nn.Module) -> bytes:
    """The network's parameters and buffers as a safetensors file."""
    import safetensors.torch

    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})


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
    sums = "".join(f"{_sha256(data)}  {name}\n" for name, data in files.items())
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
    sink = pa.BufferOutputStream()
    table = pa.table(columns).replace_schema_metadata({"notice": NOTICE})
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def training_films_parquet(digests: Sequence[str]) -> bytes:
    """The file `training_films.parquet`."""
    sink = pa.BufferOutputStream()
    table = pa.table({"content_sha256": pa.array(digests, pa.string())})
    pq.write_table(table.replace_schema_metadata({"notice": NOTICE}), sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def is_model(uri: str) -> bool:
    """Whether a finished model folder lies there."""
    return open_store(uri).head(SUMS_FILE) is not None


def load_model(uri: str) -> TrainedModel:
    """Read and verify a model folder.

    Raises `UserError` where it is absent, unfinished, altered, or of a newer format.
    """
    store = open_store(uri)
    files = _verified_files(store, uri)
    document = json.loads(files[SPEC_FILE])
    if document["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{uri}: model format {document['format_version']} is newer than {FORMAT_VERSION}, "
            "the newest that this lungopacity reads; upgrade it"
        )
    # What older folders lack has a default.
    known = {name: document[name] for name in ModelSpec.__dataclass_fields__ if name in document}
    biases = known.get("class_biases")
    spec = ModelSpec(
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
    model = TrainedModel(
        spec, files[WEIGHTS_FILE], files.get(DISTRIBUTION_FILE), files.get(COMPILED_FILE)
    )
    if model.model_id != document["model_id"]:
        raise UserError(
            f"{uri}: model.json says model {document['model_id']}, its contents are "
            f"{model.model_id}; restore the folder or train again"
        )
    return model


def save_operating_point(uri: str, model: TrainedModel, name: str, point: OperatingPoint) -> None:
    """Keep a site's operating point in the model's folder at `uri`.

    Raises `UserError` where the name cannot be one of a file, or is taken.
    """
    if not _POINT_NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: use up to 100 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    document = {"notice": NOTICE, "model_id": model.model_id, "name": name, **asdict(point)}
    data = json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"
    try:
        open_store(uri).write(f"{OPERATING_POINTS}/{name}.json", data, if_absent=True)
    except ConflictError as error:
        raise UserError(
            f"{uri}: an operating point '{name}' is there already; choose another --name"
        ) from error


def copy_operating_points(source: str, target: str) -> None:
    """Those that sites have added to the folder at `source`, to another of the same model."""
    store, copy = open_store(source), open_store(target)
    for item in store.list(f"{OPERATING_POINTS}/"):
        copy.write(item.key, store.read(item.key))


def with_operating_point(uri: str, model: TrainedModel, name: str | None) -> TrainedModel:
    """The model, deciding at another of its operating points; None leaves it as it is.

    Raises `UserError` where the folder at `uri` has none of that name, or one that was chosen for
    another model: a threshold means something for the scores that it was chosen on alone.
    """
    if name is None:
        return model
    known = model.spec.operating_points.get(name)
    if known is None:
        store = open_store(uri)
        try:
            document = json.loads(store.read(f"{OPERATING_POINTS}/{name}.json"))
            fields = OperatingPoint.__dataclass_fields__
            known = OperatingPoint(**{key: document[key] for key in fields})
            chosen_for = document["model_id"]
        except ImageError as error:
            folder = f"{OPERATING_POINTS}/"
            added = [item.key.removeprefix(folder)[:-5] for item in store.list(folder)]
            raise UserError(
                f"{uri}: has no operating point '{name}'; it has "
                + ", ".join([*model.spec.operating_points, *sorted(added)])
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{uri}: operating point '{name}' is damaged; pick it again") from error
        if chosen_for != model.model_id:
            raise UserError(
                f"{uri}: operating point '{name}' was chosen for model {chosen_for}, not for "
                f"{model.model_id}; pick it again with `lungopacity threshold`"
            )
    return replace(model, spec=replace(model.spec, operating_point=known))


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
    calibrated by, as far as the folder tells."""
    kept = _verified_files(open_store(uri), uri)
    tables = [
        pq.read_table(pa.BufferReader(kept[name]), columns=["content_sha256"])
        for name in (TRAINING_FILMS_FILE, VALIDATION_FILE)
        if name in kept
    ]
    return frozenset(digest for table in tables for digest in table[0].to_pylist())


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
        names = [WEIGHTS_FILE, SPEC_FILE, *(name for name in _OPTIONAL if name in sums)]
        files = {name: store.read(name) for name in names if sums[name]}
    except ImageError as error:
        raise UserError(f"{uri}: cannot be read whole ({error.message}); restore it") from error
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{uri}: {SUMS_FILE} is damaged; restore the folder or train again"
        ) from error
    for name, data in files.items():
        if _sha256(data) != sums[name]:
            raise UserError(
                f"{uri}: {name} was altered after training (SHA-256 differs); "
                "restore the folder or train again"
            )
    return files


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
