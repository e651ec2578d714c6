"""The precision of training's forward and backward passes, chosen by what the device does fast.

Tensor names carry their shape: B films of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to train in bfloat16. precision: one of `TRAINING_PRECISIONS`."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def depthwise_in_float32(network: torch.nn.Module) -> None:
    """Keeps depthwise convolutions in float32 under autocast on a CPU. oneDNN's backward pass of
    them is slower in bfloat16; in float32, efficientnet-lite0 trains 1.5 times as fast."""

    def forward(self: torch.nn.Conv2d, x_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return type(self).forward(self, x_BCHW.float())

    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d) and part.groups == part.in_channels > 1:
            part.forward = forward.__get__(part)  # type: ignore[method-assign]
