"""Matching gradients or features class by class (DC, Zhao et al., ICLR 2021; IDC, Kim et al., ICML 2022).

IDC visits the classes of a sweep one by one: match class c, make one step of SGD on the images, go on to class c + 1.
A class's gradient touches its own images only; the steps of the other classes move them by momentum alone, which
has a closed form. With K classes, decay m, learning rate η, velocity v and image x before the sweep, class c sees

    x_c = x − η (m + m² + … + m^c) v,

its own step gives v ← m^{c+1} v + g_c and x ← x_c − η v, and the K − 1 − c steps after it move x and v alike. So all
classes of a sweep are matched together, and the result is that of the loop.
"""

import torch
from torch.nn import functional as F

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


def matching_loss(network, real, synthetic, label, match, metric, bias=False, fc=False, f_idx=4):
    """Return the matching loss of one class (0-dim), differentiable in `synthetic`.

    Args:
        network: torch.nn.Module.
        real, synthetic: (B, C, H, W) and (B', C, H, W) network input, normalised and augmented.
        label: the class, an int.
        match: `grad` compares gradients of the cross-entropy, `feat` mean features.
        metric: see `distance`.
        bias, fc: which gradients count besides those of convolutions.
        f_idx: block whose features count, from 0; the last one where the network has fewer.
    """
    if match == "feat":
        with torch.no_grad():
            wanted = _features(network, real, f_idx).mean(0)
        return distance(wanted, _features(network, synthetic, f_idx).mean(0), metric)
    parameters = matched_parameters(network, bias, fc)

    def gradient(x, create_graph):
        targets = torch.full((len(x),), label, dtype=torch.int64, device=x.device)
        return torch.autograd.grad(F.cross_entropy(network(x), targets), parameters, create_graph=create_graph)

    wanted = gradient(real, False)
    found = gradient(synthetic, True)
    return sum(distance(w, f, metric) for w, f in zip(wanted, found, strict=True))


def _features(network, x, f_idx):
    maps = network.blocks(x)
    return maps[min(f_idx, len(maps) - 1)]


def momentum_ahead(momentum, steps):
    """Return m + m² + … + m^steps: how far `steps` steps without a gradient carry, in units of η v."""
    return sum(momentum**power for power in range(1, steps + 1))


def sweep(images, velocity, lr, momentum, gradients_of):
    """One sweep over the classes, all matched together; in place, with the result of the published loop.

    Args:
        images: (K, n, C, H, W) the learned images of K classes.
        velocity: the same shape, the momentum buffer of SGD.
        lr, momentum: of SGD.
        gradients_of: function of (K, n, C, H, W), the images as each class's turn finds them, returning (losses (K,),
            gradients of the same shape), both detached.

    Returns:
        The sum of the losses (0-dim).
    """
    classes = len(images)
    ahead = [momentum_ahead(momentum, steps) for steps in range(classes)]

    def per_class(values):
        return torch.tensor(values, dtype=images.dtype).to(images.device, non_blocking=True).view(-1, 1, 1, 1, 1)

    turns = range(classes)
    images -= lr * per_class(ahead) * velocity
    losses, gradients = gradients_of(images)
    velocity.mul_(per_class([momentum ** (c + 1) for c in turns])).add_(gradients)
    images -= lr * per_class([1 + ahead[classes - 1 - c] for c in turns]) * velocity
    velocity.mul_(per_class([momentum ** (classes - 1 - c) for c in turns]))
    return losses.sum()
