"""Stand-ins for what runs in the compiling process, which imports this module by its name."""

import itertools
import os
import time

from lungopacity.models import TrainedModel
from lungopacity.training.compile import _compiled


def on_a_quiet_machine(model: TrainedModel) -> tuple[bytes | None, str]:
    """Compiles as usual, but every timing is one second compiled and three in torch."""
    seconds = itertools.cycle([0.0, 1.0, 1.0, 4.0])
    time.perf_counter = lambda: next(seconds)  # type: ignore[assignment]
    return _compiled(model)


def the_process_ends(_: TrainedModel) -> tuple[None, str]:
    os._exit(1)


def slower(_: TrainedModel) -> tuple[None, str]:
    return None, "CPUs run the network in torch: compiled, it has half the speed"
