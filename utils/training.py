"""Training networks on real or synthetic pictures: experts, transitions and evaluations of both methods."""

import contextlib
import copy
import dataclasses

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

import networks
from utils.augment import DSA, cutmix, random_resized_crop, random_windows
from utils.files import Checkpoint
from utils.runtime import draws_of, seeded, stream, to_device

DRAWING = (nn.modules.dropout._DropoutNd, StochasticDepth)  # layers that draw random numbers when they train


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained by SGD.

    Attributes:
        epochs: passes over the pictures.
        lr: learning rate.
        momentum, weight_decay: of SGD.
        batch_size: pictures of a minibatch; the last of an epoch may be smaller.
        dsa: DSA applied to every minibatch, None for none.
        drops: ((epoch, factor), …): after the epoch of that index (from 0) the learning rate is multiplied.
        window: pixels of the random windows shown of larger canvases (texture mode), None for whole pictures.
        samples: windows of each canvas.
        cutmix: (probability, beta) of CutMix for each minibatch, None for none.
        crop: random resized crops and flips, for large pictures.
    """

    epochs: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 256
    dsa: DSA | None = None
    drops: tuple = ()
    window: int | None = None
    samples: int = 1
    cutmix: tuple | None = None
    crop: bool = False

    def lr_at(self, epoch):
        """Return the learning rate of the epoch with index `epoch`."""
        lr = self.lr
        for after, factor in self.drops:
            if epoch > after:
                lr *= factor
        return lr


def evaluation_recipe(epochs, lr, batch_size, dsa, window=None, samples=1):
    """Return MTT's recipe for networks trained on synthetic pictures: momentum 0.9, weight decay 5e-4, one drop."""
    drops = ((epochs // 2 + 1, 0.1),)
    return Recipe(epochs, float(lr), 0.9, 5e-4, batch_size, dsa, drops, window, samples)


def new_network(name, real, seed, *keys):
    """Return network `name` for the pictures of `real`, initialised from the stream `keys`, on their device."""
    with seeded(seed, "network", *keys):
        network = networks.get_network(name, real.channel, real.num_classes, real.im_size)
    return network.to(real.train.images.device)


def optimizer_for(network, recipe):
    """Return the SGD optimiser of `recipe`; hand it to several calls of `train` to carry its momentum on."""
    return torch.optim.SGD(
        network.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, foreach=True
    )


def train(network, source, recipe, seed, keys, optimizer=None, masks=None, each_epoch=None, checkpoint=None):
    """Train `network` in place.

    Args:
        network: torch.nn.Module on the device of the pictures.
        source: `Source`.
        recipe: `Recipe`.
        seed: the run's seed.
        keys: tuple naming this training; its random numbers come from streams of this name.
        optimizer: of an earlier call, whose momentum goes on; None for a new one.
        masks: {parameter: 0/1 tensor}; masked weights stay zero.
        each_epoch: called with (epoch, mean loss 0-dim tensor) after every epoch.
        checkpoint: `Checkpoint` in which the training has its slot; None for none.

    Returns:
        The optimiser.
    """
    optimizer = optimizer or optimizer_for(network, recipe)
    checkpoint = checkpoint or Checkpoint()
    network.train()
    epoch, position = 0, Position()

    def state():
        return {
            "epoch": epoch,
            "batch": position.batch,
            "total": position.total,
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
        }

    with checkpoint.loop("training", keys, state) as saved:
        if saved:
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            position = Position(saved["batch"], saved["total"])
        for epoch in range(saved["epoch"] if saved else 0, recipe.epochs):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(epoch)
                group["momentum"], group["weight_decay"] = recipe.momentum, recipe.weight_decay
            rng = stream(seed, *keys, epoch)
            loss = train_epoch(network, optimizer, source, recipe, rng, masks, None, position, checkpoint.tick)
            position = Position()
            if each_epoch:
                each_epoch(epoch, loss)
    return optimizer


@dataclasses.dataclass
class Position:
    """How far an epoch is: the minibatches done, and the sum of their losses times their pictures."""

    batch: int = 0
    total: float | torch.Tensor = 0.0


def train_together(members, source, recipe, seed, keys, optimizers=None, checkpoint=None, stacked=None):
    """Train several networks on the same pictures, each with its own random streams.

    The result does not depend on how many train together, but for rounding where they are stacked.

    Args:
        members: list of networks of one architecture, trained in place.
        keys: list of one tuple for each; other arguments as for `train`.
        optimizers: list of earlier optimisers, None for new ones.
        stacked: train them as one batched network (torch.func), True or False; None does so on a GPU, where many
            small networks are no slower than one, and where they have no running statistics.

    Returns:
        The list of optimisers.
    """
    optimizers = optimizers or [optimizer_for(member, recipe) for member in members]
    checkpoint = checkpoint or Checkpoint()
    if stacked is None:
        on_gpu = source.labels.device.type == "cuda"
        stacked = on_gpu and len(members) > 1 and not any(True for _ in members[0].buffers())
    if stacked:
        # Until its end nothing of the members changes; where they do not fit together they train one by one.
        with contextlib.suppress(torch.OutOfMemoryError):
            _train_stacked(members, source, recipe, seed, keys, optimizers, checkpoint)
            return optimizers
        torch.cuda.empty_cache()
    done = 0

    def state():
        return {
            "networks": [m.state_dict() for m in members[:done]],
            "optimizers": [optimizer.state_dict() for optimizer in optimizers[:done]],
        }

    with checkpoint.loop("members", keys, state) as saved:
        if saved:
            for member, optimizer, values, momenta in zip(
                members, optimizers, saved["networks"], saved["optimizers"], strict=False
            ):
                member.load_state_dict(values)
                optimizer.load_state_dict(momenta)
                done += 1
        for k in range(done, len(members)):
            train(members[k], source, recipe, seed, keys[k], optimizers[k], checkpoint=checkpoint)
            done += 1
    return optimizers


def _train_stacked(members, source, recipe, seed, keys, optimizers, checkpoint):
    """Train `members` as one network whose parameters have one more axis."""
    parameters, _ = torch.func.stack_module_state(members)
    shared = copy.deepcopy(members[0]).to("meta")
    shared.fuses = False  # the hand-written derivatives of CPUs know no batched networks
    stack = torch.optim.SGD(parameters.values(), lr=recipe.lr)
    names = list(parameters)
    if all(optimizer.state for optimizer in optimizers):
        for name in names:
            own = [
                optimizer.state[dict(member.named_parameters())[name]]["momentum_buffer"]
                for member, optimizer in zip(members, optimizers, strict=True)
            ]
            stack.state[parameters[name]]["momentum_buffer"] = torch.stack(own)

    @torch.func.vmap
    def logits_of(values, x):
        return torch.func.functional_call(shared, values, (x,))

    epoch = 0
    with checkpoint.loop(
        "stack",
        keys,
        lambda: {
            "epoch": epoch,
            "parameters": {name: value.detach() for name, value in parameters.items()},
            "optimizer": stack.state_dict(),
        },
    ) as saved:
        if saved:
            with torch.no_grad():
                for name, value in saved["parameters"].items():
                    parameters[name].copy_(value)
            stack.load_state_dict(saved["optimizer"])
        for epoch in range(saved["epoch"] if saved else 0, recipe.epochs):
            checkpoint.tick()
            for group in stack.param_groups:
                group["lr"] = recipe.lr_at(epoch)
                group["momentum"], group["weight_decay"] = recipe.momentum, recipe.weight_decay
            streams = [stream(seed, *key, epoch) for key in keys]
            for batches in zip(*(minibatches(source, recipe, rng) for rng in streams), strict=True):
                x = torch.stack([batch[0] for batch in batches])
                logits = logits_of(parameters, x)
                # Each network's gradient comes from its own loss: the sum keeps them apart.
                loss = sum(mixed_loss(logits[k], *batches[k][1:]) for k in range(len(members)))
                stack.zero_grad()
                loss.backward()
                stack.step()
    with torch.no_grad():
        for k, (member, optimizer) in enumerate(zip(members, optimizers, strict=True)):
            for name, parameter in member.named_parameters():
                parameter.copy_(parameters[name][k])
                if recipe.momentum:
                    momentum = stack.state[parameters[name]]["momentum_buffer"][k]
                    optimizer.state[parameter]["momentum_buffer"] = momentum.clone()


def minibatches(source, recipe, rng, index=None):
    """Draw one pass over the pictures: yields augmented pictures, labels, and CutMix's partners and share.

    Args:
        index: (n,) positions of the pictures of this pass, None for all of `source`.

    Yields:
        (x (B, C, H, W), y (B,), permutation of the partners or None, share of the own labels).
    """
    count = len(source) if index is None else len(index)
    order = to_device(rng.permutation(count), source.labels.device)
    if index is not None:
        order = index[order]
    for start in range(0, count, recipe.batch_size):
        x, y = source.batch(order[start : start + recipe.batch_size])
        if recipe.window:
            x, y = random_windows(x, rng, recipe.window, recipe.samples), y.repeat(recipe.samples)
        if recipe.crop:
            x = random_resized_crop(x, rng)
        if recipe.dsa:
            x = recipe.dsa.apply(x, recipe.dsa.draw(len(x), rng))
        other, share = None, 1.0
        if recipe.cutmix:
            x, other, share = cutmix(x, recipe.cutmix, rng)
        yield x, y, other, share


def mixed_loss(logits, y, other, share):
    """Return the cross-entropy (0-dim) of `logits` (B, classes) with labels shared as CutMix did."""
    loss = F.cross_entropy(logits, y)
    return loss if other is None else share * loss + (1 - share) * F.cross_entropy(logits, y[other])


def train_epoch(network, optimizer, source, recipe, rng, masks=None, index=None, position=None, tick=None):
    """One pass over the pictures in random order.

    Args:
        index: (n,) positions of the pictures of this pass, None for all of `source`.
        position: `Position` to go on from; the minibatches before it are drawn, so that the later ones see the same
            random numbers, but not trained on.
        tick: called before every minibatch.

    Returns:
        The mean loss, a 0-dim tensor on the device.
    """
    position = position or Position()
    first, pictures = position.batch, 0
    total = torch.zeros((), device=source.labels.device) + position.total
    # Networks that draw random numbers themselves: each minibatch has its own, whatever was trained before it.
    draws = int(rng.integers(2**62)) if any(isinstance(m, DRAWING) for m in network.modules()) else None
    for number, (x, *target) in enumerate(minibatches(source, recipe, rng, index)):
        pictures += len(x)
        if number < first:
            continue
        if tick:
            position.batch, position.total = number, total
            tick()
        with contextlib.nullcontext() if draws is None else draws_of(draws + number, x.device):
            loss = mixed_loss(network(x), *target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if masks:
            apply_masks(masks)
        total = total + loss.detach() * len(x)
    return total / pictures


@torch.no_grad()
def accuracy(network, source, batch_size=1024):
    """Return the accuracy of `network` on `source` in percent."""
    network.eval()
    right = torch.zeros((), dtype=torch.int64, device=source.labels.device)
    for start in range(0, len(source), batch_size):
        x, y = source.batch(slice(start, start + batch_size))
        right += (network(x).argmax(1) == y).sum()
    network.train()
    return 100 * right.item() / len(source)


def random_masks(network, ratio, rng):
    """Draw a random unstructured pruning of every convolution's weight.

    Args:
        ratio: share of the weights of each convolution to remove, 0 to 1.
        rng: numpy.random.Generator.

    Returns:
        {weight: 0/1 tensor of its shape}.
    """
    masks = {}
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            keep = np.ones(module.weight.numel(), dtype=np.float32)
            keep[rng.choice(len(keep), round(ratio * len(keep)), replace=False)] = 0
            masks[module.weight] = torch.from_numpy(keep).view_as(module.weight).to(module.weight)
    return masks


@torch.no_grad()
def apply_masks(masks):
    """Zero the masked weights in place."""
    for weight, mask in masks.items():
        weight.mul_(mask)


def record_trajectory(network, source, recipe, seed, keys, masks=None, each_epoch=None, checkpoint=None):
    """Train `network` on real pictures and return its parameters before and after every epoch.

    Args:
        As for `train`.

    Returns:
        List of recipe.epochs + 1 entries, each the list of parameter tensors (float32, CPU) in
        `network.parameters()` order.
    """
    if masks:
        apply_masks(masks)

    def snapshot():
        return [parameter.detach().cpu().clone() for parameter in network.parameters()]

    trajectory = [snapshot()]

    def after(epoch, loss):
        trajectory.append(snapshot())
        if each_epoch:
            each_epoch(epoch, loss)

    checkpoint = checkpoint or Checkpoint()
    with checkpoint.loop("trajectory", keys, lambda: {"trajectory": trajectory}) as saved:
        if saved:
            trajectory[:] = saved["trajectory"]
        train(network, source, recipe, seed, keys, masks=masks, each_epoch=after, checkpoint=checkpoint)
    return trajectory
