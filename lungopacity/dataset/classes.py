"""Which labels form which class: labels are merged, renamed and left out without another file."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lungopacity.errors import UserError
from lungopacity.results.schema import class_column, same_column


def classes_of_labels(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Label to class, in the order of the classes; labels that are left out are not in it.

    words: `A` makes label A a class; `A+B=Name` merges the labels A and B into the class Name, and
    so do `A=Name` and `B=Name`; `A=Name` alone renames A; `-A` leaves A out. If all words leave
    labels out, every other label of `known` is a class, in alphabetical order. known: all labels
    that occur. Raises `UserError` for words that leave out or merge a label that does not occur,
    that give fewer than two classes, that put a label into two classes, that give two classes the
    same column of the results, or that name a class after a label that is not in it.
    """
    found: dict[str, str] = {}
    dropped = {word[1:].strip() for word in words if word.startswith("-")}
    for label in sorted(dropped - set(known)):
        # A typing error: the label that was meant would be learnt as a class.
        raise _unknown(label, "leave out", known)
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
    for label, name in found.items():
        if label not in known and list(found.values()).count(name) > 1:
            # The class would lack the films of the label that was meant.
            raise _unknown(label, "merge", known)
    for name in dict.fromkeys(found.values()):
        # Labels with a class's own name count as that class later, so they would be back in it.
        if name in known and name not in found:
            raise UserError(
                f"--classes: '{name}' is also a label, which is not in the class of that name; "
                "give the class another name"
            )
    return _checked(found)


def classes_of_all(known: Collection[str]) -> dict[str, str]:
    """Makes each label a class of its own, in alphabetical order, even if it contains + or =.
    Raises `UserError` as `classes_of_labels` does."""
    return _checked({label: label for label in sorted(known)})


def positive_class_of(names: Sequence[str], asked: str | None) -> str:
    """The class that decisions are about: the one that was asked for or, for None, Lung_Opacity
    where it is one of the classes, else the last. Raises `UserError` for an unknown class."""
    if asked is None:
        return "Lung_Opacity" if "Lung_Opacity" in names else names[-1]
    if asked not in names:
        raise UserError(
            f"positive class '{asked}' is not one of the classes ({', '.join(names)}); give one of "
            "them as --positive-class"
        )
    return asked


def _unknown(label: str, purpose: str, known: Sequence[str]) -> UserError:
    return UserError(
        f"--classes: there is no label '{label}' to {purpose}; the labels are "
        f"{', '.join(sorted(known))}"
    )


def _checked(found: dict[str, str]) -> dict[str, str]:
    same = same_column(class_names_of(found))
    if same is not None:
        # A model of them could be trained, but not used for screening.
        raise UserError(
            f"--classes: '{same[0]}' and '{same[1]}' would have the same column, "
            f"{class_column('p', same[1])}, in the results; rename one by LABEL=Name, or merge them"
        )
    if len(set(found.values())) < 2:
        raise UserError(
            "--classes: give two or more different names, such as Normal,Lung_Opacity; merged, "
            "such as COVID+Viral_Pneumonia=Infection; or those to leave out, such as -Not_Normal"
        )
    return found


def class_names_of(label_map: dict[str, str]) -> tuple[str, ...]:
    """The names of the classes, in order."""
    return tuple(dict.fromkeys(label_map.values()))
