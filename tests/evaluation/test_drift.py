import math

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungopacity.evaluation.drift import MIXES, Sample, Shift, drift_metrics, psi, shifts
from lungopacity.evaluation.table import metric_value


def sample(
    scores: np.ndarray, failed: int = 0, views: dict | None = None, unlike: int | None = 0
) -> Sample:
    n = len(scores)
    mixes = {
        "status": {"ok": n, "failed": failed},
        "view_position": views or {"PA": n},
        "modality": {"DX": n},
        "quality_out_of_distribution": (
            {} if unlike is None else {True: unlike, False: n - unlike}
        ),
    }
    return Sample(scores.astype(np.float32), mixes)


def verdicts(before: Sample, now: Sample) -> dict[str, str]:
    return {shift.name: shift.verdict for shift in shifts(before, now)}


def test_psi_is_the_sum_over_bins_worked_by_hand():
    # p = 60/100 and 40/100, q = 50/100 and 50/100: 0.1 ln 1.2 - 0.1 ln 0.8 = 0.04055
    index, by_chance = psi([500_000, 500_000], [600_000, 400_000])
    assert index == pytest.approx(0.040547, abs=1e-4)
    # χ² of one degree exceeds 3.841 one time in 20.
    assert by_chance == pytest.approx(3.841459 * 2e-6, rel=1e-4)
    assert psi([500_000], [250_000]) == (0, pytest.approx(3.841459 * 6e-6, rel=1e-4))


def by_hand(before: list[int], now: list[int]) -> float:
    q, p = ([(n + 0.5) / (sum(all_) + len(all_) / 2) for n in all_] for all_ in (before, now))
    return sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_scores_are_binned_by_deciles_and_mixes_by_all_values_of_either_run():
    before = sample(np.arange(1000) / 1000, views={"PA": 900, "AP": 100})
    now = sample(np.array([0.05, *[0.1505] * 3, *[0.999] * 6]), views={"PA": 6, "LL": 3, None: 1})
    score, status, view, modality, unlike = shifts(before, now)
    assert status.psi == pytest.approx(by_hand([1000, 0], [10, 0]))
    assert score.psi == pytest.approx(by_hand([100] * 10, [1, 3, 0, 0, 0, 0, 0, 0, 0, 6]))
    assert view.psi == pytest.approx(by_hand([900, 100, 0, 0], [6, 0, 3, 1]))
    assert (modality.psi, view.n, score.n) == (0, 10, 10)
    assert unlike.psi == pytest.approx(by_hand([1000, 0], [10, 0]))


@pytest.mark.parametrize("which", ["before", "now"])
def test_a_run_in_which_no_film_could_be_read_gives_no_verdict(which):
    whole = sample(np.arange(100) / 100)
    none = Sample(whole.scores_N[:0], {**{name: {} for name in MIXES}, "status": {"failed": 9}})
    runs = (none, whole) if which == "before" else (whole, none)
    found = verdicts(*runs)
    del found["status"]
    # Not compared if the baseline has it of no film.
    unlike = () if which == "before" else ("quality_out_of_distribution",)
    assert found == dict.fromkeys(("score", "view_position", "modality", *unlike), "too_few")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=2, max_size=12))
def test_equal_histograms_have_none_and_no_histogram_a_negative_one(counts):
    other = counts[::-1]
    if sum(counts) == 0:
        assert np.isnan(psi(counts, counts)[0])
        return
    assert psi(counts, counts)[0] == pytest.approx(0, abs=1e-12)
    assert psi(counts, other)[0] >= -1e-12


def test_chance_alone_exceeds_its_bound_one_time_in_twenty():
    rng = np.random.default_rng(0)
    baseline, exceeded = rng.beta(2, 5, 4000), 0
    for _ in range(400):
        (score, *_) = shifts(sample(baseline), sample(rng.beta(2, 5, 800)))
        exceeded += score.psi > score.by_chance
    assert 0.02 < exceeded / 400 < 0.09


def test_a_shift_of_scores_views_or_failures_is_found_and_named():
    rng = np.random.default_rng(1)
    before = sample(rng.beta(2, 5, 4000), failed=20, views={"PA": 3000, "AP": 1000, None: 20})
    assert (
        verdicts(before, sample(rng.beta(2, 5, 2000), failed=10, views={"PA": 1500, "AP": 510}))[
            "score"
        ]
        == "stable"
    )
    assert verdicts(before, sample(rng.beta(5, 2, 2000)))["score"] == "drifted"
    assert verdicts(before, sample(rng.beta(2, 5, 500), failed=400))["status"] == "drifted"
    mixed = sample(rng.beta(2, 5, 2000), views={"PA": 300, "AP": 1700})
    assert verdicts(before, mixed)["view_position"] == "drifted"
    assert verdicts(before, mixed)["modality"] == "stable"


def test_films_unlike_the_training_films_are_a_shift_though_the_scores_are_as_before():
    """As those of another scanner: 16 % instead of 2 %."""
    rng = np.random.default_rng(4)
    before, now = (
        sample(rng.beta(2, 5, n), unlike=unlike) for n, unlike in ((1000, 16), (300, 48))
    )
    alike = sample(rng.beta(2, 5, 300), unlike=8)
    name = "quality_out_of_distribution"
    found = verdicts(before, now)
    assert (found["score"], found[name]) == ("stable", "drifted")
    assert verdicts(before, alike)[name] == "stable"
    # An older model flags no film, and nothing is said about it.
    old = sample(rng.beta(2, 5, 1000), unlike=None)
    assert name not in verdicts(old, old)


@pytest.mark.parametrize(("n", "verdict"), [(0, "too_few"), (1, "too_few"), (30, "drifted")])
def test_a_small_night_has_a_verdict_only_if_its_scores_are_far_off(n, verdict):
    rng = np.random.default_rng(2)
    before, now = sample(rng.beta(2, 5, 4000)), sample(rng.beta(9, 1, n))
    assert verdicts(before, sample(rng.beta(2, 5, n)))["score"] == "too_few"
    found = shifts(before, now)
    assert found[0].verdict == verdict
    values = [metric.value for metric in drift_metrics(found, before, now)]
    assert np.isfinite(values).all()


def test_scores_that_are_all_alike_can_be_compared():
    same = sample(np.full(3000, 0.5))
    assert verdicts(same, same)["score"] == "stable"
    assert verdicts(same, sample(np.full(3000, 0.9)))["score"] == "drifted"


def test_scores_that_leave_the_one_that_most_had_are_a_shift():
    """A saturated model: films that were all 0, or mostly, or a quarter, are higher tonight."""
    mostly, quarter = (
        np.concatenate([np.zeros(zeros), np.linspace(0.1, 1, 1000 - zeros)]) for zeros in (700, 250)
    )
    for before, now in (
        (np.zeros(1000), np.full(1000, 0.9)),
        (mostly, np.where(mostly == 0, 0.05, mostly)),
        (quarter, np.where(quarter == 0, 0.05, quarter)),
    ):
        (score, *_) = shifts(sample(before), sample(now))
        assert score.psi > 1
        (same, *_) = shifts(sample(before), sample(before))
        assert (same.psi, same.verdict) == (0, "stable")


def test_metrics_carry_the_comparison_and_both_failure_rates():
    rng = np.random.default_rng(3)
    before, now = sample(rng.beta(2, 5, 990), failed=10), sample(rng.beta(2, 5, 900), failed=100)
    metrics = drift_metrics(shifts(before, now), before, now)
    assert metric_value(metrics, "failed_rate") == 0.1
    assert metric_value(metrics, "baseline_failed_rate") == 0.01
    sound = Sample(now.scores_N, {**now.mixes, "status": {"ok": 900}})
    assert metric_value(drift_metrics([], before, sound), "failed_rate") == 0
    assert metric_value(metrics, "drift_ks", "score") < 0.1
    assert {metric.class_name for metric in metrics if metric.metric == "drift_psi"} == {
        "score",
        *MIXES,
    }


def test_a_sample_is_taken_from_predictions():
    rows = duckdb.from_arrow(
        pa.table(
            {
                "status": ["ok", "ok", "failed", "failed", "rejected"],
                "p_Lung_Opacity": pa.array([0.25, 0.75, None, None, None], pa.float32()),
                "view_position": ["PA", None, None, None, "LL"],
                "modality": pa.array([None] * 5, pa.string()),
                "quality_out_of_distribution": [False, False, None, None, True],
            }
        )
    )
    found = Sample.of(rows, "p_Lung_Opacity", failed_again=1)
    assert sorted(found.scores_N.tolist()) == [0.25, 0.75]
    assert found.mixes["status"] == {"ok": 2, "failed": 1, "rejected": 1}
    # Of a file that could not be read no header was seen.
    assert found.mixes["view_position"] == {"PA": 1, None: 1, "LL": 1}
    assert found.mixes["modality"] == {None: 3}
    assert found.mixes["quality_out_of_distribution"] == {False: 2, True: 1}
    again = Sample.of(rows, "p_Lung_Opacity", failed_again=2)
    assert again.mixes["status"] == {"ok": 2, "rejected": 1}


@pytest.mark.parametrize(
    ("index", "by_chance", "ks", "p_value", "verdict"),
    [
        (0.19, 0.1, None, None, "stable"),
        (0.21, 0.1, None, None, "drifted"),
        (0.50, 0.21, 0.9, 0.01, "too_few"),
        (0.50, 0.21, 0.9, 1e-9, "drifted"),  # few films, but no chance
        (0.05, 0.1, 0.3, 1e-4, "drifted"),
        (0.05, 0.1, 0.3, 0.01, "stable"),  # so far apart by chance
        (0.05, 0.1, 0.1, 1e-9, "stable"),  # surely apart, and by little
    ],
)
def test_a_shift_must_be_large_and_no_chance(index, by_chance, ks, p_value, verdict):
    assert Shift("score", index, by_chance, 500, ks, p_value).verdict == verdict
