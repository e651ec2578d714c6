"""Pixels to logits: the one place where a trained network is run, for evaluation and screening."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.models.folder import TrainedModel
from lungopacity.models.networks import ENSEMBLE


@dataclass(frozen=True)
class Scores:
    """What a model says of n films."""

    logits_NK: npt.NDArray[np.float32]
    """Raw, before temperature."""
    features_NF: npt.NDArray[np.float32]
    """What the logits were decided on."""
    disagreement_N: npt.NDArray[np.float32] | None = None
    """Of an ensemble: the standard deviation over its members of the positive class's probability,
    0 … 0.5."""


class Scorer:
    """A trained model on one device."""

    def __init__(self, model: TrainedModel, *, use_gpu: bool = False, threads: int | None = None):
        """`threads`: CPU threads of the forward pass; None leaves torch's own choice."""
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self.model = model
        self.device = torch.device("cuda" if use_gpu else "cpu")
        network = model.network()
        if hasattr(network, "fused"):
            network = network.fused()  # type: ignore[operator]
        network = network.to(self.device)
        self.network: Any = network.to(memory_format=torch.channels_last)
        self.is_ensemble = model.spec.architecture == ENSEMBLE
        self.distribution = model.training_distribution()

    def scores(self, pixels_NHW: npt.NDArray[np.uint8], batch_size: int = 64) -> Scores:
        """One forward pass over each film.

        pixels_NHW: (n, image_size, image_size) uint8.
        """
        import torch

        from lungopacity.models.normalise import normalise

        size = self.model.spec.preprocessing.image_size
        classes = len(self.model.spec.class_names)
        assert pixels_NHW.shape[1:] == (size, size), pixels_NHW.shape
        logits, features = [np.empty((0, classes), np.float32)], []
        disagreement = [np.empty(0, np.float32)]
        with torch.inference_mode():
            for start in range(0, len(pixels_NHW), batch_size):
                batch_BHW = torch.from_numpy(pixels_NHW[start : start + batch_size])
                x_B1HW = normalise(batch_BHW.to(self.device), self.model.spec.preprocessing)
                features_BF = self.network.describe(x_B1HW)
                if self.is_ensemble:
                    logits_MBK = self.network.member_logits(features_BF).float()
                    logits_BK = logits_MBK.mean(dim=0)
                    positive_MB = logits_MBK.softmax(dim=2)[:, :, self.model.spec.positive_index]
                    disagreement.append(positive_MB.std(dim=0, correction=0).cpu().numpy())
                else:
                    logits_BK = self.network.classify(features_BF).float()
                logits.append(logits_BK.cpu().numpy())
                features.append(features_BF.float().cpu().numpy())
        width = features[0].shape[1] if features else 0
        return Scores(
            np.concatenate(logits),
            np.concatenate([np.empty((0, width), np.float32), *features]),
            np.concatenate(disagreement) if self.is_ensemble else None,
        )

    def logits(
        self, pixels_NHW: npt.NDArray[np.uint8], batch_size: int = 64
    ) -> npt.NDArray[np.float32]:
        """Raw logits, before temperature.

        pixels_NHW: (n, image_size, image_size) uint8. Returns (n, classes) float32.
        """
        return self.scores(pixels_NHW, batch_size).logits_NK

    def out_of_distribution(
        self, features_NF: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32] | None:
        """How far out the films lie, (n,) float32; above 1 they are unlike the training films.

        None for a model folder of before this was kept.
        """
        if self.distribution is None:
            return None
        if not len(features_NF):
            return np.empty(0, np.float32)
        return self.distribution.score(features_NF)

    def probabilities(self, logits_NK: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Calibrated class probabilities: softmax of the logits over the temperature.

        logits_NK: (n, classes) float32. Returns the same shape; rows sum to 1.
        """
        scaled = logits_NK.astype(np.float64) / self.model.spec.temperature
        scaled -= scaled.max(axis=1, keepdims=True)
        exponent = np.exp(scaled)
        probabilities: npt.NDArray[np.float32] = (
            exponent / exponent.sum(axis=1, keepdims=True)
        ).astype(np.float32)
        return probabilities
