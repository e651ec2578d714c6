"""Pixels to logits: the one place where a trained network is run, for evaluation and screening."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lungopacity.models.folder import TrainedModel


class Scorer:
    """A trained model on one device."""

    def __init__(self, model: TrainedModel, *, use_gpu: bool = False, threads: int | None = None):
        """`threads`: CPU threads of the forward pass; None leaves torch's own choice."""
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self.model = model
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.network = model.network().to(self.device).to(memory_format=torch.channels_last)

    def logits(
        self, pixels_NHW: npt.NDArray[np.uint8], batch_size: int = 64
    ) -> npt.NDArray[np.float32]:
        """Raw logits, before temperature.

        pixels_NHW: (n, image_size, image_size) uint8. Returns (n, classes) float32.
        """
        import torch

        from lungopacity.models.normalise import normalise

        size = self.model.spec.preprocessing.image_size
        classes = len(self.model.spec.class_names)
        assert pixels_NHW.shape[1:] == (size, size), pixels_NHW.shape
        logits_NK = np.empty((len(pixels_NHW), classes), np.float32)
        with torch.inference_mode():
            for start in range(0, len(pixels_NHW), batch_size):
                batch_BHW = torch.from_numpy(pixels_NHW[start : start + batch_size])
                x_B1HW = normalise(batch_BHW.to(self.device), self.model.spec.preprocessing)
                logits_NK[start : start + batch_size] = self.network(x_B1HW).float().cpu().numpy()
        return logits_NK

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
