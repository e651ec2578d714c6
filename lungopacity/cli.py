"""The `lungopacity` command. The jobs of `jobs/` are the same commands, run on a Ray cluster.

Only click is imported here: torch and ray come with the command that needs them, so that `--help`
answers at once.

Exit codes: 0 done; 1 done, with images that could not be read; 2 nothing done, and one line says
why, or done with more failures than `--max-failed-fraction`; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from lungopacity.errors import NOTICE, UserError

_EPILOG = f"{NOTICE} A URI is a path, file:// or s3://bucket/prefix; S3 takes the AWS variables."
_DEBUG_VARIABLE = "LUNGOPACITY_DEBUG"

images_option = click.option(
    "--images",
    "images",
    metavar="URI",
    multiple=True,
    required=True,
    help="Prefix of loose images and tar shards, or one shard. May be given more than once.",
)
labels_option = click.option(
    "--labels", metavar="FILE", required=True, help="CSV or Parquet: image, label, split, …"
)
model_option = click.option("--model", metavar="URI", required=True, help="Model folder.")


def _told_limits(_context: click.Context, _option: click.Parameter, text: str | None) -> None:
    """`CPU=80,GPU=4`, for `runtime.capacity`."""
    from lungopacity.runtime import grows_to

    try:
        pairs = [word.split("=") for word in (text or "").split(",") if word]
        limits = {name.strip().upper(): float(number) for name, number in pairs}
    except ValueError:
        limits = {"": 0.0}
    if not set(limits) <= {"CPU", "GPU"}:
        raise click.BadParameter(f"'{text}' is not of the form CPU=80,GPU=4")
    grows_to(limits)


def gpu_option(command: Any) -> Any:
    """What a command takes of a Ray cluster."""
    use = click.option(
        "--use-gpu/--no-gpu", default=None, help="Default: GPUs where the Ray cluster has any."
    )
    grows = click.option(
        "--grows-to",
        metavar="CPU=N,GPU=N",
        default=None,
        expose_value=False,
        callback=_told_limits,
        help="What the Ray cluster may autoscale to. Default: what it is now.",
    )
    return use(grows(command))


operating_point_option = click.option(
    "--operating-point",
    metavar="NAME",
    default=None,
    help="Where scores become decisions: youden (the default), sensitivity=0.95, "
    "specificity=0.95, band=0.99,0.95, or one of `lungopacity threshold`.",
)
hmac_key_option = click.option(
    "--hmac-key", metavar="FILE", default=None, help="Key of patient_hmac and study_hmac."
)


def _words(_context: click.Context, _option: click.Parameter, text: str | None) -> list[str] | None:
    """`blank,colour` as a list; `none` as an empty one."""
    if text is None:
        return None
    return [word.strip() for word in text.split(",") if word.strip() not in ("", "none")]


def rule_options(command: Any) -> Any:
    """What is read and then not scored; the same words wherever images are read."""
    accept = click.option(
        "--accept",
        metavar="CODES",
        default="",
        callback=_words,
        help="Score all the same: lateral_view, wrong_body_part, wrong_modality.",
    )
    reject = click.option(
        "--reject-quality",
        metavar="FLAGS",
        default=None,
        callback=_words,
        help="Quality flags that reject a film, or none. Default: blank, nearly_black, "
        "nearly_white, too_small, inverted, colour.",
    )
    return accept(reject(command))


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(package_name="lungopacity")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    envvar="LUNGOPACITY_LOG_FORMAT",
    help="Log lines for people, or JSON objects with the run id. Also: LUNGOPACITY_LOG_FORMAT.",
)
def cli(log_format: str) -> None:
    """Distributed screening of chest radiographs for lung opacity."""
    from lungopacity.observe import log_lines

    log_lines(log_format)


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
            help="Class names in the order of the scores; images of other labels are left out.",
        ),
        click.option(
            "--positive-class",
            default=None,
            help="The class that decisions are about. Default: Lung_Opacity, else the last of "
            "--classes.",
        ),
        click.option(
            "--image-size", type=int, default=None, help="Side of the model's input, pixels."
        ),
        click.option("--epochs", type=int, default=None),
        click.option("--batch-size", type=int, default=None, help="Over all workers together."),
        click.option(
            "--set",
            "settings",
            metavar="NAME=VALUE",
            multiple=True,
            callback=lambda _context, _option, words: _pairs(words),
            help="Any other setting of the recipe, as learning_rate=0.001; `lungopacity models "
            "NAME`.",
        ),
        rule_options,
        gpu_option,
        click.option("--seed", type=int, default=0, show_default=True),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command(epilog=_EPILOG)
@_training_options
@click.option("--output", metavar="URI", required=True, help="Where the model folder goes.")
@click.option(
    "--workers",
    metavar="N|N:N",
    default="1",
    show_default=True,
    callback=lambda _context, _option, text: _workers(text),
    help="Ray Train workers; 2:8 is from 2 to 8, as nodes come and go.",
)
@click.option(
    "--tensorboard", metavar="URI", default=None, help="Folder for TensorBoard's event files."
)
@click.option(
    "--mlflow", metavar="URI", default=None, help="Tracking server of MLflow; needs its extra."
)
def train(classes: str, **options: Any) -> int:
    """Fit a network to labelled radiographs; write a model folder.

    The same command goes on where a crashed one stopped.
    """
    from lungopacity.training.train import train as run

    result = run(classes=_names(classes), **options)
    kept = result.history[result.best_epoch - 1]
    click.echo(
        f"model {result.model.model_id} in {options['output']}"
        + (" (synthetic)" if result.model.spec.synthetic else "")
        + f": epoch {result.best_epoch} of {len(result.history)} kept, validation loss "
        f"{kept['validation_loss']:.4f}, accuracy {kept['validation_accuracy']:.4f}"
    )
    click.echo(NOTICE)
    return 0


@cli.command(epilog=_EPILOG)
@_training_options
@click.option("--output", metavar="URI", required=True, help="Where the trials' table goes.")
@click.option("--trials", type=int, default=20, show_default=True, help="The recipe is the first.")
@click.option(
    "--search",
    metavar="NAME=FROM",
    multiple=True,
    callback=lambda _context, _option, words: _pairs(words),
    help="log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or choice:A,B of a setting. Default: the "
    "network's own space.",
)
@click.option(
    "--time-budget-s", type=float, default=None, help="What it cuts short runs in the next call."
)
def tune(classes: str, **options: Any) -> int:
    """Search for better settings by validation loss, on all CPUs or GPUs of the cluster.

    The same command goes on where a crashed one stopped; one of more --trials adds them. best.json
    says the command that trains the best.
    """
    from lungopacity.results.render import rendered
    from lungopacity.training.tune import tune as run

    found = run(classes=_names(classes), **options)
    click.echo(rendered(found.trials, "table").decode(), nl=False)
    click.echo(found.best["command"])
    click.echo(NOTICE)
    return 0


@cli.command(epilog=_EPILOG)
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


@cli.command(epilog=_EPILOG)
@click.argument("name", required=False)
def models(name: str | None) -> int:
    """List the networks, or the settings that NAME is trained with and what each does."""
    from lungopacity.training.catalogue import networks_table, recipe_table

    click.echo(networks_table() if name is None else recipe_table(name))
    return 0


@cli.command(epilog=_EPILOG)
@model_option
@images_option
@labels_option
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test", "all"]),
    default="test",
    show_default=True,
)
@click.option("--output", metavar="URI", required=True, help="Where the report goes.")
@rule_options
@gpu_option
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def evaluate(as_json: bool, **options: Any) -> int:
    """Measure a model against labels: metrics, curves, and the paper's Table 1 beside them."""
    from lungopacity.evaluation.evaluate import evaluate as run

    result = run(**options)
    click.echo(result.to_json() if as_json else result.summary())
    return result.exit_code


@cli.command(epilog=_EPILOG)
@click.option("--folders", metavar="URI", default=None, help="Images in a folder for each class.")
@click.option(
    "--layout", metavar="NAME", default=None, help="rsna, nih, chexpert, padchest or vindr."
)
@click.option("--sql", default=None, help="SELECT … AS image, … AS label FROM NAME.")
@click.option(
    "--table",
    "tables",
    metavar="NAME=FILE",
    multiple=True,
    callback=lambda _context, _option, words: _pairs(words),
    help="A CSV or Parquet file for --layout or --sql, and its name there.",
)
@click.option("--output", metavar="FILE", required=True, help="The labels file, CSV.")
def labels(
    folders: str | None, layout: str | None, sql: str | None, tables: dict[str, str], output: str
) -> int:
    """Make a labels file of folders, of a public set's tables, or of any tables by SQL."""
    from lungopacity.dataset import layouts

    if sum(way is not None for way in (folders, layout, sql)) != 1:
        raise UserError("give one of --folders, --layout and --sql")
    if folders is not None:
        found = layouts.labels_of_folders(folders)
    elif layout is not None:
        found = layouts.labels_of_layout(layout, tables)
    else:
        found = layouts.labels_of_tables(sql or "", tables)
    click.echo(layouts.summary(layouts.write_labels(found, output)))
    return 0


@cli.command(epilog=_EPILOG)
@images_option
@labels_option
@click.option("--classes", default=None, help="As for train. Default: every label.")
@click.option("--positive-class", default=None, help="As for train.")
@click.option("--output", metavar="URI", default=None, help="Where audit.json goes.")
@rule_options
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def audit(classes: str | None, as_json: bool, **options: Any) -> int:
    """Look for what would flatter a model on these films: copies, torn patients, shortcuts.

    Exits with 1 where films or patients leak from one split into another.
    """
    from lungopacity.evaluation.audit import audit as run

    found = run(classes=None if classes is None else _names(classes), **options)
    click.echo(found.to_json() if as_json else found.summary())
    return 1 if found.leaks else 0


@cli.command(epilog=_EPILOG)
@model_option
@click.option("--results", metavar="URI", required=True, help="Where it has screened films.")
@click.option(
    "--rule",
    required=True,
    help="youden, sensitivity=S, specificity=S, cost=C, cost=C@PREVALENCE or band=SENS,SPEC.",
)
@click.option("--name", required=True, help="To screen with it: --operating-point NAME.")
@click.option("--run-id", default=None, help="Of this run alone. Default: the newest scores.")
@click.option("--labels", metavar="FILE", default=None, help="Default: those the runs were given.")
def threshold(**options: Any) -> int:
    """Pick a threshold for a site, from films that were screened and labelled there."""
    from lungopacity.evaluation.threshold import threshold as run

    point = run(**options)
    click.echo(
        f"operating point {options['name']} in {options['model']}: positive from "
        f"{point.threshold:.4f}"
        + ("" if point.review_from is None else f", review from {point.review_from:.4f}")
        + f"; sensitivity {point.sensitivity:.4f}, specificity {point.specificity:.4f} on "
        f"{point.images} films"
    )
    click.echo(NOTICE)
    return 0


@cli.command(epilog=_EPILOG)
@click.option("--first", metavar="URI", required=True, help="Report of `evaluate`.")
@click.option("--second", metavar="URI", required=True, help="Report of another model.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def compare(first: str, second: str, as_json: bool) -> int:
    """Whether one of two models is better on the same images, or the difference may be chance."""
    from lungopacity.evaluation.compare import compare as run

    found = run(first, second)
    click.echo(found.to_json() if as_json else found.summary())
    return 0


def _screening_options(command: Any) -> Any:
    """How an archive is screened, whether by hand or by the night."""
    options: list[Any] = [
        click.option("--archive", metavar="URI", required=True, help="What to screen."),
        model_option,
        click.option(
            "--inventory",
            metavar="URI",
            default=None,
            help="Instead of listing: manifest.json of an S3 Inventory report, or a Parquet list.",
        ),
        click.option("--batch-size", type=int, default=64, show_default=True),
        operating_point_option,
        click.option("--labels", metavar="FILE", default=None, help="Labels to measure against."),
        click.option(
            "--baseline", metavar="RUN", default=None, help="Run id to measure drift against."
        ),
        rule_options,
        click.option(
            "--max-failed-fraction",
            type=float,
            default=0.05,
            show_default=True,
            help="Exit with 2, after all is written, when more of the images could not be read.",
        ),
        hmac_key_option,
        click.option(
            "--hash-keys", is_flag=True, help="Write HMACs of object names, not the names."
        ),
        click.option(
            "--key-map", metavar="URI", default=None, help="Where --hash-keys keeps the names."
        ),
        gpu_option,
        click.option(
            "--gpus-per-actor",
            type=float,
            default=1.0,
            show_default=True,
            help="0.5 puts two copies of the model on one GPU.",
        ),
        click.option(
            "--model-actors",
            type=int,
            default=None,
            help="Copies of the model. Default: as many as the cluster has room for.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command(epilog=_EPILOG)
@_screening_options
@click.option(
    "--output", metavar="URI", required=True, help="Results folder; runs are added to it."
)
@click.option("--run-id", default=None, help="Default: a new one. Give a killed run's to go on.")
@click.option("--limit", type=int, default=None, help="Only the first so many objects, by key.")
def screen(**options: Any) -> int:
    """Score every image of an archive; publish predictions and metrics as Parquet."""
    from lungopacity.screening.report import summary
    from lungopacity.screening.screen import screen as run

    result = run(**options)
    click.echo(summary(result))
    return result.exit_code


@cli.command(epilog=_EPILOG)
@_screening_options
@click.option("--results", metavar="URI", required=True, help="Results folder.")
@click.option(
    "--max-images", type=int, default=None, help="At most so many objects; the next night goes on."
)
@click.option("--dry-run", is_flag=True, help="Only say how many objects a night would screen.")
def nightly(**options: Any) -> int:
    """Screen what no published run has screened with this model yet.

    New and changed objects, those that failed by the storage's fault, and what killed or missed
    nights left. One night at a time: the results folder has a lock. Ends with status.json there.
    """
    from lungopacity.screening.nightly import nightly as run
    from lungopacity.screening.report import night_summary

    night = run(**options)
    click.echo(night_summary(night))
    return night.exit_code


@cli.command(epilog=_EPILOG)
@click.option("--results", metavar="URI", required=True, help="Results folder.")
@click.option("--run-id", required=True, help="The run that could not read everything.")
@click.option("--model", metavar="URI", default=None, help="If the run's model folder was moved.")
@click.option("--labels", metavar="FILE", default=None, help="Labels to measure against.")
@hmac_key_option
@gpu_option
def retry(**options: Any) -> int:
    """Screen again what a run could not read for a reason that may have passed."""
    from lungopacity.screening.report import summary
    from lungopacity.screening.retry import retry as run

    result = run(**options)
    if result is None:
        click.echo("nothing to do again: no image of this run failed for a reason that passes")
        return 0
    click.echo(summary(result))
    return result.exit_code


@cli.command(epilog=_EPILOG)
@click.option("--results", metavar="URI", required=True, help="Results folder.")
@click.option(
    "--older-than",
    "older_than_days",
    metavar="DAYS",
    type=float,
    default=7.0,
    show_default=True,
    help="What belongs to no published run is removed when it is older.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def clean(**options: Any) -> int:
    """Sweep what killed jobs left behind; nothing that a published run needs."""
    from lungopacity.screening.clean import clean as run
    from lungopacity.screening.report import clean_summary

    click.echo(clean_summary(run(**options)))
    return 0


@cli.command(epilog=_EPILOG)
@click.option("--results", metavar="URI", required=True, help="Results folder.")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    default="table",
    show_default=True,
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
    return 0


@cli.command(epilog=_EPILOG)
@click.option("--results", metavar="URI", required=True, help="Results folder.")
def runs(results: str) -> int:
    """List the published runs."""
    from lungopacity.results.query import runs as run
    from lungopacity.results.render import rendered

    sys.stdout.buffer.write(rendered(run(results).drop_columns("record"), "table"))
    return 0


@cli.command(epilog=_EPILOG)
@click.option("--storage", metavar="URI", default=None, help="Also try to list this place.")
def doctor(storage: str | None) -> int:
    """What this machine has, what is missing, and the mend."""
    from lungopacity.doctor import diagnose, report

    findings = diagnose(storage)
    click.echo(report(findings))
    return 2 if any(finding.state == "missing" for finding in findings) else 0


@cli.group(epilog=_EPILOG)
def benchmark() -> None:
    """How fast the parts are here, beside what one would pick instead."""


@benchmark.command(epilog=_EPILOG)
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


@benchmark.command(epilog=_EPILOG)
@click.option(
    "--keys",
    "sizes",
    metavar="N,N,…",
    default="10000,100000,1000000",
    show_default=True,
    callback=lambda _context, _option, text: _numbers(text),
    help="Sizes of the archive, in objects.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def plan(sizes: list[int], as_json: bool) -> int:
    """Seconds and memory of planning a night, from an inventory file against a history."""
    import json

    from lungopacity.benchmark.plan import plan_costs, table

    costs = plan_costs(sizes)
    click.echo(json.dumps([vars(cost) for cost in costs]) if as_json else table(costs))
    return 0


def _names(text: str) -> tuple[str, ...]:
    """`A,B` as its words."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _workers(text: str) -> int | tuple[int, int]:
    """`4`, or `2:8`."""
    try:
        numbers = [int(word) for word in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise click.BadParameter(f"'{text}' is not of the form 4 or 2:8")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _pairs(words: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` words as a mapping."""
    pairs = [word.partition("=") for word in words]
    for name, sign, _ in pairs:
        if not name or not sign:
            raise click.BadParameter(f"'{name}' is not of the form NAME=VALUE")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"'{text}' is no list of whole numbers") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from lungopacity.observe import log_lines
    from lungopacity.progress import show_on_terminal
    from lungopacity.runtime import end_on_sigterm

    log_lines("text")
    show_on_terminal()
    end_on_sigterm()
    try:
        return int(cli.main(arguments, prog_name="lungopacity", standalone_mode=False) or 0)
    except click.exceptions.Abort:
        click.echo("stopped", err=True)
        return 130
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return 2
    except Exception as error:
        if os.environ.get(_DEBUG_VARIABLE):
            raise
        click.echo(f"error: {_one_line(error)}", err=True)
        return 2


def _one_line(error: BaseException) -> str:
    """What to tell the user. Ray wraps what a worker raised, sometimes more than once."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause) is UserError:
            return str(cause)
        if isinstance(cause, ModuleNotFoundError):
            return (
                f"the Python at {sys.executable}, or that of a Ray node, has no module "
                f"'{cause.name}'; install requirements.lock there"
            )
        cause = getattr(cause, "cause", None) or cause.__cause__
    message = (str(error).strip().splitlines() or [""])[-1]
    return (
        f"unforeseen {type(error).__name__}: {message} "
        f"(a defect; please report it with the traceback that {_DEBUG_VARIABLE}=1 shows)"
    )


if __name__ == "__main__":
    sys.exit(main())
