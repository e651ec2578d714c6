"""Maps stored DICOM values to grey, by the pipeline of PS3.4 N.2 in its order.

Pixel padding and display shutter ▶ Modality LUT or rescale ▶ VOI LUT or window ▶ Presentation LUT
(MONOCHROME1) ▶ aspect ratio. Values of up to 16 bits go through a table, once per value instead of
once per pixel: the same numbers, several times as fast. pydicom's own LUT functions are not used:
version 3.0 turns a film with a falling rescale and a window into its negative, and wraps tables of
8-bit entries.

An empty element, as de-identification leaves it, counts as absent. One that cannot be read is an
error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph.dicom_frames import LOSSY, AmendedHeader
from lungopacity.radiograph.dicom_lut import Table, table_of
from lungopacity.radiograph.dicom_shutter import outside_shutter
from lungopacity.radiograph.grey import look_up, own_range, stretch_to_uint8

_MAX_TABLE_BITS = 16
_BRIGHTEST_OF_ANY = 0.25
"""A window is trusted only if some value of the stored range reaches this share of white."""
_Counts = tuple[npt.NDArray[np.float64], npt.NDArray[np.integer]]
"""The values that occur, and how often each does."""


def grey_of(stored: npt.NDArray[Any], dataset: Any) -> npt.NDArray[np.uint8]:
    """Grey pixels of MONOCHROME2 polarity.

    stored: (height, width) integers as decoded. dataset: the header for this frame. Returns the
    same shape, uint8. Raises `ImageError`.
    """
    photometric = str(dataset.get("PhotometricInterpretation") or "")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE,
            Stage.DECODE,
            "the header's PhotometricInterpretation names no polarity",
        )
    stored, beyond = _without_padding_beyond(stored, dataset)
    stored, dataset = without_unused_bits(stored, dataset)
    hidden = _hidden(stored, dataset)
    if beyond is not None:
        hidden = beyond if hidden is None else hidden | beyond
    used = stored if hidden is None or hidden.all() else stored[~hidden]
    grey = _windowed(stored, used, dataset)
    if photometric == "MONOCHROME1":
        # MONOCHROME1 shows its smallest value as white (PS3.3 C.7.6.3.1.2). Presentation LUT Shape
        # INVERSE says the same again (C.7.6.1, C.8.11.3), and is not a second inversion. The
        # standard requires INVERSE with MONOCHROME1, and IDENTITY with MONOCHROME2. If a header
        # breaks that, PhotometricInterpretation counts, which every image must have: the shape
        # decides only in presentation states (C.11.6).
        grey = 255 - grey
    if hidden is not None:
        grey[hidden] = 0
    return grey


def _hidden(stored: npt.NDArray[Any], dataset: Any) -> npt.NDArray[np.bool_] | None:
    """The pixels that are shown black and are part of no range; None if there are none."""
    padding = _padding_of(stored, dataset)
    outside = outside_shutter(dataset, stored.shape)
    if padding is None or outside is None:
        return outside if padding is None else padding
    return padding | outside


def without_unused_bits(stored: npt.NDArray[Any], dataset: Any) -> tuple[npt.NDArray[Any], Any]:
    """The values without bits above Bits Stored, where old objects keep overlays; and the header,
    a corrected copy if Bits Stored is too small for the values.

    stored: (height, width) or (height, width, 3) integers as decoded. Too small is the case if
    clearing the bits makes the image rougher: bright values then wrap around,
    with an edge of 2^Bits Stored at each place. Clearing an overlay makes it smoother.
    """
    kept = int(dataset.BitsStored)
    spare = 8 * stored.dtype.itemsize - kept
    if not 0 < kept <= 32 or stored.dtype.kind not in "iu" or spare <= 0:
        return stored, dataset
    low, high = _stored_range(dataset)
    if stored.min() >= low and stored.max() <= high:
        return stored, dataset
    least, most = int(stored.min()), int(stored.max())
    # Shifting up and down again extends the sign bit of signed values.
    cleared: npt.NDArray[Any] = np.right_shift(np.left_shift(stored, spare), spare)
    # Signed values need not extend their sign.
    may_lack_sign = low < 0 <= least
    if dataset.file_meta.TransferSyntaxUID in LOSSY:
        # These hold no overlay (PS3.5 8.1.2): the codec's error carries values beyond the range.
        if may_lack_sign and _roughness(cleared) <= _roughness(stored):
            return cleared, dataset
        clipped: npt.NDArray[Any] = np.clip(stored, low, high)
        return clipped, dataset
    need_more = least < low or most >= 1 << kept
    if not need_more or _roughness(cleared) <= _roughness(stored):
        return cleared, dataset
    bits = max(most.bit_length(), (-1 - least).bit_length() if least < 0 else 0)
    return stored, AmendedHeader(dataset, {"BitsStored": bits + (1 if low < 0 else 0)})


def _roughness(values: npt.NDArray[Any]) -> float:
    """The differences of neighbours, up and down and left and right, summed."""
    wide = values.astype(np.int64)
    return float(sum(np.abs(np.diff(wide, axis=axis)).sum() for axis in (0, 1)))


def _without_padding_beyond(
    stored: npt.NDArray[Any], dataset: Any
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Padding that Bits Stored has no room for, such as 65535 of 12 bits: the values without it,
    and where it was."""
    first, kept = dataset.get("PixelPaddingValue"), int(dataset.BitsStored)
    if not isinstance(first, int) or stored.dtype.itemsize != 2 or stored.dtype.kind not in "iu":
        return stored, None
    low, high = _stored_range(dataset)
    # As 16 bits, whatever sign it was written with.
    value = int(np.array(first % 2**16, np.uint16).astype(stored.dtype))
    if low <= value <= high or kept >= 16:
        return stored, None
    padding = stored == value
    return np.where(padding, stored.dtype.type(low), stored), padding


def _stored_range(dataset: Any) -> tuple[int, int]:
    bits = int(dataset.BitsStored)
    if int(dataset.get("PixelRepresentation") or 0):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _padding_of(stored: npt.NDArray[Any], dataset: Any) -> npt.NDArray[np.bool_] | None:
    """The padding pixels outside the image proper (PS3.3 C.7.5.1.1.2); None if there are none."""
    first = dataset.get("PixelPaddingValue")
    if not isinstance(first, int):
        return None
    last = dataset.get("PixelPaddingRangeLimit")
    ends = (first, last if isinstance(last, int) else first)
    low, high = sorted(_as_stored(end, dataset) for end in ends)
    padding: npt.NDArray[np.bool_] = (stored >= low) & (stored <= high)
    return padding if padding.any() else None


def _as_stored(value: int, dataset: Any) -> int:
    """A padding value as the pixels hold it. It may be written with the other signedness: 63536
    for -2000 of signed pixels, or the reverse."""
    low, high = _stored_range(dataset)
    if value < low:
        return value + 2**16
    for bits in (int(dataset.BitsStored), 16):
        if low < 0 and high < value < 1 << bits:
            return value - (1 << bits)
    return value


@dataclass(frozen=True)
class _Window:
    """A window of PS3.3 C.11.2.1.2 and C.11.2.1.3."""

    centre: float
    width: float
    function: str

    def __call__(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The share of white: 0 (black) … 1 (white)."""
        if self.function == "SIGMOID":
            share = 1 / (1 + np.exp(-4 * (values - self.centre) / self.width))
        elif self.function == "LINEAR_EXACT":
            share = (values - self.centre) / self.width + 0.5
        elif self.width > 1:
            share = (values - (self.centre - 0.5)) / (self.width - 1) + 0.5
        else:
            share = (values > self.centre - 0.5).astype(np.float64)
        return np.clip(share, 0.0, 1.0)


@dataclass(frozen=True)
class _Transform:
    """Maps the stored values of one frame to the values that are shown."""

    modality: Table | None
    slope: float
    intercept: float
    voi: Table | _Window | None

    @staticmethod
    def of(dataset: Any) -> _Transform:
        # A slope of 0 would erase the image.
        slope = _first(dataset, "RescaleSlope") or 1.0
        intercept = _first(dataset, "RescaleIntercept") or 0.0
        ends = _stored_range(dataset)
        modality = table_of(dataset, "ModalityLUTSequence", ends[0])
        lowest = min(end * slope + intercept for end in ends)
        found = _Transform(
            modality=modality,
            slope=slope,
            intercept=intercept,
            voi=table_of(dataset, "VOILUTSequence", lowest, behind=modality) or _window_of(dataset),
        )
        # The entries at both ends of a table may be dark, for it often ends in zeros.
        values_V = modality.entries if modality else np.array(ends) * slope + intercept
        if (
            isinstance(found.voi, _Window)
            and found.voi(values_V.astype(np.float64)).max() < _BRIGHTEST_OF_ANY
        ):
            # A copy with fewer bits kept the window of its original, and would be shown black.
            return replace(found, voi=None)
        return found

    def __call__(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        values = stored.astype(np.float64)
        values = self.modality(values) if self.modality else values * self.slope + self.intercept
        return self.voi(values) if self.voi else values

    def black_and_white(
        self, occurring: Callable[[], _Counts], dataset: Any
    ) -> tuple[float, float]:
        """The shown values that become black and white. `occurring`: counts the shown values; only
        called if needed, because it takes half the time of all the grey values.

        With a VOI LUT or a window: its whole output range; the range that occurs would undo one
        that clips nothing. With neither: for 8 bits all values, as in other formats; for more bits
        the range that occurs, for detectors rarely use all values.
        """
        if isinstance(self.voi, _Window):
            return 0.0, 1.0
        if self.voi is not None:
            return self.voi.black_and_white()
        if self.modality is None and int(dataset.BitsStored) <= 8:
            ends = [end * self.slope + self.intercept for end in _stored_range(dataset)]
            return min(ends), max(ends)
        used_V, counts_V = occurring()
        order = np.argsort(used_V, kind="stable")
        return own_range(used_V[order], counts_V[order])


def _windowed(
    stored: npt.NDArray[Any], used: npt.NDArray[Any], dataset: Any
) -> npt.NDArray[np.uint8]:
    transform = _Transform.of(dataset)
    low, high = _stored_range(dataset)
    if stored.dtype.kind not in "iu" or high - low >= 2**_MAX_TABLE_BITS:

        def unique() -> _Counts:
            values_V, counts_V = np.unique(used, return_counts=True)
            return transform(values_V), counts_V

        return stretch_to_uint8(transform(stored), *transform.black_and_white(unique, dataset))
    table = transform(np.arange(low, high + 1))

    def places_of(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return (stored.astype(np.int32) - low) if low else stored

    def counted() -> _Counts:
        counts = np.bincount(places_of(used).ravel(), minlength=len(table))
        present = np.flatnonzero(counts)
        return table[present], counts[present]

    ends = transform.black_and_white(counted, dataset)
    return look_up(stretch_to_uint8(table, *ends), places_of(stored))


def _window_of(dataset: Any) -> _Window | None:
    """The first valid window, which viewers show, too; None if there is none. Scanners write a
    width of 0 to mean no window."""
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    least = 1.0 if function == "LINEAR" else np.nextafter(0.0, 1.0)
    values = (_values_of(dataset, keyword) for keyword in ("WindowCenter", "WindowWidth"))
    for pair in zip(*values, strict=False):
        centre, width = _number(pair[0], "WindowCenter"), _number(pair[1], "WindowWidth")
        if centre is not None and width is not None and width >= least:
            return _Window(centre, width, function)
    return None


def _values_of(dataset: Any, keyword: str) -> Sequence[Any]:
    value = dataset.get(keyword)
    several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return value if several else [value]


def _first(dataset: Any, keyword: str) -> float | None:
    """The element's first value; None if it has none."""
    values = _values_of(dataset, keyword)
    return _number(values[0], keyword) if len(values) else None


def _number(value: Any, keyword: str) -> float | None:
    """The value as a number; None if it is empty or not finite.

    Raises `ImageError` for anything else: ignoring it would change how the film looks.
    """
    if value is None or value == "":
        return None
    try:
        # Some systems write a decimal comma, against PS3.5 6.2.
        number = float(value.replace(",", ".") if isinstance(value, str) else value)
    except (TypeError, ValueError) as error:
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, f"the header's {keyword} is not a number"
        ) from error
    return number if np.isfinite(number) else None


def pixel_aspect_of(dataset: Any) -> float:
    """Height over width of one pixel; 1 if the header says nothing, or nonsense.

    A spacing counts before PixelAspectRatio, which the standard has for images without one (PS3.3
    C.7.6.3.1.7), and which many systems write as 1\\1 in any case. For a scanned film the spacing
    is the nominal one.
    """
    spacings = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
    for keyword in (*spacings, "PixelAspectRatio"):
        value = dataset.get(keyword)
        try:
            ratio = float(value[0]) / float(value[1])
        except (TypeError, ValueError, IndexError, ZeroDivisionError):
            continue
        if 0.1 < ratio < 10:
            return ratio
    return 1.0


def with_square_pixels(grey: npt.NDArray[np.uint8], aspect: float) -> npt.NDArray[np.uint8]:
    """Shrink the side along which pixels are closer together, so that they become square.

    `aspect`: height over width of a pixel. Within 1 % of 1 nothing is done.
    """
    from PIL import Image

    if abs(aspect - 1) < 0.01:
        return grey
    height, width = grey.shape
    if aspect > 1:
        width = max(1, round(width / aspect))
    else:
        height = max(1, round(height * aspect))
    return np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR))
