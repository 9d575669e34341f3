"""Matching gradients or features class by class (DC, Zhao et al., ICLR 2021; IDC, Kim et al., ICML 2022).

IDC visits the classes of a sweep one by one: match class c, make one step of SGD on the images, go on to class c + 1.
A class's gradient touches its own images only; the steps of the other classes move them by momentum alone, which
has a closed form. With K classes, momentum m, learning rate η, momentum buffer v and image x before the sweep, class c
sees

    x_c = x − η (m + m² + … + m^c) v,

its own step gives v ← m^{c+1} v + g_c and x ← x_c − η v, and the K − 1 − c steps after it move x and v alike. So all
classes of a sweep are matched together, and the result is that of the loop.
"""

import contextlib
import dataclasses

import torch
from torch.nn import functional as F

from networks.layers import draws_numbers
from networks.precision import forward

from . import multi_formation
from .augment import DSA
from .run import distributed
from .run.device import to_device
from .run.streams import EndlessShuffle, stream, torch_seeded

METRICS = ("mse", "l1", "l1_mean", "l2", "cos")


def distance(real, synthetic, metric):
    """Return the distance of two tensors of equal shape (0-dim); the first axis is the output channel of weights.

    Args:
        metric: `mse` the sum of squares, `l1` the sum of absolute values, `l1_mean` the mean absolute value of each
            output channel summed over channels, `l2` the Euclidean norm, `cos` one minus the cosine of each output
            channel summed over channels.
    """
    if metric == "mse":
        return (real - synthetic).square().sum()
    if metric == "l1":
        return (real - synthetic).abs().sum()
    if metric == "l2":
        return (real - synthetic).square().sum().clamp_min(1e-30).sqrt()
    real, synthetic = real.reshape(len(real), -1), synthetic.reshape(len(synthetic), -1)
    if metric == "l1_mean":
        return (real - synthetic).abs().mean(1).sum()
    if metric == "cos":
        product = (real * synthetic).sum(1)
        return (1 - product / (real.norm(dim=1) * synthetic.norm(dim=1) + 1e-6)).sum()
    raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")


def matched_parameters(network, bias, fc):
    """Return the parameters whose gradients are compared: weights of convolutions; with `bias` also biases and
    normalisations, with `fc` also weights of linear layers."""
    return [p for p in network.parameters() if p.dim() > 2 or (p.dim() == 1 and bias) or (p.dim() == 2 and fc)]


def matching_loss(network, real, synthetic, label, config):
    """Return the matching loss of one class (0-dim), differentiable in `synthetic`.

    Args:
        network: torch.nn.Module.
        real, synthetic: (B, C, H, W) and (B', C, H, W) network input, normalised and augmented.
        label: the class, an int.
        config: `GradientMatchConfig`.
    """

    def features(x):
        maps = forward(network.blocks, x, config.precision)
        first, last = (min(index, len(maps) - 1) for index in config.f_idx)
        return [block.mean(0) for block in maps[first : last + 1]]

    def gradient(x, create_graph):
        targets = torch.full((len(x),), label, dtype=torch.int64, device=x.device)
        loss = F.cross_entropy(forward(network, x, config.precision), targets)
        parameters = matched_parameters(network, config.bias, config.fc)
        return torch.autograd.grad(loss, parameters, create_graph=create_graph)

    if config.match == "feat":
        with torch.no_grad():
            wanted = features(real)
        found = features(synthetic)
    else:
        wanted, found = gradient(real, False), gradient(synthetic, True)
    return sum(distance(w, f, config.metric) for w, f in zip(wanted, found, strict=True))


def feature_range(f_idx):
    """Return the option --f_idx, a number or the string `a,b`, as (first, last) block.

    Raises:
        ValueError: it is something else.
    """
    first, comma, last = str(f_idx).partition(",")
    first, last = int(first), int(last if comma else first)
    if not 0 <= first <= last:
        raise ValueError(f_idx)
    return first, last


def class_sweep(images, momentum_buffer, lr, momentum, gradients_of):
    """One sweep over the classes, all matched together; in place, with the result of the published loop.

    Args:
        images: (K, n, C, H, W) the learned images of K classes.
        momentum_buffer: of SGD, the same shape.
        lr, momentum: of SGD.
        gradients_of: function of (K, n, C, H, W), the images as each class's turn finds them, returning (losses (K,),
            gradients of the same shape), both detached.

    Returns:
        The sum of the losses (0-dim).
    """
    classes = len(images)
    turns = range(classes)
    # How far so many steps without a gradient carry, in units of η v: m + m² + …
    ahead = [sum(momentum**power for power in range(1, steps + 1)) for steps in turns]

    def per_class(values):
        return torch.tensor(values, dtype=images.dtype).to(images.device, non_blocking=True).view(-1, 1, 1, 1, 1)

    images -= lr * per_class(ahead) * momentum_buffer
    losses, gradients = gradients_of(images)
    momentum_buffer.mul_(per_class([momentum ** (c + 1) for c in turns])).add_(gradients)
    images -= lr * per_class([1 + ahead[classes - 1 - c] for c in turns]) * momentum_buffer
    momentum_buffer.mul_(per_class([momentum ** (classes - 1 - c) for c in turns]))
    return losses.sum()


@dataclasses.dataclass(frozen=True)
class GradientMatchConfig:
    """How PDD+IDC matches.

    Attributes:
        lr, momentum: of SGD on the images.
        augment: one draw for the real and the synthetic batch of a class.
        factor, decode_type: of multi-formation.
        batch_real: real images of a class in one match.
        batch_syn_max: decoded images of a class in one match, at most; more are cut at random.
        match: `grad` compares gradients of the cross-entropy, `feat` mean features.
        metric: see `distance`.
        bias, fc: which gradients count besides those of convolutions.
        f_idx: (first, last) of the blocks whose features count, from 0; the network's last one if it has fewer.
        precision: see networks/precision.py.
    """

    lr: float
    augment: DSA
    momentum: float = 0.5
    factor: int = 1
    decode_type: str = "single"
    batch_real: int = 64
    batch_syn_max: int = 128
    match: str = "grad"
    metric: str = "l1"
    bias: bool = False
    fc: bool = False
    f_idx: tuple = (4, 4)
    precision: str = "fp32"


class GradientMatcher:
    """Matches each class's union with real images; only the newest subset is updated.

    Args:
        real: `RealData`.
        synthetic: `SyntheticSet` of pixels in [0, 1]; its newest subset is changed in place.
        config: `GradientMatchConfig`.
        seed, stage: of the random streams; stage from 0.
    """

    def __init__(self, real, synthetic, config, seed=0, stage=0):
        self.real, self.synthetic, self.config = real, synthetic, config
        self.seed, self.stage = seed, stage
        self.shuffles = [
            EndlessShuffle(indices, seed, "class", stage, label) for label, indices in enumerate(real.class_indices)
        ]
        shape = synthetic.images.shape[1:]
        self.learned = synthetic.learned.view(real.info.num_classes, -1, *shape)
        self.momentum_buffer = torch.zeros_like(self.learned)

    def sweep(self, network, number):
        """Match every class once with `network`; returns the sum of the losses (0-dim).

        Args:
            number: of this sweep in its stage, from 0.
        """
        return class_sweep(
            self.learned,
            self.momentum_buffer,
            self.config.lr,
            self.config.momentum,
            lambda images: self._gradients(network, images, number),
        )

    def _gradients(self, network, images, number):
        """Return losses (K,) and gradients of `images` (K, n, C, H, W), each class with its own real batch.

        The classes are spread over the ranks, and every rank has all results.
        """
        classes = self.real.info.num_classes
        rng = stream(self.seed, "sweep", self.stage, number)
        draws = [self._draw(label, number, rng) for label in range(classes)]
        # With spectral normalisation a forward pass moves what the next class starts from.
        sequential = any(torch.nn.utils.parametrize.is_parametrized(module) for module in network.modules())
        own, blocks = distributed.share(range(classes), spread=not sequential), self.synthetic.by_class(classes)
        losses, gradients = images.new_zeros(classes), torch.zeros_like(images)
        drawing = draws_numbers(network)
        for label in own:
            seed = int(stream(self.seed, "dropout", self.stage, number, label).integers(2**63))
            with torch_seeded(seed, images.device) if drawing else contextlib.nullcontext():
                losses[label], gradients[label] = self._match_class(network, label, blocks[label], *draws[label])
        return distributed.all_reduce_sum(losses), distributed.all_reduce_sum(gradients)

    def _draw(self, label, number, rng):
        """Draw how a class is matched: its real images, the cut of its decoded ones (None: all), the augmentation."""
        config = self.config
        index = self.shuffles[label].batch(number, min(config.batch_real, len(self.real.class_indices[label])))
        images = len(self.synthetic) // self.real.info.num_classes
        pieces = multi_formation.decode_plan(images, config.factor, config.decode_type, config.batch_syn_max)
        decoded = sum((last - first) * factor**2 for first, last, factor in pieces)
        cut = rng.permutation(decoded)[: config.batch_syn_max] if decoded > config.batch_syn_max else None
        return index, cut, config.augment.draw(1, rng)

    def _match_class(self, network, label, block, index, cut, augmentation):
        """Return (loss 0-dim, gradient (n, C, H, W) of the newest images of the class's `block` of the union)."""
        config, device = self.config, self.learned.device
        block = block.detach().requires_grad_()
        decoded = multi_formation.decode_class(block, config.factor, config.decode_type, config.batch_syn_max)
        if cut is not None:
            decoded = decoded[to_device(cut, device)]
        real = self.real.train.pixels(to_device(index, device))
        both = config.augment.apply(self.real.train.normalise(torch.cat([real, decoded])), augmentation)
        loss = matching_loss(network, both[: len(real)].detach(), both[len(real) :], label, config)
        (gradient,) = torch.autograd.grad(loss, block)
        stages = len(self.synthetic.counts)
        return loss.detach(), gradient.view(-1, stages, *gradient.shape[1:])[:, -1]
