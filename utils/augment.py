"""Differentiable Siamese augmentation (Zhao & Bilen, ICML 2021) as batched tensor code.

Drawing and applying are apart: `DSA.draw` takes random numbers from a stream on the CPU, `apply` is a deterministic
function of images and draw. So one draw can be applied to a real and a synthetic batch, and again when a step is
recomputed. Every operation is linear or affine in the images for a given draw: its gradient is exact.
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
        strategy: entries of `OPERATIONS` joined by `_`; `none` or empty for none.
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
            # What u decides is worked out on the CPU, so that a device has little to launch.
            x = OPERATIONS[name](x, u.to(x.dtype), self.align_corners)
        return x


class DCAugment:
    """DC's augmentation (Zhao et al., ICLR 2021), strategy crop_scale_rotate: one of the three for each image.

    Buffers recorded with `--dsa False` see it, as published. It draws and applies as `DSA` does.
    """

    CROP = 4  # pixels
    SCALE = 0.2
    ROTATE = 45  # degrees

    def draw(self, count, rng):
        return torch.from_numpy(rng.random((count, 3), dtype=np.float32))

    def apply(self, x, u):
        """Augment images (B, C, H, W) in network space."""
        u = u.to(x.dtype)  # on the CPU, as for DSA
        mean = x.mean((0, 2, 3), keepdim=True)  # fills what comes in
        shift = (u[:, 1:] * 2 * self.CROP).floor() - self.CROP
        cropped = _shifted(x - mean, shift) + mean
        sizes = ((1 - self.SCALE + 2 * self.SCALE * u[:, 1:]) * x.shape[2]).floor() / x.shape[2]
        scaled = _sample(x, torch.diag_embed(1 / sizes.flip(1)), False, mode="nearest")
        angle = torch.deg2rad((u[:, 1] * 2 * self.ROTATE).floor() - self.ROTATE)
        rotated = _sample(x - mean.mean(), _rotations(angle), False) + mean.mean()
        which = _like(x, (u[:, 0] * 3).floor()).view(-1, 1, 1, 1)
        return torch.where(which == 0, cropped, torch.where(which == 1, scaled, rotated))


def without(strategy, entry):
    """Return a DSA strategy without one entry."""
    return "_".join(name for name in strategy.split("_") if name != entry) or "none"


def _like(x, values):
    """Return `values`, a tensor from the CPU, on the device of x, which is not waited for."""
    # A GPU reads pinned memory later, by itself; what is not pinned, and large, it would make the CPU wait for.
    return (values.pin_memory() if x.is_cuda else values).to(x.device, non_blocking=True)


def color(x, u, _align_corners):
    """Brightness, then saturation, then contrast, worked out as y = mix x + (1 - contrast) mean(x) + brightness."""
    channels = x.shape[1]
    brightness, saturation, contrast = (u[:, 0] - 0.5) * BRIGHTNESS, u[:, 1] * SATURATION, u[:, 2] + CONTRAST
    grey = torch.full((channels, channels), 1 / channels, dtype=u.dtype)
    saturated = saturation[:, None, None] * (torch.eye(channels, dtype=u.dtype) - grey) + grey
    mix = (contrast[:, None, None] * saturated).flatten(1)
    values = _like(x, torch.cat([mix, 1 - contrast[:, None], brightness[:, None]], dim=1))[:, :, None]
    mix, share, brightness = values.split([channels**2, 1, 1], dim=1)
    offset = torch.addcmul(brightness, share, x.mean((1, 2, 3))[:, None, None])
    mix = mix.view(-1, channels, channels).expand(len(x), -1, -1)
    return torch.baddbmm(offset, mix, x.flatten(2)).view(x.shape)


def _uniform_integers(u, count):
    """Return whole numbers 0 … count − 1 for u uniform in [0, 1)."""
    return (u * count).floor().clamp(max=count - 1)


def _shifted(x, shift):
    """Shift x (B, C, H, H) by `shift` (n, 2), whole pixels up and left, filling with zeros."""
    # The nearest pixel is exact, and so is its gradient: every pixel goes to one place at most.
    return _sample(x, _translations(shift.flip(1) * (2 / x.shape[-1])), False, mode="nearest")


def crop(x, u, _align_corners):
    """Shift by a whole number of pixels on each axis, filling with zeros."""
    reach = int(x.shape[-1] * CROP_PAD + 0.5)
    return _shifted(x, _uniform_integers(u[:, :2], 2 * reach + 1) - reach)


def cutout(x, u, _align_corners):
    """Zero a square; its centre is uniform over the image."""
    size = x.shape[-1]
    side = int(size * CUTOUT + 0.5)
    first = _uniform_integers(u[:, :2], size + (1 - side % 2))[:, :, None] - side // 2
    place = torch.arange(size)
    rows, columns = ((place >= first) & (place < first + side)).unbind(1)
    return x.masked_fill(_like(x, rows[:, :, None] & columns[:, None, :])[:, None], 0)


def flip(x, u, _align_corners):
    """Flip left and right with probability one half."""
    columns = torch.arange(x.shape[3])
    columns = torch.where(u[:, :1] < FLIP, columns.flip(0), columns)
    return x.gather(3, _like(x, columns)[:, None, None].expand(x.shape))


def _sample(x, matrix, align_corners, mode="bilinear"):
    """Resample x (B, C, H, W) at the places that `matrix` (n, 2, 2 or 3), n 1 or B, maps the output grid to."""
    theta = _like(x, F.pad(matrix, (0, 3 - matrix.shape[2]))).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=align_corners)
    return F.grid_sample(x, grid, mode=mode, padding_mode="zeros", align_corners=align_corners)


def _rotations(angle):
    """Return rotation matrices (n, 2, 2) by angles (n,) in radians."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)


def _translations(shift):
    """Return matrices (n, 2, 3) that shift by `shift` (n, 2) half-widths, the unit of affine grids."""
    eye = torch.eye(2, dtype=shift.dtype, device=shift.device)
    return torch.cat([eye.expand(len(shift), 2, 2), shift[:, :, None]], dim=2)


def scale(x, u, align_corners):
    """Stretch each axis by its own factor."""
    factors = u[:, :2] * (SCALE - 1 / SCALE) + 1 / SCALE
    return _sample(x, torch.diag_embed(factors), align_corners)


def rotate(x, u, align_corners):
    """Turn around the centre."""
    angle = (u[:, 0] - 0.5) * (2 * ROTATE * math.pi / 180)
    return _sample(x, _rotations(angle), align_corners)


def translate(x, u, align_corners):
    """Shift by any share of the crop's reach on each axis, filling with zeros."""
    return _sample(x, _translations((u[:, :2] - 0.5) * (4 * CROP_PAD)), align_corners)


OPERATIONS = {
    "color": color,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "scale": scale,
    "rotate": rotate,
    "translate": translate,
}


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
    windows = images[which[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return windows.permute(0, 3, 1, 2).contiguous()


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


# ImageNet's augmentation, which IDC trains with if DSA is off --------------------------------------------------------

JITTER = 0.4
GREY = (0.2989, 0.587, 0.114)
LIGHTING_STD = 0.1
# Eigenvalues and eigenvectors of the colours of ImageNet (Krizhevsky et al., NeurIPS 2012).
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def imagenet_augment(x, rng, crop=True):
    """Random resized crop (scale 0.5 to 1), horizontal flip, colour jitter and PCA lighting, each image its own.

    Args:
        x: (B, C, H, W) pixels in [0, 1].
        rng: numpy.random.Generator.
        crop: False leaves the random resized crop out.

    Returns:
        (B, C, H, W) pixels; lighting may leave [0, 1].
    """
    if crop:
        x = random_resized_crop(x, rng)
    flips = to_device(rng.random(len(x)) < FLIP, x.device)
    x = torch.where(flips.view(-1, 1, 1, 1), x.flip(3), x)
    x = color_jitter(x, rng)
    if x.shape[1] == 1:
        return x
    alpha = to_device(rng.normal(0, LIGHTING_STD, (len(x), 3)).astype(np.float32), x.device).to(x.dtype)
    vectors, values = (torch.tensor(v, device=x.device, dtype=x.dtype) for v in (EIGENVECTORS, EIGENVALUES))
    return x + ((alpha * values) @ vectors.T)[:, :, None, None]


def random_resized_crop(x, rng, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3), tries=10):
    """Cut out a window of random area and aspect ratio and bring it to full size (torchvision's RandomResizedCrop).

    Args:
        x: (B, C, H, H).
        rng: numpy.random.Generator.
        scale: share of the area.
        ratio: width / height, drawn log-uniformly.
        tries: draws of which the first that fits is taken; the whole image if none does.
    """
    count = len(x)
    area = rng.uniform(*scale, (tries, count))
    aspect = np.exp(rng.uniform(*np.log(ratio), (tries, count)))
    width, height = np.sqrt(area * aspect), np.sqrt(area / aspect)
    fits = (width <= 1) & (height <= 1)
    first, columns = fits.argmax(0), np.arange(count)
    size = np.stack([width[first, columns], height[first, columns]])
    size[:, ~fits.any(0)] = 1
    centre = rng.uniform(-1, 1, (2, count)) * (1 - size)
    theta = np.zeros((count, 2, 3), dtype=np.float32)
    theta[:, (0, 1), (0, 1)], theta[:, :, 2] = size.T, centre.T
    grid = F.affine_grid(to_device(theta, x.device).to(x.dtype), x.shape, align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def color_jitter(x, rng):
    """Brightness, contrast and saturation by factors of 0.6 to 1.4, in random order (torchvision's ColorJitter).

    Args:
        x: (B, C, H, W) pixels in [0, 1].
        rng: numpy.random.Generator.
    """
    factors = rng.uniform(1 - JITTER, 1 + JITTER, (3, len(x), 1, 1, 1)).astype(np.float32)
    factors = to_device(factors, x.device).to(x.dtype)
    order = to_device(rng.permuted(np.tile(np.arange(3), (len(x), 1)), axis=1), x.device)
    weights = torch.tensor(GREY if x.shape[1] == 3 else [1.0], device=x.device, dtype=x.dtype).view(1, -1, 1, 1)
    for position in range(3):
        grey = (x * weights).sum(1, keepdim=True)
        others = (torch.zeros_like(grey), grey.mean((2, 3), keepdim=True), grey)  # what each factor mixes x with
        results = [
            (factor * x + (1 - factor) * other).clamp(0, 1) for factor, other in zip(factors, others, strict=True)
        ]
        chosen = order[:, position].view(-1, 1, 1, 1)
        x = torch.where(chosen == 0, results[0], torch.where(chosen == 1, results[1], results[2]))
    return x
