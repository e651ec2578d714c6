"""Audit labelled films before they measure a model: copies, patients in two splits, conflicting
labels, and facts that predict the label without a look at the lungs.

Array names carry their shape: N images, H height, W width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from lungopacity.archive.content import ReadSettings, rules_from
from lungopacity.dataset.classes import (
    class_names_of,
    classes_of_all,
    classes_of_labels,
    positive_class_of,
)
from lungopacity.dataset.manifest import SITE, assign_splits, read_labels, select_classes
from lungopacity.dataset.pixels import LabelledPixels, load_pixels
from lungopacity.errors import NOTICE
from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.shortcuts import Shortcut, shortcuts_of
from lungopacity.evaluation.subgroups import check_columns, column_groups
from lungopacity.progress import Progress
from lungopacity.radiograph import Preprocessing
from lungopacity.runtime import ray_session
from lungopacity.storage import open_store
from lungopacity.storage.probe import check_writable
from lungopacity.words import counted, printable

SIDE = 64
"""Side of the films when they are compared, in pixels."""
READ_SIDE = 224
"""Side of the films as they are read, in pixels. Black borders are found at this resolution."""
NEAR_BITS = 6
"""Two films whose 64-bit perceptual hashes differ in more bits are not copies of each other."""
NEAR_CORRELATION = 0.99
"""Least correlation of near copies at 64 x 64 pixels. Of 7,629 lung-field films, those of two
patients have at most 0.978. Those of one patient have at most 0.988, but for one pair that reaches
0.994 once stretched."""
NOT_LOOKED_FOR = "films that are rotated, inverted, or cropped to a part"
_SHOWN = 10
"""On a terminal, the most pairs of copies in two splits, pairs with two labels, and patients."""
SUSPICIOUS_AUC = 0.7
"""AUC of a fact that is not about the lungs, from which on a model may rely on that fact."""


@dataclass(frozen=True)
class Copies:
    """Two labelled images that show the same film."""

    first: str
    second: str
    kind: str
    """exact: the same bytes; near: almost the same pixels."""
    splits: tuple[str, str]
    labels: tuple[str, str]


@dataclass(frozen=True)
class TornPatient:
    """A patient with films in more than one split, told by a film of each of two of these: no
    report names patients."""

    first: str
    second: str
    splits: tuple[str, str]


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    images: int
    unreadable: int
    rejected: int
    """Films that were read, and left out by a rule."""
    blank: int
    """Films of one grey value, or nearly, if no rule leaves them out. They do not count as near
    copies, because all blank films look alike."""
    torn: tuple[TornPatient, ...]
    unknown_patients: int
    """Films without a patient id, which cannot be checked for that."""
    copies: tuple[Copies, ...]
    shortcuts: tuple[Shortcut, ...]
    """For each class that was tested against the rest."""
    positive_class: str | None
    """The class that was tested; None if each was."""
    intervals: str
    """How the 95 % intervals were computed."""
    split_given: bool
    """Whether the labels have splits. If not, the splits are those that `train` would make."""

    @property
    def torn_patients(self) -> int:
        """Number of patients with films in more than one split."""
        return len(self.torn)

    @property
    def leaking(self) -> tuple[Copies, ...]:
        """Copies in two different splits."""
        return tuple(pair for pair in self.copies if len(set(pair.splits)) > 1)

    @property
    def conflicts(self) -> tuple[Copies, ...]:
        """Copies with two different labels, of which at least one is wrong."""
        return tuple(pair for pair in self.copies if len(set(pair.labels)) > 1)

    @property
    def leaks(self) -> bool:
        """Whether splits share patients or films, which makes every model look too good."""
        return bool(self.torn or self.leaking)

    def summary(self) -> str:
        """The findings as text for a terminal."""
        kinds = [pair.kind for pair in self.copies]
        worst = list(dict.fromkeys([*self.leaking[:_SHOWN], *self.conflicts[:_SHOWN]]))
        others = len(self.copies) - len(worst)
        lines = [
            f"{self.images} labelled images, {self.unreadable} more unreadable"
            + (f", {self.rejected} rejected" if self.rejected else ""),
            f"patients in two splits: {self.torn_patients}"
            + (
                f" ({self.unknown_patients} films have no patient_id)"
                if self.unknown_patients
                else ""
            ),
            *(
                printable(
                    f"  one patient: {one.first} ({one.splits[0]}), {one.second} ({one.splits[1]})"
                )
                for one in self.torn[:_SHOWN]
            ),
            *_more(len(self.torn) - _SHOWN, "patient"),
            f"copies: {kinds.count('exact')} exact, {kinds.count('near')} near; across splits: "
            f"{len(self.leaking)}; with two labels: {len(self.conflicts)}",
            f"  (not looked for: {NOT_LOOKED_FOR})",
            *(
                [f"blank films: {self.blank}; look at them, or leave them out (--reject-quality)"]
                if self.blank
                else []
            ),
            *(
                printable(
                    f"  {pair.kind}: {pair.first} ({pair.labels[0]}, {pair.splits[0]}) = "
                    f"{pair.second} ({pair.labels[1]}, {pair.splits[1]})"
                )
                for pair in worst
            ),
            *_more(others, "pair"),
            f"AUC for {self.positive_class or 'the class predicted best'} of facts that are not "
            "about the lungs",
            f"(95 % intervals: {self.intervals}):",
        ]
        for item in self._highest():
            interval = "" if item.ci_low is None else f" ({item.ci_low:.3f} to {item.ci_high:.3f})"
            warning = ""
            if item.auc >= SUSPICIOUS_AUC:
                # Of 40 films whose borders tell nothing, the border's AUC is that high 1 time in 5.
                is_chance = item.ci_low is not None and item.ci_low <= 0.5
                warning = "  <- may be chance" if is_chance else "  <- a model may rely on it"
            of = "" if self.positive_class else f" for {item.class_name}"
            lines.append(printable(f"  {item.fact:27} {item.auc:.3f}{interval}{of}{warning}"))
        return "\n".join([*lines, self._verdict(), NOTICE])

    def _highest(self) -> Iterator[Shortcut]:
        """For each fact, the shortcut of the class that it predicts best."""
        for fact in dict.fromkeys(item.fact for item in self.shortcuts):
            yield max((s for s in self.shortcuts if s.fact == fact), key=lambda item: item.auc)

    def _verdict(self) -> str:
        parts = ["leakage found" if self.leaks else "no leakage found"]
        one = "one patient_id and one split"
        if not self.split_given:
            parts[0] += (
                ", across the splits that `train` would make of these classes (the labels have "
                "none)"
            )
            one = "one patient_id"
        if self.leaking:
            parts.append(f"remove copies, or give them {one}")
        if self.torn:
            parts.append("give all films of a patient one split")
        return "; ".join(parts)

    def to_json(self) -> str:
        """All findings, for audit.json."""
        facts = asdict(self) | {"torn_patients": self.torn_patients, "leaks": self.leaks}
        return json.dumps({"notice": NOTICE, **facts}, indent=2)


def _more(others: int, what: str) -> list[str]:
    """The line about what is not shown, if there is anything."""
    return [f"  {counted(others, f'other {what}')}: --json shows all"] if others > 0 else []


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
    """Read every labelled film once, at low resolution, and look for what would make a model look
    too good.

    images, labels: as for training. `classes`: as for training; None makes each label a class.
    `positive_class`: the class whose shortcuts are looked for; None is each class if there are more
    than two, else Lung_Opacity or the last. `output`: URI of a folder for audit.json. `by`: columns
    of the labels to test as predictors of the label, besides view, sex, age and `site`: see
    `subgroups`. Raises `UserError`.
    """
    check_columns(by)
    accepted, rejecting = rules_from(accept, reject_quality)
    frame = read_labels(labels, by)
    known = sorted(frame["label"].unique())
    label_map = classes_of_all(known) if classes is None else classes_of_labels(classes, known)
    names = class_names_of(label_map)
    of_each = positive_class is None and len(names) > 2
    positive = None if of_each else positive_class_of(names, positive_class)
    frame = select_classes(frame, label_map, labels)
    split_given = bool(frame["split"].notna().all())
    frame = assign_splits(frame, labels)
    facts = _facts_of_labels(frame, by, labels)
    # Dropped, because they could clash with the columns that reading adds.
    frame = frame.drop(columns=[name for name in facts if name != "split"])
    rules = ReadSettings(Preprocessing(READ_SIDE), accept=accepted, reject_quality=rejecting)
    if output is not None:
        check_writable(output)
    with ray_session():
        data = load_pixels(images, frame, names, rules, labels)
    small = replace(data, pixels_NHW=_whole(data.pixels_NHW))
    resampling = Resampling.of(data.images["patient_id"].tolist())
    facts = facts.loc[data.images["image"]]
    found = Audit(
        images=len(data.images),
        unreadable=len(data.unreadable),
        rejected=len(data.rejected),
        blank=int(data.images["quality_blank"].sum()),
        torn=tuple(_torn(data.images)),
        unknown_patients=int(data.images["patient_id"].isna().sum()),
        copies=tuple(_copies(data)),
        shortcuts=tuple(
            shortcut
            for name in (names if positive is None else [positive])
            for shortcut in shortcuts_of(small, name, facts, resampling)
        ),
        positive_class=positive,
        intervals=resampling.described(),
        split_given=split_given,
    )
    if output is not None:
        open_store(output).write("audit.json", found.to_json().encode())
    return found


def _facts_of_labels(frame: pd.DataFrame, by: Sequence[str], labels: str) -> pd.DataFrame:
    """The columns of the labels file to test, a row per image: `site`, however many there are, and
    those of `by`."""
    columns = [name for name in by if name != SITE]
    facts = column_groups(frame.drop(columns=SITE, errors="ignore"), columns, labels)
    if SITE in frame:
        facts.insert(0, SITE, frame[SITE].to_numpy())
    return facts


def _torn(images: pd.DataFrame) -> Iterator[TornPatient]:
    known = images.dropna(subset=["patient_id"]).drop_duplicates(["patient_id", "split"])
    for _, films in known[known["patient_id"].duplicated(keep=False)].groupby("patient_id"):
        (first, one), (second, other), *_ = films[["image", "split"]].itertuples(index=False)
        yield TornPatient(str(first), str(second), (str(one), str(other)))


def _copies(data: LabelledPixels) -> Iterator[Copies]:
    frame = data.images
    exact: set[tuple[int, int]] = set()
    for rows in frame.groupby("content_sha256").indices.values():
        exact |= {(int(rows[0]), int(row)) for row in rows[1:]}
    judged = np.flatnonzero(~frame["quality_blank"].to_numpy(bool))
    # Without blank films the array is not copied: 100,000 films take 5 GB.
    pixels_NHW = data.pixels_NHW[judged] if len(judged) < len(frame) else data.pixels_NHW
    pairs_near = near_pairs(pixels_NHW)
    near = {(int(judged[first]), int(judged[second])) for first, second in pairs_near} - exact
    # Of films that are exact copies of each other, only one is compared with others.
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
    """(N,) uint64: for each of the lowest 8 x 8 frequencies, whether it exceeds their median
    (Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash Functions, section
    3.2.2)."""
    from scipy.fft import dctn

    low_NHW = dctn(pixels_NHW.astype(np.float32), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    # The first frequency is the mean brightness, so the median leaves it out.
    bits_NB = low_NHW > np.median(low_NHW[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits_NB, axis=1).view(">u8").astype(np.uint64).ravel()


def near_pairs(pixels_NHW: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Pairs of rows whose films are almost the same: brightened, resized, recompressed, mirrored,
    stretched to another aspect ratio, or set into a black border (of lung-field films, it finds 49
    in 50 of the latter two).

    pixels_NHW: films of side `READ_SIDE`. They are compared whole, and as `_stretched` shows them,
    with each other and with the mirror images. Similar hashes make candidates; the correlation of
    their pixels decides.
    """
    found: set[tuple[int, int]] = set()
    with Progress("Comparing images", 4 * len(pixels_NHW), "comparisons") as progress:
        for shown in (_whole, _stretched):
            films_NHW = shown(pixels_NHW)
            for others_NHW in (films_NHW, shown(pixels_NHW[:, :, ::-1])):
                for row, copies in _alike(films_NHW, others_NHW):
                    found |= {(row, other) for other in copies}
                    progress.advance(1)
    yield from sorted(found)


def _whole(pixels_NHW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(N, SIDE, SIDE) uint8: the films, shrunk."""
    return _each(pixels_NHW, Preprocessing(SIDE).square)


def _stretched(pixels_NHW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(N, SIDE, SIDE) uint8: what lies within the films' black borders, stretched to a square. Many
    sets hold films that were resized to a square, whatever their aspect ratio was."""
    from PIL import Image

    cropping = Preprocessing(SIDE, crop_borders=True)

    def square(film_HW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        inner = Image.fromarray(np.ascontiguousarray(cropping.crop(film_HW)))
        return np.asarray(inner.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.uint8)

    return _each(pixels_NHW, square)


def _each(
    pixels_NHW: npt.NDArray[np.uint8],
    square: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]],
) -> npt.NDArray[np.uint8]:
    """(N, SIDE, SIDE) uint8: `square` of each film."""
    squares_NHW = np.empty((len(pixels_NHW), SIDE, SIDE), np.uint8)
    for row, film_HW in enumerate(pixels_NHW):
        squares_NHW[row] = square(np.ascontiguousarray(film_HW))
    return squares_NHW


def _alike(
    first_NHW: npt.NDArray[np.uint8], second_NHW: npt.NDArray[np.uint8]
) -> Iterator[tuple[int, list[int]]]:
    """Yields each row of the first, with the later rows of the second that show almost its film."""
    first_N, second_N = perceptual_hashes(first_NHW), perceptual_hashes(second_NHW)
    for row in range(len(first_N)):
        differ = np.bitwise_count(second_N[row + 1 :] ^ first_N[row])
        near_M = np.flatnonzero(differ <= NEAR_BITS) + row + 1
        alike_M = correlations(first_NHW[row], second_NHW[near_M]) >= NEAR_CORRELATION
        yield row, near_M[alike_M].tolist()


def correlations(
    film_HW: npt.NDArray[np.uint8], others_MHW: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    """(M,) correlation of a film's pixels with those of each other film. If either has a single
    grey value, it is not defined: 1 if both are the same, else 0."""
    # Computed in one go: of 100,000 lung-field films, ten million pairs have hashes that near.
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
