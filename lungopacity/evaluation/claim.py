"""The items of CLAIM that a model card leaves to people (Mongan, Moy & Kahn 2020, Radiology:
Artificial Intelligence 2:e200029)."""

from __future__ import annotations

import re

ITEMS = 42

_ANSWERED = re.compile(r"^[^\[\]:]*\[(\d+(?:, \d+)*)\]", re.MULTILINE)
"""In brackets in front of a line's first colon: what follows one may hold lists of numbers."""

_LEFT_OPEN = {
    2: "a structured summary of the study",
    4: "its aims and hypotheses",
    5: "whether it was prospective or retrospective",
    6: "whether it was to make a model, to explore or to prove something",
    7: "where the films came from",
    8: "who was eligible, where and when",
    10: "which labelled films were left out of training",
    12: "how the films were made anonymous, what is burnt into their pixels included",
    14: "how the labels were set",
    15: "why in this way",
    16: "by whom, and how these were prepared for it",
    17: "with which tools",
    18: "how far readers agreed, and what was done where they did not",
    19: "why so many films",
    23: "with which software it was trained",
    24: "with which weights training began",
    25: "how it was trained",
    26: "which epoch was kept, and why",
    30: "what it earned in subgroups",
    31: "where it looks, and how that was checked (`lungopacity explain --boxes` measures it)",
    32: "what it earns on films of another hospital",
    33: "how many labelled films were left out of training, and why",
    34: "of whom the films of each split are",
    35: "what it earned on the other splits",
    37: "what the films that it gets wrong have in common (predictions.parquet names them)",
    39: "what follows for practice",
    40: "where the study is registered",
    41: "where its protocol can be read",
    42: "who paid for it, and what they had to say in it",
}
"""By number. The others every card answers."""


def answered(card: str) -> list[int]:
    """The items that its lines answer, in their order."""
    return [int(word) for found in _ANSWERED.findall(card) for word in found.split(", ")]


def left_open(card: str) -> dict[int, str]:
    """The others, in words, by number."""
    told = answered(card)
    return {number: words for number, words in _LEFT_OPEN.items() if number not in told}
