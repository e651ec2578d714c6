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
    help="Which films of the labels. Labels without splits have those that training made of them.",
)
@click.option("--output", metavar="URI", required=True, help="Where the report goes.")
@click.option(
    "--by",
    metavar="COLUMN",
    multiple=True,
    help="Column of the labels to form subgroups of; may be given more than once. View, sex, age "
    "and site are always taken.",
)
@operating_point_option
@rule_options
@gpu_option
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def evaluate(as_json: bool, **options: Any) -> int:
    """Measure a model against labels: metrics, curves, and the paper's Table 1 beside them."""
    from lungopacity.evaluation.evaluate import evaluate as run

    result = run(**options)
    click.echo(result.to_json() if as_json else result.summary())
    return result.exit_code


@click.command(epilog=EPILOG)
@model_option
@images_option
@click.option("--labels", metavar="FILE", default=None, help="Only the images that it labels.")
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test", "all"]),
    default=None,
    help="Of --labels. Default: test.",
)
@click.option(
    "--boxes",
    metavar="FILE",
    default=None,
    help="CSV or Parquet: image, x, y, width, height; or RSNA's table of boxes.",
)
@click.option("--limit", type=OBJECTS, default=None, help="Only the first so many images.")
@click.option("--output", metavar="URI", required=True, help="Where pictures and tables go.")
@operating_point_option
@rule_options
@click.option(
    "--use-gpu/--no-gpu", default=None, help="Default: the GPU of this machine, if it has one."
)
@click.option("--json", "as_json", is_flag=True, help="Print counts and metrics as JSON.")
def explain(as_json: bool, **options: Any) -> int:
    """Show where a model sees the positive class (Grad-CAM), and whether boxes lie there.

    Works in this process, without a Ray cluster; of an archive, see `screen --explain`.
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
    help="Where it has screened films. Default: its own validation films.",
)
@click.option(
    "--rule",
    required=True,
    help="youden, sensitivity=S, specificity=S, cost=C, cost=C@PREVALENCE or band=SENS,SPEC.",
)
@click.option("--name", required=True, help="To screen with it: --operating-point NAME.")
@click.option("--run-id", default=None, help="Of this run alone. Default: the newest scores.")
@click.option("--labels", metavar="FILE", default=None, help="Default: those the runs were given.")
def threshold(**options: Any) -> int:
    """Pick a threshold for a site, from films that were screened and labelled there.

    Or, without --results, by another rule from the validation films of training.
    """
    from lungopacity.evaluation.threshold import threshold as run

    point = run(**options)
    click.echo(f"operating point {options['name']} in {options['model']}: {point.summary()}")
    click.echo(NOTICE)
    return 0


@click.command(epilog=EPILOG)
@click.option("--first", metavar="URI", required=True, help="Report of `evaluate`.")
@click.option("--second", metavar="URI", required=True, help="Report of another model.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def compare(first: str, second: str, as_json: bool) -> int:
    """Whether one of two models is better on the same images, or the difference may be chance."""
    from lungopacity.evaluation.compare import compare as run

    found = run(first, second)
    click.echo(found.to_json() if as_json else found.summary())
    return 0
