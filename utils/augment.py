"""Differentiable Siamese augmentation (Zhao & Bilen, ICML 2021) as batched tensor code.

Drawing and applying are apart: `DSA.draw` takes random numbers from a stream on the CPU, `apply` is a deterministic
function of images and draw. So one draw can be applied to a real and a synthetic batch, and again when a step is
recomputed. Every operation is linear in the images but for contrast and saturation's means, which are linear too:
its gradient is exact.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

from .run.device import to_device

# Constants of the DSA release, which MTT and IDC share.
BRIGHTNESS = 1.0
SATURATION = 2.0
CONTRAST = 0.5
CROP_PAD = 0.125
CUTOUT = 0.5
FLIP = 0.5
SCALE = 1.2
ROTATE = 15.0

# Uniform numbers that each entry takes per image.
WIDTH = 3


class DSA:
    """A strategy of augmentations.

    Args:
        strategy: entries out of color, crop, cutout, flip, scale, rotate joined by `_`; `none` or empty for none.
        flavour: `mtt` draws one entry a call; scale and rotate align the corners. `idc` always applies flip, color
            and cutout if they are in the strategy and draws one of the others; corners are not aligned.

    Raises:
        ValueError: unknown entry or flavour.
    """

    def __init__(self, strategy, flavour="mtt"):
        if flavour not in ("mtt", "idc"):
            raise ValueError(f"flavour {flavour!r}: mtt or idc expected")
        self.names = [] if strategy in ("", "none", None) else strategy.lower().split("_")
        unknown = set(self.names) - set(OPERATIONS)
        if unknown:
            raise ValueError(f"unknown augmentation {sorted(unknown)[0]!r}; known: {', '.join(OPERATIONS)}")
        self.align_corners = flavour == "mtt"
        self.always_before = [n for n in ("flip", "color") if n in self.names and flavour == "idc"]
        self.always_after = [n for n in ("cutout",) if n in self.names and flavour == "idc"]
        self.choices = [n for n in self.names if n not in self.always_before + self.always_after]

    def draw(self, count, rng):
        """Draw what one call does to `count` images (1: the same to every image of a batch).

        Args:
            count: images.
            rng: numpy.random.Generator.

        Returns:
            List of (entry, u): u uniform in [0, 1), (count, 3) float32 on the CPU.
        """
        names = list(self.always_before)
        if self.choices:
            names.append(self.choices[int(rng.integers(len(self.choices)))])
        names += self.always_after
        return [(name, torch.from_numpy(rng.random((count, WIDTH), dtype=np.float32))) for name in names]

    def apply(self, x, draw):
        """Augment images.

        Args:
            x: (B, C, H, W) in network space.
            draw: what `draw` returned, for B images or for 1.

        Returns:
            (B, C, H, W).
        """
        for name, u in draw:
            u = u.to(device=x.device, dtype=x.dtype, non_blocking=True)
            x = OPERATIONS[name](x, u, self.align_corners)
        return x


def without(strategy, entry):
    """Return a DSA strategy without one entry."""
    return "_".join(name for name in strategy.split("_") if name != entry) or "none"


def _per_image(u, column):
    return u[:, column].view(-1, 1, 1, 1)


def color(x, u, _align_corners):
    """Brightness, then saturation, then contrast."""
    x = x + (_per_image(u, 0) - 0.5) * BRIGHTNESS
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * (_per_image(u, 1) * SATURATION) + mean
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (_per_image(u, 2) + CONTRAST) + mean


def _shift_matrix(shift, size, like):
    """One-hot (n, size, size) matrices S with S @ rows shifting rows by `shift` (n,) pixels, zeros coming in."""
    place = torch.arange(size, device=like.device)
    return (place[None, None, :] == place[None, :, None] + shift[:, None, None]).to(like.dtype)


def crop(x, u, _align_corners):
    """Shift by a whole number of pixels on each axis, filling with zeros."""
    height, width = x.shape[2:]

    def shift(size, column):
        reach = int(size * CROP_PAD + 0.5)
        return (u[:, column] * (2 * reach + 1)).floor().clamp(max=2 * reach) - reach

    # A product with a one-hot matrix is exact, and its gradient needs no scattering.
    rows = _shift_matrix(shift(height, 0), height, x)
    columns = _shift_matrix(shift(width, 1), width, x)
    return rows[:, None] @ x @ columns[:, None].transpose(2, 3)


def cutout(x, u, _align_corners):
    """Zero a square; its centre is uniform over the image."""
    height, width = x.shape[2:]

    def inside(size, column):
        side = int(size * CUTOUT + 0.5)
        centres = size + (1 - side % 2)
        centre = (u[:, column] * centres).floor().clamp(max=centres - 1)
        place = torch.arange(size, device=x.device)
        first = centre[:, None] - side // 2
        return (place >= first) & (place < first + side)

    hole = inside(height, 0)[:, :, None] & inside(width, 1)[:, None, :]
    return x * (~hole[:, None]).to(x.dtype)


def flip(x, u, _align_corners):
    """Flip left and right with probability one half."""
    return torch.where(_per_image(u, 0) < FLIP, x.flip(3), x)


def _sample(x, matrix, align_corners):
    """Resample x (B, C, H, W) at the places that `matrix` (n, 2, 2) maps the output grid to."""
    matrix = matrix.expand(len(x), 2, 2)
    theta = torch.cat([matrix, matrix.new_zeros(len(x), 2, 1)], dim=2)
    grid = F.affine_grid(theta, x.shape, align_corners=align_corners)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=align_corners)


def scale(x, u, align_corners):
    """Stretch each axis by its own factor."""
    factors = u[:, :2] * (SCALE - 1 / SCALE) + 1 / SCALE
    return _sample(x, torch.diag_embed(factors), align_corners)


def rotate(x, u, align_corners):
    """Turn around the centre."""
    angle = (u[:, 0] - 0.5) * (2 * ROTATE * math.pi / 180)
    cos, sin = torch.cos(angle), torch.sin(angle)
    matrix = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
    return _sample(x, matrix, align_corners)


OPERATIONS = {"color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate}


def random_windows(images, rng, size, samples):
    """Draw `samples` windows from each toroidal canvas (MTT's texture mode).

    Args:
        images: (B, C, H, W) canvases, H and W at least `size`.
        rng: numpy.random.Generator.
        size: of the windows in pixels.
        samples: windows for each canvas.

    Returns:
        (B * samples, C, size, size); sample s of canvas b is at s * B + b.
    """
    count, _, height, width = images.shape
    total = count * samples
    device = images.device
    place = torch.arange(size, device=device)
    top = to_device(rng.integers(height, size=total), device)
    left = to_device(rng.integers(width, size=total), device)
    rows = (top[:, None] + place) % height
    columns = (left[:, None] + place) % width
    which = torch.arange(total, device=device) % count
    return images[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutmix(x, setting, rng):
    """CutMix (Yun et al., ICCV 2019) as IDC uses it: one box and one share for the whole batch.

    Args:
        x: (B, C, H, W).
        setting: (probability of mixing this batch, beta of the Beta distribution).
        rng: numpy.random.Generator.

    Returns:
        (mixed images, permutation (B,) of the partners, share of the images' own labels); the batch that is not
        mixed has no partners (None) and a share of 1.
    """
    probability, beta = setting
    height, width = x.shape[2:]
    mixes = rng.random() < probability
    share = rng.beta(beta, beta)
    other = to_device(rng.permutation(len(x)), x.device)
    side = math.sqrt(1 - share)
    bounds = []
    for size in (height, width):
        centre, cut = int(rng.integers(size)), int(size * side)
        bounds += [max(centre - cut // 2, 0), min(centre + cut // 2, size)]
    if not mixes:
        return x, None, 1.0
    top, bottom, left, right = bounds
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[other, :, top:bottom, left:right]
    return mixed, other, 1 - (bottom - top) * (right - left) / (height * width)


def random_resized_crop(x, rng, smallest=0.08):
    """Random resized crop and flip (Szegedy et al., CVPR 2015), each image its own.

    Args:
        x: (B, C, H, W).
        rng: numpy.random.Generator.
        smallest: share of the area that a crop keeps at least; aspect ratios are 3/4 to 4/3.
    """
    count = len(x)
    area = rng.uniform(smallest, 1, count)
    ratio = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), count))
    width, height = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
    centre_x, centre_y = rng.uniform(-1, 1, (2, count)) * (1 - np.stack([width, height]))
    sign = np.where(rng.random(count) < FLIP, -1, 1)
    theta = np.zeros((count, 2, 3), dtype=np.float32)
    theta[:, 0, 0], theta[:, 0, 2] = width * sign, centre_x
    theta[:, 1, 1], theta[:, 1, 2] = height, centre_y
    grid = F.affine_grid(to_device(theta, x.device).to(x.dtype), x.shape, align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
