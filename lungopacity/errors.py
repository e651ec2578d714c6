"""The errors a user can meet, and the codes an unreadable image can carry.

Two kinds, kept apart because they end differently:

* `UserError` stops the command: one line that names the thing and the mend, exit code 2.
* `ImageError` stops nothing: it becomes the `status`, `error_code`, `error_stage` and
  `error_message` columns of that image's own row.
"""

from __future__ import annotations

from enum import StrEnum

NOTICE = "Research use only. Not a medical device."
"""Stands on every output of the project."""


class UserError(Exception):
    """The user's input or surroundings cannot be worked with; the message carries the mend."""


class Status(StrEnum):
    """What became of one image of the plan."""

    OK = "ok"
    """Read, judged and scored."""
    REJECTED = "rejected"
    """Read, and found to be something that this model must not score."""
    FAILED = "failed"
    """Could not be read. Makes the job end with exit code 1."""


class ErrorCode(StrEnum):
    """Why an image has no score. Each member's docstring is the sentence in the README's table."""

    MISSING = "missing"
    """The object was listed, but was gone when it was fetched."""
    FORBIDDEN = "forbidden"
    """The storage refused the read."""
    TIMEOUT = "timeout"
    """The storage did not answer in time, after every retry."""
    UNAVAILABLE = "unavailable"
    """The storage answered with server errors or broken connections, after every retry."""
    CHANGED = "changed"
    """The object was replaced between the plan and the fetch."""
    DIGEST_MISMATCH = "digest_mismatch"
    """The bytes differ from the stored checksum, after every retry."""
    EMPTY = "empty"
    """The object has no bytes."""
    NOT_AN_IMAGE = "not_an_image"
    """The bytes carry no signature of a known image format."""
    TRUNCATED = "truncated"
    """The image ends before its pixels do."""
    CORRUPT_IMAGE = "corrupt_image"
    """The format was recognised, but its decoder refused the content."""
    TOO_LARGE = "too_large"
    """More pixels, or bytes, than the limit allows; refused before memory was taken."""
    NO_PIXELS = "no_pixels"
    """A DICOM object that holds no pixel data."""
    UNSUPPORTED = "unsupported"
    """A valid file of a kind that is not decoded (transfer syntax, sample layout, frames)."""
    CORRUPT_ARCHIVE = "corrupt_archive"
    """A shard that ends early or cannot be walked; its readable members have rows of their own."""
    INTERNAL = "internal"
    """A defect of lungopacity itself. Please report it."""


TRANSIENT = frozenset(
    {ErrorCode.TIMEOUT, ErrorCode.UNAVAILABLE, ErrorCode.DIGEST_MISMATCH, ErrorCode.CHANGED}
)
"""Codes that another attempt may well mend."""


class Stage(StrEnum):
    """Where on its way an image stopped."""

    FETCH = "fetch"
    UNPACK = "unpack"
    DECODE = "decode"
    SCORE = "score"


class ImageError(Exception):
    """One image cannot be read. Messages quote no header value: it could name a patient."""

    def __init__(self, code: ErrorCode, stage: Stage, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.stage = stage
        self.message = message

    def __reduce__(self) -> tuple[type[ImageError], tuple[ErrorCode, Stage, str]]:
        # Exceptions travel between Ray processes by pickle, which calls __init__ with args alone.
        return ImageError, (self.code, self.stage, self.message)
