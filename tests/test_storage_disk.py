"""Disks that misbehave: files that are forbidden, on a dead server, odd, or gone meanwhile."""

import ctypes
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lungopacity.errors import OF_STORAGE, ErrorCode, ImageError, UserError
from lungopacity.storage import ConflictError, LocalStore, open_store
from tests.fault_proxy import code_of


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A folder that may not be entered, even if root runs the tests."""
    # Not in `tmp_path`: only its owner may enter that.
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
def test_a_forbidden_folder_is_not_taken_for_absent(forbidden, act, message):
    store = LocalStore(forbidden)
    with pytest.raises(UserError, match=rf"{message} \(Permission denied\); check .*permissions"):
        act(store)
    assert code_of(lambda: store.read("a")) is ErrorCode.FORBIDDEN


def test_an_archive_with_a_forbidden_folder_cannot_be_listed(forbidden):
    with pytest.raises(UserError, match=r"/forbidden: cannot be listed \(Permission denied\)"):
        list(LocalStore(forbidden.parent).list())


@pytest.fixture
def dead_mount(tmp_path: Path) -> Iterator[Path]:
    """A folder whose file server does not answer: a FUSE mount, as of a dead s3fs or sshfs."""
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


def test_files_on_a_dead_file_server_are_not_taken_for_absent(dead_mount):
    store = LocalStore(dead_mount)
    for act in (lambda: store.head("a"), lambda: list(store.list()), lambda: store.write("a", b"")):
        with pytest.raises(UserError, match="Transport endpoint is not connected"):
            act()
    assert code_of(lambda: store.read("a")) is ErrorCode.UNAVAILABLE
    with pytest.raises(UserError, match="mount: cannot be listed"):
        list(LocalStore(dead_mount.parent).list())


def test_files_that_are_deleted_during_a_listing_are_left_out(tmp_path):
    for name in ("a/1", "a/2", "b/1", "c/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listing = LocalStore(tmp_path).list()
    assert next(listing).key == "a/1"
    (tmp_path / "a" / "2").unlink()
    shutil.rmtree(tmp_path / "b")
    assert [item.key for item in listing] == ["c/1"]


def test_a_file_where_a_folder_is_needed_is_named(tmp_path):
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


def test_a_path_that_is_too_long_is_reported(tmp_path):
    assert LocalStore(tmp_path).head("x" * 300) is None
    with pytest.raises(UserError, match=r"cannot be listed \(File name too long\)"):
        list(LocalStore(tmp_path / ("x/" * 3000)).list())


@pytest.mark.parametrize("key", ["../x", "/etc/hostname", "x" * 300, "a\0b"])
def test_a_key_that_cannot_name_a_file_is_neither_retried_nor_a_defect(tmp_path, key):
    assert code_of(lambda: LocalStore(tmp_path).read(key)) is ErrorCode.UNSUPPORTED
    assert ErrorCode.UNSUPPORTED not in OF_STORAGE


def test_a_file_name_that_is_not_utf8_is_listed_and_not_lost(tmp_path: Path):
    (Path(os.fsencode(tmp_path).decode()) / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    (found,) = open_store(str(tmp_path)).list()
    found.key.encode("utf-8")
    assert code_of(lambda: open_store(str(tmp_path)).read(found.key)) is ErrorCode.MISSING


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="other file systems keep no such dates")
def test_an_impossible_date_is_listed_as_the_nearest_possible_one():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for name, seconds in (("a", 9 * 10**11), ("b", -(9 * 10**11)), ("c", 0)):
            Path(folder, name).write_bytes(b"x")
            os.utime(Path(folder, name), (seconds, seconds))
        found = sorted(open_store(folder).list(), key=lambda item: item.key)
        assert [item.modified_at.year for item in found] == [9999, 1, 1970]
        assert open_store(folder).read("a", etag=found[0].etag) == b"x"


def test_a_link_that_leads_nowhere_is_listed_and_found_missing(tmp_path):
    """git-annex and DVC leave such links in place of films that were not fetched."""
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
def test_a_file_that_is_not_regular_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "device.dcm").symlink_to("/dev/zero")
    (tmp_path / "folder.dcm").mkdir()
    store = open_store(str(tmp_path))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.dcm"))
        for name in ("pipe.dcm", "device.dcm", "socket.dcm"):
            with pytest.raises(ImageError, match="not a regular file") as caught:
                store.read(name)
            assert caught.value.code is ErrorCode.UNSUPPORTED
    assert code_of(lambda: store.read("folder.dcm")) is ErrorCode.MISSING
    assert store.head("folder.dcm") is None


def test_what_is_written_into_rays_copy_of_a_working_dir_would_be_lost(tmp_path, monkeypatch):
    """A submitted job runs there, and a relative path means that folder."""
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    (copy / "labels.csv").write_bytes(b"x")
    assert open_store(".").read("labels.csv") == b"x"
    with pytest.raises(UserError, match=r"_ray_pkg_1/report: is in Ray's copy of .* S3, or"):
        open_store("report").write("table1.txt", b"x")
    open_store(str(tmp_path / "report")).write("table1.txt", b"x")


def test_a_file_that_is_gone_again_was_there_all_the_same(tmp_path, monkeypatch):
    """A lock that its holder gives up at the moment at which another job is refused it."""
    store = LocalStore(tmp_path)
    store.write("lock", b"x")
    link = os.link

    def late(name, path) -> None:
        try:
            link(name, path)
        finally:
            store.delete("lock")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", late)
        with pytest.raises(ConflictError):
            store.write("lock", b"y", if_absent=True)
    store.write("lock", b"y", if_absent=True)
    assert [item.key for item in store.list()] == ["lock"]
