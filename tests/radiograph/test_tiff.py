"""TIFF: grey of every depth and signedness, and which of its pages are films."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from lungopacity.errors import ErrorCode, ImageError
from lungopacity.radiograph import DecodeLimits, decode_radiographs
from tests.films import encoded, grey_film, one_film, tiff_of_pages
from tests.radiograph.dicom_files import code_of

FILM = grey_film(height=64, width=64)
SIXTEEN = (FILM.astype(np.uint16) * 257).astype(np.uint16)
STRETCHED = np.rint((FILM - FILM.min()) * (255.0 / (FILM.max() - FILM.min())))


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        pytest.param(FILM.astype(np.uint32) << 24, STRETCHED, id="32 bits, unsigned"),
        pytest.param((FILM.astype(np.int32) - 128) << 24, STRETCHED, id="32 bits, signed"),
        pytest.param((FILM.astype(np.int16) - 128) << 8, STRETCHED, id="16 bits, signed"),
        pytest.param((FILM.astype(np.int16) - 128).astype(np.int8), FILM, id="8 bits, signed"),
    ],
)
def test_signed_and_unsigned_values_keep_their_order(stored, expected):
    found = one_film(imagecodecs.tiff_encode(stored))
    assert np.abs(found.pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_a_white_is_zero_tiff_is_inverted_to_black_is_zero(bits):
    """Pillow inverts 8 bits, and passes on 16 bits as they are."""
    values = FILM if bits == 8 else SIXTEEN
    inverse = (2**bits - 1 - values).astype(values.dtype)
    data = bytearray(encoded(inverse, "TIFF"))
    # Tag 262, SHORT, one value: 1 (black is zero) becomes 0.
    entry = b"\x06\x01\x03\x00\x01\x00\x00\x00"
    at = data.index(entry) + len(entry)
    assert data[at] == 1
    data[at] = 0
    expected = FILM if bits == 8 else STRETCHED
    assert np.abs(one_film(bytes(data)).pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_a_digitised_film_of_any_depth_is_read(bits, byteorder, photometric):
    values = np.linspace(0, 2**bits - 1, FILM.size).round().astype(np.uint16).reshape(FILM.shape)
    stored = 2**bits - 1 - values if photometric == "miniswhite" else values
    data = tiff_of(stored.astype(np.uint16), bits, byteorder, photometric)
    found = one_film(data)
    assert (found.format, found.rows, found.columns) == ("tiff", *FILM.shape)
    assert np.abs(found.pixels - values * (255 / (2**bits - 1))).max() <= 1


def tiff_of(values: np.ndarray, bits: int, order: str, photometric: str, at: int = 0) -> bytes:
    """A TIFF of one page: its tags, then its rows packed to `bits`. `at`: where it will stand."""
    rows, columns = values.shape
    unpacked = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(rows, columns, 2), axis=2)
    packed = np.packbits(unpacked[:, :, 16 - bits :].reshape(rows, -1), axis=1).tobytes()
    body = values.astype(f"{order}u2").tobytes() if bits == 16 else packed
    shorts = {256: columns, 257: rows, 258: bits, 259: 1, 262: int(photometric == "minisblack")}
    longs = {273: at + 8 + 2 + 9 * 12 + 4, 279: len(body)}
    shorts |= {277: 1, 278: rows}
    entries = b"".join(
        struct.pack(f"{order}HHIHH", tag, 3, 1, shorts[tag], 0)
        if tag in shorts
        else struct.pack(f"{order}HHII", tag, 4, 1, longs[tag])
        for tag in sorted(shorts | longs)
    )
    begin = b"II*\x00" if order == "<" else b"MM\x00*"
    return begin + struct.pack(f"{order}IH", 8, 9) + entries + bytes(4) + body


def test_pages_that_lead_back_to_the_first_are_read_once():
    data = tiff_of(FILM, 8, "<", "minisblack")
    following = 8 + 2 + 9 * 12
    circle = data[:following] + struct.pack("<I", 8) + data[following + 4 :]
    np.testing.assert_array_equal(one_film(circle).pixels, FILM)


def test_a_page_that_pillow_does_not_know_is_read_among_others():
    """As of a scanner that puts a preview first."""
    preview = tiff_of(FILM, 8, "<", "minisblack")
    deep = SIXTEEN >> 4
    following = 8 + 2 + 9 * 12
    linked = preview[:following] + struct.pack("<I", len(preview) + 8) + preview[following + 4 :]
    data = linked + tiff_of(4095 - deep, 12, "<", "miniswhite", at=len(preview))
    first, second = decode_radiographs(data, limits=DecodeLimits())
    np.testing.assert_array_equal(first.pixels, FILM)
    assert np.abs(second.pixels - STRETCHED).max() <= 1


def test_a_digitised_film_of_12_bits_is_turned():
    data = tiff_of(SIXTEEN >> 4, 12, "<", "miniswhite")
    samples, turned = (
        struct.pack("<HHIHH", tag, 3, 1, said, 0) for tag, said in ((277, 1), (274, 6))
    )
    assert samples in data
    found = one_film(data.replace(samples, turned)).pixels
    np.testing.assert_array_equal(found, np.rot90(one_film(data).pixels, -1))


def test_a_digitised_film_that_is_cut_is_an_error():
    data = tiff_of(SIXTEEN >> 4, 12, ">", "miniswhite")
    assert code_of(data[:-500]) is ErrorCode.CORRUPT_IMAGE
    assert code_of(tiff_of(SIXTEEN >> 10, 6, ">", "miniswhite")) is ErrorCode.UNSUPPORTED


def test_a_size_that_no_column_can_hold_is_left_out_of_the_facts():
    data = tiff_of(SIXTEEN >> 4, 12, ">", "miniswhite")
    rows = struct.pack(">HHIHH", 257, 3, 1, 64, 0)
    assert rows in data
    with pytest.raises(ImageError) as caught:
        one_film(data.replace(rows, struct.pack(">HHII", 257, 4, 1, 2**31)))
    assert caught.value.code is ErrorCode.TOO_LARGE
    assert "rows" not in caught.value.facts
    assert caught.value.facts["columns"] == 64


@pytest.mark.parametrize("big", [False, True])
def test_every_page_of_a_tiff_is_a_film(big):
    pages = [grey_film(seed, 64, 64) for seed in range(3)]
    data = tiff_of_pages(pages, big_tiff=big)
    found = list(decode_radiographs(data, limits=DecodeLimits()))
    assert code_of(data, DecodeLimits(max_frames=2)) is ErrorCode.TOO_LARGE
    last = data.index(pages[2].tobytes()[:64])
    assert code_of(data[: last - 30]) is ErrorCode.TRUNCATED
    assert [film.frame for film in found] == [0, 1, 2]
    for film, page in zip(found, pages, strict=True):
        np.testing.assert_array_equal(film.pixels, page)


def test_a_damaged_page_does_not_cost_the_others():
    pages = [grey_film(seed, 64, 64) for seed in range(3)]
    data = tiff_of_pages(pages, compression="tiff_adobe_deflate")
    with Image.open(io.BytesIO(data)) as image:
        image.seek(1)
        strip = image.tag_v2[273][0]
    damaged = data[:strip] + bytes(100) + data[strip + 100 :]
    first, lost, last = decode_radiographs(damaged, limits=DecodeLimits())
    np.testing.assert_array_equal(first.pixels, pages[0])
    np.testing.assert_array_equal(last.pixels, pages[2])
    assert (lost.code, lost.facts["frame"]) == (ErrorCode.CORRUPT_IMAGE, 1)


def test_pages_that_together_are_a_bomb_end_the_file():
    """Each is within the limit: 1.1 megapixels, plus 200 pixels for each of 6,000 bytes."""
    data = tiff_of_pages([np.zeros((500, 2000), np.uint8)] * 4, compression="tiff_adobe_deflate")
    *films, refused = decode_radiographs(data, limits=DecodeLimits(max_megapixels=1.1))
    assert [film.frame for film in films] == [0, 1]
    assert (refused.code, refused.facts["frame"]) == (ErrorCode.DECOMPRESSION_BOMB, 2)


def pages_of(*kinds: int, big: bool = False) -> bytes:
    """Pages with these bits of NewSubfileType, each as bright as its index says."""
    data = None
    for place, kind in enumerate(kinds):
        film = np.full((20, 30), place, np.uint8)
        data = imagecodecs.tiff_encode(film, subfiletype=kind, appendto=data, bigtiff=big)
    return data


REDUCED, OF_SEVERAL, MASK = 1, 2, 4


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    ("kinds", "films"),
    [
        pytest.param((0, REDUCED, MASK), [0], id="a film, its thumbnail and its mask"),
        pytest.param((REDUCED, OF_SEVERAL, OF_SEVERAL | REDUCED, OF_SEVERAL), [1, 3], id="two"),
        pytest.param((REDUCED, MASK), [0, 1], id="nothing else"),
    ],
)
def test_copies_and_masks_of_other_pages_are_left_out(kinds, films, big):
    found = list(decode_radiographs(pages_of(*kinds, big=big), limits=DecodeLimits()))
    assert [film.pixels[0, 0] for film in found] == films
    assert [film.frame for film in found] == (list(range(len(films))) if films[1:] else [None])


def test_grey_that_is_premultiplied_by_its_alpha_is_read():
    both = np.dstack([FILM, np.full_like(FILM, 255)])
    data = imagecodecs.tiff_encode(both, photometric="minisblack", extrasample="assocalpha")
    np.testing.assert_array_equal(one_film(data).pixels, FILM)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_not_a_finite_number_is_corrupt(value):
    film = FILM.astype(np.float32)
    film[3, 4] = value
    with pytest.raises(ImageError, match="not finite numbers") as caught:
        one_film(encoded(film, "TIFF"))
    assert caught.value.code is ErrorCode.CORRUPT_IMAGE


@pytest.mark.parametrize("film", [FILM, SIXTEEN])
def test_a_bigtiff_is_read_like_any_tiff(film):
    data = encoded(film, "TIFF", big_tiff=True)
    assert data[:4] == b"II+\x00"
    found = one_film(data)
    assert found.format == "tiff"
    np.testing.assert_array_equal(found.pixels, one_film(encoded(film, "TIFF")).pixels)


@pytest.mark.parametrize("start", [b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0"])
@pytest.mark.parametrize("rest", [b"", bytes(4), bytes(9000)])
def test_a_tiff_without_a_page_is_truncated(start, rest):
    assert code_of(start + rest) is ErrorCode.TRUNCATED


def test_colours_and_codings_that_pillow_does_not_know_are_unsupported():
    lab = io.BytesIO()
    Image.new("LAB", (64, 64), (128, 128, 128)).save(lab, "TIFF")
    # Tag 259, SHORT, one value: the compression.
    entry = b"\x03\x01\x03\x00\x01\x00\x00\x00"
    deflate = encoded(FILM, "TIFF", compression="tiff_adobe_deflate")
    assert deflate.count(entry + b"\x08\x00") == 1
    webp = deflate.replace(entry + b"\x08\x00", entry + (50001).to_bytes(2, "little"))
    for data, what in ((lab.getvalue(), r"L\*a\*b\*"), (webp, "WebP")):
        with pytest.raises(ImageError, match=f"{what}.*; convert it to") as caught:
            one_film(data)
        assert caught.value.code is ErrorCode.UNSUPPORTED


def test_a_big_endian_bigtiff_is_unsupported_and_not_corrupt():
    with pytest.raises(ImageError, match="big-endian") as caught:
        one_film(b"MM\x00+\x00\x08\x00\x00" + bytes(100))
    assert caught.value.code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize("parts", [{"rowsperstrip": 16}, {"tile": (32, 32)}, "of Pillow"], ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_damage_in_a_jpeg_compressed_tiff_is_noticed(mode, parts):
    """libtiff fills lost pixels with grey: a film with a false opacity."""
    film = np.asarray(Image.fromarray(FILM).convert(mode))
    data = (
        encoded(film, "TIFF", compression="jpeg")  # with tables that its strips share
        if parts == "of Pillow"
        else imagecodecs.tiff_encode(film, compression="jpeg", **parts)
    )
    assert np.abs(one_film(data).pixels.astype(int) - FILM).max() <= 8
    for begin, size in places_of_parts(data):
        middle = begin + size // 2
        damaged = data[:middle] + b"\xff\xd9" * 8 + data[middle + 16 :]
        assert code_of(damaged) in (ErrorCode.CORRUPT_IMAGE, ErrorCode.TRUNCATED)


@pytest.mark.parametrize("parts", [{}, {"tile": (32, 32)}], ids=str)
def test_damage_in_a_deflate_compressed_tiff_is_noticed(parts):
    """libtiff checks the checksum of some parts, but not of others."""
    noise = np.random.default_rng(0).integers(-20, 21, (256, 256))
    film = np.clip(grey_film(height=256, width=256) + noise, 0, 255).astype(np.uint8)
    data = imagecodecs.tiff_encode(film, compression="deflate", **parts)
    np.testing.assert_array_equal(one_film(data).pixels, film)
    for begin, size in list(places_of_parts(data))[::7]:
        for at in np.linspace(begin + 2, begin + size - 5, 20).astype(int):
            damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            assert code_of(damaged) in (ErrorCode.CORRUPT_IMAGE, ErrorCode.TRUNCATED)


def places_of_parts(data: bytes) -> Iterator[tuple[int, int]]:
    """Offset and size in bytes of each strip or tile."""
    tags = Image.open(io.BytesIO(data)).tag_v2
    begins, sizes = (324, 325) if 324 in tags else (273, 279)
    return zip(tags[begins], tags[sizes], strict=True)
