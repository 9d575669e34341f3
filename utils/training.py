"""Training networks on real or synthetic pictures: experts, transitions and evaluations of both methods."""

import dataclasses

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import networks
from utils.augment import DSA, cutmix, random_resized_crop, random_windows
from utils.files import Checkpoint
from utils.runtime import seeded, stream


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


def train_together(members, source, recipe, seed, keys, optimizers=None, checkpoint=None):
    """Train several networks on the same pictures, each with its own random streams.

    Args:
        members: list of networks, trained in place.
        keys: list of one tuple for each; other arguments as for `train`.
        optimizers: list of earlier optimisers, None for new ones.

    Returns:
        The list of optimisers.
    """
    optimizers = optimizers or [None] * len(members)
    done = []
    checkpoint = checkpoint or Checkpoint()

    def state():
        return {"networks": [m.state_dict() for m in members[: len(done)]], "done": [d.state_dict() for d in done]}

    with checkpoint.loop("members", keys, state) as saved:
        for k, (member, values) in enumerate(zip(members, saved["networks"] if saved else [], strict=False)):
            member.load_state_dict(values)
            done.append(optimizers[k] or optimizer_for(member, recipe))
            done[k].load_state_dict(saved["done"][k])
        for k in range(len(done), len(members)):
            done.append(train(members[k], source, recipe, seed, keys[k], optimizers[k], checkpoint=checkpoint))
    return done


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
    count = len(source) if index is None else len(index)
    order = torch.from_numpy(rng.permutation(count)).to(source.labels.device)
    if index is not None:
        order = index[order]
    position = position or Position()
    first = position.batch
    total = torch.zeros((), device=order.device) + position.total
    for number, start in enumerate(range(0, count, recipe.batch_size)):
        if number >= first and tick:
            position.batch, position.total = number, total
            tick()
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
        if number < first:
            continue
        logits = network(x)
        loss = F.cross_entropy(logits, y)
        if other is not None:
            loss = share * loss + (1 - share) * F.cross_entropy(logits, y[other])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if masks:
            apply_masks(masks)
        total = total + loss.detach() * min(recipe.batch_size, count - start)
    return total / count


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
