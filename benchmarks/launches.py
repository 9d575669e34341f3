"""How many operations the published way and this project launch: on a GPU, networks this small wait for launches.

    python benchmarks/launches.py --json
    python benchmarks/launches.py --compile

Counted on PyTorch's device `meta`, which has shapes but no values, so no GPU is needed. Views launch nothing and are
left out; an operation counts once, however many kernels a GPU makes of it. With --compile also the kernels that
torch.compile makes of a student step with its adjoint for the CPU, by its own counter; that takes a minute or two.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch._inductor import metrics
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import networks
from benchmarks import baseline, harness
from networks.reparam import ReparamModule, flatten
from utils import training
from utils.augment import DSA
from utils.data.datasets import ImageDataset
from utils.gradient_matching import GradientMatchConfig, matching_loss
from utils.options import DSA_STRATEGY
from utils.trajectory_matching import Step, match

META = torch.device("meta")
NO_LAUNCH = (torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default)


class Count(TorchDispatchMode):
    """Counts operations on the device that are no views; those on the CPU launch nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        launched = any(isinstance(value, torch.Tensor) and value.is_meta for value in tree_leaves((made, args)))
        self.count += launched and not function.is_view and function not in NO_LAUNCH
        return made


def counted(work):
    with Count() as counter:
        work()
    return counter.count


def zeros(count, size):
    return torch.zeros(count, 3, size, size, device=META), torch.zeros(count, dtype=torch.int64, device=META)


def student_step(model, size, steps, retained):
    """Return (baseline, project): operations of one of `steps` student steps of 20 images with its adjoint."""
    network = networks.get_network(model, 3, 10, size).to(META)
    (images, labels), start, lr = zeros(20, size), flatten(network.parameters()), torch.zeros((), device=META)
    problem, index = (start, start + 1, lr, images, labels), torch.zeros(20, dtype=torch.int64, device=META)
    plan = [Step(index, lambda x: x)] * steps
    project = counted(lambda: match(ReparamModule(network), *problem, plan, 0, steps if retained else 0))
    published = counted(lambda: baseline.match_unrolled(baseline.unfused(network), *problem, [(index, None)] * steps))
    return published / steps, project / steps


def compiled_kernels(model, size):
    """Return how many kernels torch.compile makes for the CPU of a student step of 20 images with its adjoint."""
    network = networks.get_network(model, 3, 10, size)
    student = ReparamModule(network, compiled=True, note=sys.exit)
    start, images = flatten(network.parameters()), torch.zeros(20, 3, size, size)
    _, vjp = student.gradient(start, images, torch.zeros(20, dtype=torch.int64), 20)
    vjp(start, True)
    return metrics.generated_kernel_count


def training_step(model, size, images):
    """Return operations of one minibatch of an expert, augmentation left out."""
    x, y = zeros(images, size)
    network = networks.get_network(model, 3, 10, size).to(META)
    plain = baseline.unfused(networks.get_network(model, 3, 10, size).to(META))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)

    def published():
        loss = F.cross_entropy(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    config = training.TrainConfig(1, 0.01, batch_size=images)
    own, data = training.sgd(network, config), ImageDataset(x, y)
    rng, order = np.random.default_rng(0), torch.zeros(images, dtype=torch.int64, device=META)
    project = counted(lambda: training.train_epoch(network, own, data, config, rng, order))
    return counted(published), project


def augmented_batch(images, size):
    """Return operations of an augmented batch, the mean over the entries of the strategy."""
    (x, _), rng, counts = zeros(images, size), np.random.default_rng(0), []
    for name in DSA_STRATEGY.split("_"):
        dsa = DSA(name)
        published = counted(lambda name=name: baseline.augment(x, name))
        counts.append((published, counted(lambda dsa=dsa: dsa.apply(x, dsa.draw(images, rng)))))
    return np.mean(counts, axis=0).tolist()


def sweep(size, classes):
    """Return operations of the matched gradients of IDC's sweep: 64 real and 40 decoded images of each class."""
    network, (real, _), (synthetic, _) = (
        networks.get_network("ConvNet", 3, 10, size).to(META),
        zeros(64, size),
        zeros(40, size),
    )
    synthetic.requires_grad_()
    config = GradientMatchConfig(lr=0.005, augment=None, metric="mse")

    def one():
        for label in range(classes):
            matching_loss(network, real, synthetic, label, config).backward()

    project = counted(one)
    baseline.unfused(network)
    return counted(one), project


def main():
    options = harness.parse(__doc__, ("--compile", bool, False, "count torch.compile's kernels, too"), pairs=False)
    model, size, steps, images, few = ("ConvNetW32", 8, 2, 4, 2) if options.smallest else ("ConvNet", 32, 50, 256, 20)
    rows = {
        f"student step with its adjoint, all graphs kept ({model})": student_step(model, size, steps, True),
        f"student step with its adjoint, constant memory ({model})": student_step(model, size, steps, False),
        f"training step ({model})": training_step(model, size, images),
        f"augmented batch of {images} images": augmented_batch(images, size),
        f"augmented batch of {few} images": augmented_batch(few, size),
        "gradient matching of IDC's sweep, 10 classes (ConvNet)": sweep(size, 10),
    }
    found = [{"label": label, "baseline": pair[0], "project": pair[1]} for label, pair in rows.items()]
    lines = [
        (row["label"], f"{row['baseline']:.0f}", f"{row['project']:.0f}", f"{row['project'] / row['baseline']:.2f}")
        for row in found
    ]
    if options.compile:
        count = compiled_kernels(model, size)
        found.append({"label": f"student step with its adjoint, kernels of --compile ({model})", "project": count})
        lines.append((found[-1]["label"], "", f"{count}", ""))
    about = f"device meta; torch {torch.__version__}"
    harness.show("operations launched", about, ("row", "baseline", "project", "ratio"), lines, found, options)


if __name__ == "__main__":
    harness.run(main)
