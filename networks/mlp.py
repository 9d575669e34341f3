"""Multi-layer perceptron with two hidden layers of 128 units."""

from torch import nn


class MLP(nn.Sequential):
    """MLP for (N, channel, im_size, im_size) input, (N, num_classes) logits."""

    def __init__(self, channel, num_classes, im_size):
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc_1 = nn.Linear(channel * im_size * im_size, 128)
        self.relu_1 = nn.ReLU()
        self.fc_2 = nn.Linear(128, 128)
        self.relu_2 = nn.ReLU()
        self.fc_3 = nn.Linear(128, num_classes)
