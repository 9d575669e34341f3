"""Definitions written out literally, one image at a time, to compare with."""

import math

import torch
from torch.nn import functional as F


def augment_one(x, name, u, align_corners):
    """Augment one image x (C, H, W) with the uniform numbers u (3,), following the definition literally."""
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
