"""The Ray Data pipeline: read ▶ score ▶ part files. Nothing else moves images.

Attempts write freely under `_work/`; `publish` makes the truth of what they wrote. So a task that
Ray runs twice does no harm, and the driver holds no image and no row: a few numbers a part file.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lungopacity import observe
from lungopacity.archive.content import ReadSettings, error_columns
from lungopacity.archive.stream import read_tasks, stream_images
from lungopacity.errors import ErrorCode, ImageError, Stage, Status, UserError
from lungopacity.models import TrainedModel
from lungopacity.radiograph import OUT_OF_DISTRIBUTION
from lungopacity.results.schema import class_column, part_schema
from lungopacity.results.workbench import parquet_bytes
from lungopacity.runtime import capacity, require_resources, worker_environment
from lungopacity.screening.explanations import PICTURE, Explainer, write_pictures
from lungopacity.storage import Store

if TYPE_CHECKING:
    from lungopacity.models.scorer import Scores

OBJECTS = "objects"
_DISTANCE = "out_of_distribution_score"
ROWS_PER_PART = 512
"""What a killed job loses of finished work at most; publishing merges the small files."""
_MODELS_A_WRITER = 8
_RETRIES = 3
"""Of a task or actor whose process dies. Ray's own default for actors is for ever."""


@dataclass(frozen=True)
class ScoringResources:
    """What the model stage takes of the cluster."""

    min_actors: int
    max_actors: int
    actor_cpus: float
    actor_gpus: float
    threads: int | None
    """CPU threads of one actor's forward pass; None on a GPU."""

    @property
    def use_gpu(self) -> bool:
        return self.actor_gpus > 0

    @staticmethod
    def of_cluster(
        use_gpu: bool, gpus_per_actor: float = 1.0, model_actors: int | None = None
    ) -> ScoringResources:
        """Fit the cluster, as it is or may autoscale to.

        `model_actors`: so many; None is one for each `gpus_per_actor` of the GPUs, and without GPUs
        as many as leave one CPU to reading. `gpus_per_actor`: 0.5 puts two actors on one GPU.
        Raises `UserError` where the cluster has too little: Ray would wait without a word.
        """
        import ray

        if not 0 < gpus_per_actor <= 1:
            raise UserError(
                f"--gpus-per-actor must be above 0 and at most 1, not {gpus_per_actor:g}"
            )
        if model_actors is not None and model_actors < 1:
            raise UserError(f"--model-actors must be at least 1, not {model_actors}")
        most = capacity()
        if use_gpu:
            # An actor lies on one GPU whole: two of 0.6 do not share one.
            a_gpu = int(1 / gpus_per_actor + 1e-9)
            wanted_gpus = 1 if model_actors is None else -(-model_actors // a_gpu)
            require_resources(cpus=1, gpus=wanted_gpus, what="screening")
            actors = model_actors or int(most["GPU"]) * a_gpu
            return ScoringResources(1, actors, 0.0, gpus_per_actor, threads=None)
        # One CPU reads; on a cluster of one CPU the actor must take none.
        wanted_cpus = 1 if model_actors in (None, 1) else model_actors + 1
        require_resources(cpus=wanted_cpus, gpus=0, what="screening")
        cpus = int(most["CPU"])
        largest_node = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes())
        # A small machine gives its one actor every core: while it computes, reading waits for it.
        threads = largest_node if cpus <= 2 else 1
        actors = model_actors or max(1, cpus - 1)
        return ScoringResources(1, actors, 1.0 if cpus >= 2 else 0.0, 0.0, threads=threads)


class _ScoreImages:
    """The model stage: tables of `READ_SCHEMA` to tables of `part_schema`. One per actor."""

    def __init__(
        self,
        model: Any,
        resources: ScoringResources,
        reject_unlike: bool,
        explainer: Explainer | None,
    ) -> None:
        import ray

        from lungopacity.models.scorer import Scorer

        self.model: TrainedModel = ray.get(model)
        self.scorer = Scorer(self.model, use_gpu=resources.use_gpu, threads=resources.threads)
        self.reject_unlike = reject_unlike
        self.explainer = explainer
        self.schema = part_schema(self.model.spec.class_names)
        if explainer is not None:
            self.schema = self.schema.append(pa.field(PICTURE, pa.binary()))

    def __call__(self, read: pa.Table) -> pa.Table:
        size = self.model.spec.preprocessing.image_size
        has_pixels = pa.compute.is_valid(read["pixels"])
        images = read["pixels"].filter(has_pixels)
        pixels_NHW = np.frombuffer(b"".join(images.to_pylist()), np.uint8).reshape(-1, size, size)
        began = time.perf_counter()
        scores = self.scorer.scores(pixels_NHW, batch_size=max(1, len(pixels_NHW)))
        unlike = self.scorer.out_of_distribution(scores.features_NF)
        observe.count("model_seconds", time.perf_counter() - began)
        found = self._score_columns(scores) | _distance_columns(unlike, len(pixels_NHW))
        found |= self._explanations(read.filter(has_pixels), pixels_NHW, found)
        rows = np.flatnonzero(np.asarray(has_pixels))
        place = np.full(read.num_rows, -1)
        place[rows] = np.arange(len(rows))
        take = pa.array(place, mask=place < 0)
        columns = {name: read[name] for name in read.column_names if name in self.schema.names}
        columns |= {name: column.take(take) for name, column in found.items()}
        if self.reject_unlike:
            columns = _without_unlike(columns, self.schema)
        columns["screened_at"] = pa.array([datetime.now(UTC)] * read.num_rows)
        return pa.table({name: columns[name] for name in self.schema.names}).cast(self.schema)

    def _explanations(
        self, films: pa.Table, pixels_NHW: npt.NDArray[np.uint8], found: dict[str, pa.Array]
    ) -> dict[str, pa.Array]:
        if self.explainer is None:
            return {"explanation": pa.nulls(len(pixels_NHW), pa.string())}
        shown = pa.compute.equal(found["decision"], "positive")
        if self.reject_unlike:
            unlike = pa.compute.fill_null(found[f"quality_{OUT_OF_DISTRIBUTION}"], False)
            shown = pa.compute.and_not(shown, unlike)
        return self.explainer.columns(self.scorer, films, pixels_NHW, found, np.asarray(shown))

    def _score_columns(self, scores: Scores) -> dict[str, pa.Array]:
        spec = self.model.spec
        probabilities_NK = self.scorer.probabilities(scores.logits_NK)
        columns: dict[str, pa.Array] = {}
        for index, name in enumerate(spec.class_names):
            columns[class_column("p", name)] = pa.array(probabilities_NK[:, index])
            columns[class_column("logit", name)] = pa.array(scores.logits_NK[:, index])
        predicted = probabilities_NK.argmax(axis=1)
        columns["predicted_label"] = pa.array(
            [spec.class_names[index] for index in predicted], pa.string()
        )
        columns["decision"] = pa.array(
            [
                spec.operating_point.decide(float(probability))
                for probability in probabilities_NK[:, spec.positive_index]
            ],
            pa.string(),
        )
        columns["ensemble_disagreement"] = (
            pa.nulls(len(predicted), pa.float32())
            if scores.disagreement_N is None
            else pa.array(scores.disagreement_N)
        )
        return columns


def _distance_columns(unlike_N: npt.NDArray[np.float32] | None, count: int) -> dict[str, pa.Array]:
    if unlike_N is None:
        return {
            _DISTANCE: pa.nulls(count, pa.float32()),
            f"quality_{OUT_OF_DISTRIBUTION}": pa.nulls(count, pa.bool_()),
        }
    return {
        _DISTANCE: pa.array(unlike_N),
        f"quality_{OUT_OF_DISTRIBUTION}": pa.array(unlike_N > 1),
    }


def _without_unlike(columns: dict[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """The user wants no score of a film that is unlike the training films."""
    error = error_columns(ImageError(ErrorCode.POOR_QUALITY, Stage.SCORE, OUT_OF_DISTRIBUTION))
    scores = ("p_", "logit_", "predicted_label", "decision", "ensemble_disagreement", "explanation")
    unlike = pa.compute.fill_null(columns[f"quality_{OUT_OF_DISTRIBUTION}"], False)
    instead = {name: None for name in columns if name.startswith(scores)} | error
    return columns | {
        name: pa.compute.if_else(unlike, pa.scalar(value, schema.field(name).type), columns[name])
        for name, value in instead.items()
    }


class _WriteParts:
    """The last stage: tables of `part_schema` to part files, and a report of each to the driver."""

    def __init__(self, results: Store, attempt: str) -> None:
        self.results, self.attempt = results, attempt

    def __call__(self, rows: pa.Table) -> pa.Table:
        try:
            rows = write_pictures(self.results, rows)
            key = f"{self.attempt}{uuid.uuid4().hex}.parquet"
            self.results.write(key, parquet_bytes(rows))
        except UserError as error:
            # As a row: of what an actor raises, Ray hands on the text of a traceback alone.
            return _part_report({}, error=str(error))
        images = rows.filter(pa.compute.is_null(rows["shard_rows"]))
        codes = images["error_code"].to_pylist()
        found = Counter(zip(images["status"].to_pylist(), codes, strict=True))
        for (status, code), number in found.items():
            observe.count("images", number, {"status": status, "error_code": code or ""})
        counts = Counter(images["status"].to_pylist())
        # An object is done with its one row, or with the row that closes the pass over it.
        ends = pa.compute.or_(
            pa.compute.is_valid(rows["shard_rows"]), pa.compute.is_null(rows["reading"])
        )
        objects = pa.compute.sum(ends).as_py()
        return _part_report({**counts, OBJECTS: objects})


def screen_objects(
    archive_uri: str,
    objects: pa.Table,
    model: TrainedModel,
    settings: ReadSettings,
    results: Store,
    work: str,
    resources: ScoringResources,
    batch_size: int,
    explainer: Explainer | None = None,
) -> Iterator[Counter[str]]:
    """Screen the objects of `PLAN_SCHEMA`; yields, for each part file that has landed, its counts
    of images (`ok`, `rejected`, `failed`) and of finished `objects`. `explainer`: positive films
    get pictures.

    Raises `UserError` where part files cannot be written.
    """
    import ray

    attempt = f"{work}attempt={uuid.uuid4().hex}/"

    images = stream_images(archive_uri, read_tasks(objects), settings)
    with warnings.catch_warnings():
        # Ray 2.60 deprecates max_restarts and max_task_retries here, without a successor.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        scored = images.map_batches(
            _ScoreImages,
            fn_constructor_args=(
                ray.put(model),
                resources,
                OUT_OF_DISTRIBUTION in settings.reject_quality,
                explainer,
            ),
            batch_size=batch_size,
            batch_format="pyarrow",
            num_cpus=resources.actor_cpus,
            num_gpus=resources.actor_gpus,
            compute=ray.data.ActorPoolStrategy(
                min_size=resources.min_actors, max_size=resources.max_actors
            ),
            max_restarts=_RETRIES,
            max_task_retries=_RETRIES,
            runtime_env=worker_environment(resources.use_gpu),
        )
        # Actors, for Ray ends a worker that had no task for a second, and a new one takes two
        # seconds of CPU time: as tasks, these cost a fifth of a small machine. No CPU of their own:
        # they wait on storage, and must run however busy the other stages are.
        parts = scored.map_batches(
            _WriteParts,
            fn_constructor_args=(results, attempt),
            batch_size=ROWS_PER_PART,
            batch_format="pyarrow",
            num_cpus=0,
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=-(-resources.max_actors // _MODELS_A_WRITER)
            ),
            max_restarts=_RETRIES,
            max_task_retries=_RETRIES,
        )
    for part in parts.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in part.to_pylist():
            error = row.pop("error")
            if error is not None:
                raise UserError(error)
            yield Counter(row)


def _part_report(counts: Mapping[str, int], error: str | None = None) -> pa.Table:
    """What the driver is told of a part file; `error`: why it did not land."""
    columns = {name: [counts.get(name, 0)] for name in (*map(str, Status), OBJECTS)}
    return pa.table({**columns, "error": pa.array([error], pa.string())})
