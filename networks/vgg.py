"""VGG for small images (Simonyan & Zisserman, ICLR 2015) with instance or batch normalisation."""

from torch import nn

from networks.layers import is_padded_28, normalisation

# Channels of each convolution; "M" is a 2x2 max pooling.
LAYERS = {
    11: [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    13: [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    16: [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"],
    19: [64, 64, "M", 128, 128, "M"] + [256] * 4 + ["M"] + [512] * 4 + ["M"] + [512] * 4 + ["M"],
}


class VGG(nn.Sequential):
    """VGG for (N, channel, im_size, im_size) input, (N, num_classes) logits; at least 32 pixels.

    Args:
        depth: 11, 13, 16 or 19.
        norm: instance or batch.
    """

    def __init__(self, channel, num_classes, im_size, depth, norm="instance"):
        super().__init__()
        padded = is_padded_28(channel, im_size)
        size = 32 if padded else im_size
        if size < 32:
            raise ValueError(f"VGG needs at least 32 pixels, the images have {im_size}")
        blocks, inputs = [], channel
        for outputs in LAYERS[depth]:
            if outputs == "M":
                blocks.append(nn.MaxPool2d(2))
                size //= 2
                continue
            padding = 3 if padded and not blocks else 1
            blocks += [nn.Conv2d(inputs, outputs, 3, padding=padding), normalisation(norm, outputs), nn.ReLU()]
            inputs = outputs
        self.features = nn.Sequential(*blocks)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(512 * size * size, num_classes)
