"""Pixels to logits: the only code that runs a trained network, for evaluation and screening."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.models.compiled import NcnnScorer, loaded
from lungopacity.models.model import TrainedModel
from lungopacity.models.networks import ENSEMBLE
from lungopacity.models.probabilities import softmax
from lungopacity.runtime import own_cpus

if TYPE_CHECKING:
    import torch

    from lungopacity.models.grad_cam import GradCAM

FLOAT32, BFLOAT16 = PRECISIONS = ("float32", "bfloat16")
"""Of the forward pass. bfloat16 is for GPUs, by autocast; its scores differ slightly."""


def check_precision(precision: str, use_gpu: bool) -> None:
    """Raises `UserError` for a precision that is unknown, or that this device does not support."""
    if precision not in PRECISIONS:
        raise UserError(f"--precision: '{precision}' is none of {', '.join(PRECISIONS)}")
    if precision != FLOAT32 and not use_gpu:
        raise UserError(f"{precision} needs a GPU; use one, or give --precision {FLOAT32}")


@dataclass(frozen=True)
class Scores:
    """A model's scores of n films."""

    logits_NK: npt.NDArray[np.float32]
    """Raw, before calibration."""
    features_NF: npt.NDArray[np.float32]
    """The output of the network's `describe`."""
    disagreement_N: npt.NDArray[np.float32] | None = None
    """For an ensemble: the standard deviation of the positive class's probability over the members,
    from 0 to 0.5."""

    @property
    def are_numbers(self) -> npt.NDArray[np.bool_]:
        """Whether each film's logits are finite, (n,). A faulty device or weight gives others. NaN
        compares as False, so such a film would be called the first class, and negative."""
        return np.asarray(np.isfinite(self.logits_NK).all(axis=1))

    def of(self, which_N: npt.NDArray[np.bool_]) -> Scores:
        """The scores of some of the films."""
        disagreement_N = self.disagreement_N
        return Scores(
            self.logits_NK[which_N],
            self.features_NF[which_N],
            None if disagreement_N is None else disagreement_N[which_N],
        )


def exact_float32() -> None:
    """Switches TF32 off in this process. By default, convolutions on a GPU use 10 of the 23
    mantissa bits of float32, and a film near a threshold could get another decision than on a
    CPU."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


def no_number() -> ImageError:
    """The error of a film whose scores are not `are_numbers`."""
    return ImageError(
        ErrorCode.INTERNAL, Stage.SCORE, "the score is not a number; device or model is at fault"
    )


class Scorer:
    """A trained model on one device: a GPU, or the CPUs of a process."""

    def __init__(
        self,
        model: TrainedModel,
        *,
        use_gpu: bool = False,
        threads: int | None = None,
        precision: str = FLOAT32,
    ):
        """`threads`: CPU threads of the forward pass; None: as many as `own_cpus`.
        `precision`: one of `PRECISIONS`."""
        self.model = model
        self.use_gpu = use_gpu
        self.precision = precision
        self.threads = threads or own_cpus()
        self.distribution = model.training_distribution()
        self._cams: list[GradCAM] | None = None
        self._on_gpu: dict[int, torch.Tensor] = {}
        self.compiled: NcnnScorer | None = None
        nets = None if use_gpu or precision != FLOAT32 else loaded(model)
        if nets is not None:
            self.compiled = NcnnScorer(model.spec, nets, self.threads)
        else:
            # Loaded now rather than with the first film, while other tasks read the first films.
            _ = self._describing

    @cached_property
    def network(self) -> Any:
        """The network in torch. A compiled model needs it only to explain a film."""
        import torch

        if self.use_gpu:
            exact_float32()
        else:
            torch.set_num_threads(self.threads)
        network = self.model.network()
        if hasattr(network, "fused"):
            network = network.fused()  # type: ignore[operator]
        network = network.to(self._device)
        return network.to(memory_format=torch.channels_last)

    @cached_property
    def _describing(self) -> Any:
        """The network whose `describe` is used. For bfloat16 it is a copy with weights in bfloat16,
        because autocast would convert them for each batch. The last layer and activation maps use
        the original network."""
        import torch

        if self.precision != BFLOAT16:
            return self.network
        network = deepcopy(self.network)
        for part in network.modules():
            if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
                part.to(torch.bfloat16)
        return network

    @property
    def _device(self) -> torch.device:
        import torch

        return torch.device("cuda" if self.use_gpu else "cpu")

    @property
    def is_ensemble(self) -> bool:
        return self.model.spec.architecture == ENSEMBLE

    def scores(self, pixels_NHW: npt.NDArray[np.uint8], batch_size: int = 64) -> Scores:
        """One forward pass over each film.

        pixels_NHW: (n, image_size, image_size) uint8.
        """
        size = self.model.spec.preprocessing.image_size
        classes = len(self.model.spec.class_names)
        assert pixels_NHW.shape[1:] == (size, size), pixels_NHW.shape
        if not len(pixels_NHW):
            none_NK, none_N = np.empty((0, classes), np.float32), np.empty(0, np.float32)
            return Scores(none_NK, none_NK[:, :0], none_N if self.is_ensemble else None)
        run = self._run_in_torch if self.compiled is None else self.compiled.run
        batches = [
            run(pixels_NHW[start : start + batch_size])
            for start in range(0, len(pixels_NHW), batch_size)
        ]
        features_NF = np.concatenate([features for features, _ in batches])
        logits_NMK = np.concatenate([logits for _, logits in batches])
        disagreement_N = None
        if self.is_ensemble:
            positive_NM = softmax(logits_NMK)[:, :, self.model.spec.positive_index]
            disagreement_N = positive_NM.std(axis=1).astype(np.float32)
        return Scores(logits_NMK.mean(axis=1), features_NF, disagreement_N)

    def _run_in_torch(
        self, pixels_NHW: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """features_NF and logits_NMK of one or more films; M is 1 unless the model is an
        ensemble."""
        features_NF, logits_NMK = self.forward(self._on_device(pixels_NHW))
        return features_NF.cpu().numpy(), logits_NMK.cpu().numpy()

    def forward(self, batch_NHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """features_NF and logits_NMK, float32, by torch. batch_NHW: uint8, on the device."""
        import torch

        from lungopacity.models.normalise import normalise

        with torch.inference_mode():
            x_N1HW = normalise(batch_NHW, self.model.spec.preprocessing)
            half = self.precision == BFLOAT16
            with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
                features_NF = self._describing.describe(x_N1HW)
            # In float32, which costs nothing for the last layer: bfloat16 logits above 4 would come
            # in steps of 0.03.
            features_NF = features_NF.float()
            if self.is_ensemble:
                logits_NMK = self.network.member_logits(features_NF).transpose(0, 1)
            else:
                logits_NMK = self.network.classify(features_NF).unsqueeze(1)
            return features_NF, logits_NMK.float()

    def _on_device(self, pixels_NHW: npt.NDArray[np.uint8]) -> torch.Tensor:
        import torch

        batch_NHW = torch.from_numpy(pixels_NHW)
        if not self.use_gpu:
            return batch_NHW
        # Pinned memory lets Python launch the kernels while the GPU still copies.
        return batch_NHW.pin_memory().to(self._device, non_blocking=True)

    def logits(
        self, pixels_NHW: npt.NDArray[np.uint8], batch_size: int = 64
    ) -> npt.NDArray[np.float32]:
        """Raw logits, before calibration.

        pixels_NHW: (n, image_size, image_size) uint8. Returns (n, classes) float32.
        """
        return self.scores(pixels_NHW, batch_size).logits_NK

    def activation_maps(
        self, pixels_NHW: npt.NDArray[np.uint8], batch_size: int = 32
    ) -> npt.NDArray[np.float32]:
        """Where each film supports the positive class; see `GradCAM`. For an ensemble, the mean of
        its members' maps, rescaled.

        pixels_NHW: as in `scores`. Returns float32 of the same shape, from 0 to 1. Raises
        `UserError` for a network that cannot be explained.
        """
        import torch

        from lungopacity.models.normalise import normalise

        spec = self.model.spec
        if self._cams is None:
            self._cams = self._grad_cams()
        maps = [np.empty((0, *pixels_NHW.shape[1:]), np.float32)]
        for start in range(0, len(pixels_NHW), batch_size):
            batch_BHW = torch.from_numpy(pixels_NHW[start : start + batch_size])
            x_B1HW = normalise(batch_BHW.to(self._device), spec.preprocessing)
            maps.append(self._activation(x_B1HW).cpu().numpy())
        return np.concatenate(maps)

    def _grad_cams(self) -> list[GradCAM]:
        """One for each network."""
        from lungopacity.models.grad_cam import GradCAM

        spec = self.model.spec
        if not self.is_ensemble:
            size = spec.preprocessing.image_size
            calibration = spec.temperature, spec.class_biases
            return [GradCAM(self.network, spec.positive_index, size, *calibration)]
        members = zip(self.network.members, self.network.settings.members, strict=True)
        return [
            GradCAM(
                network,
                spec.positive_index,
                member.image_size,
                member.temperature,
                member.class_biases,
            )
            for network, member in members
        ]

    def _activation(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        """map_BHW of a batch of the model's input."""
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

        None for a model folder of format 1, which has no distribution.
        """
        if self.distribution is None:
            return None
        if not len(features_NF):
            return np.empty(0, np.float32)
        # On a GPU too: one CPU core takes as long for this as a GPU takes for a small network.
        return self.distribution.score(features_NF, self._product if self.use_gpu else np.matmul)

    def _product(
        self, left_NF: npt.NDArray[np.float32], right_FF: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """The product, computed on the GPU, where `right_FF`, an array of the model, is kept."""
        import torch

        right = self._on_gpu.get(id(right_FF))
        if right is None:
            right = self._on_gpu[id(right_FF)] = torch.from_numpy(right_FF).to(self._device)
        found: npt.NDArray[np.float32] = (
            (torch.from_numpy(left_NF).to(self._device) @ right).cpu().numpy()
        )
        return found

    def probabilities(self, logits_NK: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Calibrated class probabilities: see `ModelSpec.probabilities`."""
        return self.model.spec.probabilities(logits_NK)
