"""Commands for labelled films, before a model is trained: labels, audit."""

from __future__ import annotations

from typing import Any

import click

from lungopacity.cli.options import (
    EPILOG,
    classes_of,
    images_option,
    labels_option,
    pairs_of,
    rule_options,
)
from lungopacity.errors import NOTICE, UserError


@click.command(epilog=EPILOG)
@click.option(
    "--folders", metavar="URI", default=None, help="Place with a folder of images for each class."
)
@click.option(
    "--layout",
    metavar="NAME",
    default=None,
    help="Public set whose tables to read: rsna, nih, chexpert, padchest or vindr.",
)
@click.option("--sql", default=None, help="Query: SELECT … AS image, … AS label FROM NAME.")
@click.option(
    "--table",
    "tables",
    metavar="NAME=FILE",
    multiple=True,
    callback=lambda _context, _option, words: pairs_of(words, "NAME=FILE"),
    help="A CSV or Parquet file for --layout or --sql, and its name there.",
)
@click.option("--output", metavar="FILE", required=True, help="Where the labels file goes, as CSV.")
def labels(
    folders: str | None, layout: str | None, sql: str | None, tables: dict[str, str], output: str
) -> int:
    """Make a labels file from folders or tables.

    One folder per class, the tables of a public set, or any tables by SQL.
    """
    from lungopacity.dataset import layouts

    if sum(way is not None for way in (folders, layout, sql)) != 1:
        raise UserError("give exactly one of --folders, --layout and --sql")
    if folders is not None:
        found = layouts.labels_of_folders(folders)
    elif layout is not None:
        found = layouts.labels_of_layout(layout, tables)
    else:
        found = layouts.labels_of_tables(sql or "", tables)
    click.echo(layouts.summary(layouts.write_labels(found, output)))
    click.echo(NOTICE)
    return 0


@click.command(epilog=EPILOG)
@images_option
@labels_option
@click.option(
    "--classes", default=None, callback=classes_of, help="As for `train`. Default: every label."
)
@click.option(
    "--positive-class",
    default=None,
    help="Class to look for shortcuts to. Default: each class; if there are two, as for `train`.",
)
@click.option("--output", metavar="URI", default=None, help="Where audit.json goes.")
@click.option(
    "--by",
    metavar="COLUMN",
    multiple=True,
    help="Column of the labels, such as the scanner, to try as a predictor of the label; may be "
    "given more than once. View, sex, age and site are always tried.",
)
@rule_options
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def audit(as_json: bool, **options: Any) -> int:
    """Look for copies, patients in two splits, and shortcuts.

    Each of these makes a model look better than it is. Exits with 1 if films or patients leak from
    one split into another. Labels without splits get those that `train` would make.
    """
    from lungopacity.evaluation.audit import audit as run

    found = run(**options)
    click.echo(found.to_json() if as_json else found.summary())
    return 1 if found.leaks else 0
