"""Pictures of where the model saw what it calls positive, written beside the results.

The model stage draws them, for it has film and network in hand; they travel with the rows to the
writer, which puts them before the rows that name them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lungopacity.models import ModelSpec
from lungopacity.results.folder import explanation_key
from lungopacity.results.schema import class_column
from lungopacity.storage import Store

PICTURE = "explanation_png"
"""The column that they travel in; no file has it."""
_SIDE = 224
"""Pixels. With the strip below, a picture has less than 256 and 30 to 40 kB."""
_WRITE_THREADS = 8
_FACTS = ["content_sha256", "frame", "shown_height", "shown_width", "synthetic"]


@dataclass(frozen=True)
class Explainer:
    """Of one run."""

    run_id: str

    def columns(
        self,
        scorer: Any,
        films: pa.Table,
        pixels_NHW: npt.NDArray[np.uint8],
        scores: dict[str, pa.Array],
        shown_N: npt.NDArray[np.bool_],
    ) -> dict[str, pa.Array]:
        """`explanation` and its picture for those of n films that `shown_N` says, null for others.

        scorer: of the model. films: their rows of `READ_SCHEMA`. scores: their score columns.
        """
        from lungopacity.evaluation.overlay import Caption, overlay_png
        from lungopacity.evaluation.pointing import peak_of

        spec: ModelSpec = scorer.model.spec
        p_N = scores[class_column("p", spec.positive_class)]
        keys: list[str | None] = [None] * len(pixels_NHW)
        pictures: list[bytes | None] = [None] * len(pixels_NHW)
        chosen = np.flatnonzero(shown_N)
        rows = films.select(_FACTS).take(pa.array(chosen, pa.int64())).to_pylist()
        maps = scorer.activation_maps(pixels_NHW[chosen])
        for place, row, activation in zip(chosen, rows, maps, strict=True):
            shape = row["shown_height"], row["shown_width"]
            activation = spec.preprocessing.unpad(activation, *shape)
            pictures[place] = overlay_png(
                spec.preprocessing.unpad(pixels_NHW[place], *shape),
                activation,
                Caption(
                    spec.positive_class,
                    p_N[place].as_py(),
                    scores["decision"][place].as_py(),
                    bool(row["synthetic"]) or spec.synthetic,
                ),
                side=_SIDE,
                peak=peak_of(activation),
            )
            keys[place] = explanation_key(self.run_id, row["content_sha256"], row["frame"])
        return {
            "explanation": pa.array(keys, pa.string()),
            PICTURE: pa.array(pictures, pa.binary()),
        }


def write_pictures(results: Store, rows: pa.Table) -> pa.Table:
    """Write the pictures that travel with the rows, and take them out of these.

    Raises `UserError` where one cannot be written.
    """
    if PICTURE not in rows.column_names:
        return rows
    shown = rows.filter(pa.compute.is_valid(rows[PICTURE]))
    with ThreadPoolExecutor(_WRITE_THREADS) as threads:
        keys, pictures = shown["explanation"].to_pylist(), shown[PICTURE].to_pylist()
        list(threads.map(results.write, keys, pictures))
    return rows.drop_columns([PICTURE])
