"""Steps, disk and memory of the five scripts, from their options and networks: neither images nor experts are needed.

`--dry_run`, the disk check before a run and `scripts/reproduce.py --list` share these numbers. All functions take
`config`, the dict of a script's options (`vars(args)`), `info`, the `DatasetInfo`, and the number of training images.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch
from torch.nn import functional as F

import networks
from networks.reparam import ReparamModule

from . import feature_matching, gradient_matching, multi_formation
from . import trajectory_matching as matching
from .memory import saved_bytes
from .results.names import stage_ipcs
from .run.errors import UserError
from .training import testing_batch

TEST_IMAGES = 10_000  # of every data set of the paper
REPORT_BYTES = 10**6
BESTS = 10  # evaluations of a stage, about, that are better than all before; each saves the images


@dataclasses.dataclass(frozen=True)
class Size:
    """What one script takes.

    Attributes:
        steps: in words.
        disk: bytes that it writes.
        memory: function returning (least, most) bytes on a GPU, an estimate: the images of the data set and the tensors
            that the largest graph saves. Trajectory matching needs least with --kept_steps 0, most if it keeps all.
    """

    steps: str
    disk: int
    memory: Callable[[], tuple]


def experts(config, info, train_images):
    """Return the `Size` of buffer_mtt.py."""
    steps = config["num_experts"] * config["train_epochs"] * -(-train_images // config["batch_train"])
    disk = _bytes(_network(config, info)) * (config["train_epochs"] + 1) * config["num_experts"]
    return Size(f"{steps} optimiser steps", disk, lambda: _training_memory(config, info, train_images))


def mtt_distillation(config, info, train_images, num_experts):
    """Return the `Size` of distill_mtt.py. What it writes are trajectories of its transitions, and images.

    Args:
        num_experts: experts in the buffers.
    """
    network, stages = _network(config, info), config["num_intervals"]
    later = range(config["start_interval"] + 1, stages + 1)
    entries = sum(mtt_start_epochs(config, stage).stop + config["expert_epochs"] + 2 for stage in later)
    ipcs = stage_ipcs(config["ipc"], stages)
    unions = [
        _images(info, info.num_classes * total).nbytes * (config["canvas_size"] ** 2 if config["texture"] else 1)
        for total in itertools.accumulate(ipcs)
    ]
    saves = config["Iteration"] // config["eval_it"] + 1
    if not config["force_save"]:
        saves = min(saves, BESTS + config["Iteration"] // 1000)
    images = sum(unions[config["start_interval"] - 1 :]) * (1 + saves * (2 if config["zca"] else 1))

    def memory():
        subset, union = info.num_classes * max(ipcs), info.num_classes * sum(ipcs)
        with torch.device("meta"):
            step = matching.Step(torch.arange(min(config["batch_syn"] or subset, union)), lambda images: images)
            student = ReparamModule(network)
            start, labels = torch.zeros(student.numel), torch.zeros(union, dtype=torch.int64)
            graph = matching.graph_bytes(student, start, _images(info, union), labels, step)
        learned = unions[-1] * max(ipcs) // sum(ipcs)
        # The union, its gradient and its running mean; the optimiser's gradient and momentum of what is learned.
        synthetic = unions[-1] * (3 if config["ema"] else 2) + 2 * learned
        base = _data_bytes(config, info, train_images) + _bytes(network) * config["syn_steps"] + synthetic
        between = _training_bytes(config, info)  # evaluation and transition
        # The backward pass through a graph needs about as much again.
        return tuple(base + max(graphs * graph, between) for graphs in (2, config["syn_steps"] + 1))

    return Size(
        f"{stages} stages of {config['Iteration']} iterations of {config['syn_steps']} student steps",
        _bytes(network) * entries * num_experts + images,
        memory,
    )


def mtt_start_epochs(config, stage):
    """Return the range of epochs at which the students of `stage` (from 1) of distill_mtt.py may start."""
    if windows := config["start_epochs"]:
        return range(*windows[stage - 1 if len(windows) > 1 else 0])
    return range(config["start_sampling_epoch"], config["start_sampling_epoch"] + config["max_start_epoch"])


def mtt_evaluation(config, info, train_images, pool):
    """Return the `Size` of evaluate_mtt.py for networks of the architectures in `pool`."""
    counts = {name: config["num_experts"] if name == config["model"] else config["num_eval"] for name in pool}
    words = ", ".join(f"{count} networks of {name}" for name, count in counts.items())
    return Size(
        f"{config['num_intervals']} stages of {config['epoch_eval_train']} epochs for {words}",
        REPORT_BYTES,
        lambda: _training_memory(config, info, train_images, pool),
    )


def idc_distillation(config, info, train_images):
    """Return the `Size` of distill_idc.py. What it writes are the unions of all stages and its state."""
    stages = config["num_intervals"]

    def memory():
        images, limit = config["ipc"] * stages, config["batch_syn_max"]
        pieces = multi_formation.decode_plan(images, config["factor"], config["decode_type"], limit)
        decoded = min(limit, sum((last - first) * factor**2 for first, last, factor in pieces))
        real, synthetic = _images(info, config["batch_real"]), _images(info, decoded).requires_grad_()
        network = _network(config, info)
        options = {name: config[name] for name in ("match", "metric", "bias", "fc")}
        options["f_idx"] = gradient_matching.feature_range(config["f_idx"])
        how = gradient_matching.GradientMatchConfig(config["lr_img"], None, **options)
        graph = saved_bytes(lambda: gradient_matching.matching_loss(network, real, synthetic, 0, how))
        # The backward pass through a graph needs about as much again.
        return _training_memory(config, info, train_images, matching=2 * graph)

    return Size(
        f"{stages} stages of {idc_iterations(config)} outer iterations of {config['inner_loop']} sweeps over "
        f"{info.num_classes} classes",
        info.num_classes * config["ipc"] * _images(info, 1).nbytes * (stages * (stages + 1) // 2 + 3),
        memory,
    )


def idc_pretraining(config, info, train_images, epochs):
    """Return the `Size` of distill_idc.py --pretrain, which saves the network after each of `epochs`."""
    disk = len(epochs) * _bytes(_network(config, info))
    return Size(f"{epochs[-1]} epochs of one network", disk, lambda: _training_memory(config, info, train_images))


def dm_distillation(config, info, train_images):
    """Return the `Size` of distill_dm.py. What it writes are the unions of all stages and its state."""
    stages, together = config["num_intervals"], feature_matching.FeatureMatchConfig.pass_pixels

    def memory():
        decoded = config["ipc"] * stages * config["factor"] ** 2
        images = min(info.num_classes * decoded, max(decoded, together // info.im_size**2))
        network = _network(config, info).requires_grad_(False)
        x = _images(info, images).requires_grad_()
        graph = saved_bytes(lambda: feature_matching.features_of(network, x).sum())
        graph *= 2 if config["calibration"] else 1  # the finished expert's
        return _training_memory(config, info, train_images, matching=2 * graph)

    return Size(
        f"{stages} stages of {config['Iteration']} iterations over {info.num_classes} classes",
        info.num_classes * config["ipc"] * _images(info, 1).nbytes * (stages * (stages + 1) // 2 + 4),
        memory,
    )


def idc_iterations(config):
    """Return the outer iterations of a stage."""
    return max(1, int(config["niter"] * 100 / config["inner_loop"] + 1e-9))


def idc_evaluation(config, info, train_images):
    """Return the `Size` of evaluate_idc.py."""
    stages, pool = 1 if config["last_only"] else config["num_intervals"], config["eval_models"]
    return Size(
        f"{stages} stages of {config['epochs']} epochs for {config['repeat']} networks of each of {', '.join(pool)}",
        REPORT_BYTES,
        lambda: _training_memory(config, info, train_images, pool),
    )


def _network(config, info, name="self"):
    """Return a network without values (device meta): the named one, or the distillation's own."""
    return _build(_spec(config, name), **info.network_shape)


def _spec(config, name):
    """Return the name of a network, or the settings of PDD+IDC's own as a tuple of items."""
    if name == "self" and "model" not in config:
        spec = {name: config[name] for name in ("net_type", "depth", "width")}
        return tuple({**spec, "norm": config["norm_type"]}.items())
    return config["model"] if name == "self" else name


def _build(spec, **shape):
    with torch.device("meta"):
        try:
            if isinstance(spec, tuple):
                return networks.idc_network(**shape, **dict(spec))
            return networks.get_network(spec, **shape)
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"network {dict(spec) if isinstance(spec, tuple) else spec}: {error}") from None


def _images(info, count):
    return torch.zeros(count, info.channel, info.im_size, info.im_size, device="meta")


def _bytes(network):
    return sum(parameter.nbytes for parameter in network.parameters())


def _data_bytes(config, info, train_images):
    """Return the bytes of all real images on the device: uint8, or float32 if they are whitened."""
    return (train_images + TEST_IMAGES) * info.channel * info.im_size**2 * (4 if config.get("zca") else 1)


def _training_memory(config, info, train_images, pool=("self",), matching=0):
    """Return (least, most) bytes for training networks one after the other, or for a step of `matching` bytes."""
    largest = max(matching, *(_training_bytes(config, info, name) for name in pool))
    return (_data_bytes(config, info, train_images) + largest,) * 2


def _training_bytes(config, info, name="self"):
    """Return the bytes for training a network on minibatches, and for testing it."""
    batch = config.get("batch_train") or config["batch_size"]
    return _measured(_spec(config, name), tuple(info.network_shape.items()), batch)


@functools.cache  # rows of a table share networks
def _measured(spec, shape, batch):
    network, shape = _build(spec, **dict(shape)), dict(shape)
    images = torch.zeros(batch, shape["channel"], shape["im_size"], shape["im_size"], device="meta")
    labels = torch.zeros(batch, dtype=torch.int64, device="meta")
    outputs = []
    for module in network.modules():
        module.register_forward_hook(lambda _module, _input, output: outputs.append(output.nbytes))
    graph = saved_bytes(lambda: F.cross_entropy(network(images), labels))
    # Parameters, gradients and momentum; in a test a layer's input and output beside the output of the layer before.
    return 3 * _bytes(network) + max(graph, 3 * max(outputs) * testing_batch(shape["im_size"]) // batch)
