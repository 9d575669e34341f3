"""Multi-layer perceptron with two hidden layers of 128 units."""

from torch import nn
from torch.nn import functional as F


class MLP(nn.Module):
    """MLP for (N, channel, im_size, im_size) input, (N, num_classes) logits."""

    def __init__(self, channel, num_classes, im_size):
        super().__init__()
        self.fc_1 = nn.Linear(channel * im_size * im_size, 128)
        self.fc_2 = nn.Linear(128, 128)
        self.fc_3 = nn.Linear(128, num_classes)

    def forward(self, x):
        x = F.relu(self.fc_1(x.flatten(1)))
        x = F.relu(self.fc_2(x))
        return self.fc_3(x)
