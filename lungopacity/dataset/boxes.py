"""The boxes: where on a labelled film the opacities lie. Several rows of one image are several."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lungopacity.dataset.tables import read_table
from lungopacity.errors import UserError

BOX_COLUMNS = ("image", "x", "y", "width", "height")
_RSNA = "patientId"
"""Stands for `image` in stage_2_train_labels.csv of the RSNA challenge: a film's name without its
`.dcm`. A film without an opacity has a row without a box there."""
_NUMBERS = list(BOX_COLUMNS[1:])


def read_boxes(uri: str) -> pd.DataFrame:
    """The boxes file, CSV or Parquet: `image` as in the labels, and float64 `x`, `y` (left, top),
    `width` and `height` in pixels of the film as it is stored.

    RSNA's own table of boxes is one, too. A box may reach beyond its film. A file without rows has
    no boxes, and is one. Raises `UserError` where the file is absent, lacks a column, has a row
    without an image, something that is no finite number, or a side that is not above 0.
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
        raise UserError(f"{uri}: {int(frame['image'].isna().sum())} rows have no image; fill them")
    frame["image"] = frame["image"].astype(str)
    for column in _NUMBERS:
        numbers = pd.to_numeric(frame[column], errors="coerce").astype(np.float64)
        wrong = ~np.isfinite(numbers)
        if wrong.any():
            raise UserError(
                f"{uri}: '{column}' of {int(wrong.sum())} rows is not a number, as that of "
                f"{frame.loc[wrong, 'image'].iloc[0]}; an image without boxes needs no row"
            )
        frame[column] = numbers
    flat = (frame[["width", "height"]] <= 0).any(axis=1)
    if flat.any():
        raise UserError(
            f"{uri}: {int(flat.sum())} boxes have a width or height that is not above 0, as one of "
            f"{frame.loc[flat, 'image'].iloc[0]}; mend or remove them"
        )
    return frame
