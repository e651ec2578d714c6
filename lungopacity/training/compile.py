"""Compiles the network of a model folder that has none compiled, or one that ncnn cannot load."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lungopacity.archive.phantom_film import draw_body, draw_film
from lungopacity.errors import UserError
from lungopacity.models import (
    ENSEMBLE,
    TrainedModel,
    copy_operating_points,
    find_training_films,
    find_validation,
    load_model,
    read_history,
    refuse_model,
    save_model,
)
from lungopacity.models.compiled import compiled_if_better
from lungopacity.radiograph import Preprocessing
from lungopacity.runtime import KEEP_FREED_MEMORY, alone, environment
from lungopacity.storage.probe import check_writable
from lungopacity.training.ensemble import members_of

_FILMS = 32


def compile(model: str, output: str) -> TrainedModel:
    """Copies the model folder at URI `model` to `output`, and adds its network, compiled.

    Training compiles networks itself. The model's id stays the same, so its results and its sites'
    operating points stay valid. Torch and the compiled network are compared on synthetic films,
    because a model folder has no films. Raises `UserError` where the compiled network is not used
    (see `compiled_if_better`), or the output holds a model or cannot be written to.
    """
    refuse_model(output)
    check_writable(output)
    trained = load_model(model)
    # In a process of its own, because pnnx or ncnn may crash on an unfamiliar network. torch gets
    # the environment of screening's workers: without it, it takes up to twice as long.
    with environment(KEEP_FREED_MEMORY):
        try:
            compiled, said = alone(_compiled, trained)
        except ChildProcessError as error:
            raise UserError(
                f"{model}: compiling crashed the process; nothing was written"
            ) from error
    if compiled is None:
        raise UserError(f"{model}: {said}; nothing was written")
    spec = replace(trained.spec, training={**trained.spec.training, "on_cpus": said})
    trained = replace(trained, spec=spec, compiled=compiled)
    copy_operating_points(model, output)
    save_model(
        output, trained, read_history(model), find_validation(model), find_training_films(model)
    )
    return trained


def _compiled(model: TrainedModel) -> tuple[bytes | None, str]:
    members = members_of(model) if model.spec.architecture == ENSEMBLE else None
    return compiled_if_better(model, _phantoms(model.spec.preprocessing), members)


def _phantoms(preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Synthetic films, (n, image_size, image_size) uint8."""
    films = []
    for seed in range(_FILMS):
        rng = np.random.default_rng(seed)
        film = draw_film(rng, draw_body(rng, "F" if seed % 2 else "M", 50), "PA")
        films.append(preprocessing.square((film.pixels >> 4).astype(np.uint8)))
    return np.stack(films)
