import errno
import fcntl
import os
import threading
import time
from datetime import UTC, datetime, timedelta

import pyarrow.fs
import pytest

from lungopacity.errors import ErrorCode, UserError
from lungopacity.storage import ConflictError, LocalStore, open_store, split_uri
from lungopacity.storage.probe import check_conditions
from tests.fault_proxy import code_of

ODD_KEYS = [
    "a.png",
    "deep/er/b.dcm",
    "with space/ü é.png",
    "per%20cent#and?mark.png",
    "dots.in.name.tar.gz",
]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_what_is_written_is_listed_and_read_back(store_uri, key):
    store = open_store(store_uri)
    store.write(key, b"content")
    (found,) = store.list()
    assert found.key == key
    assert found.size_bytes == 7
    assert abs(found.modified_at - datetime.now(UTC)) < timedelta(minutes=5)
    assert store.read(key, etag=found.etag) == b"content"
    head = store.head(key)
    assert head.etag == found.etag
    # S3 gives whole seconds for one object, and fractions in a listing.
    assert abs(head.modified_at - found.modified_at) < timedelta(seconds=1)


def test_a_prefix_narrows_the_listing(store_uri):
    store = open_store(store_uri)
    for key in ("runs/a.json", "runs/b.json", "runs-old/c.json", "_work/d"):
        store.write(key, b"x")
    assert sorted(item.key for item in store.list("runs/")) == ["runs/a.json", "runs/b.json"]
    assert [item.key for item in store.list("runs/b")] == ["runs/b.json"]


def test_every_object_of_a_long_listing_is_listed_once(s3_uri):
    store = open_store(s3_uri)
    keys = {f"{number:05d}" for number in range(1100)}  # more than one page of 1,000
    for key in keys:
        store.write(key, b"x")
    listed = [item.key for item in store.list()]
    assert len(listed) == 1100
    assert set(listed) == keys


def test_an_object_named_like_a_folder_is_listed_unless_it_is_empty(s3_uri):
    """Consoles make empty ones. The test server cannot store others, so the page is made up."""
    store = open_store(s3_uri)
    facts = {"ETag": '"0"', "LastModified": datetime(2026, 1, 1, tzinfo=UTC)}
    page = [{"Key": f"{store.prefix}{key}", "Size": size, **facts}
            for key, size in (("marker/", 0), ("film/", 9), ("empty", 0))]  # fmt: skip
    assert [item.key for item in store._objects({"Contents": page})] == ["film/", "empty"]


def test_an_empty_place_lists_nothing(store_uri):
    assert list(open_store(store_uri).list()) == []


def test_a_missing_object_has_the_code_missing(store_uri):
    store = open_store(store_uri)
    assert store.head("none") is None
    assert code_of(lambda: store.read("none")) is ErrorCode.MISSING


def test_a_replaced_object_is_not_taken_for_the_planned_one(store_uri):
    store = open_store(store_uri)
    store.write("a", b"first")
    planned = store.head("a").etag
    store.write("a", b"second")
    assert code_of(lambda: store.read("a", etag=planned)) is ErrorCode.CHANGED

    def open_it():
        with store.open_local("a", etag=planned):
            pass

    assert code_of(open_it) is ErrorCode.CHANGED


@pytest.mark.parametrize("what", ["time", "size"])
def test_a_replaced_file_is_noticed_by_its_time_or_its_size_alone(tmp_path, what):
    """Exports may write several films of one size in a second, and copies may keep an old time."""
    film, store = tmp_path / "a", LocalStore(tmp_path)
    film.write_bytes(b"first")
    os.utime(film, ns=(0, 10**18))
    planned = store.head("a").etag
    film.write_bytes(b"again" if what == "time" else b"larger")
    os.utime(film, ns=(0, 10**18 + (10**6 if what == "time" else 0)))
    assert code_of(lambda: store.read("a", etag=planned)) is ErrorCode.CHANGED


@pytest.mark.parametrize("read", ["read()", "read(3)", "read1(3)", "readinto(bytearray(3))"])
def test_a_file_that_changes_while_it_is_read_is_not_taken_for_the_planned_one(tmp_path, read):
    film, store = tmp_path / "a", LocalStore(tmp_path)
    film.write_bytes(b"first")
    os.utime(film, ns=(0, 10**18))

    def overtaken(etag: str | None) -> None:
        with store.open_local("a", etag=etag) as file:
            with open(film, "r+b") as writer:
                writer.write(b"s")
            eval(f"file.{read}", {"file": file})

    planned = store.head("a").etag
    assert code_of(lambda: overtaken(planned)) is ErrorCode.CHANGED
    overtaken(None)


def test_conditional_writers_to_a_folder_wait_for_each_other(tmp_path):
    store, met = LocalStore(tmp_path), []
    store.write("lock", b"mine")
    etag = store.head("lock").etag

    def write() -> None:
        try:
            store.write("lock", b"yours", if_match=etag)
        except ConflictError as error:
            met.append(error)

    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    thread = threading.Thread(target=write)
    thread.start()
    time.sleep(0.3)
    store.write("lock", b"another's")
    os.close(other)
    thread.join()
    assert met
    assert store.read("lock") == b"another's"


def test_if_absent_lets_one_of_many_writers_win(store_uri):
    store = open_store(store_uri)
    won = []

    def write(number: int) -> None:
        try:
            open_store(store_uri).write("lock", str(number).encode(), if_absent=True)
            won.append(number)
        except ConflictError:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("lock") == str(won[0]).encode()


def test_open_local_gives_a_seekable_file(store_uri):
    store = open_store(store_uri)
    store.write("a", b"0123456789")
    with store.open_local("a") as file:
        file.seek(5)
        assert file.read() == b"56789"
        file.seek(0)
        assert file.read(2) == b"01"
    assert store.read_head("a", 3) == b"012"
    assert store.read_head("a", 20, etag=store.head("a").etag) == b"0123456789"
    assert code_of(lambda: store.read_head("a", 3, etag="0" * 32)) is ErrorCode.CHANGED


def test_deleting_what_is_already_gone_is_no_error(store_uri):
    store = open_store(store_uri)
    store.write("x/y", b"1")
    store.delete("x/y")
    store.delete("x/y")
    assert list(store.list()) == []
    with pytest.raises(ConflictError):
        store.write("y", b"1", if_match="0" * 32)
    store.write("x", b"1")
    store.delete("x")
    # The folder itself stays: something may be mounted on it.
    assert not isinstance(store, LocalStore) or store.root.is_dir()


def test_arrow_sees_the_same_objects(store_uri):
    store = open_store(store_uri)
    store.write("x/y.bin", b"arrow")
    filesystem, root = store.arrow_filesystem()
    assert isinstance(filesystem, pyarrow.fs.FileSystem)
    with filesystem.open_input_file(f"{root}/x/y.bin") as file:
        assert file.read() == b"arrow"


def test_a_key_cannot_lead_out_of_a_folder(tmp_path):
    store = open_store(str(tmp_path / "root"))
    with pytest.raises(UserError, match="leads out"):
        store.write("../outside", b"x")


def test_a_write_leaves_no_temporary_file_and_honours_the_umask(tmp_path, monkeypatch):
    store, old = LocalStore(tmp_path), os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.delattr(os, "umask")  # to change it would change it for other threads, too
            store.write("a", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    store.write("b", b"x", if_absent=True)
    for key in ("a", "b"):
        with pytest.raises(ConflictError):
            store.write(key, b"y", if_absent=True)
    with pytest.raises(ConflictError):
        store.write("a", b"y", if_match="another")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_reported_before_a_run_needs_them(
    tmp_path, monkeypatch, code
):
    check_conditions(str(tmp_path / "new" / "results"))

    def link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    for act in (
        lambda: LocalStore(tmp_path).write("a", b"x", if_absent=True),
        lambda: check_conditions(str(tmp_path)),
    ):
        with pytest.raises(UserError, match=r"its file system has no hard links, .*; use a folder"):
            act()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    real, synced = os.fsync, []

    def fsync(file: int) -> None:
        synced.append((os.fstat(file).st_size, (tmp_path / "a").exists()))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    LocalStore(tmp_path).write("a", b"0123456789")
    assert synced == [(10, False)]


def test_only_the_owner_can_read_a_private_object(tmp_path):
    LocalStore(tmp_path).write("keys/a", b"x", private=True)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("keys", "keys/a")] == [
        0o700, 0o600,
    ]  # fmt: skip


def test_a_folder_that_is_removed_during_a_write_is_made_again(tmp_path, monkeypatch):
    make = os.open
    swept = []

    def sweeping(path, flags, *more, **named):
        if flags & os.O_CREAT and not swept:
            swept.append(os.rmdir(os.path.dirname(path)))
        return make(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", sweeping)
    open_store(str(tmp_path)).write("_lock/nightly.json", b"x")
    assert swept
    assert (tmp_path / "_lock/nightly.json").read_bytes() == b"x"


def test_a_relative_root_may_lead_upwards(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    open_store("../data").write("a", b"x")
    assert (tmp_path / "data" / "a").read_bytes() == b"x"
    assert open_store("../data").uri == str(tmp_path / "data")
    assert split_uri("../data/a") == (str(tmp_path / "data"), "a")


@pytest.mark.parametrize("uri", ["//data/films", "///data//films/", "file:////data/films"])
def test_a_folder_has_one_uri_however_many_slashes_lead_to_it(uri):
    assert open_store(uri).uri == "/data/films"


def test_nothing_is_written_below_an_empty_folder_name(s3_uri):
    """Arrow refuses such keys, and some servers list them under other names."""
    with pytest.raises(UserError, match=r"x//y cannot be written: .* leave out the second slash"):
        open_store(f"{s3_uri}/x//y").write("a", b"x")


def test_file_uris_are_paths(tmp_path):
    folder = tmp_path / "with space"
    open_store(str(folder)).write("a", b"x")
    assert open_store(folder.as_uri()).read("a") == b"x"


def test_a_file_uri_may_name_one_object_with_escaped_letters(tmp_path):
    film = tmp_path / "my 50% film?.png"
    film.write_bytes(b"x")
    parent, name = split_uri(film.as_uri())
    assert name == film.name
    assert open_store(parent).read(name) == b"x"
    # Keys of S3 are not escaped.
    assert split_uri("s3://b/my%20film.png")[1] == "my%20film.png"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/x", "not supported"),
        ("s3://", "no bucket"),
        ("file://host/x", "three slashes"),
        ("s3://bad bucket/x", "'bad bucket' is not a bucket name, which has letters"),
        ("s3:/bucket/x", "write s3://bucket/prefix"),
        ("s3//bucket/x", "write s3://bucket/prefix"),
        ("", "'' is neither a path nor a URI; give"),
        ("a\0b", "is neither a path nor a URI"),
        # As Python gives a name in Latin-1 on the command line.
        ("/films/s\udce4tze", "is not valid UTF-8; give it by a link with another name"),
        ("s3://b/s\udce4tze", "is not valid UTF-8"),
        ("~nosuchuser/x", "~nosuchuser/x: there is no such user here"),
    ],
)
def test_an_unusable_uri_is_refused_with_what_to_do(uri, message):
    with pytest.raises(UserError, match=message):
        open_store(uri)
    with pytest.raises(UserError, match=message):
        split_uri(uri)


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "S3://bucket"])
def test_a_bucket_has_no_parent_folder(uri):
    with pytest.raises(UserError, match="name a file in it, as in s3://bucket/key"):
        split_uri(uri)


def test_a_scheme_may_have_capitals(tmp_path):
    assert open_store("S3://b/X").uri == "s3://b/X"
    assert split_uri("S3://b/X") == ("s3://b", "X")
    assert open_store(f"FILE://{tmp_path}").uri == str(tmp_path)
    assert split_uri("file:///labels.csv") == ("/", "labels.csv")


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://b/p/labels.csv", ("s3://b/p", "labels.csv")),
        ("s3://b/labels.csv", ("s3://b", "labels.csv")),
        ("/data/labels.csv", ("/data", "labels.csv")),
    ],
)
def test_a_uri_splits_into_folder_and_name(uri, parts):
    assert split_uri(uri) == parts
