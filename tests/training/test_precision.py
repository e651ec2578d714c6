"""Which passes run in bfloat16, and which layers do not."""

from __future__ import annotations

import pytest
import torch

from lungopacity.training.precision import depthwise_in_float32, use_bfloat16

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("able", [True, False])
def test_auto_is_bfloat16_where_that_is_fast_and_others_are_as_asked_for(monkeypatch, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able, "avx2": True})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    for device in (CPU, GPU):
        assert use_bfloat16("auto", device) is able
        assert use_bfloat16("bfloat16", device) is True
        assert use_bfloat16("float32", device) is False


def test_depthwise_convolutions_alone_stay_in_float32():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),  # one channel in one group is not a depthwise convolution
        torch.nn.Conv2d(4, 4, 3, groups=4),
        torch.nn.Conv2d(4, 2, 1),
    )
    expected = network[1](torch.ones(1, 4, 8, 8))
    depthwise_in_float32(network)
    kinds = []
    for part in network:
        part.register_forward_hook(lambda _part, _taken, given: kinds.append(given.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.ones(1, 1, 10, 10)).sum().backward()
        found = network[1](torch.ones(1, 4, 8, 8, dtype=torch.bfloat16))
    assert kinds == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(found, expected)
    assert all(weight.grad is not None for weight in network.parameters())
