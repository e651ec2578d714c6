"""Commands that ask for results: query, runs."""

from __future__ import annotations

import sys

import click

from lungopacity.cli.options import EPILOG
from lungopacity.errors import NOTICE


@click.command(epilog=EPILOG)
@click.option("--results", metavar="URI", required=True, help="Results folder.")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    default="table",
    show_default=True,
    help="Of what is printed; json: an object a line.",
)
@click.argument("sql")
def query(results: str, output_format: str, sql: str) -> int:
    """Ask SQL of the published runs.

    The tables are predictions, metrics and runs, and latest: of predictions, each object's newest.
    """
    from lungopacity.results.query import query as run
    from lungopacity.results.render import rendered

    data = rendered(run(results, sql), output_format)
    sys.stdout.buffer.write(data)
    # Not among the rows, which other programs read.
    click.echo(NOTICE, err=True)
    return 0


@click.command(epilog=EPILOG)
@click.option("--results", metavar="URI", required=True, help="Results folder.")
@click.option(
    "--unfinished", is_flag=True, help="Instead: those that were begun, and not published."
)
def runs(results: str, unfinished: bool) -> int:
    """List the published runs."""
    from lungopacity.results.query import runs as published
    from lungopacity.results.render import rendered

    if unfinished:
        from lungopacity.screening.plan import unfinished_table

        table = unfinished_table(results)
    else:
        table = published(results).drop_columns("record")
    sys.stdout.buffer.write(rendered(table, "table"))
    click.echo(NOTICE)
    return 0
