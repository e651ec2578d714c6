"""The Arrow schemas of every table that is written. Every writer takes its schema from here.

No column is ever null-typed: a night without failures must not change the type of `error_code`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa

from lungopacity.errors import NOTICE, UserError
from lungopacity.radiograph.quality import OUT_OF_DISTRIBUTION, QUALITY_FLAGS

SCHEMA_VERSION = 2
"""Incremented when a column changes its name, type or meaning."""
METADATA = {"notice": NOTICE, "schema_version": str(SCHEMA_VERSION)}
"""Metadata of every table that is kept or handed out."""

_TIME = pa.timestamp("us", tz="UTC")

SOURCE_FIELDS: tuple[pa.Field, ...] = (
    pa.field("image", pa.string(), nullable=False),
    pa.field("member", pa.string()),
    pa.field("member_index", pa.int32()),
    pa.field("frame", pa.int32()),
    pa.field("source_etag", pa.string(), nullable=False),
    pa.field("source_size_bytes", pa.int64(), nullable=False),
    pa.field("source_modified_at", _TIME, nullable=False),
)
"""Which image it is: the object in the archive (its key); inside a shard, the member and its index;
in a file of several frames, the frame, counted from 0."""

CONTENT_FIELDS: tuple[pa.Field, ...] = (
    pa.field("content_sha256", pa.string()),
    pa.field("format", pa.string()),
    pa.field("rows", pa.int32()),
    pa.field("columns", pa.int32()),
    pa.field("photometric_interpretation", pa.string()),
    pa.field("modality", pa.string()),
    pa.field("body_part", pa.string()),
    pa.field("view_position", pa.string()),
    pa.field("view_unknown", pa.bool_()),
    pa.field("patient_sex", pa.string()),
    pa.field("patient_age_years", pa.int16()),
    pa.field("patient_hmac", pa.string()),
    pa.field("study_hmac", pa.string()),
    pa.field("synthetic", pa.bool_()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error_code", pa.string()),
    pa.field("error_stage", pa.string()),
    pa.field("error_message", pa.string()),
    *(pa.field(f"quality_{flag}", pa.bool_()) for flag in QUALITY_FLAGS),
)
"""What was found in the image's bytes, or why it could not be read."""

SHARD_FIELDS: tuple[pa.Field, ...] = (
    pa.field("reading", pa.string()),
    pa.field("shard_rows", pa.int32()),
)
"""How publishing recognises whether a shard was read completely in one pass.

All rows of one pass over an object of several images share a `reading`; it is null for other
objects. `shard_rows` is set only in the row that closes the pass: the number of other rows in the
pass. That row is not an image.
"""

READ_SCHEMA = pa.schema(
    [
        *SOURCE_FIELDS,
        *CONTENT_FIELDS,
        pa.field("pixels", pa.binary()),
        pa.field("shown_height", pa.int32()),
        pa.field("shown_width", pa.int32()),
        pa.field("shown_edges", pa.list_(pa.float64())),
        *SHARD_FIELDS,
    ]
)
"""Rows between reading and scoring. `pixels`: image_size² bytes, row by row; null without an image.
The `shown_height` x `shown_width` pixels in the middle show the film, the rest is padding.
`shown_edges`: left, top, right and bottom of the part that is shown, in pixels of the stored image.
"""

PLAN_SCHEMA = pa.schema([*SOURCE_FIELDS[:1], *SOURCE_FIELDS[4:], pa.field("is_shard", pa.bool_())])
"""An inventory, or objects to read: one row per object."""

PLANNED_SCHEMA = PLAN_SCHEMA.append(pa.field("repeated", pa.bool_(), nullable=False))
"""A plan. `repeated`: a published run has already tried the object with its present content."""

METRICS_SCHEMA = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("synthetic", pa.bool_(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("class", pa.string()),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("ci_low", pa.float64()),
        pa.field("ci_high", pa.float64()),
        pa.field("n", pa.int64()),
        pa.field("ci_method", pa.string()),
        pa.field("patients", pa.int64()),
    ],
    metadata=METADATA,
)
"""One row per value. `evaluation.metrics.Metric` describes the columns."""

EXPLANATIONS_SCHEMA = pa.schema(
    [
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("member", pa.string()),
        pa.field("frame", pa.int32()),
        pa.field("content_sha256", pa.string()),
        pa.field("rows", pa.int32()),
        pa.field("columns", pa.int32()),
        pa.field("synthetic", pa.bool_()),
        pa.field("label", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_stage", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("p", pa.float32()),
        pa.field("decision", pa.string()),
        pa.field("peak_x", pa.float32()),
        pa.field("peak_y", pa.float32()),
        pa.field("overlay", pa.string()),
        pa.field("boxes", pa.int32()),
        pa.field("hit", pa.bool_()),
        pa.field("hit_with_tolerance", pa.bool_()),
        pa.field("energy", pa.float64()),
        pa.field("chance", pa.float64()),
        pa.field("chance_with_tolerance", pa.float64()),
        pa.field("chance_not_black", pa.float64()),
    ],
    metadata=METADATA,
)
"""explain.parquet of `lungopacity explain`, one row per image. `p`: probability of the positive
class. `peak_x`, `peak_y`: the map's highest point, in pixels of the stored film; null if the map is
all zeros. `overlay`: key of the picture below the output. `hit` and the columns after it: see
`Pointing`; null without boxes."""


_CONTENT = {field.name: field for field in CONTENT_FIELDS}


def evaluation_schema(class_names: Sequence[str]) -> pa.Schema:
    """`predictions.parquet` in the report of an evaluation: one row per scored image.

    `source`: the object that holds the image. `patient_cluster`: a number for each patient, valid
    only in this report. `decision` and the columns after it: as in screening.
    """
    return pa.schema(
        [
            pa.field("image", pa.string(), nullable=False),
            pa.field("label", pa.string(), nullable=False),
            pa.field("split", pa.string()),
            *(_CONTENT[name] for name in ("view_position", "patient_sex", "patient_age_years")),
            pa.field("source", pa.string(), nullable=False),
            *(_CONTENT[name] for name in ("content_sha256", "format", "rows", "columns")),
            _CONTENT["photometric_interpretation"],
            pa.field("model_id", pa.string(), nullable=False),
            _CONTENT["synthetic"],
            pa.field("patient_cluster", pa.int64(), nullable=False),
            *(pa.field(class_column("p", name), pa.float32()) for name in class_names),
            *(pa.field(name, pa.float32()) for name in logit_columns(class_names)),
            pa.field("predicted_label", pa.string(), nullable=False),
            pa.field("decision", pa.string(), nullable=False),
            pa.field("ensemble_disagreement", pa.float32()),
            pa.field("out_of_distribution_score", pa.float32()),
        ],
        metadata=METADATA,
    )


def class_column(prefix: str, class_name: str) -> str:
    """A column name that needs no quotes in SQL, for any class name: `p_Lung_Opacity`."""
    return f"{prefix}_{re.sub(r'[^0-9A-Za-z_]', '_', class_name)}"


def logit_columns(class_names: Sequence[str]) -> list[str]:
    """The columns of raw logits, in the order of the classes."""
    return [class_column("logit", name) for name in class_names]


def same_column(class_names: Sequence[str]) -> tuple[str, str] | None:
    """Two classes that would have the same column; None if no two would. SQL ignores case."""
    seen: dict[str, str] = {}
    for name in class_names:
        first = seen.setdefault(class_column("p", name).lower(), name)
        if first != name:
            return first, name
    return None


def check_class_columns(class_names: Sequence[str]) -> None:
    """Raises `UserError` if two classes would have the same column."""
    same = same_column(class_names)
    if same is not None:
        raise UserError(
            f"the model's classes '{same[0]}' and '{same[1]}' would share the column "
            f"{class_column('p', same[1])}; train again and rename one with --classes LABEL=Name"
        )


def score_fields(class_names: Sequence[str]) -> list[pa.Field]:
    """Columns of the scores of a model with these classes. Raises as `check_class_columns`."""
    check_class_columns(class_names)
    return [
        *(pa.field(class_column("p", name), pa.float32()) for name in class_names),
        *(pa.field(name, pa.float32()) for name in logit_columns(class_names)),
        pa.field("predicted_label", pa.string()),
        pa.field("decision", pa.string()),
        pa.field("ensemble_disagreement", pa.float32()),
        pa.field("out_of_distribution_score", pa.float32()),
        pa.field(f"quality_{OUT_OF_DISTRIBUTION}", pa.bool_()),
        pa.field("explanation", pa.string()),
    ]


def predictions_schema(class_names: Sequence[str]) -> pa.Schema:
    """Published predictions: one row per image of the plan, readable or not."""
    return pa.schema(
        [
            pa.field("run_id", pa.string(), nullable=False),
            pa.field("model_id", pa.string(), nullable=False),
            pa.field("screened_at", _TIME, nullable=False),
            pa.field("archive", pa.string(), nullable=False),
            *SOURCE_FIELDS,
            *CONTENT_FIELDS,
            *score_fields(class_names),
            pa.field("label", pa.string()),
        ],
        metadata=METADATA,
    )


def part_schema(class_names: Sequence[str]) -> pa.Schema:
    """Part files under `_work/`: output of the model stage. Publishing adds the run's columns."""
    return pa.schema(
        [
            pa.field("screened_at", _TIME, nullable=False),
            *SOURCE_FIELDS,
            *CONTENT_FIELDS,
            *score_fields(class_names),
            *SHARD_FIELDS,
        ]
    )
