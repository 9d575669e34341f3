"""One sweep of IDC over the 10 classes of CIFAR-10 against the published loop over classes.

    python benchmarks/idc_sweep.py --data_path data/cifar10-jpeg --json

ConvNet, 10 images per class, factor 2, the settings of --reproduce: 64 real and 40 decoded images of each class.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks import baseline, harness
from utils import training
from utils.augment import DSA
from utils.data import datasets
from utils.gradient_matching import GradientMatchConfig, GradientMatcher
from utils.run.device import setup_device
from utils.run.streams import stream
from utils.synthetic import empty_set, init_subset

FACTOR = 2


def problem(dataset, data_path, ipc, depth, device):
    """Return real images, the synthetic set at the start of the first stage, how to match, and a network."""
    real = datasets.load(dataset, data_path, device)
    subset = init_subset(real, ipc, "mix", stream(0, "subset"), factor=FACTOR, pixels=True)
    config = GradientMatchConfig(5e-3 * ipc / 10, DSA("color_crop_cutout", "idc"), factor=FACTOR, metric="mse")
    spec = {"net_type": "convnet", "depth": depth, "width": 1.0, "norm": "instance"}
    network = training.new_network(spec, real, 0, "benchmark")
    return real, empty_set(real).extended(*subset), config, network


def published(device, **arguments):
    device = torch.device(device)
    real, synthetic, config, network = problem(device=device, **arguments)
    images, rng = synthetic.by_class(real.info.num_classes).clone(), np.random.default_rng(0)
    baseline.unfused(network)

    def batch(label):
        index = torch.from_numpy(rng.choice(real.class_indices[label], config.batch_real, replace=False))
        return real.train.images[index.to(device)].float() / 255, config.augment.draw(1, rng)

    def work():
        baseline.idc_sweeps(
            network,
            images,
            None,
            [[batch(label) for label in range(real.info.num_classes)]],
            config.lr,
            config.momentum,
            config.factor,
            config.augment.apply,
            lambda x: (x - real.train.mean) / real.train.std,
            config.metric,
            config.bias,
            config.fc,
        )

    return work


def project(device, precision, **arguments):
    real, synthetic, config, network = problem(device=setup_device(device), **arguments)
    config = dataclasses.replace(config, precision=precision)
    matcher, number = GradientMatcher(real, synthetic, config), itertools.count()
    return lambda: matcher.sweep(network, next(number))


def main():
    options = harness.parse(
        __doc__, harness.PRECISION, ("--data_path", str, "data/cifar10-jpeg", "CIFAR-10 in class folders")
    )
    dataset, ipc, depth = ("Digits", 1, 2) if options.smallest else ("CIFAR10", 10, 3)
    row = harness.pair(
        "10 classes, ConvNet",
        published,
        project,
        options,
        dataset=dataset,
        data_path=options.data_path,
        ipc=ipc,
        depth=depth,
    )
    harness.show_pairs(f"one sweep of IDC on {dataset}", [row], options)


if __name__ == "__main__":
    harness.run(main)
