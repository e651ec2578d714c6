"""What tells the label without a look at the lungs, of films that were made to tell it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lungopacity.dataset.pixels import LabelledPixels
from lungopacity.evaluation.shortcuts import shortcuts_of
from tests.films import grey_film


@pytest.mark.parametrize(
    ("positives", "negatives", "films"), [(1, 1, 1), (1, 2, 1), (2, 2, 1), (4, 4, 1), (2, 3, 6)]
)
def test_few_films_are_tried_as_far_as_they_go(positives, negatives, films):
    """So many patients of a kind, with so many films each."""
    positive_N = np.repeat([True] * positives + [False] * negatives, films)
    count = len(positive_N)
    frame = pd.DataFrame(
        {
            "image": [f"{n}.png" for n in range(count)],
            "patient_id": np.repeat(np.arange(positives + negatives), films).astype(str),
            "view_position": np.where(positive_N, "AP", "PA"),
            "source": "x.tar",
            "format": "png",
            **dict.fromkeys(("patient_sex", "patient_age_years", "photometric_interpretation")),
            "rows": 64,
            "columns": 64,
        }
    )
    pixels = np.stack([grey_film(number, 64, 64) for number in range(count)])
    data = LabelledPixels(
        pixels, positive_N.astype(int), np.full(count, "test"), ("a", "b"), frame, frame[:0], False
    )
    found = {item.fact: item.auc for item in shortcuts_of(data, positive_N)}
    assert ("view_position" in found) == (count > 2)
    if min(positives, negatives) > 2:
        assert found["view_position"] == 1.0
    assert ("border of the film alone" in found) == (min(positives, negatives) > 1)
