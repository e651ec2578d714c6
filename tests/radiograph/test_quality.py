import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from lungopacity.archive.phantom_film import WHITE, draw_body, draw_film
from lungopacity.archive.phantom_opacity import OPACITY_KINDS
from lungopacity.radiograph import (
    QUALITY_FLAGS,
    REJECTED_BY_DEFAULT,
    Preprocessing,
    Radiograph,
    judge,
)
from tests.films import dicom, encoded, grey_film, one_film
from tests.real_data import DICOM_FOLDER, LUNG_FIELDS, needs_real_data

PREPROCESSING = Preprocessing(image_size=160)


def flags(film: Radiograph | np.ndarray) -> set[str]:
    if isinstance(film, np.ndarray):
        film = Radiograph(film, "png", *film.shape)
    content = PREPROCESSING.fit(film.pixels)
    found = judge(content, film.rows, film.columns, film.coloured_fraction, film.patient_age_years)
    return set(found.found())


def phantom(seed: int, kind=None) -> np.ndarray:
    body = draw_body(np.random.default_rng(seed), "FM"[seed % 2], 30 + seed)
    film = draw_film(np.random.default_rng([seed, 1]), body, ("PA", "AP")[seed % 2], kind, 256)
    return np.rint(film.pixels * (255.0 / WHITE)).astype(np.uint8)


def noisy(level: int, spread: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(level, level + spread, (300, 300), dtype=np.uint8)


def framed(inner: np.ndarray, side: int, level: int) -> np.ndarray:
    film = np.full((side, side), level, np.uint8)
    film[50 : 50 + inner.shape[0], 50 : 50 + inner.shape[1]] = inner
    return film


@pytest.mark.parametrize(
    ("film", "expected"),
    [
        (np.full((300, 300), 120, np.uint8), {"blank", "low_contrast", "heavy_borders"}),
        (noisy(100), {"blank", "low_contrast", "heavy_borders"}),
        (
            np.zeros((300, 300), np.uint8),
            {"blank", "nearly_black", "low_contrast", "heavy_borders"},
        ),
        (noisy(250), {"blank", "nearly_white", "low_contrast", "heavy_borders"}),
        (grey_film(1, 80, 300), {"too_small", "odd_aspect"}),
        (grey_film(1, 700, 300), {"odd_aspect"}),
        (grey_film(1, 300, 300) // 5 + 60, {"low_contrast"}),
        (framed(grey_film(1, 100, 100) // 2 + 100, 500, 0), {"heavy_borders"}),
        (framed(grey_film(1, 100, 100) // 2 + 100, 500, 0)[::-1, ::-1], {"heavy_borders"}),
        (255 - grey_film(1, 300, 300), {"inverted"}),
        (255 - phantom(0), {"inverted"}),
        (grey_film(1, 300, 300), set()),
    ],
)
def test_each_fault_raises_its_flag_and_no_other(film, expected):
    assert flags(film) == expected


def of_two(share: float, dark: int, bright: int) -> np.ndarray:
    """1,000 pixels, of which this share is dark."""
    film = np.full(1000, bright, np.uint8)
    film[: round(1000 * share)] = dark
    return film.reshape(25, 40)


def inside(height: int, width: int, level: int = 150, speck: tuple[int, int] = (20, 30)):
    """100 x 100 pixels, with something of this size and level, and a speck, within a border."""
    film = np.full((100, 100), 100, np.uint8)
    film[20 : 20 + height, 30 : 30 + width] = film[speck] = level
    return film


@pytest.mark.parametrize(
    ("flag", "beyond", "within"),
    [
        ("blank", of_two(0.5, 100, 108), of_two(0.5, 100, 109)),
        ("blank", of_two(0.995, 100, 250), of_two(0.994, 100, 250)),
        ("blank", of_two(0.004, 100, 250), of_two(0.005, 100, 250)),
        ("low_contrast", of_two(0.5, 100, 163), of_two(0.5, 100, 164)),
        ("nearly_black", of_two(0.985, 8, 90), of_two(0.984, 8, 90)),
        ("nearly_black", of_two(0.985, 8, 90), of_two(0.985, 9, 90)),
        ("nearly_white", of_two(0.1, 90, 247), of_two(0.101, 90, 247)),
        ("nearly_white", of_two(0.1, 90, 247), of_two(0.1, 90, 246)),
        ("heavy_borders", inside(50, 48), inside(50, 50)),
        ("heavy_borders", inside(60, 60, 112), inside(60, 60, 113)),
        ("heavy_borders", inside(60, 60, 88), inside(60, 60, 87)),
        # The film is judged on every second row and column. There, one pixel of 50 is a speck.
        ("heavy_borders", inside(50, 48, speck=(90, 40)), inside(50, 50)),
        ("heavy_borders", inside(50, 48, speck=(40, 90)), inside(50, 50)),
        ("heavy_borders", inside(70, 2), inside(70, 70)),
        ("heavy_borders", inside(2, 70), inside(70, 70)),
        ("heavy_borders", inside(2, 70) + inside(70, 2) - 100, inside(3, 70) + inside(70, 3) - 100),
        ("odd_aspect", np.zeros((201, 100), np.uint8), np.zeros((200, 100), np.uint8)),
        ("odd_aspect", np.zeros((100, 201), np.uint8), np.zeros((100, 200), np.uint8)),
    ],
)
def test_each_flag_has_its_limit(flag, beyond, within):
    for film, is_raised in ((beyond, True), (within, False)):
        assert getattr(judge(film, *film.shape, 0.0, None), flag) is is_raised


def test_more_than_a_tenth_of_coloured_pixels_and_less_than_18_years_are_flagged():
    film = grey_film()
    for coloured, years in ((0.1, 18), (0.101, 17)):
        found = judge(film, *film.shape, coloured, years)
        assert found.colour is found.child is (years < 18)


def test_photographs_are_coloured():
    for photograph in load_sample_images().images:
        for image_format in ("PNG", "JPEG"):
            assert "colour" in flags(one_film(encoded(photograph, image_format), at_least=160))


def test_a_film_with_a_coloured_marker_is_not_flagged_as_colour():
    film = np.stack([grey_film(1, 400, 400)] * 3, axis=2)
    film[10:40, 10:90] = (255, 220, 0)
    assert flags(one_film(encoded(film))) == set()


TINTS = {"blue base": (0.8, 0.9, 1), "yellowed": (1, 0.93, 0.82), "strong blue": (0.6, 0.8, 1)}


def tinted(film: np.ndarray, tint: tuple[float, float, float], fog: int = 0) -> np.ndarray:
    return np.rint((fog + film[..., None] * ((255 - fog) / 255)) * tint).astype(np.uint8)


@pytest.mark.parametrize("fog", [0, 60])
@pytest.mark.parametrize("tint", TINTS.values(), ids=TINTS)
def test_a_tint_of_the_whole_film_is_not_flagged_as_colour(tint, fog):
    film = tinted(phantom(2), tint, fog)
    # Judged pixel by pixel, it would be a photograph.
    assert (np.ptp(film, axis=2) > 32).mean() > 0.1
    assert "colour" not in flags(one_film(encoded(film)))
    assert "colour" not in flags(one_film(encoded(film, "JPEG", quality=85)))


def test_a_coloured_base_that_black_has_too_is_a_tint():
    film = np.rint(phantom(2)[..., None] * 0.7 + (20, 40, 60)).astype(np.uint8)
    assert (np.ptp(film, axis=2) > 32).all()
    assert "colour" not in flags(one_film(encoded(film)))


def test_a_coloured_marker_does_not_make_the_greys_count_as_coloured():
    """It changes the slope of the line that is fitted to the channels."""
    film = np.stack([phantom(2)] * 3, axis=2)
    film[:64, :85] = (255, 220, 0)
    assert one_film(encoded(film)).coloured_fraction < 0.1


def test_one_strong_colour_all_over_is_flagged_as_colour():
    film = phantom(2)
    for colour in ((1, 1, 0.1), (1, 0.2, 0.2)):
        assert "colour" in flags(one_film(encoded(tinted(film, colour))))


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_luma_and_chroma_that_a_header_calls_rgb_are_flagged_as_colour(photometric):
    """A film of them has lost most of its contrast."""
    film = phantom(2)
    chroma = np.full_like(film, 128)
    elements = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "BitsAllocated": 8}
    elements |= {"BitsStored": 8, "HighBit": 7, "PhotometricInterpretation": photometric}
    pixels = np.stack([film, chroma, chroma], axis=2).tobytes()
    found = one_film(dicom(film, **elements, PixelData=pixels))
    assert flags(found) == ({"colour"} if photometric == "RGB" else set())


def test_grey_in_three_channels_and_one_even_tint_have_no_colour():
    grey = np.stack([phantom(2)] * 3, axis=2)
    assert one_film(encoded(grey)).coloured_fraction == 0
    even = np.full((200, 200, 3), (200, 220, 250), np.uint8)
    assert one_film(encoded(even)).coloured_fraction == 0


@pytest.mark.parametrize("seed", range(6))
def test_phantoms_raise_no_flag_and_their_negatives_are_inverted(seed):
    film = phantom(seed, OPACITY_KINDS[seed % len(OPACITY_KINDS)])
    assert flags(film) == set()
    assert "inverted" in flags(255 - film)


def test_a_negative_is_found_even_at_the_smallest_image_size():
    film = phantom(0)[:, 10:-10]
    for pixels, is_inverted in ((film, False), (255 - film, True)):
        content = Preprocessing(image_size=32).fit(pixels)
        assert min(content.shape) < 32
        assert judge(content, *pixels.shape, 0.0, None).inverted is is_inverted


@pytest.mark.parametrize("seed", range(3))
def test_a_film_cut_to_the_lungs_passes_and_its_negative_is_inverted(seed):
    """Its surround, which hides the spine, is black, and white in the negative."""
    film = phantom(seed)
    height, width = film.shape
    row, column = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    lungs = ((row - 0.5) / 0.35) ** 2 + ((np.abs(column - 0.5) - 0.2) / 0.13) ** 2 < 1
    cut = np.where(lungs, np.maximum(film, 40), 0).astype(np.uint8)
    assert "inverted" not in flags(cut)
    assert "inverted" in flags(255 - cut)


def test_neither_a_white_frame_nor_much_white_alone_is_taken_for_a_negative():
    film = phantom(1)
    assert "inverted" not in flags(np.pad(film, 8, constant_values=255))
    assert "inverted" not in flags(np.pad(np.full_like(film, 255), 40))


@pytest.mark.parametrize(("side", "is_too_small"), [(95, True), (96, False)])
def test_a_side_of_96_pixels_is_enough(side, is_too_small):
    assert ("too_small" in flags(grey_film(1, 120, side))) is is_too_small


def moved(film: np.ndarray, share: float) -> np.ndarray:
    """The film with the patient off the middle; air fills the other side."""
    columns = round(share * film.shape[1])
    air = np.zeros((len(film), abs(columns)), film.dtype)
    if columns > 0:
        return np.hstack([air, film[:, :-columns]])
    return np.hstack([film[:, -columns:], air])


@pytest.mark.parametrize("share", [-0.2, -0.12, 0.12, 0.2])
@pytest.mark.parametrize("seed", range(6))
def test_a_film_with_the_patient_off_the_middle_is_not_taken_for_a_negative(seed, share):
    assert "inverted" not in flags(moved(phantom(seed), share))


@pytest.mark.parametrize("bars", [((0, 0), (40, 0)), ((0, 0), (0, 40)), ((0, 120), (0, 0))])
@pytest.mark.parametrize("seed", range(6))
def test_collimation_does_not_change_whether_a_film_is_a_negative(seed, bars):
    """It is black in either polarity."""
    assert "inverted" not in flags(np.pad(phantom(seed), bars))
    assert "inverted" in flags(np.pad(255 - phantom(seed), bars))


@pytest.mark.parametrize(
    ("spine", "corners", "is_inverted"),
    [
        (95, 80, True),  # much darker than the lungs: whatever lies above the shoulders
        (105, 155, True),  # darker, and what should be air is bright
        (105, 140, False),
        (125, 155, False),
    ],
)
def test_a_slightly_darker_spine_means_a_negative_only_below_bright_air(
    spine, corners, is_inverted
):
    film = np.full((160, 160), 140, np.uint8)
    film[:, 72:88] = spine
    film[:26, :20] = film[:26, -20:] = corners
    film[-20:] = 60  # of many greys, as films are
    assert ("inverted" in flags(film)) is is_inverted


def test_the_default_rejections_are_flags_without_the_doubtful_ones():
    assert set(REJECTED_BY_DEFAULT) < set(QUALITY_FLAGS)
    assert not {"low_contrast", "heavy_borders", "odd_aspect", "child"} & set(REJECTED_BY_DEFAULT)


@needs_real_data
def test_no_real_film_is_rejected_and_every_real_negative_is_found():
    films = []
    with tarfile.open(LUNG_FIELDS / "images-000.tar") as shard:
        for member in list(shard)[::4]:
            data = shard.extractfile(member).read()
            films.append(np.asarray(Image.open(io.BytesIO(data)).convert("L")))
    assert len(films) > 200
    assert not set.union(*(flags(film) for film in films)) & set(REJECTED_BY_DEFAULT)
    assert all("inverted" in flags(255 - film) for film in films)


@needs_real_data
@pytest.mark.parametrize("tint", TINTS.values(), ids=TINTS)
def test_no_real_film_on_a_tinted_base_is_flagged_as_colour(tint):
    for path in DICOM_FOLDER.glob("*.dcm"):
        film = tinted(one_film(path.read_bytes()).pixels, tint)
        assert one_film(encoded(film, "JPEG")).coloured_fraction < 0.01


@needs_real_data
def test_a_full_film_with_the_wrong_polarity_in_its_header_is_found():
    found = {path.name: flags(one_film(path.read_bytes())) for path in DICOM_FOLDER.glob("*.dcm")}
    assert {name for name, raised in found.items() if raised} == {"Fake_MONOHR1.dcm"}
    assert found["Fake_MONOHR1.dcm"] == {"inverted"}


@needs_real_data
@pytest.mark.parametrize("share", [-0.2, -0.1, 0.1, 0.15, 0.2])
def test_real_films_with_the_patient_off_the_middle_are_not_taken_for_negatives(share):
    films = [one_film(path.read_bytes()) for path in DICOM_FOLDER.glob("*.dcm")]
    upright = [film.pixels for film in films if "inverted" not in flags(film)]
    assert len(upright) >= 6
    assert not any("inverted" in flags(moved(film, share)) for film in upright)
