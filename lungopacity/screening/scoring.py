"""From pixels to rows: scores, decisions and distances of the films in a table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lungopacity import observe
from lungopacity.archive.content import error_columns
from lungopacity.errors import ErrorCode, ImageError, Stage, UserError, first_line
from lungopacity.models import TrainedModel
from lungopacity.models.scorer import no_number
from lungopacity.radiograph import OUT_OF_DISTRIBUTION
from lungopacity.results.schema import class_column, part_schema
from lungopacity.runtime import check_same_code, leave_no_core
from lungopacity.screening.explanations import PICTURE, Explainer
from lungopacity.screening.resources import ScoringResources

if TYPE_CHECKING:
    from lungopacity.models.scorer import Scores

_DISTANCE = "out_of_distribution_score"


class ScoreImages:
    """Turns tables of `READ_SCHEMA` into tables of `part_schema`. One per process, on one device.

    `model`: a Ray reference to a `TrainedModel`. `reject_unlike`: reject films that are flagged
    `out_of_distribution`. `code`: the driver's `code_digest`, for an actor.
    """

    def __init__(
        self,
        model: Any,
        resources: ScoringResources,
        reject_unlike: bool,
        explainer: Explainer | None,
        precision: str,
        code: str | None = None,
    ) -> None:
        self.use_gpu = resources.use_gpu
        self.reject_unlike = reject_unlike
        self.explainer = explainer
        self.start_error: Exception | None = None
        try:
            if code is not None:
                check_same_code(code)
                leave_no_core()
            self._start(model, resources.threads, precision)
        except Exception as error:
            # Raised by the first call: of an exception in __init__, Ray passes on only the text.
            self.start_error = self._explained(error)

    def _start(self, model: Any, threads: int | None, precision: str) -> None:
        import ray

        from lungopacity.models.scorer import Scorer

        self.model: TrainedModel = ray.get(model)
        self.scorer = Scorer(self.model, use_gpu=self.use_gpu, threads=threads, precision=precision)
        self.schema = part_schema(self.model.spec.class_names)
        if self.explainer is not None:
            self.schema = self.schema.append(pa.field(PICTURE, pa.binary()))

    def __call__(self, read: pa.Table) -> pa.Table:
        if self.start_error is not None:
            raise self.start_error
        try:
            return self._scored(read)
        except Exception as error:
            explained = self._explained(error)
            if explained is error:
                raise
            raise explained from error

    def _explained(self, error: Exception) -> Exception:
        """The error itself; or for an error of the GPU, one that says what to do or that Ray
        retries."""
        if not self.use_gpu:
            return error
        import torch
        from ray.exceptions import RaySystemError

        line = first_line(error).rstrip(".")
        if not torch.cuda.is_available():
            return UserError(
                f"torch cannot use a node's GPU: {line}; run `lungopacity doctor` "
                "on that node, or use --no-gpu"
            )
        if isinstance(error, torch.OutOfMemoryError):
            return UserError(
                f"a GPU has too little memory: {line}; use a smaller --batch-size, "
                "or fewer copies of the model on it (--gpus-per-actor 1)"
            )
        if isinstance(error, torch.AcceleratorError):
            # Handled like a lost node: the next round starts a new actor, perhaps on another GPU.
            lost: Exception = RaySystemError(line)
            return lost
        return error

    def _scored(self, read: pa.Table) -> pa.Table:
        size = self.model.spec.preprocessing.image_size
        has_pixels = pa.compute.is_valid(read["pixels"])
        pixels_NHW = _pixels(read["pixels"]).reshape(-1, size, size)
        began = time.perf_counter()
        scores = self.scorer.scores(pixels_NHW, batch_size=max(1, len(pixels_NHW)))
        unlike_N = self.scorer.out_of_distribution(scores.features_NF)
        observe.count("model_seconds", time.perf_counter() - began)
        rows = np.flatnonzero(np.asarray(has_pixels))
        sound_N = (
            scores.are_numbers if unlike_N is None else scores.are_numbers & np.isfinite(unlike_N)
        )
        broken = np.zeros(read.num_rows, bool)
        broken[rows[~sound_N]] = True
        if not sound_N.all():
            rows, pixels_NHW, scores = rows[sound_N], pixels_NHW[sound_N], scores.of(sound_N)
            unlike_N = None if unlike_N is None else unlike_N[sound_N]
        views = read["view_position"].take(pa.array(rows)).to_pylist()
        found = self._score_columns(scores, views) | _distance_columns(unlike_N, len(rows))
        found |= self._explanations(read, rows, pixels_NHW, found)
        place = np.full(read.num_rows, -1)
        place[rows] = np.arange(len(rows))
        take = pa.array(place, mask=place < 0)
        columns = {name: read[name] for name in read.column_names if name in self.schema.names}
        columns |= {name: column.take(take) for name, column in found.items()}
        if broken.any():
            columns = _instead(columns, pa.array(broken), error_columns(no_number()), self.schema)
        if self.reject_unlike:
            columns = _without_unlike(columns, self.schema)
        columns["screened_at"] = pa.array([datetime.now(UTC)] * read.num_rows)
        return pa.table({name: columns[name] for name in self.schema.names}).cast(self.schema)

    def _explanations(
        self,
        read: pa.Table,
        rows: npt.NDArray[np.int64],
        pixels_NHW: npt.NDArray[np.uint8],
        found: dict[str, pa.Array],
    ) -> dict[str, pa.Array]:
        if self.explainer is None:
            return {"explanation": pa.nulls(len(pixels_NHW), pa.string())}
        shown = pa.compute.equal(found["decision"], "positive")
        if self.reject_unlike:
            unlike = pa.compute.fill_null(found[f"quality_{OUT_OF_DISTRIBUTION}"], False)
            shown = pa.compute.and_not(shown, unlike)
        films = read.take(rows)
        return self.explainer.columns(self.scorer, films, pixels_NHW, found, np.asarray(shown))

    def _score_columns(self, scores: Scores, views: Sequence[str | None]) -> dict[str, pa.Array]:
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
                spec.operating_point.decide(float(probability), view)
                for probability, view in zip(
                    probabilities_NK[:, spec.positive_index], views, strict=True
                )
            ],
            pa.string(),
        )
        columns["ensemble_disagreement"] = (
            pa.nulls(len(predicted), pa.float32())
            if scores.disagreement_N is None
            else pa.array(scores.disagreement_N)
        )
        return columns


def _pixels(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """The pixel bytes of all films that have any, one after the other. Not copied if they are
    contiguous: as Python objects they would be copied twice, which takes as long as the whole
    forward pass of a GPU."""
    parts = [np.empty(0, np.uint8)]
    for chunk in column.drop_null().chunks:
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        if ends[-1] > ends[0]:
            parts.append(np.frombuffer(data, np.uint8)[ends[0] : ends[-1]])
    return parts[1] if len(parts) == 2 else np.concatenate(parts)


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
    """The columns, with films that are unlike the training films rejected and without scores."""
    error = error_columns(ImageError(ErrorCode.POOR_QUALITY, Stage.SCORE, OUT_OF_DISTRIBUTION))
    scores = ("p_", "logit_", "predicted_label", "decision", "ensemble_disagreement", "explanation")
    unlike = pa.compute.fill_null(columns[f"quality_{OUT_OF_DISTRIBUTION}"], False)
    instead = {name: None for name in columns if name.startswith(scores)} | error
    return _instead(columns, unlike, instead, schema)


def _instead(
    columns: dict[str, Any], where: pa.Array, values: dict[str, Any], schema: pa.Schema
) -> dict[str, Any]:
    """The columns, with `values` in the rows where `where` is true."""
    return columns | {
        name: pa.compute.if_else(where, pa.scalar(value, schema.field(name).type), columns[name])
        for name, value in values.items()
    }
