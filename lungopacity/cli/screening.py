"""Commands that screen archives: screen, nightly, retry, clean."""

from __future__ import annotations

from typing import Any

import click

from lungopacity.cli.options import (
    EPILOG,
    OBJECTS,
    gpu_option,
    hmac_key_option,
    model_option,
    operating_point_option,
    rule_options,
)
from lungopacity.errors import NOTICE

_gpus_per_actor_option = click.option(
    "--gpus-per-actor",
    type=float,
    default=1.0,
    show_default=True,
    help="GPUs for each copy of the model; 0.5 puts two copies on one GPU.",
)
_model_actors_option = click.option(
    "--model-actors",
    type=int,
    default=None,
    help="Copies of the model, in processes that only score. Default: one for each GPU; without "
    "GPUs, one in every process that reads.",
)


def _screening_options(command: Any) -> Any:
    """Add the options for how an archive is screened, by `screen` or by `nightly`."""
    options: list[Any] = [
        click.option("--archive", metavar="URI", required=True, help="Archive to screen."),
        model_option,
        click.option(
            "--inventory",
            metavar="URI",
            default=None,
            help="Read this instead of listing the archive: manifest.json of an S3 Inventory "
            "report, the folder of its configuration (for the newest report), or a Parquet list.",
        ),
        click.option(
            "--batch-size",
            type=int,
            default=None,
            help="Images in a forward pass. Default: 64, on a GPU 256.",
        ),
        operating_point_option,
        click.option(
            "--labels",
            metavar="FILE",
            default=None,
            help="Labels to measure against, on films that the model did not learn from.",
        ),
        click.option(
            "--baseline", metavar="RUN", default=None, help="Run id to measure drift against."
        ),
        click.option(
            "--explain", is_flag=True, help="Write a picture of each positive film (Grad-CAM)."
        ),
        rule_options,
        click.option(
            "--max-failed-fraction",
            type=float,
            default=0.05,
            show_default=True,
            help="Exit with 2, after all is written, if more of the images could not be read.",
        ),
        hmac_key_option,
        click.option(
            "--hash-keys", is_flag=True, help="Write HMACs of object names instead of the names."
        ),
        click.option(
            "--key-map", metavar="URI", default=None, help="Where --hash-keys keeps the names."
        ),
        gpu_option,
        click.option(
            "--precision",
            metavar="NAME",
            default="float32",
            show_default=True,
            help="Precision of the forward pass on GPUs: float32, or bfloat16, which changes "
            "scores a little.",
        ),
        _gpus_per_actor_option,
        _model_actors_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(epilog=EPILOG)
@_screening_options
@click.option(
    "--output", metavar="URI", required=True, help="Results folder; runs are added to it."
)
@click.option(
    "--run-id", default=None, help="Default: a new one. Give the id of a killed run to resume it."
)
@click.option(
    "--limit", type=OBJECTS, default=None, help="Screen only this many objects, the first by key."
)
def screen(**options: Any) -> int:
    """Score every image of an archive.

    Publishes predictions and metrics as Parquet.
    """
    from lungopacity.screening.report import summary
    from lungopacity.screening.screen import screen as run

    result = run(**options)
    click.echo(summary(result))
    return result.exit_code


@click.command(epilog=EPILOG)
@_screening_options
@click.option("--results", metavar="URI", required=True, help="Results folder.")
@click.option(
    "--max-images",
    type=OBJECTS,
    default=None,
    help="Screen at most this many objects; the next night continues.",
)
@click.option("--dry-run", is_flag=True, help="Only say how many objects a night would screen.")
def nightly(**options: Any) -> int:
    """Screen what no published run has screened with this model yet.

    This includes new and changed objects, those that failed because of the storage, and what killed
    or missed nights left. A lock in the results folder allows one night at a time. At its end, the
    night writes status.json there.
    """
    from lungopacity.screening.nightly import nightly as run
    from lungopacity.screening.report import night_summary

    night = run(**options)
    click.echo(night_summary(night))
    return night.exit_code


@click.command(epilog=EPILOG)
@click.option("--results", metavar="URI", required=True, help="Results folder.")
@click.option("--run-id", required=True, help="The run that could not read everything.")
@click.option(
    "--model", metavar="URI", default=None, help="Needed only if the run's model folder was moved."
)
@click.option(
    "--labels",
    metavar="FILE",
    default=None,
    help="Labels to measure against, on films that the model did not learn from.",
)
@hmac_key_option
@gpu_option
@click.option(
    "--precision",
    metavar="NAME",
    default=None,
    help="Precision of the forward pass. Default: the run's, or float32 without a GPU.",
)
@_gpus_per_actor_option
@_model_actors_option
def retry(**options: Any) -> int:
    """Screen again what a run could not read.

    Only images that failed for a reason that may have passed are tried again.
    """
    from lungopacity.screening.report import summary
    from lungopacity.screening.retry import left_alone
    from lungopacity.screening.retry import retry as run

    result = run(**options)
    if result is None:
        click.echo(
            "nothing to do again: no image of this run failed for a reason that may have passed, "
            "except those that later runs have read"
        )
        click.echo(NOTICE)
    else:
        click.echo(summary(result))
    left = left_alone(options["results"], options["run_id"])
    if left:
        counts = ", ".join(f"{code}: {count}" for code, count in sorted(left.items()))
        click.echo(f"not tried again, because nothing would change: {counts}")
    return max(0 if result is None else result.exit_code, 1 if left else 0)


@click.command(epilog=EPILOG)
@click.option("--results", metavar="URI", required=True, help="Results folder.")
@click.option(
    "--older-than",
    "older_than_days",
    metavar="DAYS",
    type=float,
    default=7.0,
    show_default=True,
    help="Remove what belongs to no published run once it is older than this.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def clean(**options: Any) -> int:
    """Remove what killed jobs left behind.

    Nothing that a published run needs is removed.
    """
    from lungopacity.screening.clean import clean as run
    from lungopacity.screening.report import clean_summary

    click.echo(clean_summary(run(**options)))
    click.echo(NOTICE)
    return 0
