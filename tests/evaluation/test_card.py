"""The model card: measured values, and the items that only people can answer."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from lungopacity.evaluation.card import model_card
from lungopacity.evaluation.card_tables import subgroups
from lungopacity.evaluation.claim import answered, left_open
from lungopacity.evaluation.metrics import Metric
from lungopacity.evaluation.report import EvaluationResult
from lungopacity.evaluation.table import largest_gaps
from lungopacity.models import OperatingPoint
from lungopacity.radiograph import Preprocessing
from tests.models.tiny import tiny_model

METRICS = [
    Metric("all", "support", "Lung_Opacity", 331.0, None, None, 798),
    Metric("all", "accuracy", None, 0.9123, 0.9, 0.92, 798),
    Metric("all", "brier_binary", "Lung_Opacity", 0.08, 0.05, 0.1, 798),
    Metric("all", "brier_before_temperature", None, 0.2, 0.1, 0.3, 798),
    Metric("all", "roc_auc", "Lung_Opacity", 0.9765, 0.97, 0.98, 798),
    Metric("all", "recall", "Normal", float("nan"), None, None, 0),
    Metric("all", "decision_sensitivity", "sensitivity=0.95", 0.951, 0.92, 0.97, 331),
    Metric("all", "decision_sensitivity_with_review", "band", 0.99, 0.95, 1.0, 331),
    Metric("all", "negative_predictive_value", "band", 0.98, 0.95, 1.0, 300),
    Metric("all", "review_rate", "band", 0.125, 0.1, 0.15, 798),
    Metric("patient_sex=F", "roc_auc", "Lung_Opacity", 0.98, 0.97, 0.99, 300),
    Metric("patient_sex=M", "roc_auc", "Lung_Opacity", 0.97, 0.96, 0.98, 498),
    Metric("view_position=AP", "roc_auc", "Lung_Opacity", 0.9812, 0.97, 0.99, 358, patients=201),
    Metric("view_position=PA", "roc_auc", "Lung_Opacity", 0.9412, 0.92, 0.96, 440, patients=368),
    Metric("view_position=PA", "decision_sensitivity", "youden", 0.9, 0.8, 0.95, 70),
    Metric("view_position=AP", "decision_sensitivity", "youden", 0.91, 0.8, 0.95, 80),
    Metric("view_position=PA", "decision_specificity", "youden", 0.95, 0.9, 0.97, 370),
    Metric("view_position=AP", "decision_specificity", "youden", 0.95, 0.9, 0.97, 278),
    Metric("site=A|B\n<b>", "decision_specificity", "youden", float("nan"), None, None, 0),
    Metric("view_position=PA", "decision_sensitivity", "sensitivity=0.95", 0.96, 0.9, 0.99, 70),
    Metric("view_position=PA", "roc_auc", "Normal", 0.1, None, None, 440),
    Metric("site=A|B\n<b>", "roc_auc", "Lung_Opacity", 0.97, 0.96, 0.98, 798),
]


def check_items(card):
    """Every item of CLAIM is answered or listed as open, once."""
    told = answered(card) + [int(word) for word in re.findall(r"(?m)^- (\d+): \S", card)]
    assert sorted(told) == list(range(1, 43))


SPEC = replace(
    tiny_model().spec,
    architecture_settings={"channels": [8, 16, 32], "convolutions": [1, 2, 3]},
    metrics={"auc": 0.98, "expected_calibration_error": 0.02},
    label_map={"Healthy": "Normal", "Lung_Opacity": "Lung_Opacity"},
    operating_points={
        "sensitivity=0.95": OperatingPoint(0.21, chosen_by="x on validation"),
        "youden": tiny_model().spec.operating_point,
    },
    training={
        "settings": {"epochs": 8, "batch_size": 32, "seed": 0},
        "best_epoch": 6,
        "weights": {"source": "ImageNet, from a package", "licence": "Apache-2.0"},
        "versions": {"torch": "2.15"},
        "data": {
            "fingerprint": "abc",
            "unknown_patients": 12,
            "images": {
                "train": {"Normal": 2200, "Lung_Opacity": 2038},
                "test": {"Normal": 0, "Lung_Opacity": 0},
            },
            "left_out": {
                "labels": {
                    "train": {"Not_Normal": 1100, "TB": 3},
                    "validation": {"Not_Normal": 348},
                },
                "unreadable": {"train": 2},
            },
        },
    },
)


def card_of(spec=SPEC, metrics=METRICS, rejected=None, unreadable=0, unknown_patients=0, known=0):
    return model_card(
        spec,
        "0123456789abcdef",
        metrics,
        split="test",
        flags_unlike=True,
        unreadable=unreadable,
        rejected=rejected or {},
        unknown_patients=unknown_patients,
        intervals="by counting",
        gaps=[
            replace(gap, ci_low=0.001, ci_high=0.09)
            for gap in largest_gaps(metrics, "Lung_Opacity", "youden")
        ],
        known_to_model=known,
        picked_on={},
    )


def plain_card(spec, metrics=(), *, split="test", flags_unlike=True):
    """A card with these metrics and nothing else about the films."""
    return model_card(
        spec, "0" * 16, metrics, split=split, flags_unlike=flags_unlike, unreadable=0, rejected={},
        unknown_patients=0, intervals="none", gaps=[], known_to_model=0, picked_on={},
    )  # fmt: skip


def section(card, title):
    """The lines below a heading."""
    _, _, rest = card.partition(f"\n## {title}")
    return rest.partition("\n## ")[0].splitlines()[1:]


def test_the_card_begins_with_the_model_and_the_notice():
    lines = card_of().splitlines()
    assert lines[0] == "# Model card: classical-cnn 0123456789abcdef"
    assert "Research use only. Not a medical device." in lines[2]


def test_the_card_tells_how_the_model_was_made():
    told = "\n".join(section(card_of(), "What it is"))
    assert "Healthy as Normal" in told
    assert "licence: Apache-2.0" in told
    assert "epoch 6" in told
    assert "borders" not in told


def test_the_card_tells_of_the_training_films():
    card = card_of()
    lines = section(card, "Data")
    assert (
        "never reads the test split. 12 films have no patient_id; each counts as a patient." in card
    )
    assert "| train | 2,200 | 2,038 |" in lines
    assert not any(line.startswith("| test |") for line in lines)
    assert (
        "- Left out of training [10, 33]: of no class, train: 1,100 Not_Normal, 3 TB; of no class, "
        "validation: 348 Not_Normal; unreadable or rejected, train: 2"
    ) in lines


def test_the_card_tells_which_films_are_in_no_metric():
    card = card_of(
        unreadable=3, rejected={"poor_quality": 2, "lateral_view": 10}, unknown_patients=7
    )
    lines = section(card, "Results")
    assert "3 labelled films could not be read and are in no metric [13]." in lines
    assert (
        "12 were read and rejected, and are in none either: 10 lateral_view, 2 poor_quality."
        in lines
    )
    unknown = "7 films have no patient_id; each counts as a patient."
    assert f"95 % intervals [29]: by counting. {unknown}" in lines


def test_the_card_has_each_figure_with_its_interval():
    lines = section(card_of(), "Results")
    assert "| accuracy | all | 0.9123 | 0.9000 to 0.9200 | 798 |" in lines
    assert "| brier binary | Lung_Opacity | 0.0800 | 0.0500 to 0.1000 | 798 |" in lines
    assert "| brier before temperature | all | 0.2000 | 0.1000 to 0.3000 | 798 |" in lines
    assert "| recall | Normal | not defined |  | 0 |" in lines
    told = "selected and calibrated: auc 0.9800, expected calibration error 0.0200."
    assert told in lines[-1] or told in lines[-2]


def test_the_card_tells_the_share_on_which_predictive_values_depend():
    told = "and predictive values hold for this share of Lung_Opacity: 331 of 798 films.\n"
    assert all(words in card_of() for words in (told, "few films, this error and its interval"))
    assert "predictive values hold" not in plain_card(SPEC)


def test_the_card_tells_of_films_that_the_model_knows_before_any_metric():
    note, _, unreadable, *_ = section(card_of(known=120), "Results")
    assert "calibrated on 120 of these films: its metrics look too good.**" in note
    assert unreadable == section(card_of(), "Results")[0]


def test_a_class_name_does_not_divide_a_cell():
    spec = replace(
        tiny_model().spec,
        class_names=("Normal", "Mass|Nodule"),
        positive_class="Mass|Nodule",
        training={
            "data": {"fingerprint": "x", "images": {"train": {"Normal": 5, "Mass|Nodule": 6}}}
        },
    )
    metrics = [Metric("all", "recall", "Mass|Nodule", 0.5, 0.4, 0.6, 10)]
    metrics += [Metric("site=A", "roc_auc", "Mass|Nodule", 0.9, 0.8, 0.95, 10)]
    lines = plain_card(spec, metrics).splitlines()
    assert r"| split | Normal | Mass\|Nodule |" in lines
    assert r"| recall | Mass\|Nodule | 0.5000 | 0.4000 to 0.6000 | 10 |" in lines
    assert any(line.startswith(r"| subgroup [30] | AUC for Mass\|Nodule | sens") for line in lines)


def test_the_card_has_a_row_for_what_each_operating_point_decides():
    lines = section(card_of(), "Results")
    assert "| sensitivity=0.95 | sensitivity | 0.9510 | 0.9200 to 0.9700 | 331 |" in lines
    assert "| band | sensitivity with review | 0.9900 | 0.9500 to 1.0000 | 331 |" in lines
    assert "| band | negative predictive value | 0.9800 | 0.9500 to 1.0000 | 300 |" in lines
    assert "| band | review rate | 0.1250 | 0.1000 to 0.1500 | 798 |" in lines
    assert "- sensitivity=0.95: positive from 0.2100; x on validation" in lines


def test_the_card_has_the_subgroups_and_the_largest_gaps_between_them():
    lines = section(card_of(), "Subgroups")
    assert lines[0] == (
        "- The largest gap in AUC is by view_position: PA 0.9412 (0.9200 to 0.9600), 440 films; "
        "AP 0.9812 (0.9700 to 0.9900), 358 films; difference 0.0400 (0.0010 to 0.0900)."
    )
    assert lines[1].startswith(
        "- The largest gap in sensitivity is by view_position: PA 0.9000 (0.8000 to 0.9500), "
        "70 films; AP 0.9100 (0.8000 to 0.9500), 80 films; difference"
    )
    assert lines[2].startswith("- The largest gap in specificity is by view_position: PA 0.9500")
    assert lines[3] == (
        "- Differences are between the two subgroups that differ most, which their intervals do "
        "not account for."
    )
    assert lines[4] == (
        "- Not compared, because fewer than two subgroups have 30 patients that count: "
        "AUC by patient_sex; sensitivity by patient_sex; specificity by patient_sex."
    )
    assert "| sensitivity at youden | specificity at youden | films | patients |" in lines[6]
    assert (
        "| view_position=PA | 0.9412 (0.9200 to 0.9600) | 0.9000 (0.8000 to 0.9500) "
        "| 0.9500 (0.9000 to 0.9700) | 440 | 368 |"
    ) in lines
    assert "| patient_sex=F | 0.9800 (0.9700 to 0.9900) |  |  | 300 |  |" in lines
    assert r"| site=A\|B\n&lt;b> | 0.9700 (0.9600 to 0.9800) |  | not defined | 798 |  |" in lines
    assert sum(line.startswith("| view_position=PA |") for line in lines) == 1
    gap, *_ = largest_gaps(METRICS, "Lung_Opacity", "youden")
    told = list(subgroups(SPEC, METRICS, [gap, replace(gap, ci_low=None, ci_high=None)]))
    assert sum("The largest gap in AUC" in line for line in told) == 1
    # Of a model that decides at another point, the decisions are those at this one.
    card = card_of(replace(SPEC, operating_point=SPEC.operating_points["sensitivity=0.95"]))
    assert "| sensitivity at sensitivity=0.95 |" in card
    assert re.search(r"\n\| view_position=PA \| 0\.9412 [^|]*\| 0\.9600 ", card)


def test_items_that_the_card_does_not_answer_whole_are_left_open():
    card = card_of()
    check_items(card)
    assert not {10, 24, 25, 26, 33} & set(left_open(card))
    # Classes alone do not tell whose films a split has, nor validation alone of every split.
    assert {34, 35} <= set(left_open(card))
    assert "- 41: where its protocol can be read" in section(card, "Open items")


def of_ages(*bands):
    return [Metric(f"age={band}", "accuracy", None, 0.9, 0.8, 0.95, 100) for band in bands]


def test_what_the_model_is_for_follows_from_its_films():
    use, scope, *_ = section(card_of(metrics=of_ages("18-39", "90+")), "Intended use")
    assert "research; sorts frontal chest radiographs of adults that are like its" in use
    assert scope.startswith("- Out of scope [38]: children, flagged `quality_child`")
    assert "age; lateral views; other body parts;" in scope
    assert "training films, which are flagged `quality_out_of_distribution`; films with" in scope
    assert scope.endswith("films with the labels Not_Normal, TB, which were not trained on.")
    for metrics in ([], of_ages("under-18", "18-39"), of_ages("18-39", "unknown")):
        use, scope, ages, *_ = section(card_of(metrics=metrics), "Intended use")
        assert "adults" not in use
        assert "children" not in scope
        assert "Some ages are unknown, or not of adults" in ages
    taken = {"provenance": {"accept": ["lateral_view", "wrong_body_part"]}}
    for training in (taken, {"members": [{}, taken]}):
        card = card_of(replace(SPEC, training=training), of_ages("18-39"))
        use, scope, *_ = section(card, "Intended use")
        assert "sorts radiographs of adults" in use
        assert scope.startswith("- Out of scope [38]: children,")
        assert "age; films unlike the training" in scope


def test_a_card_of_many_labels_names_the_commonest_and_counts_the_rest():
    labels = {f"Finding {number}": 100 - number for number in range(12)}
    left_out = {"labels": {"train": labels}, "unreadable": {}}
    data = {"fingerprint": "abc", "left_out": left_out}
    card = plain_card(replace(SPEC, training={"data": data}))
    assert ", 91 Finding 9, 179 of other labels\n" in card
    assert "films with the labels Finding 0, Finding 1, " in card
    assert "Finding 9, 2 more, which were not trained on." in card


def test_a_card_tells_the_biases_of_several_classes():
    spec = replace(
        tiny_model().spec,
        class_names=("Normal", "Lung_Opacity", "TB"),
        class_biases=(0.1, -0.25, 0.15),
    )
    told = "plus biases of +0.100 for Normal, -0.250 for Lung_Opacity, +0.150 for TB; fitted to "
    assert f"{told}the validation split and its class shares\n" in plain_card(spec)
    assert "fitted to the validation split\n" in plain_card(SPEC)


def test_a_model_of_which_little_is_known_has_a_card_too():
    card = plain_card(tiny_model(synthetic=True).spec, split="all", flags_unlike=False)
    assert "have no patient_id" not in card
    assert "Trained on synthetic films" in card
    assert "nothing to form subgroups by" in card
    assert "films unlike the training films, which this model does not flag: its folder" in card
    check_items(card)
    assert {10, 24, 25, 26, 30, 33, 34, 35} <= set(left_open(card))


def test_the_card_of_an_ensemble_tells_what_its_members_began_with():
    member = {"architecture": "efficientnet-lite0", "model_id": "a" * 16, "image_size": 224}
    member |= {"mean": 0.449, "std": 0.226}
    spec = replace(
        tiny_model().spec,
        architecture="ensemble",
        architecture_settings={
            "members": [member, {**member, "architecture": "cov-net"}, {**member, "image_size": 96}]
        },
        preprocessing=Preprocessing(image_size=224, crop_borders=True),
        training={
            "members": [
                {
                    "weights": {"source": "ImageNet, from a package", "licence": "Apache-2.0"},
                    "settings": {"epochs": 1, "batch_size": 32, "seed": 1},
                    "best_epoch": 1,
                },
                {"weights": None},
                {},
            ]
        },
    )
    scaled = "(value / 255 - 0.449) / 0.226"
    card = plain_card(spec, [item for item in METRICS if item.group == "patient_sex=F"])
    lines = card.splitlines()
    assert (
        f"  - efficientnet-lite0 {'a' * 16}, 224 px, (value / 255 - 0.449) / 0.226; initial "
        "weights: ImageNet, from a package; licence: Apache-2.0; 1 epoch, batches of 32, seed 1, "
        "epoch 1 kept"
    ) in lines
    assert f"  - cov-net {'a' * 16}, 224 px, {scaled}; initial weights: drawn at random" in lines
    check_items(card)
    assert {24, 25, 26} <= set(left_open(card))  # of two members nobody knows
    known = replace(spec, training={"members": [spec.training["members"][0]] * 3})
    told = plain_card(known)
    assert (
        "- Members [24, 25, 26, 27]: the ensemble takes the mean of their calibrated logits" in told
    )
    check_items(told)
    assert f"  - efficientnet-lite0 {'a' * 16}, 96 px, {scaled}" in lines
    assert (
        "- Input [9]: one grey channel, 224 x 224 pixels, black borders cut away, the aspect ratio "
        "kept and padded black; each member then resizes and scales it as its line says\n"
    ) in card


def test_films_that_a_rule_leaves_out_are_no_failure():
    result = EvaluationResult(
        "m", "out", "test", 90, 0, 10, 90, 0, "by counting", False, (), "b", None, "youden", []
    )
    assert result.exit_code == 0
    assert replace(result, unreadable=1).exit_code == 1
    assert "model m on 90 images of split 'test', 10 rejected\n" in result.summary()


def test_a_report_tells_the_gap_between_subgroups_and_those_of_too_few_patients():
    (gap, *_) = largest_gaps(METRICS, "Lung_Opacity", "youden")
    views = [gap.worst, gap.best]
    few = Metric("site=B\x1b[2J", "accuracy", None, 0.5, 0.1, 0.9, 40, "bootstrap", 2)
    named = [
        *(
            Metric("all", "support", name, count, None, None, 90)
            for name, count in (("Normal", 70.0), ("Lung_Opacity_or_a_long_name", 20.0))
        ),
        *(
            Metric("all", f"decision_{what}", "the-hospital-by-the-river-2026", 0.9, 0.8, 1.0, 45)
            for what in ("sensitivity", "specificity")
        ),
    ]
    result = EvaluationResult(
        "m", "out", "test", 90, 0, 0, 90, 0, "by counting", False, (), "Lung_Opacity", None,
        "youden", [*views, few, *named], (replace(gap, ci_low=0.01, ci_high=0.07),),
    )  # fmt: skip
    told = result.summary()
    assert told.count("differ most, which their intervals do not account for\n") == 1
    assert "\nfilms                           70 Normal, 20 Lung_Opacity_or_a_long_name\n" in told
    # A gap of decisions that 19 patients do not tell is not passed over.
    not_told = "sensitivity by view_position; specificity by view_position\n"
    assert f"\ntoo few patients to compare     {not_told}" in told
    # The name is longer than its place.
    assert "\nat the-hospital-by-the-river-2026 sensitivity 0.9" in told
    assert "n = 440; AP 0.9812 (0.9700 to 0.9900), n = 358; difference 0.0400 (0.0100 to" in told
    assert "few patients, or of one class" in told
    assert r"site=B\x1b[2J (n = 40 of 2 patients)" in told
    (found,) = json.loads(result.to_json())["gaps"]
    assert found.pop("size") == pytest.approx(0.04)
    assert found == {
        "figure": "AUC", "column": "view_position", "worst": "PA", "best": "AP", "ci_low": 0.01,
        "ci_high": 0.07,
    }  # fmt: skip
