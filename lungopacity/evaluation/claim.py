"""The items of CLAIM that a model card leaves to people (Mongan, Moy & Kahn 2020, Radiology:
Artificial Intelligence 2:e200029)."""

from __future__ import annotations

import re

_ANSWERED = re.compile(r"^[^\[\]:]*\[(\d+(?:, \d+)*)\]", re.MULTILINE)
"""Item numbers in brackets before the first colon of a line: lists of numbers after it are text."""

_LEFT_OPEN = {
    2: "a structured summary of the study",
    4: "the study's aims and hypotheses",
    5: "whether it was prospective or retrospective",
    6: "whether its goal was to make a model, to explore or to prove something",
    7: "where the films came from",
    8: "who was eligible, where and when",
    10: "which labelled films were left out of training",
    12: "how the films were anonymised, including text burnt into their pixels",
    14: "how the labels (the reference standard) were defined",
    15: "why this reference standard was chosen",
    16: "who labelled the films, and how they were qualified and prepared for it",
    17: "which tools they used to label",
    18: "how far readers agreed, and what was done if they did not",
    19: "how the number of films was chosen",
    23: "with which software it was trained",
    24: "with which weights training began",
    25: "how it was trained",
    26: "which epoch was kept, and why",
    30: "how it performs in subgroups",
    31: "where it looks, and how that was checked (`lungopacity explain --boxes` measures it)",
    32: "how it performs on films of another hospital",
    33: "how many labelled films were left out of training, and why",
    34: "the demographics and clinical features of the patients in each split",
    35: "how it performed on the other splits",
    37: "what the films that it gets wrong have in common (predictions.parquet lists them)",
    39: "what follows for practice",
    40: "where the study is registered",
    41: "where its protocol can be read",
    42: "who funded the study, and what role they had in it",
}
"""By number. Every card answers the items that are not listed here."""


def answered(card: str) -> list[int]:
    """The items that the card's lines answer, in order of appearance."""
    return [int(word) for found in _ANSWERED.findall(card) for word in found.split(", ")]


def left_open(card: str) -> dict[int, str]:
    """Description by number of the items that the card does not answer."""
    closed = answered(card)
    return {number: words for number, words in _LEFT_OPEN.items() if number not in closed}
