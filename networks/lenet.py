"""LeNet with ReLU and max pooling (LeCun et al., 1998)."""

from torch import nn

from networks.layers import is_padded_28


class LeNet(nn.Sequential):
    """LeNet for (N, channel, im_size, im_size) input, (N, num_classes) logits; 28 or 32 pixels and more."""

    def __init__(self, channel, num_classes, im_size):
        super().__init__()
        padding = 2 if is_padded_28(channel, im_size) else 0
        after_first = (im_size + 2 * padding - 4) // 2
        size = (after_first - 4) // 2
        if size < 1:
            raise ValueError(f"LeNet needs at least 16 pixels, the images have {im_size}")
        self.features = nn.Sequential(
            nn.Conv2d(channel, 6, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.flatten = nn.Flatten()
        self.fc_1 = nn.Linear(16 * size * size, 120)
        self.relu_1 = nn.ReLU()
        self.fc_2 = nn.Linear(120, 84)
        self.relu_2 = nn.ReLU()
        self.fc_3 = nn.Linear(84, num_classes)
