"""Definitions written out literally, one image at a time, to compare with."""

import math

import scipy.ndimage
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
    if name == "translate":  # up to the crop's reach, in half-widths
        right, down = ((value - 0.5) * 2 * 0.125 * 2 for value in u[:2])
        theta = torch.tensor([[1, 0, right], [0, 1, down]], dtype=x.dtype)
    elif name == "scale":
        factors = [1 / 1.2 + value * (1.2 - 1 / 1.2) for value in u[:2]]
        theta = torch.tensor([[factors[0], 0, 0], [0, factors[1], 0]], dtype=x.dtype)
    else:
        angle = (u[0] - 0.5) * 2 * 15 * math.pi / 180
        theta = torch.tensor(
            [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]], dtype=x.dtype
        )
    grid = F.affine_grid(theta[None], (1, channels, height, width), align_corners=align_corners)
    return F.grid_sample(x[None], grid, padding_mode="zeros", align_corners=align_corners)[0]


def dc_augment_one(x, u, mean):
    """DC's augmentation of one image x (C, H, H), as its authors' code does it; `mean` (C,) is of the whole batch."""
    size = x.shape[1]
    if u[0] < 1 / 3:
        padded = mean[:, None, None].expand(-1, size + 8, size + 8).clone()
        padded[:, 4 : 4 + size, 4 : 4 + size] = x
        top, left = int(u[1] * 8), int(u[2] * 8)
        return padded[:, top : top + size, left : left + size]
    if u[0] < 2 / 3:
        height, width = (int((0.8 + 0.4 * float(value)) * size) for value in u[1:])
        shrunk = F.interpolate(x[None], (height, width))[0]
        whole = max(height, width, size)
        canvas = torch.zeros(x.shape[0], whole, whole, dtype=x.dtype)
        top, left = (whole - height) // 2, (whole - width) // 2
        canvas[:, top : top + height, left : left + width] = shrunk
        at = (whole - size) // 2
        return canvas[:, at : at + size, at : at + size]
    angle = int(u[1] * 90) - 45
    turned = scipy.ndimage.rotate(x.numpy(), angle, axes=(-2, -1), cval=float(mean.mean()))
    top, left = ((side - size) // 2 for side in turned.shape[1:])
    return torch.from_numpy(turned[:, top : top + size, left : left + size])
