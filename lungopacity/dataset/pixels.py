"""Labelled images to an array of pixels: each file is fetched and decoded once, by Ray tasks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from lungopacity.archive.content import ReadSettings
from lungopacity.archive.inventory import Archive, take_inventory
from lungopacity.archive.names import Wanted
from lungopacity.archive.stream import read_tasks, stream_images, tables_of
from lungopacity.dataset.manifest import FACT_COLUMNS, facts_of, label_names, shown
from lungopacity.errors import ErrorCode, Status, UserError
from lungopacity.progress import Progress
from lungopacity.radiograph import ACCEPTABLE, OUT_OF_DISTRIBUTION, Preprocessing
from lungopacity.results.schema import READ_SCHEMA
from lungopacity.runtime import capacity, free_resources
from lungopacity.storage import open_store

log = logging.getLogger(__name__)

MAX_UNREADABLE_FRACTION = 0.05
"""With more than this, training on what is left would hide a broken archive."""
_CONTENT = [
    "content_sha256",
    "format",
    "rows",
    "columns",
    "photometric_interpretation",
    "quality_blank",
]


@dataclass(frozen=True)
class LabelledPixels:
    """Decoded, labelled images; row i of every field is the same image."""

    pixels_NHW: npt.NDArray[np.uint8]
    """(n, image_size, image_size) uint8."""
    labels_N: npt.NDArray[np.int64]
    """(n,) index into `class_names`."""
    split_N: npt.NDArray[np.str_]
    """(n,) train, validation or test."""
    class_names: tuple[str, ...]
    images: pd.DataFrame
    """The labels' columns, and those read from the files: content_sha256, view_position, … A view
    that the labels state takes precedence; `header_view` is the file's own, by which screening
    decides."""
    unreadable: pd.DataFrame
    """Labelled images that could not be read: image, split, error_code, error_message."""
    rejected: pd.DataFrame
    """Labelled images that were read and then left out by a rule; the same columns."""
    synthetic: bool

    @property
    def fingerprint(self) -> str:
        """Hash of the data: each file's digest with its label and split."""
        digest = hashlib.sha256()
        columns = ["content_sha256", "label", "split"]
        for row in sorted(self.images[columns].itertuples(index=False, name=None)):
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def views(self, column: str = "view_position") -> list[str | None]:
        """The view of each image, or with `header_view` that of its header; None if unknown."""
        return [None if pd.isna(view) else str(view) for view in self.images[column]]

    def without_unlike(self, like: npt.NDArray[np.int64]) -> LabelledPixels:
        """Only the rows `like`; the others are rejected as `out_of_distribution`."""
        left_out = (
            self.images[["image", "split"]]
            .drop(index=like.tolist())
            .assign(error_code=ErrorCode.POOR_QUALITY.value, error_message=OUT_OF_DISTRIBUTION)
        )
        _warn_of_left_out(left_out, len(self.images))
        return replace(
            self,
            pixels_NHW=self.pixels_NHW[like],
            labels_N=self.labels_N[like],
            split_N=self.split_N[like],
            images=self.images.iloc[like].reset_index(drop=True),
            rejected=pd.concat([self.rejected, left_out], ignore_index=True),
        )


def load_pixels(
    image_uris: Sequence[str],
    labels: pd.DataFrame,
    class_names: Sequence[str],
    settings: ReadSettings,
    labels_uri: str,
) -> LabelledPixels:
    """Finds every labelled image in the archives, by its whole name or else by its ending (see
    `Wanted`), and decodes it.

    labels: as `read_labels` gives them, of these classes, every row with a split. settings: images
    that they reject are left out. Needs a running Ray. Raises `UserError` where labels name images
    that are in no archive, where a name occurs twice in the archives or may mean two files, or
    where more than `MAX_UNREADABLE_FRACTION` cannot be read or are rejected.
    """
    names = frozenset(labels["image"])
    archives = [take_inventory(uri) for uri in image_uris]
    with Progress("Reading images", total=len(names), waits_for=free_resources) as progress:
        read = _read(archives, Wanted(names), settings, progress)
        absent = names - set(read["name"].to_pylist())
        if absent:
            others = _read(archives, Wanted(absent, by_ending=True), settings, progress)
            whole = pa.compute.is_in(others["name"], pa.array(names, pa.string()))
            read = pa.concat_tables([read, others.filter(pa.compute.invert(whole))])
        read = _named(read, names, image_uris, labels_uri)
    return _joined(
        read.to_pandas(), labels, class_names, settings.preprocessing, image_uris, labels_uri
    )


def _read(
    archives: Sequence[Archive], wanted: Wanted, settings: ReadSettings, progress: Progress
) -> pa.Table:
    """Rows of `READ_SCHEMA` for the wanted images, with `name`, their name in the archive."""
    tables: list[pa.Table] = []
    for archive in archives:
        for table in _decoded(archive, wanted, settings):
            found = table.filter(pa.compute.is_null(table["shard_rows"]))
            tables.append(found)
            progress.advance(found.num_rows)
    read = pa.concat_tables([READ_SCHEMA.empty_table(), *tables])
    columns = ["image", "status", "error_code", "error_message"]
    for row in read.filter(pa.compute.is_null(read["member"])).select(columns).to_pylist():
        # A table, a film or an empty file that is named like a shard hides no wanted film.
        broken = row["status"] == Status.FAILED.value and row["error_code"] != ErrorCode.EMPTY.value
        if broken and not wanted.has(row["image"]):
            raise UserError(
                f"{row['image']}: shard cannot be read ({row['error_code']}: "
                f"{row['error_message']}); fix or remove it"
            )
    return read.append_column("name", pa.compute.coalesce(read["member"], read["image"]))


def _named(
    read: pa.Table, names: frozenset[str], image_uris: Sequence[str], labels_uri: str
) -> pa.Table:
    """The rows that one of the labels' `names` refers to, with that as their `name`."""
    files = read["name"].to_pylist()
    name_of = label_names(files, names, labels_uri, ", ".join(image_uris))
    meant = pa.array([name_of.get(file) for file in files], pa.string())
    return read.set_column(read.num_columns - 1, "name", meant).filter(pa.compute.is_valid(meant))


def _decoded(archive: Archive, wanted: Wanted, settings: ReadSettings) -> Iterator[pa.Table]:
    """Rows of `READ_SCHEMA` for the wanted images, read by Ray tasks."""
    objects = archive.objects
    named = pa.array([wanted.has(image) for image in objects["image"].to_pylist()], pa.bool_())
    objects = objects.filter(pa.compute.or_(objects["is_shard"], named))
    if objects.num_rows:
        tasks = read_tasks(objects, int(capacity()["CPU"]) or 1)
        images = stream_images(archive.uri, tasks, settings, wanted=wanted)
        yield from tables_of(images)


def _joined(
    read: pd.DataFrame,
    labels: pd.DataFrame,
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    image_uris: Sequence[str],
    labels_uri: str,
) -> LabelledPixels:
    where = ", ".join(image_uris)
    absent = labels.loc[~labels["image"].isin(read["name"]), "image"]
    if len(absent):
        raise UserError(
            f"{labels_uri}: {len(absent)} of {len(labels)} labelled images are not in {where}, "
            f"such as {shown(absent.iloc[0])}; `image` must be the key under --images, the "
            "member's name in a shard, or the last folders and the file name of one of these"
            + _hint(absent.iloc[0], image_uris)
        )
    within = read.loc[read["frame"] > 0, "name"].unique()
    if len(within):
        raise UserError(
            f"{where}: {len(within)} labelled files hold several images each, such as {within[0]}; "
            "the label could belong to any of them: leave the file out, or write the image that "
            "is meant to a file of its own"
        )
    twice = read.loc[read["name"].duplicated(), "name"].unique()
    if len(twice):
        raise UserError(
            f"{where}: {len(twice)} labelled names occur more than once, such as {twice[0]}; the "
            "label could belong to any of these images: rename or remove all but one"
        )
    facts = list(FACT_COLUMNS)
    frame = labels.merge(
        read.rename(columns={"image": "source"}),
        left_on="image",
        right_on="name",
        suffixes=("", "_read"),
    )
    frame["header_view"] = frame["view_position_read"]
    headers = frame[[f"{fact}_read" for fact in facts]].set_axis(facts, axis="columns")
    frame[facts] = facts_of(frame, headers)
    is_out = frame["status"] != Status.OK.value
    out = frame.loc[is_out, ["image", "split", "status", "error_code", "error_message"]]
    if len(out) > MAX_UNREADABLE_FRACTION * len(frame):
        raise UserError(
            f"{where}: {len(out)} of {len(frame)} labelled images cannot be read or are "
            f"rejected ({_codes(out)}); {_mends(out)}"
        )
    _warn_of_left_out(out, len(frame))
    of_status = {
        status: rows.drop(columns="status").reset_index(drop=True)
        for status, rows in ((one, out[out["status"] == one.value]) for one in Status)
    }
    frame = frame.loc[~is_out].reset_index(drop=True)
    size = preprocessing.image_size
    pixels_NHW = np.frombuffer(b"".join(frame.pop("pixels")), np.uint8).reshape(-1, size, size)
    index_of = {name: index for index, name in enumerate(class_names)}
    return LabelledPixels(
        pixels_NHW=pixels_NHW,
        labels_N=frame["label"].map(index_of).to_numpy().astype(np.int64),
        split_N=frame["split"].to_numpy(str),
        class_names=tuple(class_names),
        images=frame[
            ["image", "label", "split", "patient_id", *facts, "header_view", "source", *_CONTENT]
        ],
        unreadable=of_status[Status.FAILED],
        rejected=of_status[Status.REJECTED],
        synthetic=bool(frame["synthetic"].astype(bool).any()),
    )


def _hint(name: str, image_uris: Sequence[str]) -> str:
    """How to write a name that is in no archive, where that can be seen."""
    if "\\" in name:
        return "; write / instead of \\ in it"
    for root in (*image_uris, *(open_store(uri).uri for uri in image_uris)):
        if name.startswith(f"{root.rstrip('/')}/"):
            return f"; leave out {root.rstrip('/')}/"
    return ""


def _warn_of_left_out(left_out: pd.DataFrame, images: int) -> None:
    """Names the images only at the debug level: more people read a job's log than its films."""
    if left_out.empty:
        return
    log.warning(
        "%d of %d labelled images are left out (%s); LUNGOPACITY_DEBUG=1 names them",
        len(left_out),
        images,
        _codes(left_out),
    )
    for row in left_out.itertuples():
        log.debug("left out: %s (%s: %s)", row.image, row.error_code, row.error_message)


def _codes(left_out: pd.DataFrame) -> str:
    """How many there are of each code and, of poor quality, of which flags."""
    poor = left_out["error_code"] == ErrorCode.POOR_QUALITY.value
    flags = left_out["error_code"] + " (" + left_out["error_message"] + ")"
    counts = left_out["error_code"].mask(poor, flags).value_counts()
    return ", ".join(f"{k}: {v}" for k, v in counts.items())


def _mends(left_out: pd.DataFrame) -> str:
    codes = set(left_out["error_code"])
    options = []
    if acceptable := sorted(code.value for code in ACCEPTABLE if code.value in codes):
        options.append(f"--accept {','.join(acceptable)}")
    if ErrorCode.POOR_QUALITY.value in codes:
        options.append("--reject-quality none")
    take = f", or take those that are sound with {' '.join(options)}" if options else ""
    return f"fix the archive, or remove them from the labels{take}"
