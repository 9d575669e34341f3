"""ConvNet: blocks of 3x3 convolution, normalisation, activation and pooling, then one linear layer.

The network of dataset distillation since Gidaris & Komodakis (CVPR 2018); sizes as MTT uses them.
"""

from torch import nn

from networks.kernels import fused
from networks.layers import is_padded_28, normalisation

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "leakyrelu": nn.LeakyReLU}
POOLINGS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


class ConvNet(nn.Module):
    """ConvNet for (N, channel, im_size, im_size) input, (N, num_classes) logits.

    Args:
        channel: input channels.
        num_classes: outputs.
        im_size: input height and width in pixels.
        width: channels of every block.
        depth: number of blocks; each pooling halves the size.
        act: relu, sigmoid or leakyrelu.
        norm: none, batch, layer, instance or group.
        pool: none, max or avg.
        global_pool: average the last feature map to one pixel before the linear layer.

    Raises:
        ValueError: the pooling would shrink the image below one pixel.
    """

    def __init__(
        self,
        channel,
        num_classes,
        im_size,
        width=128,
        depth=3,
        act="relu",
        norm="instance",
        pool="avg",
        global_pool=False,
    ):
        super().__init__()
        size = 32 if is_padded_28(channel, im_size) else im_size
        if pool != "none" and size >> depth < 1:
            raise ValueError(f"{depth} poolings need at least {2**depth} pixels, the images have {im_size}")
        self.depth = depth
        self.fuses = (norm, act, pool) == ("instance", "relu", "avg")
        blocks, inputs = [], channel
        for block in range(depth):
            padding = 3 if block == 0 and is_padded_28(channel, im_size) else 1
            blocks.append(nn.Conv2d(inputs, width, 3, padding=padding))
            if norm != "none":
                blocks.append(normalisation(norm, width, size))
            blocks.append(ACTIVATIONS[act]())
            if pool != "none":
                blocks.append(POOLINGS[pool](2))
                size //= 2
            inputs = width
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1) if global_pool else nn.Identity()
        self.classifier = nn.Linear(width * (1 if global_pool else size * size), num_classes)

    def blocks(self, x):
        """Return the maps after each block, as a list."""
        maps, per_block = [], len(self.features) // self.depth
        for block in range(self.depth):
            layers = self.features[block * per_block : (block + 1) * per_block]
            y = layers[0](x)
            if self.fuses and fused.applies(y):
                x = fused.norm_relu_pool(y, layers[1].weight, layers[1].bias)
            else:
                x = layers[1:](y)
            maps.append(x)
        return maps

    def forward(self, x):
        return self.classifier(self.pool(self.blocks(x)[-1]).flatten(1))
