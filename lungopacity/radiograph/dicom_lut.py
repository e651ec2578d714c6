"""Lookup tables of DICOM headers: of grey values (PS3.3 C.11.1 and C.11.2) and of colours
(C.7.6.3.1.5 and .6).

pydicom's own functions are not used: version 3.0 wraps around the inputs of palettes and the
outputs of grey tables if entries have 8 bits, and swaps the bytes of big-endian palettes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage


@dataclass(frozen=True)
class Table:
    """The outputs for inputs `first`, `first` + 1, …"""

    first: int
    entries: npt.NDArray[np.integer]
    bits: int
    """Of an entry, as the header says."""

    def __call__(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        places = np.clip(values - self.first, 0, len(self.entries) - 1).astype(np.intp)
        return self.entries[places].astype(np.float64)

    def black_and_white(self) -> tuple[float, float]:
        """Zero and the most that `bits` can hold (PS3.3 C.11.2.1.1). If they are plainly wrong,
        too few for the entries or more than needed for them, the least and the greatest entry."""
        greatest = int(self.entries.max())
        if 0 < self.bits == greatest.bit_length():
            return 0.0, float(2**self.bits - 1)
        return float(self.entries.min()), float(greatest)


def table_of(
    dataset: Any, keyword: str, lowest: float, behind: Table | None = None
) -> Table | None:
    """The LUT in this sequence; None if there is none, or none that can be used. `lowest`: the
    lowest of its inputs. `behind`: the table whose outputs are its inputs, if any."""
    items = dataset.get(keyword)
    if not items:
        return None
    descriptor, data = items[0].get("LUTDescriptor"), items[0].get("LUTData")
    entries = _entries(descriptor, data, dataset)
    if entries is None:
        return None
    first = int(descriptor[1])
    if behind is not None:
        first %= 2**16  # the outputs of `behind` are never negative (PS3.3 C.11.1.1.1)
    elif first >= 2**15 and lowest < min(0, first - 2**16 + len(entries)):
        # A negative value, written as unsigned: some of the inputs have entries.
        first -= 2**16
    return Table(first, entries, int(descriptor[2]))


def with_palette(stored: npt.NDArray[Any], dataset: Any) -> npt.NDArray[np.uint8]:
    """The colours of pixels that are inputs of the header's palette.

    stored: (height, width) integers. Returns (height, width, 3). Raises `ImageError`.
    """
    tables = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    if f"{tables[0]}Data" not in dataset and f"Segmented{tables[0]}Data" in dataset:
        return _with_segmented_palette(stored, dataset)
    descriptor = dataset.get(f"{tables[0]}Descriptor")  # the others must say the same
    channels = [_entries(descriptor, dataset.get(f"{table}Data"), dataset) for table in tables]
    found = [entries for entries in channels if entries is not None]
    if len(found) < len(tables):
        raise ImageError(ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "the header has no usable palette")
    first, bits = int(descriptor[1]), int(descriptor[2])
    if first >= 2**15 and stored.min() < 0:
        first -= 2**16
    most = max(int(entries.max()) for entries in found)
    if most < 2**8:
        bits = 8  # some writers say 16, the size of the words that hold 8
    elif not 8 < bits <= 16 or most >= 1 << bits:
        bits = 16
    places = stored.astype(np.int32) - first
    rgb = [(entries >> (bits - 8)).astype(np.uint8).take(places, mode="clip") for entries in found]
    return np.stack(rgb, axis=-1)


def _with_segmented_palette(stored: npt.NDArray[Any], dataset: Any) -> npt.NDArray[np.uint8]:
    from pydicom.pixels import apply_color_lut

    rgb = apply_color_lut(stored, dataset)[..., :3]
    if rgb.dtype == np.uint8 and stored.max() > 255:
        # pydicom wraps these inputs around.
        raise ImageError(
            ErrorCode.UNSUPPORTED, Stage.DECODE, "a segmented palette of 8 bits for pixels of 16"
        )
    eight: npt.NDArray[np.uint8] = (rgb >> (8 * rgb.dtype.itemsize - 8)).astype(np.uint8)
    return eight


def _entries(descriptor: Any, data: Any, dataset: Any) -> npt.NDArray[np.integer] | None:
    """The entries of a table, in whatever form they are written; None if there are none."""
    if descriptor is None or data is None or len(descriptor) < 3:
        return None
    # pydicom reads the descriptor as signed if the pixels are. A count is unsigned; 0 means 65,536.
    count = int(descriptor[0]) % 2**16 or 2**16
    if isinstance(data, bytes):  # OW
        little = getattr(dataset, "original_encoding", (None, True))[1] is not False
        data = np.frombuffer(data + bytes(len(data) % 2), "<u2" if little else ">u2")
    entries = np.atleast_1d(np.asarray(data, np.int64)) % 2**16
    if len(entries) == (count + 1) // 2:
        entries = entries.astype("<u2").view(np.uint8)  # two of 8 bits in each word
    return entries[:count] if len(entries) else None
