"""Operations launched by the published way and by this project: on a GPU, they bound networks this small.

    python benchmarks/launches.py --json

Counted on PyTorch's device without values (meta), so that nothing is computed: everything that PyTorch dispatches but
views. An augmented batch is the mean over DSA's entries; a student step is one of 50 with its adjoint, graphs kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import networks
from benchmarks import baseline, harness
from networks.reparam import ReparamModule, flatten
from utils import training
from utils.augment import DSA
from utils.data.datasets import ImageDataset
from utils.gradient_matching import matching_loss
from utils.options import DSA_STRATEGY
from utils.run.streams import stream
from utils.trajectory_matching import Step, match

META = torch.device("meta")
CLASSES, SIZE = 10, 32


class Count(TorchDispatchMode):
    """Counts the operations dispatched, but for views: those on the device, and with `host` those on the CPU, too."""

    def __init__(self, host):
        super().__init__()
        self.host, self.operations = host, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        counts = self.host or any(isinstance(value, torch.Tensor) and value.device == META for value in results)
        self.operations += counts and not function.is_view
        return result


def count(work, host=False):
    with Count(host) as counter:
        work()
    return counter.operations


def student_step(model, steps, published):
    """Return the operations of one student step with its adjoint."""
    network = networks.get_network(model, 3, CLASSES, SIZE).to(META)
    start, lr = flatten(network.parameters()), torch.zeros((), device=META)
    images, labels = _images(20)
    index = torch.zeros(20, dtype=torch.int64, device=META)
    problem = (start, start + 1, lr, images, labels)
    if published:
        baseline.unfused(network)
        return count(lambda: baseline.match_unrolled(network, *problem, [(index, None)] * steps)) / steps
    plan, student = [Step(index, lambda x: x)] * steps, ReparamModule(network)
    return count(lambda: match(student, *problem, plan, retained_graphs=steps)) / steps


def training_step(model, published):
    """Return the operations of one step of SGD on 256 images, without augmentation."""
    network, (images, labels) = networks.get_network(model, 3, CLASSES, SIZE).to(META), _images(256)
    if published:
        data = torch.utils.data.TensorDataset(images, labels)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        loader = [data[:]]

        def work():
            for x, y in loader:
                loss = torch.nn.functional.cross_entropy(network(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return count(work)
    config, real = training.TrainConfig(1, 0.01), ImageDataset(images, labels)
    optimizer = training.sgd(network, config)
    return count(lambda: training.train_epoch(network, optimizer, real, config, stream(0, "benchmark")))


def augmented_batch(name, published, host):
    """Return the operations of one entry of DSA on 20 images."""
    images, _ = _images(20)
    if published:
        return count(lambda: baseline.augment(images, name), host)
    dsa, rng = DSA(name), np.random.default_rng(0)
    return count(lambda: dsa.apply(images, dsa.draw(len(images), rng)), host)


def class_of_a_sweep(model, published):
    """Return the operations of one class of an IDC sweep: the distance of gradients and its gradient."""
    network = networks.get_network(model, 3, CLASSES, SIZE).to(META)
    real, synthetic = _images(64)[0], _images(40)[0].requires_grad_()
    if published:
        baseline.unfused(network)

        def gradient(x, keep):
            y = torch.zeros(len(x), dtype=torch.int64, device=META)
            loss = torch.nn.functional.cross_entropy(network(x), y)
            return torch.autograd.grad(loss, list(network.parameters()), create_graph=keep)

        def work():
            pairs = [
                pair for pair in zip(gradient(real, False), gradient(synthetic, True), strict=True) if pair[0].dim() > 2
            ]
            sum((a - b).abs().sum() for a, b in pairs).backward()

        return count(work)
    return count(lambda: matching_loss(network, real, synthetic, 0, "grad", "l1", False, False, (0, 0)).backward())


def _images(total):
    return torch.zeros(total, 3, SIZE, SIZE, device=META), torch.zeros(total, dtype=torch.int64, device=META)


def main():
    options = harness.parse(__doc__, pairs=False)
    model, steps = ("ConvNetW32", 2) if options.smallest else ("ConvNet", 50)
    names = DSA_STRATEGY.split("_")

    def batch(published, host):
        return sum(augmented_batch(name, published, host) for name in names) / len(names)

    works = {
        "student step with its adjoint": lambda published: student_step(model, steps, published),
        "training step": lambda published: training_step(model, published),
        "augmented batch": lambda published: batch(published, False),
        "augmented batch, with what the CPU prepares": lambda published: batch(published, True),
        "class of an IDC sweep": lambda published: class_of_a_sweep(model, published),
    }
    rows = [{"label": label, "baseline": work(True), "project": work(False)} for label, work in works.items()]
    lines = [
        (row["label"], f"{row['baseline']:.1f}", f"{row['project']:.1f}", f"{row['project'] / row['baseline']:.2f}")
        for row in rows
    ]
    about = f"torch {torch.__version__}"
    harness.show(f"operations launched, {model}", about, ("row", "baseline", "project", "ratio"), lines, rows, options)


if __name__ == "__main__":
    harness.run(main)
