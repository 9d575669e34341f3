import json

import pytest
import torch

import networks
from tests.conftest import PROJECT
from tests.support.recipe import fill_parameters, wave_images
from utils.data.info import KNOWN

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


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match="unknown network 'Convnet'"):
        networks.get_network("Convnet", 3, 10, 32)
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
    cifar = name.endswith("@cifar")
    network = networks.idc_network(**IDC[name], channel=3, num_classes=10, im_size=fact["im_size"], cifar=cifar)
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


def convolutions(network):
    return [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]


@pytest.mark.parametrize("net_type,norm", [("resnet", "batch"), ("resnet", "instance"), ("resnet_ap", "instance"),
                                           ("resnet_ap", "none")])  # fmt: skip
@pytest.mark.parametrize("cifar,size", [(True, 32), (False, 32), (False, 224)])
def test_how_a_resnet_of_idc_starts(net_type, norm, cifar, size):  # SPEC 8.9
    torch.manual_seed(0)
    network = networks.idc_network(net_type, 3, 10, size, depth=10, norm=norm, cifar=cifar)
    for layer in convolutions(network):
        weight = layer.weight.detach()
        out, _, k, _ = weight.shape
        expected = (2 / (k * k * out)) ** 0.5
        spread = 5 / (2 * weight.numel()) ** 0.5
        assert float(weight.std()) == pytest.approx(expected, rel=spread)
        assert abs(float(weight.mean())) < 5 * expected / weight.numel() ** 0.5
        kurtosis = float((weight / expected).pow(4).mean())  # 3 of a normal, 1.8 of a uniform distribution
        assert abs(kurtosis - 3) < 5 * (96 / weight.numel()) ** 0.5
    norms = [m for m in network.modules() if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.GroupNorm))]
    assert bool(norms) == (norm != "none")
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)
    (classifier,) = (module for module in network.modules() if isinstance(module, torch.nn.Linear))
    bound = classifier.in_features**-0.5
    assert 0.95 * bound < float(classifier.weight.detach().abs().max()) <= bound
    assert 0 < float(classifier.bias.detach().abs().max()) <= bound


@pytest.mark.parametrize("depth,blocks,imagenet", [(10, 1, [1, 1, 1, 1]), (18, 2, [2, 2, 2, 2]), (34, 5, [3, 4, 6, 3])])
@pytest.mark.parametrize("net_type", ["resnet", "resnet_ap"])
def test_resnets_are_narrow_for_cifar_alone(net_type, depth, blocks, imagenet):  # SPEC 8.9
    for cifar, channels, counts in ((True, 32, [blocks] * 4), (False, 64, imagenet)):
        network = networks.idc_network(net_type, 3, 10, 32, depth=depth, cifar=cifar)
        layers = [network.layer1, network.layer2, network.layer3, network.layer4]
        assert [len(layer) for layer in layers] == counts
        assert [layer[-1].conv2.out_channels for layer in layers] == [channels * 2**number for number in range(4)]


@pytest.mark.parametrize("name,cifar", [("CIFAR10", True), ("CIFAR100", True), ("SVHN", False), ("MNIST", False),
                                        ("FashionMNIST", False), ("Tiny", False), ("Digits", False)])  # fmt: skip
def test_which_data_sets_have_narrow_resnets(name, cifar):  # SPEC 8.9
    assert KNOWN[name].network_shape["cifar"] == cifar


@pytest.mark.parametrize(
    "size,kernel,stride,pooled",
    [(28, 3, 1, None), (32, 3, 1, None), (64, 3, 1, None), (65, 3, 1, 33), (128, 3, 1, 64), (129, 7, 2, 33),
     (224, 7, 2, 56)],
)  # fmt: skip
def test_stems_of_resnets_by_size(size, kernel, stride, pooled):  # SPEC 8.9
    network = networks.idc_network("resnet", 3, 10, size, depth=10, width=0.125)
    assert network.conv1.kernel_size == (kernel, kernel) and network.conv1.stride == (stride, stride)
    assert network.conv1.padding == (kernel // 2, kernel // 2)
    if pooled is None:
        assert isinstance(network.pool, torch.nn.Identity)
    else:
        assert isinstance(network.pool, torch.nn.MaxPool2d)
        assert (network.pool.kernel_size, network.pool.stride, network.pool.padding) == (3, 2, 1)
        seen = []
        network.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
        network(torch.zeros(1, 3, size, size))
        assert seen == [pooled]


@pytest.mark.parametrize("net_type,norm,biases", [("resnet_ap", "none", True), ("resnet_ap", "sn", True),
                                                  ("resnet_ap", "instance", False), ("resnet_ap", "batch", False),
                                                  ("resnet", "none", False)])  # fmt: skip
def test_biases_of_pooling_resnets_without_norms(net_type, norm, biases):  # SPEC 8.9
    network = networks.idc_network(net_type, 3, 10, 32, depth=10, width=0.125, norm=norm)
    assert {layer.bias is not None for layer in convolutions(network)} == {biases}


def test_idc_refusals():
    with pytest.raises(ValueError, match="unknown network type"):
        networks.idc_network("vgg", 3, 10, 32)
    with pytest.raises(ValueError, match="depth 3"):
        networks.idc_network("resnet", 3, 10, 32, depth=3)
