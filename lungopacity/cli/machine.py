"""Commands on the machine: doctor, benchmark."""

from __future__ import annotations

from typing import Any

import click

from lungopacity.cli.options import EPILOG, words_of


@click.command(epilog=EPILOG)
@click.option("--storage", metavar="URI", default=None, help="Also try to list this place.")
def doctor(storage: str | None) -> int:
    """What this machine has, what is missing, and the mend."""
    from lungopacity.doctor import diagnose, report

    findings = diagnose(storage)
    click.echo(report(findings))
    return 2 if any(finding.state == "missing" for finding in findings) else 0


@click.group(epilog=EPILOG)
def benchmark() -> None:
    """How fast the parts are here, beside what one would pick instead."""


@benchmark.command(epilog=EPILOG)
@click.option("--images", metavar="URI", default=None, help="Films to encode; default: phantoms.")
@click.option("--count", type=int, default=24, show_default=True, help="How many of them.")
@click.option("--repeats", type=int, default=9, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def decode(as_json: bool, **options: Any) -> int:
    """Images a second on one core, from bytes to grey pixels, by format."""
    import json

    from lungopacity.benchmark.decode import decode_speeds, table

    speeds = decode_speeds(**options)
    click.echo(json.dumps([vars(speed) for speed in speeds]) if as_json else table(speeds))
    return 0


_keys_option = click.option(
    "--keys",
    "sizes",
    metavar="N,N,…",
    default="10000,100000,1000000",
    show_default=True,
    callback=lambda _context, _option, text: _numbers(text),
    help="Sizes of the archive, in objects.",
)


@benchmark.command(epilog=EPILOG)
@_keys_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def plan(sizes: list[int], as_json: bool) -> int:
    """Seconds and memory of planning a night, from an inventory file against a history."""
    import json

    from lungopacity.benchmark.plan import plan_costs, table

    costs = plan_costs(sizes)
    click.echo(json.dumps([vars(cost) for cost in costs]) if as_json else table(costs))
    return 0


@benchmark.command(epilog=EPILOG)
@_keys_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def publish(sizes: list[int], as_json: bool) -> int:
    """Seconds and memory of publishing a run, from its part files to its record."""
    import json

    from lungopacity.benchmark.publish import publish_costs, table

    costs = publish_costs(sizes)
    click.echo(json.dumps([vars(cost) for cost in costs]) if as_json else table(costs))
    return 0


@benchmark.command(epilog=EPILOG)
@click.option(
    "--networks",
    metavar="NAME,NAME,…",
    default=None,
    callback=words_of,
    help="Default: all that `lungopacity models` lists.",
)
@click.option("--count", "films", type=int, default=64, show_default=True, help="Films a batch.")
@click.option("--repeats", type=int, default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def score(as_json: bool, networks: list[str] | None, **options: Any) -> int:
    """Milliseconds a film of the forward pass on one core: compiled, and in torch."""
    import json

    from lungopacity.benchmark.score import score_speeds, table
    from lungopacity.models import NETWORK_NAMES

    speeds = score_speeds(networks or NETWORK_NAMES, **options)
    click.echo(json.dumps([vars(speed) for speed in speeds]) if as_json else table(speeds))
    return 0


@benchmark.command(epilog=EPILOG)
@click.option("--images", metavar="URI", required=True, help="Loose images, or shards.")
@click.option("--model", metavar="URI", required=True, help="The model folder.")
@click.option(
    "--ways",
    metavar="WAY,WAY,…",
    default=None,
    callback=words_of,
    help="What to run; default: all. Another name shows the list.",
)
@click.option("--repeats", type=int, default=3, show_default=True)
@click.option(
    "--limit-s", type=float, default=3600.0, show_default=True, help="Of one run: some ways hang."
)
@click.option("--batch-size", type=int, default=64, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def screen(as_json: bool, ways: list[str] | None, **options: Any) -> int:
    """Images a second of screening, beside the bare loop and other ways to do it."""
    import json

    from lungopacity.benchmark.screen import WAYS, screen_speeds, table

    speeds = screen_speeds(ways=ways or WAYS, **options)
    click.echo(json.dumps([vars(speed) for speed in speeds]) if as_json else table(speeds))
    return 0


@benchmark.command(epilog=EPILOG)
@click.option("--images", metavar="URI", required=True, multiple=True, help="Labelled films.")
@click.option("--labels", metavar="FILE", required=True)
@click.option("--model", metavar="NAME", default="classical-cnn", show_default=True)
@click.option("--image-size", type=int, default=None)
@click.option(
    "--workers",
    metavar="N,N,…",
    default="1,2",
    show_default=True,
    callback=lambda _context, _option, text: _numbers(text),
)
@click.option("--epochs", type=int, default=4, show_default=True, help="The first is not timed.")
@click.option("--repeats", type=int, default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def train(as_json: bool, **options: Any) -> int:
    """Images a second of training, beside the same loop without Ray."""
    import json

    from lungopacity.benchmark.train import table, train_speeds

    speeds = train_speeds(**options)
    click.echo(json.dumps([vars(speed) for speed in speeds]) if as_json else table(speeds))
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"'{text}' is no list of whole numbers") from None
