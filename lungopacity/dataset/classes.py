"""Which label is which class: labels are merged, renamed and left out without another file."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lungopacity.errors import UserError
from lungopacity.results.schema import class_column


def classes_of_labels(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Label to class, in the order of the classes; labels that are left out have none.

    words: `A` is the class of label A; `A+B=Name` merges the labels A and B into the class Name;
    `A=Name` renames; `-A` leaves A out. Of words that only leave out, the rest of `known`, the
    labels that there are, are the classes, by name. Raises `UserError` for words that leave out a
    label that there is not, or give less than two classes, one label two classes, two classes one
    column of the results, or a class the name of a label that is not in it.
    """
    found: dict[str, str] = {}
    dropped = {word[1:].strip() for word in words if word.startswith("-")}
    for label in sorted(dropped - set(known)):
        # A slip of the pen: what was meant to be left out would be learnt as a class.
        raise UserError(
            f"--classes: there is no label '{label}' to leave out; the labels are "
            f"{', '.join(sorted(known))}"
        )
    kept = [word for word in words if not word.startswith("-")]
    if not kept:
        return classes_of_all(set(known) - dropped)
    for word in kept:
        sources, sign, name = word.partition("=")
        labels = [label.strip() for label in sources.split("+")] if sign else [word.strip()]
        name = name.strip() if sign else word.strip()
        if not name or not all(labels):
            raise UserError(f"--classes: '{word}' is not of the form A+B=Name")
        for label in labels:
            if label in found:
                raise UserError(f"--classes: label '{label}' is given to two classes")
            if label in dropped:
                raise UserError(f"--classes: label '{label}' is both given and left out")
            found[label] = name
    for name in dict.fromkeys(found.values()):
        # Later, labels of a class's own name are taken for it: those would come back.
        if name in known and name not in found:
            raise UserError(
                f"--classes: '{name}' is also a label, which is not in the class of that name; "
                "name the class otherwise"
            )
    return _checked(found)


def classes_of_all(known: Collection[str]) -> dict[str, str]:
    """Each label a class of its own, by name, whatever signs are in it. Raises `UserError` as
    `classes_of_labels` does."""
    return _checked({label: label for label in sorted(known)})


def _checked(found: dict[str, str]) -> dict[str, str]:
    _check_columns(class_names_of(found))
    if len(set(found.values())) < 2:
        raise UserError(
            "--classes: give two or more different names, as Normal,Lung_Opacity; merged, as "
            "COVID+Viral_Pneumonia=Infection; or those to leave out, as -Not_Normal"
        )
    return found


def _check_columns(names: Sequence[str]) -> None:
    """A model of such classes could be trained, and never screen. SQL sees no capitals."""
    of: dict[str, str] = {}
    for name in names:
        column = class_column("p", name)
        other = of.setdefault(column.lower(), name)
        if other != name:
            raise UserError(
                f"--classes: '{other}' and '{name}' would have one column, {column}, in results; "
                f"rename one, as LABEL=Name, or merge them"
            )


def class_names_of(label_map: dict[str, str]) -> tuple[str, ...]:
    """The classes in order, each once."""
    return tuple(dict.fromkeys(label_map.values()))
