"""Stand-ins for what runs in the process that compiles, which finds them by this module's name."""

import itertools
import os
import time

from lungopacity.models import TrainedModel
from lungopacity.training.compile import _compiled


def on_a_quiet_machine(model: TrainedModel) -> tuple[bytes | None, str]:
    """What it does, but that whatever is timed takes a second compiled and three in torch."""
    seconds = itertools.cycle([0.0, 1.0, 1.0, 4.0])
    time.perf_counter = lambda: next(seconds)  # type: ignore[assignment]
    return _compiled(model)


def the_process_ends(_: TrainedModel) -> tuple[None, str]:
    os._exit(1)


def slower(_: TrainedModel) -> tuple[None, str]:
    return None, "CPUs run the network in torch: compiled, it has half the speed"
