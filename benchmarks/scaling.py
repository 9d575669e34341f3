"""Estimate a matching iteration on many GPUs from counted operations and bytes; nothing here is timed.

    python benchmarks/scaling.py

Operations are counted by the formulas of torch.utils.flop_counter over one student step and its adjoint, with graphs
recomputed as by --kept_steps 0. Throughput and bandwidths are assumptions, in ASSUMED.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import networks
from benchmarks import harness
from networks.reparam import ReparamModule, flatten
from utils.trajectory_matching import Step, match

# Sustained float32/TF32 throughput of one GPU in these small convolutions, bytes/s of one rank's all-reduce inside a
# machine of 8 and between machines, seconds of latency of one all-reduce.
ASSUMED = {"flops": 15e12, "inside": 200e9, "between": 20e9, "latency_inside": 30e-6, "latency_between": 100e-6}
STEP_OVERHEAD = 2e-3  # seconds of launching the kernels of a step and its adjoint, however few images it has
MACHINE = 8

CASES = {
    "CIFAR-100 IPC 50 (512 of up to 5000 images a step)": ("ConvNet", 3, 100, 32, 512, 20, 1000),
    "Tiny ImageNet IPC 50 (64 of up to 10000 images a step)": ("ConvNetD4", 3, 200, 64, 64, 20, 2000),
}
SMALLEST = {"Digits IPC 1 (8 of 8 images a step)": ("ConvNetW32", 1, 10, 8, 8, 2, 10)}
GPUS_AND_EXPERTS = ((1, 1), (8, 1), (64, 1), (8, 8), (64, 8), (64, 64))
HEAD = ("GPUs", "experts", "images each", "compute (s)", "sums (s)", "iteration (s)", "experts/s of one GPU's")
PROBE = 4  # images that operations are counted for


class Counter(TorchDispatchMode):
    """Counts the floating-point operations of what runs inside; FlopCounterMode refuses gradients of leaves."""

    flops = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        value = function(*arguments, **(keywords or {}))
        if function._overloadpacket in flop_registry:
            self.flops += flop_registry[function._overloadpacket](*arguments, **(keywords or {}), out_val=value)
        return value


def count_step(model, channel, classes, size, count):
    """Return (parameters, floating-point operations of one student step with its recomputed graph and adjoint)."""
    torch.manual_seed(0)
    network = networks.get_network(model, channel, classes, size)
    network.fuses = False  # the counter knows PyTorch's own operations
    student = ReparamModule(network)
    start = flatten(network.parameters())
    images, labels = torch.randn(count, channel, size, size), torch.arange(count) % classes
    steps = [Step(torch.arange(count), lambda x: x)] * 2
    totals = []
    for number in (1, 2):  # the first step needs no Hessian-vector product: the difference is a step in the middle
        with Counter() as counter:
            match(student, start, start + 0.01, torch.tensor(0.01), images, labels, steps[:number])
        totals.append(counter.flops)
    return student.numel, totals[1] - totals[0]


def all_reduce(bytes_, gpus):
    """Return the seconds of a ring all-reduce."""
    if gpus == 1:
        return 0.0
    where = "inside" if gpus <= MACHINE else "between"
    return 2 * (gpus - 1) / gpus * bytes_ / ASSUMED[where] + ASSUMED[f"latency_{where}"]


def estimate(parameters, operations, images, batch, steps):
    """Return a row for each of `GPUS_AND_EXPERTS`.

    Args:
        parameters: of the network.
        operations: of one step on the whole minibatch.
        images: bytes of the learned images.
        batch: images of a minibatch.
        steps: student steps of an iteration.
    """
    rows = []
    for gpus, experts in GPUS_AND_EXPERTS:
        team = gpus // experts
        compute = steps * max(operations / team / ASSUMED["flops"], STEP_OVERHEAD)
        sums = 2 * steps * all_reduce(4 * parameters, team) + all_reduce(images, gpus)
        row = {"gpus": gpus, "experts": experts, "images": batch / team, "compute_s": compute, "sums_s": sums}
        row["iteration_s"] = compute + sums
        rows.append(row | {"rate": experts * (rows or [row])[0]["iteration_s"] / row["iteration_s"]})
    return rows


def main():
    options = harness.parse(__doc__, pairs=False)
    print(f"assumed: {ASSUMED}, {STEP_OVERHEAD} s a step at least")
    cases = SMALLEST if options.smallest else CASES
    for label, (model, channel, classes, size, batch, steps, learned) in cases.items():
        parameters, operations = count_step(model, channel, classes, size, PROBE)
        operations = operations * batch / PROBE
        images = learned * channel * size**2 * 4
        rows = estimate(parameters, operations, images, batch, steps)
        about = (
            f"{model}, {parameters} parameters, {4 * parameters / 1e6:.2f} MB a sum; {operations / 1e12:.3g} TFLOP a "
            f"step, {steps * operations / 1e12:.3g} an iteration; {2 * steps} sums of parameters, one of "
            f"{images / 1e6:.3g} MB of images"
        )
        lines = [
            (row["gpus"], row["experts"], f"{row['images']:.1f}", f"{row['compute_s']:.4f}", f"{row['sums_s']:.4f}",
             f"{row['iteration_s']:.4f}", f"{row['rate']:.1f}")
            for row in rows
        ]  # fmt: skip
        print()
        harness.show(label, about, HEAD, lines, rows, options)


if __name__ == "__main__":
    harness.run(main)
