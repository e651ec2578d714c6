"""Lookup tables of a header: of grey values and of colours."""

import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian

from lungopacity.errors import ErrorCode
from tests.films import dicom, one_film
from tests.radiograph.dicom_files import EIGHT_BITS, RAMP, changed, code_of, saved


def lut_item(entries, first: int = 0) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, 16]
    item.LUTData = list(map(int, entries))
    item["LUTDescriptor"].VR = "US"
    item["LUTData"].VR = "US"
    return item


def test_a_voi_lut_precedes_a_window_and_its_entries_span_black_to_white():
    entries = np.linspace(500, 60_000, 4096) ** 0.9
    pixels = one_film(
        dicom(RAMP, VOILUTSequence=[lut_item(entries)], WindowCenter=10, WindowWidth=5)
    ).pixels
    scaled = (entries.astype(int) - int(entries[0])) / (int(entries[-1]) - int(entries[0]))
    assert np.abs(pixels - 255 * scaled[RAMP]).max() <= 0.51


def test_a_voi_lut_may_begin_above_32767_if_no_value_is_as_negative():
    bright = (RAMP + 40_000).astype(np.uint16)
    elements = {"BitsStored": 16, "HighBit": 15, "VOILUTSequence": [lut_item(range(4096), 40_000)]}
    np.testing.assert_array_equal(
        one_film(dicom(bright, **elements)).pixels, one_film(dicom(RAMP)).pixels
    )
    # Nor if some may be negative, but none as low as the table would be.
    bright = bright + np.uint16(1000)
    np.testing.assert_array_equal(
        one_film(dicom(bright, **elements, RescaleIntercept=-1000)).pixels,
        one_film(dicom(RAMP)).pixels,
    )


def test_a_modality_lut_may_map_8_bits_to_more():
    film = (RAMP // 16).astype(np.uint8)
    wider = {"ModalityLUTSequence": [lut_item(np.arange(256) * 16)]}
    found = one_film(dicom(film, **EIGHT_BITS, **wider, PixelData=film.tobytes())).pixels
    np.testing.assert_array_equal(found, film)


@pytest.mark.parametrize("form", ["US", "SS", "OW", "8 bits, OW", "8 bits, packed", "8 bits"])
def test_every_way_to_write_the_entries_of_a_voi_lut_gives_the_same_film(form):
    """PS3.3 C.11.2.1.1: a word may hold one or two 8-bit entries."""
    bits = 8 if form.startswith("8") else 16
    entries = (np.linspace(0, 1, 4096) ** 2 * (2**bits - 1)).round().astype(np.uint16)
    item = lut_item(entries)
    item.LUTDescriptor = [4096, 0, bits]
    if "OW" in form:
        del item.LUTData
        item.add_new("LUTData", "OW", entries.astype("u1" if bits == 8 else "<u2").tobytes())
    elif form == "SS":
        item.add_new("LUTData", "SS", entries.astype(np.int16).tolist())
    elif form.endswith("packed"):
        item.LUTData = entries.astype(np.uint8).view("<u2").tolist()
    film = (RAMP // 2).astype(np.uint16)  # uses half of the table
    found = one_film(dicom(film, VOILUTSequence=[item])).pixels
    expected = 255 * (entries / entries.max())[film]
    assert np.abs(found - expected).max() <= 0.51


def test_the_byte_that_makes_an_odd_number_of_entries_even_is_none():
    """Otherwise the brightest values would be black."""
    item = lut_item(range(255))
    item.LUTDescriptor = [255, 0, 8]
    del item.LUTData
    item.add_new("LUTData", "OW", bytes(range(255)) + b"\0")
    found = one_film(dicom(RAMP // 16, VOILUTSequence=[item])).pixels
    np.testing.assert_array_equal(found, np.minimum(RAMP // 16, 254))


@pytest.mark.parametrize("told", [0, 40_000])
@pytest.mark.parametrize("is_signed", [False, True])
def test_a_lut_may_have_more_entries_than_a_signed_word_can_count(told, is_signed):
    """PS3.3 C.11.2.1.1: 0 stands for 65,536, which does not fit in 16 bits."""
    entries = np.arange(told or 2**16) // 2
    first = 2**15 if is_signed else 0  # -32768, as the pixels are read
    item = lut_item(entries[:1])
    item.LUTDescriptor = [told, first, 16]
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    stored = (RAMP.astype(np.uint16) * 16) ^ first
    elements = {"BitsStored": 16, "HighBit": 15, "PixelRepresentation": int(is_signed)}
    found = one_film(dicom(stored, VOILUTSequence=[item], **elements)).pixels
    expected = 255 * np.clip(RAMP * 16.0 / (len(entries) - 1), 0, 1)
    assert np.abs(found - expected).max() <= 0.52


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (-1, 3071)])
def test_the_negative_first_value_of_a_lut_may_be_written_unsigned(slope, intercept):
    """It is written unsigned if the pixels are, even if a rescale makes them negative."""
    item = lut_item(np.arange(4096), first=2**16 - 1024)
    rescale = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    film = one_film(dicom(RAMP, **rescale, VOILUTSequence=[item])).pixels
    np.testing.assert_array_equal(film, one_film(dicom(RAMP, **rescale)).pixels)


def test_the_negative_first_value_of_a_modality_lut_may_be_written_unsigned():
    stored = (RAMP.astype(np.int16) - 1024).view(np.uint16)
    told = {"BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1}
    item = lut_item(np.arange(4096), first=2**16 - 1024)
    found = one_film(dicom(stored, **told, ModalityLUTSequence=[item])).pixels
    np.testing.assert_array_equal(found, one_film(dicom(RAMP)).pixels)


@pytest.mark.parametrize("is_signed", [False, True])
def test_the_first_value_of_a_voi_lut_after_a_modality_lut_is_unsigned(is_signed):
    """The outputs of a Modality LUT are never negative, even for signed pixels (PS3.3
    C.11.1.1.1)."""
    tables = {
        "ModalityLUTSequence": [lut_item(np.arange(2048) * 32)],
        "VOILUTSequence": [lut_item(np.arange(2**14), first=2**15)],
    }
    found = one_film(dicom(RAMP // 2, **tables, PixelRepresentation=int(is_signed))).pixels
    expected = np.clip((RAMP // 2 * 32.0 - 2**15) / (2**14 - 1), 0, 1) * 255
    assert np.abs(found - expected).max() <= 0.51


def test_a_modality_lut_is_applied():
    falling = np.arange(4095, -1, -1)
    item = lut_item(falling)
    item.ModalityLUTType = "US"
    np.testing.assert_array_equal(
        one_film(dicom(RAMP, ModalityLUTSequence=[item])).pixels, 255 - one_film(dicom(RAMP)).pixels
    )


def test_a_window_behind_a_modality_lut_that_ends_in_zeros_is_kept():
    entries = np.where(np.arange(4096) < 4000, np.arange(4096), 0)
    window = {"WindowCenter": 2048, "WindowWidth": 1024}
    film = np.minimum(RAMP, 3999)
    found = one_film(dicom(film, ModalityLUTSequence=[lut_item(entries)], **window)).pixels
    np.testing.assert_array_equal(found, one_film(dicom(film, **window)).pixels)


def test_a_voi_lut_that_does_not_reach_black_and_white_is_not_stretched():
    """PS3.3 C.11.2.1.1: with 12 bits, white is 4095."""
    item = lut_item(np.arange(4096) * 3 // 4 + 500)
    item.LUTDescriptor = [4096, 0, 12]
    found = one_film(dicom(RAMP, VOILUTSequence=[item])).pixels
    assert np.abs(found - (RAMP * 0.75 + 500) * 255 / 4095).max() <= 0.6


@pytest.mark.parametrize("bits", [8, 16])
def test_a_voi_lut_whose_bits_are_wrong_spans_black_to_white(bits):
    item = lut_item(np.arange(4096))
    item.LUTDescriptor = [4096, 0, bits]
    found = one_film(dicom(RAMP, VOILUTSequence=[item])).pixels
    np.testing.assert_array_equal(found, one_film(dicom(RAMP)).pixels)


def test_a_voi_lut_with_fewer_entries_than_it_says_is_not_taken_for_one_of_bytes():
    item = lut_item(np.arange(4000))
    item.LUTDescriptor = [4096, 0, 12]
    found = one_film(dicom(RAMP, VOILUTSequence=[item])).pixels
    assert np.abs(found - np.minimum(RAMP, 3999) * (255 / 4095)).max() <= 0.51


def in_big_endian(data: bytes, *words: str) -> bytes:
    """The object in Explicit VR Big Endian. words: of its elements, those in OW."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    for keyword in ("PixelData", *words):
        for each in (dataset, *dataset.get("VOILUTSequence", [])):
            if keyword in each:
                each[keyword].value = np.frombuffer(each[keyword].value, "<u2").byteswap().tobytes()
    return saved(dataset, implicit_vr=False, little_endian=False)


def test_entries_of_8_bits_lie_the_other_way_round_in_the_words_of_big_endian():
    entries = np.arange(4096) % 256
    item = lut_item([0])
    item.LUTDescriptor = [4096, 0, 8]
    item.add_new("LUTData", "OW", entries.astype(np.uint8).tobytes())
    data = dicom(RAMP, VOILUTSequence=[item])
    found = one_film(in_big_endian(data, "LUTData")).pixels
    np.testing.assert_array_equal(found, entries[RAMP])


PALETTES = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]


def of_palette(stored: np.ndarray, entries: np.ndarray, bits: int, **elements: object) -> bytes:
    """A film of one grey palette, whose entries are written as they are, in words or bytes."""

    def with_palette(dataset):
        for palette in PALETTES:
            dataset.add_new(f"{palette}Descriptor", "US", [len(entries) % 2**16, 0, bits])
            dataset.add_new(f"{palette}Data", "OW", entries.tobytes())

    told = {"PhotometricInterpretation": "PALETTE COLOR", **elements}
    return changed(dicom(stored, **told, PixelData=stored.tobytes()), with_palette)


@pytest.mark.parametrize(
    ("kind", "greatest", "bits"),
    [
        pytest.param("<u2", 65535, 16, id="16 bits"),
        pytest.param("u1", 255, 8, id="8 bits in bytes"),
        pytest.param("<u2", 255, 8, id="8 bits in words"),
        pytest.param("<u2", 255, 16, id="8 bits in words that are called 16"),
        pytest.param("<u2", 4095, 12, id="12 bits"),
        pytest.param("<u2", 65535, 8, id="16 bits that are called 8"),
    ],
)
@pytest.mark.parametrize("count", [256, 4096])
def test_every_way_to_write_a_palette_gives_the_same_film(kind, greatest, bits, count):
    entries = (np.linspace(1, 0, count) ** 2 * greatest).round().astype(kind)
    stored = RAMP if count == 4096 else (RAMP // 16).astype(np.uint8)
    data = of_palette(stored, entries, bits, **({} if count == 4096 else EIGHT_BITS))
    expected = entries.astype(int)[stored] * 255 / greatest
    found = one_film(data)
    assert np.abs(found.pixels - expected).max() <= 1
    assert found.coloured_fraction == 0
    if count == 4096:
        words = [f"{palette}Data" for palette in PALETTES]
        np.testing.assert_array_equal(one_film(in_big_endian(data, *words)).pixels, found.pixels)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_segmented_palette_is_applied_or_refused(bits):
    data = of_palette(RAMP, np.arange(4096, dtype="<u2"), 16)
    # A discrete 0, and a line to white (PS3.3 C.7.9.2).
    segments = np.array([0, 1, 0, 1, 255, 2**bits - 1], "<u2" if bits == 16 else "u1")

    def segmented(dataset):
        for palette in PALETTES:
            del dataset[f"{palette}Data"]
            dataset[f"{palette}Descriptor"].value = [256, 0, bits]
            dataset.add_new(f"Segmented{palette}Data", "OW", segments.tobytes())

    if bits == 8:
        assert code_of(changed(data, segmented)) is ErrorCode.UNSUPPORTED
    else:
        found = one_film(changed(data, segmented)).pixels
        assert np.abs(found - np.minimum(RAMP, 255)).max() <= 1


@pytest.mark.parametrize("first", [0, 300, 40_000, -300, -30_000])
def test_a_palette_may_begin_anywhere_and_need_not_be_grey(first):
    """A negative first value is written as unsigned, as its VR has it."""
    channels = [
        np.linspace(0, top, 4096).astype("<u2")[::way]
        for top, way in ((65535, 1), (30_000, -1), (200, 1))
    ]
    inputs = RAMP.astype(int) + first
    stored = np.clip(inputs - 100, -(2**15), 2**15 - 1) if first < 0 else inputs + 100
    elements = {"BitsStored": 16, "HighBit": 15, "PixelRepresentation": int(first < 0)}

    def coloured(dataset):
        for palette, entries in zip(PALETTES, channels, strict=True):
            dataset[f"{palette}Descriptor"].value = [4096, first % 2**16, 16]
            dataset[f"{palette}Data"].value = entries.tobytes()

    data = of_palette(stored.astype(np.uint16), channels[0], 16, **elements)
    found = one_film(changed(data, coloured))
    shown = [entries[np.clip(stored - first, 0, 4095)] >> 8 for entries in channels]
    rgb = np.stack(shown, axis=-1).astype(np.uint8)
    np.testing.assert_array_equal(found.pixels, np.asarray(Image.fromarray(rgb).convert("L")))
    assert found.coloured_fraction > 0.5


def test_a_palette_that_lacks_a_colour_is_corrupt():
    data = of_palette(RAMP, np.arange(4096, dtype="<u2"), 16)

    def without_blue(dataset):
        del dataset[f"{PALETTES[2]}Data"]

    assert code_of(changed(data, without_blue)) is ErrorCode.CORRUPT_IMAGE
