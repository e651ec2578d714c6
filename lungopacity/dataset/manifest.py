"""The labels file: which images, of which class, in which split. Checked before any pixel is
read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from lungopacity.archive.names import names_by_ending
from lungopacity.dataset.tables import read_table
from lungopacity.errors import UserError
from lungopacity.radiograph import MAX_AGE_YEARS, years_of
from lungopacity.words import counted

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 0
"""Seed of drawn splits: they are the same for all models, whatever seed these are trained with, so
that models can be compared and averaged."""
FACT_COLUMNS = ("view_position", "patient_sex", "patient_age_years")
"""Optional columns by which evaluation forms subgroups."""
SITE = "site"
"""Optional column, where a film was taken; evaluation forms subgroups by it, too."""
TEXTS = ("image", "label", "patient_id", SITE, "split", "view_position", "patient_sex")
"""Columns whose values are text."""
_MOST_SHOWN = 20
"""Most labels in one message."""
_TERMS = {
    "view_position": {"PA": "PA", "AP": "AP"},
    "patient_sex": {"M": "M", "F": "F", "O": "O", "MALE": "M", "FEMALE": "F", "OTHER": "O"},
}
"""By words in capitals, the values that DICOM headers have for them, so that a subgroup is the same
whether labels or headers tell it."""


def read_labels(uri: str, by: Sequence[str] | None = None) -> pd.DataFrame:
    """The labels file, CSV or Parquet: columns `image`, `label`, and the optional ones, null where
    the file lacks them.

    by: further columns to keep, in which case `site` is kept, too; None keeps no others. Raises
    `UserError` where the file is absent, lacks a column or spells it differently, names an image
    twice, or has a split other than train, validation and test.
    """
    return checked_labels(read_table(uri, "labels", TEXTS), uri, by)


def checked_labels(frame: pd.DataFrame, uri: str, by: Sequence[str] | None = None) -> pd.DataFrame:
    """`read_labels` for a table that was read already. uri: what messages call it."""
    _check_spelling(frame, uri, by or ())
    for column in ("image", "label", *(by or ())):
        # View, sex and age may also come from the films' headers.
        if column not in frame and column not in FACT_COLUMNS:
            raise UserError(
                f"{uri}: has no column '{column}' (it has: {', '.join(map(str, frame.columns))})"
            )
    if frame.empty:
        raise UserError(f"{uri}: has no rows")
    bare = frame[["image", "label"]].isna().any(axis=1).reset_index(drop=True)
    if bare.any():
        first = int(bare.to_numpy().argmax())
        image = frame["image"].iloc[first]
        raise UserError(
            f"{uri}: {counted(int(bare.sum()), 'row')} without image or label, such as "
            + (f"row {first + 1}" if pd.isna(image) else f"that of {image}")
            + "; fill or remove them"
        )
    twice = frame.loc[frame["image"].duplicated(), "image"].unique()
    if len(twice):
        raise UserError(
            f"{uri}: more than one row names {counted(len(twice), 'image')}, such as {twice[0]}; "
            "keep one row for each"
        )
    for column in ("split", "patient_id", *FACT_COLUMNS):
        if column not in frame:
            frame[column] = None
    splits = set(frame["split"].dropna())
    if not splits <= set(SPLITS):
        wrong = ", ".join(shown(split) for split in sorted(map(str, splits - set(SPLITS))))
        raise UserError(
            f"{uri}: unknown split {wrong}; the splits are {', '.join(SPLITS)}, spelt exactly so"
        )
    # Exports of fixed width pad with spaces, which would make two patients of one.
    patients = frame["patient_id"].astype(object)
    frame["patient_id"] = patients.map(lambda name: name.strip() or None, na_action="ignore")
    for column, terms in _TERMS.items():
        values = frame[column].astype(object)
        frame[column] = values.map(
            lambda word, terms=terms: terms.get(word.strip().upper(), word), na_action="ignore"
        )
    values = frame["patient_age_years"].astype(object)
    values = values.map(
        lambda age: age if (years := years_of(str(age))) is None else years, na_action="ignore"
    )
    ages = pd.to_numeric(values, errors="coerce")
    no_age = frame["patient_age_years"].notna() & ~ages.between(0, MAX_AGE_YEARS)
    if no_age.any():
        # No error: public sets hold a few such ages (RSNA: 155 years), which only affect subgroups.
        log.warning(
            "%s: %d values of patient_age_years are not a number from 0 to %d, and are ignored",
            uri,
            int(no_age.sum()),
            MAX_AGE_YEARS,
        )
    frame["patient_age_years"] = ages.mask(no_age)
    known = ["image", "label", "split", "patient_id", *FACT_COLUMNS]
    further = [] if by is None else [*by, *(name for name in (SITE,) if name in frame)]
    return frame[list(dict.fromkeys([*known, *further]))]


def _check_spelling(frame: pd.DataFrame, uri: str, by: Sequence[str]) -> None:
    """Raises `UserError` for a column such as `Split`: if it were ignored, films would silently be
    split again, or an audit would not look for shortcuts by `site`."""
    for column in ("image", "label", "split", "patient_id", *FACT_COLUMNS, SITE):
        for name in map(str, frame.columns):
            if column not in frame and name not in by and name.strip().lower() == column:
                raise UserError(f"{uri}: has a column '{name}'; spell it '{column}'")


def shown(word: str) -> str:
    """The word, in quotes if it starts or ends with spaces."""
    return word if word == word.strip() else repr(word)


def facts_of(labels: pd.DataFrame, headers: pd.DataFrame) -> pd.DataFrame:
    """`FACT_COLUMNS` of films: values in the labels take precedence over those in headers.

    Row i of both is the same film.
    """
    facts = {}
    for name in FACT_COLUMNS:
        values = labels[name].astype(object).reset_index(drop=True)
        facts[name] = values.where(values.notna(), headers[name].reset_index(drop=True))
    return pd.DataFrame(facts)


def label_names(files: Iterable[str], names: Iterable[str], uri: str, where: str) -> dict[str, str]:
    """The labels' name of each file that they refer to: the file's own name or, for names that are
    no file's whole name, the one that it ends with.

    names: all names in the labels. uri, where: what messages call the labels, and the place of the
    files. Raises `UserError` where a name may mean several files, or several names one file.
    """
    files, names = set(files), set(names)
    whole = files & names
    name_of, doubts = names_by_ending(sorted(files - whole), names - whole)
    if doubts:
        raise UserError(
            f"{uri}: {len(doubts)} names do not tell which film of {where} they mean, such as "
            f"{doubts[0]}; write whole keys, or the whole names of a shard's members"
        )
    return name_of | {name: name for name in whole}


def select_classes(
    labels: pd.DataFrame, label_map: Mapping[str, str], uri: str, *, learning: bool = True
) -> pd.DataFrame:
    """The rows whose label belongs to a class, with the class as their label.

    label_map: label to class. Raises `UserError` for a class without images. A finished model (not
    `learning`) can be measured on some of its classes; this raises only if none has images.
    """
    counts = labels["label"].value_counts()
    classes, absent = dict.fromkeys(label_map.values()), []
    for name in classes:
        sources = [label for label, its in label_map.items() if its == name]
        if not set(sources) & set(counts.index):
            absent.append(f"'{name}'" + ("" if sources == [name] else f" ({' + '.join(sources)})"))
    if absent and (learning or len(absent) == len(classes)):
        missed = absent[0] if learning else " or ".join(absent)
        raise UserError(
            f"{uri}: no image of class {missed}; the labels have {_counts_shown(counts)}"
            + ("; choose with --classes" if learning else "; give them the model's class names")
        )
    if absent:
        log.warning("%s: no image of class %s", uri, ", ".join(absent))
    chosen = labels[labels["label"].isin(list(label_map))].reset_index(drop=True)
    if len(chosen) < len(labels):
        others = counts[~counts.index.isin(list(label_map))]
        log.info("left out, because in no class: %s", _counts_shown(others))
    return chosen.assign(label=chosen["label"].map(dict(label_map)))


def _counts_shown(counts: pd.Series) -> str:
    """The most common labels with their numbers of images; a column of free text has thousands."""
    most = [f"{shown(str(label))} ({n})" for label, n in counts.head(_MOST_SHOWN).items()]
    return ", ".join(most) + (
        f" and {len(counts) - _MOST_SHOWN} more" if len(counts) > _MOST_SHOWN else ""
    )


def left_out(labels: pd.DataFrame, label_map: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Number of images whose label belongs to no class, by split (`no split` where they have none)
    and label. labels: as `read_labels` gives them."""
    rows = labels[~labels["label"].isin(list(label_map))]
    return {
        str(split): dict(Counter(films["label"].tolist()))
        for split, films in rows.groupby(rows["split"].fillna("no split"))
    }


def assign_splits(labels: pd.DataFrame, uri: str, seed: int = SPLIT_SEED) -> pd.DataFrame:
    """The labels with a split for every row: their own if they have splits, otherwise 60/20/20 by
    patient.

    A drawn split keeps each patient's films together. If the labels have a train but no validation
    split, a fifth of the train patients become validation. seed: of a drawn split; an older model
    may have another than `SPLIT_SEED`. Raises `UserError` where some rows have a split and others
    have none.
    """
    given = labels["split"].notna()
    if given.any() and not given.all():
        raise UserError(
            f"{uri}: {int((~given).sum())} of {len(labels)} rows have no split; fill all or none"
        )
    if not given.any():
        fold = _patient_folds(labels, uri, seed, "give a split column")
        names = pd.Series(fold).map({0: "test", 1: "validation"}).fillna("train")
        return labels.assign(split=names.to_numpy())
    if "train" in set(labels["split"]) and "validation" not in set(labels["split"]):
        train = (labels["split"] == "train").to_numpy()
        give = "give some of the train patients the split validation"
        fold = _patient_folds(labels[train], uri, seed, give)
        split = labels["split"].to_numpy(copy=True)
        split[train] = pd.Series(fold).map({0: "validation"}).fillna("train").to_numpy()
        log.info("the labels have no validation split; a fifth of the train patients becomes it")
        return labels.assign(split=split)
    return labels


def _patient_folds(labels: pd.DataFrame, uri: str, seed: int, give: str) -> list[int]:
    """The fold, 0 … 4, of each row; stratified by class, with each patient in one fold. give: the
    advice where there are too few patients."""
    from sklearn.model_selection import StratifiedGroupKFold

    patients = labels["patient_id"].fillna("image " + labels["image"])
    if labels["patient_id"].isna().any():
        log.warning(
            "%s: each row without patient_id is split as a patient of its own; films of one "
            "patient may end up in different splits",
            uri,
        )
    fewest = int(patients.groupby(labels["label"]).nunique().min())
    if fewest < 5:
        raise UserError(
            f"{uri}: the smallest class has {counted(fewest, 'patient')}, and a split needs at "
            f"least 5; {give}, or label more patients"
        )
    fold = pd.Series(0, index=range(len(labels)))
    folds = StratifiedGroupKFold(n_splits=5, shuffle=True, random_state=seed)
    for number, (_, rows) in enumerate(folds.split(labels, labels["label"], patients)):
        fold.iloc[rows] = number
    return fold.tolist()


def check_classes(labels: pd.DataFrame, class_names: Iterable[str], uri: str) -> None:
    """Raises `UserError` where a class has no image for training or validation.

    labels: of the classes, every row with a split.
    """
    for split in ("train", "validation"):
        there = set(labels.loc[labels["split"] == split, "label"])
        if not there:
            splits = _counts_shown(labels["split"].value_counts())
            raise UserError(f"{uri}: no image has the split {split} (the splits are {splits})")
        absent = [name for name in class_names if name not in there]
        if absent:
            raise UserError(
                f"{uri}: the {split} split has no image of class '{absent[0]}'; give some of its "
                "images that split, remove the split column, or leave the class out with --classes"
            )


def check_patients(labels: pd.DataFrame, uri: str) -> None:
    """Raises `UserError` where one patient is in two splits."""
    known = labels.dropna(subset=["patient_id"]).drop_duplicates(["patient_id", "split"])
    torn = known.loc[known["patient_id"].duplicated(keep=False)].groupby("patient_id")["image"]
    if len(torn):
        example = next(iter(torn))[1].tolist()[:2]
        raise UserError(
            f"{uri}: more than one split has films of {counted(len(torn), 'patient')}, such as "
            f"{' and '.join(example)}, which flatters every figure; give all films of a patient "
            "one split, or remove the split column"
        )


def check_contents(images: pd.DataFrame, uri: str) -> None:
    """Raises `UserError` where identical files are in two splits.

    images: columns `image`, `split`, `content_sha256`.
    """
    splits = images.groupby("content_sha256")["split"].nunique()
    torn = splits[splits > 1].index
    if len(torn):
        example = images.loc[images["content_sha256"] == torn[0], "image"].tolist()[:2]
        raise UserError(
            f"{uri}: more than one split has copies of {counted(len(torn), 'file')}, such as "
            f"{' = '.join(example)}; remove the copies"
        )
