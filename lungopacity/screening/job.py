"""The settings of a screening run, read and checked before the archive is listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypedDict

from lungopacity.archive.content import ReadSettings, settings_of_model
from lungopacity.archive.inventory import below
from lungopacity.errors import UserError
from lungopacity.evaluation.drift import Sample
from lungopacity.models import (
    TrainedModel,
    films_known_to,
    films_of_site_point,
    load_model,
    with_operating_point,
)
from lungopacity.models.scorer import FLOAT32, check_precision
from lungopacity.results.folder import read_run
from lungopacity.results.query import files_of_runs, predictions_of
from lungopacity.results.schema import check_class_columns, class_column
from lungopacity.results.workbench import workbench
from lungopacity.screening.pseudonyms import Pseudonyms, read_pseudonyms
from lungopacity.screening.resources import check_actors
from lungopacity.screening.rules import Rules
from lungopacity.storage import Store, open_store

if TYPE_CHECKING:
    import pandas as pd

MAX_FAILED_FRACTION = 0.05


class ScreeningOptions(TypedDict, total=False):
    """Options that `screen` and `nightly` pass on; see `screening_job`."""

    accept: Sequence[str]
    reject_quality: Sequence[str] | None
    max_failed_fraction: float
    hmac_key: str | None
    hash_keys: bool
    key_map: str | None
    labels: str | None
    batch_size: int | None
    use_gpu: bool | None
    gpus_per_actor: float
    model_actors: int | None
    baseline: str | None
    operating_point: str | None
    explain: bool
    precision: str


@dataclass(frozen=True)
class ScreeningJob:
    """The checked settings of a run: model, results folder, rules and resources."""

    model_uri: str
    model: TrainedModel
    results: Store
    read_settings: ReadSettings
    pseudonyms: Pseudonyms | None
    labels: pd.DataFrame | None
    batch_size: int | None
    max_failed_fraction: float
    use_gpu: bool | None
    gpus_per_actor: float = 1.0
    model_actors: int | None = None
    known_films: frozenset[str] = frozenset()
    """With labels: see `films_known_to`. Metrics against the labels leave these films out."""
    point_films: frozenset[str] = frozenset()
    """With labels: see `films_of_site_point`. Decisions on these films are better than on others,
    because the operating point was picked on them."""
    operating_point: str | None = None
    """The name of the operating point; None is the model's own choice."""
    baseline: Sample | None = None
    """Sample of the run that drift is measured against."""
    explain: bool = False
    """Write a picture of each positive film, see `Explainer`."""
    precision: str = FLOAT32
    """Of the forward pass, one of `PRECISIONS`."""
    noted: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the commit record."""

    @property
    def written(self) -> tuple[str, ...]:
        """URIs of the places that the run writes to."""
        return (self.results.uri,) if self.key_map is None else (self.results.uri, self.key_map)

    @property
    def key_map(self) -> str | None:
        """URI of the folder that keeps the names behind hashes; None if names are not hashed."""
        return None if self.pseudonyms is None else self.pseudonyms.key_map

    @property
    def rules(self) -> Rules:
        spec = self.model.spec
        return Rules(
            positive_class=spec.positive_class,
            accept=tuple(sorted(code.value for code in self.read_settings.accept)),
            reject_quality=tuple(sorted(self.read_settings.reject_quality)),
            hmac_key_fingerprint=None if self.pseudonyms is None else self.pseudonyms.fingerprint,
            hash_keys=self.key_map is not None,
            operating_point=self.operating_point,
            threshold=spec.operating_point.threshold,
            review_from=spec.operating_point.review_from,
            by_view={
                view: {"threshold": of.threshold, "review_from": of.review_from}
                for view, of in spec.operating_point.by_view.items()
            }
            or None,
            explain=self.explain,
            precision=self.precision,
        )


def screening_job(
    model: str,
    output: str,
    *,
    accept: Sequence[str] = (),
    reject_quality: Sequence[str] | None = None,
    max_failed_fraction: float = MAX_FAILED_FRACTION,
    hmac_key: str | None = None,
    hash_keys: bool = False,
    key_map: str | None = None,
    labels: str | None = None,
    batch_size: int | None = None,
    use_gpu: bool | None = None,
    gpus_per_actor: float = 1.0,
    model_actors: int | None = None,
    baseline: str | None = None,
    operating_point: str | None = None,
    explain: bool = False,
    precision: str = FLOAT32,
    noted: Mapping[str, Any] | None = None,
) -> ScreeningJob:
    """Read and check the settings of a run, before the archive is listed.

    `accept`: codes of `radiograph.ACCEPTABLE`; films that would be rejected with them are scored.
    `reject_quality`: quality flags that reject a film; None is the default, () is none.
    `max_failed_fraction`: the run counts as broken if a larger fraction of the images cannot be
    read. `hmac_key`: URI of a file with the key for `patient_hmac` and `study_hmac`. `hash_keys`:
    hash the names of objects, too; `key_map`: folder that keeps the names (default: beside
    `output`). `operating_point`: name of one in the model folder; None is the model's own choice.
    `explain`: write a picture of each positive film below `explanations/`. `batch_size`: images per
    forward pass; None is `batch_size_for` the device. `precision`: float32, or on GPUs bfloat16,
    whose scores differ slightly. `labels`: a labels file, for metrics. Metrics leave out the films
    that the model was trained, selected or calibrated on, and count those that a site's operating
    point was picked on. `baseline`: id of a published run of the same model, to measure drift
    against. `use_gpu`: None uses GPUs if the cluster has any. `gpus_per_actor`, `model_actors`: see
    `ScoringResources.of_cluster`. Raises `UserError`.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    if not 0 <= max_failed_fraction <= 1:
        raise UserError(f"--max-failed-fraction must be from 0 to 1, not {max_failed_fraction}")
    check_precision(precision, use_gpu is not False)
    check_actors(gpus_per_actor, model_actors)
    if hash_keys and hmac_key is None:
        raise UserError("--hash-keys needs --hmac-key FILE")
    if key_map is not None and not hash_keys:
        raise UserError("--key-map needs --hash-keys; give both or neither")
    trained = with_operating_point(model, load_model(model), operating_point)
    read_settings = settings_of_model(model, trained, accept, reject_quality)
    check_class_columns(trained.spec.class_names)
    results = open_store(output)
    pseudonyms = None
    if hmac_key is not None:
        pseudonyms = read_pseudonyms(
            hmac_key, _key_map(results.uri, key_map) if hash_keys else None
        )
    return ScreeningJob(
        # Absolute, because the commit record names it and may be read from another folder.
        model_uri=open_store(model).uri,
        model=trained,
        results=results,
        read_settings=replace(
            read_settings, hmac_key=None if pseudonyms is None else pseudonyms.key
        ),
        pseudonyms=pseudonyms,
        labels=None if labels is None else _read_labels(labels),
        known_films=frozenset() if labels is None else films_known_to(model),
        point_films=frozenset()
        if labels is None
        else _point_films(model, trained, operating_point),
        batch_size=batch_size,
        max_failed_fraction=max_failed_fraction,
        use_gpu=use_gpu,
        gpus_per_actor=gpus_per_actor,
        model_actors=model_actors,
        operating_point=operating_point,
        explain=explain,
        precision=precision,
        baseline=None if baseline is None else _baseline(results, baseline, trained),
        noted={**(noted or {}), **({} if baseline is None else {"baseline": baseline})},
    )


def _point_films(uri: str, model: TrainedModel, name: str | None) -> frozenset[str]:
    """Films that a site's operating point was picked on; none for the model's own points."""
    if name is None or name in model.spec.operating_points:
        return frozenset()
    return films_of_site_point(uri, name)


def _key_map(results: str, given: str | None) -> str:
    """URI of the folder that keeps the names behind hashes. Raises `UserError`."""
    if given is None and results.startswith("s3://") and "/" not in results.removeprefix("s3://"):
        raise UserError(
            f"{results}: the results take up the whole bucket; give --key-map URI, a folder "
            "elsewhere for the names that --hash-keys hides"
        )
    kept = open_store(given or f"{results}-key-map").uri
    if below(kept, results) is not None:
        raise UserError(
            f"--key-map {kept} lies inside the results, where everyone who may query them could "
            "see the names; choose another place"
        )
    return kept


def _baseline(results: Store, run_id: str, model: TrainedModel) -> Sample:
    """The sample that drift is measured against. Raises `UserError` if there is no such run, or it
    is of another model."""
    record = read_run(results, run_id)
    if record is None:
        raise UserError(
            f"--baseline: {results.uri} has no published run '{run_id}'; see `lungopacity runs`"
        )
    if record["model_id"] != model.model_id:
        raise UserError(
            f"--baseline: run '{run_id}' is of model {record['model_id']}, not "
            f"{model.model_id}: scores of two models cannot be compared; choose another run"
        )
    with workbench() as (connection, _), files_of_runs(results):
        connection.register("baseline", predictions_of(results, [record]))
        return Sample.of(
            connection.table("baseline"),
            class_column("p", model.spec.positive_class),
            record.get("failed_again", 0),
        )


def _read_labels(uri: str) -> pd.DataFrame:
    from lungopacity.dataset.manifest import read_labels

    return read_labels(uri)
