import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from pydicom.uid import JPEGBaseline8Bit

from lungopacity.errors import ErrorCode, ImageError
from lungopacity.radiograph import SYNTHETIC_MARK, DecodeLimits, decode_radiographs
from tests.films import dicom, encoded, grey_film, one_film
from tests.radiograph.dicom_files import of_codestreams

LIMITS = DecodeLimits()


def code_of(data: bytes, limits: DecodeLimits = LIMITS) -> ErrorCode:
    with pytest.raises(ImageError) as caught:
        one_film(data, limits)
    return caught.value.code


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "BMP", "JPEG2000"])
def test_lossless_formats_give_back_the_grey_values(image_format):
    film = grey_film()
    found = one_film(encoded(film, image_format))
    assert found.format == image_format.lower()
    assert (found.rows, found.columns) == film.shape
    np.testing.assert_array_equal(found.pixels, film)


def test_the_format_is_told_by_content():
    film = grey_film(height=64, width=64)
    found = one_film(encoded(film, "JPEG", quality=95))
    assert found.format == "jpeg"
    assert np.abs(found.pixels.astype(int) - film).mean() < 3


def palette(film: np.ndarray) -> Image.Image:
    shuffled = np.random.default_rng(0).permutation(256).astype(np.uint8)
    image = Image.fromarray(np.argsort(shuffled).astype(np.uint8)[film]).convert("P")
    image.putpalette(np.repeat(shuffled, 3).tobytes())
    return image


def saved(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


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
    if named_by == "components":
        at = data.index(b"\xff\xee")
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    whole = one_film(data).pixels
    assert np.abs(whole.astype(int) - np.asarray(Image.fromarray(tinted).convert("L"))).max() <= 8
    shrunk = one_film(data, at_least=160)
    assert shrunk.pixels.shape == (160, 120)
    expected = np.asarray(Image.fromarray(whole).resize((120, 160), Image.Resampling.BOX))
    assert np.abs(shrunk.pixels.astype(int) - expected).max() <= 8
    assert shrunk.coloured_fraction == one_film(encoded(tinted, "JPEG")).coloured_fraction


@pytest.mark.parametrize("bits", [8, 16])
def test_a_white_is_zero_tiff_is_not_read_inverted(bits):
    """Pillow inverts those of 8 bits and passes those of 16 on as they are."""
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


def tiff_of(values: np.ndarray, bits: int, order: str, photometric: str) -> bytes:
    """One page; its rows, packed to `bits`, behind its tags."""
    rows, columns = values.shape
    unpacked = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(rows, columns, 2), axis=2)
    packed = np.packbits(unpacked[:, :, 16 - bits :].reshape(rows, -1), axis=1).tobytes()
    body = values.astype(f"{order}u2").tobytes() if bits == 16 else packed
    shorts = {256: columns, 257: rows, 258: bits, 259: 1, 262: int(photometric == "minisblack")}
    longs = {273: 8 + 2 + 9 * 12 + 4, 279: len(body)}
    shorts |= {277: 1, 278: rows}
    entries = b"".join(
        struct.pack(f"{order}HHIHH", tag, 3, 1, shorts[tag], 0)
        if tag in shorts
        else struct.pack(f"{order}HHII", tag, 4, 1, longs[tag])
        for tag in sorted(shorts | longs)
    )
    begin = b"II*\x00" if order == "<" else b"MM\x00*"
    return begin + struct.pack(f"{order}IH", 8, 9) + entries + bytes(4) + body


def test_a_digitised_film_that_is_cut_is_none():
    data = tiff_of(SIXTEEN >> 4, 12, ">", "miniswhite")
    assert code_of(data[:-500]) is ErrorCode.CORRUPT_IMAGE
    assert code_of(tiff_of(SIXTEEN >> 10, 6, ">", "miniswhite")) is ErrorCode.UNSUPPORTED
    with pytest.raises(ImageError) as caught:
        one_film(data, DecodeLimits(max_megapixels=0.001))
    assert (caught.value.code, "rows" in caught.value.facts) == (ErrorCode.TOO_LARGE, False)


@pytest.mark.parametrize("big", [False, True])
def test_every_page_of_a_tiff_is_a_film(big):
    pages = [Image.fromarray(grey_film(seed, 64, 64)) for seed in range(3)]
    data = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:], big_tiff=big)
    found = list(decode_radiographs(data, limits=LIMITS))
    assert code_of(data, DecodeLimits(max_frames=2)) is ErrorCode.TOO_LARGE
    last = data.index(np.asarray(pages[2]).tobytes()[:64])
    assert code_of(data[: last - 30]) is ErrorCode.TRUNCATED
    assert [film.frame for film in found] == [0, 1, 2]
    for film, page in zip(found, pages, strict=True):
        np.testing.assert_array_equal(film.pixels, np.asarray(page))


@pytest.mark.parametrize("film", [FILM, SIXTEEN])
def test_a_bigtiff_is_read_like_any_tiff(film):
    data = encoded(film, "TIFF", big_tiff=True)
    assert data[:4] == b"II+\x00"
    found = one_film(data)
    assert found.format == "tiff"
    np.testing.assert_array_equal(found.pixels, one_film(encoded(film, "TIFF")).pixels)


def test_a_jpeg_of_12_bits_is_unsupported_and_not_corrupt():
    data = imagecodecs.jpeg8_encode(SIXTEEN >> 4, level=95, bitspersample=12)
    assert code_of(data) is ErrorCode.UNSUPPORTED


def test_a_big_endian_bigtiff_is_unsupported_and_not_corrupt():
    with pytest.raises(ImageError, match="big-endian") as caught:
        one_film(b"MM\x00+\x00\x08\x00\x00" + bytes(100))
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_colour_is_measured_and_grey_in_three_channels_is_none():
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


def test_exif_orientation_is_applied():
    film = grey_film(height=60, width=40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    found = one_film(encoded(film, "JPEG", quality=98, exif=exif)).pixels
    assert found.shape == (40, 60)
    assert np.abs(found.astype(int) - np.rot90(film, -1)).max() <= 8


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_orientation_that_xmp_alone_names_is_applied(mode):
    film = grey_film(height=60, width=40)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    found = one_film(saved(Image.fromarray(film).convert(mode), "JPEG", quality=98, xmp=xmp)).pixels
    assert found.shape == (40, 60)
    assert np.abs(found.astype(int) - np.rot90(film, -1)).max() <= 8


def test_damaged_exif_does_not_cost_the_film():
    data = encoded(FILM, "PNG", exif=b"MM\x00*\x00\x00\x00\x08")
    at = data.index(b"eXIf")
    damaged = b"eXIf" + b"garbage!"
    data = data[:at] + damaged + zlib.crc32(damaged).to_bytes(4, "big") + data[at + 16 :]
    np.testing.assert_array_equal(one_film(data).pixels, FILM)


def test_a_large_jpeg_is_decoded_no_larger_than_needed():
    found = one_film(encoded(grey_film(height=1600, width=1200), "JPEG"), at_least=200)
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
def test_a_flipped_bit_that_libjpeg_notices_gives_no_film(options, as_dicom):
    """Its most common words for a scan that lost its step are `extraneous bytes before marker`."""
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


def test_bytes_too_many_in_the_header_of_a_jpeg_do_not_cost_the_film():
    data = encoded(FILM, "JPEG", quality=98)
    at = data.index(b"\xff\xc4")
    found = one_film(data[:at] + b"\x00\x00" + data[at:]).pixels
    np.testing.assert_array_equal(found, one_film(data).pixels)


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
def test_whatever_the_bytes_nothing_but_a_coded_error_comes_out(kind, cut, flips):
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


def test_the_fast_way_to_jpeg_pixels_is_pillows(monkeypatch):
    data = encoded(FILM, "JPEG", quality=90, comment="a comment")
    fast = one_film(data)
    monkeypatch.setattr("lungopacity.radiograph.decode.read_header", lambda _: None)
    slow = one_film(data)
    np.testing.assert_array_equal(fast.pixels, slow.pixels)
    assert dict(fast.facts()) == dict(slow.facts())


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
