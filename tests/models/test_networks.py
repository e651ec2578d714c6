"""Every network by its name: shapes, sizes, one grey channel, and number of weights."""

from __future__ import annotations

import pytest
import torch
from torchvision import models

from lungopacity.errors import UserError
from lungopacity.models import NETWORK_NAMES, build_network, load_weights, network_card
from lungopacity.models.cov_net import CovNet, CovNetSettings


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_each_network_gives_a_logit_for_each_class_and_decides_on_what_it_describes(name):
    network = build_network(name, 5).eval()
    x_B1HW = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        features_BF = network.describe(x_B1HW)
        logits_BK = network(x_B1HW)
        assert logits_BK.shape == (2, 5)
        assert features_BF.ndim == 2
        assert torch.equal(network.classify(features_BF), logits_BK)
        # The logits depend on the film, and not on biases alone.
        assert not torch.equal(logits_BK[0], network(x_B1HW.flip(0))[0])


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_the_last_layer_alone_is_named_head(name):
    with torch.device("meta"):
        two, three = build_network(name, 2).state_dict(), build_network(name, 3).state_dict()
    differ = {key for key in two if two[key].shape != three[key].shape}
    assert differ
    assert all(key.startswith("head.") for key in differ)


@pytest.mark.parametrize("name", ["alexnet", "resnet-50", "densenet-121"])
def test_has_as_many_parameters_as_the_published_network_but_for_colour(name):
    card = network_card(name)
    published = models.get_model_weights(card.backbone).DEFAULT.meta["num_params"]
    with torch.device("meta"):
        ours = build_network(name, 1000)
        theirs = models.get_model(card.backbone)
    (first,) = [part for part in theirs.modules() if getattr(part, "in_channels", None) == 3]
    colour = first.weight.numel() * 2 // 3
    assert sum(weight.numel() for weight in ours.parameters()) == published - colour


def test_every_kind_of_torchvisions_classifiers_can_be_had_by_its_name():
    """Of each kind two: all take half a minute."""
    names = models.list_models(module=models)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(models.get_model_builder(name).__module__, []).append(name)
    assert len(kinds) >= 15
    for backbone in [
        name for kind in kinds.values() for name in dict.fromkeys((kind[0], kind[-1]))
    ]:
        if backbone.startswith("regnet"):
            backbone = "regnet_x_400mf"  # widths are computed by tensors; others take gigabytes
        name = f"torchvision:{backbone}"
        card = network_card(name)
        size = card.preprocessing.image_size
        settings = {"image_size": size} if card.fixed_size else {}
        with torch.device("cpu" if backbone.startswith("regnet") else "meta"):
            network = build_network(name, 3, settings).eval()
            assert network(torch.zeros(2, 1, size, size)).shape == (2, 3), name
            # As from a file, which has no versions of layers.
            load_weights(network, dict(network.state_dict()))


@pytest.mark.parametrize(
    "backbone", ["squeezenet1_1", "vit_b_16", "googlenet", "mobilenet_v3_small"]
)
def test_networks_of_other_shapes_run(backbone):
    card = network_card(f"torchvision:{backbone}")
    settings = {"image_size": 64} if card.fixed_size else {}
    network = build_network(card.name, 3, settings)
    logits_BK = network(torch.rand(2, 1, 64, 64))
    assert logits_BK.shape == (2, 3)
    logits_BK.sum().backward()
    assert network.head.weight.grad is not None


@pytest.mark.parametrize(
    ("backbone", "side"), [("inception_v3", 299), ("efficientnet_v2_s", 384), ("resnet18", 224)]
)
def test_a_network_of_torchvisions_is_trained_at_the_size_that_it_was_made_for(backbone, side):
    assert network_card(f"torchvision:{backbone}").preprocessing.image_size == side


@pytest.mark.parametrize("name", ["resnet", "torchvision:resnet", "torchvision:fcn_resnet50", ""])
def test_an_unknown_network_is_named_with_what_there_is(name):
    there_is = (
        "torchvision has no classifier of that name; its doc"
        if ":" in name
        else "; known: classical"
    )
    with pytest.raises(UserError, match=f"unknown model '{name}'.*{there_is}"):
        network_card(name)


@pytest.mark.parametrize(
    ("name", "wrong", "named"),
    [
        ("resnet-50", {"dropout": 1.0}, "dropout"),
        ("resnet-50", {"depth": 3}, "depth"),
        ("efficientnet-lite0", {"drop_path": -0.1}, "drop_path"),
        # Settings of other networks, which would silently have no effect.
        ("resnet-50", {"drop_path": 0.1}, "drop_path is a setting of efficientnet-lite only"),
        ("efficientnet-lite0", {"image_size": 64}, "accepts any image size; use --image-size"),
        ("cov-net", {"dilations": ()}, "dilations"),
        ("cov-net", {"channels": (8, 0)}, "channels"),
        ("cov-net", {"dropout": 1.0}, "dropout"),
        ("cov-net", {"blocks": (1,)}, "blocks"),
        ("cov-net", {"squeeze": 0}, "squeeze"),
        ("ensemble", {"members": []}, "members"),
    ],
)
def test_settings_that_make_no_network_are_refused(name, wrong, named):
    with pytest.raises(ValueError, match=named):
        build_network(name, 2, wrong)


def test_cov_nets_three_kernels_are_one_in_evaluation():
    torch.manual_seed(0)
    network = CovNet(3, CovNetSettings(channels=(8, 12), blocks=(1, 2), dilations=(1, 3)))
    for _ in range(3):  # running statistics that are neither 0 nor 1
        network(torch.randn(8, 1, 64, 64) * 2 + 1)
    network.eval()
    x_B1HW = torch.randn(4, 1, 96, 80)
    with torch.inference_mode():
        before_BK = network(x_B1HW)
        kernels = sum(part.kernel_size == (1, 3) for part in _convolutions(network))
        fused = network.fused()
        torch.testing.assert_close(fused(x_B1HW), before_BK, rtol=1e-4, atol=1e-5)
    assert kernels == 6
    assert not any(part.kernel_size == (1, 3) for part in _convolutions(fused))


def test_every_weight_of_cov_net_learns():
    network = CovNet(2, CovNetSettings(channels=(8, 12), blocks=(1, 1)))
    network(torch.randn(4, 1, 64, 64)).square().sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


def _convolutions(network):
    return [part for part in network.modules() if isinstance(part, torch.nn.Conv2d)]
