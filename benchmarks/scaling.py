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
from utils.matching import Step, match
from utils.reparam import FlatNetwork, flatten

# Sustained float32/TF32 throughput of one GPU in these small convolutions, bytes/s of one rank's all-reduce inside a
# machine of 8 and between machines, seconds of latency of one all-reduce.
ASSUMED = {"flops": 15e12, "inside": 200e9, "between": 20e9, "latency_inside": 30e-6, "latency_between": 100e-6}
STEP_OVERHEAD = 2e-3  # seconds of launching the kernels of a step and its adjoint, however few pictures it has
MACHINE = 8

CASES = {
    "CIFAR-100 IPC 50 (512 of up to 5000 pictures a step)": ("ConvNet", 3, 100, 32, 512, 20, 1000),
    "Tiny ImageNet IPC 50 (64 of up to 10000 pictures a step)": ("ConvNetD4", 3, 200, 64, 64, 20, 2000),
}


class Counter(TorchDispatchMode):
    """Counts the floating-point operations of what runs inside; FlopCounterMode refuses gradients of leaves."""

    flops = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        value = function(*arguments, **(keywords or {}))
        if function._overloadpacket in flop_registry:
            self.flops += flop_registry[function._overloadpacket](*arguments, **(keywords or {}), out_val=value)
        return value


def count_step(model, channel, classes, size, pictures):
    """Return (parameters, floating-point operations of one student step with its recomputed graph and adjoint)."""
    torch.manual_seed(0)
    network = networks.get_network(model, channel, classes, size)
    network.fuses = False  # the counter knows PyTorch's own operations
    student = FlatNetwork(network)
    start = flatten(network.parameters())
    images, labels = torch.randn(pictures, channel, size, size), torch.arange(pictures) % classes
    steps = [Step(torch.arange(pictures), lambda x: x)] * 2
    totals = []
    for count in (1, 2):  # the first step needs no Hessian-vector product: the difference is a step in the middle
        with Counter() as counter:
            match(student, start, start + 0.01, torch.tensor(0.01), images, labels, steps[:count])
        totals.append(counter.flops)
    return student.numel, totals[1] - totals[0]


def all_reduce(bytes_, gpus):
    """Return the seconds of a ring all-reduce."""
    if gpus == 1:
        return 0.0
    where = "inside" if gpus <= MACHINE else "between"
    return 2 * (gpus - 1) / gpus * bytes_ / ASSUMED[where] + ASSUMED[f"latency_{where}"]


def main():
    print(f"assumed: {ASSUMED}, {STEP_OVERHEAD} s a step at least")
    for label, (model, channel, classes, size, batch, steps, learned) in CASES.items():
        probe = 4
        parameters, operations = count_step(model, channel, classes, size, probe)
        operations = operations * batch / probe
        images = learned * channel * size**2 * 4
        print(f"\n{label}: {model}, {parameters} parameters ({4 * parameters / 1e6:.2f} MB a sum)")
        print(f"  {operations / 1e12:.3f} TFLOP a step, {steps * operations / 1e12:.2f} an iteration; "
              f"{2 * steps} sums of parameters, one of {images / 1e6:.1f} MB of images")  # fmt: skip
        print("  GPUs  experts  pictures each  compute (s)  sums (s)  iteration (s)  experts/s of one GPU's")
        first = None
        for gpus, experts in ((1, 1), (8, 1), (64, 1), (8, 8), (64, 8), (64, 64)):
            team = gpus // experts
            compute = steps * max(operations / team / ASSUMED["flops"], STEP_OVERHEAD)
            sums = 2 * steps * all_reduce(4 * parameters, team) + all_reduce(images, gpus)
            first = first or compute + sums
            print(f"  {gpus:4d}  {experts:7d}  {batch / team:13.1f}  {compute:11.4f}  {sums:8.4f}  "
                  f"{compute + sums:13.4f}  {experts * first / (compute + sums):21.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
