"""Commands about the machine: doctor, benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from lungopacity.cli.options import EPILOG, words_of


@click.command(epilog=EPILOG)
@click.option("--storage", metavar="URI", default=None, help="Also try to list this place.")
@click.option("--results", metavar="URI", default=None, help="Also try to write to this place.")
def doctor(storage: str | None, results: str | None) -> int:
    """Show what this machine has, what it lacks, and what to do."""
    from lungopacity.doctor import diagnose, report

    findings = diagnose(storage, results)
    click.echo(report(findings))
    return 2 if any(finding.state == "missing" for finding in findings) else 0


@click.group(epilog=EPILOG)
def benchmark() -> None:
    """Measure how fast the parts are, beside the alternatives."""


def _whole_numbers(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> list[int] | None:
    try:
        return None if text is None else [int(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"'{text}' is not a list of whole numbers") from None


_images_option = click.option(
    "--images", metavar="URI", default=None, help="Films. Default: synthetic ones are drawn."
)
_model_option = click.option(
    "--model", metavar="URI", default=None, help="Model folder. Default: an untrained network."
)
_gpu_option = click.option(
    "--use-gpu/--no-gpu", default=None, help="Default: use GPUs if there are any."
)
_output_option = click.option(
    "--output",
    metavar="URI",
    default=None,
    help="Place for scratch files that all nodes of the Ray cluster can write to. Needed if there "
    "are several nodes.",
)
_phantoms_option = click.option(
    "--count", type=int, default=512, show_default=True, help="Synthetic films, if they are drawn."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")


def _print(
    as_json: bool, notes: Sequence[str] = (), **tables: tuple[Sequence[Any], Callable[[Any], str]]
) -> None:
    """Print the conditions and the tables. `tables`: by its name in JSON, each table's rows and the
    function that renders them."""
    import json

    from lungopacity.benchmark.conditions import Conditions

    conditions = Conditions.found(click.get_current_context().obj)
    if as_json:
        found = {name: [vars(row) for row in rows] for name, (rows, _) in tables.items()}
        click.echo(json.dumps({**vars(conditions), "notes": list(notes), **found}))
        return
    click.echo("\n".join([conditions.heading(), *notes]))
    for rows, table in tables.values():
        if rows:
            click.echo(f"\n{table(rows)}")


@benchmark.command(epilog=EPILOG)
@_images_option
@click.option(
    "--model",
    metavar="URI",
    default=None,
    help="Model folder; JPEGs are also decoded straight to its input size (default: 224 px). On a "
    "GPU the model is timed, too, to tell how many cores keep the GPU fed.",
)
@click.option("--count", type=int, default=24, show_default=True, help="Number of films.")
@click.option(
    "--repeats", type=int, default=9, show_default=True, help="Runs that the median is taken of."
)
@click.option(
    "--core-hour",
    metavar="DOLLARS",
    type=click.FloatRange(min=0),
    default=0.04,
    show_default=True,
    help="Price of a core, for the cost of a million images.",
)
@click.option(
    "--gpu-hour",
    metavar="DOLLARS",
    type=click.FloatRange(min=0),
    default=2.5,
    show_default=True,
    help="Price of a GPU, for the same.",
)
@_json_option
def decode(
    as_json: bool, model: str | None, core_hour: float, gpu_hour: float, **options: Any
) -> int:
    """Measure images a second of decoding, by format.

    On one core, from bytes to grey pixels.
    """
    from lungopacity.benchmark import feeding, forward
    from lungopacity.benchmark.decode import decode_speeds, table
    from lungopacity.benchmark.place import NO_GPU, gpus_here

    decoded = decode_speeds(model=model, **options)
    scored: list[forward.ForwardSpeed] = []
    notes = []
    if model is not None and gpus_here():
        scored = forward.speeds_on_gpu(model)
    elif model is not None:
        notes.append(f"cores that keep a GPU fed: skipped: {NO_GPU}")
    fed = feeding.feeding(decoded, scored, core_hour, gpu_hour)
    _print(as_json, notes, figures=(decoded, table), feeding=(fed, feeding.table))
    return 0


_keys_option = click.option(
    "--keys",
    "sizes",
    metavar="N,N,…",
    default="10000,100000,1000000",
    show_default=True,
    callback=_whole_numbers,
    help="Sizes to measure, in objects.",
)


@benchmark.command(epilog=EPILOG)
@_keys_option
@click.option(
    "--images",
    metavar="URI",
    default=None,
    help="Plan a first night over this archive, listing included, instead of over made-up ones.",
)
@click.option("--model", metavar="URI", default=None, help="Model folder to plan for.")
@_json_option
def plan(as_json: bool, **options: Any) -> int:
    """Measure seconds and memory of planning a night.

    It is planned from an inventory file and a history.
    """
    from lungopacity.benchmark.plan import plan_costs, table

    _print(as_json, figures=(plan_costs(**options), table))
    return 0


@benchmark.command(epilog=EPILOG)
@_keys_option
@_json_option
def publish(sizes: list[int], as_json: bool) -> int:
    """Measure seconds and memory of publishing a run.

    From its part files to its commit record.
    """
    from lungopacity.benchmark.publish import publish_costs, table

    _print(as_json, figures=(publish_costs(sizes), table))
    return 0


@benchmark.command(epilog=EPILOG)
@click.option(
    "--networks",
    metavar="NAME,NAME,…",
    default=None,
    callback=words_of,
    help="Default: all that `lungopacity models` lists.",
)
@click.option("--count", "films", type=int, default=64, show_default=True, help="Films in a batch.")
@click.option(
    "--repeats", type=int, default=5, show_default=True, help="Runs that the median is taken of."
)
@_gpu_option
@click.option(
    "--precision",
    metavar="NAME,NAME",
    default="float32,bfloat16",
    show_default=True,
    callback=words_of,
    help="Precisions to time by batch size; bfloat16 is autocast.",
)
@click.option(
    "--batch-sizes",
    metavar="N,N,…",
    default=None,
    callback=_whole_numbers,
    help="Time the forward pass at each of these. Default: on a GPU 1,8,32,64,128,256.",
)
@_json_option
def score(
    as_json: bool,
    networks: list[str] | None,
    films: int,
    repeats: int,
    use_gpu: bool | None,
    precision: list[str],
    batch_sizes: list[int] | None,
) -> int:
    """Measure the forward pass of the networks.

    Prints milliseconds a film on one core, compiled and in torch, and images a second on a GPU, by
    batch size. Without a GPU, --batch-sizes measures images a second on all cores.
    """
    from lungopacity.benchmark import forward
    from lungopacity.benchmark.place import NO_GPU, Place
    from lungopacity.benchmark.score import score_speeds, table
    from lungopacity.models import NETWORK_NAMES

    gpus = Place.found(use_gpu).gpus
    names = networks or NETWORK_NAMES
    one_core = score_speeds(names, films, repeats)
    speeds: list[forward.ForwardSpeed] = []
    skipped = f"on a GPU: skipped: {'--no-gpu' if use_gpu is False else NO_GPU}"
    if gpus or batch_sizes:
        speeds = forward.forward_speeds(
            names,
            use_gpu=gpus > 0,
            precisions=precision,
            batch_sizes=batch_sizes or forward.BATCH_SIZES,
            repeats=repeats,
        )
    notes = [] if gpus else [skipped]
    _print(as_json, notes, one_core=(one_core, table), forward=(speeds, forward.table))
    return 0


@benchmark.command(epilog=EPILOG)
@_images_option
@_model_option
@_phantoms_option
@click.option(
    "--ways",
    metavar="WAY,WAY,…",
    default=None,
    callback=words_of,
    help="What to run. Default: all. An unknown name shows the list.",
)
@click.option("--repeats", type=int, default=3, show_default=True, help="Runs of each way.")
@click.option(
    "--limit-s",
    type=float,
    default=3600.0,
    show_default=True,
    help="Time limit of one run, because some ways hang.",
)
@click.option(
    "--batch-size",
    type=int,
    default=None,
    help="Images in a forward pass. Default: 64, on a GPU 256.",
)
@_gpu_option
@click.option(
    "--precision",
    metavar="NAME",
    default="float32",
    show_default=True,
    help="Precision of the forward pass on a GPU: float32 or bfloat16.",
)
@_output_option
@_json_option
def screen(
    as_json: bool,
    images: str | None,
    model: str | None,
    count: int,
    ways: list[str] | None,
    **options: Any,
) -> int:
    """Measure images a second of screening, and of other ways.

    One of these is a bare loop, the limit of the machine.
    """
    from lungopacity.benchmark.inputs import made_up
    from lungopacity.benchmark.screen import WAYS, check_ways, screen_speeds
    from lungopacity.benchmark.screen_table import table

    check_ways(ways or WAYS)  # before minutes of drawing films
    with made_up(images, model, count=count, output=options["output"]) as given:
        speeds = screen_speeds(given.images, given.model, ways=ways or WAYS, **options)
    _print(as_json, given.notes, figures=(speeds, table))
    return 0


@benchmark.command(epilog=EPILOG)
@click.option(
    "--images",
    metavar="URI",
    multiple=True,
    help="Labelled films. Default: synthetic ones are drawn.",
)
@click.option("--labels", metavar="FILE", default=None, help="Labels file; needed with --images.")
@click.option(
    "--model",
    metavar="NAME|URI",
    default="classical-cnn",
    show_default=True,
    help="A network, or a model folder whose network is trained anew.",
)
@_phantoms_option
@click.option(
    "--image-size",
    type=int,
    default=None,
    help="Side of the model's input, pixels. Default: the recipe's.",
)
@click.option(
    "--workers",
    metavar="N,N,…",
    default=None,
    callback=_whole_numbers,
    help="Numbers of workers. Default: 1, and 2 if the Ray cluster has enough.",
)
@click.option(
    "--precision",
    "precisions",
    metavar="NAME,NAME,…",
    default="auto",
    show_default=True,
    callback=words_of,
    help="float32, bfloat16 or auto; each is measured.",
)
@click.option(
    "--epochs",
    type=int,
    default=4,
    show_default=True,
    help="Epochs of a run; the first is not timed.",
)
@click.option("--repeats", type=int, default=2, show_default=True, help="Runs of each way.")
@_gpu_option
@_output_option
@_json_option
def train(
    as_json: bool,
    images: tuple[str, ...],
    labels: str | None,
    model: str,
    count: int,
    **options: Any,
) -> int:
    """Measure images a second of training, with and without Ray."""
    from lungopacity.benchmark.inputs import made_up
    from lungopacity.benchmark.train import table, train_speeds

    if bool(images) != bool(labels):
        raise click.UsageError("--images and --labels belong together; give both or none")
    if images and labels:
        speeds = train_speeds(images, labels, model=model, **options)
        _print(as_json, figures=(speeds, table))
        return 0
    with made_up(None, model, count=count, output=options["output"]) as given:
        speeds = train_speeds([given.images], given.labels, model=model, **options)
    _print(as_json, given.notes, figures=(speeds, table))
    return 0
