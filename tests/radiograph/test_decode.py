import base64
import itertools
import re
import zlib

import imagecodecs
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from lungopacity.errors import ErrorCode, ImageError, causes
from lungopacity.radiograph import SYNTHETIC_MARK, DecodeLimits, decode_radiographs
from lungopacity.radiograph.jpeg import read_header
from tests.films import dicom, encoded, grey_film, one_film, saved
from tests.radiograph.dicom_files import code_of, of_codestreams

LIMITS = DecodeLimits()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "BMP", "JPEG2000"])
def test_lossless_formats_give_back_the_grey_values(image_format):
    film = grey_film()
    found = one_film(encoded(film, image_format))
    assert found.format == image_format.lower()
    assert (found.rows, found.columns) == film.shape
    np.testing.assert_array_equal(found.pixels, film)


def test_the_format_is_recognised_by_content():
    film = grey_film(height=64, width=64)
    found = one_film(encoded(film, "JPEG", quality=95))
    assert found.format == "jpeg"
    assert np.abs(found.pixels.astype(int) - film).mean() < 3


def palette(film: np.ndarray) -> Image.Image:
    shuffled = np.random.default_rng(0).permutation(256).astype(np.uint8)
    image = Image.fromarray(np.argsort(shuffled).astype(np.uint8)[film]).convert("P")
    image.putpalette(np.repeat(shuffled, 3).tobytes())
    return image


FILM = grey_film(height=64, width=64)
SIXTEEN = (FILM.astype(np.uint16) * 257).astype(np.uint16)
STRETCHED = np.rint((FILM - FILM.min()) * (255.0 / (FILM.max() - FILM.min())))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(encoded(np.stack([FILM] * 3, axis=2)), FILM, id="png-rgb"),
        pytest.param(encoded(np.dstack([FILM] * 3 + [np.full_like(FILM, 255)])), FILM, id="rgba"),
        pytest.param(saved(palette(FILM)), FILM, id="png-palette"),
        pytest.param(saved(Image.fromarray(FILM > 99)), 255 * (FILM > 99), id="png-1-bit"),
        pytest.param(encoded(SIXTEEN), STRETCHED, id="png-16"),
        pytest.param(encoded(SIXTEEN, "TIFF"), STRETCHED, id="tiff-16"),
        pytest.param(encoded(SIXTEEN.astype(">u2"), "TIFF"), STRETCHED, id="tiff-16-big-endian"),
        pytest.param(encoded(SIXTEEN, "JPEG2000"), STRETCHED, id="jpeg2000-16"),
        pytest.param(encoded(np.stack([FILM] * 3, axis=2), "JPEG2000"), FILM, id="jpeg2000-rgb"),
        pytest.param(encoded(FILM.astype(np.float32), "TIFF"), STRETCHED, id="tiff-float"),
        pytest.param(encoded(SIXTEEN.astype(np.int32), "TIFF"), STRETCHED, id="tiff-32"),
        pytest.param(encoded(FILM, "TIFF", compression="tiff_lzw"), FILM, id="tiff-lzw"),
        pytest.param(encoded(FILM, "TIFF", compression="tiff_adobe_deflate"), FILM, id="tiff-zip"),
    ],
)
def test_every_sample_layout_gives_the_same_grey(data, expected):
    assert np.abs(one_film(data).pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="baseline"),
        pytest.param({"progressive": True}, id="progressive"),
        pytest.param({"optimize": True, "restart_marker_blocks": 2}, id="restart-markers"),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_every_kind_of_jpeg_gives_the_same_grey(mode, options):
    data = saved(Image.fromarray(FILM).convert(mode), "JPEG", quality=98, **options)
    for at_least in (None, 64):
        found = one_film(data, at_least=at_least)
        assert np.abs(found.pixels.astype(int) - FILM).max() <= 8


@pytest.mark.parametrize("named_by", ["Adobe's marker", "components"])
def test_a_jpeg_that_holds_rgb_is_read_at_any_scale(named_by):
    film = grey_film(height=640, width=480)
    tinted = np.stack([film, film // 16 * 15 + 8, film // 16 * 15], axis=-1)
    data = encoded(tinted, "JPEG", quality=98, keep_rgb=True)
    if named_by == "Adobe's marker":
        for header, first in ((b"\xff\xc0", 10), (b"\xff\xda", 5)):
            at = data.index(header) + first
            step = 3 if first == 10 else 2
            assert data[at : at + 3 * step : step] == b"RGB"
            named = bytearray(data)
            named[at : at + 3 * step : step] = b"\1\2\3"
            data = bytes(named)
    else:
        at = data.index(b"\xff\xee")
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    whole = one_film(data).pixels
    assert np.abs(whole.astype(int) - np.asarray(Image.fromarray(tinted).convert("L"))).max() <= 8
    shrunk = one_film(data, at_least=160)
    assert shrunk.pixels.shape == (160, 120)
    expected = np.asarray(Image.fromarray(whole).resize((120, 160), Image.Resampling.BOX))
    assert np.abs(shrunk.pixels.astype(int) - expected).max() <= 8
    assert shrunk.coloured_fraction == one_film(encoded(tinted, "JPEG")).coloured_fraction


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (imagecodecs.jpeg8_encode(SIXTEEN >> 4, level=95, bitspersample=12), "a JPEG of 12 bits"),
        (imagecodecs.jpegls_encode(FILM), "a JPEG-LS of 8 bits"),
        (imagecodecs.jpegls_encode(SIXTEEN), "a JPEG-LS of 16 bits"),
    ],
    ids=["12-bit", "jpeg-ls", "jpeg-ls-16"],
)
def test_a_jpeg_that_is_not_decoded_is_unsupported_and_not_corrupt(data, told):
    with pytest.raises(ImageError, match=told) as caught:
        one_film(data)
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_colour_is_measured_and_grey_in_three_channels_has_none():
    photograph = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image_format in ("PNG", "JPEG"):
        assert one_film(encoded(photograph, image_format), at_least=32).coloured_fraction > 0.3
        grey = np.stack([FILM] * 3, axis=2)
        assert one_film(encoded(grey, image_format), at_least=32).coloured_fraction == 0


def test_sixteen_bits_are_stretched_to_the_images_own_range():
    film = np.linspace(1000, 5000, 1200).reshape(40, 30).astype(np.uint16)
    pixels = one_film(encoded(film)).pixels
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.all(np.diff(pixels.ravel().astype(int)) >= 0)


def test_transparent_pixels_are_black_not_white():
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[..., :3] = 255
    rgba[:, 20:, 3] = 255
    pixels = one_film(encoded(rgba)).pixels
    assert pixels[:, :20].max() == 0
    assert pixels[:, 20:].min() == 255


def test_a_large_jpeg_is_decoded_no_larger_than_needed():
    found = one_film(encoded(grey_film(height=1600, width=1200), "JPEG"), at_least=200)
    assert (found.rows, found.columns) == (1600, 1200)
    assert found.pixels.shape == (200, 150)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", ErrorCode.EMPTY),
        (b"image,label\na.png,Normal\n" * 20, ErrorCode.NOT_AN_IMAGE),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), ErrorCode.CORRUPT_IMAGE),
    ],
)
def test_bad_bytes_have_their_code(data, code):
    assert code_of(data) is code


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (saved(Image.fromarray(grey_film()), "WEBP"), "a picture in WebP; convert it to PNG"),
        (saved(Image.fromarray(grey_film()), "GIF"), "a picture in GIF; convert it to PNG"),
        (
            saved(Image.fromarray(grey_film()), "AVIF"),
            "a picture in HEIF or AVIF; convert it to PNG",
        ),
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
            "a picture in HEIF or AVIF; convert it to PNG",
        ),
        (imagecodecs.jpegxl_encode(grey_film()), "a picture in JPEG XL; convert it to PNG"),
        (
            imagecodecs.jpegxl_encode(grey_film(), usecontainer=True),
            "a picture in JPEG XL; convert it to PNG",
        ),
        (imagecodecs.jpegxr_encode(grey_film()), "a picture in JPEG XR; convert it to PNG"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(999), "an archive in 7z; convert it to tar or zip"),
        (b"Rar!\x1a\x07\1\0" + bytes(999), "an archive in RAR; convert it to tar or zip"),
        (imagecodecs.lz4f_encode(bytes(999)), "a file in LZ4; convert it to tar or zip"),
    ],
)
def test_a_file_in_a_format_that_is_not_decoded_is_named(data, told):
    with pytest.raises(ImageError, match=told) as caught:
        one_film(data)
    assert caught.value.code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_a_cut_file_is_truncated(image_format):
    data = encoded(grey_film(height=300, width=300), image_format)
    assert code_of(data[: len(data) // 2]) is ErrorCode.TRUNCATED


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "JPEG2000", "BMP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_error_of_a_damaged_file_has_the_facts_of_its_header(mode, image_format):
    data = saved(Image.fromarray(grey_film(height=300, width=200)).convert(mode), image_format)
    with pytest.raises(ImageError) as caught:
        one_film(data[: len(data) // 2])
    # An error that is its own cause would have no end.
    assert caught.value not in [*itertools.islice(causes(caught.value), 1, 9)]
    assert caught.value.facts["format"] == image_format.lower()
    if image_format in ("PNG", "JPEG", "BMP"):
        assert (caught.value.facts["rows"], caught.value.facts["columns"]) == (300, 200)
        assert caught.value.facts["photometric_interpretation"] == mode


_ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRT"
    "c4UG1RV19iZ2hnPk1xeXBkeFxlZ2P/yQALCAAwACgBAREA/8wABgAQEAX/2gAIAQEAAD8A/wBo4yl6A50bavVX9W6g"
    "Kj1yoUV9rvUFqEgXPxw/k385r+RuT7JrG1wFE2cAp8UepKLdkoSMOOptnQcviGI8slgzyB8d39FHDMqkeqeOJYelNh"
    "U/QR9VUOXaZ9eJZDnhoDh/sc8IAYNESOWSUcZClLh0Tc6zzfU0HhuwRxzVLJbNbj7UJVVT8TgAorZHNP6pjIm4Vkcg"
    "K5sw2ec3pBoDAzhwLxUZPy1ZhZRoIP/Z"
)
"""A phantom of 48 rows and 40 columns, made with libjpeg's coder, which no library here has."""


@pytest.mark.parametrize(
    ("offsets", "count"),
    [
        pytest.param({}, 4, id="from the origin"),
        # Across from 100 to 228 in tiles that begin at 90 and 154 and 218; down, at 40 and 104.
        pytest.param({"offset": (100, 40), "tile_offset": (90, 40)}, 6, id="from anywhere"),
    ],
)
def test_a_jpeg_2000_without_one_of_its_tiles_is_truncated(offsets, count):
    """OpenJPEG gives black for it."""
    film = grey_film(height=128, width=128)
    data = encoded(film, "JPEG2000", no_jp2=True, tile_size=(64, 64), **offsets)
    for whole in (data, of_codestreams([data], JPEG2000Lossless, film.shape)):
        np.testing.assert_array_equal(one_film(whole).pixels, film)
    tiles = [place.start() for place in re.finditer(rb"\xff\x90\0\x0a", data)]
    assert len(tiles) == count
    for first, end in itertools.pairwise([*tiles, len(data) - 2]):
        assert code_of(data[:first] + data[end:]) is ErrorCode.TRUNCATED
    # The last tile's number: as if its place had been taken by another part of the first tile.
    again = bytearray(data)
    again[tiles[-1] + 4 : tiles[-1] + 6] = bytes(2)
    assert code_of(bytes(again)) is ErrorCode.TRUNCATED


@pytest.mark.parametrize("as_dicom", [False, True])
def test_an_arithmetic_coded_jpeg_is_whole_or_truncated(as_dicom):
    """If bytes are missing, its decoder makes pixels of zeros, and nothing reports that."""

    def file_of(coded):
        return of_codestreams([coded], JPEGBaseline8Bit, (48, 40)) if as_dicom else coded

    film = grey_film(height=48, width=40).astype(int)
    for more in (b"", b"\0"):
        assert np.abs(one_film(file_of(_ARITHMETIC + more)).pixels - film).max() <= 24
    for missing in (20, 50, 100, 150):
        assert code_of(file_of(_ARITHMETIC[:-missing] + b"\xff\xd9")) is ErrorCode.TRUNCATED


def test_damage_in_the_coded_pixels_of_a_jpeg_is_noticed():
    """libjpeg only warns, and fills the rest with grey: a film with a false opacity."""
    data = bytearray(
        encoded(np.random.default_rng(0).integers(0, 256, (200, 200), np.uint8), "JPEG")
    )
    middle = len(data) // 2
    data[middle : middle + 40] = b"\xff\xd9" * 20
    with pytest.raises(ImageError):
        one_film(bytes(data))


@pytest.mark.parametrize("as_dicom", [False, True])
@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"progressive": True}])
def test_a_flipped_bit_that_libjpeg_notices_is_an_error(options, as_dicom):
    """For a scan that lost its step, it mostly warns of `extraneous bytes before marker`."""
    data = encoded(grey_film(height=32, width=32), "JPEG", quality=90, **options)
    scan = data.index(b"\xff\xda")
    noticed = 0
    for bit in range(8 * (scan + 10), 8 * (len(data) - 2), 13 if as_dicom else 3):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            simplejpeg.decode_jpeg(bytes(damaged), "GRAY")
        except ValueError:
            noticed += 1
            found = bytes(damaged)
            if as_dicom:
                found = of_codestreams([found], JPEGBaseline8Bit, (32, 32))
            code_of(found)
    assert noticed > 10


def test_fill_bytes_before_the_markers_of_a_jpeg_hide_no_header():
    """Any number of FF may precede a marker (T.81 B.1.1.2)."""
    data = encoded(FILM, "JPEG", quality=98, comment="a comment " * 60)
    filled = data
    for marker in (b"\xff\xe0", b"\xff\xfe", b"\xff\xdb", b"\xff\xc0", b"\xff\xc4"):
        filled = filled.replace(marker, b"\xff\xff" + marker, 1)
    assert read_header(filled) == read_header(data)
    np.testing.assert_array_equal(one_film(filled).pixels, one_film(data).pixels)


def test_extraneous_bytes_in_the_header_of_a_jpeg_do_not_cost_the_film():
    data = encoded(FILM, "JPEG", quality=98)
    at = data.index(b"\xff\xc4")
    found = one_film(data[:at] + b"\x00\x00" + data[at:]).pixels
    np.testing.assert_array_equal(found, one_film(data).pixels)


def test_a_flipped_byte_in_png_pixels_is_noticed():
    data = bytearray(encoded(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)))
    data[data.index(b"IDAT") + 100] ^= 0xFF
    assert code_of(bytes(data)) is ErrorCode.CORRUPT_IMAGE


def test_a_header_that_declares_a_giant_is_refused_before_memory_is_taken():
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
    assert one_film(encoded(grey_film(), pnginfo=info)).synthetic
    assert one_film(encoded(grey_film(), "JPEG", comment=SYNTHETIC_MARK)).synthetic
    stored = grey_film().astype(np.uint16)
    assert one_film(dicom(stored, ImageComments=f"{SYNTHETIC_MARK}, …")).synthetic
    assert not one_film(encoded(grey_film())).synthetic


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
def test_any_damage_raises_only_errors_with_a_code(kind, cut, flips):
    data = bytearray(VALID[kind])
    for place, change in flips:
        data[place % len(data)] ^= change
    try:
        for found in decode_radiographs(bytes(data[: max(0, len(data) - cut)]), limits=LIMITS):
            if not isinstance(found, ImageError):
                assert found.pixels.dtype == np.uint8
                assert found.pixels.ndim == 2
    except ImageError:
        pass


def test_the_fast_jpeg_decoder_gives_the_same_pixels_as_pillow(monkeypatch):
    data = encoded(FILM, "JPEG", quality=90, comment="a comment")
    fast = one_film(data)
    monkeypatch.setattr("lungopacity.radiograph.decode.read_header", lambda _: None)
    slow = one_film(data)
    np.testing.assert_array_equal(fast.pixels, slow.pixels)
    assert dict(fast.facts()) == dict(slow.facts())


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "BMP"])
def test_of_several_images_in_a_row_the_first_is_the_film(image_format):
    """Phones and editors append thumbnails, depth maps and notes, which must not cost the film."""
    film, other = (encoded(grey_film(seed, 64, 64), image_format) for seed in (0, 1))
    alone = one_film(film)
    for behind in (other, b"\0" * 4096, b"notes of an editor"):
        np.testing.assert_array_equal(one_film(film + behind).pixels, alone.pixels)


@pytest.mark.parametrize("image_format", ["TIFF", "BMP", "DICOM"])
def test_zeros_at_the_end_cannot_be_told_from_black(image_format):
    """As docs/inputs.md says: most films that are blacked out end in zeros, too."""
    film = grey_film(height=64, width=64)
    whole = dicom(film) if image_format == "DICOM" else encoded(film, image_format)
    copied = whole[: len(whole) * 3 // 4]
    found = one_film(copied.ljust(len(whole), b"\0"))
    assert (found.rows, found.columns) == film.shape
