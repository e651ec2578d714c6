"""Settings that are refused before the archive is listed."""

from __future__ import annotations

import pytest

from lungopacity.errors import UserError
from lungopacity.evaluation.evaluate import evaluate
from lungopacity.evaluation.explain import explain
from lungopacity.results.folder import commit_run
from lungopacity.screening.job import screening_job
from lungopacity.storage import open_store
from tests.models.tiny import write_tiny_model
from tests.results.records import record_of


def test_classes_that_would_share_a_column_are_refused(tmp_path):
    write_tiny_model(str(tmp_path / "model"), class_names=("a-b", "a_b"), positive_class="a_b")
    with pytest.raises(UserError, match="classes 'a-b' and 'a_b' would share the column p_a_b;"):
        screening_job(str(tmp_path / "model"), str(tmp_path / "results"))


def test_drift_is_measured_against_a_run_of_the_same_model(tmp_path):
    model, results = str(tmp_path / "model"), str(tmp_path / "results")
    write_tiny_model(model)
    with pytest.raises(UserError, match=r"--baseline: .* has no published run 'good'; see"):
        screening_job(model, results, baseline="good")
    open_store(results).write("metrics/good.parquet", b"")
    commit_run(open_store(results), "good", record_of("good"))
    with pytest.raises(UserError, match=r"run 'good' is of model m, not \w{16}: scores of two"):
        screening_job(model, results, baseline="good")


def test_attempts_at_a_run_agree_in_its_precision_and_cpus_have_one(tmp_path):
    model, results = str(tmp_path / "model"), str(tmp_path / "results")
    write_tiny_model(model)
    assert screening_job(model, results).rules.precision == "float32"
    assert screening_job(model, results, precision="bfloat16").rules.precision == "bfloat16"
    with pytest.raises(UserError, match="bfloat16 needs a GPU"):
        screening_job(model, results, precision="bfloat16", use_gpu=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus_per_actor": 0.0}, "--gpus-per-actor must be above 0 and at most 1, not 0"),
        ({"gpus_per_actor": 1.5}, "--gpus-per-actor must be above 0 and at most 1, not 1.5"),
        ({"model_actors": 0}, "--model-actors must be at least 1, not 0"),
    ],
)
def test_what_no_cluster_could_give_is_refused_before_anything_is_listed(options, message):
    with pytest.raises(UserError, match=message):
        screening_job("no model", "no results", **options)


def test_a_model_without_distribution_cannot_reject_films_unlike_its_own(tmp_path):
    """Its folder does not say where its training films lie: no film would be rejected."""
    model, output = str(tmp_path / "model"), str(tmp_path / "output")
    write_tiny_model(model)
    labels = tmp_path / "labels.csv"
    labels.write_text("image,label,split\na.png,Normal,test\n")
    refused = pytest.raises(
        UserError,
        match=r"--reject-quality out_of_distribution: .* does not hold the distribution of",
    )
    flags = ["out_of_distribution"]
    with refused:
        screening_job(model, output, reject_quality=flags)
    with refused:
        evaluate(model, [str(tmp_path)], str(labels), output, reject_quality=flags)
    with refused:
        explain(model, [str(tmp_path)], output, reject_quality=flags)
    assert screening_job(model, output, reject_quality=["blank"]).model.distribution is None
