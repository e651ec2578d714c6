"""Commands that make models: train, tune, ensemble, compile, models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from lungopacity.cli.options import (
    EPILOG,
    classes_of,
    gpu_option,
    images_option,
    labels_option,
    pairs_of,
    rule_options,
    workers_of,
)
from lungopacity.errors import NOTICE


def _training_options(command: Any) -> Any:
    """Add the options for what is trained and on which films, by `train` or by `tune`."""
    options: list[Any] = [
        images_option,
        labels_option,
        click.option(
            "--model",
            default="classical-cnn",
            show_default=True,
            help="Network; `lungopacity models` lists them.",
        ),
        click.option(
            "--weights",
            metavar="none|imagenet|FILE",
            default=None,
            help="Initial weights. Default: imagenet if they are installed, else none.",
        ),
        click.option(
            "--classes",
            callback=classes_of,
            default="Normal,Lung_Opacity",
            show_default=True,
            help="Labels that are classes, in the order of the scores: A is one, A=Name renames "
            "it, A+B=Name merges two, -A leaves A out. Images of other labels are left out; but if "
            "every word is of the form -A, every other label is a class.",
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
            help="Side of the model's input, in pixels. Default: the recipe's.",
        ),
        click.option(
            "--epochs",
            type=int,
            default=None,
            help="Passes over the training films. Default: the recipe's.",
        ),
        click.option(
            "--batch-size",
            type=int,
            default=None,
            help="Films in a step, over all workers together. Default: the recipe's.",
        ),
        click.option(
            "--set",
            "settings",
            metavar="NAME=VALUE",
            multiple=True,
            callback=lambda _context, _option, words: pairs_of(words),
            help="Any other setting of the recipe, such as learning_rate=0.001; `lungopacity "
            "models NAME` lists them.",
        ),
        rule_options,
        gpu_option,
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            help="Seed of all that is random in training: initial weights, order of the films, "
            "augmentation, dropout. Splits do not depend on it.",
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
    help="Ray Train workers; 2:8 means from 2 to 8, as nodes come and go.",
)
@click.option(
    "--tensorboard", metavar="URI", default=None, help="Folder for TensorBoard's event files."
)
@click.option(
    "--mlflow",
    metavar="URI",
    default=None,
    help="MLflow tracking server; needs pip install 'lungopacity[mlflow]'.",
)
def train(**options: Any) -> int:
    """Fit a network to labelled radiographs; write a model folder.

    After a crash, the same command continues where it stopped.
    """
    from lungopacity.training.train import train as run

    result = run(**options)
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
@click.option("--output", metavar="URI", required=True, help="Where the table of trials goes.")
@click.option(
    "--trials", type=int, default=20, show_default=True, help="Trials; the recipe is the first."
)
@click.option(
    "--search",
    metavar="NAME=FROM",
    multiple=True,
    callback=lambda _context, _option, words: pairs_of(words),
    help="Setting to search over: log:LOW:HIGH or uniform:LOW:HIGH, int:LOW:HIGH for whole "
    "numbers, or choice:A,B. Default: the network's own space.",
)
@click.option(
    "--time-budget-s",
    type=float,
    default=None,
    help="Stop after so many seconds; the next call runs the trials that this cut short.",
)
def tune(**options: Any) -> int:
    """Search for better settings.

    The best have the lowest validation loss after calibration. Trials run side by side, on CPUs or
    GPUs. After a crash, the same command continues where it stopped; with more --trials, it adds
    them. best.json holds the command that trains the best.
    """
    from lungopacity.results.render import rendered
    from lungopacity.training.tune import tune as run

    found = run(**options)
    click.echo(rendered(found.trials, "table").decode(), nl=False)
    click.echo(found.best["command"])
    click.echo(NOTICE)
    return 0


@click.command(epilog=EPILOG)
@click.option(
    "--model",
    "members",
    metavar="URI",
    multiple=True,
    required=True,
    help="Model folder; give two or more.",
)
@click.option("--output", metavar="URI", required=True, help="Where the model folder goes.")
def ensemble(members: Sequence[str], output: str) -> int:
    """Combine models that learnt from the same films into one.

    It averages their calibrated logits.
    """
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
    """Copy a model folder, with its network compiled for CPUs.

    It gives the same scores, faster. For folders written before training did so, or whose compiled
    network can no longer be loaded.
    """
    from lungopacity.training.compile import compile as run

    found = run(model, output)
    click.echo(f"model {found.model_id} in {output}: {found.spec.training['on_cpus']}")
    click.echo(NOTICE)
    return 0


@click.command(epilog=EPILOG)
@click.argument("name", required=False)
def models(name: str | None) -> int:
    """List the networks, or the settings of one network.

    With NAME, tells each setting that it is trained with, and what that does.
    """
    from lungopacity.training.catalogue import networks_table, recipe_table

    click.echo(networks_table() if name is None else recipe_table(name))
    click.echo(NOTICE)
    return 0
