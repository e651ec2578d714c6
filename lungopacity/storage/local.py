"""A folder on disk as a store."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.storage.interface import ConflictError, ObjectInfo, changed

if TYPE_CHECKING:
    import pyarrow.fs

_FIRST_S, _LAST_S = (
    datetime(year, 1, 1, tzinfo=UTC).timestamp() for year in (datetime.min.year, datetime.max.year)
)


_NO_SUCH_FILE = (errno.ELOOP, errno.ENAMETOOLONG)
"""In addition to the errors that have an exception class of their own."""

_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of FAT, some SMB shares, and buckets that are mounted as folders."""

_COPIES_OF_RAY = "/runtime_resources/working_dir_files/"
"""Part of the path of the folder in which a job runs that was submitted with `--working-dir`: Ray's
copy of that folder, which Ray deletes some time after the job."""


def absolute(path: Path) -> Path:
    """The path with `~` and `..` resolved. Raises `UserError` for the home of an unknown user."""
    try:
        # POSIX lets two leading slashes mean something else, so Python keeps them. Here they mean
        # one, and a place must not have two names.
        return Path("/" + os.path.abspath(path.expanduser()).lstrip("/"))
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such user here; spell the path out") from error


class LocalStore:
    """A folder on disk. The etag is mtime and size: hashing every file in a listing costs too
    much."""

    def __init__(self, root: Path) -> None:
        self.root = absolute(root)
        self.uri = str(self.root)

    def _path(self, key: str) -> Path:
        path = Path(os.path.normpath(self.root / key))
        if not path.is_relative_to(self.root):
            raise UserError(f"key {key!r} leads out of {self.root}")
        return path

    def _key(self, path: Path) -> str:
        # A name that is not valid UTF-8 cannot be stored in any column. Escaped, it is listed and
        # then found missing: the file gets a row, and nothing stops.
        key = path.relative_to(self.root).as_posix()
        return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def _info(self, path: Path, facts: os.stat_result) -> ObjectInfo:
        return ObjectInfo(
            key=self._key(path),
            size_bytes=facts.st_size,
            etag=_etag_of(facts),
            modified_at=_time_of(facts),
        )

    def _listed(self, path: Path) -> Iterator[ObjectInfo]:
        try:
            yield self._info(path, path.stat())
        except OSError as error:
            # A dangling link, or a link to itself, is one unreadable film: no reason to skip it
            # silently, nor to refuse the others.
            if path.is_symlink():
                yield ObjectInfo.gone(self._key(path))
            # A file that is not found was deleted since the folder was read.
            elif not isinstance(error, FileNotFoundError):
                raise

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        # Only the folder that the prefix ends in: results grow, and every commit lists them.
        start = self._path(prefix.rpartition("/")[0])
        try:
            if not _is_folder(start):
                return
            # followlinks: archives are often reached by a symbolic link.
            for folder, subfolders, names in os.walk(
                start, followlinks=True, onerror=_raise_unless_gone
            ):
                subfolders[:] = sorted(
                    name for name in subfolders if not _leads_back(Path(folder) / name)
                )
                for name in sorted(names):
                    path = Path(folder) / name
                    if path.relative_to(self.root).as_posix().startswith(prefix):
                        yield from self._listed(path)
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be listed ({error.strerror}); check its name and "
                "permissions"
            ) from error

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            facts = path.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        except OSError as error:
            if error.errno in _NO_SUCH_FILE:
                return None
            # "Cannot be seen" is not "does not exist": a caller might create the object again.
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); check the disk and its permissions"
            ) from error
        return self._info(path, facts) if stat.S_ISREG(facts.st_mode) else None

    @contextmanager
    def open_local(self, key: str, *, etag: str | None = None) -> Iterator[IO[bytes]]:
        try:
            raw = _UnalteredFile(self._path(key), etag)
        except OSError as error:
            raise _fetch_error_of(error) from error
        except (UserError, ValueError) as error:
            # Keys may come from a list that somebody else wrote.
            raise ImageError(
                ErrorCode.UNSUPPORTED, Stage.FETCH, "the key cannot name a file in the folder"
            ) from error
        with io.BufferedReader(raw) as file:
            if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
                raise _not_regular()
            raw.check()
            yield file

    def read(self, key: str, *, etag: str | None = None) -> bytes:
        return self.read_head(key, -1, etag=etag)

    def read_head(self, key: str, size_bytes: int, *, etag: str | None = None) -> bytes:
        with self.open_local(key, etag=etag) as file:
            try:
                return file.read(size_bytes)
            except OSError as error:
                raise _fetch_error_of(error) from error

    def local_file(self, key: str, target: Path) -> Path:
        with self.open_local(key):
            return self._path(key)

    def write(
        self,
        key: str,
        data: bytes,
        *,
        if_absent: bool = False,
        if_match: str | None = None,
        private: bool = False,
    ) -> None:
        path = self._path(key)
        if _COPIES_OF_RAY in self.uri:
            raise UserError(
                f"{self.uri}: is in Ray's copy of the job's --working-dir, which Ray deletes; give "
                "a place in S3, or a whole path"
            )
        try:
            handle, name = _temporary_in(path.parent, private)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if if_absent:
                    try:
                        _link(name, path)
                    except FileExistsError as error:
                        raise ConflictError(key) from error
                    os.unlink(name)
                elif if_match is not None:
                    self._replace_if(path, name, if_match)
                else:
                    os.replace(name, path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except (FileExistsError, NotADirectoryError) as error:
            files = (above for above in path.parents if above.is_file())
            raise UserError(
                f"{next(files, error.filename)}: is in the way of {path}; move it"
            ) from error
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); check permissions and space"
            ) from error

    def _replace_if(self, path: Path, name: str, etag: str) -> None:
        # A file system has no conditional rename, so conditional writers take turns by this lock.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if not path.is_file() or _etag_of(path.stat()) != etag:
                raise ConflictError(path.name)
            os.replace(name, path)
        finally:
            os.close(folder)

    def now(self) -> datetime:
        # If the folder is mounted from a file server, that server's clock sets the time.
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as probe:
                return _time_of(os.fstat(probe.fileno()))
        except OSError as error:
            raise UserError(
                f"{self.root}: cannot be written ({error.strerror}); check permissions and space"
            ) from error

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise UserError(
                f"{path}: cannot be deleted ({error.strerror}); check its permissions"
            ) from error
        for folder in path.parents:
            if folder == self.root or not folder.is_relative_to(self.root):
                break
            try:
                folder.rmdir()
            except OSError:
                break

    def arrow_filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem(), str(self.root)


def _etag_of(facts: os.stat_result) -> str:
    return f"{facts.st_mtime_ns:x}-{facts.st_size:x}"


def _time_of(facts: os.stat_result) -> datetime:
    """When the file was last modified, UTC."""
    # Damaged metadata may hold years that `datetime` does not have.
    return datetime.fromtimestamp(min(max(facts.st_mtime, _FIRST_S), _LAST_S), UTC)


def _raise_unless_gone(error: OSError) -> None:
    # "Not found" of a folder that others have removed since its parent was read is no error. But a
    # folder whose name is still there is not gone: its file server does not answer.
    if not isinstance(error, FileNotFoundError) or os.path.lexists(error.filename):
        raise error


def _is_folder(path: Path) -> bool:
    """Like `Path.is_dir`, but always raises `OSError` for what cannot be seen. `is_dir` raises or
    returns False, depending on Python's version."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _leads_back(folder: Path) -> bool:
    """Whether `folder` is a link to a folder that contains it, on the path that the walk took."""
    if not folder.is_symlink():
        return False
    target = os.path.realpath(folder)
    return any(Path(os.path.realpath(above)).is_relative_to(target) for above in folder.parents)


class _UnalteredFile(io.FileIO):
    """A file that raises `changed` once it no longer has the etag, even after it was opened. If it
    is overwritten in place, what was read may be half of one film and half of another."""

    def __init__(self, path: Path, etag: str | None) -> None:
        # Without O_NONBLOCK, opening a pipe waits for a writer, maybe for ever.
        super().__init__(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
        self._etag = etag

    def check(self) -> None:
        """Raises `ImageError` (`changed`) if the file no longer has the etag."""
        if self._etag is not None and _etag_of(os.fstat(self.fileno())) != self._etag:
            raise changed()

    def readinto(self, buffer: Any, /) -> int | None:
        size = super().readinto(buffer)
        self.check()
        return size

    def readall(self) -> bytes:
        data = super().readall()
        self.check()
        return data


def _temporary_in(folder: Path, private: bool) -> tuple[int, str]:
    # Not by `mkstemp`, whose files only their owner may read: results are meant for others, and to
    # learn the umask, a process has to change it, for its other threads as well.
    def made() -> tuple[int, str]:
        folder.mkdir(0o700 if private else 0o777, parents=True, exist_ok=True)
        name = str(folder / f".tmp-{uuid.uuid4().hex}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        return os.open(name, flags, 0o600 if private else 0o666), name

    try:
        return made()
    except FileNotFoundError:
        # Another process has just deleted the last file of the folder, and the folder with it.
        return made()


def _link(name: str, path: Path) -> None:
    """Give the file its name if that is free. A rename would replace what is there; of several
    links to one name, exactly one succeeds."""
    try:
        os.link(name, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        raise UserError(
            f"{path.parent}: its file system has no hard links, which jobs need to keep out of "
            "each other's way; use a folder on another file system, or S3"
        ) from error


def _not_regular() -> ImageError:
    return ImageError(ErrorCode.UNSUPPORTED, Stage.FETCH, "not a regular file")


def _fetch_error_of(error: OSError) -> ImageError:
    if error.errno == errno.ENAMETOOLONG:
        return ImageError(ErrorCode.UNSUPPORTED, Stage.FETCH, "the key is too long for a file name")
    if error.errno == errno.ENXIO:  # a socket
        return _not_regular()
    if error.errno == errno.ELOOP or isinstance(
        error, FileNotFoundError | IsADirectoryError | NotADirectoryError
    ):
        return ImageError(ErrorCode.MISSING, Stage.FETCH, "no such file")
    if isinstance(error, PermissionError):
        return ImageError(ErrorCode.FORBIDDEN, Stage.FETCH, "permission denied")
    return ImageError(ErrorCode.UNAVAILABLE, Stage.FETCH, f"disk error: {error.strerror}")
