"""Whether labelled films can be trusted to measure a model: copies, torn patients, conflicting
labels, and what gives the label away without a look at the lungs.

Array names carry their shape: N images, H height, W width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from lungopacity.archive.content import ReadSettings, rules_from
from lungopacity.dataset.classes import class_names_of, classes_of_all, classes_of_labels
from lungopacity.dataset.manifest import SITE, assign_splits, read_labels, select_classes
from lungopacity.dataset.pixels import LabelledPixels, load_pixels
from lungopacity.errors import NOTICE, UserError
from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.shortcuts import Shortcut, shortcuts_of
from lungopacity.evaluation.subgroups import check_columns, column_groups
from lungopacity.progress import Progress
from lungopacity.radiograph import Preprocessing
from lungopacity.runtime import ray_session
from lungopacity.storage import open_store
from lungopacity.storage.probe import check_writable
from lungopacity.words import printable

SIDE = 64
"""Of the films that are compared, in pixels."""
READ_SIDE = 224
"""Of the films as they are read: black borders are found to a pixel of these."""
NEAR_BITS = 6
"""Of the 64 of a perceptual hash: two films that differ in more are no copies of each other."""
NEAR_CORRELATION = 0.99
"""Of two films of 64 x 64 pixels. Of 7,629 lung-field films no two reach it: those of two patients
0.978 at most, of one patient 0.988."""
NOT_LOOKED_FOR = "films that are turned, of inverted grey values, or cut to a part"
SUSPICIOUS_AUC = 0.7
"""Of a fact that knows nothing of the lungs: from here on a model may live on it."""


@dataclass(frozen=True)
class Copies:
    """Two labelled images that show one film."""

    first: str
    second: str
    kind: str
    """exact: the same bytes; near: pixels that are all but the same."""
    splits: tuple[str, str]
    labels: tuple[str, str]


@dataclass(frozen=True)
class Audit:
    """What was found."""

    images: int
    unreadable: int
    rejected: int
    """Read, and left out by a rule."""
    blank: int
    """Films of one grey value, or nearly, where no rule leaves them out. They are no near copies:
    each looks like any other."""
    torn_patients: int
    """Patients with films in more than one split."""
    unknown_patients: int
    """Films without a patient: whether they are torn cannot be known."""
    copies: tuple[Copies, ...]
    shortcuts: tuple[Shortcut, ...]
    """Of each class that was tried against the rest."""
    positive_class: str | None
    """The one that was tried; None: each."""
    intervals: str
    """How the 95 % intervals were made."""
    split_given: bool
    """The labels have splits; without, they are those that `train` makes."""

    @property
    def leaking(self) -> tuple[Copies, ...]:
        """Copies on two sides of a split."""
        return tuple(pair for pair in self.copies if len(set(pair.splits)) > 1)

    @property
    def conflicts(self) -> tuple[Copies, ...]:
        """Copies with two labels: at least one is wrong."""
        return tuple(pair for pair in self.copies if len(set(pair.labels)) > 1)

    @property
    def leaks(self) -> bool:
        """Whether any figure of a model on these splits would flatter it."""
        return bool(self.torn_patients or self.leaking)

    def summary(self) -> str:
        """What was found, a line each, the worst first."""
        kinds = [pair.kind for pair in self.copies]
        lines = [
            f"{self.images} labelled images, {self.unreadable} more unreadable"
            + (f", {self.rejected} rejected" if self.rejected else ""),
            f"patients in two splits: {self.torn_patients}"
            + (f" ({self.unknown_patients} films name none)" if self.unknown_patients else ""),
            f"copies: {kinds.count('exact')} exact, {kinds.count('near')} near; across splits: "
            f"{len(self.leaking)}; with two labels: {len(self.conflicts)}",
            f"  (not looked for: {NOT_LOOKED_FOR})",
            *(
                [f"blank films: {self.blank}; look at them, or leave them out: --reject-quality"]
                if self.blank
                else []
            ),
            *(
                printable(
                    f"  {pair.kind}: {pair.first} ({pair.labels[0]}, {pair.splits[0]}) = "
                    f"{pair.second} ({pair.labels[1]}, {pair.splits[1]})"
                )
                for pair in list(dict.fromkeys([*self.leaking, *self.conflicts]))[:10]
            ),
            f"AUC for {self.positive_class or 'the class told best'} of what does not look at the "
            "lungs",
            f"(95 % intervals: {self.intervals}):",
        ]
        for item in self._highest():
            interval = "" if item.ci_low is None else f" ({item.ci_low:.3f} to {item.ci_high:.3f})"
            warning = "  <- a model may live on it" if item.auc >= SUSPICIOUS_AUC else ""
            of = "" if self.positive_class else f" for {item.class_name}"
            lines.append(f"  {item.fact:27} {item.auc:.3f}{interval}{of}{warning}")
        return "\n".join([*lines, self._verdict(), NOTICE])

    def _highest(self) -> Iterator[Shortcut]:
        """Of each fact, of the class that it tells best."""
        for fact in dict.fromkeys(item.fact for item in self.shortcuts):
            yield max((s for s in self.shortcuts if s.fact == fact), key=lambda item: item.auc)

    def _verdict(self) -> str:
        parts = ["leakage found" if self.leaks else "no leakage found"]
        one = "one patient_id and one split"
        if not self.split_given:
            parts[0] += (
                ", across the splits that `train` makes of these classes (the labels have none)"
            )
            one = "one patient_id"
        if self.leaking:
            parts.append(f"remove copies, or give them {one}")
        if self.torn_patients:
            parts.append("give all films of a patient one split")
        return "; ".join(parts)

    def to_json(self) -> str:
        """Everything."""
        return json.dumps({"notice": NOTICE, **asdict(self), "leaks": self.leaks}, indent=2)


def audit(
    images: Sequence[str],
    labels: str,
    *,
    classes: Sequence[str] | None = None,
    positive_class: str | None = None,
    output: str | None = None,
    by: Sequence[str] = (),
    accept: Sequence[str] = (),
    reject_quality: Sequence[str] | None = None,
) -> Audit:
    """Read every labelled film once, small, and look for what would flatter a model.

    images, labels: as for training; None of `classes` takes every label as one. `positive_class`:
    whose shortcuts are looked for; None takes each of more than two classes, of two Lung_Opacity
    or else the last. `output`: URI of a folder for audit.json. `by`: columns of the labels to try
    as predictors of the label, besides view, sex, age and `site`: see `subgroups`. Raises
    `UserError`.
    """
    check_columns(by)
    accepted, rejecting = rules_from(accept, reject_quality)
    frame = read_labels(labels, by)
    known = sorted(frame["label"].unique())
    label_map = classes_of_all(known) if classes is None else classes_of_labels(classes, known)
    names = class_names_of(label_map)
    positive = _positive_class(names, positive_class)
    frame = select_classes(frame, label_map, labels)
    split_given = bool(frame["split"].notna().all())
    frame = assign_splits(frame, labels)
    told = _told(frame, by, labels)
    # It must not meet the columns of what is read.
    frame = frame.drop(columns=[name for name in told if name != "split"])
    rules = ReadSettings(Preprocessing(READ_SIDE), accept=accepted, reject_quality=rejecting)
    if output is not None:
        check_writable(output)
    with ray_session():
        data = load_pixels(images, frame, names, rules, labels)
    small = replace(data, pixels_NHW=_squares(data.pixels_NHW, Preprocessing(SIDE)))
    resampling = Resampling.of(data.images["patient_id"].tolist())
    told = told.loc[data.images["image"]]
    found = Audit(
        images=len(data.images),
        unreadable=len(data.unreadable),
        rejected=len(data.rejected),
        blank=int(data.images["quality_blank"].sum()),
        torn_patients=_torn(data.images),
        unknown_patients=int(data.images["patient_id"].isna().sum()),
        copies=tuple(_copies(data)),
        shortcuts=tuple(
            shortcut
            for name in (names if positive is None else [positive])
            for shortcut in shortcuts_of(small, name, told, resampling)
        ),
        positive_class=positive,
        intervals=resampling.described(),
        split_given=split_given,
    )
    if output is not None:
        open_store(output).write("audit.json", found.to_json().encode())
    return found


def _positive_class(names: Sequence[str], asked: str | None) -> str | None:
    """The one whose shortcuts are looked for; None: each. Raises `UserError` for one that is
    none."""
    if asked is None and len(names) == 2:
        return "Lung_Opacity" if "Lung_Opacity" in names else names[-1]
    if asked is not None and asked not in names:
        raise UserError(
            f"positive class '{asked}' is none of the classes ({', '.join(names)}); give one of "
            "them as --positive-class"
        )
    return asked


def _told(frame: pd.DataFrame, by: Sequence[str], labels: str) -> pd.DataFrame:
    """What the labels alone tell of each image: `site`, of however many, and what is asked for."""
    columns = [name for name in by if name != SITE]
    told = column_groups(frame.drop(columns=SITE, errors="ignore"), columns, labels)
    if SITE in frame:
        told.insert(0, SITE, frame[SITE].to_numpy())
    return told


def _torn(images: pd.DataFrame) -> int:
    known = images.dropna(subset=["patient_id"])
    return int((known.groupby("patient_id")["split"].nunique() > 1).sum())


def _copies(data: LabelledPixels) -> Iterator[Copies]:
    frame = data.images
    exact: set[tuple[int, int]] = set()
    for rows in frame.groupby("content_sha256").indices.values():
        exact |= {(int(rows[0]), int(row)) for row in rows[1:]}
    judged = np.flatnonzero(~frame["quality_blank"].to_numpy(bool))
    # Where there is no blank film, without a copy of them all: of 100,000 films 5 GB.
    pixels_NHW = data.pixels_NHW[judged] if len(judged) < len(frame) else data.pixels_NHW
    pairs_near = near_pairs(pixels_NHW)
    near = {(int(judged[first]), int(judged[second])) for first, second in pairs_near} - exact
    # Of films that are exact copies of each other, one is enough to compare with.
    repeated = {second for _, second in exact}
    near = {pair for pair in near if not repeated & set(pair)}
    for kind, pairs in (("exact", exact), ("near", near)):
        for first, second in sorted(pairs):
            a, b = frame.iloc[first], frame.iloc[second]
            yield Copies(
                a["image"],
                b["image"],
                kind,
                (str(a["split"]), str(b["split"])),
                (str(a["label"]), str(b["label"])),
            )


def perceptual_hashes(pixels_NHW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """(n,) uint64: the signs of the lowest 8 x 8 frequencies against their median (Zauner 2010,
    Implementation and Benchmarking of Perceptual Image Hash Functions, section 3.2.2)."""
    from scipy.fft import dctn

    low_NHW = dctn(pixels_NHW.astype(np.float32), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    # The first is the mean brightness; its sign says nothing.
    bits_NB = low_NHW > np.median(low_NHW[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits_NB, axis=1).view(">u8").astype(np.uint64).ravel()


def near_pairs(pixels_NHW: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Pairs of rows whose films are all but the same: made lighter, smaller, compressed anew,
    mirrored, or set into a black border (of lung-field films four in five of these).

    pixels_NHW: of `READ_SIDE`, as they are. They are compared as they are, and without their black
    borders; with each other, and with the mirror image. Candidates by their hashes, then by the
    correlation of their pixels.
    """
    found: set[tuple[int, int]] = set()
    with Progress("Comparing images", 4 * len(pixels_NHW), "comparisons") as progress:
        for crop_borders in (False, True):
            small = Preprocessing(SIDE, crop_borders=crop_borders)
            films_NHW = _squares(pixels_NHW, small)
            for others_NHW in (films_NHW, _squares(pixels_NHW[:, :, ::-1], small)):
                for row, copies in _alike(films_NHW, others_NHW):
                    found |= {(row, other) for other in copies}
                    progress.advance(1)
    yield from sorted(found)


def _squares(
    pixels_NHW: npt.NDArray[np.uint8], preprocessing: Preprocessing
) -> npt.NDArray[np.uint8]:
    """(n, image_size, image_size) uint8: each film once more, by other settings."""
    size = preprocessing.image_size
    squares_NHW = np.empty((len(pixels_NHW), size, size), np.uint8)
    for row, film_HW in enumerate(pixels_NHW):
        squares_NHW[row] = preprocessing.square(np.ascontiguousarray(film_HW))
    return squares_NHW


def _alike(
    first_NHW: npt.NDArray[np.uint8], second_NHW: npt.NDArray[np.uint8]
) -> Iterator[tuple[int, list[int]]]:
    """Each row of the first, and the later rows of the second that are all but its film."""
    first_N, second_N = perceptual_hashes(first_NHW), perceptual_hashes(second_NHW)
    for row in range(len(first_N)):
        differ = np.bitwise_count(second_N[row + 1 :] ^ first_N[row])
        near_M = np.flatnonzero(differ <= NEAR_BITS) + row + 1
        alike_M = correlations(first_NHW[row], second_NHW[near_M]) >= NEAR_CORRELATION
        yield row, near_M[alike_M].tolist()


def correlations(
    film_HW: npt.NDArray[np.uint8], others_MHW: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    """(M,) of a film's pixels with those of each other. Of a film of one grey value, which has
    none, 1 where the other is the same, else 0."""
    # Together: of 100,000 lung-field films ten million pairs have hashes as near as that.
    a_F = film_HW.astype(np.float32).ravel()
    others_MF = others_MHW.reshape(len(others_MHW), film_HW.size).astype(np.float32)
    a_F -= a_F.mean()
    others_MF -= others_MF.mean(axis=1, keepdims=True)
    length_M = np.sqrt((a_F @ a_F) * np.einsum("mf,mf->m", others_MF, others_MF))
    same_M = (others_MHW == film_HW).all(axis=(1, 2)).astype(np.float32)
    found_M: npt.NDArray[np.float32] = np.divide(
        others_MF @ a_F, length_M, out=same_M, where=length_M > 0
    )
    return found_M
