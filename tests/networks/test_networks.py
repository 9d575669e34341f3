import json

import pytest
import torch

import networks
from tests.conftest import PROJECT
from tests.support.recipe import fill_parameters, wave_images

FACTS = json.loads((PROJECT / "tests" / "facts" / "networks.json").read_text())
MTT_NAMES = [name for name in FACTS if not name.startswith("idc:")]


@pytest.mark.parametrize("name", MTT_NAMES)
def test_network_equals_the_published_one(name):
    fact = FACTS[name]
    network = networks.get_network(name.split("@")[0], fact["channel"], len(fact["logits"][0]), fact["im_size"])
    assert [[n, list(p.shape)] for n, p in network.named_parameters()] == fact["parameters"]
    assert sum(p.numel() for p in network.parameters()) == fact["numel"]
    network = fill_parameters(network).eval()
    with torch.no_grad():
        logits = network(wave_images(2, fact["channel"], fact["im_size"]))
    torch.testing.assert_close(logits, torch.tensor(fact["logits"], dtype=torch.float64), rtol=0, atol=1e-8)


def test_every_evaluation_pool_is_made_of_known_networks():
    for mode in "SMWDAPNC":
        assert set(networks.eval_pool(mode, "ConvNet")) <= set(networks.NAMES)
    assert networks.eval_pool("S", "ConvNetBN") == ["ConvNet"]
    assert networks.eval_pool("C", "ConvNetW32") == ["ConvNetW32", "ConvNet"]
    with pytest.raises(ValueError, match="unknown eval_mode 'X'"):
        networks.eval_pool("X", "ConvNet")


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match="unknown network 'Convnet'"):
        networks.get_network("Convnet", 3, 10, 32)
    with pytest.raises(ValueError, match="square"):
        networks.get_network("ConvNet", 3, 10, (32, 16))
    with pytest.raises(ValueError, match="at least 32 pixels"):
        networks.get_network("ConvNetD5", 3, 10, 16)
    with pytest.raises(ValueError, match="at least 32 pixels, the images have 8"):
        networks.get_network("VGG11", 1, 10, 8)


IDC = {
    "idc:convnet": {"net_type": "convnet"},
    "idc:resnet10_bn@cifar": {"net_type": "resnet", "depth": 10, "norm": "batch"},
    "idc:resnet18_bn@cifar": {"net_type": "resnet", "depth": 18, "norm": "batch"},
    "idc:resnet10_in@cifar": {"net_type": "resnet", "depth": 10, "norm": "instance"},
    "idc:resnetap10_in@imagenet128": {"net_type": "resnet_ap", "depth": 10, "norm": "instance"},
    "idc:resnetap10_in@224": {"net_type": "resnet_ap", "depth": 10, "norm": "instance"},
    "idc:densenet": {"net_type": "densenet"},
}


@pytest.mark.parametrize("name", IDC)
def test_idc_network_equals_the_published_one(name):
    fact = FACTS[name]
    network = networks.idc_network(**IDC[name], channel=3, num_classes=10, im_size=fact["im_size"])
    shapes = [shape for _, shape in fact["parameters"]]
    if name == "idc:convnet":  # the published class lists all convolutions before all normalisations
        found = sorted(list(p.shape) for p in network.parameters())
        assert found == sorted(shapes)
    else:
        assert [list(p.shape) for p in network.parameters()] == shapes
    published_order = list(network.parameters())
    if name == "idc:convnet":
        features = network.features
        order = [features[4 * b] for b in range(3)] + [features[4 * b + 1] for b in range(3)] + [network.classifier]
        published_order = [p for module in order for p in (module.weight, module.bias)]
    names = {id(p): n for n, p in network.named_parameters()}
    network = fill_parameters(network, [(names[id(p)], p) for p in published_order]).eval()
    with torch.no_grad():
        logits = network(wave_images(2, 3, fact["im_size"]))
    torch.testing.assert_close(logits, torch.tensor(fact["logits"], dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("net_type", ["convnet", "resnet", "resnet_ap", "densenet", "efficientnet"])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_idc_types_run_forward_and_backward(net_type, size):
    depth = 3 if net_type == "convnet" else 10
    network = networks.idc_network(net_type, 3, 7, size, depth=depth, width=0.25 if "net_" not in net_type else 1.0)
    network(torch.randn(2, 3, size, size)).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("norm", ["batch", "instance", "sn", "none"])
def test_idc_normalisations(norm):
    network = networks.idc_network("convnet", 1, 10, 28, norm=norm)
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_idc_refusals():
    with pytest.raises(ValueError, match="unknown network type"):
        networks.idc_network("vgg", 3, 10, 32)
    with pytest.raises(ValueError, match="depth 3"):
        networks.idc_network("resnet", 3, 10, 32, depth=3)
