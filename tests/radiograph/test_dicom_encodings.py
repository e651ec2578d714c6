"""One film in every encoding, and frame by frame."""

import io
from functools import partial

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames, get_frame
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from lungopacity.errors import ErrorCode, ImageError
from lungopacity.radiograph import ACCEPTABLE, DecodeLimits, decode_radiographs
from tests.films import dicom, encoded, one_film
from tests.radiograph.dicom_files import (
    EIGHT_BITS,
    RAMP,
    TWELVE_BITS,
    changed,
    code_of,
    coded,
    compressed,
    in_syntax,
    of_codestreams,
    shipped,
    without,
    without_meta,
    without_preamble,
)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(compressed(RLELossless), id="rle"),
        pytest.param(coded(JPEGLSLossless), id="jpeg-ls"),
        pytest.param(compressed(JPEG2000Lossless), id="jpeg-2000"),
        pytest.param(coded(JPEGLosslessSV1), id="jpeg-lossless-sv1"),
        pytest.param(coded(JPEGLossless), id="jpeg-lossless"),
        pytest.param(coded(HTJ2KLossless), id="htj2k-lossless"),
        pytest.param(coded(HTJ2KLosslessRPCL), id="htj2k-rpcl"),
        pytest.param(coded(HTJ2K), id="htj2k"),
        pytest.param(in_syntax(ImplicitVRLittleEndian), id="implicit"),
        pytest.param(in_syntax(ExplicitVRBigEndian), id="big-endian"),
        pytest.param(in_syntax(DeflatedExplicitVRLittleEndian), id="deflated"),
        pytest.param(without_preamble(dicom(RAMP)), id="no-preamble"),
        pytest.param(without_meta(ImplicitVRLittleEndian), id="no-meta"),
    ],
)
def test_every_encoding_of_a_film_gives_the_same_pixels(data):
    np.testing.assert_array_equal(one_film(data).pixels, one_film(dicom(RAMP)).pixels)


def test_a_lossy_encoding_of_more_than_8_bits_gives_nearly_the_same_pixels():
    found = one_film(coded(JPEGExtended12Bit)).pixels
    assert np.abs(found.astype(int) - one_film(dicom(RAMP)).pixels).max() <= 2


@pytest.mark.parametrize(
    ("syntax", "code"),
    [
        (JPEGExtended12Bit, ErrorCode.CORRUPT_IMAGE),
        (JPEGLossless, ErrorCode.CORRUPT_IMAGE),
        (JPEGLosslessSV1, ErrorCode.CORRUPT_IMAGE),
        (HTJ2KLossless, ErrorCode.TRUNCATED),
        (HTJ2K, ErrorCode.TRUNCATED),
    ],
)
def test_a_cut_frame_is_an_error(syntax, code):
    (frame,) = generate_frames(
        pydicom.dcmread(io.BytesIO(coded(syntax))).PixelData, number_of_frames=1
    )
    for share in (0.3, 0.6, 0.9):
        cut = frame[: int(share * len(frame))]
        assert code_of(of_codestreams([cut], syntax, RAMP.shape, **TWELVE_BITS)) is code


def test_a_box_of_zero_length_does_not_hang_the_decoder():
    data = shipped("GDCMJ2K_TextGBR.dcm")
    header = data.index(b"jp2h")  # of the box behind the signature and the type of the file
    assert len(one_film(data, accept=ACCEPTABLE).pixels)
    changed = data[: header - 4] + bytes(4) + data[header:]
    with pytest.raises(ImageError, match="a box of zero length"):
        one_film(changed, accept=ACCEPTABLE)


LOSSY_12_BIT = ("JPEG-lossy.dcm", "JPGExtended.dcm")


@pytest.mark.parametrize(
    "name",
    """693_J2KI.dcm CT_small.dcm J2K_pixelrep_mismatch.dcm JPEG2000.dcm JPEGLSNearLossless_08.dcm
    JPEGLSNearLossless_16.dcm MR_small.dcm MR_small_RLE.dcm MR_small_bigendian.dcm
    MR_small_expb.dcm MR_small_implicit.dcm MR_small_jp2klossless.dcm MR_small_jpeg_ls_lossless.dcm
    MR_small_padded.dcm examples_overlay.dcm image_dfl.dcm liver_1frame.dcm
    rtdose_1frame.dcm rtdose_rle_1frame.dcm""".split(),
)
def test_pydicoms_own_grey_files_give_what_pydicoms_own_functions_give(name):
    data = shipped(name)
    dataset = pydicom.dcmread(io.BytesIO(data))
    seen = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    seen = seen.astype(np.float64)
    found = one_film(data, accept=ACCEPTABLE).pixels
    assert found.shape == seen.shape
    # Whatever is black and white, each step of grey is the same share of the range.
    order = np.argsort(seen, axis=None)
    assert np.all(np.diff(found.ravel()[order].astype(int)) >= 0)
    inside = (found > 0) & (found < 255)  # values far from the rest are clipped
    if inside.mean() > 0.1 and np.ptp(seen[inside]):
        spread = np.polyfit(seen[inside], found[inside], 1)
        assert np.abs(np.polyval(spread, seen) - found)[inside].max() <= 2


@pytest.mark.parametrize("name", LOSSY_12_BIT)
def test_jpeg_extended_of_12_bits_is_read(name):
    # Two values from pydicom's own tests of this image, in a window of its range, 0 to 264.
    window = {"WindowCenter": 132.5, "WindowWidth": 265}
    film = one_film(
        changed(
            shipped(name), lambda dataset: [setattr(dataset, *item) for item in window.items()]
        ),
        accept=ACCEPTABLE,
    )
    assert film.pixels.shape == (1024, 256)
    assert film.pixels[420, 140] == round(244 * 255 / 264)
    assert film.pixels[230, 120] == round(95 * 255 / 264)


@pytest.mark.parametrize(
    "name",
    """SC_rgb_dcmtk_+eb+cr.dcm SC_rgb_gdcm_KY.dcm SC_rgb_jls_lossy_line.dcm SC_rgb_jpeg.dcm
    SC_rgb_jpeg_dcmtk.dcm SC_rgb_jpeg_gdcm.dcm SC_rgb_rle.dcm
    SC_ybr_full_422_uncompressed.dcm""".split(),
)
def test_colour_captures_become_their_luminance(name):
    data = shipped(name)
    rgb = pydicom.dcmread(io.BytesIO(data)).pixel_array
    found = one_film(data, accept=ACCEPTABLE)
    np.testing.assert_array_equal(found.pixels, np.asarray(Image.fromarray(rgb).convert("L")))


COLOUR = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}


def test_a_film_of_12_bits_in_colour_is_stretched_as_a_grey_one():
    film = (RAMP // 8 + 100).astype(np.uint16)
    sixteen = {"BitsStored": 16, "HighBit": 15, "PlanarConfiguration": 0}
    rgb = np.stack([film] * 3, axis=-1)
    found = one_film(dicom(film, **COLOUR, **sixteen, PixelData=rgb.tobytes()))
    np.testing.assert_array_equal(found.pixels, one_film(dicom(film)).pixels)
    assert found.coloured_fraction == 0


def test_colours_of_8_bits_in_16_bit_words_are_decoded_as_8_bits():
    film = (RAMP // 64 + 100).astype(np.uint16)
    words = np.stack([film] * 3, axis=-1)
    elements = {"BitsStored": 8, "HighBit": 7, "PlanarConfiguration": 0}
    found = one_film(dicom(film, **COLOUR, **elements, PixelData=words.tobytes()))
    np.testing.assert_array_equal(found.pixels, film)


def test_compressed_colours_need_no_planar_configuration():
    rgb = np.stack([RAMP // 16] * 3, axis=-1).astype(np.uint8)
    codestream = encoded(rgb, "JPEG", quality=98)
    elements = COLOUR | {"PhotometricInterpretation": "YBR_FULL_422"}
    data = of_codestreams([codestream], JPEGBaseline8Bit, RAMP.shape, **elements)
    assert np.abs(one_film(data).pixels.astype(int) - rgb[..., 0]).max() <= 4


ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL_422"])
@pytest.mark.parametrize(
    ("marker", "options"),
    [
        pytest.param(b"", {"subsampling": 2}, id="subsampled"),
        pytest.param(ADOBE + b"\1", {"subsampling": 0}, id="adobe-ycc"),
        pytest.param(ADOBE + b"\0", {"keep_rgb": True}, id="adobe-rgb"),
    ],
)
def test_a_jpeg_that_tells_its_colours_is_believed(photometric, marker, options):
    jpeg = encoded(RGB, "JPEG", quality=98, **options)
    first = 4 + int.from_bytes(jpeg[4:6], "big")  # in place of Pillow's own marker
    frame = jpeg[:2] + marker + jpeg[first:]
    # As from other writers, whose components are not called R, G and B.
    at, scan = frame.index(b"\xff\xc0"), frame.index(b"\xff\xda")
    numbered = bytearray(frame)
    numbered[at + 10 : at + 19 : 3] = numbered[scan + 5 : scan + 11 : 2] = b"\1\2\3"
    elements = COLOUR | {"PhotometricInterpretation": photometric}
    found = one_film(of_codestreams([bytes(numbered)], JPEGBaseline8Bit, RAMP.shape, **elements))
    assert np.abs(found.pixels.astype(int) - RGB[..., 0]).max() <= 4
    assert found.photometric_interpretation == photometric, "as in the header"


RGB = np.repeat((RAMP // 16).astype(np.uint8)[..., None], 3, axis=-1)
ENCODERS = {
    JPEGBaseline8Bit: imagecodecs.jpeg8_encode,
    JPEGLosslessSV1: partial(imagecodecs.jpeg8_encode, lossless=True, predictor=1),
    JPEGLSLossless: imagecodecs.jpegls_encode,
    JPEG2000Lossless: partial(imagecodecs.jpeg2k_encode, level=0, codecformat="j2k"),
    HTJ2KLossless: partial(imagecodecs.htj2k_encode, reversible=True),
}


@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda syntax: syntax.name)
def test_samples_of_a_colour_are_never_taken_for_pixels_of_grey(syntax):
    """Decoders showed them as a picture, or ended the process."""
    colour, grey = (ENCODERS[syntax](np.ascontiguousarray(film)) for film in (RGB, RGB[..., 0]))
    planar = COLOUR | {"PlanarConfiguration": 0}
    for frame, elements in ((colour, {}), (grey, planar)):
        data = of_codestreams([frame], syntax, RAMP.shape, **elements)
        with pytest.raises(ImageError, match="contradicts the header") as caught:
            one_film(data)
        assert caught.value.code is ErrorCode.CORRUPT_IMAGE
    for frame, elements in ((grey, {}), (colour, planar)):
        found = one_film(of_codestreams([frame], syntax, RAMP.shape, **elements)).pixels
        assert np.abs(found.astype(int) - RGB[..., 0]).max() <= 4


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless])
def test_the_lower_8_of_16_bits_are_not_taken_for_the_film(syntax):
    assert code_of(of_codestreams([ENCODERS[syntax](RAMP)], syntax, RAMP.shape)) is (
        ErrorCode.CORRUPT_IMAGE
    )


@pytest.mark.parametrize("photometric", ["YBR_PARTIAL_422", "HSV", "CMYK"])
def test_colours_that_no_decoder_converts_to_rgb_are_unsupported(photometric):
    jpeg = encoded(RGB, "JPEG", quality=98)
    elements = COLOUR | {"PhotometricInterpretation": photometric}
    with pytest.raises(ImageError, match=f"colours in {photometric}") as caught:
        one_film(of_codestreams([jpeg], JPEGBaseline8Bit, RAMP.shape, **elements))
    assert caught.value.code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "PALETTE COLOR"])
def test_three_samples_are_not_taken_for_red_green_and_blue_of_another_kind(photometric):
    """A film of MONOCHROME1 would be scored as its own negative."""
    told = COLOUR | EIGHT_BITS | {"PhotometricInterpretation": photometric}
    data = dicom(RGB[..., 0], **told, PlanarConfiguration=0, PixelData=RGB.tobytes())
    with pytest.raises(ImageError, match="three samples a pixel") as caught:
        one_film(data)
    assert caught.value.code is ErrorCode.CORRUPT_IMAGE


@pytest.mark.parametrize("columns", [59, 60])
def test_subsampled_colours_need_an_even_number_of_columns(columns):
    luma = RGB[:, :columns, 0]
    pairs = np.pad(luma, ((0, 0), (0, columns % 2))).reshape(len(luma), -1, 2)
    written = np.dstack([pairs, np.full_like(pairs, 128)])  # Y, Y, blue, red
    elements = COLOUR | EIGHT_BITS | {"PhotometricInterpretation": "YBR_FULL_422"}
    data = dicom(luma, **elements, PlanarConfiguration=0, PixelData=written.tobytes())
    if columns % 2:
        assert code_of(data) is ErrorCode.CORRUPT_IMAGE
    else:
        np.testing.assert_array_equal(one_film(data).pixels, luma)


def test_a_palette_is_applied():
    found = one_film(shipped("examples_palette.dcm"), accept=ACCEPTABLE)
    assert found.pixels.shape == (350, 800)
    assert found.coloured_fraction > 0.1


def test_every_frame_is_a_radiograph_of_its_own():
    frames = np.stack([RAMP, RAMP[::-1], RAMP // 2])
    data = dicom(RAMP, NumberOfFrames=3, PixelData=frames.astype("<u2").tobytes())
    found = list(decode_radiographs(data, limits=DecodeLimits()))
    assert [film.frame for film in found] == [0, 1, 2]
    for film, frame in zip(found, frames, strict=True):
        np.testing.assert_array_equal(film.pixels, one_film(dicom(frame)).pixels)


def test_a_single_frame_has_no_frame_index():
    assert one_film(dicom(RAMP, NumberOfFrames=1)).frame is None


def test_missing_frames_give_one_error_together():
    data = dicom(RAMP, NumberOfFrames=1000, PixelData=np.stack([RAMP] * 3).tobytes())
    found = list(decode_radiographs(data, limits=DecodeLimits()))
    assert [isinstance(film, ImageError) for film in found] == [False, False, False, True]
    assert found[-1].code is ErrorCode.TRUNCATED
    assert found[-1].facts["frame"] == 3


FRAMES = [(RAMP // 16).astype(np.uint8)[::step] for step in (1, -1, 2)]
FRAMES[2] = np.repeat(FRAMES[2], 2, axis=0)


def cine(syntax, declared: int = 3, cut: int | None = None, has_offsets: bool = True) -> bytes:
    """FRAMES, each as its own codestream, with only the first half of the one at `cut`."""

    def codestream(frame):
        if syntax == JPEGBaseline8Bit:
            return encoded(frame, "JPEG", quality=98)
        return ENCODERS[syntax](np.ascontiguousarray(frame))

    frames = [codestream(frame) for frame in FRAMES]
    if cut is not None:
        frames[cut] = frames[cut][: len(frames[cut]) // 2]
    return of_codestreams(frames, syntax, RAMP.shape, has_offsets, NumberOfFrames=declared)


@pytest.mark.parametrize("declared", [3, 9])
@pytest.mark.parametrize("has_offsets", [True, False])
@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGLSLossless, JPEG2000Lossless])
def test_a_cut_compressed_frame_does_not_cost_the_frames_after_it(syntax, has_offsets, declared):
    """Not even if frames are missing, too. These give one error together."""
    data = cine(syntax, declared, cut=1, has_offsets=has_offsets)
    found = list(decode_radiographs(data, limits=DecodeLimits()))
    is_error = [isinstance(film, ImageError) for film in found]
    assert is_error == [False, True, False, True][: 3 if declared == 3 else 4]
    for error in (found[place] for place in np.flatnonzero(is_error)):
        assert error.code is ErrorCode.TRUNCATED
        assert error.facts["frame"] == found.index(error)
    assert [film.frame for film in (found[0], found[2])] == [0, 2]
    for place in (0, 2):
        assert np.abs(found[place].pixels.astype(int) - FRAMES[place]).max() < 12


@pytest.mark.parametrize("has_offsets", [True, False])
@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGLSLossless, JPEG2000Lossless])
def test_missing_compressed_frames_give_one_error_together(syntax, has_offsets):
    data = cine(syntax, declared=9, has_offsets=has_offsets)
    found = list(decode_radiographs(data, limits=DecodeLimits()))
    assert [isinstance(film, ImageError) for film in found] == [False, False, False, True]
    assert found[-1].code is ErrorCode.TRUNCATED
    assert found[-1].facts["frame"] == 3


@pytest.mark.parametrize("has_offsets", [True, False])
@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGLSLossless, JPEG2000Lossless])
def test_more_compressed_frames_than_declared_are_an_error(syntax, has_offsets):
    data = cine(syntax, has_offsets=has_offsets)
    for fewer in (without(data, "NumberOfFrames"), cine(syntax, 2, has_offsets=has_offsets)):
        assert code_of(fewer) is ErrorCode.CORRUPT_IMAGE


def test_a_frame_may_lie_in_several_fragments():
    whole = cine(JPEGLSLossless, has_offsets=False)

    def in_pieces(dataset):
        frame = get_frame(dataset.PixelData, 0, number_of_frames=3)
        dataset.PixelData = encapsulate([frame], fragments_per_frame=3)
        del dataset.NumberOfFrames

    np.testing.assert_array_equal(one_film(changed(whole, in_pieces)).pixels, FRAMES[0])


def test_values_that_a_lossy_codec_carried_above_the_range_stay_white():
    """With 16 bits in the codestream and 12 in the header, it may give more than 4095."""
    film = np.clip(RAMP * 2, 0, 4095).astype(np.uint16)
    film[20:40, 20:40] = 4095
    options = {"irreversible": True, "quality_mode": "rates", "quality_layers": [12]}
    codestream = encoded(film, "JPEG2000", no_jp2=True, **options)
    stored = np.asarray(Image.open(io.BytesIO(codestream)))
    assert stored.max() > 4095
    found = one_film(of_codestreams([codestream], JPEG2000, RAMP.shape, **TWELVE_BITS)).pixels
    assert found[stored > 4095].min() == 255
    assert np.abs(found.astype(int) - one_film(dicom(film)).pixels).max() < 40


def test_compressed_frames_are_read_one_by_one():
    data = shipped("examples_ybr_color.dcm")
    found = list(decode_radiographs(data, limits=DecodeLimits(), accept=ACCEPTABLE))
    assert [film.frame for film in found] == list(range(30))


def test_too_many_frames_are_refused():
    data = dicom(RAMP, NumberOfFrames=9)
    assert code_of(data, DecodeLimits(max_frames=8)) is ErrorCode.TOO_LARGE
