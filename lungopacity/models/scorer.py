"""Pixels to logits: the one place where a trained network is run, for evaluation and screening."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lungopacity.models.folder import TrainedModel
from lungopacity.models.networks import ENSEMBLE

if TYPE_CHECKING:
    import torch

    from lungopacity.models.grad_cam import GradCAM


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
        self._cams: list[GradCAM] | None = None

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

    def activation_maps(
        self, pixels_NHW: npt.NDArray[np.uint8], batch_size: int = 32
    ) -> npt.NDArray[np.float32]:
        """Where each film speaks for the positive class, see `GradCAM`; of an ensemble the mean of
        its members' maps.

        pixels_NHW: as in `scores`. Returns the same shape, 0 … 1. Raises `UserError` for a network
        that cannot be explained.
        """
        import torch

        from lungopacity.models.normalise import normalise

        spec = self.model.spec
        if self._cams is None:
            self._cams = self._grad_cams()
        maps = [np.empty((0, *pixels_NHW.shape[1:]), np.float32)]
        for start in range(0, len(pixels_NHW), batch_size):
            batch_BHW = torch.from_numpy(pixels_NHW[start : start + batch_size])
            x_B1HW = normalise(batch_BHW.to(self.device), spec.preprocessing)
            maps.append(self._activation(x_B1HW).cpu().numpy())
        return np.concatenate(maps)

    def _grad_cams(self) -> list[GradCAM]:
        """One for each network."""
        from lungopacity.models.grad_cam import GradCAM

        spec = self.model.spec
        if not self.is_ensemble:
            size = spec.preprocessing.image_size
            return [GradCAM(self.network, spec.positive_index, size)]
        members = zip(self.network.members, self.network.settings.members, strict=True)
        return [
            GradCAM(network, spec.positive_index, member.image_size) for network, member in members
        ]

    def _activation(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        """map_BHW of the model's own input."""
        import torch
        from torch.nn.functional import interpolate

        from lungopacity.models.grad_cam import of_highest

        assert self._cams is not None
        if not self.is_ensemble:
            return self._cams[0].maps(x_B1HW)
        inputs = self.network.member_inputs(x_B1HW)
        total_B1HW = torch.zeros_like(x_B1HW)
        for cam, own_B1HW in zip(self._cams, inputs, strict=True):
            map_B1HW = cam.maps(own_B1HW).unsqueeze(1)
            total_B1HW += interpolate(map_B1HW, x_B1HW.shape[-2:], mode="bilinear")
        return of_highest(total_B1HW.squeeze(1))

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
