"""DenseNet-BC (Huang et al., CVPR 2017) as IDC evaluates with: growth 12, 6 + 12 + 24 + 16 layers."""

import torch
from torch import nn
from torch.nn import functional as F

GROWTH = 12
LAYERS = (6, 12, 24, 16)


class DenseLayer(nn.Module):
    """1x1 and 3x3 convolution; its output joins its input."""

    def __init__(self, inputs):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * GROWTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * GROWTH)
        self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        return torch.cat([y, x], 1)


class Transition(nn.Sequential):
    """Halves channels and size between two dense blocks."""

    def __init__(self, inputs):
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class DenseNet(nn.Sequential):
    """DenseNet for (N, channel, im_size, im_size) input, (N, num_classes) logits; at least 8 pixels."""

    def __init__(self, channel, num_classes, im_size):
        super().__init__()
        if im_size < 8:
            raise ValueError(f"DenseNet needs at least 8 pixels, the images have {im_size}")
        planes = 2 * GROWTH
        self.conv1 = nn.Conv2d(channel, planes, 3, padding=1, bias=False)
        for block, count in enumerate(LAYERS, 1):
            layers = [DenseLayer(planes + GROWTH * layer) for layer in range(count)]
            setattr(self, f"dense{block}", nn.Sequential(*layers))
            planes += GROWTH * count
            if block < len(LAYERS):
                setattr(self, f"trans{block}", Transition(planes))
                planes //= 2
        self.bn = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(planes, num_classes)
