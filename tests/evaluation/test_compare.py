import io
import json
import math
import os

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.compare import (
    auc_difference,
    clustered_difference,
    compare,
)
from lungopacity.storage import open_store
from lungopacity.words import counted


def kernel_delong(positive_N, first_N, second_N):
    """The test as the paper of 1988 writes it: placements by counting pairs, and a covariance."""

    def placements(scores):
        x, y = scores[positive_N], scores[~positive_N]
        psi = (x[:, None] > y[None, :]) + 0.5 * (x[:, None] == y[None, :])
        return psi.mean(axis=1), psi.mean(axis=0)

    (v10a, v01a), (v10b, v01b) = placements(first_N), placements(second_N)
    s10, s01 = np.cov(v10a, v10b), np.cov(v01a, v01b)
    s = s10 / len(v10a) + s01 / len(v01a)
    variance = s[0, 0] + s[1, 1] - 2 * s[0, 1]
    z = (v10b.mean() - v10a.mean()) / math.sqrt(variance)
    return v10a.mean(), v10b.mean(), 2 * norm.sf(abs(z))


@pytest.mark.parametrize("seed", range(6))
def test_delong_is_that_of_the_paper(seed):
    rng = np.random.default_rng(seed)
    positive = rng.random(160) < 0.4
    first = np.round(positive * 0.8 + rng.normal(0, 1, 160), seed % 3)  # with ties, too
    second = first * 0.5 + positive * 0.6 + rng.normal(0, 1, 160)
    found = auc_difference(positive, first, second)
    auc_a, auc_b, p_value = kernel_delong(positive, first, second)
    assert (found.first, found.second) == pytest.approx((auc_a, auc_b))
    assert found.p_value == pytest.approx(p_value, rel=1e-9)
    assert found.ci_low < found.difference < found.ci_high
    back = auc_difference(positive, second, first)
    assert back.difference == pytest.approx(-found.difference)
    assert back.p_value == pytest.approx(found.p_value)


def test_a_difference_of_many_standard_errors_has_a_small_p_value_rather_than_none():
    rng = np.random.default_rng(0)
    positive = np.arange(400) < 200
    first, second = rng.normal(size=400), 3 * positive + rng.normal(size=400)
    found = auc_difference(positive, first, second)
    assert 0 < found.p_value < 1e-16
    expected = kernel_delong(positive, first, second)[2]
    assert found.p_value == pytest.approx(expected, rel=1e-6, abs=0)


def test_of_equal_models_one_in_twenty_differs_by_chance():
    rng, significant = np.random.default_rng(1), 0
    for _ in range(400):
        positive = rng.random(200) < 0.5
        shared = positive + rng.normal(0, 1, 200)
        scores = [shared + rng.normal(0, 0.7, 200) for _ in range(2)]
        significant += auc_difference(positive, *scores).p_value < 0.05
    assert 0.02 < significant / 400 < 0.09


def test_models_that_never_differ_are_equal():
    positive = np.array([True, False] * 20)
    scores = np.linspace(0, 1, 40)
    same = auc_difference(positive, scores, scores)
    assert (same.difference, same.p_value) == (0, 1)


def test_a_difference_without_spread_or_of_one_film_has_no_p_value():
    positive = np.arange(40) < 20
    perfect = auc_difference(positive, 1.0 - positive, 1.0 * positive)
    assert perfect.difference == 1
    alone = auc_difference(np.arange(40) < 1, np.arange(40.0), np.arange(40.0)[::-1])
    # The second model ranks each positive above one more negative: by a third, which is no whole
    # number of the steps of float64.
    thirds = auc_difference(
        np.arange(6) < 3, np.array([1, 3, 5, 2, 4, 6.0]), np.array([2, 4, 6, 1, 3, 5.0])
    )
    assert thirds.difference == pytest.approx(1 / 3)
    # Films of the other kind may differ as they will.
    ranks, of_20 = np.arange(40.0), np.arange(40) == 20
    alone_too = [auc_difference(one, ranks, np.where(of_20, -1, ranks)) for one in (of_20, ~of_20)]
    for found in (perfect, thirds, alone, *alone_too):
        assert (found.ci_low, found.ci_high, found.p_value) == (None, None, None)


def test_a_spread_among_films_of_one_kind_is_enough():
    """Each positive gains as much, the negatives do not: DeLong's variance is that of these."""
    positive = np.arange(7) < 3
    first = np.array([5.0, 6, 7, 1, 2, 8, 9])
    second = np.array([5.0, 6, 7, 1, 2, 3, 9])
    found = auc_difference(positive, first, second)
    assert found.difference == pytest.approx(1 / 4)
    assert found.p_value == pytest.approx(kernel_delong(positive, first, second)[2])
    # Two films of a kind have a spread, too, whichever they are.
    for kind, scores in ((positive, first), (~positive, -first)):
        of_two = np.arange(7) != np.flatnonzero(kind == positive[0])[-1]
        few = kind[of_two], scores[of_two], np.roll(scores, 3)[of_two]
        assert auc_difference(*few).p_value == pytest.approx(kernel_delong(*few)[2])


def test_differences_over_patients_are_the_second_less_the_first():
    rng = np.random.default_rng(3)
    positive_N, resampling = rng.random(80) < 0.5, Resampling.of([str(n // 2) for n in range(80)])
    scores_N2 = positive_N[:, None] * [0.5, 1.5] + rng.normal(size=(80, 2))
    found = clustered_difference(positive_N, scores_N2, resampling)
    drawn = []
    for weights_N in np.concatenate(list(resampling.weights())):
        first, second = (
            roc_auc_score(positive_N, scores_N, sample_weight=weights_N) for scores_N in scores_N2.T
        )
        drawn.append(second - first)
    bounds = (found.auc_ci_low, found.auc_ci_high)
    assert bounds == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    assert found.auc_ci_low > 0


def report(uri: str, model: str, seed: int, **change) -> str:
    rng = np.random.default_rng(seed)
    labels = np.where(np.arange(60) % 3 == 0, "Lung_Opacity", "Normal")
    score = np.clip((labels == "Lung_Opacity") * 0.4 + rng.random(60) * 0.6, 0, 1)
    frame = pd.DataFrame(
        {
            "image": [f"{number}.png" for number in range(60)],
            "label": labels,
            "model_id": model,
            "content_sha256": [f"of {number}" for number in range(60)],
            "synthetic": False,
            "p_Normal": 1 - score,
            "p_Lung_Opacity": score,
            "predicted_label": np.where(score >= 0.5, "Lung_Opacity", "Normal"),
        }
    ).assign(**change)
    store = open_store(uri)
    store.write("predictions.parquet", frame.to_parquet())
    store.write("evaluation.json", json.dumps({"positive_class": "Lung_Opacity"}).encode())
    return uri


def test_two_reports_are_compared_image_by_image(store_uri, capfd):
    first, second = report(f"{store_uri}/1", "aaa", 1), report(f"{store_uri}/2", "bbb", 2)
    assert main(["compare", "--first", first, "--second", second]) == 0
    told = capfd.readouterr().out
    assert "first aaa, second bbb: 60 images\n" in told
    assert "DeLong p = " in told
    assert "McNemar p = " in told
    assert "sensitivity" not in told  # reports of before they told decisions
    assert main(["compare", "--first", first, "--second", second, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["auc"]["p_value"] <= 1
    frames = [
        pd.read_parquet(io.BytesIO(open_store(uri).read("predictions.parquet")))
        for uri in (first, second)
    ]
    for name, frame in zip(("first", "second"), frames, strict=True):
        right = frame["predicted_label"] == frame["label"]
        assert found["accuracy"][name] == pytest.approx(right.mean())
        ranked = frame["label"] == "Lung_Opacity", frame["p_Lung_Opacity"]
        assert found["auc"][name] == pytest.approx(roc_auc_score(*ranked))
    # Of one that holds more films, is older than the digests, and is of phantoms.
    more = frames[1].head(1).assign(image="60.png")
    frame = pd.concat([frames[1], more]).drop(columns="content_sha256").assign(synthetic=True)
    open_store(second).write("predictions.parquet", frame.to_parquet())
    _, told = told_of(first, second, capfd)
    assert "second bbb: 60 images that both have, of 60 and 61 (synthetic)\n" in told
    assert compare(second, first).synthetic


def told_of(first: str, second: str, capfd) -> tuple[dict, str]:
    assert main(["compare", "--first", first, "--second", second, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert main(["compare", "--first", first, "--second", second]) == 0
    return found, capfd.readouterr().out


def test_films_of_one_patient_are_drawn_together(tmp_path, capfd):
    """Each film five times as one patient's: the interval is that of the sixty films alone."""
    alone = [report(str(tmp_path / f"alone{n}"), f"m{n}", n) for n in (1, 2)]
    five = []
    for number, uri in enumerate(alone):
        frame = pd.read_parquet(f"{uri}/predictions.parquet")
        frame = pd.concat([frame.assign(image=frame["image"] + f"-{copy}") for copy in range(5)])
        # Numbers of the second report would tear every patient apart, and are not looked at.
        cluster = np.tile(np.arange(60), 5) if number == 0 else np.arange(300)
        five.append(f"{tmp_path}/five{number}")
        store = open_store(five[-1])
        store.write("predictions.parquet", frame.assign(patient_cluster=cluster).to_parquet())
        store.write("evaluation.json", open_store(uri).read("evaluation.json"))
    found, told = told_of(*five, capfd)
    assert (found["images"], found["clustered"]["patients"]) == (300, 60)
    assert "some of the 60 patients have several films" in told
    assert "over patients: AUC difference " in told
    found_alone = told_of(*alone, capfd)[0]
    delong_alone = found_alone["auc"]
    clustered = found["clustered"]
    width = clustered["auc_ci_high"] - clustered["auc_ci_low"]
    assert width == pytest.approx(delong_alone["ci_high"] - delong_alone["ci_low"], rel=0.15)
    assert width > 1.8 * (found["auc"]["ci_high"] - found["auc"]["ci_low"])
    for end in ("ci_low", "ci_high"):
        assert found["accuracy"][end] == pytest.approx(found_alone["accuracy"][end], abs=0.003)
    assert "the intervals of accuracy do not\n" in told


def test_decisions_are_compared_among_those_with_and_without_an_opacity(tmp_path, capfd):
    """Two models of one ranking: the second calls more films positive."""
    first, second = (
        report(str(tmp_path / str(n)), f"m{n}", 1, patient_cluster=np.arange(60) // 2)
        for n in (1, 2)
    )
    frames = [pd.read_parquet(f"{uri}/predictions.parquet") for uri in (first, second)]
    p, positive = frames[0]["p_Lung_Opacity"], frames[0]["label"] == "Lung_Opacity"
    called = [p >= 0.7, p >= 0.4]
    for uri, frame, which in zip((first, second), frames, called, strict=True):
        decided = np.where(which, "positive", np.where(p >= 0.3, "review", "negative"))
        open_store(uri).write("predictions.parquet", frame.assign(decision=decided).to_parquet())
    found, told = told_of(first, second, capfd)
    assert found["auc"]["difference"] == found["accuracy"]["only_first_right"] == 0
    for name, films, right in (
        ("sensitivity", positive, called),
        ("specificity", ~positive, [~which for which in called]),
    ):
        share = found[name]
        assert share["first"] == pytest.approx(right[0][films].mean())
        assert share["second"] == pytest.approx(right[1][films].mean())
        assert share["only_second_right"] == (films & right[1] & ~right[0]).sum()
        low, high = share["ci_low"], share["ci_high"]
        assert low < share["second"] - share["first"] == share["difference"] < high
        alone = "; only the first is right on " + counted(share["only_first_right"], "film")
        words = f"difference {share['difference']:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"
        assert (
            f"  {name}  {share['first']:.4f} and {share['second']:.4f}, {words}{alone}, only the"
            in told
        )
    assert "the intervals of accuracy, sensitivity, specificity do not\n" in told
    assert "decided at" not in told  # reports of before they told where
    for uri, name in ((first, "youden"), (second, "our-site")):
        # A point that did not decide says nothing here.
        picked_on = {"our-site": 55, "other-site": 60}
        facts = {"positive_class": "Lung_Opacity", "decided_at": name, "picked_on": picked_on}
        open_store(uri).write("evaluation.json", json.dumps(facts).encode())
    facts, told = told_of(first, second, capfd)
    assert "the first decided at youden, the second at our-site\n" in told
    assert (facts["first_picked_on"], facts["second_picked_on"]) == (0, 55)
    flattered = "the second's was picked on 55 films of its report: its decisions look too good"
    assert f"\n  {flattered}\n" in told
    assert told.count("too good") == 1
    assert found["sensitivity"]["second"] > found["sensitivity"]["first"]
    assert found["specificity"]["second"] < found["specificity"]["first"]


def test_a_model_that_knows_films_of_its_report_is_told(tmp_path, capfd):
    first, second = (report(str(tmp_path / str(n)), f"m{n}", n) for n in (1, 2))
    facts = {"positive_class": "Lung_Opacity", "known_to_model": 40}
    open_store(second).write("evaluation.json", json.dumps(facts).encode())
    found, told = told_of(first, second, capfd)
    assert (found["first_known"], found["second_known"]) == (0, 40)
    known = "the second was trained, selected or calibrated on 40 films of its report"
    assert f"\n  {known}: where these are compared, it looks too good\n" in told
    assert told.count("too good") == 1


def test_decisions_about_different_classes_are_not_compared(tmp_path, capfd):
    """The second model calls each normal film positive: of its class, and not of the first's."""
    first, second = (
        report(str(tmp_path / str(n)), f"m{n}", 1, decision="positive") for n in (1, 2)
    )
    about = json.dumps({"positive_class": "Normal"}).encode()
    open_store(second).write("evaluation.json", about)
    found = compare(first, second)
    assert (found.sensitivity, found.specificity) == (None, None)
    assert (found.positive_class, found.auc.difference) == ("Lung_Opacity", 0)
    assert main(["compare", "--first", first, "--second", second]) == 0
    told = capfd.readouterr()
    assert "sensitivity" not in told.out
    assert "decides about Lung_Opacity and" in told.err


def test_an_undefined_p_value_is_reported_as_such(tmp_path, capfd):
    """The second model ranks all as the first does, and the other way round."""
    positive = np.arange(60) % 3 == 0
    uris = [
        report(str(tmp_path / str(n)), f"m{n}", 1, p_Lung_Opacity=score, p_Normal=1 - score)
        for n, score in enumerate((1.0 * positive, 1.0 - positive))
    ]
    found, told = told_of(*uris, capfd)
    assert (found["auc"]["difference"], found["auc"]["p_value"]) == (-1, None)
    assert "difference -1.0000 (no interval), DeLong p is undefined\n" in told


def test_with_one_film_per_patient_only_the_tests_are_reported(tmp_path, capfd):
    first = report(str(tmp_path / "1"), "aaa", 1)
    second = report(str(tmp_path / "2"), "bbb", 2, patient_cluster=np.arange(60)[::-1])
    found, told = told_of(first, second, capfd)
    assert found["clustered"] is None
    assert "over patients" not in told


@pytest.mark.parametrize("known", [{}, {"patient_cluster": np.arange(60)}], ids=["old", "none"])
def test_the_second_report_can_tell_the_patients_and_equal_models_have_no_interval(
    tmp_path, capfd, known
):
    """The first is too old to tell them, or of labels that name none."""
    first = report(str(tmp_path / "1"), "aaa", 1, **known)
    second = report(str(tmp_path / "2"), "bbb", 1, patient_cluster=np.arange(60) // 2)
    found, told = told_of(first, second, capfd)
    assert found["clustered"]["patients"] == 30
    assert found["clustered"]["auc_ci_low"] is None
    assert "AUC difference +0.0000 (no interval)" in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "Normal"}, "label some images differently"),
        ({"image": [f"other-{n}" for n in range(60)]}, "share no image"),
        ({"p_COVID": 0.0}, "models with different classes"),
        ({"content_sha256": "x"}, r"60 of 60 images with the same name .*, such as 0\.png"),
    ],
)
def test_reports_that_cannot_be_compared_are_refused_with_the_reason(tmp_path, change, message):
    first = report(str(tmp_path / "1"), "aaa", 1)
    second = report(str(tmp_path / "2"), "bbb", 2, **change)
    with pytest.raises(UserError, match=message):
        compare(first, second)


def test_a_folder_without_report_is_refused(tmp_path):
    first = report(str(tmp_path / "1"), "aaa", 1)
    with pytest.raises(UserError, match="no report there"):
        compare(first, str(tmp_path / "none"))
    (tmp_path / "odd").mkdir()
    os.mkfifo(tmp_path / "odd" / "predictions.parquet")
    with pytest.raises(UserError, match=r"cannot be read \(not a regular file\)"):
        compare(first, str(tmp_path / "odd"))
    foreign = io.BytesIO()
    pd.DataFrame({"image": ["a.png"], "score": [0.5]}).to_parquet(foreign)
    open_store(str(tmp_path / "foreign")).write("predictions.parquet", foreign.getvalue())
    with pytest.raises(UserError, match="no report there"):
        compare(first, str(tmp_path / "foreign"))
    open_store(first).write("evaluation.json", b"[]")
    with pytest.raises(UserError, match="evaluate again"):
        compare(first, first)
    open_store(first).delete("evaluation.json")
    with pytest.raises(UserError, match="evaluate again"):
        compare(first, first)
    for label, which in (("Normal", "none"), ("Lung_Opacity", "all")):
        same = report(str(tmp_path / "3"), "ccc", 1, label=label)
        with pytest.raises(UserError, match=f"{which} of the images that the reports share"):
            compare(same, same)


def test_a_report_whose_read_is_refused_is_not_said_to_be_missing(proxy, s3_uri, capfd):
    first, second = (report(f"{s3_uri}/{model}", model, 1) for model in ("aaa", "bbb"))
    for file, what in (
        ("predictions.parquet", ": the report"),
        ("evaluation.json", "/evaluation.json"),
    ):
        proxy.choose_any = lambda _, path, __, file=file: "403" if file in path else None
        assert main(["compare", "--first", first, "--second", second]) == 2
        assert (
            f"{first}{what} cannot be read (access denied (AccessDenied)); check the credentials "
            "and permissions\n"
        ) in capfd.readouterr().err
