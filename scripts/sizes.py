"""What the steps of a row take, computed from their options alone: neither data nor experts need to be there.

Steps and disk are what each script's --dry_run prints. Memory is an estimate of what a GPU holds: the pictures of the
data set and the tensors that the largest graph saves, counted on networks without values (PyTorch's device meta).
"""

import dataclasses
import functools

import torch
from torch.nn import functional as F

import buffer_mtt
import evaluate_mtt
import networks
from utils import datasets, formation, gradient_matching, matching
from utils.reparam import FlatNetwork

TRAINING_PICTURES = {"CIFAR10": 50_000, "CIFAR100": 50_000, "Tiny": 100_000}
TEST_PICTURES = 10_000  # of each of them
MEMORY = """memory: estimated for a GPU from the sizes of pictures, parameters and saved tensors, not measured;
where a range is given, from --kept_steps 0 to all steps kept (auto keeps what fits half of the free memory)
steps: evaluations inside a stage and the trainings of a transition come on top"""
TEST_BATCH = 1024  # of utils.training.accuracy


@dataclasses.dataclass(frozen=True)
class Size:
    """What one step takes.

    Attributes:
        steps: in words, as --dry_run prints them.
        memory: (least, most) bytes: trajectory matching that keeps the graph of one student step, or of all.
        disk: bytes that it writes.
    """

    steps: str
    memory: tuple
    disk: float


def table(rows):
    """Return the text table of {row: list of steps}, each with its `script` and `options`."""
    lines = [("row", "script", "steps", "memory (GB)", "disk (GB)")]
    for row, steps in rows.items():
        for step, size in zip(steps, of_row(steps), strict=True):
            memory = " to ".join(dict.fromkeys(f"{value / 1e9:.1f}" for value in size.memory))
            lines.append((row, step.script, size.steps, memory, f"{size.disk / 1e9:.2f}"))
            row = ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, tuple("-" * width for width in widths))
    text = "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return text + f"\n\n{MEMORY}"


def of_row(steps, training=None):
    """Return the `Size` of each of a row's steps, experts first.

    Args:
        steps: list of objects with `script` and `options`.
        training: pictures of the training set; None for those of the original.
    """
    first = steps[0].options
    name = first.dataset if steps[0].script == "buffer_mtt.py" else first.data
    kind, training = datasets.KINDS[name], training or TRAINING_PICTURES[name]
    sizes = {
        "buffer_mtt.py": lambda options: experts(options, kind, training),
        "distill_mtt.py": lambda options: mtt_distillation(options, kind, training, first.num_experts),
        "evaluate_mtt.py": lambda options: mtt_evaluation(options, kind, training),
        "distill_idc.py": lambda options: idc_distillation(options, kind, training),
        "evaluate_idc.py": lambda options: idc_evaluation(options, kind, training),
    }
    return [sizes[step.script](step.options) for step in steps]


def experts(options, kind, training):
    network = named_network(options.model, kind)
    memory = data_bytes(kind, training, options.zca) + training_bytes(network, kind, options.batch_train)
    disk = 4 * numel(network) * (options.train_epochs + 1) * options.num_experts
    return Size(f"{buffer_mtt.steps_of(options, training)} optimiser steps", (memory,), disk)


def mtt_distillation(options, kind, training, recorded):
    network = named_network(options.model, kind)
    total = kind.num_classes * options.ipc * options.num_intervals
    batch = min(options.batch_syn or kind.num_classes * options.ipc, total)
    with torch.device("meta"):
        step = matching.Step(torch.arange(batch), lambda pictures: pictures)
        start, labels = torch.zeros(numel(network)), torch.zeros(total, dtype=torch.int64)
        graph = matching.graph_bytes(FlatNetwork(network), start, pictures_of(kind, total), labels, step)
    # The way back through a graph needs about as much again.
    base = data_bytes(kind, training, options.zca) + 4 * numel(network) * options.syn_steps
    between = training_bytes(network, kind, options.batch_train)  # evaluation and transition
    memory = tuple(base + max(graphs * graph, between) for graphs in (2, options.syn_steps + 1))
    entries = options.max_start_epoch + options.expert_epochs + 2
    count = min(recorded, options.num_experts)
    return Size(
        f"{options.num_intervals} stages of {options.Iteration} iterations of {options.syn_steps} student steps",
        memory,
        4 * numel(network) * entries * count * (options.num_intervals - options.start_interval),
    )


def mtt_evaluation(options, kind, training):
    pool = evaluate_mtt.pool_of(options)
    largest = max(training_bytes(named_network(name, kind), kind, options.batch_train) for name in pool)
    count = options.num_experts if pool == [options.model] else options.num_eval
    return Size(
        f"{options.num_intervals} stages of {options.epoch_eval_train} epochs for {count} networks of each of "
        f"{', '.join(pool)}",
        (data_bytes(kind, training, options.zca) + largest,),
        1e6,
    )


def idc_distillation(options, kind, training):
    network = idc_network(options, kind)
    total = options.ipc * options.num_intervals
    pieces = formation.plan(total, options.factor, options.decode_type, options.batch_syn_max)
    decoded = min(options.batch_syn_max, sum((last - first) * factor**2 for first, last, factor in pieces))
    real, synthetic = pictures_of(kind, options.batch_real), pictures_of(kind, decoded).requires_grad_()
    words = (0, options.match, options.metric, options.bias, options.fc, options.f_idx)
    graph = matching.saved_bytes(lambda: gradient_matching.matching_loss(network, real, synthetic, *words))
    # The way back through a graph needs about as much again.
    memory = data_bytes(kind, training) + max(2 * graph, training_bytes(network, kind, options.batch_size))
    iterations = max(1, int(options.niter * 100 / options.inner_loop + 1e-9))
    union = kind.num_classes * options.ipc * kind.channel * kind.im_size**2 * 4
    stages = options.num_intervals
    return Size(
        f"{stages} stages of {iterations} outer iterations of {options.inner_loop} sweeps over {kind.num_classes} "
        "classes",
        (memory,),
        union * (stages * (stages + 1) // 2 + 3),
    )


def idc_evaluation(options, kind, training):
    pool = [idc_network(options, kind) if name == "self" else named_network(name, kind) for name in options.eval_models]
    largest = max(training_bytes(network, kind, options.batch_size) for network in pool)
    return Size(
        f"{options.num_intervals} stages of {options.epochs} epochs for {options.repeat} networks of each of "
        f"{', '.join(options.eval_models)}",
        (data_bytes(kind, training) + largest,),
        1e6,
    )


@functools.lru_cache
def named_network(name, kind):
    with torch.device("meta"):
        return networks.get_network(name, kind.channel, kind.num_classes, kind.im_size)


@functools.lru_cache
def own_network(kind, net_type, depth, width, norm):
    with torch.device("meta"):
        return networks.idc_network(net_type, kind.channel, kind.num_classes, kind.im_size, depth, width, norm)


def idc_network(options, kind):
    """Return the distillation's own network."""
    return own_network(kind, options.net_type, options.depth, options.width, options.norm_type)


def numel(network):
    return sum(parameter.numel() for parameter in network.parameters())


def pictures_of(kind, count):
    """Return `count` pictures without values."""
    return torch.zeros(count, kind.channel, kind.im_size, kind.im_size, device="meta")


def data_bytes(kind, training, zca=False):
    """Return the bytes of all real pictures on the device: uint8, or float32 where they are whitened."""
    return (training + TEST_PICTURES) * kind.channel * kind.im_size**2 * (4 if zca else 1)


@functools.lru_cache
def training_bytes(network, kind, batch):
    """Return the bytes that training a network on minibatches of `batch` pictures takes, and testing it."""
    labels = torch.zeros(batch, dtype=torch.int64, device="meta")
    graph = matching.saved_bytes(lambda: F.cross_entropy(network(pictures_of(kind, batch)), labels))
    maps = []
    handles = [
        module.register_forward_hook(lambda _module, _input, output: maps.append(output.nbytes))
        for module in network.modules()
    ]
    with torch.no_grad():
        network(pictures_of(kind, TEST_BATCH))
    for handle in handles:
        handle.remove()
    # A layer's input and output stand beside that of the layer before.
    return 12 * numel(network) + max(graph, 3 * max(maps))
