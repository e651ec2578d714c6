"""The networks by name, the model folder, and the one place that runs a trained network."""

from lungopacity.models.folder import (
    ModelSpec,
    OperatingPoint,
    TrainedModel,
    is_model,
    load_model,
    read_history,
    save_model,
    weights_of,
)
from lungopacity.models.networks import NETWORK_NAMES, build_network, check_network

__all__ = [
    "NETWORK_NAMES",
    "ModelSpec",
    "OperatingPoint",
    "TrainedModel",
    "build_network",
    "check_network",
    "is_model",
    "load_model",
    "read_history",
    "save_model",
    "weights_of",
]
