"""Networks of dataset distillation by name.

Parameter order and shapes match the published code, so that its buffers (lists of tensors) load unchanged.
"""

import math

from torch import nn

from networks.alexnet import AlexNet
from networks.convnet import ConvNet
from networks.densenet import DenseNet
from networks.lenet import LeNet
from networks.mlp import MLP
from networks.resnet import ResNet
from networks.vgg import VGG

CONVNET_VARIANTS = {
    "AS": {"act": "sigmoid"},
    "AR": {"act": "relu"},
    "AL": {"act": "leakyrelu"},
    "NN": {"norm": "none"},
    "BN": {"norm": "batch"},
    "LN": {"norm": "layer"},
    "IN": {"norm": "instance"},
    "GN": {"norm": "group"},
    "NP": {"pool": "none"},
    "MP": {"pool": "max"},
    "AP": {"pool": "avg"},
    "GAP": {"global_pool": True},
    "KIP": {"norm": "none", "width": 1024},
}
CONVNET_VARIANTS |= {f"D{depth}": {"depth": depth} for depth in range(1, 9)}
CONVNET_VARIANTS |= {f"W{width}": {"width": width} for width in (32, 64, 128, 256, 512, 1024)}

NORMS = {"": "instance", "BN": "batch"}
RESNET_DEPTHS = (10, 18, 34, 50, 101, 152)

# The MTT family: {name: (class, its settings)}.
BUILDERS = {f"ConvNet{variant}": (ConvNet, settings) for variant, settings in ({"": {}} | CONVNET_VARIANTS).items()}
BUILDERS |= {"MLP": (MLP, {}), "LeNet": (LeNet, {}), "AlexNet": (AlexNet, {})}
for depth in (11, 13, 16, 19):
    for end, norm in NORMS.items():
        BUILDERS[f"VGG{depth}{end}"] = VGG, {"depth": depth, "norm": norm}
for depth in RESNET_DEPTHS:
    for end, norm in NORMS.items():
        BUILDERS[f"ResNet{depth}{end}"] = ResNet, {"depth": depth, "norm": norm}
        BUILDERS[f"ResNet{depth}{end}_AP"] = ResNet, {"depth": depth, "norm": norm, "average": True, "keep_map": True}
for depth in (18, 6):
    BUILDERS[f"ResNet{depth}ImageNet"] = ResNet, {"depth": depth, "stem": "7x7/4"}
NAMES = list(BUILDERS)

# Networks that IDC evaluates with: name: (net_type, depth, normalisation).
IDC_NAMES = {
    "convnet": ("convnet", 3, "instance"),
    "resnet10": ("resnet", 10, "batch"),
    "resnet18": ("resnet", 18, "batch"),
    "resnet_ap10": ("resnet_ap", 10, "instance"),
    "densenet": ("densenet", None, "batch"),
    "efficientnet": ("efficientnet", None, "batch"),
}


def get_network(name, channel, num_classes, im_size, cifar=False):
    """Return a freshly initialised network.

    ConvNets have three blocks, two below 16 pixels (the bundled digits have 8), unless their name gives the depth.

    Args:
        name: one of `NAMES` (the MTT family) or `IDC_NAMES`.
        channel: input channels.
        num_classes: outputs.
        im_size: input height and width in pixels.
        cifar: see `idc_network`; the MTT family ignores it.

    Raises:
        ValueError: unknown name, or images too small for the network.
    """
    shape = {"channel": channel, "num_classes": num_classes, "im_size": im_size}
    if name in IDC_NAMES:
        net_type, depth, norm = IDC_NAMES[name]
        return idc_network(net_type, channel, num_classes, im_size, depth, norm=norm, cifar=cifar)
    if name in BUILDERS:
        build, settings = BUILDERS[name]
        if build is ConvNet:
            settings = {"depth": 2 if im_size < 16 else 3} | settings
        return build(**shape, **settings)
    raise ValueError(f"unknown network {name!r}; known: {', '.join([*NAMES, *IDC_NAMES])}")


def idc_network(net_type, channel, num_classes, im_size, depth=3, width=1.0, norm="instance", cifar=False):
    """Return a freshly initialised network of the IDC family.

    Args:
        net_type: convnet, resnet, resnet_ap, densenet or efficientnet.
        channel: input channels.
        num_classes: outputs.
        im_size: input height and width in pixels.
        depth: blocks of a ConvNet; 10, 18, … of a ResNet.
        width: factor on the 128 channels of the ConvNet or on the ResNet's.
        norm: instance, batch, none, or sn (spectral normalisation of every convolution).
        cifar: the data set is CIFAR-10 or CIFAR-100, for which ResNets have 32 channels and (depth − 2) / 6 blocks a
            layer instead of 64 and ImageNet's counts.

    Raises:
        ValueError: unknown type or depth, or images too small.
    """
    shape = {"channel": channel, "num_classes": num_classes, "im_size": im_size}
    plain = "none" if norm == "sn" else norm
    if net_type == "convnet":
        network = ConvNet(**shape, width=int(128 * width), depth=depth, norm=plain)
    elif net_type in ("resnet", "resnet_ap"):
        if depth not in RESNET_DEPTHS:
            raise ValueError(f"ResNet of depth {depth}: one of {', '.join(map(str, RESNET_DEPTHS))} expected")
        average = net_type == "resnet_ap"
        network = ResNet(
            **shape,
            depth=depth,
            norm=plain,
            average=average,
            stem="3x3" if im_size <= 64 else "3x3/2" if im_size <= 128 else "7x7/4",
            width=int((32 if cifar else 64) * width),
            cifar=cifar,
            bias=average and plain == "none",
        )
        for module in network.modules():
            if isinstance(module, nn.Conv2d):  # PyTorch's default stays for the classifier
                std = math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels))
                nn.init.normal_(module.weight, 0, std)
    elif net_type == "densenet":
        network = DenseNet(**shape)
    elif net_type in ("efficient", "efficientnet"):
        from torchvision.models import efficientnet_b0  # only evaluations need it

        network = efficientnet_b0(num_classes=num_classes)
        if channel != 3:
            raise ValueError(f"EfficientNet-B0 needs 3 channels, the images have {channel}")
    else:
        raise ValueError(
            f"unknown network type {net_type!r}; known: convnet, resnet, resnet_ap, densenet, efficientnet"
        )
    if norm == "sn":
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.utils.parametrizations.spectral_norm(module)
    return network


def eval_pool(eval_mode, model):
    """Return the names of the networks that `eval_mode` evaluates with (MTT's pools).

    Args:
        eval_mode: S (self), M (many), W (width), D (depth), A (activation), P (pooling), N (normalisation) or
            C (the distillation network and ConvNet).
        model: the network of the distillation; its BN suffix is dropped in mode S.

    """
    return {
        "S": [model.replace("BN", "")],
        "C": list(dict.fromkeys([model, "ConvNet"])),
        "M": ["ConvNet", "AlexNet", "VGG11", "ResNet18_AP", "ResNet18"],
        "W": ["ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"],
        "D": ["ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"],
        "A": ["ConvNetAS", "ConvNetAR", "ConvNetAL"],
        "P": ["ConvNetNP", "ConvNetMP", "ConvNetAP"],
        "N": ["ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"],
    }[eval_mode]
