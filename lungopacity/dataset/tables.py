"""Reads users' tables, CSV or Parquet: the same values in either give the same frame."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from lungopacity.errors import ImageError, UserError, unreadable
from lungopacity.storage import open_store, split_uri

_MISSING = ("", "NA", "N/A", "n/a", "na", "nan", "NaN", "NULL", "null", "None")
"""Words for a missing value in columns that may hold numbers. In a column of text, only the empty
one is."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"
_ZIP = b"PK\x03\x04"
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
ANY_SEPARATOR = ",;\t|"
_SEP_LINE = re.compile(r'"?sep=.?"?')
"""What may stand above the columns' names: it tells Excel which character separates the fields."""
_HEADER = re.compile(rf"(?:^|[\r\n])(?!{_SEP_LINE.pattern}(?:[\r\n]|$))([^\r\n]+)")
_FILM_NAME = re.compile(r"\w\.(png|jpe?g|dcm|dicom|tiff?|bmp|jp2)(\s|$)", re.IGNORECASE)


def read_table(uri: str, what: str, texts: Collection[str]) -> pd.DataFrame:
    """A CSV or Parquet file. Values of the columns named in `texts` are text, even if they look
    like numbers, and missing where they are empty.

    what: what messages call the table, such as `labels`. Raises `UserError` where the file is
    absent, or is neither CSV nor Parquet.
    """
    parent, name = split_uri(uri)
    try:
        data = open_store(parent).read(name)
    except ImageError as error:
        raise unreadable(uri, f"{what} cannot be read", error) from error
    return table_of(data, uri, texts)


def table_of(data: bytes, uri: str, texts: Collection[str]) -> pd.DataFrame:
    """`read_table` for a file's bytes. uri: what messages call the file."""
    read = _of_parquet if data[:4] == b"PAR1" else _of_csv
    return read(data, uri, texts)


def _of_parquet(data: bytes, uri: str, texts: Collection[str]) -> pd.DataFrame:
    try:
        table = pq.read_table(io.BytesIO(data))
        frame: pd.DataFrame = table.to_pandas()
    except (ValueError, OSError) as error:
        raise UserError(
            f"{uri}: is a damaged Parquet file ({type(error).__name__}); write it again"
        ) from error
    for column in frame.columns.intersection(list(texts)):
        # The frame has whole numbers with gaps as floats, which lose digits of a patient's number.
        values = table[column].to_pandas(integer_object_nulls=True).astype(object)
        for value in values:
            if isinstance(value, bytes | list | dict | np.ndarray):
                raise UserError(
                    f"{uri}: column '{column}' holds {type(value).__name__} and not text; "
                    "write it as strings"
                )
        frame[column] = values.map(_text_of).to_numpy()
    return frame


def _text_of(value: Any) -> str | None:
    """The text that a CSV would hold. A patient's number is a name; an empty text is missing."""
    if pd.isna(value) or value == "":
        return None
    # pandas writes whole numbers with gaps as floats.
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _of_csv(data: bytes, uri: str, texts: Collection[str]) -> pd.DataFrame:
    rows = csv_rows(csv_text(data, uri), uri)
    header = next(rows, [])
    # Written anew: after a blank line that ends in CR, pandas would lose the first field of a line
    # if it is empty, and films would get the values of something else.
    plain = io.StringIO(newline="")
    csv.writer(plain, lineterminator="\n").writerows(itertools.chain([header], rows))
    plain.seek(0)
    try:
        return pd.read_csv(
            plain,
            dtype=dict.fromkeys(texts, str),
            index_col=False,
            keep_default_na=False,
            na_values={name: [""] if name in texts else list(_MISSING) for name in header},
        )
    except ValueError as error:
        raise UserError(f"{uri}: is neither CSV nor Parquet ({type(error).__name__})") from error


def bytes_of(uri: str) -> bytes:
    """The file's bytes. Raises `UserError` where it cannot be read."""
    parent, name = split_uri(uri)
    try:
        return open_store(parent).read(name)
    except ImageError as error:
        raise unreadable(uri, "cannot be read", error) from error


def csv_text(data: bytes, uri: str) -> str:
    """The text of a CSV file. Raises `UserError`, with what to do, for a file that is not CSV."""
    if data.startswith(_GZIP):
        raise UserError(f"{uri}: is compressed with gzip; decompress it first")
    if data.startswith(_ZIP):
        raise UserError(f"{uri}: is a spreadsheet or a zip file; save it as CSV UTF-8, or unzip it")
    if b"\0" in data and not data.startswith(_UTF16):
        raise UserError(f"{uri}: is neither CSV nor Parquet (it holds null bytes)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{uri}: line {line} is not UTF-8; save it as CSV UTF-8") from error
    if not text.strip():
        raise UserError(f"{uri}: is empty")
    return text


def csv_rows(text: str, uri: str, separators: str = ",") -> Iterator[list[str]]:
    """The columns' names and then the values of each row of a CSV file, a field for each column.

    Blank lines, and a first line such as `sep=;`, are left out. separators: what may separate the
    fields; the one that gives the header the most columns does. Raises `UserError` for lines of
    another length than the header, for repeated names or headers, and for a file without a header.
    Columns without a name at the end may be missing from the rows: the header of NIH's
    Data_Entry_2017.csv ends with a comma.
    """
    first = _HEADER.search(text)
    names = "" if first is None else first[1]
    separator = max(separators, key=lambda sign: len(next(csv.reader([names], delimiter=sign))))
    # Strict: a quote that nothing closes would make one value of all that follows it.
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    fewest = 0
    try:
        for fields in lines:
            if not "".join(fields).strip() and len(fields) < 2:
                continue
            if not header:
                if _SEP_LINE.fullmatch(separator.join(fields)):
                    continue
                header = fields
                _check_header(header, uri)
                fewest = max((n for n, name in enumerate(header, 1) if name), default=0)
            elif not fewest <= len(fields) <= len(header):
                raise UserError(
                    f"{uri}: line {lines.line_num} has {len(fields)} fields, the header has "
                    f"{len(header)}; fix it, with quotes around values that contain a comma"
                )
            elif [fields[0].removeprefix("\ufeff"), *fields[1:]] == header:
                raise UserError(
                    f"{uri}: line {lines.line_num} repeats the names of the columns; remove it"
                )
            yield fields + [""] * (len(header) - len(fields))
    except csv.Error as error:
        raise UserError(f"{uri}: line {lines.line_num} is not CSV ({error}); fix it") from error
    if not header:
        raise UserError(f"{uri}: names no columns")


def _check_header(header: list[str], uri: str) -> None:
    if len(header) == 1:
        for sign, signs in _OTHER_SEPARATORS.items():
            if sign in header[0]:
                raise UserError(
                    f"{uri}: {signs} separate its columns; save it with commas between them"
                )
    for name, times in Counter(header).items():
        if name and times > 1:
            raise UserError(f"{uri}: has {times} columns named '{name}'; keep one of them")
        if _FILM_NAME.search(name):
            # Taken for a header, the first row of such a list would be lost.
            raise UserError(
                f"{uri}: its first line names a film, {name}, and no columns; write the names of "
                "the columns in a line above it"
            )
