import hashlib
import hmac
import stat

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lungopacity
from lungopacity.errors import UserError
from lungopacity.screening.pseudonyms import (
    Pseudonyms,
    read_key_map,
    read_pseudonyms,
    write_key_map,
)
from lungopacity.storage import LocalStore, open_store
from lungopacity.storage.probe import check_writable
from tests.parquet_pages import with_flipped_page

KEY = b"0123456789abcdef0123456789abcdef"
SCHEMA = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),
        pa.field("member", pa.string()),
        pa.field("rows", pa.int32()),
    ]
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(), st.none() | st.text()), max_size=20))
def test_names_become_the_standard_hmac_and_the_map_gives_them_back(names):
    columns = [
        pa.array([image for image, _ in names], pa.string()),
        pa.array([member for _, member in names], pa.string()),
        pa.array(range(len(names)), pa.int32()),
    ]
    hashed, kept = Pseudonyms(KEY).hash_names(pa.table(columns, schema=SCHEMA))
    assert hashed.schema == SCHEMA

    def expected(name):
        return name and hmac.new(KEY, name.encode(), hashlib.sha256).hexdigest()

    for row, (image, member) in zip(hashed.to_pylist(), names, strict=True):
        assert kept[row["image"]] == image
        assert (row["member"] is None) == (member is None)
        if image:
            assert row["image"] == expected(image)
        if member:
            assert row["member"] == expected(member)
            assert kept[row["member"]] == member


def test_the_map_is_kept_and_read_back(store_uri):
    names = {"ab": "Doe^John/1.dcm", "cd": "ü"}
    write_key_map(store_uri, "run-1", names)
    assert read_key_map(store_uri, "run-1") == names
    with pytest.raises(UserError, match=r"run-2\.parquet: the names behind the hashes"):
        read_key_map(store_uri, "run-2")
    store = open_store(store_uri)
    store.write("run-3.parquet", with_flipped_page(store.read("run-1.parquet")))
    with pytest.raises(UserError, match=r"run-3\.parquet: the names .* restore the file"):
        read_key_map(store_uri, "run-3")


def test_on_disk_the_map_is_for_its_owner_alone(tmp_path):
    uri = tmp_path / "map"
    check_writable(str(uri), private=True)  # as a run does, long before it writes
    write_key_map(str(uri), "run-1", {"ab": "Doe^John"})
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (uri, uri / "run-1.parquet")]
    assert modes == [0o700, 0o600]


def test_the_fingerprint_tells_keys_apart_and_the_key_is_never_printed():
    one, other = Pseudonyms(KEY), Pseudonyms(KEY[::-1])
    assert one.fingerprint != other.fingerprint
    assert KEY.decode() not in repr(one)
    assert "0123" not in repr(one)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the key cannot be read \\(no such file\\); give the path"),
        (b"  short\n", "the key has 5 bytes"),
    ],
)
def test_an_invalid_key_is_refused(tmp_path, content, message):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_pseudonyms(str(path), None)


def test_white_space_around_a_key_does_not_count(tmp_path):
    (tmp_path / "key").write_bytes(KEY + b"\n")
    assert read_pseudonyms(str(tmp_path / "key"), None).key == KEY


def test_results_that_hide_all_names_show_none_because_an_option_was_forgotten(place, hidden):
    place.night(**hidden)
    for options in ({}, {"dry_run": True}, {"hmac_key": hidden["hmac_key"]}):
        with pytest.raises(
            UserError, match=r"all runs there hide the names .* give --hash-keys, or"
        ):
            place.night(**options)
    with pytest.raises(UserError, match="give --hash-keys"):
        lungopacity.screen(place.archive.uri, place.model, place.results)
    assert lungopacity.runs(place.results).num_rows == 1
    assert place.night(**hidden).runs[0].images == 0


def test_a_night_with_a_forgotten_option_writes_no_name(place, hidden):
    """Readers of these results may see none, and the archive may be a single object."""
    one = f"{place.archive.uri}/Adams.png"
    lungopacity.nightly(one, place.model, place.results, **hidden)
    seen = []
    write = LocalStore.write

    def watched(store, key, data, **condition) -> None:
        seen.append(data)
        write(store, key, data, **condition)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "write", watched)
        for archive in (one, f"{place.archive.uri}/none.png"):
            with pytest.raises(UserError, match=r"give --hash-keys|nothing lies there"):
                lungopacity.nightly(archive, place.model, place.results)
            assert place.status()["state"] == "failed"
    assert len(seen) >= 6
    assert not any(b".png" in data for data in seen)
