from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from lungopacity.models import build_network
from lungopacity.models.classical_cnn import ClassicalCNN, ClassicalCNNSettings

SMALL = ClassicalCNNSettings(channels=(4, 8, 8), convolutions=(1, 2, 1))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (160, 160), (161, 97), (1, 1)])
def test_gives_one_logit_for_each_class_at_any_input_size(height: int, width: int) -> None:
    network = ClassicalCNN(3, SMALL).eval()
    assert network(torch.zeros(2, 1, height, width)).shape == (2, 3)


def test_is_known_by_name_and_rebuilt_from_settings_that_went_through_json() -> None:
    first = ClassicalCNN(2, SMALL)
    settings = json.loads(json.dumps(asdict(first.settings)))
    second = build_network("classical-cnn", 2, settings)
    second.load_state_dict(first.state_dict())
    x_B1HW = torch.rand(2, 1, 40, 40)
    assert torch.equal(first.eval()(x_B1HW), second.eval()(x_B1HW))


def test_pooling_before_relu_gives_what_relu_before_pooling_gives() -> None:
    settings = ClassicalCNNSettings(channels=(6,), convolutions=(1,), batch_norm=False)
    network = ClassicalCNN(2, settings).eval()
    convolution = network.features[0][0]
    x_B1HW = torch.randn(2, 1, 16, 16)
    usual_BCHW = torch.nn.functional.max_pool2d(torch.relu(convolution(x_B1HW)), 2)
    torch.testing.assert_close(network.features(x_B1HW), usual_BCHW)


def test_every_weight_takes_part_in_training() -> None:
    network = ClassicalCNN(
        2, ClassicalCNNSettings(channels=(4, 8), convolutions=(1, 2), hidden_units=5)
    )
    network(torch.randn(8, 1, 32, 32)).sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"channels": ()}, "channels"),
        ({"channels": (8, 0), "convolutions": (1, 1)}, "channels"),
        ({"channels": (8, 8), "convolutions": (1,)}, "convolutions"),
        ({"channels": (8,), "convolutions": (0,)}, "convolutions"),
        ({"hidden_units": -1}, "hidden_units"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_refuses_settings_that_make_no_network(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ClassicalCNNSettings(**wrong)  # type: ignore[arg-type]
