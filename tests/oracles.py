"""The published ways, written plainly: one picture at a time, every graph kept. The tests compare with these."""

import math

import torch
from torch.nn import functional as F

from utils.reparam import FlatNetwork


def augment_one(x, name, u, align_corners):
    """Augment one picture x (C, H, W) with the uniform numbers u (3,), following the definition literally."""
    channels, height, width = x.shape
    u = [float(value) for value in u]
    if name == "color":
        x = x + (u[0] - 0.5)
        mean = x.mean(0, keepdim=True)
        x = (x - mean) * (2 * u[1]) + mean
        mean = x.mean()
        return (x - mean) * (u[2] + 0.5) + mean
    if name == "flip":
        return x.flip(2) if u[0] < 0.5 else x
    if name in ("crop", "cutout"):
        out = torch.zeros_like(x) if name == "crop" else x.clone()
        if name == "crop":
            reach = [int(height * 0.125 + 0.5), int(width * 0.125 + 0.5)]
            down = int(u[0] * (2 * reach[0] + 1)) - reach[0]
            right = int(u[1] * (2 * reach[1] + 1)) - reach[1]
        else:
            side = [int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)]
            top = int(u[0] * (height + 1 - side[0] % 2)) - side[0] // 2
            left = int(u[1] * (width + 1 - side[1] % 2)) - side[1] // 2
        for row in range(height):
            for column in range(width):
                if name == "crop":
                    if 0 <= row + down < height and 0 <= column + right < width:
                        out[:, row, column] = x[:, row + down, column + right]
                elif top <= row < top + side[0] and left <= column < left + side[1]:
                    out[:, row, column] = 0
        return out
    if name == "scale":
        factors = [1 / 1.2 + value * (1.2 - 1 / 1.2) for value in u[:2]]
        theta = torch.tensor([[factors[0], 0, 0], [0, factors[1], 0]], dtype=x.dtype)
    else:
        angle = (u[0] - 0.5) * 2 * 15 * math.pi / 180
        theta = torch.tensor(
            [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]], dtype=x.dtype
        )
    grid = F.affine_grid(theta[None], (1, channels, height, width), align_corners=align_corners)
    return F.grid_sample(x[None], grid, padding_mode="zeros", align_corners=align_corners)[0]


def match_unrolled(network, start, target, syn_lr, images, labels, steps, dsa=None):
    """The published matching iteration: every step's graph is kept, one backward pass through all of them.

    Args:
        steps: list of (indices into images, draw or None).

    Returns:
        (loss, gradient of images, gradient of syn_lr).
    """
    student = FlatNetwork(network)
    images = images.clone().requires_grad_()
    syn_lr = syn_lr.clone().requires_grad_()
    theta = start.clone().requires_grad_()
    for index, draw in steps:
        x = images[index]
        if draw is not None:
            x = dsa.apply(x, draw)
        loss = F.cross_entropy(student(theta, x), labels[index])
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - syn_lr * gradient
    loss = (theta - target).square().sum() / (start - target).square().sum()
    loss.backward()
    return loss.detach(), images.grad, syn_lr.grad


def idc_sweeps_sequential(network, images, earlier, batches, lr, momentum, factor, dsa, normalise, metric, bias, fc):
    """The published sweep: class by class, each class's gradient followed by one step of SGD on ALL images.

    Args:
        images: (K, n, C, H, W), changed in place.
        earlier: (K, n, stages, C, H, W) frozen images or None.
        batches: for each sweep and class (real pictures in [0, 1], DSA draw).
    """
    from utils.formation import decode

    optimizer = torch.optim.SGD([images], lr=lr, momentum=momentum)
    parameters = list(network.parameters())
    losses = []
    for sweep in batches:
        for label, (real, draw) in enumerate(sweep):
            images.requires_grad_()
            block = images[label]
            if earlier is not None:
                block = torch.cat([earlier[label], block[:, None]], dim=1).flatten(0, 1)
            both = torch.cat([normalise(real), normalise(decode(block, factor))])
            both = dsa.apply(both, draw)
            x_real, x_syn = both[: len(real)].detach(), both[len(real) :]

            def gradient(x, keep, label=label):
                loss = F.cross_entropy(network(x), torch.full((len(x),), label))
                return torch.autograd.grad(loss, parameters, create_graph=keep)

            loss = 0
            for g_real, g_syn in zip(gradient(x_real, False), gradient(x_syn, True), strict=True):
                if (g_real.dim() == 1 and not bias) or (g_real.dim() == 2 and not fc):
                    continue
                if metric == "mse":
                    loss = loss + ((g_real - g_syn) ** 2).sum()
                elif metric == "l1":
                    loss = loss + (g_real - g_syn).abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    images.requires_grad_(False)
    return losses
