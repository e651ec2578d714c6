"""TIFFs and JPEG 2000 in colour of 16 bits keep all their bits. For PNG see `test_png`."""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
import pytest

from lungopacity.errors import ErrorCode, ImageError
from lungopacity.radiograph import DecodeLimits, decode_radiographs
from tests.films import encoded, one_film

TWELVE_BITS = np.random.default_rng(0).integers(100, 4096, (120, 130), np.uint16)
GREY_RGB = np.repeat(TWELVE_BITS[..., None], 3, axis=2)
OPAQUE = np.full_like(TWELVE_BITS, 65535)
EXPECTED = one_film(encoded(TWELVE_BITS)).pixels
_ORIENTATION = 274


def tiff(samples: np.ndarray, **options: object) -> bytes:
    # A copy, because the predictor is applied in place.
    return imagecodecs.tiff_encode(samples.copy(order="C"), photometric="rgb", **options)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(tiff(GREY_RGB), id="tiff"),
        pytest.param(tiff(GREY_RGB, byteorder=">"), id="tiff-big-endian"),
        pytest.param(tiff(GREY_RGB, compression="deflate", predictor=2), id="tiff-deflate"),
        pytest.param(tiff(GREY_RGB, tile=(16, 16)), id="tiff-tiles"),
        pytest.param(tiff(np.moveaxis(GREY_RGB, -1, 0), planarconfig="separate"), id="tiff-planes"),
        pytest.param(
            tiff(np.dstack([GREY_RGB, OPAQUE]), extrasample="unassalpha"), id="tiff-alpha"
        ),
        pytest.param(
            # Premultiplied colours must not be multiplied again.
            tiff(np.dstack([GREY_RGB, OPAQUE // 2]), extrasample="assocalpha"),
            id="tiff-multiplied-alpha",
        ),
        pytest.param(imagecodecs.jpeg2k_encode(GREY_RGB, level=0), id="jpeg2000"),
        pytest.param(
            imagecodecs.jpeg2k_encode(GREY_RGB, level=0, bitspersample=12), id="jpeg2000-12"
        ),
        pytest.param(
            imagecodecs.jpeg2k_encode(
                np.dstack([GREY_RGB, OPAQUE >> 4]), level=0, bitspersample=12
            ),
            id="jpeg2000-12-alpha",
        ),
    ],
)
def test_a_film_of_16_bits_in_colour_keeps_all_of_them(data):
    found = one_film(data)
    np.testing.assert_array_equal(found.pixels, EXPECTED)
    assert len(np.unique(found.pixels)) == 256
    assert found.coloured_fraction == 0


def test_transparent_pixels_of_deep_colours_are_black():
    alpha = OPAQUE.copy()
    alpha[:, :40] = 0
    found = one_film(tiff(np.dstack([GREY_RGB, alpha]), extrasample="unassalpha"))
    expected = one_film(encoded(np.where(alpha > 0, TWELVE_BITS, 0).astype(np.uint16)))
    np.testing.assert_array_equal(found.pixels, expected.pixels)


def test_colours_of_16_bits_are_measured():
    rgb = np.random.default_rng(0).integers(0, 65536, (120, 130, 3), np.uint16)
    for data in (tiff(rgb), imagecodecs.jpeg2k_encode(rgb, level=0)):
        assert one_film(data).coloured_fraction > 0.3


def test_a_tiff_is_turned_exactly_once():
    height, width = TWELVE_BITS.shape
    pixels = GREY_RGB.astype("<u2").tobytes()
    # Width, height, bits, no compression, RGB, offset of the pixels, orientation, samples, rows and
    # bytes of the only strip (TIFF 6.0, section 6).
    tags = {256: width, 257: height, 258: 134, 259: 1, 262: 2, 273: 140, _ORIENTATION: 6, 277: 3}
    tags |= {278: height, 279: len(pixels)}
    entries = [
        struct.pack("<HHII", tag, 3 if tag == 258 else 4, 3 if tag == 258 else 1, value)
        for tag, value in tags.items()
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    data = b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<HHH", 16, 16, 16)
    assert len(data) == 140
    found = one_film(data + pixels)
    np.testing.assert_array_equal(found.pixels, np.rot90(EXPECTED, -1))


def test_each_page_of_a_tiff_is_a_film_of_its_own():
    pages = [GREY_RGB, GREY_RGB[::-1]]
    data = imagecodecs.tiff_encode(np.ascontiguousarray(pages), photometric="rgb")
    found = list(decode_radiographs(data, limits=DecodeLimits()))
    np.testing.assert_array_equal(found[0].pixels, EXPECTED)
    np.testing.assert_array_equal(found[1].pixels, EXPECTED[::-1])


def test_damage_in_deep_colours_has_its_code():
    packed = tiff(GREY_RGB, compression="lzw")
    cut = packed[: len(packed) // 2], imagecodecs.jpeg2k_encode(GREY_RGB)[:9000]
    damaged = packed[:30000] + bytes(1000) + packed[31000:]
    for data, code in (
        (cut[0], ErrorCode.TRUNCATED),
        (cut[1], ErrorCode.TRUNCATED),
        (damaged, ErrorCode.CORRUPT_IMAGE),
    ):
        try:
            (found,) = decode_radiographs(data, limits=DecodeLimits())
        except ImageError as error:
            found = error
        assert isinstance(found, ImageError)
        assert found.code is code


def test_colours_that_the_second_decoder_cannot_read_are_unsupported():
    data = bytearray(imagecodecs.jpeg2k_encode(GREY_RGB, level=0))
    at = data.index(b"\xff\x4f\xff\x51") + 42
    assert data[at : at + 9] == b"\x0f\x01\x01" * 3
    data[at] = 11  # red of 12 bits, green and blue of 16
    (found,) = decode_radiographs(bytes(data), limits=DecodeLimits())
    assert isinstance(found, ImageError)
    assert found.code is ErrorCode.UNSUPPORTED
    assert "convert it to grey" in found.message
