"""The metadata of the tables that are written."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lungopacity.errors import NOTICE, UserError
from lungopacity.models.folder import training_films_parquet, validation_parquet
from lungopacity.results.schema import (
    EXPLANATIONS_SCHEMA,
    METRICS_SCHEMA,
    check_class_columns,
    evaluation_schema,
    predictions_schema,
)
from lungopacity.screening.pseudonyms import _MAP_SCHEMA
from lungopacity.training.fit import HISTORY_SCHEMA
from lungopacity.training.trials import trials_table

NAMES = ("Normal", "Lung_Opacity")


def schema_of(file: bytes) -> pa.Schema:
    return pq.read_schema(pa.BufferReader(file))


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        ("predictions", predictions_schema(NAMES)),
        ("metrics", METRICS_SCHEMA),
        ("explain", EXPLANATIONS_SCHEMA),
        ("predictions of evaluate", evaluation_schema(NAMES)),
        ("key map", _MAP_SCHEMA),
        ("trials", trials_table([], {}).schema),
        ("history", HISTORY_SCHEMA),
        ("validation", schema_of(validation_parquet([], [], np.empty((0, 2), "f4"), NAMES))),
        ("training films", schema_of(training_films_parquet([]))),
    ],
)
def test_every_table_that_is_kept_says_what_it_is_not_for(kind: str, schema: pa.Schema) -> None:
    assert (schema.metadata or {}).get(b"notice") == NOTICE.encode(), kind


@pytest.mark.parametrize("other", ["lung-opacity", "LUNG_OPACITY"])
def test_class_names_that_sql_cannot_tell_apart_are_refused(other: str) -> None:
    check_class_columns(NAMES)
    with pytest.raises(UserError, match="would share the column"):
        check_class_columns((*NAMES, other))
