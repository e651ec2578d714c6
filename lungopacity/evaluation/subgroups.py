"""Subgroups of the images by columns of the labels that the user names.

A column of text, or of at most `MOST_NUMBERS` different numbers, has a subgroup for each value. A
column of more numbers is split at its quartiles over the evaluated films: `Q1 (up to 60)` …
`Q4 (above 90)`. `site` always has a subgroup for each value. Missing values form the subgroup
`unknown`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from lungopacity.dataset.manifest import FACT_COLUMNS, SITE
from lungopacity.errors import UserError

log = logging.getLogger(__name__)

MOST_NUMBERS = 10
"""Most different numbers that each get a subgroup."""
MOST_VALUES = 50
"""Most different texts in a column; a column with more probably holds notes or names."""

_NO_SUBGROUPS = ("image", "label", "patient_id")


def check_columns(by: Sequence[str]) -> None:
    """Raises `UserError` for columns that form no subgroups, or identify patients."""
    for column in by:
        if column in _NO_SUBGROUPS:
            raise UserError(
                f"--by {column}: cannot form subgroups; name another column of the labels"
            )


def column_groups(labels: pd.DataFrame, by: Sequence[str], uri: str) -> pd.DataFrame:
    """The subgroup of each image (str, or None) in each column, indexed by `image`.

    labels: the evaluated images, as `read_labels(uri, by)` returns them. A column `site` is always
    used. View, sex and age are left out, because every report has them. Raises `UserError` for a
    column with too many different texts.
    """
    columns = [name for name in dict.fromkeys(by) if name not in FACT_COLUMNS]
    if SITE in labels and SITE not in columns:
        if labels[SITE].nunique() <= MOST_VALUES:
            columns.append(SITE)
        else:
            log.warning("%s: more than %d sites: no subgroups by site", uri, MOST_VALUES)
    groups = {name: _groups(labels[name], name, uri) for name in columns}
    return pd.DataFrame(groups, index=pd.Index(labels["image"]), dtype=object)


def _groups(values: pd.Series, name: str, uri: str) -> list[str | None]:
    if any(isinstance(value, list | dict | np.ndarray) for value in values):
        raise UserError(
            f"{uri}: column '{name}' holds several values a row; give a column of words or numbers"
        )
    # A Parquet file may hold empty texts. In a CSV, they are missing values.
    values = values.mask(values == "")
    if pd.api.types.is_numeric_dtype(values) and values.nunique() > MOST_NUMBERS:
        return _quartiles(values)
    if values.nunique() > MOST_VALUES:
        raise UserError(
            f"{uri}: column '{name}' has {values.nunique()} different values, but subgroups can "
            f"have at most {MOST_VALUES}; give a coarser column"
        )
    # Whole numbers with a missing value are read as floats: 1.0 becomes `1`.
    return [
        None if pd.isna(value) else f"{value:.10g}" if isinstance(value, float) else str(value)
        for value in values
    ]


def _quartiles(values: pd.Series) -> list[str | None]:
    """The quarter of each value. Its name holds no extreme, which may identify a patient."""
    numbers = values.astype(float).where(np.isfinite(values.astype(float)))
    edges = sorted(set(np.nanpercentile(numbers, [25, 50, 75])))
    shown = [f"{edge:.10g}" for edge in edges]
    ranges = [f"up to {shown[0]}"]
    ranges += [f"{low} to {high}" for low, high in pairwise(shown)]
    ranges.append(f"above {shown[-1]}")
    # A value on an edge belongs to the quarter below it.
    places = np.searchsorted(edges, numbers, side="left")
    return [
        None if pd.isna(number) else f"Q{place + 1} ({ranges[place]})"
        for number, place in zip(numbers, places, strict=True)
    ]
