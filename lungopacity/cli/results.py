"""Commands that read results: query, runs."""

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
    help="Output format; json is one object a line.",
)
@click.argument("sql")
def query(results: str, output_format: str, sql: str) -> int:
    """Query the published runs in SQL.

    The tables are predictions, metrics and runs, and latest: the newest predictions of each object.
    """
    from lungopacity.results.query import query as run
    from lungopacity.results.render import rendered

    data = rendered(run(results, sql), output_format)
    sys.stdout.buffer.write(data)
    # Kept apart from the rows, which other programs read.
    click.echo(NOTICE, err=True)
    return 0


@click.command(epilog=EPILOG)
@click.option("--results", metavar="URI", required=True, help="Results folder.")
@click.option(
    "--unfinished", is_flag=True, help="List those that were begun but not published instead."
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
    if table.num_rows:
        sys.stdout.buffer.write(rendered(table, "table"))
    else:
        click.echo("no run is unfinished")
    click.echo(NOTICE)
    return 0
