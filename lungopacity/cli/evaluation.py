"""Commands that measure models: evaluate, explain, compare, threshold."""

from __future__ import annotations

from typing import Any

import click

from lungopacity.cli.options import (
    EPILOG,
    OBJECTS,
    gpu_option,
    images_option,
    labels_option,
    model_option,
    operating_point_option,
    rule_options,
)
from lungopacity.errors import NOTICE


@click.command(epilog=EPILOG)
@model_option
@images_option
@labels_option
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test", "all"]),
    default="test",
    show_default=True,
    help="Which films of the labels. If they have no splits, those that training made are used.",
)
@click.option("--output", metavar="URI", required=True, help="Where the report goes.")
@click.option(
    "--by",
    metavar="COLUMN",
    multiple=True,
    help="Column of the labels to form subgroups by; may be given more than once. View, sex, age "
    "and site are always used.",
)
@operating_point_option
@rule_options
@gpu_option
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def evaluate(as_json: bool, **options: Any) -> int:
    """Measure a model against labels.

    Writes metrics with intervals, also by subgroup, a model card and figures. Prints the paper's
    Table 1 beside the same figures of this model.
    """
    from lungopacity.evaluation.evaluate import evaluate as run

    result = run(**options)
    click.echo(result.to_json() if as_json else result.summary())
    return result.exit_code


@click.command(epilog=EPILOG)
@model_option
@images_option
@click.option("--labels", metavar="FILE", default=None, help="Use only the images labelled here.")
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test", "all"]),
    default=None,
    help="Which films of --labels. Default: test.",
)
@click.option(
    "--boxes",
    metavar="FILE",
    default=None,
    help="CSV or Parquet with image, x, y, width, height; or RSNA's table of boxes.",
)
@click.option("--limit", type=OBJECTS, default=None, help="Use only this many images, the first.")
@click.option("--output", metavar="URI", required=True, help="Where pictures and tables go.")
@operating_point_option
@rule_options
@click.option(
    "--use-gpu/--no-gpu", default=None, help="Default: use this machine's GPU, if it has one."
)
@click.option("--json", "as_json", is_flag=True, help="Print counts and metrics as JSON.")
def explain(as_json: bool, **options: Any) -> int:
    """Show where a model sees the positive class (Grad-CAM).

    With --boxes, also measures how often readers' boxes lie there. Runs in this process, without
    Ray. For an archive, use `screen --explain`.
    """
    from lungopacity.evaluation.explain import explain as run

    result = run(**options)
    click.echo(result.to_json() if as_json else result.summary())
    return result.exit_code


@click.command(epilog=EPILOG)
@model_option
@click.option(
    "--results",
    metavar="URI",
    default=None,
    help="Results folder with films that the model has screened. Default: its validation films.",
)
@click.option(
    "--rule",
    required=True,
    help="How to pick it: youden, sensitivity=S, specificity=S, cost=C, cost=C@PREVALENCE or "
    "band=SENS,SPEC.",
)
@click.option(
    "--name", required=True, help="Name of the new point; to use it: --operating-point NAME."
)
@click.option(
    "--run-id", default=None, help="Use this run alone. Default: each image's newest scores."
)
@click.option(
    "--labels", metavar="FILE", default=None, help="Default: the labels that the runs were given."
)
@click.option(
    "--by-view",
    is_flag=True,
    help="Pick a threshold for each view, too, where headers state it and the view has enough "
    "films.",
)
def threshold(**options: Any) -> int:
    """Pick a decision threshold for a site.

    It is picked from films that were screened and labelled there. Without --results, pick one by
    another rule from the validation films of training.
    """
    from lungopacity.evaluation.threshold import threshold as run

    point = run(**options)
    click.echo(f"operating point {options['name']} in {options['model']}: {point.summary()}")
    click.echo(NOTICE)
    return 0


@click.command(epilog=EPILOG)
@click.option("--first", metavar="URI", required=True, help="Report that `evaluate` wrote.")
@click.option("--second", metavar="URI", required=True, help="The other model's report.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def compare(first: str, second: str, as_json: bool) -> int:
    """Test whether one of two models is better, or only by chance.

    They are compared on the images that both reports have.
    """
    from lungopacity.evaluation.compare import compare as run

    found = run(first, second)
    click.echo(found.to_json() if as_json else found.summary())
    return 0
