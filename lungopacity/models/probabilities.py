"""From raw logits to the probabilities that a clinic sees. Importing this does not import torch.

Array names carry their shape: K classes, the last axis; any leading axes are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def calibrated_logits(
    logits_K: npt.NDArray[np.floating], temperature: float, class_biases: Sequence[float] | None
) -> npt.NDArray[np.float64]:
    """Logits divided by the temperature, plus a bias for each class (None: no biases). Returns
    float64 of the same shape. The biases correct for classes that are rarer or more frequent where
    the model is used than where it was trained: bias-corrected temperature scaling, Alexandari et
    al. 2020, arXiv:1901.06852.
    """
    calibrated_K: npt.NDArray[np.float64] = logits_K.astype(np.float64) / temperature
    if class_biases is not None:
        calibrated_K += np.asarray(class_biases, np.float64)
    return calibrated_K


def softmax(logits_K: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """float64 of the same shape as the logits; sums to 1 over the classes."""
    # SciPy's softmax takes 0.14 s to import, in each actor.
    exponent_K = logits_K.astype(np.float64)
    exponent_K -= exponent_K.max(axis=-1, keepdims=True)
    shares_K: npt.NDArray[np.float64] = np.exp(exponent_K, out=exponent_K)
    shares_K /= shares_K.sum(axis=-1, keepdims=True)
    return shares_K
