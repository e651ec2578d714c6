import io

import numpy as np
import pytest
from PIL import Image

from lungopacity.errors import NOTICE
from lungopacity.evaluation.overlay import Caption, overlay_png
from tests.films import grey_film

CAPTION = Caption("Lung_Opacity", 0.9314, "positive")


def picture(**changes: object) -> np.ndarray:
    film = grey_film(height=60, width=40)
    options = {"film": film, "activation": np.zeros((60, 40), np.float32), "caption": CAPTION}
    data = overlay_png(**options | {"side": 240} | changes)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_without_a_map_the_film_stays_grey_and_fills_the_picture():
    pixels = picture()
    # The strip is wider than a narrow film: it stands in the middle.
    left = (pixels.shape[1] - 160) // 2
    film = pixels[:240, left : left + 160]
    assert np.ptp(film, axis=2).max() == 0
    shown = np.asarray(Image.fromarray(film[..., 0].astype(np.uint8)).resize((40, 60)))
    assert np.abs(shown.astype(int) - grey_film(height=60, width=40)).mean() < 3


def test_at_sharp_edges_white_stays_white_and_black_black():
    """Enlarged smoothly, the film swings past both there."""
    film = np.zeros((60, 40), np.uint8)
    film[:, 20:] = 255
    pixels = picture(film=film)
    left = (pixels.shape[1] - 160) // 2
    assert pixels[:240, left + 84 : left + 160].min() == 255
    assert pixels[:240, left : left + 76].max() == 0


def test_colour_lies_where_the_map_is_high_and_boxes_are_outlined():
    activation = np.zeros((60, 40), np.float32)
    activation[10:20, 5:15] = 1
    plain, coloured = picture(), picture(activation=activation)
    left = (plain.shape[1] - 160) // 2
    changed = np.abs(plain - coloured).max(axis=2) > 20
    rows, columns = np.nonzero(changed)
    assert (rows.min() // 4, rows.max() // 4) == (10, 19)
    assert ((columns.min() - left) // 4, (columns.max() - left) // 4) == (5, 14)
    outlined = picture(boxes=np.array([[10.0, 20.0, 20.0, 30.0]]))
    for x, y in ((40, 140), (120, 140), (80, 80), (80, 200)):
        assert outlined[y, left + x].tolist() == [86, 180, 233]
    assert outlined[140, left + 80].tolist() == plain[140, left + 80].tolist()
    ringed = picture(peak=(20.0, 30.0))
    near = ringed[110:130, left + 70 : left + 90]
    assert (near == 255).all(axis=2).any()  # white, seen on a dark lung
    assert (near == 0).all(axis=2).any()  # and its dark edge, on a white one


def test_the_strip_says_what_was_decided_and_what_it_is_not_for():
    assert CAPTION.lines == ("Lung Opacity 0.931, positive", NOTICE)
    assert Caption("A", 0.5, "review", synthetic=True).lines[1] == f"{NOTICE} Synthetic."
    strip = picture()[240:]
    assert len(strip) > 15
    assert (strip > 200).any()
    # One line below the other.
    decided, notice = strip[: len(strip) // 2], strip[len(strip) // 2 :]
    assert (decided > 200).any()
    assert ((notice > 150) & (notice < 180)).any()
    assert not (notice > 200).any()
    other = picture(caption=Caption("Lung_Opacity", 0.1, "negative"))[240:]
    assert (strip != other).any()


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (1, 90), (64, 64)])
def test_any_shape_gives_the_same_small_picture_every_time(shape):
    rng = np.random.default_rng(0)
    film = rng.integers(0, 256, shape).astype(np.uint8)
    activation = rng.random(shape).astype(np.float32)
    longest = Caption("Lung_Opacity", 0.9314, "positive", synthetic=True)
    first, again = (overlay_png(film, activation, longest, side=224) for _ in range(2))
    assert first == again
    size = Image.open(io.BytesIO(first)).size
    assert max(size) <= 256
    assert len(first) < 200_000
