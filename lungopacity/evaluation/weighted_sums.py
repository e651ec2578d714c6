"""Sums over films, each counted as often as a replicate draws its patient.

Most columns are yes or no. Films that agree in all of these, and lie in the same bins, form a cell.
There are far fewer cells than films, and of a cell only the weight of its films is needed.

Array names carry their shape: N films, R replicates, F columns, Q cells, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Sums = npt.NDArray[np.float64] | npt.NDArray[np.bool_]
Binned = tuple[npt.NDArray[np.integer], npt.NDArray[np.float64]]
"""The bin of each film, and its value there."""


class WeightedSums:
    """Columns of the same films, and values in bins, sorted by cell once for all replicates."""

    def __init__(self, columns: Sequence[Sums], binned: Sequence[Binned], bins: int) -> None:
        """columns: (N,) each, one or more of them bool. binned: for each, bins from 0 to
        `bins` - 1, which is below 256."""
        flags_NF: npt.NDArray[np.bool_] = np.stack(
            [one for one in columns if one.dtype == np.bool_], axis=1, dtype=np.bool_
        )
        places = [bin_N.astype(np.uint8)[:, None] for bin_N, _ in binned]
        facts = np.ascontiguousarray(np.hstack([np.packbits(flags_NF, axis=1), *places]))
        keys_N = facts.view(f"V{facts.shape[1]}").ravel()
        _, first_Q, cell_N = np.unique(keys_N, return_index=True, return_inverse=True)
        self._order_N = np.argsort(cell_N, kind="stable")
        self._starts_Q = np.searchsorted(cell_N[self._order_N], np.arange(len(first_Q)))
        self._is_flag_F = np.array([one.dtype == np.bool_ for one in columns])
        self._flags_QF = flags_NF[first_Q].astype(np.float64)
        floats = [one[self._order_N] for one in columns if one.dtype != np.bool_]
        self._floats_FN = np.array(floats, np.float64).reshape(len(floats), len(cell_N))
        self._values = [value_N[self._order_N] for _, value_N in binned]
        self._bins_QB = [
            (bin_N[first_Q][:, None] == np.arange(bins)).astype(np.float64) for bin_N, _ in binned
        ]

    def under(
        self, weights_RN: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float64]]]:
        """Under each row of weights, (R, F) the sum of each column, and of each `binned` (R, B) the
        sums of its values in each bin."""
        weights_RN = weights_RN[:, self._order_N]
        sums_RF = np.empty((len(weights_RN), len(self._is_flag_F)))
        sums_RF[:, self._is_flag_F] = self._by_cell(weights_RN) @ self._flags_QF
        sums_RF[:, ~self._is_flag_F] = weights_RN @ self._floats_FN.T
        binned_RB = [
            self._by_cell(weights_RN * value_N) @ bins_QB
            for value_N, bins_QB in zip(self._values, self._bins_QB, strict=True)
        ]
        return sums_RF, binned_RB

    def _by_cell(self, values_RN: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(R, Q) sums of the films in each cell."""
        found_RQ: npt.NDArray[np.float64] = np.add.reduceat(values_RN, self._starts_Q, axis=1)
        return found_RQ
