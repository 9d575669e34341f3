"""One sweep of IDC over the 10 classes of CIFAR-10 against the published loop over classes.

    python benchmarks/idc_sweep.py --data_path data/cifar10-jpeg --json

ConvNet, batch_real 64, 10 images per class, factor 2: 64 real and 40 decoded pictures of each class.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import distill_idc
from benchmarks import baseline, harness
from utils import datasets, idc_options, runtime
from utils.gradient_matching import sweep
from utils.idc import new_network
from utils.options import Parser

WORDS = ["--reproduce", "-d", "cifar10", "-f", "2", "--ipc", "10"]


def settings():
    """Return the options of the published command."""
    parser = Parser("benchmark")
    defaults = idc_options.add(parser, start_interval=True)
    options = idc_options.resolve(parser.parse_args(WORDS), defaults, parser)
    return argparse.Namespace(**vars(options), transition_pool=0, transition_batch=1)


def learner_of(data_path, device):
    """Return a learner at the start of stage 0, with a network of its own."""
    options = settings()
    real = datasets.load("CIFAR10", data_path, device)
    run = distill_idc.Run(options, real, Path("nowhere"))
    learner = distill_idc.Learner(run, 0, None, run.new_images(0), None)
    learner.network = new_network(options, real, "benchmark")
    return learner


def published(data_path, device="cpu"):
    learner = learner_of(data_path, torch.device(device))
    options, real, run = learner.options, learner.real, learner.run
    network, rng = baseline.unfused(learner.network), np.random.default_rng(0)

    def work():
        batches = []
        for label in range(real.num_classes):
            index = torch.from_numpy(rng.choice(real.class_indices[label], options.batch_real, replace=False))
            batches.append((real.train.images[index.to(device)].float() / 255, run.augment.draw(1, rng)))
        baseline.idc_sweeps(
            network,
            learner.learned,
            None,
            [batches],
            options.lr_img_scaled,
            options.mom_img,
            2,
            run.augment.apply,
            lambda x: (x - run.mean) / run.std,
            options.metric,
            False,
            False,
        )

    return work


def project(data_path, device="cpu"):
    learner = learner_of(data_path, runtime.choose_device(device))
    options, rng = learner.options, np.random.default_rng(0)

    def work():
        sweep(
            learner.learned,
            learner.velocity,
            options.lr_img_scaled,
            options.mom_img,
            lambda images: learner.gradients(images, rng),
        )

    return work


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--data_path", default="data/cifar10-jpeg", help="CIFAR-10 in class folders")
    options = parser.parse_args()
    arguments = {"data_path": options.data_path, "device": options.device}
    row = harness.pair(
        "10 classes, ConvNet", "benchmarks.idc_sweep", "published", "project", arguments, options.pairs, options.threads
    )
    harness.show("one sweep of IDC", [row], options)


if __name__ == "__main__":
    main()
