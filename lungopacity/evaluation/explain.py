"""Show where on films a model sees the positive class, and whether readers' boxes agree.

Runs in this process, because a handful of films should not wait for a cluster. For a whole archive,
`screen --explain` explains the positive films.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from lungopacity.archive.content import ReadSettings, error_columns, settings_of_model
from lungopacity.archive.inventory import take_inventory
from lungopacity.archive.names import Wanted
from lungopacity.archive.reading import read_images
from lungopacity.dataset.boxes import read_boxes
from lungopacity.dataset.manifest import label_names
from lungopacity.errors import ErrorCode, ImageError, Stage, Status, UserError
from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.evaluate import labels_of_split
from lungopacity.evaluation.explanation import ExplanationResult
from lungopacity.evaluation.overlay import Caption, overlay_png
from lungopacity.evaluation.pointing import (
    TOLERANCE,
    Pointing,
    peak_of,
    point,
    pointing_metrics,
)
from lungopacity.evaluation.report import EVALUATION, EXPLANATION, check_output
from lungopacity.evaluation.table import metrics_table
from lungopacity.models import (
    TrainedModel,
    films_known_to,
    load_model,
    with_operating_point,
)
from lungopacity.models.scorer import no_number
from lungopacity.progress import Progress
from lungopacity.radiograph import OUT_OF_DISTRIBUTION
from lungopacity.results.schema import EXPLANATIONS_SCHEMA
from lungopacity.runtime import end_if_told, leave_no_core
from lungopacity.storage import open_store
from lungopacity.storage.parquet import parquet_bytes

log = logging.getLogger(__name__)

_SIDE = 512
"""Longer side of a picture, in pixels."""
_FILMS_AT_ONCE = 16
_PICTURE = re.compile(r"overlays/[A-Za-z0-9._-]*-[0-9a-f]{12}(?:-\d+)?\.png")
"""Keys of pictures, including those of older versions, which hold the names of objects."""
Row = dict[str, Any]


def explain(
    model: str,
    images: Sequence[str],
    output: str,
    *,
    labels: str | None = None,
    split: str | None = None,
    boxes: str | None = None,
    limit: int | None = None,
    operating_point: str | None = None,
    accept: Sequence[str] = (),
    reject_quality: Sequence[str] | None = None,
    use_gpu: bool | None = None,
) -> ExplanationResult:
    """Write a picture of each image with its class activation map, `explain.parquet` and metrics,
    replacing an older report there.

    model, output: URIs. images: URIs of archives, shards or single images. `labels`: explain only
    the images of one `split` of this labels file, by default of the test split. `boxes`: a boxes
    file (`read_boxes`), for the pointing game. `limit`: only the first `limit` images.
    `operating_point`, `accept`, `reject_quality`: as in screening. `use_gpu`: None uses a GPU if
    this machine has one. Raises `UserError`. An unreadable image raises nothing: it becomes a row.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    if labels is None and split is not None:
        raise UserError(f"--split {split}: needs --labels FILE; give it, or leave --split out")
    split = split or "test"
    check_output(output, EVALUATION)
    trained = with_operating_point(model, load_model(model), operating_point)
    settings = replace(
        settings_of_model(model, trained, accept, reject_quality), rows_per_table=_FILMS_AT_ONCE
    )
    chosen = None if labels is None else labels_of_split(labels, trained.spec, split)
    if chosen is not None and limit is not None:
        chosen = chosen.head(limit)
    leave_no_core()
    explainer = _Explainer(
        trained,
        output,
        chosen,
        None if boxes is None else read_boxes(boxes),
        _gpu(use_gpu),
        reject_unlike=OUT_OF_DISTRIBUTION in settings.reject_quality,
    )
    if chosen is None:
        films = islice(_read(images, settings), None if limit is None else min(limit, sys.maxsize))
        return _written(explainer, _explained(explainer, films, limit))
    names, uri = frozenset(chosen["image"]), str(labels)
    films_read = _labelled(images, settings, names, uri)
    rows = _explained(explainer, iter(films_read), len(films_read))
    rows += explainer.absent(names - {row["name"] for row in films_read})
    if split in ("test", "all"):
        _warn_of_known(rows, films_known_to(model))
    return _written(explainer, rows)


def _explained(explainer: _Explainer, films: Iterator[Row], total: int | None) -> list[Row]:
    """Write the films' pictures; returns their rows. Before the first, the `EXPLANATION` file of an
    older report is deleted."""
    rows: list[Row] = []
    with Progress("Explaining", total=total) as progress:
        for batch in _batches(films):
            end_if_told()
            if not rows:
                explainer.store.delete(EXPLANATION)
            found = explainer.explained(batch)
            rows += found
            progress.advance(len(found))
    return rows


def _warn_of_known(rows: list[Row], known: frozenset[str]) -> None:
    seen = sum(row["content_sha256"] in known for row in rows)
    if seen:
        log.warning(
            "the model was trained, selected or calibrated on %d of %d films: on these it looks "
            "too good",
            seen,
            len(rows),
        )


def _read(
    uris: Sequence[str], settings: ReadSettings, wanted: Wanted | None = None
) -> Iterator[Row]:
    """The rows of `READ_SCHEMA` that are images, ordered by key, loose images first. Two fields are
    added: `name`, the file's name in the archive, and `file`, which is unique for each file."""
    for uri in uris:
        archive = take_inventory(uri)
        for table in read_images(archive.store, archive.objects, settings, wanted=wanted):
            for row in table.to_pylist():
                if row["shard_rows"] is None:
                    file = (uri, row["image"], row["member_index"])
                    yield row | {"name": _file(row), "file": file}


def _labelled(
    uris: Sequence[str], settings: ReadSettings, names: frozenset[str], labels: str
) -> list[Row]:
    """The rows that the labels name, in full or by their endings, with `name` as in the labels; and
    the rows of shards that cannot be read.

    Raises `UserError` if a name may mean two files or two names the same file, and if no image is
    found. All images are read before any is explained, because the last one may make a name
    ambiguous.
    """
    where = ", ".join(uris)
    with Progress("Reading images", total=len(names)) as progress:

        def read(wanted: Wanted) -> Iterator[Row]:
            for row in _read(uris, settings, wanted):
                end_if_told()
                progress.advance(1)
                yield row

        rows = list(read(Wanted(names)))
        absent = names - {row["name"] for row in rows}
        if absent:
            by_ending = read(Wanted(absent, by_ending=True))
            others = [row for row in by_ending if row["name"] not in names]
            name_of = label_names([row["name"] for row in others], absent, labels, where)
            rows += [
                row | {"name": name_of[row["name"]]} for row in others if row["name"] in name_of
            ]
    file_of: dict[str, object] = {}
    # Several frames of one file are not a conflict.
    twice = {
        row["name"] for row in rows if file_of.setdefault(row["name"], row["file"]) != row["file"]
    }
    if twice & names:
        raise UserError(
            f"{where}: {len(twice & names)} labelled names occur more than once, such as "
            f"{min(twice & names)}; give --images that hold each name once"
        )
    if not rows:
        raise UserError(
            f"{labels}: none of {len(names)} labelled images is in {where}, such as {min(names)}; "
            "`image` must be the key under --images, the member's name in a shard, or the last "
            "folders and file name of one of these"
        )
    return rows


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, _FILMS_AT_ONCE)):
        yield batch


class _Explainer:
    """Scores films, writes their pictures, and collects what the metrics need."""

    def __init__(
        self,
        model: TrainedModel,
        output: str,
        labels: pd.DataFrame | None,
        boxes: pd.DataFrame | None,
        use_gpu: bool,
        *,
        reject_unlike: bool,
    ) -> None:
        from lungopacity.models.scorer import Scorer

        self.model = model
        self.output = output
        self.store = open_store(output)
        self.label_of = _by_image(labels, "label")
        self.patient_of = _by_image(labels, "patient_id")
        self.boxes_of = {
            str(name): group[["x", "y", "width", "height"]].to_numpy(np.float64)
            for name, group in ([] if boxes is None else boxes.groupby("image"))
        }
        self.has_boxes = boxes is not None
        self.scorer = Scorer(model, use_gpu=use_gpu)
        self.reject_unlike = reject_unlike
        self.rows = 0
        self.pointings: list[tuple[Pointing, str, str | None]] = []
        """Of each image with boxes: the comparison, the decision, and the patient id."""

    def explained(self, batch: list[Row]) -> list[Row]:
        """Write the pictures of the batch; returns its rows of `EXPLANATIONS_SCHEMA`."""
        for row in batch:
            row["place"] = self.rows
            self.rows += 1
        spec = self.model.spec
        size = spec.preprocessing.image_size
        read = [row for row in batch if row["pixels"] is not None]
        # A bytearray, because torch warns about read-only arrays.
        joined = bytearray(b"".join(row["pixels"] for row in read))
        pixels_NHW = np.frombuffer(joined, np.uint8).reshape(-1, size, size)
        scores = self.scorer.scores(pixels_NHW)
        films = []
        for row, is_sound in zip(read, scores.are_numbers, strict=True):
            if is_sound:
                films.append(row)
            else:
                row |= error_columns(no_number())
        pixels_NHW = pixels_NHW[scores.are_numbers]
        logits_NK = scores.logits_NK[scores.are_numbers]
        p_N = self.scorer.probabilities(logits_NK)[:, spec.positive_index]
        maps_NHW = self.scorer.activation_maps(pixels_NHW)
        unlike_N = self.scorer.out_of_distribution(scores.features_NF)
        rejected_N = np.zeros(len(films), bool)
        if self.reject_unlike:
            assert unlike_N is not None  # `settings_of_model` refuses such models
            rejected_N = unlike_N[scores.are_numbers] > 1
        error = ImageError(ErrorCode.POOR_QUALITY, Stage.SCORE, OUT_OF_DISTRIBUTION)
        for row, pixels, p, activation, rejected in zip(
            films, pixels_NHW, p_N, maps_NHW, rejected_N, strict=True
        ):
            if rejected:
                row |= error_columns(error)
                continue
            decision = spec.operating_point.decide(float(p), row["view_position"])
            row |= {"p": float(p), "decision": decision}
            row |= self._shown(row, pixels, activation)
        return [self._row(row) for row in batch]

    def _shown(
        self, row: Row, pixels: npt.NDArray[np.uint8], activation: npt.NDArray[np.float32]
    ) -> Row:
        """Write one film's picture; returns its columns."""
        spec = self.model.spec
        height, width = row["shown_height"], row["shown_width"]
        film = spec.preprocessing.unpad(pixels, height, width)
        activation = spec.preprocessing.unpad(activation, height, width)
        left, top, right, bottom = row["shown_edges"]
        corner = np.array([left, top])
        # Pixels of the stored image per pixel shown, in x and y.
        ratio = np.array([(right - left) / width, (bottom - top) / height])
        peak = peak_of(activation)
        # Pictures are passed on to others, so their keys must not hold the name of an object, which
        # may be that of a patient. The rows link both.
        key = f"overlays/{row['place']:05d}-{row['content_sha256'][:12]}.png"
        columns: Row = {"overlay": key}
        if peak is not None:
            columns["peak_x"], columns["peak_y"] = (corner + ratio * peak).tolist()
        boxes = self.boxes_of.get(row["name"], self.boxes_of.get(_file(row)))
        if boxes is not None:
            boxes = np.hstack([(boxes[:, :2] - corner) / ratio, boxes[:, 2:] / ratio])
            tolerance = TOLERANCE * min(row["rows"], row["columns"]) / float(ratio.mean())
            pointing = point(activation, film, boxes, tolerance)
            patient = self.patient_of.get(row["name"])
            self.pointings.append((pointing, row["decision"], patient))
            columns |= vars(pointing)
        if self.has_boxes:
            columns["boxes"] = 0 if boxes is None else len(boxes)
        synthetic = bool(row["synthetic"]) or spec.synthetic
        caption = Caption(spec.positive_class, row["p"], row["decision"], synthetic)
        picture = overlay_png(film, activation, caption, side=_SIDE, boxes=boxes, peak=peak)
        self.store.write(columns["overlay"], picture)
        return columns | {"synthetic": synthetic}

    def _row(self, row: Row) -> Row:
        """The fields of `EXPLANATIONS_SCHEMA`."""
        known = {"model_id": self.model.model_id, "label": self.label_of.get(row["name"])}
        return {name: row.get(name) for name in EXPLANATIONS_SCHEMA.names} | known

    def absent(self, names: frozenset[str]) -> list[Row]:
        """Rows of labelled images that are in none of the archives."""
        error = ImageError(ErrorCode.MISSING, Stage.FETCH, "labelled, but in none of --images")
        return [
            self._row({"image": name, "name": name, **error_columns(error)})
            for name in sorted(names)
        ]


def _written(explainer: _Explainer, rows: list[Row]) -> ExplanationResult:
    model, store = explainer.model, explainer.store
    table = pa.Table.from_pylist(rows, schema=EXPLANATIONS_SCHEMA)
    statuses = table["status"].to_pylist()
    pointings = explainer.pointings
    patients = [patient for _, _, patient in pointings]
    resampling = Resampling.of(patients)
    metrics = pointing_metrics([pointing for pointing, _, _ in pointings], resampling)
    called = [place for place, (_, word, _) in enumerate(pointings) if word == "positive"]
    metrics += pointing_metrics(
        [pointings[place][0] for place in called],
        resampling.rows(np.array(called, np.int64)),
        "decision=positive",
    )
    if explainer.boxes_of and not pointings:
        log.warning(
            "none of the %d images in the boxes file was explained, such as %s: --limit or --split "
            "may leave them out; else `image` must be as in the labels, or the key under --images, "
            "or the member's name in a shard",
            len(explainer.boxes_of),
            min(explainer.boxes_of),
        )
    result = ExplanationResult(
        model_id=model.model_id,
        output=explainer.output,
        positive_class=model.spec.positive_class,
        explained=statuses.count(Status.OK.value),
        rejected=statuses.count(Status.REJECTED.value),
        failed=statuses.count(Status.FAILED.value),
        with_boxes=len(pointings),
        unknown_patients=patients.count(None),
        intervals=resampling.described(proportions=True) if pointings else "",
        synthetic=model.spec.synthetic or any(table["synthetic"].to_pylist()),
        metrics=metrics,
        table=table,
    )
    measured = metrics_table(metrics, "explain", model.model_id, synthetic=result.synthetic)
    shown = set(table["overlay"].to_pylist())
    for item in list(store.list("overlays/")):
        if _PICTURE.fullmatch(item.key) and item.key not in shown:
            store.delete(item.key)
    store.write("metrics.parquet", parquet_bytes(measured))
    store.write("explain.parquet", parquet_bytes(table))
    store.write(EXPLANATION, result.to_json().encode())
    return result


def _by_image(labels: pd.DataFrame | None, column: str) -> dict[str, str]:
    """The column's value by image, without missing values."""
    if labels is None:
        return {}
    known = labels[labels[column].notna()]
    return dict(zip(known["image"], known[column], strict=True))


def _file(row: Row) -> str:
    """The file's name: the member in a shard, else the key."""
    return str(row["image"] if row["member"] is None else row["member"])


def _gpu(use_gpu: bool | None) -> bool:
    import torch

    has = torch.cuda.is_available()
    if use_gpu and not has:
        raise UserError("--use-gpu: this machine has no GPU that torch can use; leave it out")
    return has if use_gpu is None else use_gpu
