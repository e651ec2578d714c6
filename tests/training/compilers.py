"""Stand-ins for what runs in the process that compiles, which finds them by this module's name."""

import os

from lungopacity.models import TrainedModel


def the_process_ends(_: TrainedModel) -> tuple[None, str]:
    os._exit(1)


def slower(_: TrainedModel) -> tuple[None, str]:
    return None, "CPUs run the network in torch: compiled, it has half the speed"
