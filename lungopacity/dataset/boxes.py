"""The boxes file: where on a labelled film the opacities lie, one row per opacity."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lungopacity.dataset.tables import read_table
from lungopacity.errors import UserError
from lungopacity.words import counted

BOX_COLUMNS = ("image", "x", "y", "width", "height")
_RSNA = "patientId"
"""The column of stage_2_train_labels.csv of the RSNA challenge that stands for `image`: a film's
name without `.dcm`. In this table, a film without an opacity has a row without a box."""
_NUMBERS = list(BOX_COLUMNS[1:])


def read_boxes(uri: str) -> pd.DataFrame:
    """The boxes file, CSV or Parquet: `image` as in the labels, and float64 `x`, `y` (left, top),
    `width` and `height` in pixels of the film as it is stored.

    RSNA's table of boxes is accepted as it is. A box may reach beyond its film. A file without rows
    is valid. Raises `UserError` where the file is absent, lacks a column, has a row without an
    image, a value that is not a finite number, or a width or height that is not above 0.
    """
    frame = read_table(uri, "boxes", ["image", _RSNA])
    of_rsna = _RSNA in frame and "image" not in frame
    if of_rsna:
        frame["image"] = frame[_RSNA] + ".dcm"
    for column in BOX_COLUMNS:
        if column not in frame:
            raise UserError(
                f"{uri}: has no column '{column}' (it has: {', '.join(map(str, frame.columns))}); "
                f"boxes need {', '.join(BOX_COLUMNS)}"
            )
    if of_rsna:
        frame = frame.dropna(subset=_NUMBERS, how="all")
    frame = frame[list(BOX_COLUMNS)].reset_index(drop=True)
    if frame["image"].isna().any():
        rows = counted(int(frame["image"].isna().sum()), "row")
        raise UserError(f"{uri}: no image is named in {rows}; fill or remove them")
    frame["image"] = frame["image"].astype(str)
    for column in _NUMBERS:
        numbers = pd.to_numeric(frame[column], errors="coerce").astype(np.float64)
        wrong = ~np.isfinite(numbers)
        if wrong.any():
            raise UserError(
                f"{uri}: '{column}' is not a number in {counted(int(wrong.sum()), 'row')}, such as "
                f"that of {frame.loc[wrong, 'image'].iloc[0]}; an image without boxes needs no row"
            )
        frame[column] = numbers
    flat = (frame[["width", "height"]] <= 0).any(axis=1)
    if flat.any():
        raise UserError(
            f"{uri}: a width or height is not above 0 in {counted(int(flat.sum()), 'row')}, such "
            f"as that of {frame.loc[flat, 'image'].iloc[0]}; fix or remove them"
        )
    return frame
