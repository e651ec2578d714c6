"""Compiles a trained network for ncnn (Tencent, BSD-3), which runs it on a CPU without torch.

ncnn computes 3 x 3 convolutions by minimal filtering (Winograd; Lavin & Gray 2016,
arXiv:1509.09308), one film at a time, so that activations stay in the cache. Its scores equal
torch's up to rounding, and a process that scores without torch starts two seconds sooner. Which of
the two is faster depends on the network and the CPU (docs/benchmarks.md). pnnx, by the authors of
ncnn, translates the network.

Array names carry their shape: N films, H height, W width, F features, M members, K classes.
"""

from __future__ import annotations

import logging
import subprocess
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lungopacity.models.ensemble_settings import (
    EnsembleMember,
    EnsembleSettings,
    member_prefix,
)
from lungopacity.models.probabilities import calibrated_logits

if TYPE_CHECKING:
    from lungopacity.models.model import ModelSpec, TrainedModel
    from lungopacity.models.scorer import Scorer
    from lungopacity.radiograph import Preprocessing

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""The most by which a compiled network's probabilities may differ from torch's."""
_DISTANCE_TOLERANCE = 1e-3
"""The same for the distance from the training films, as a fraction of torch's."""
_TRIED_FILMS = 32
_ROUNDS = 5
_FILMS_A_TURN = 4
"""Films that a thread takes at once. A film costs milliseconds, handing it over hundredths of
one."""
_TRANSLATION_LIMIT_S = 600


class CompileError(Exception):
    """ncnn cannot run the network; the message says why."""


@dataclass(frozen=True)
class CompiledNetwork:
    """One network in ncnn's own format."""

    param: bytes
    """The layers, as text."""
    weights: bytes
    """The layers' weights in order, float32."""


def to_bytes(networks: Sequence[CompiledNetwork]) -> bytes:
    """A safetensors file of one network, or of the members of an ensemble."""
    import safetensors.numpy

    return safetensors.numpy.save(
        {
            f"{prefix}{name}": np.frombuffer(data, np.uint8)
            for prefix, network in zip(_prefixes(len(networks)), networks, strict=True)
            for name, data in (("param", network.param), ("weights", network.weights))
        }
    )


def of_bytes(data: bytes) -> tuple[CompiledNetwork, ...]:
    """Reads the output of `to_bytes`."""
    import safetensors.numpy

    arrays = safetensors.numpy.load(data)
    return tuple(
        CompiledNetwork(arrays[f"{prefix}param"].tobytes(), arrays[f"{prefix}weights"].tobytes())
        for prefix in _prefixes(len(arrays) // 2)
    )


def _prefixes(networks: int) -> list[str]:
    return [""] if networks == 1 else [member_prefix(number) for number in range(networks)]


def compile_network(model: TrainedModel) -> CompiledNetwork:
    """Translates the network of a model that is not an ensemble.

    Raises `CompileError` where pnnx or ncnn does not support part of it, or ncnn cannot load the
    result.
    """
    import pnnx
    import torch

    class Outputs(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x_B1HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features_BF = self.network.describe(x_B1HW)  # type: ignore[operator]
            return features_BF, self.network.classify(features_BF)  # type: ignore[operator]

    network = model.network()
    if hasattr(network, "fused"):
        network = network.fused()  # type: ignore[operator]
    size = model.spec.preprocessing.image_size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with warnings.catch_warnings(), torch.no_grad():
            # pnnx reads TorchScript, which torch 2.15 warns is deprecated.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(  # type: ignore[no-untyped-call]
                Outputs(network.requires_grad_(False)).eval(),
                torch.zeros(1, 1, size, size),
                check_trace=False,
            )
            traced.save(str(path / "network.pt"))
        # In a folder of its own, because pnnx writes ten files, some under fixed names.
        command = [pnnx.EXEC_PATH, "network.pt", f"inputshape=[1,1,{size},{size}]", "fp16=0"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, timeout=_TRANSLATION_LIMIT_S
            )
            compiled = CompiledNetwork(
                (path / "network.ncnn.param").read_bytes(), (path / "network.ncnn.bin").read_bytes()
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompileError(f"pnnx could not translate it ({error})") from error
    layers = compiled.param.decode().splitlines()[2:]
    # pnnx passes on what it does not know under its name in torch, such as Tensor.reshape.
    unknown = sorted({name for name, *_ in map(str.split, layers) if "." in name})
    if done.returncode or unknown:
        raise CompileError(f"ncnn has no layer for {', '.join(unknown) or 'it'}")
    _load(compiled)
    return compiled


def loaded(model: TrainedModel) -> list[Any] | None:
    """The compiled network, or those of an ensemble's members, loaded into ncnn.

    None where the model has none. Also None, with a warning, where this version of ncnn cannot load
    it; torch then gives the same scores, more slowly.
    """
    if model.compiled is None:
        return None
    try:
        return [_load(network) for network in of_bytes(model.compiled)]
    except CompileError as error:
        log.warning(
            "model %s: %s; CPUs run it in torch, more slowly; `lungopacity compile` compiles it "
            "again",
            model.model_id,
            error,
        )
        return None


class NcnnScorer:
    """A compiled model on the CPUs of this process; see `Scorer`."""

    def __init__(self, spec: ModelSpec, nets: Sequence[Any], threads: int) -> None:
        """`nets`: from `loaded`. `threads`: how many films are computed at a time."""
        self.preprocessing = spec.preprocessing
        self.members: Sequence[EnsembleMember] | None = None
        if len(nets) > 1:
            self.members = EnsembleSettings(**spec.architecture_settings).members
        self.nets = nets
        self.threads = ThreadPoolExecutor(threads) if threads > 1 else None

    def run(
        self, pixels_NHW: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """features_NF and logits_NMK of one or more films; M is 1 unless the model is an
        ensemble."""
        turns = [
            pixels_NHW[start : start + _FILMS_A_TURN]
            for start in range(0, len(pixels_NHW), _FILMS_A_TURN)
        ]
        each = map if self.threads is None else self.threads.map
        found = list(chain.from_iterable(each(self._films, turns)))
        features, logits = zip(*found, strict=True)
        return np.stack(features), np.stack(logits)

    def _films(self, pixels_NHW: npt.NDArray[np.uint8]) -> list[tuple[Any, Any]]:
        return [self._film(pixels_HW) for pixels_HW in pixels_NHW]

    def _film(self, pixels_HW: npt.NDArray[np.uint8]) -> tuple[Any, Any]:
        x_HW = _normalised(pixels_HW.astype(np.float32) / np.float32(255), self.preprocessing)
        if self.members is None:
            features_F, logits_K = _forward(self.nets[0], x_HW)
            return features_F, logits_K[None]
        each = [
            _forward(net, _normalised(_shrunk(x_HW, member.image_size), member))
            for net, member in zip(self.nets, self.members, strict=True)
        ]
        logits_MK = [
            calibrated_logits(logits_K, member.temperature, member.class_biases).astype(np.float32)
            for (_, logits_K), member in zip(each, self.members, strict=True)
        ]
        return np.concatenate([features_F for features_F, _ in each]), np.stack(logits_MK)


def compiled_if_better(
    model: TrainedModel,
    pixels_NHW: npt.NDArray[np.uint8],
    members: Sequence[TrainedModel] | None = None,
) -> tuple[bytes | None, str]:
    """The compiled network, and a sentence that reports the comparison with torch. The first is
    None unless its scores of these films agree with torch's and it is as fast or faster. For an
    ensemble, `members` are compiled."""
    from lungopacity.models.scorer import Scorer

    # Spread over all films, because they are often ordered by class.
    tried_NHW = pixels_NHW[:: max(1, len(pixels_NHW) // _TRIED_FILMS)][:_TRIED_FILMS]
    try:
        compiled = to_bytes([compile_network(member) for member in members or [model]])
    except CompileError as error:
        return None, f"CPUs run the network in torch: {error}"
    ours = Scorer(replace(model, compiled=compiled), threads=1)
    torchs = Scorer(replace(model, compiled=None), threads=1)
    seconds: dict[Scorer, list[float]] = {ours: [], torchs: []}
    # In alternation, and the best of each, because another process may take the CPU for a while.
    for _ in range(_ROUNDS):
        for scorer, taken in seconds.items():
            began = time.perf_counter()
            scorer.scores(tried_NHW)
            taken.append(time.perf_counter() - began)
    p_NK, far_N = _outputs(ours, tried_NHW)
    torchs_NK, torchs_far_N = _outputs(torchs, tried_NHW)
    differs = float(np.abs(p_NK - torchs_NK).max())
    moved = float(np.abs(far_N / torchs_far_N - 1).max())
    ratio = min(seconds[torchs]) / min(seconds[ours])
    # Not written with >, which would accept NaN.
    if not (differs <= TOLERANCE and moved <= _DISTANCE_TOLERANCE):
        return None, (
            f"CPUs run the network in torch: compiled, probabilities differ by up to {differs:.0e}"
            f" and distances from the training films by up to {moved:.0e} of their value"
        )
    if ratio < 1:
        return None, f"CPUs run the network in torch: compiled, it has {ratio:.2f} times the speed"
    return compiled, (
        f"CPUs run the network compiled, {ratio:.1f} times as fast as in torch; probabilities "
        f"differ by at most {differs:.0e}"
    )


def _outputs(
    scorer: Scorer, pixels_NHW: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Probabilities, and distances from the training films."""
    scores = scorer.scores(pixels_NHW)
    far_N = scorer.out_of_distribution(scores.features_NF)
    if far_N is None:
        far_N = np.ones(len(pixels_NHW), np.float32)
    return scorer.probabilities(scores.logits_NK), far_N


def _load(network: CompiledNetwork) -> Any:
    import ncnn

    net = ncnn.Net()
    # Each film is one thread's, so no thread waits for another within a layer.
    net.opt.num_threads = 1
    for name in ("packed", "storage", "arithmetic"):
        setattr(net.opt, f"use_fp16_{name}", False)
    with tempfile.NamedTemporaryFile(suffix=".bin") as weights:
        weights.write(network.weights)
        weights.flush()
        if net.load_param_mem(network.param.decode()) or net.load_model(weights.name):
            raise CompileError("ncnn cannot load the compiled network")
    return net


def _forward(
    net: Any, x_HW: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """features_F and logits_K."""
    import ncnn

    extractor = net.create_extractor()
    # The ncnn matrix is a view of the array, which lives as long as this call.
    extractor.input("in0", ncnn.Mat(np.ascontiguousarray(x_HW)[None]))
    found = []
    for name in ("out0", "out1"):
        code, values = extractor.extract(name)
        if code:
            raise MemoryError(f"ncnn could not compute {name} ({code})")
        found.append(np.array(values))
    features_F, logits_K = found
    return features_F, logits_K


def _normalised(
    x_HW: npt.NDArray[np.float32], scale: Preprocessing | EnsembleMember
) -> npt.NDArray[np.float32]:
    """The same as `normalise` in torch."""
    return (x_HW - np.float32(scale.mean)) / np.float32(scale.std)


def _shrunk(x_HW: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """The same as in `Ensemble.member_inputs`: torch took its antialiased resizing from Pillow."""
    from PIL import Image

    if x_HW.shape[-1] == size:
        return x_HW
    shrunk_HW = Image.fromarray(x_HW).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(shrunk_HW)
