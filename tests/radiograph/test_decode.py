import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from lungopacity.errors import ErrorCode, ImageError
from lungopacity.radiograph import SYNTHETIC_MARK, DecodeLimits, decode_radiograph
from tests.films import dicom, encoded, grey_film

LIMITS = DecodeLimits()


def decoded(data: bytes, **options):
    return decode_radiograph(data, limits=LIMITS, **options)


def code_of(data: bytes, limits: DecodeLimits = LIMITS) -> ErrorCode:
    with pytest.raises(ImageError) as caught:
        decode_radiograph(data, limits=limits)
    return caught.value.code


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "BMP", "JPEG2000"])
def test_lossless_formats_give_back_the_grey_values(image_format):
    film = grey_film()
    found = decoded(encoded(film, image_format))
    assert found.format == image_format.lower()
    assert (found.rows, found.columns) == film.shape
    np.testing.assert_array_equal(found.pixels, film)


def test_the_format_is_told_by_content():
    film = grey_film(height=64, width=64)
    found = decoded(encoded(film, "JPEG", quality=95))
    assert found.format == "jpeg"
    assert np.abs(found.pixels.astype(int) - film).mean() < 3


def test_sixteen_bits_are_stretched_to_the_images_own_range():
    film = np.linspace(1000, 5000, 1200).reshape(40, 30).astype(np.uint16)
    pixels = decoded(encoded(film)).pixels
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.all(np.diff(pixels.ravel().astype(int)) >= 0)


def test_transparent_pixels_are_black_not_white():
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[..., :3] = 255
    rgba[:, 20:, 3] = 255
    pixels = decoded(encoded(rgba)).pixels
    assert pixels[:, :20].max() == 0
    assert pixels[:, 20:].min() == 255


def test_exif_orientation_is_applied():
    film = grey_film(height=60, width=40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    found = decoded(encoded(film, "JPEG", quality=95, exif=exif))
    assert found.pixels.shape == (40, 60)


def test_a_large_jpeg_is_decoded_no_larger_than_needed():
    found = decoded(encoded(grey_film(height=1600, width=1200), "JPEG"), at_least=200)
    assert (found.rows, found.columns) == (1600, 1200)
    assert found.pixels.shape == (200, 150)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", ErrorCode.EMPTY),
        (b"GIF89a" + bytes(100), ErrorCode.NOT_AN_IMAGE),
        (b"image,label\na.png,Normal\n" * 20, ErrorCode.NOT_AN_IMAGE),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), ErrorCode.CORRUPT_IMAGE),
    ],
)
def test_bad_bytes_have_their_code(data, code):
    assert code_of(data) is code


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_a_cut_file_is_truncated(image_format):
    data = encoded(grey_film(height=300, width=300), image_format)
    assert code_of(data[: len(data) // 2]) is ErrorCode.TRUNCATED


def test_a_flipped_byte_in_png_pixels_is_noticed():
    data = bytearray(encoded(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)))
    data[data.index(b"IDAT") + 100] ^= 0xFF
    assert code_of(bytes(data)) is ErrorCode.CORRUPT_IMAGE


def test_a_declared_giant_is_refused_before_memory_is_taken():
    data = bytearray(encoded(grey_film()))
    header = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + bytes(data[24:29])
    data[12:29] = header
    data[29:33] = zlib.crc32(header).to_bytes(4, "big")
    assert code_of(bytes(data)) is ErrorCode.TOO_LARGE


def test_an_encoded_file_over_the_limit_is_refused():
    assert code_of(bytes(200), DecodeLimits(max_size_bytes=100)) is ErrorCode.TOO_LARGE


def test_a_phantom_says_that_it_is_one():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", f"{SYNTHETIC_MARK}, research use only")
    assert decoded(encoded(grey_film(), pnginfo=info)).synthetic
    assert decoded(encoded(grey_film(), "JPEG", comment=SYNTHETIC_MARK)).synthetic
    stored = grey_film().astype(np.uint16)
    assert decoded(dicom(stored, ImageComments=f"{SYNTHETIC_MARK}, …")).synthetic
    assert not decoded(encoded(grey_film())).synthetic


VALID = {
    "png": encoded(grey_film()),
    "jpeg": encoded(grey_film(), "JPEG"),
    "dicom": dicom(grey_film().astype(np.uint16)),
}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(VALID)),
    cut=st.integers(0, 4000),
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), max_size=8),
)
def test_whatever_the_bytes_nothing_but_a_coded_error_comes_out(kind, cut, flips):
    data = bytearray(VALID[kind])
    for place, change in flips:
        data[place % len(data)] ^= change
    try:
        found = decoded(bytes(data[: max(0, len(data) - cut)]))
    except ImageError:
        pass
    else:
        assert found.pixels.dtype == np.uint8
        assert found.pixels.ndim == 2
