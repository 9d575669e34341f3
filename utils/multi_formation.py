"""Multi-formation (IDC, Kim et al., ICML 2022): several small images packed into one synthetic image.

A synthetic image is a factor × factor grid; decoding cuts it up and enlarges each part to the full size. Pixels are
in [0, 1] here; networks see them normalised.
"""

import torch
from torch.nn import functional as F

PADDING = 0.5  # grey around sizes that the factor does not divide
BOUND = 128  # decoded images of a class in decode_type bound, unless told otherwise (IDC)


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
    grid = images.unflatten(3, (factor, -1)).unflatten(2, (factor, -1))
    parts = grid.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
    return F.interpolate(parts, size=(size, size), mode="bilinear", align_corners=False)


def decode_plan(count, factor, kind, bound=BOUND):
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
    return torch.cat(
        [decode(images[first:last], f) for first, last, f in decode_plan(len(images), factor, kind, bound)]
    )


def decode_union(images, factor, kind):
    """Decode the images (num_classes, n, C, H, H) of a union; returns (decoded images, their labels)."""
    decoded = [decode_class(block, factor, kind) for block in images]
    labels = torch.arange(len(images), device=images.device).repeat_interleave(len(decoded[0]))
    return torch.cat(decoded), labels


def origins(count, factor, kind, bound=BOUND):
    """Return for each decoded image of a class which of its `count` images it is a part of, (M,) int64."""
    pieces = decode_plan(count, factor, kind, bound)
    return torch.cat([torch.arange(first, last).repeat(f * f) for first, last, f in pieces])
