import numpy as np
import pandas as pd
import pytest

from lungopacity.errors import UserError
from lungopacity.evaluation.evaluate import _check_sound
from lungopacity.evaluation.report import ModelScores


def test_a_model_that_gives_no_numbers_is_told_with_a_film():
    logits_NK = np.zeros((3, 2), np.float32)
    images = pd.DataFrame({"image": ["a.png", "b.png", "c.png"]})
    _check_sound(ModelScores(logits_NK, logits_NK, None, None), images)
    logits_NK[1, 1] = np.nan
    with pytest.raises(UserError, match=r"1 of 3 films are no numbers, as of b\.png: the GPU or"):
        _check_sound(ModelScores(logits_NK, logits_NK, None, None), images)
