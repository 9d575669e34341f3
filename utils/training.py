"""Training networks on real or synthetic images: experts, transitions and evaluations of every base method."""

import contextlib
import copy
import dataclasses

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import networks
from networks.layers import draws_numbers, has_batch_statistics
from networks.precision import forward

from .augment import DSA, cutmix, imagenet_augment, random_windows
from .run import signals
from .run.device import to_device
from .run.streams import seeded, stream, torch_seeded


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a network is trained by SGD.

    Attributes:
        epochs: passes over the images.
        lr: learning rate.
        momentum, weight_decay: of SGD.
        batch_size: images of a minibatch; the last of an epoch may be smaller.
        dsa: DSA applied to every minibatch; None for none.
        lr_milestones: ((epoch, factor), …): after the epoch of that index (from 0) the learning rate is multiplied.
        window: pixels of the random windows shown of larger canvases (texture mode); None for whole images.
        samples: windows of each canvas.
        cutmix: (probability, beta) of CutMix for each minibatch; None for none.
        imagenet: ImageNet's augmentation of the pixels: `crop` or `no_crop` (see `imagenet_augment`); None for none.
        precision: see networks/precision.py. Accuracies are measured in full precision.
    """

    epochs: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 256
    dsa: DSA | None = None
    lr_milestones: tuple = ()
    window: int | None = None
    samples: int = 1
    cutmix: tuple | None = None
    imagenet: str | None = None
    precision: str = "fp32"

    def lr_at(self, epoch):
        """Return the learning rate of the epoch with index `epoch`."""
        lr = self.lr
        for milestone, factor in self.lr_milestones:
            if epoch > milestone:
                lr *= factor
        return lr


def new_network(spec, real, seed, *keys):
    """Return a network for the images of `real`, initialised from the stream `keys`, on their device.

    Args:
        spec: name of a network, or a dict of arguments of `networks.idc_network`.
    """
    shape = real.info.network_shape
    with seeded(seed, "network", *keys):
        network = (
            networks.idc_network(**shape, **spec) if isinstance(spec, dict) else networks.get_network(spec, **shape)
        )
    return network.to(real.train.images.device)


def sgd(network, config):
    """Return the SGD optimiser of `config`; hand it to several calls of `train` to carry its momentum on."""
    return torch.optim.SGD(
        network.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, foreach=True
    )


def train(network, images, config, seed, keys, optimizer=None, first_epoch=0, after_epoch=None):
    """Train `network` in place.

    Args:
        network: torch.nn.Module on the device of the images.
        images: `ImageDataset`.
        config: `TrainConfig`.
        seed: the run's seed.
        keys: tuple naming this training; its random numbers come from streams of this name.
        optimizer: of an earlier call, whose momentum goes on; None for a new one.
        first_epoch: index of the epoch to begin with.
        after_epoch: called with (epoch, mean loss 0-dim tensor).

    Returns:
        The optimiser.
    """
    optimizer = optimizer or sgd(network, config)
    network.train()
    for epoch in range(first_epoch, config.epochs):
        signals.stop_if_asked()
        set_hyperparameters(optimizer, config, epoch)
        loss = train_epoch(network, optimizer, images, config, stream(seed, *keys, epoch))
        if after_epoch:
            after_epoch(epoch, loss)
    return optimizer


def set_hyperparameters(optimizer, config, epoch):
    """Give an SGD optimiser the learning rate of an epoch, momentum and weight decay of `config`."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(epoch)
        group["momentum"], group["weight_decay"] = config.momentum, config.weight_decay


def train_epoch(network, optimizer, images, config, rng, index=None):
    """One pass over the images.

    Args:
        index: (n,) positions of the images of this pass, in order; None for all in random order.

    Returns:
        The mean loss, a 0-dim tensor on the device.
    """
    seen, total = 0, torch.zeros((), device=images.labels.device)
    # Layers that draw random numbers themselves get a seed for each minibatch.
    seeds = int(rng.integers(2**62)) if draws_numbers(network) else None
    for number, (x, *target) in enumerate(minibatches(images, config, rng, index)):
        with contextlib.nullcontext() if seeds is None else torch_seeded(seeds + number, x.device):
            loss = mixed_loss(forward(network, x, config.precision), *target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(x)
        total = total + loss.detach() * len(x)
    return total / seen


def minibatches(images, config, rng, index=None):
    """Draw one pass over the images: yields augmented images, labels, and CutMix's partners and share.

    Args:
        index: as for `train_epoch`.

    Yields:
        (x (B, C, H, W), y (B,), permutation of the partners or None, share of the own labels).
    """
    if index is None:
        index = to_device(rng.permutation(len(images)), images.labels.device)
    for start in range(0, len(index), config.batch_size):
        chosen = index[start : start + config.batch_size]
        if config.imagenet:
            pixels = imagenet_augment(images.pixels(chosen), rng, config.imagenet == "crop")
            x, y = images.normalise(pixels), images.labels[chosen]
        else:
            x, y = images.batch(chosen)
        if config.window:
            x, y = random_windows(x, rng, config.window, config.samples), torch.cat([y] * config.samples)
        if config.dsa:
            x = config.dsa.apply(x, config.dsa.draw(len(x), rng))
        partners, share = None, 1.0
        if config.cutmix:
            x, partners, share = cutmix(x, config.cutmix, rng)
        yield x, y, partners, share


def mixed_loss(logits, y, partners, share):
    """Return the cross-entropy (0-dim) of `logits` (B, classes) with labels shared as CutMix did."""
    loss = F.cross_entropy(logits, y)
    return loss if partners is None else share * loss + (1 - share) * F.cross_entropy(logits, y[partners])


def train_together(members, images, config, seed, keys, stacked=None):
    """Train several networks on the same images, each with its own random streams.

    The result does not depend on how many train together, but for rounding if they are stacked.

    Args:
        members: list of networks of one architecture, trained in place.
        keys: list of one tuple for each; other arguments as for `train`.
        stacked: train them as one batched network (torch.func), True or False; None does so on a GPU, where many
            small networks are no slower than one, if they have no running statistics.
    """
    if stacked is None:
        on_gpu = images.labels.device.type == "cuda"
        stacked = on_gpu and len(members) > 1 and not has_batch_statistics(members[0])
    if stacked:
        # Members are written only at its end; if memory runs out they train one by one.
        with contextlib.suppress(torch.OutOfMemoryError):
            _train_stacked(members, images, config, seed, keys)
            return
        torch.cuda.empty_cache()
    for member, key in zip(members, keys, strict=True):
        train(member, images, config, seed, key)


def _train_stacked(members, images, config, seed, keys):
    """Train `members` as one network whose parameters have one more axis."""
    parameters, _ = torch.func.stack_module_state(members)
    shared = copy.deepcopy(members[0]).to("meta")
    shared.fuses = False  # the hand-written derivatives of CPUs know no batched networks
    stack = torch.optim.SGD(parameters.values(), lr=config.lr)

    @torch.func.vmap
    def logits_of(values, x):
        return torch.func.functional_call(shared, values, (x,))

    for epoch in range(config.epochs):
        signals.stop_if_asked()
        set_hyperparameters(stack, config, epoch)
        streams = [stream(seed, *key, epoch) for key in keys]
        for batches in zip(*(minibatches(images, config, rng) for rng in streams), strict=True):
            x = torch.stack([batch[0] for batch in batches])
            logits = forward(lambda x: logits_of(parameters, x), x, config.precision)
            # Each network's gradient comes from its own loss: the sum keeps them apart.
            loss = sum(mixed_loss(logits[k], *batches[k][1:]) for k in range(len(members)))
            stack.zero_grad()
            loss.backward()
            stack.step()
    with torch.no_grad():
        for k, member in enumerate(members):
            for name, parameter in member.named_parameters():
                parameter.copy_(parameters[name][k])


def testing_batch(im_size):
    """Return how many images are tested at once: 1,024 of up to 64 pixels a side, of larger ones as many pixels."""
    return max(1, min(1024, 1024 * 64**2 // im_size**2))


@torch.no_grad()
def correct(network, images, batch_size=None):
    """Return which images of an `ImageDataset` `network` classifies right, (N,) bool on their device."""
    network.eval()
    found, batch_size = [], batch_size or testing_batch(images.images.shape[-1])
    for start in range(0, len(images), batch_size):
        x, y = images.batch(slice(start, start + batch_size))
        found.append(network(x).argmax(1) == y)
    network.train()
    return torch.cat(found)


def accuracy(network, images):
    """Return the accuracy of `network` on an `ImageDataset` in percent."""
    return 100 * correct(network, images).sum().item() / len(images)


def snapshot(network):
    """Return the parameters of `network` as a list of float32 tensors on the CPU: one entry of a trajectory."""
    return [parameter.detach().cpu().clone() for parameter in network.parameters()]


def state_on_cpu(network):
    """Return the state dict of `network` with its tensors on the CPU, as files hold it."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


@torch.no_grad()
def prune(network, ratio, rng):
    """Zero a random share of each convolution's weights, which then stay zero in every training.

    Args:
        ratio: share of the weights to remove, 0 to 1.
        rng: numpy.random.Generator.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            keep = np.ones(module.weight.numel(), dtype=np.float32)
            keep[rng.choice(len(keep), round(ratio * len(keep)), replace=False)] = 0
            mask = torch.from_numpy(keep).view_as(module.weight).to(module.weight)
            module.weight.mul_(mask)
            module.weight.register_hook(mask.mul)  # of its gradient
