"""The fast decoder of grey PNGs gives the same pixels as Pillow, and notices all damage."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from lungopacity.errors import ErrorCode, ImageError
from lungopacity.radiograph import DecodeLimits, decode_radiographs
from lungopacity.radiograph.png import check_rows, decode_grey_png, read_plain_header
from tests.films import encoded, one_film

FILM = np.random.default_rng(0).integers(0, 255, (120, 130), np.uint8)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2))  # fmt: skip
"""Left, top, and steps across and down of each pass (PNG, third edition, 8.1)."""


def png(pixels: np.ndarray, **options: object) -> bytes:
    return encoded(pixels, **options)


def decoded(data: bytes) -> np.ndarray:
    header = read_plain_header(data)
    assert header is not None
    return decode_grey_png(data, header)


def filtered(pixels: np.ndarray, filters: list[int]) -> bytes:
    """A PNG with these filters (None, Sub or Up), one per row (PNG, third edition, 9.2)."""
    before = np.vstack([np.zeros_like(pixels[:1]), pixels[:-1]])
    left = np.hstack([np.zeros_like(pixels[:, :1]), pixels[:, :-1]])
    coded = [pixels, pixels - left, pixels - before]
    rows = b"".join(bytes([kind]) + coded[kind][row].tobytes() for row, kind in enumerate(filters))
    height, width = pixels.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\0\0\0\0"
    coded_rows = zlib.compress(rows)
    half = len(coded_rows) // 2
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            chunk(b"IHDR", header),
            chunk(b"IDAT", coded_rows[:half]),
            chunk(b"IDAT", coded_rows[half:]),
            chunk(b"IEND", b""),
        ]
    )


def deep(samples: np.ndarray, *extra: bytes, rows: int | None = None) -> bytes:
    """A PNG of 16 bits with 1 to 4 samples per pixel. `rows`: how many rows it really holds."""
    height, width, count = samples.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header += bytes([16, (0, 4, 2, 6)[count - 1], 0, 0, 0])
    coded = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples[:rows])
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(coded))]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, chunk(b"IEND", b"")])


def code_of(data: bytes) -> ErrorCode:
    """The single error that the file gives, whether raised or yielded instead of the image."""
    try:
        (found,) = decode_radiographs(data, limits=DecodeLimits())
    except ImageError as error:
        return error.code
    assert isinstance(found, ImageError)
    return found.code


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def with_pixels(change: Callable[[bytes], bytes]) -> bytes:
    """A film with changed compressed pixels and a matching checksum of the chunk."""
    rows = b"".join(b"\0" + row.tobytes() for row in FILM)
    header = (130).to_bytes(4, "big") + (120).to_bytes(4, "big") + b"\x08\0\0\0\0"
    coded = change(zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", coded), chunk(b"IEND", b"")]
    )


def interlaced() -> bytes:
    """The film interlaced by Adam7, with every pass unfiltered (PNG, third edition, 8.1)."""
    rows = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in ADAM7 for row in FILM[y::dy, x::dx])
    header = (130).to_bytes(4, "big") + (120).to_bytes(4, "big") + b"\x08\0\0\0\1"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
    level=st.integers(0, 9),
)
def test_pixels_are_those_of_pillow(rows, columns, seed, level):
    pixels = np.random.default_rng(seed).integers(0, 255, (rows, columns), np.uint8)
    pixels = np.cumsum(pixels % 3, axis=1).astype(np.uint8) if seed % 2 else pixels
    data = png(pixels, compress_level=level)
    header = read_plain_header(data)
    assert header is not None
    assert (header.rows, header.columns) == (rows, columns)
    np.testing.assert_array_equal(decode_grey_png(data, header), pixels)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_every_row_may_have_its_own_filter(data, rows, columns):
    filters = data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    pixels = np.random.default_rng(rows).integers(0, 255, (rows, columns), np.uint8)
    np.testing.assert_array_equal(decoded(filtered(pixels, filters)), pixels)


@pytest.mark.parametrize("top", [0, 1, 255, 4095, 65535])
def test_pixels_of_16_bits_are_those_of_pillow(top):
    values = np.random.default_rng(top).integers(0, top + 1, (40, 50), np.uint16)
    data = png(values)
    np.testing.assert_array_equal(decoded(data), values)
    film = one_film(data)
    expected = np.rint((values - values.min()) * (255 / max(1, np.ptp(values))))
    np.testing.assert_array_equal(film.pixels, expected)
    assert film.photometric_interpretation == "I;16"
    # Pillow reads a file with text.
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a text")
    with_text = one_film(png(values, pnginfo=text))
    np.testing.assert_array_equal(with_text.pixels, film.pixels)
    assert with_text.facts() == film.facts()


def test_a_film_with_independent_rows_is_decoded_without_libpng(monkeypatch):
    data = filtered(FILM, [1] * 120)
    monkeypatch.setattr("imagecodecs.png_decode", None)
    np.testing.assert_array_equal(decoded(data), FILM)


@pytest.mark.parametrize("filters", [[0] * 120, [1] * 119 + [2], [1, 1, 0] * 40])
def test_films_with_other_filters_are_decoded_by_libpng(filters):
    np.testing.assert_array_equal(decoded(filtered(FILM, filters)), FILM)


def test_an_interlaced_film_is_the_same_film():
    data = interlaced()
    np.testing.assert_array_equal(decoded(data), FILM)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), FILM)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda z: z[:-4] + b"\0\1\2\3", ErrorCode.CORRUPT_IMAGE),
        (lambda z: z[:4000] + bytes([z[4000] ^ 16]) + z[4001:], ErrorCode.CORRUPT_IMAGE),
        (lambda z: zlib.compress(zlib.decompress(z)[:-4000]), ErrorCode.TRUNCATED),
    ],
    ids=["checksum of the pixels", "a flipped bit", "rows are missing"],
)
def test_damaged_pixels_are_refused_even_if_the_chunks_are_sound(change, code):
    assert len(list(decode_radiographs(with_pixels(bytes), limits=DecodeLimits()))) == 1
    assert code_of(with_pixels(change)) is code


@pytest.mark.parametrize(
    "whole",
    [png(FILM), png(FILM.astype(np.uint16)), filtered(FILM, [1] * len(FILM))],
    ids=["8 bits", "16 bits", "decoded without libpng"],
)
def test_a_chunk_that_differs_from_its_checksum_is_refused(whole):
    assert whole[-8:-4] == b"IEND"
    for place in (len(whole) // 2, len(whole) - 16):  # of the pixels, or of their checksum
        data = bytearray(whole)
        data[place] ^= 1
        assert code_of(bytes(data)) is ErrorCode.CORRUPT_IMAGE


@pytest.mark.parametrize(
    ("length", "code"),
    [
        (0, ErrorCode.EMPTY),
        (7, ErrorCode.NOT_AN_IMAGE),
        (20, ErrorCode.TRUNCATED),
        (60, ErrorCode.TRUNCATED),
        (5000, ErrorCode.TRUNCATED),
    ],
)
def test_a_cut_file_is_refused_wherever_it_is_cut(length, code):
    data = png(FILM)[:length]
    assert read_plain_header(data) is None
    assert code_of(data) is code


def test_files_with_more_than_grey_pixels_are_left_to_pillow():
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "synthetic phantom")
    assert read_plain_header(png(FILM, pnginfo=text)) is None
    assert read_plain_header(png(FILM, transparency=3)) is None
    assert read_plain_header(png(FILM.astype(np.uint16), transparency=3)) is None
    assert read_plain_header(png(np.stack([FILM] * 3, axis=2))) is None
    assert read_plain_header(png(FILM > 99)) is None
    assert read_plain_header(png(FILM, dpi=(72, 72))) is not None


TWELVE_BITS = np.random.default_rng(0).integers(100, 4096, (120, 130, 1), np.uint16)
OPAQUE = np.full_like(TWELVE_BITS, 65535)
GREY_RGB = np.repeat(TWELVE_BITS, 3, axis=2)


@pytest.mark.parametrize(
    "samples",
    [GREY_RGB, np.dstack([GREY_RGB, OPAQUE]), np.dstack([TWELVE_BITS, OPAQUE])],
    ids=["RGB", "RGBA", "LA"],
)
def test_a_film_of_16_bits_in_colour_keeps_all_of_them(samples):
    found = one_film(deep(samples))
    np.testing.assert_array_equal(found.pixels, one_film(deep(TWELVE_BITS)).pixels)
    assert len(np.unique(found.pixels)) == 256
    assert found.coloured_fraction == 0


def test_transparent_pixels_of_16_bits_are_black():
    alpha = OPAQUE.copy()
    alpha[:, :40] = 0
    expected = one_film(deep(np.where(alpha > 0, TWELVE_BITS, 0))).pixels
    for samples in (GREY_RGB, TWELVE_BITS):
        found = one_film(deep(np.dstack([samples, alpha])))
        np.testing.assert_array_equal(found.pixels, expected)
        keyed = samples.copy()
        keyed[:, :40] = 65535
        found = one_film(deep(keyed, chunk(b"tRNS", b"\xff\xff" * samples.shape[2])))
        np.testing.assert_array_equal(found.pixels, expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_value_is_black_at_any_depth(bits):
    most = (1 << bits) - 1
    values = np.repeat(np.linspace(0, most, min(16, most + 1)).astype(int), 16)
    row = "".join(f"{value:0{bits}b}" for value in values)
    rows = (b"\0" + int(row, 2).to_bytes(len(row) // 8, "big")) * 8
    header = len(values).to_bytes(4, "big") + (8).to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    # Its bits above the depth are ignored (PNG, third edition, 11.3.1.1).
    for key in (most, 0xFFFF):
        data = b"\x89PNG\r\n\x1a\n" + b"".join(
            [
                chunk(b"IHDR", header),
                chunk(b"tRNS", key.to_bytes(2, "big")),
                chunk(b"IDAT", zlib.compress(rows)),
                chunk(b"IEND", b""),
            ]
        )
        shown = one_film(data).pixels
        assert (shown[:, values == most] == 0).all()
        if bits > 1:
            assert shown.max() >= 128


def test_colours_of_16_bits_are_measured_and_have_the_luma_of_8_bits():
    rgb = np.random.default_rng(0).integers(0, 256, (120, 130, 3), np.uint16)
    rgb[0, 0], rgb[0, 1] = 0, 255
    whole, dark = one_film(deep(rgb * 257)), one_film(deep(rgb * 16))
    shallow = one_film(png(rgb.astype(np.uint8)))
    assert np.abs(whole.pixels.astype(int) - shallow.pixels).max() <= 1
    assert np.abs(dark.pixels.astype(int) - shallow.pixels).max() <= 1
    assert whole.coloured_fraction == dark.coloured_fraction == shallow.coloured_fraction > 0.3


def _png_of(picture: Image.Image, is_interlaced: bool) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    if not is_interlaced:
        return sink.getvalue()
    # Pillow does not write interlaced files. All rows of every pass are unfiltered.
    samples = {"RGB": 3, "RGBA": 4, "LA": 2}.get(picture.mode, 1)
    bits = {"1": 1, "I;16": 16}.get(picture.mode, 8)
    planes = np.asarray(picture).reshape(picture.height, picture.width, samples)
    if bits == 16:
        planes = planes.astype(">u2")
    rows = b""
    for left, top, across, down in ADAM7:
        for row in planes[top::down, left::across]:
            coded = np.packbits(row).tobytes() if bits == 1 else row.tobytes()
            rows += b"\0" + coded
    return _with(sink.getvalue(), zlib.compress(rows), is_interlaced=True)


def _with(data: bytes, coded: bytes, is_interlaced: bool) -> bytes:
    """The PNG with other coded rows."""
    found, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    header = dict(found)[b"IHDR"][:12] + bytes([is_interlaced])
    rest = [(kind, value) for kind, value in found if kind not in (b"IHDR", b"IDAT", b"IEND")]
    chunks = [(b"IHDR", header), *rest, (b"IDAT", coded), (b"IEND", b"")]
    return data[:8] + b"".join(chunk(kind, value) for kind, value in chunks)


def _without_last_bytes(data: bytes, count: int) -> bytes:
    """The PNG with so many bytes fewer of its rows in a sound stream; with more if negative."""
    coded, at = b"", 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            coded += data[at + 8 : at + 8 + length]
        at += 12 + length
    rows = zlib.decompress(coded)
    rows = rows[:-count] if count > 0 else rows + bytes(-count)
    return _with(data, zlib.compress(rows), is_interlaced=data[28] == 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "I;16"])
@pytest.mark.parametrize("is_interlaced", [False, True])
def test_missing_rows_in_a_sound_stream_are_noticed(mode, is_interlaced):
    picture = Image.fromarray(FILM.astype(np.uint16) * 99 if mode == "I;16" else FILM)
    data = _png_of(picture if mode == "I;16" else picture.convert(mode), is_interlaced)
    assert one_film(data).pixels.shape == FILM.shape
    bits = {"RGB": 24, "RGBA": 32, "LA": 16, "P": 8, "1": 1, "I;16": 16}[mode]
    row = 1 + (FILM.shape[1] * bits + 7) // 8
    # Pillow does not notice if whole rows are missing.
    for count in (3 * row, 3 * row + 2):
        with pytest.raises(ImageError) as error:
            one_film(_without_last_bytes(data, count))
        assert error.value.code is ErrorCode.TRUNCATED
    # Bytes after the last row are not part of the film.
    assert one_film(_without_last_bytes(data, -100)).pixels.shape == FILM.shape


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("is_interlaced", [False, True])
def test_a_byte_is_missed_whatever_the_size(bits, is_interlaced):
    """The smallest films lack some of the seven passes, or have passes of one pixel."""
    for height, width in np.ndindex(10, 10):
        grid = np.zeros((height + 1, width + 1), np.uint8)
        passes = [grid[y::down, x::across] for x, y, across, down in ADAM7]
        rows = b"".join(
            bytes(1 + -(-len(row) * bits // 8))
            for each in (passes if is_interlaced else [grid])
            for row in (each if each.shape[1] else [])
        )
        header = (width + 1).to_bytes(4, "big") + (height + 1).to_bytes(4, "big")
        header += bytes([bits, 0, 0, 0, is_interlaced])
        start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
        check_rows(start + chunk(b"IDAT", zlib.compress(rows)))
        with pytest.raises(ImageError):
            check_rows(start + chunk(b"IDAT", zlib.compress(rows[:-1])))


def test_exif_turns_a_film_of_16_bits_in_colour():
    exif = chunk(b"eXIf", Image.Exif().tobytes()[6:])
    assert one_film(deep(GREY_RGB, exif)).pixels.shape == (120, 130)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter
    found = one_film(deep(GREY_RGB, chunk(b"eXIf", turned.tobytes()[6:])))
    np.testing.assert_array_equal(found.pixels, np.rot90(one_film(deep(GREY_RGB)).pixels, -1))


def test_damage_in_16_bits_in_colour_has_its_code():
    data = deep(GREY_RGB)
    for length in (20, 60, len(data) // 2, len(data) - 30):
        assert code_of(data[:length]) is ErrorCode.TRUNCATED
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    assert code_of(bytes(flipped)) is ErrorCode.CORRUPT_IMAGE
    assert code_of(deep(GREY_RGB, rows=60)) is ErrorCode.TRUNCATED
    giant = data[:12] + b"IHDR" + (50_000).to_bytes(4, "big") * 2 + data[24:29]
    giant += zlib.crc32(giant[12:29]).to_bytes(4, "big") + data[33:]
    assert code_of(giant) is ErrorCode.TOO_LARGE


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_a_png_cut_anywhere_is_never_a_film_with_missing_rows(seed, share):
    film = np.random.default_rng(seed).integers(0, 256, (50, 40), np.uint8)
    data = encoded(film)
    try:
        found = one_film(data[: int(share * len(data))])
    except ImageError:
        return
    np.testing.assert_array_equal(found.pixels, film)
