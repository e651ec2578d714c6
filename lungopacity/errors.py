"""The errors a user can meet, and the codes an unreadable image can carry.

Two kinds, kept apart because they end differently:

* `UserError` stops the command: one line that names the thing and says what to do, exit code 2.
* `ImageError` stops nothing: it becomes the `status`, `error_code`, `error_stage` and
  `error_message` columns of that image's own row.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

NOTICE = "Research use only. Not a medical device."
"""Part of every output of the project."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""`errno` of a full disk, or a full quota."""


class UserError(Exception):
    """The user's input or environment cannot be used. The message says what to do."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, outermost first: Ray wraps what a worker raised, sometimes more
    than once."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = getattr(cause, "cause", None) or cause.__cause__


def first_line(error: BaseException, *, with_type: bool = False) -> str:
    """The first line of an error's text, or the name of its type if it has no text. `with_type`:
    put the name of the type before the line."""
    return _line(error, 0, with_type)


def last_line(error: BaseException, *, with_type: bool = False) -> str:
    """The same with the last line, for a text that quotes a traceback: the cause comes last."""
    return _line(error, -1, with_type)


def _line(error: BaseException, index: int, with_type: bool) -> str:
    name, lines = type(error).__name__, str(error).strip().splitlines()
    if not lines:
        return name
    return f"{name}: {lines[index]}" if with_type else lines[index]


class Status(StrEnum):
    """What became of one image of the plan."""

    OK = "ok"
    """Read, checked and scored."""
    REJECTED = "rejected"
    """Read, but it must not be scored."""
    FAILED = "failed"
    """Could not be read. The job then ends with exit code 1."""


class ErrorCode(StrEnum):
    """Why an image has no score. Each member's docstring is its sentence in docs/results.md."""

    MISSING = "missing"
    """The object was listed, but was gone when it was fetched."""
    FORBIDDEN = "forbidden"
    """The storage refused the read."""
    TIMEOUT = "timeout"
    """The storage did not answer in time, after every retry."""
    UNAVAILABLE = "unavailable"
    """The storage or a disk failed or is full, after retries; or the node lacked memory or time."""
    CHANGED = "changed"
    """The object was replaced after it was planned, before or while it was read."""
    DIGEST_MISMATCH = "digest_mismatch"
    """The bytes differ from the stored checksum, after every retry."""
    EMPTY = "empty"
    """The object has no bytes, or the shard no files."""
    NOT_AN_IMAGE = "not_an_image"
    """The bytes carry no signature of a known image format."""
    TRUNCATED = "truncated"
    """The image ends before its pixels do."""
    CORRUPT_IMAGE = "corrupt_image"
    """The format was recognised, but its decoder refused the content."""
    TOO_LARGE = "too_large"
    """More pixels, frames or bytes than the limit allows; refused before memory was allocated."""
    DECOMPRESSION_BOMB = "decompression_bomb"
    """It would unpack to so many times its size that it looks like an attack; it was stopped."""
    UNSUPPORTED_TRANSFER_SYNTAX = "unsupported_transfer_syntax"
    """A DICOM image in an encoding that no installed decoder reads."""
    UNSUPPORTED = "unsupported"
    """A valid file whose format, layout or nesting is not supported, or a key that is no file."""
    ENCRYPTED = "encrypted"
    """A member of a zip that needs a password."""
    CORRUPT_ARCHIVE = "corrupt_archive"
    """A shard that ends early or cannot be walked; its readable members have rows of their own."""
    NO_PIXELS = "no_pixels"
    """A DICOM object of a kind that holds no image (a plan, a waveform, a document)."""
    DICOMDIR = "dicomdir"
    """The directory of a DICOM medium; the files it lists have rows of their own."""
    STRUCTURED_REPORT = "structured_report"
    """A DICOM structured report (SR)."""
    PRESENTATION_STATE = "presentation_state"
    """A DICOM presentation state (PR)."""
    KEY_OBJECT_SELECTION = "key_object_selection"
    """A DICOM key object selection (KO)."""
    WRONG_MODALITY = "wrong_modality"
    """The header names a modality that is not projection radiography."""
    WRONG_BODY_PART = "wrong_body_part"
    """The header names a body part that is not the chest."""
    FOR_PROCESSING = "for_processing"
    """The header says that these are raw detector values (FOR PROCESSING), not for display."""
    LATERAL_VIEW = "lateral_view"
    """The header names a view that is not frontal (lateral, oblique, decubitus)."""
    POOR_QUALITY = "poor_quality"
    """A quality flag that `--reject-quality` names; the `quality_…` columns say which."""
    DECODER_CRASH = "decoder_crash"
    """The decoder's process died on this file, twice; no other file was lost by it."""
    DECODER_TIMEOUT = "decoder_timeout"
    """The decoder used more CPU time on this file than the limit allows, and was killed."""
    READER_CRASH = "reader_crash"
    """Each process that fetched and unpacked this object died; no other image was lost by it."""
    INTERNAL = "internal"
    """A defect of lungopacity itself. Please report it."""


TRANSIENT = frozenset(
    {ErrorCode.TIMEOUT, ErrorCode.UNAVAILABLE, ErrorCode.DIGEST_MISMATCH, ErrorCode.CHANGED}
)
"""Codes that another attempt may well clear."""

OF_STORAGE = TRANSIENT | {ErrorCode.MISSING, ErrorCode.FORBIDDEN, ErrorCode.READER_CRASH}
"""Codes caused by the storage or the node, not by the content: every night tries again."""

OF_VERSION = frozenset(
    {
        ErrorCode.DECODER_CRASH,
        ErrorCode.DECODER_TIMEOUT,
        ErrorCode.INTERNAL,
        # Not of damaged files, but of those that this version cannot read.
        ErrorCode.NOT_AN_IMAGE,
        ErrorCode.UNSUPPORTED,
        ErrorCode.UNSUPPORTED_TRANSFER_SYNTAX,
    }
)
"""Codes that another version of lungopacity may not give: a night with a new one tries again."""

REJECTING = frozenset(
    {
        ErrorCode.NO_PIXELS,
        ErrorCode.DICOMDIR,
        ErrorCode.STRUCTURED_REPORT,
        ErrorCode.PRESENTATION_STATE,
        ErrorCode.KEY_OBJECT_SELECTION,
        ErrorCode.WRONG_MODALITY,
        ErrorCode.WRONG_BODY_PART,
        ErrorCode.FOR_PROCESSING,
        ErrorCode.LATERAL_VIEW,
        ErrorCode.POOR_QUALITY,
    }
)
"""Codes of objects that were read and understood: `rejected`, not `failed`."""


class Stage(StrEnum):
    """The stage at which an image failed or was rejected."""

    FETCH = "fetch"
    UNPACK = "unpack"
    DECODE = "decode"
    SCORE = "score"


class ImageError(Exception):
    """One image cannot be scored. Messages quote no header value, which could name a patient."""

    def __init__(
        self,
        code: ErrorCode,
        stage: Stage,
        message: str,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """`facts`: columns of the image's row that were known by then."""
        super().__init__(message)
        self.code = code
        self.stage = stage
        self.message = message
        self.facts = dict(facts or {})

    @property
    def may_pass(self) -> bool:
        """Whether the storage is the reason, and nothing in the object itself."""
        return self.code in (ErrorCode.TIMEOUT, ErrorCode.UNAVAILABLE)

    @property
    def advice(self) -> str:
        """What to do where the object is a file of ours that nothing can replace."""
        is_damaged = self.code in (ErrorCode.MISSING, ErrorCode.DIGEST_MISMATCH)
        if is_damaged:
            return "restore it"
        if self.code is ErrorCode.FORBIDDEN:
            return "check the credentials and permissions"
        return "try again; check the network, credentials and permissions"

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle carries exceptions between processes, and calls __init__ with `args` alone.
        return ImageError, (self.code, self.stage, self.message, self.facts)


_NOT_UNPICKLED = re.compile(
    r"(Can't get attribute '\w+' on <module|cannot import name '\w+' from) 'lungopacity\b"
    r"|No module named '[\w.]+'"
)
"""What Python says of code of ours that a node does not have."""


def of_other_code(error: BaseException) -> str | None:
    """The message for an error of a Ray node that cannot load the job's code, because it has no or
    another lungopacity; None for any other error.

    Ray passes on only the text of such an error, as of one of its own: it looks like a lost node.
    """
    for cause in causes(error):
        if _NOT_UNPICKLED.search(line := last_line(cause)):
            node = getattr(error, "ip", None) or getattr(cause, "ip", None)
            return (
                f"a Ray node{f' ({node})' if node else ''} lacks the job's code: "
                f"{line.removeprefix('System error: ')}; install requirements.lock and the same "
                "lungopacity on every node, or submit the job with --working-dir"
            )
    return None


def foreseen(error: BaseException) -> str | None:
    """The message for an error that the user can do something about; None for a defect."""
    for cause in causes(error):
        if type(cause) is UserError:
            return str(cause)
        if isinstance(cause, ImageError) and cause.stage is Stage.FETCH:
            return f"the storage failed: {cause.message}; try again"
        if isinstance(cause, ModuleNotFoundError):
            return (
                f"the Python at {sys.executable}, or that of a Ray node, has no module "
                f"'{cause.name}'; install requirements.lock there"
            )
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            where = cause.filename or "where the output or the temporary files (TMPDIR) go"
            return f"no space is left: {where}; free some"
    return of_other_code(error)


def unreadable(uri: str, what: str, error: ImageError) -> UserError:
    """The `UserError` for a file that the user named and that could not be read, with what to do.
    what: says so, such as `labels cannot be read`."""
    is_wrong = error.code in (ErrorCode.MISSING, ErrorCode.UNSUPPORTED)
    mend = "give the path of a file" if is_wrong else error.advice
    return UserError(f"{uri}: {what} ({error.message}); {mend}")
