"""Commands that make models: train, tune, ensemble, compile, models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from lungopacity.cli.options import (
    EPILOG,
    gpu_option,
    images_option,
    labels_option,
    names_of,
    pairs_of,
    rule_options,
    workers_of,
)
from lungopacity.errors import NOTICE


def _training_options(command: Any) -> Any:
    """What a network learns and from which films, whether once or in a search."""
    options: list[Any] = [
        images_option,
        labels_option,
        click.option(
            "--model", default="classical-cnn", show_default=True, help="See `lungopacity models`."
        ),
        click.option(
            "--weights",
            metavar="none|imagenet|FILE",
            default=None,
            help="First weights. Default: imagenet where they are installed, else none.",
        ),
        click.option(
            "--classes",
            default="Normal,Lung_Opacity",
            show_default=True,
            help="Labels that are classes, in the order of the scores: A is one, A=Name renames "
            "it, A+B=Name merges, -A leaves A out. Images of other labels are left out; of words "
            "that only leave out, every other label is a class.",
        ),
        click.option(
            "--positive-class",
            default=None,
            help="The class that decisions are about. Default: Lung_Opacity, else the last of "
            "--classes.",
        ),
        click.option(
            "--image-size",
            type=int,
            default=None,
            help="Side of the model's input, pixels. Default: the recipe's.",
        ),
        click.option(
            "--epochs",
            type=int,
            default=None,
            help="Times that every training film is seen. Default: the recipe's.",
        ),
        click.option(
            "--batch-size",
            type=int,
            default=None,
            help="Films a step, over all workers together. Default: the recipe's.",
        ),
        click.option(
            "--set",
            "settings",
            metavar="NAME=VALUE",
            multiple=True,
            callback=lambda _context, _option, words: pairs_of(words),
            help="Any other setting of the recipe, as learning_rate=0.001; `lungopacity models "
            "NAME`.",
        ),
        rule_options,
        gpu_option,
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            help="Of all that training draws: first weights, order of the films, augmentation, "
            "dropout. Splits do not depend on it.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(epilog=EPILOG)
@_training_options
@click.option("--output", metavar="URI", required=True, help="Where the model folder goes.")
@click.option(
    "--workers",
    metavar="N|N:N",
    default="1",
    show_default=True,
    callback=lambda _context, _option, text: workers_of(text),
    help="Ray Train workers; 2:8 is from 2 to 8, as nodes come and go.",
)
@click.option(
    "--tensorboard", metavar="URI", default=None, help="Folder for TensorBoard's event files."
)
@click.option(
    "--mlflow",
    metavar="URI",
    default=None,
    help="Tracking server of MLflow; pip install 'lungopacity[mlflow]'.",
)
def train(classes: str, **options: Any) -> int:
    """Fit a network to labelled radiographs; write a model folder.

    The same command goes on where a crashed one stopped.
    """
    from lungopacity.training.train import train as run

    result = run(classes=names_of(classes), **options)
    kept = result.history[result.best_epoch - 1]
    click.echo(
        f"model {result.model.model_id} in {options['output']}"
        + (" (synthetic)" if result.model.spec.synthetic else "")
        + f": epoch {result.best_epoch} of {len(result.history)} kept, validation loss "
        f"{kept['validation_loss']:.4f}, accuracy {kept['validation_accuracy']:.4f}"
    )
    click.echo(NOTICE)
    return 0


@click.command(epilog=EPILOG)
@_training_options
@click.option("--output", metavar="URI", required=True, help="Where the trials' table goes.")
@click.option("--trials", type=int, default=20, show_default=True, help="The recipe is the first.")
@click.option(
    "--search",
    metavar="NAME=FROM",
    multiple=True,
    callback=lambda _context, _option, words: pairs_of(words),
    help="log:LOW:HIGH or uniform:LOW:HIGH of a setting, int:LOW:HIGH of one in whole numbers, or "
    "choice:A,B. Default: the network's own space.",
)
@click.option(
    "--time-budget-s", type=float, default=None, help="What it cuts short runs in the next call."
)
def tune(classes: str, **options: Any) -> int:
    """Search for better settings by the calibrated validation loss, on the cluster's CPUs or GPUs.

    The same command goes on where a crashed one stopped; one of more --trials adds them. best.json
    says the command that trains the best.
    """
    from lungopacity.results.render import rendered
    from lungopacity.training.tune import tune as run

    found = run(classes=names_of(classes), **options)
    click.echo(rendered(found.trials, "table").decode(), nl=False)
    click.echo(found.best["command"])
    click.echo(NOTICE)
    return 0


@click.command(epilog=EPILOG)
@click.option(
    "--model", "members", metavar="URI", multiple=True, required=True, help="Two or more folders."
)
@click.option("--output", metavar="URI", required=True, help="Where the model folder goes.")
def ensemble(members: Sequence[str], output: str) -> int:
    """Make one model of several that learnt from the same films; their logits are averaged."""
    from lungopacity.training.ensemble import ensemble as run

    model = run(members, output)
    click.echo(
        f"model {model.model_id} in {output}: {len(members)} members, on validation accuracy "
        f"{model.spec.metrics['accuracy']:.4f}, AUC {model.spec.metrics['auc']:.4f}"
    )
    click.echo(NOTICE)
    return 0


@click.command("compile", epilog=EPILOG)
@click.option("--model", metavar="URI", required=True, help="A model folder.")
@click.option("--output", metavar="URI", required=True, help="Where the model folder goes.")
def compile_(model: str, output: str) -> int:
    """Write a model folder anew, with its network compiled for CPUs: the same scores, sooner.

    For folders of before training did so, or whose compiled network cannot be loaded any more.
    """
    from lungopacity.training.compile import compile as run

    found = run(model, output)
    click.echo(f"model {found.model_id} in {output}: {found.spec.training['on_cpus']}")
    click.echo(NOTICE)
    return 0


@click.command(epilog=EPILOG)
@click.argument("name", required=False)
def models(name: str | None) -> int:
    """List the networks, or the settings that NAME is trained with and what each does."""
    from lungopacity.training.catalogue import networks_table, recipe_table

    click.echo(networks_table() if name is None else recipe_table(name))
    click.echo(NOTICE)
    return 0
