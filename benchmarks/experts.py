"""Training an expert: this project against a DataLoader over a TensorDataset with the published DSA.

    python benchmarks/experts.py --data_path data/cifar10-jpeg --json

Each timing trains ConvNet and ConvNetW32 on 2,560 real CIFAR-10 images (10 minibatches of 256).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import baseline, harness
from utils import training
from utils.augment import DSA
from utils.data import datasets
from utils.options import DSA_STRATEGY
from utils.run.device import setup_device
from utils.run.streams import stream


def published(model, images, dataset, data_path, device):
    real = datasets.load(dataset, data_path, torch.device("cpu"))
    chosen = torch.utils.data.TensorDataset(*real.train.batch(slice(images)))
    network = baseline.unfused(training.new_network(model, real, 0, "benchmark")).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    return lambda: baseline.train_epoch(network, optimizer, chosen, 256, DSA_STRATEGY.split("_"))


def project(model, images, dataset, data_path, device, precision):
    device = setup_device(device)
    real = datasets.load(dataset, data_path, device)
    network = training.new_network(model, real, 0, "benchmark")
    config = training.TrainConfig(1, 0.01, dsa=DSA(DSA_STRATEGY), precision=precision)
    optimizer, rng = training.sgd(network, config), stream(0, "benchmark")
    index = torch.arange(images, device=device)
    return lambda: training.train_epoch(network, optimizer, real.train, config, rng, index)


def main():
    options = harness.parse(
        __doc__, harness.PRECISION, ("--data_path", str, "data/cifar10-jpeg", "CIFAR-10 in class folders")
    )
    images, dataset = (16, "Digits") if options.smallest else (2560, "CIFAR10")
    rows = [
        harness.pair(
            f"{model}, {images} images",
            published,
            project,
            options,
            model=model,
            images=images,
            dataset=dataset,
            data_path=options.data_path,
        )
        for model in ("ConvNet", "ConvNetW32")
    ]
    harness.show_pairs(f"expert training on {dataset}", rows, options)


if __name__ == "__main__":
    harness.run(main)
