"""Evaluation: training 5 networks on a union of 100 images for 300 epochs, against the published way.

    python benchmarks/evaluation.py --json

Each timing trains 5 ConvNetW32 for --epochs epochs; the time is proportional to the epochs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import networks
from benchmarks import baseline, harness
from utils import stages, training
from utils.augment import DSA
from utils.data.datasets import ImageDataset
from utils.options import DSA_STRATEGY
from utils.run.device import setup_device

MODEL = "ConvNetW32"


def problem(count, images, device):
    """Return random images, their labels and `count` networks."""
    torch.manual_seed(0)
    members = [networks.get_network(MODEL, 3, 10, 32).to(device) for _ in range(count)]
    return torch.randn(images, 3, 32, 32), torch.arange(images) % 10, members


def published(count, images, epochs, device):
    *union, members = problem(count, images, device)
    dataset = torch.utils.data.TensorDataset(*union)

    def work():
        for network in members:
            baseline.unfused(network)
            optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
            for _ in range(epochs):
                baseline.train_epoch(network, optimizer, dataset, 256, DSA_STRATEGY.split("_"))

    return work


def project(count, images, epochs, device, precision):
    device = setup_device(device)
    *union, members = problem(count, images, device)
    dataset = ImageDataset(*(tensor.to(device) for tensor in union))
    config = stages.evaluation_config(epochs, 0.01, 256, DSA(DSA_STRATEGY), precision=precision)
    return lambda: training.train_together(members, dataset, config, 0, [("evaluation", k) for k in range(count)])


def main():
    options = harness.parse(__doc__, harness.PRECISION, ("--epochs", int, 300, "epochs of each network"))
    count, images, epochs = (2, 4, 2) if options.smallest else (5, 100, options.epochs)
    label = f"{count} x {MODEL}, {images} images, {epochs} epochs"
    row = harness.pair(label, published, project, options, count=count, images=images, epochs=epochs)
    harness.show_pairs("evaluation on a union", [row], options)


if __name__ == "__main__":
    harness.run(main)
