"""Matching distributions of features class by class: PDD+DM.

For each class, f are the L2-normalised features of real or decoded synthetic images (the input of the network's last
linear layer), all augmented by one DSA draw. The classes' losses are added. `mean` is the distance of distribution
matching (DM, Zhao & Bilen, WACV 2023),

    ‖E f_real − E f_syn‖²;

`cf` that of neural characteristic functions (Wang et al., CVPR 2025): with Φ(t) = E exp(i t·f), the mean over random
frequencies t ~ N(0, I) of

    √(α (|Φ_r| − |Φ_s|)² + (1 − α) · 2 (|Φ_r||Φ_s| − Re Φ_r Φ̄_s)),

the amplitude's and the phase's part of |Φ_r − Φ_s|².
"""

import dataclasses

import numpy as np
import torch
from torch.nn import functional as F

from networks.layers import has_batch_statistics
from networks.precision import forward

from . import multi_formation
from .augment import DSA
from .run import distributed
from .run.device import to_device
from .run.streams import EndlessShuffle, stream

METRICS = ("mean", "cf")
TINY = 1e-12  # under roots: their gradients stay finite at 0


def mean_distances(real, synthetic):
    """Return ‖E f_real − E f_syn‖² of each class (K,); features are (K, B, F) and (K, B', F)."""
    return (real.mean(1) - synthetic.mean(1)).square().sum(1)


def cf_distances(real, synthetic, frequencies, alpha):
    """Return the distance of the characteristic functions of each class (K,); `frequencies` are (T, F)."""
    angles = (features @ frequencies.T for features in (real, synthetic))
    (a, b), (c, d) = ((t.cos().mean(1), t.sin().mean(1)) for t in angles)  # real and imaginary part of Φ
    r, s = (a.square() + b.square() + TINY).sqrt(), (c.square() + d.square() + TINY).sqrt()
    squares = alpha * (r - s).square() + (1 - alpha) * 2 * (r * s - a * c - b * d)
    return (squares.clamp_min(0) + TINY).sqrt().mean(1)


def features_of(network, x, precision="fp32"):
    """Return the normalised features (B, F) of network input x (B, C, H, W)."""
    found = []
    with last_linear(network).register_forward_pre_hook(lambda _layer, inputs: found.append(inputs[0])):
        forward(network, x, precision)
    return F.normalize(found[0].to(x.dtype))


def last_linear(network):
    """Return the linear layer that makes a network's logits."""
    return [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]


@dataclasses.dataclass(frozen=True)
class FeatureMatchConfig:
    """How PDD+DM matches.

    Attributes:
        augment: one draw an iteration for all real and synthetic images.
        factor, decode_type: of multi-formation; precision: see networks/precision.py.
        batch_real: real images of each class in one iteration.
        metric: `mean` or `cf`.
        cf_alpha, frequencies: weight of the amplitudes and number of frequencies of `cf`.
        calibration: weight of the mean cross-entropy of the synthetic images under a finished expert.
        pass_pixels: of the images that go through the network together, about.
    """

    augment: DSA
    factor: int = 1
    decode_type: str = "single"
    batch_real: int = 64
    metric: str = "mean"
    cf_alpha: float = 0.5
    frequencies: int = 1024
    precision: str = "fp32"
    calibration: float = 0.0
    pass_pixels: int = 1280 * 32**2


class FeatureMatcher:
    """Matches the union's features with those of real images, all classes in one pass if they are few.

    Args: `RealData`, `SyntheticSet` of pixels in [0, 1], `FeatureMatchConfig`; of the random streams the seed and the
        stage from 0.
    """

    def __init__(self, real, synthetic, config, seed=0, stage=0):
        self.real, self.synthetic, self.config, self.seed, self.stage = real, synthetic, config, seed, stage
        self.batch_real = min(config.batch_real, real.smallest_class)
        self.shuffles = [
            EndlessShuffle(indices, seed, "class", stage, label) for label, indices in enumerate(real.class_indices)
        ]

    def backward(self, network, iteration, finished=None):
        """Give the newest subset its gradient, the same on every rank; returns the loss (0-dim).

        Args:
            network: torch.nn.Module that the features are of.
            iteration: of this stage, from 0.
            finished: torch.nn.Module whose cross-entropy calibrates; not needed without calibration.
        """
        config, classes = self.config, self.real.info.num_classes
        rng = stream(self.seed, "features", self.stage, iteration)
        augmentation, shape = config.augment.draw(1, rng), (config.frequencies, last_linear(network).in_features)
        frequencies = rng.standard_normal(shape, dtype=np.float32) if config.metric == "cf" else None
        learned = self.synthetic.learned.detach().requires_grad_()
        loss, gradient = learned.new_zeros(()), torch.zeros_like(learned)
        own = list(distributed.share(range(classes), spread=not has_batch_statistics(network)))
        pixels = (self.batch_real + len(self.synthetic) // classes * config.factor**2) * learned.shape[-1] ** 2
        together = max(1, config.pass_pixels // pixels)  # classes
        for labels in (own[first : first + together] for first in range(0, len(own), together)):
            part = self._loss(network, finished, learned, labels, iteration, augmentation, frequencies)
            gradient += torch.autograd.grad(part, learned)[0]
            loss += part.detach()
        self.synthetic.learned.grad = distributed.all_reduce_sum(gradient)
        return distributed.all_reduce_sum(loss)

    def _loss(self, network, finished, learned, labels, iteration, augmentation, frequencies):
        """Return the loss of the classes `labels` (0-dim), differentiable in `learned`."""
        config, train, device = self.config, self.real.train, learned.device
        index = np.concatenate([self.shuffles[label].batch(iteration, self.batch_real) for label in labels])
        with torch.no_grad():
            x = config.augment.apply(train.batch(to_device(index, device))[0], augmentation)
            real = features_of(network, x, config.precision).unflatten(0, (len(labels), -1))
        frozen, classes = self.synthetic.images[: self.synthetic.first_learned], self.real.info.num_classes
        shape = -1, classes, len(learned) // classes, *learned.shape[1:]  # stages, classes, images
        union = torch.cat([part.view(shape)[:, labels] for part in (frozen, learned)])
        blocks = union.permute(1, 2, 0, 3, 4, 5).flatten(1, 2)  # as SyntheticSet.by_class
        decoded, _ = multi_formation.decode_union(blocks, config.factor, config.decode_type)
        x = config.augment.apply(train.normalise(decoded), augmentation)
        synthetic = features_of(network, x, config.precision).unflatten(0, (len(labels), -1))
        if config.metric == "mean":
            loss = mean_distances(real, synthetic).sum()
        else:
            directions = to_device(frequencies, device).to(real.dtype)
            loss = cf_distances(real, synthetic, directions, config.cf_alpha).sum()
        if config.calibration:
            targets = torch.tensor(labels, device=device).repeat_interleave(synthetic.shape[1])
            wrong = F.cross_entropy(forward(finished, x, config.precision), targets, reduction="sum")
            loss = loss + config.calibration * wrong / (classes * synthetic.shape[1])
        return loss
