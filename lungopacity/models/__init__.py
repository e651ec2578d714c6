"""Networks by name, the model folder, and the only code that runs a trained network."""

from lungopacity.models.folder import (
    films_known_to,
    find_training_films,
    find_validation,
    is_model,
    load_model,
    read_history,
    read_validation,
    refuse_model,
    save_model,
    validation_films,
)
from lungopacity.models.model import (
    ModelSpec,
    OperatingPoint,
    TrainedModel,
    load_weights,
    weights_of,
)
from lungopacity.models.networks import (
    ENSEMBLE,
    NETWORK_NAMES,
    NetworkCard,
    build_network,
    check_network,
    network_card,
    settings_of_network,
)
from lungopacity.models.site_points import (
    copy_operating_points,
    films_of_site_point,
    points_of_sites,
    save_operating_point,
    with_operating_point,
)

__all__ = [
    "ENSEMBLE",
    "NETWORK_NAMES",
    "ModelSpec",
    "NetworkCard",
    "OperatingPoint",
    "TrainedModel",
    "build_network",
    "check_network",
    "copy_operating_points",
    "films_known_to",
    "films_of_site_point",
    "find_training_films",
    "find_validation",
    "is_model",
    "load_model",
    "load_weights",
    "network_card",
    "points_of_sites",
    "read_history",
    "read_validation",
    "refuse_model",
    "save_model",
    "save_operating_point",
    "settings_of_network",
    "validation_films",
    "weights_of",
    "with_operating_point",
]
