"""Training an expert: this project against a DataLoader over a TensorDataset with the published DSA.

    python benchmarks/experts.py --data_path data/cifar10-jpeg --json

Each timing trains ConvNet and ConvNetW32 on 2,560 real CIFAR-10 pictures (10 minibatches of 256).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import networks
from benchmarks import baseline, harness
from utils import datasets, runtime, training
from utils.augment import DSA
from utils.options import DSA_STRATEGY

PICTURES = 2560


def network_of(model, device):
    torch.manual_seed(0)
    return networks.get_network(model, 3, 10, 32).to(device)


def published(model, data_path, device="cpu"):
    real = datasets.load("CIFAR10", data_path, torch.device("cpu"))
    dataset = torch.utils.data.TensorDataset(*real.train.batch(slice(0, PICTURES)))
    network = baseline.unfused(network_of(model, device))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    return lambda: baseline.train_epoch(network, optimizer, dataset, 256, DSA_STRATEGY.split("_"))


def project(model, data_path, device="cpu"):
    chosen = runtime.choose_device(device)
    real = datasets.load("CIFAR10", data_path, chosen)
    network = network_of(model, chosen)
    recipe = training.Recipe(1, 0.01, dsa=DSA(DSA_STRATEGY))
    optimizer = training.optimizer_for(network, recipe)
    index = torch.arange(PICTURES, device=chosen)
    count = iter(range(10**9))
    return lambda: training.train_epoch(
        network, optimizer, real.train, recipe, runtime.stream(0, next(count)), index=index
    )


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--data_path", default="data/cifar10-jpeg", help="CIFAR-10 in class folders")
    options = parser.parse_args()
    rows = []
    for model in ("ConvNet", "ConvNetW32"):
        arguments = {"model": model, "data_path": options.data_path, "device": options.device}
        rows.append(
            harness.pair(
                f"{model}, {PICTURES} pictures",
                "benchmarks.experts",
                "published",
                "project",
                arguments,
                options.pairs,
                options.threads,
            )
        )
    harness.show("expert training on CIFAR-10 (JPEG)", rows, options)


if __name__ == "__main__":
    main()
