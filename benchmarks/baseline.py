"""The published way, written plainly from its description: what the benchmarks compare with and the tests rely on."""

import math

import torch
from torch.nn import functional as F

from networks.reparam import ReparamModule


def unfused(network):
    """Return `network` (in place) with the blocks of a ConvNet as separate layers."""
    if hasattr(network, "fuses"):
        network.fuses = False
    return network


def augment(x, name, align_corners=True):
    """One entry of DSA on a batch (B, C, H, W), its numbers drawn from torch's generator, as published.

    Affine matrices are put together in a loop over the images.
    """
    count, _, height, width = x.shape
    if name == "color":
        x = x + (torch.rand(count, 1, 1, 1, device=x.device) - 0.5)
        mean = x.mean(dim=1, keepdim=True)
        x = (x - mean) * (torch.rand(count, 1, 1, 1, device=x.device) * 2) + mean
        mean = x.mean(dim=[1, 2, 3], keepdim=True)
        return (x - mean) * (torch.rand(count, 1, 1, 1, device=x.device) + 0.5) + mean
    if name == "flip":
        return torch.where(torch.rand(count, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    if name == "crop":
        reach = [int(side * 0.125 + 0.5) for side in (height, width)]
        down, right = (torch.randint(-r, r + 1, [count, 1, 1], device=x.device) for r in reach)
        batch, rows, columns = torch.meshgrid(
            *(torch.arange(n, device=x.device) for n in (count, height, width)), indexing="ij"
        )
        rows = torch.clamp(rows + down + 1, 0, height + 1)
        columns = torch.clamp(columns + right + 1, 0, width + 1)
        padded = F.pad(x, [1, 1, 1, 1])
        return padded.permute(0, 2, 3, 1).contiguous()[batch, rows, columns].permute(0, 3, 1, 2)
    if name == "cutout":
        sides = [int(side * 0.5 + 0.5) for side in (height, width)]
        tops = torch.randint(0, height + (1 - sides[0] % 2), [count, 1, 1], device=x.device)
        lefts = torch.randint(0, width + (1 - sides[1] % 2), [count, 1, 1], device=x.device)
        batch, rows, columns = torch.meshgrid(
            *(torch.arange(n, device=x.device) for n in (count, *sides)), indexing="ij"
        )
        rows = torch.clamp(rows + tops - sides[0] // 2, 0, height - 1)
        columns = torch.clamp(columns + lefts - sides[1] // 2, 0, width - 1)
        mask = torch.ones(count, height, width, dtype=x.dtype, device=x.device)
        mask[batch, rows, columns] = 0
        return x * mask.unsqueeze(1)
    if name == "scale":
        sx, sy = (torch.rand(count) * (1.2 - 1 / 1.2) + 1 / 1.2 for _ in range(2))
        theta = [[[sx[i], 0, 0], [0, sy[i], 0]] for i in range(count)]
    else:
        angle = (torch.rand(count) - 0.5) * 2 * 15 / 180 * math.pi
        theta = [[[torch.cos(a), torch.sin(-a), 0], [torch.sin(a), torch.cos(a), 0]] for a in angle]
    theta = torch.tensor(theta, dtype=torch.float, device=x.device)
    grid = F.affine_grid(theta, x.shape, align_corners=align_corners)
    return F.grid_sample(x, grid, align_corners=align_corners)


def match_unrolled(network, start, target, syn_lr, images, labels, steps, apply=None):
    """The published matching iteration: every step's graph is kept, one backward pass through all of them.

    Args:
        steps: list of (indices into images, augmentation or None).
        apply: function of images and augmentation.

    Returns:
        (loss, gradient of images, gradient of syn_lr).
    """
    student = ReparamModule(network)
    images = images.clone().requires_grad_()
    syn_lr = syn_lr.clone().requires_grad_()
    theta = start.clone().requires_grad_()
    for index, draw in steps:
        x = images[index]
        if draw is not None:
            x = apply(x, draw)
        loss = F.cross_entropy(student(theta, x), labels[index])
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - syn_lr * gradient
    loss = (theta - target).square().sum() / (start - target).square().sum()
    loss.backward()
    return loss.detach(), images.grad, syn_lr.grad


def train_epoch(network, optimizer, dataset, batch_size, strategy):
    """One epoch through a DataLoader over a TensorDataset, DSA on every batch, as published."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=0)
    device = next(network.parameters()).device
    for x, y in loader:
        x, y = x.float().to(device), y.long().to(device)
        x = augment(x, strategy[int(torch.randint(len(strategy), (1,)))])
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def idc_sweeps(network, images, earlier, batches, lr, momentum, factor, apply, normalise, metric, bias, fc):
    """The published sweep: class by class, each class's gradient followed by one step of SGD on ALL images.

    Args:
        images: (K, n, C, H, W), changed in place.
        earlier: (K, n, stages, C, H, W) frozen images or None.
        batches: for each sweep and class (real images in [0, 1], augmentation).
        apply: function of images and augmentation.

    Returns:
        The loss of every class of every sweep.
    """
    from utils.multi_formation import decode

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
            both = apply(both, draw)
            x_real, x_syn = both[: len(real)].detach(), both[len(real) :]

            def gradient(x, keep, label=label):
                loss = F.cross_entropy(network(x), torch.full((len(x),), label, device=x.device))
                return torch.autograd.grad(loss, parameters, create_graph=keep)

            loss = 0
            for g_real, g_syn in zip(gradient(x_real, False), gradient(x_syn, True), strict=True):
                if (g_real.dim() == 1 and not bias) or (g_real.dim() == 2 and not fc):
                    continue
                difference = g_real.detach() - g_syn
                loss = loss + (difference.square() if metric == "mse" else difference.abs()).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    images.requires_grad_(False)
    return losses
