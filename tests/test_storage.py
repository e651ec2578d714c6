import ctypes
import errno
import fcntl
import io
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.fs
import pytest

from lungopacity.errors import OF_STORAGE, ErrorCode, ImageError, UserError
from lungopacity.storage import ConflictError, LocalStore, open_store, split_uri
from lungopacity.storage.probe import check_conditions

ODD_KEYS = [
    "a.png",
    "deep/er/b.dcm",
    "with space/ü é.png",
    "per%20cent#and?mark.png",
    "dots.in.name.tar.gz",
]


def code_of(act) -> ErrorCode:
    with pytest.raises(ImageError) as caught:
        act()
    return caught.value.code


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
    # S3 tells whole seconds of one object, and parts of them in a list.
    assert abs(head.modified_at - found.modified_at) < timedelta(seconds=1)


def test_a_prefix_narrows_the_listing(store_uri):
    store = open_store(store_uri)
    for key in ("runs/a.json", "runs/b.json", "runs-old/c.json", "_work/d"):
        store.write(key, b"x")
    assert sorted(item.key for item in store.list("runs/")) == ["runs/a.json", "runs/b.json"]
    assert [item.key for item in store.list("runs/b")] == ["runs/b.json"]


def test_every_object_of_a_long_listing_comes_once(s3_uri):
    store = open_store(s3_uri)
    keys = {f"{number:05d}" for number in range(1100)}  # over one page of 1,000
    for key in keys:
        store.write(key, b"x")
    listed = [item.key for item in store.list()]
    assert len(listed) == 1100
    assert set(listed) == keys


def test_an_object_named_like_a_folder_is_listed_where_it_holds_something(s3_uri):
    """Consoles make empty ones. The server of the tests keeps no other: this is its page."""
    store = open_store(s3_uri)
    facts = {"ETag": '"0"', "LastModified": datetime(2026, 1, 1, tzinfo=UTC)}
    page = [{"Key": f"{store.prefix}{key}", "Size": size, **facts}
            for key, size in (("marker/", 0), ("film/", 9), ("empty", 0))]  # fmt: skip
    assert [item.key for item in store._objects({"Contents": page})] == ["film/", "empty"]


def test_an_empty_place_lists_nothing(store_uri):
    assert list(open_store(store_uri).list()) == []


def test_a_missing_object_has_its_code(store_uri):
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
def test_of_a_replaced_file_time_or_size_alone_tells(tmp_path, what):
    """Exports write films of one size in a second, and copies keep the time of what was there."""
    film, store = tmp_path / "a", LocalStore(tmp_path)
    film.write_bytes(b"first")
    os.utime(film, ns=(0, 10**18))
    planned = store.head("a").etag
    film.write_bytes(b"again" if what == "time" else b"larger")
    os.utime(film, ns=(0, 10**18 + (10**6 if what == "time" else 0)))
    assert code_of(lambda: store.read("a", etag=planned)) is ErrorCode.CHANGED


def test_a_file_that_is_written_to_while_it_is_read_is_not_taken_for_the_planned_one(
    tmp_path, monkeypatch
):
    film, store = tmp_path / "a", LocalStore(tmp_path)
    film.write_bytes(b"first")
    os.utime(film, ns=(0, 10**18))
    planned = store.head("a").etag

    class Overtaken(io.FileIO):
        def read(self, size=-1):
            with open(film, "r+b") as file:
                file.write(b"s")
            return super().read(size)

    monkeypatch.setattr("lungopacity.storage.local._open_at_once", Overtaken)
    assert code_of(lambda: store.read("a", etag=planned)) is ErrorCode.CHANGED
    assert store.read("a") == b"sirst"


def test_whoever_replaces_on_a_condition_waits_for_another_who_does(tmp_path):
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


def test_delete_is_quiet_about_what_is_gone(store_uri):
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


def test_a_write_leaves_no_temporary_file_and_honours_the_umask(tmp_path):
    store, old = LocalStore(tmp_path), os.umask(0o022)
    try:
        store.write("a", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
    store.write("b", b"x", if_absent=True)
    for key in ("a", "b"):
        with pytest.raises(ConflictError):
            store.write(key, b"y", if_absent=True)
    with pytest.raises(ConflictError):
        store.write("a", b"y", if_match="another")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_told_before_a_run_needs_them(
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
        with pytest.raises(
            UserError, match=r"its file system has no hard links, .*; take a folder"
        ):
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


def test_what_is_private_is_seen_by_nobody_else(tmp_path):
    LocalStore(tmp_path).write("keys/a", b"x", private=True)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("keys", "keys/a")] == [
        0o700, 0o600,
    ]  # fmt: skip


def test_a_folder_that_is_swept_away_under_a_write_is_made_again(tmp_path, monkeypatch):
    make = tempfile.mkstemp
    swept = []

    def sweeping(**where):
        if not swept:
            swept.append(where["dir"].rmdir())
        return make(**where)

    monkeypatch.setattr(tempfile, "mkstemp", sweeping)
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


def test_nothing_is_written_where_it_would_not_be_found(s3_uri):
    """Arrow refuses such keys, and some servers list them under others."""
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
    # Keys of S3 are what they are.
    assert split_uri("s3://b/my%20film.png")[1] == "my%20film.png"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/x", "not supported"),
        ("s3://", "no bucket"),
        ("file://host/x", "three slashes"),
        ("s3://bad bucket/x", "'bad bucket' is no bucket's name, which has letters"),
        ("s3:/bucket/x", "write s3://bucket/prefix"),
        ("", "'' is no path and no URI; give one"),
        ("a\0b", "is no path"),
        ("~nosuchuser/x", "~nosuchuser/x: there is no such user here"),
    ],
)
def test_an_unusable_uri_is_refused_with_the_mend(uri, message):
    with pytest.raises(UserError, match=message):
        open_store(uri)
    with pytest.raises(UserError, match=message):
        split_uri(uri)


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "S3://bucket"])
def test_a_bucket_is_no_file(uri):
    with pytest.raises(UserError, match="name a file in it, as s3://bucket/key"):
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


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A folder that may not be entered, also where the tests are run by root."""
    # Not in `tmp_path`: nobody but its owner may enter that.
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(place, "archive", "forbidden")
        folder.mkdir(parents=True)
        (folder / "a").write_bytes(b"x")
        folder.chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        yield folder
        if is_root:
            os.seteuid(0)
        folder.chmod(0o700)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda store: list(store.list()), "cannot be listed"),
        (lambda store: list(store.list("deeper/")), "cannot be listed"),
        (lambda store: store.head("a"), "cannot be read"),
        (lambda store: store.write("a", b"x"), "cannot be written"),
        (lambda store: store.delete("a"), "cannot be deleted"),
        (lambda store: store.now(), "cannot be written"),
    ],
)
def test_what_is_forbidden_is_not_taken_for_absent(forbidden, act, message):
    store = LocalStore(forbidden)
    with pytest.raises(UserError, match=rf"{message} \(Permission denied\); check .*permissions"):
        act(store)
    assert code_of(lambda: store.read("a")) is ErrorCode.FORBIDDEN


def test_an_archive_is_not_listed_without_what_is_forbidden_in_it(forbidden):
    with pytest.raises(UserError, match=r"/forbidden: cannot be listed \(Permission denied\)"):
        list(LocalStore(forbidden.parent).list())


@pytest.fixture
def dead_mount(tmp_path: Path) -> Iterator[Path]:
    """A folder whose file server does not answer: FUSE, as that of s3fs or sshfs that has died."""
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/fuse")
    folder, server = tmp_path / "mount", os.open("/dev/fuse", os.O_RDWR)
    folder.mkdir()
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
    refused = libc.mount(b"fuse", os.fsencode(folder), b"fuse", 0, options)
    os.close(server)
    if refused:
        pytest.skip("may not mount")
    yield folder
    libc.umount2(os.fsencode(folder), 2)  # MNT_DETACH


def test_what_a_dead_file_server_holds_is_not_taken_for_absent(dead_mount):
    store = LocalStore(dead_mount)
    for act in (lambda: store.head("a"), lambda: list(store.list()), lambda: store.write("a", b"")):
        with pytest.raises(UserError, match="Transport endpoint is not connected"):
            act()
    assert code_of(lambda: store.read("a")) is ErrorCode.UNAVAILABLE
    with pytest.raises(UserError, match="mount: cannot be listed"):
        list(LocalStore(dead_mount.parent).list())


def test_what_goes_while_a_folder_is_listed_is_passed_over(tmp_path):
    for name in ("a/1", "a/2", "b/1", "c/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listing = LocalStore(tmp_path).list()
    assert next(listing).key == "a/1"
    (tmp_path / "a" / "2").unlink()
    shutil.rmtree(tmp_path / "b")
    assert [item.key for item in listing] == ["c/1"]


def test_what_lies_where_a_folder_is_to_be_is_named(tmp_path):
    store = LocalStore(tmp_path)
    store.write("a", b"x")
    for key in ("a/b", "a/b/c/d"):
        for if_absent in (False, True):
            with pytest.raises(UserError, match=rf"/a: is in the way of .*/{key}; move it"):
                store.write(key, b"x", if_absent=if_absent)
    with pytest.raises(UserError, match=r"/a: cannot be written \(File exists\)"):
        LocalStore(tmp_path / "a").now()
    store.delete("a/b")  # is not there
    assert list(LocalStore(tmp_path / "a").list()) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="other systems have no such file")
def test_a_disk_error_while_a_file_is_read_has_its_code():
    assert code_of(lambda: LocalStore(Path("/proc/self")).read("mem")) is ErrorCode.UNAVAILABLE


def test_a_path_that_is_too_long_is_said(tmp_path):
    assert LocalStore(tmp_path).head("x" * 300) is None
    with pytest.raises(UserError, match=r"cannot be listed \(File name too long\)"):
        list(LocalStore(tmp_path / ("x/" * 3000)).list())


@pytest.mark.parametrize("key", ["../x", "/etc/hostname", "x" * 300, "a\0b"])
def test_a_key_of_no_file_is_not_tried_again_and_no_defect(tmp_path, key):
    assert code_of(lambda: LocalStore(tmp_path).read(key)) is ErrorCode.UNSUPPORTED
    assert ErrorCode.UNSUPPORTED not in OF_STORAGE


def test_a_file_name_in_no_encoding_is_listed_and_not_lost(tmp_path: Path):
    (Path(os.fsencode(tmp_path).decode()) / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    (found,) = open_store(str(tmp_path)).list()
    found.key.encode("utf-8")
    assert code_of(lambda: open_store(str(tmp_path)).read(found.key)) is ErrorCode.MISSING


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="other file systems keep no such dates")
def test_a_date_that_is_none_is_listed_as_the_nearest_one():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for name, seconds in (("a", 9 * 10**11), ("b", -(9 * 10**11)), ("c", 0)):
            Path(folder, name).write_bytes(b"x")
            os.utime(Path(folder, name), (seconds, seconds))
        found = sorted(open_store(folder).list(), key=lambda item: item.key)
        assert [item.modified_at.year for item in found] == [9999, 1, 1970]
        assert open_store(folder).read("a", etag=found[0].etag) == b"x"


def test_a_link_that_leads_nowhere_is_listed_and_found_missing(tmp_path):
    """git-annex and DVC leave such links where a film was not fetched."""
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "1.dcm").write_bytes(b"x")
    (folder / "2.dcm").symlink_to("/nowhere/2.dcm")
    (folder / "3.dcm").symlink_to("3.dcm")
    (folder / os.fsdecode(b"caf\xe9.dcm")).symlink_to("/nowhere/4.dcm")
    store = open_store(str(tmp_path))
    listed = {item.key: item for item in store.list()}
    assert sorted(listed) == ["a/1.dcm", "a/2.dcm", "a/3.dcm", "a/caf\\xe9.dcm"]
    assert (store.head("a/2.dcm"), store.head("a/3.dcm")) == (None, None)
    assert store.read("a/1.dcm", etag=listed.pop("a/1.dcm").etag) == b"x"
    for key, item in listed.items():
        assert code_of(lambda key=key, item=item: store.read(key, etag=item.etag)) is (
            ErrorCode.MISSING
        )


def test_a_folder_is_listed_once_whatever_links_lead_back_to_it(tmp_path):
    archive = tmp_path / "archive"
    for name in ("a", "b"):
        (archive / name).mkdir(parents=True)
        (archive / name / "1.dcm").write_bytes(b"x")
    (archive / "a" / "itself").symlink_to(".")
    (archive / "a" / "above").symlink_to("../..")
    (archive / "b" / "round").symlink_to("../c")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.dcm").write_bytes(b"x")
    (tmp_path / "elsewhere" / "back").symlink_to("../archive/b")
    (archive / "c").symlink_to("../elsewhere")
    listed = [item.key for item in open_store(str(archive)).list()]
    assert sorted(listed) == ["a/1.dcm", "b/1.dcm", "b/round/2.dcm", "c/2.dcm", "c/back/1.dcm"]


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "device.dcm").symlink_to("/dev/zero")
    (tmp_path / "folder.dcm").mkdir()
    store = open_store(str(tmp_path))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.dcm"))
        for name in ("pipe.dcm", "device.dcm", "socket.dcm"):
            with pytest.raises(ImageError, match="no regular file") as caught:
                store.read(name)
            assert caught.value.code is ErrorCode.UNSUPPORTED
    assert code_of(lambda: store.read("folder.dcm")) is ErrorCode.MISSING
    assert store.head("folder.dcm") is None
