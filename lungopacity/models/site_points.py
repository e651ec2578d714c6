"""Operating points that sites add to a model folder as `operating_points/NAME.json`. Each belongs
to one model, by its id, and to one positive class."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from lungopacity.errors import NOTICE, ErrorCode, ImageError, UserError
from lungopacity.models.model import OperatingPoint, TrainedModel, document_of
from lungopacity.storage import ConflictError, Store, check_name, is_name, open_store

log = logging.getLogger(__name__)

_FOLDER = "operating_points"
_OTHERWISE = "otherwise"
"""Key of the file of a point that decides by view: the threshold for all other films."""
_PICKED_ON = "picked_on_sha256"
"""Key of the file: digests of the films that the point was picked on."""


def save_operating_point(
    uri: str, model: TrainedModel, name: str, point: OperatingPoint, films: Iterable[str] = ()
) -> None:
    """Adds a site's operating point to the model folder at `uri`.

    films: `content_sha256` of the films that it was picked on; none where these are the model's
    validation films, which the folder lists. Raises `UserError` where the name cannot be a file's,
    is that of one of the model's own points, or is taken.
    """
    if name in model.spec.operating_points:
        raise UserError(
            f"--name {name}: is one of the model's own operating points; choose another --name"
        )
    check_name(name, "--name")
    kept = document_of(point)
    if point.by_view:
        # So that a version that knows no views refuses the point as damaged. It would decide all
        # films by this threshold.
        kept[_OTHERWISE] = {"threshold": kept.pop("threshold")}
    document = {
        "notice": NOTICE,
        "model_id": model.model_id,
        "positive_class": model.spec.positive_class,
        "name": name,
        **kept,
        _PICKED_ON: sorted(set(films)),
    }
    data = json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"
    store, key = open_store(uri), _key_of(name)
    try:
        store.write(key, data, if_absent=True)
    except ConflictError as error:
        # After a lost response, the client's second attempt finds the file that the first wrote.
        with suppress(ImageError):
            if store.read(key) == data:
                return
        raise UserError(
            f"{uri}: has an operating point '{name}' already; choose another --name"
        ) from error


def copy_operating_points(source: str, target: str) -> None:
    """Copies sites' operating points from the folder at `source` to another of the same model."""
    store, copy = open_store(source), open_store(target)
    for item in store.list(f"{_FOLDER}/"):
        copy.write(item.key, store.read(item.key))


def with_operating_point(uri: str, model: TrainedModel, name: str | None) -> TrainedModel:
    """The model with the operating point of that name as the one that decides; None keeps its own.

    Raises `UserError` where the folder at `uri` has no point of that name, or two, or one that was
    chosen for another model or class: a threshold is meaningful only for the scores that it was
    chosen on.
    """
    if name is None:
        return model
    store = open_store(uri)
    known = model.spec.operating_points.get(name)
    if known is not None:
        # Earlier versions let a site take such a name.
        if is_name(name) and store.head(_key_of(name)) is not None:
            raise UserError(
                f"{store.uri}/{_key_of(name)}: '{name}' is also one of the model's own operating "
                "points; rename the file, and ask for it by its new name"
            )
    else:
        if not is_name(name):
            raise _unknown(store, model, name)
        try:
            document = json.loads(store.read(_key_of(name)))
            known = OperatingPoint.of({**document, **document.get(_OTHERWISE, {})})
            chosen_for = document["model_id"]
            # Models that differ only in their positive class share an id. Older files lack it.
            positive = document.get("positive_class", model.spec.positive_class)
        except ImageError as error:
            if error.code is not ErrorCode.MISSING:
                raise UserError(
                    f"{uri}: operating point '{name}' cannot be read ({error.message}); "
                    f"{error.advice}"
                ) from error
            raise _unknown(store, model, name) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{uri}: operating point '{name}' is damaged; pick it again") from error
        if chosen_for != model.model_id:
            raise UserError(
                f"{uri}: operating point '{name}' was chosen for model {chosen_for}, not for "
                f"{model.model_id}; pick it again with `lungopacity threshold`"
            )
        if positive != model.spec.positive_class:
            raise UserError(
                f"{uri}: operating point '{name}' was chosen for the probability of {positive}, "
                f"and the model decides about {model.spec.positive_class}; pick one with "
                "`lungopacity threshold` under another --name"
            )
    return replace(model, spec=replace(model.spec, operating_point=known))


def _key_of(name: str) -> str:
    return f"{_FOLDER}/{name}.json"


def points_of_sites(uri: str, model: TrainedModel) -> dict[str, OperatingPoint]:
    """The operating points that sites have added to the folder at `uri`, by name.

    One that is damaged, or for another model or class, is left out with a warning.
    """
    points = {}
    for name in _added(open_store(uri)):
        if name not in model.spec.operating_points:
            try:
                points[name] = with_operating_point(uri, model, name).spec.operating_point
            except UserError as error:
                log.warning("left out: %s", error)
    return points


def films_of_site_point(uri: str, name: str) -> frozenset[str]:
    """`content_sha256` of the films that a site's point in the folder at `uri` was picked on; none
    where these were validation films, or where an older version wrote the file without them."""
    return frozenset(json.loads(open_store(uri).read(_key_of(name))).get(_PICKED_ON, []))


def _added(store: Store) -> list[str]:
    """The names of the operating points that sites have added, sorted."""
    folder = f"{_FOLDER}/"
    return sorted(item.key.removeprefix(folder)[:-5] for item in store.list(folder))


def _unknown(store: Store, model: TrainedModel, name: str) -> UserError:
    known = ", ".join([*model.spec.operating_points, *_added(store)])
    return UserError(
        f"{store.uri}: has no operating point '{name}'; "
        + (f"it has {known}" if known else "it has only one: leave out --operating-point")
    )
