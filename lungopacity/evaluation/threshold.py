"""A new operating point of a model for a site: picked from what the site has screened and labelled,
kept in the model folder, and of use to this model alone."""

from __future__ import annotations

import pandas as pd

from lungopacity.dataset.manifest import read_labels
from lungopacity.errors import UserError
from lungopacity.evaluation.operating_points import check_rule, pick
from lungopacity.models import OperatingPoint, TrainedModel, load_model, save_operating_point
from lungopacity.results.query import query
from lungopacity.results.schema import class_column
from lungopacity.results.workbench import quoted

FEWEST_IMAGES = 30
"""Of each kind: below, a threshold is mostly chance."""


def threshold(
    model: str,
    results: str,
    rule: str,
    name: str,
    *,
    run_id: str | None = None,
    labels: str | None = None,
) -> OperatingPoint:
    """Pick by `rule` and keep under `name` in the model folder; screen with it by that name.

    results: URI of a results folder, of which this model's newest scores of each image count, or
    those of one `run_id`. `labels`: a labels file; None takes the labels that the runs were given.
    Raises `UserError` where no scores of this model have labels, or less than `FEWEST_IMAGES` films
    are of either kind, where the name is taken, or the rule is none.
    """
    check_rule(rule)
    trained = load_model(model)
    spec = trained.spec
    rows = _labelled(trained, results, run_id, labels)
    rows = rows[rows["label"].isin(list(spec.class_of_label))]
    positive_N = (rows["label"].map(spec.class_of_label) == spec.positive_class).to_numpy(bool)
    counts = (int(positive_N.sum()), int((~positive_N).sum()))
    if min(counts) < FEWEST_IMAGES:
        raise UserError(
            f"{results}: of the films that {trained.model_id} scored, {counts[0]} are labelled "
            f"{spec.positive_class} and {counts[1]} otherwise; {FEWEST_IMAGES} of each are needed"
        )
    where = f"{len(rows)} films of {results}" + (f", run {run_id}" if run_id else "")
    point = pick(rule, rows["p"].to_numpy(), positive_N, where)
    save_operating_point(model, trained, name, point)
    return point


def _labelled(
    trained: TrainedModel, results: str, run_id: str | None, labels: str | None
) -> pd.DataFrame:
    """`name`, `label` and `p` of the positive class, as a data frame; one row a film."""
    column = class_column("p", trained.spec.positive_class)
    chosen = f"model_id = {quoted(trained.model_id)} AND status = 'ok'"
    if labels is None:
        chosen += " AND label IS NOT NULL"
    if run_id is not None:
        chosen += f" AND run_id = {quoted(run_id)}"
    frame: pd.DataFrame = query(
        results,
        "SELECT coalesce(any_value(member), image) AS name, arg_max(label, screened_at) AS label, "
        f"arg_max({column}, screened_at) AS p FROM predictions WHERE {chosen} "
        "GROUP BY archive, image, member_index, frame",
    ).to_pandas()
    if frame.empty:
        raise UserError(
            f"{results}: has no scores of model {trained.model_id}"
            + (" with labels" if labels is None else "")
            + (f" in run '{run_id}'" if run_id else "")
            + "; screen with it first and see `lungopacity runs`, or give --labels"
        )
    if labels is not None:
        told = read_labels(labels)[["image", "label"]].rename(columns={"image": "name"})
        frame = frame.drop(columns="label").merge(told, on="name")
    return frame
