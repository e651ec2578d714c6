"""Parquet files of images."""

import io
import time

import pyarrow as pa
import pytest

from lungopacity.archive.containers import members
from lungopacity.errors import ErrorCode, ImageError
from tests.archive.making import LIMITS, make_tar, noise, walk, write_parquet


def _table(**columns) -> bytes:
    return write_parquet(pa.table(columns))


def test_a_null_is_an_empty_row_and_a_row_without_a_path_has_its_number():
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": b"1", "path": "a"}, {"bytes": None, "path": "b"}, None, {"bytes": b"2"}]
    expected = [("a", b"1"), ("b", ErrorCode.EMPTY), ("2", ErrorCode.EMPTY), ("3", b"2")]
    assert walk(_table(scan=pa.array(rows, kind))) == (expected, None)


def test_the_image_column_is_the_one_with_a_known_name():
    data = _table(mask=[b"m"], dcm=[b"film"], image_id=["i"])
    assert walk(data) == ([("i", b"film")], None)
    assert walk(_table(left=[b"1"], right=[b"2"])) == ([], ErrorCode.UNSUPPORTED)
    assert walk(_table(left=[b"1"], label=[7])) == ([("0", b"1")], None)


def test_the_image_is_in_the_known_column_that_the_row_fills():
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    data = _table(
        jpg=pa.array([b"1", None, b"", None, b"5"], pa.binary()),
        dcm=pa.array([None, b"2", b"3", None, b"6"], pa.binary()),
        png=pa.array([None, None, None, {"bytes": b"4", "path": "d"}, None], kind),
        key=["a", "b", "c", "-", "e"],
        mask=[b"m"] * 5,
    )
    films = [("a", b"1"), ("b", b"2"), ("c", b"3"), ("d", b"4")]
    assert walk(data) == ([*films, ("e", ErrorCode.UNSUPPORTED)], None)


def test_the_first_column_of_text_names_the_rows():
    data = _table(image=[b"1"], id=["id"], path=[3], filename=pa.array(["f"]).dictionary_encode())
    assert walk(data) == ([("f", b"1")], None)


def test_whole_numbers_name_the_rows_if_no_text_does():
    films = [b"1", b"2", b"3"]
    ids = pa.array([2, None, 0])
    assert walk(_table(image=films, id=ids)) == ([("2", b"1"), ("1", b"2"), ("0", b"3")], None)
    of_hugging_face = pa.array([{"bytes": film, "path": None} for film in films])
    of_hugging_face = of_hugging_face.cast(
        pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    names = ["a.png", "b.png", "c.png"]
    named = list(zip(names, films, strict=True))
    assert walk(_table(image=of_hugging_face, id=ids, image_id=names)) == (named, None)
    assert walk(_table(image=of_hugging_face, id=ids.dictionary_encode())) == (
        [("2", b"1"), ("1", b"2"), ("0", b"3")],
        None,
    )


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view(), "dictionary"])
@pytest.mark.parametrize("names", [pa.large_string(), pa.string_view(), "dictionary"])
def test_bytes_and_names_are_read_from_every_arrow_type(kind, names):
    def column(values: pa.Array, wanted) -> pa.Array:
        return values.dictionary_encode() if wanted == "dictionary" else values.cast(wanted)

    films = column(pa.array([b"1", None, b"1"]), kind)
    names = column(pa.array(["a", "b", None]), names)
    expected = [("a", b"1"), ("b", ErrorCode.EMPTY), ("2", b"1")]
    assert walk(_table(image=films, file_name=names)) == (expected, None)
    structs = pa.StructArray.from_arrays([films, names], ["bytes", "path"])
    assert walk(_table(scan=structs)) == (expected, None)


def test_a_dictionary_of_images_is_unpacked_once_and_not_for_every_row(monkeypatch):
    films = [noise(seed, 300_000) for seed in range(60)] + [b"small"] * 3000
    data = _table(image=pa.array(films).dictionary_encode())
    began = time.process_time()
    assert walk(data) == ([(str(row), film) for row, film in enumerate(films)], None)
    assert time.process_time() - began < 4
    monkeypatch.setattr("lungopacity.archive.parquet_entries._DICTIONARY_BYTES", 1_000_000)
    assert walk(data) == ([], ErrorCode.UNSUPPORTED)
    # The limit is for one row group: they are read one after another.
    monkeypatch.setattr("lungopacity.archive.parquet_entries._DICTIONARY_BYTES", 2_000_000)
    images = pa.array(films[:6]).dictionary_encode()
    apart = write_parquet(pa.table({"image": images}), row_group_size=2)
    assert walk(apart) == ([(str(row), film) for row, film in enumerate(films[:6])], None)


def test_one_stored_image_of_many_rows_takes_the_memory_of_one():
    stored = noise(0, 300_000)
    data = _table(image=[stored] * 100)
    assert len(data) < 1_000_000
    before, taken = pa.total_allocated_bytes(), []
    for _, _, film in members(io.BytesIO(data), "x", LIMITS):
        assert film == stored
        taken.append(pa.total_allocated_bytes() - before)
    assert len(taken) == 100
    assert max(taken) < 5_000_000


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[b"1", b"2"]]),
        pa.array([[{"bytes": b"1", "path": "a"}]]),
        pa.array([{"image": {"bytes": b"1"}}]),
        pa.array([[("a", b"1")]], pa.map_(pa.string(), pa.binary())),
    ],
    ids=["list", "list of structs", "struct of structs", "map"],
)
def test_several_images_in_a_row_are_unsupported(column):
    data = _table(images=column, label=[1])
    assert walk(data) == ([], ErrorCode.UNSUPPORTED)
    with pytest.raises(ImageError, match="write one image per row"):
        list(members(io.BytesIO(data), "x", LIMITS))
    # Beside a column of images they are something else, such as masks.
    assert walk(_table(masks=column, image=[b"1"])) == ([("0", b"1")], None)


def test_a_flipped_byte_is_noticed_if_pages_have_checksums():
    films = [noise(seed, 3000) for seed in range(2)]
    table = pa.table({"image": films})
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    data = bytearray(write_parquet(table, row_group_size=1, write_page_checksum=True, **options))
    assert walk(bytes(data)) == ([("0", films[0]), ("1", films[1])], None)
    data[data.index(films[1]) + 1000] ^= 1
    assert walk(bytes(data)) == ([("0", films[0])], ErrorCode.CORRUPT_ARCHIVE)


def test_a_damaged_footer_that_states_fewer_rows_is_noticed():
    films = [b"1", b"2", b"3", b"4", b"5"]
    data = write_parquet(pa.table({"image": films}), store_schema=False)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    five, three = b"\x0a", 0x06  # as Thrift writes them
    lost = 0
    for place in range(footer, len(data) - 8):
        if data[place : place + 1] == five:
            found, error = walk(bytes([*data[:place], three, *data[place + 1 :]]))
            lost += len(found) < 5
            assert len(found) == 5 or error is ErrorCode.CORRUPT_ARCHIVE
    assert lost


def test_a_name_that_is_not_utf8_is_escaped():
    names = pa.array([b"caf\xe9.png", b"a\nb.png"]).view(pa.string())
    data = _table(image=[b"1", b"2"], path=names)
    assert walk(data) == ([("caf\\xe9.png", b"1"), ("a\nb.png", b"2")], None)


@pytest.mark.parametrize("other", [[b"2"], [7]])
def test_two_columns_with_the_name_of_the_images_are_unsupported_and_not_corrupt(other):
    table = pa.Table.from_arrays([pa.array([b"1"]), pa.array(other)], names=["image", "image"])
    with pytest.raises(ImageError, match="another column has the same name") as caught:
        list(members(io.BytesIO(write_parquet(table)), "x", LIMITS))
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_a_dot_in_a_column_name_does_not_mean_a_struct():
    assert walk(_table(**{"film.bytes": [b"1"], "label": [7]})) == ([("0", b"1")], None)
    struct = pa.array([{"bytes": b"1", "path": "a"}])
    assert walk(_table(**{"my.film": struct, "film": [7]})) == ([("a", b"1")], None)


def test_digests_in_a_table_are_not_images():
    digests = pa.array([bytes(32)], pa.binary(32))
    assert walk(_table(sha256=digests, label=[1])) == ([], ErrorCode.NOT_AN_IMAGE)


def test_a_table_without_images_is_not_an_image():
    sheet = _table(image=["a.png"], label=[1])
    assert walk(sheet, "labels.parquet") == ([], ErrorCode.NOT_AN_IMAGE)
    assert walk(make_tar([("l.parquet", sheet), ("a", b"1")])) == (
        [("l.parquet", ErrorCode.NOT_AN_IMAGE), ("a", b"1")],
        None,
    )
