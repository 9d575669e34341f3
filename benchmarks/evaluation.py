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
from utils import runtime, training
from utils.augment import DSA
from utils.datasets import Source
from utils.options import DSA_STRATEGY

NETWORKS = 5


def problem(model, device):
    torch.manual_seed(0)
    images, labels = torch.randn(100, 3, 32, 32), torch.arange(100) % 10
    made = [networks.get_network(model, 3, 10, 32).to(device) for _ in range(NETWORKS)]
    return images, labels, made


def published(model, epochs, device="cpu"):
    images, labels, made = problem(model, device)
    dataset = torch.utils.data.TensorDataset(images, labels)

    def work():
        for network in made:
            baseline.unfused(network)
            optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
            for _ in range(epochs):
                baseline.train_epoch(network, optimizer, dataset, 256, DSA_STRATEGY.split("_"))

    return work


def project(model, epochs, device="cpu"):
    chosen = runtime.choose_device(device)
    images, labels, made = problem(model, chosen)
    source = Source(images.to(chosen), labels.to(chosen))
    recipe = training.evaluation_recipe(epochs, 0.01, 256, DSA(DSA_STRATEGY))

    def work():
        training.train_together(made, source, recipe, 0, [("evaluation", k) for k in range(NETWORKS)])

    return work


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--epochs", type=int, default=300, help="epochs of each network")
    options = parser.parse_args()
    arguments = {"model": "ConvNetW32", "epochs": options.epochs, "device": options.device}
    label = f"{NETWORKS} x ConvNetW32, 100 images, {options.epochs} epochs"
    row = harness.pair(
        label, "benchmarks.evaluation", "published", "project", arguments, options.pairs, options.threads
    )
    harness.show("evaluation on a union", [row], options)


if __name__ == "__main__":
    main()
