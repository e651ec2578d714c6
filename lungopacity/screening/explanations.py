"""Pictures of where the model sees the positive class, written to the results folder.

The model stage draws them, because it holds both the film and the network. They travel with the
rows to the writer, which writes each picture before the row that names it.
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
"""The column that holds pictures on their way to the writer; no file has it."""
_SIDE = 224
"""Pixels. With the strip below, a picture is less than 256 pixels high and takes 30 to 40 kB."""
_WRITE_THREADS = 8
_FACTS = ["content_sha256", "frame", "shown_height", "shown_width", "synthetic"]


@dataclass(frozen=True)
class Explainer:
    """Draws the pictures of one run."""

    run_id: str

    def columns(
        self,
        scorer: Any,
        films: pa.Table,
        pixels_NHW: npt.NDArray[np.uint8],
        scores: dict[str, pa.Array],
        shown_N: npt.NDArray[np.bool_],
    ) -> dict[str, pa.Array]:
        """The columns `explanation` and `PICTURE` of N films: filled where `shown_N` is true, null
        elsewhere.

        scorer: the model's `Scorer`. films: N rows of `READ_SCHEMA`. scores: their score columns.
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
    """Write the pictures in the column `PICTURE`, and return the rows without that column.

    Raises `UserError` if one cannot be written.
    """
    if PICTURE not in rows.column_names:
        return rows
    shown = rows.filter(pa.compute.is_valid(rows[PICTURE]))
    with ThreadPoolExecutor(_WRITE_THREADS) as threads:
        keys, pictures = shown["explanation"].to_pylist(), shown[PICTURE].to_pylist()
        list(threads.map(results.write, keys, pictures))
    return rows.drop_columns([PICTURE])
