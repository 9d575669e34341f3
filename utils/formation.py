"""Multi-formation (IDC, Kim et al., ICML 2022): several small pictures packed into one synthetic image.

A synthetic image is a factor × factor grid; decoding cuts it up and enlarges each part to the full size. Pixels are
in [0, 1] here; networks see them normalised.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

PADDING = 0.5  # grey around sizes that the factor does not divide
BOUND = 128  # decoded images of a class in decode_type bound, where nothing else is said (IDC)


def decode(images, factor):
    """Decode images of one formation.

    Args:
        images: (N, C, H, H) in [0, 1].
        factor: parts on each side; H not divisible by it is padded with grey on the right and below.

    Returns:
        (factor² · N, C, H, H): part (0, 0) of all images, then part (0, 1), …
    """
    if factor == 1:
        return images
    size = images.shape[-1]
    missing = -size % factor
    if missing:
        images = F.pad(images, (0, missing, 0, missing), value=PADDING)
    part = math.ceil(size / factor)
    parts = [
        images[:, :, row * part : (row + 1) * part, column * part : (column + 1) * part]
        for row in range(factor)
        for column in range(factor)
    ]
    return F.interpolate(torch.cat(parts), size=(size, size), mode="bilinear", align_corners=False)


def plan(count, factor, kind, bound=BOUND):
    """Return how `count` images of a class are decoded: a list of (first, last, factor).

    Args:
        kind: `single` decodes all by `factor`; `multi` by 1, 2, …, factor together; `bound` takes the largest factors
            first, as far as `bound` decoded images in all leave room for one of each image that is left.
    """
    if kind == "single":
        return [(0, count, factor)]
    if kind == "multi":
        return [(0, count, f) for f in range(1, factor + 1)]
    pieces, first, made = [], 0, 0
    for f in range(factor, 0, -1):
        left = count - first
        if not left:
            break
        room = bound - made - left
        taken = left if f == 1 else max(0, min(left, room // (f * f)))
        if taken:
            pieces.append((first, first + taken, f))
            first += taken
            made += taken * f * f
    return pieces


def decode_class(images, factor, kind, bound=BOUND):
    """Decode the images (N, C, H, H) of one class; returns (M, C, H, H)."""
    return torch.cat([decode(images[first:last], f) for first, last, f in plan(len(images), factor, kind, bound)])


def decode_union(images, num_classes, factor, kind):
    """Decode a class-major union.

    Args:
        images: (num_classes · n, C, H, H), class after class.

    Returns:
        (decoded images, their labels).
    """
    per_class = len(images) // num_classes
    decoded = [decode_class(images[c * per_class : (c + 1) * per_class], factor, kind) for c in range(num_classes)]
    labels = torch.arange(num_classes, device=images.device).repeat_interleave(len(decoded[0]))
    return torch.cat(decoded), labels


def origins(count, factor, kind, bound=BOUND):
    """Return for each decoded image of a class which of its `count` images it is a part of, (M,) int64."""
    pieces = plan(count, factor, kind, bound)
    return torch.cat([torch.arange(first, last).repeat(f * f) for first, last, f in pieces])


def new_images(real, ipc, init, factor, rng):
    """Draw the images that a stage starts from.

    Args:
        real: `RealData`.
        ipc: images of each class.
        init: `random` takes real pictures, `mix` packs factor × factor smaller real pictures into each image, `noise`
            draws clamp(N(0, 1) / 4 + 1/2).
        factor: of the formation.
        rng: numpy.random.Generator.

    Returns:
        (num_classes, ipc, C, H, H) in [0, 1], on the device of `real`.
    """
    device = real.train.images.device
    size, shape = real.im_size, (real.num_classes, ipc, real.channel, real.im_size, real.im_size)
    if init == "noise":
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) / 4 + 0.5).clamp(0, 1).to(device)
    grid = factor if init == "mix" else 1
    images = torch.empty(shape, device=device)
    # Sizes that the factor does not divide give the first rows and columns one pixel more.
    edges = np.cumsum([0] + [size // grid + (part < size % grid) for part in range(grid)])
    for label in range(real.num_classes):
        index = torch.from_numpy(real.random_indices(label, ipc * grid**2, rng)).to(device)
        pixels = real.train.images[index].float() / 255
        for place in range(grid**2):
            top, bottom = edges[place // grid], edges[place // grid + 1]
            left, right = edges[place % grid], edges[place % grid + 1]
            part = pixels[place * ipc : (place + 1) * ipc]
            if grid > 1:
                part = F.interpolate(part, size=(int(bottom - top), int(right - left)), mode="bilinear", antialias=True)
            images[label, :, :, top:bottom, left:right] = part
    return images.clamp_(0, 1)
