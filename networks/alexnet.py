"""AlexNet for small images, as the dataset-condensation literature evaluates with."""

from torch import nn

from networks.layers import is_padded_28


class AlexNet(nn.Sequential):
    """AlexNet for (N, channel, im_size, im_size) input, (N, num_classes) logits; at least 8 pixels."""

    def __init__(self, channel, num_classes, im_size):
        super().__init__()
        padded = is_padded_28(channel, im_size)
        size = (32 if padded else im_size) // 8
        if size < 1:
            raise ValueError(f"AlexNet needs at least 8 pixels, the images have {im_size}")
        self.features = nn.Sequential(
            nn.Conv2d(channel, 128, 5, padding=4 if padded else 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(192, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 192, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(192, 192, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(192 * size * size, num_classes)
