"""The `lungopacity` command. The jobs in `jobs/` are the same commands, run on a Ray cluster.

Only click is imported here: torch and ray come with the command that needs them, so that `--help`
answers at once.

Exit codes: 0: done. 1: done, but images could not be read, none was scored, `status.json` could not
be written, or `audit` found leaks. 2: stopped (one line says why), done with more failures than
`--max-failed-fraction`, or `doctor` found something missing. 130: ended by Ctrl-C. 141: nobody
reads its output any more. 143: ended by SIGTERM.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from lungopacity.cli import evaluation, labelled, machine, results, screening, training
from lungopacity.cli.options import EPILOG, refuse_empty_texts
from lungopacity.errors import first_line, foreseen, last_line
from lungopacity.observe import DEBUG_VARIABLE, log_lines, tell_end
from lungopacity.words import printable

_FORMAT_VARIABLE = "LUNGOPACITY_LOG_FORMAT"
_NAMED_ELSEWHERE = {
    "--images": "--archive",
    "--archive": "--images",
    "--output": "--results",
    "--results": "--output",
}
"""Options that are called differently in other commands."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(package_name="lungopacity")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    envvar=_FORMAT_VARIABLE,
    show_envvar=True,
    help="Log lines for people, or JSON objects with the run id.",
)
def cli(log_format: str) -> None:
    """Distributed screening of chest radiographs for lung opacity."""
    log_lines(log_format)


for _command in (
    labelled.labels,
    labelled.audit,
    training.train,
    training.tune,
    training.ensemble,
    training.compile_,
    training.models,
    evaluation.evaluate,
    evaluation.explain,
    evaluation.threshold,
    evaluation.compare,
    screening.screen,
    screening.nightly,
    screening.retry,
    screening.clean,
    results.query,
    results.runs,
    machine.doctor,
    machine.benchmark,
):
    cli.add_command(_command)
refuse_empty_texts(cli)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from lungopacity.progress import show_on_terminal
    from lungopacity.runtime import (
        end_if_told,
        end_on_signals,
        have_a_home,
        leave_no_core,
        open_closed_streams,
    )

    open_closed_streams()
    have_a_home()
    # Already here, because the options may be refused.
    log_lines(os.environ.get(_FORMAT_VARIABLE, "text"))
    show_on_terminal()
    end_on_signals()
    leave_no_core()
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["lungopacity", *map(str, given)])
    try:
        return int(
            cli.main(given, prog_name="lungopacity", standalone_mode=False, obj=command) or 0
        )
    except (click.exceptions.Abort, KeyboardInterrupt):
        _tell("stopped")
        return 130
    except SystemExit as ended:
        end_if_told()  # Ray loses the exit code if the signal came during a `ray.get`
        if _nobody_reads():
            return 128 + signal.SIGPIPE  # as for any program whose output goes to `head`
        # Ray's own exit code is 1, which here means that the job is done.
        _tell(f"Ray ended this command (exit code {ended.code}); try again", "error: ")
        return 2
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption):
            error = _with_the_name_here(error)
        if not tell_end(error.format_message()):
            error.show()
        return 2
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            # Not raised: Python would exit with 1, which here means that the job is done.
            traceback.print_exc()
        _tell(_one_line(error), "error: ")
        return 2


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that its reader has closed. click ends the process then."""
    polled = select.poll()
    polled.register(1, 0)
    return any(events & select.POLLERR for _, events in polled.poll(0))


def _with_the_name_here(error: click.NoSuchOption) -> click.NoSuchOption:
    """If the user gave another command's name for an option of this command, suggest this command's
    name, rather than one that is spelt alike. If it is an option of all commands, say where it
    stands."""
    options = [] if error.ctx is None else error.ctx.command.params
    if any(error.option_name in option.opts for option in cli.params):
        message = f"No such option '{error.option_name}' here. Give it before the command's name."
        return click.NoSuchOption(error.option_name, message, ctx=error.ctx)
    here = _NAMED_ELSEWHERE.get(error.option_name)
    if not any(here in option.opts for option in options):
        return error
    message = f"No such option '{error.option_name}'. Did you mean '{here}'?"
    return click.NoSuchOption(error.option_name, message, ctx=error.ctx)


def _tell(why: str, kind: str = "") -> None:
    """Say why the command ends. `kind` is for people: JSON lines have a level."""
    if not tell_end(why):
        click.echo(kind + printable(why), err=True)


def _one_line(error: BaseException) -> str:
    """The message for the user."""
    message = foreseen(error)
    if message is not None:
        return message
    raised = error
    while isinstance(inner := getattr(raised, "cause", None), BaseException):
        raised = inner
    # A text with a traceback ends with the cause, but Ray Data adds advice below a task's error.
    line_of = last_line if raised is error else first_line
    return (
        f"unforeseen {line_of(raised, with_type=True)} "
        f"(a defect; please report it with the traceback that {DEBUG_VARIABLE}=1 shows)"
    )
