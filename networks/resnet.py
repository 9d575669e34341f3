"""ResNet (He et al., CVPR 2016) in the forms that MTT and IDC evaluate with.

MTT family: 64 channels, a 3x3 stem; the `_AP` variants halve the size by average pooling instead of strides;
the ImageNet form has the 7x7 stem with max pooling. IDC: 32 channels for CIFAR; the stem pools above 64 pixels.
"""

from torch import nn
from torch.nn import functional as F

from networks.layers import normalisation


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs, planes, stride, norm, average, bias):
        super().__init__()
        self.halve = nn.AvgPool2d(2) if average and stride != 1 else nn.Identity()
        step = 1 if average else stride
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride=step, padding=1, bias=bias)
        self.bn1 = normalisation(norm, planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=bias)
        self.bn2 = normalisation(norm, planes)
        self.shortcut = shortcut(inputs, planes * self.expansion, stride, norm, average, bias)

    def forward(self, x):
        y = self.halve(F.relu(self.bn1(self.conv1(x))))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, inputs, planes, stride, norm, average, bias):
        super().__init__()
        self.halve = nn.AvgPool2d(2) if average and stride != 1 else nn.Identity()
        step = 1 if average else stride
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=bias)
        self.bn1 = normalisation(norm, planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=step, padding=1, bias=bias)
        self.bn2 = normalisation(norm, planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=bias)
        self.bn3 = normalisation(norm, outputs)
        self.shortcut = shortcut(inputs, outputs, stride, norm, average, bias)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.halve(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.shortcut(x))


def shortcut(inputs, outputs, stride, norm, average, bias):
    """The shortcut branch: identity, or a 1x1 convolution that changes size and channels."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    if not average:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=bias), normalisation(norm, outputs))
    pool = nn.AvgPool2d(stride) if stride != 1 else nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=bias), pool, normalisation(norm, outputs))


# Depth: block, blocks in each of the four layers.
DEPTHS = {
    6: (BasicBlock, [1, 1, 1, 1]),  # MTT's name for the one-block form at ImageNet size
    10: (BasicBlock, [1, 1, 1, 1]),
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
    152: (Bottleneck, [3, 8, 36, 3]),
}


class ResNet(nn.Module):
    """ResNet for (N, channel, im_size, im_size) input, (N, num_classes) logits.

    Args:
        depth: 6, 10, 18, 34, 50, 101 or 152.
        norm: instance, batch or none.
        average: halve the size by average pooling instead of strides (`_AP`).
        stem: 3x3 or 7x7, followed by pooling to half (3x3/2), or to a quarter (7x7/4) of the size; `average` pools
            by averages there, too.
        width: channels of the first layer; each later layer has twice as many.
        cifar: (depth − 2) / 6 basic blocks in each layer (IDC on CIFAR) instead of the counts of ImageNet's ResNets.
        bias: convolutions have biases.
        keep_map: give every pixel of the last map to the classifier (MTT's `_AP`) instead of their mean.
    """

    def __init__(
        self,
        channel,
        num_classes,
        im_size,
        depth,
        norm="instance",
        average=False,
        stem="3x3",
        width=64,
        keep_map=False,
        cifar=False,
        bias=False,
    ):
        super().__init__()
        block, counts = (BasicBlock, [(depth - 2) // 6] * 4) if cifar else DEPTHS[depth]
        self.keep_map = keep_map
        if stem == "7x7/4" and not average:
            self.conv1 = nn.Conv2d(channel, width, 7, stride=2, padding=3, bias=bias)
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            size = int(stem[0])
            self.conv1 = nn.Conv2d(channel, width, size, padding=size // 2, bias=bias)
            reduction = int(stem[4:] or 1)
            pool = nn.AvgPool2d(reduction) if average else nn.MaxPool2d(3, stride=2, padding=1)
            self.pool = pool if reduction > 1 else nn.Identity()
        self.bn1 = normalisation(norm, width)
        inputs = width
        for layer, count in enumerate(counts):
            blocks = []
            for position in range(count):
                stride = 2 if layer > 0 and position == 0 else 1
                blocks.append(block(inputs, width * 2**layer, stride, norm, average, bias))
                inputs = width * 2**layer * block.expansion
            setattr(self, f"layer{layer + 1}", nn.Sequential(*blocks))
        pixels = (im_size // 8) ** 2 if keep_map else 1
        if im_size < 8:
            raise ValueError(f"ResNet needs at least 8 pixels, the images have {im_size}")
        self.classifier = nn.Linear(inputs * pixels, num_classes)

    def blocks(self, x):
        """Return the maps after the stem and after each layer, as a list."""
        maps = [self.pool(F.relu(self.bn1(self.conv1(x))))]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(layer(maps[-1]))
        return maps

    def forward(self, x):
        x = self.blocks(x)[-1]
        if not self.keep_map:
            x = F.adaptive_avg_pool2d(x, 1)
        return self.classifier(x.flatten(1))
