from __future__ import annotations

import pytest

from lungopacity.dataset.classes import (
    class_names_of,
    classes_of_all,
    classes_of_labels,
    positive_class_of,
)
from lungopacity.errors import UserError

KNOWN = ("Normal", "COVID", "Viral_Pneumonia", "Not_Normal")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["Normal", "COVID"], {"Normal": "Normal", "COVID": "COVID"}),
        (
            ["Normal", "COVID+Viral_Pneumonia=Infection"],
            {"Normal": "Normal", "COVID": "Infection", "Viral_Pneumonia": "Infection"},
        ),
        (["Normal=Healthy", "COVID"], {"Normal": "Healthy", "COVID": "COVID"}),
        (
            ["-Not_Normal"],
            {"COVID": "COVID", "Normal": "Normal", "Viral_Pneumonia": "Viral_Pneumonia"},
        ),
        (["COVID", "-Not_Normal", "Normal"], {"COVID": "COVID", "Normal": "Normal"}),
        # Two words may give the same class.
        (
            ["COVID=C", "Viral_Pneumonia=C", "D"],
            {"COVID": "C", "Viral_Pneumonia": "C", "D": "D"},
        ),
    ],
)
def test_words_become_a_map_in_the_order_of_the_classes(words, found):
    assert list(classes_of_labels(words, KNOWN).items()) == list(found.items())


def test_each_class_name_occurs_once():
    assert class_names_of({"A": "C", "B": "C", "D": "D"}) == ("C", "D")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["Normal"], "two or more"),
        ([], None),
        (["Normal=X", "COVID=X"], "two or more"),
        (["Normal", "Normal"], "given to two"),
        (["Normal+COVID=A", "COVID"], "given to two"),
        (["Normal", "COVID", "-COVID"], "both given and left out"),
        (["Normal+=A", "COVID"], "not of the form"),
        (["Normal=", "COVID"], "not of the form"),
        (["Normal=a-b", "COVID=a_b"], "'a-b' and 'a_b' would have the same column, p_a_b, in"),
        (["Normal=x", "COVID=X"], "'x' and 'X' would have the same column, p_X, in"),
        (["Normal", "COVID=Not_Normal"], "'Not_Normal' is also a label"),
        (["-Not_normal"], "no label 'Not_normal' to leave out; the labels are COVID, Normal, Not"),
        (["Normal", "COVID", "-Flu"], "no label 'Flu' to leave out"),
        (
            ["Normal", "COVID+Viral Pneumonia=Infection"],
            "no label 'Viral Pneumonia' to merge; the labels are COVID, Normal, Not_N",
        ),
        (
            ["Normal", "COVID=Infection", "Viral Pneumonia=Infection"],
            "no label 'Viral Pneumonia' to merge",
        ),
    ],
)
def test_words_that_give_no_valid_classes_are_refused(words, said):
    if said is None:
        assert len(set(classes_of_labels(words, KNOWN).values())) == 4
        return
    with pytest.raises(UserError, match=said):
        classes_of_labels(words, KNOWN)


def test_labels_that_look_like_words_are_classes_where_every_label_is_a_class():
    found = classes_of_all(["PE=1", "-1", "1", "A+B"])
    assert found == {label: label for label in ("-1", "1", "A+B", "PE=1")}
    assert classes_of_labels(["-1"], ["PE=1", "-1", "1", "A+B"]) == {
        label: label for label in ("-1", "A+B", "PE=1")
    }
    with pytest.raises(UserError, match="two or more"):
        classes_of_all(["Normal"])


@pytest.mark.parametrize("names", [("Lung_Opacity", "Normal"), ("Normal", "Lung_Opacity")])
def test_decisions_are_about_the_opacity_wherever_it_stands_or_else_the_last_class(names):
    assert positive_class_of(names, None) == "Lung_Opacity"
    assert positive_class_of(names, "Normal") == "Normal"
    assert positive_class_of(("Healthy", "Ill"), None) == "Ill"
