"""Decode image files on all cores.

Importing this takes seconds (torchvision), which a start from the cache does not need.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from torchvision.transforms import functional

from ..run.errors import UserError, one_line


def decode(paths, spec):
    """Return the files `paths` as uint8 images (N, C, H, W), as a `class_folders.DecodeSpec` wants them.

    Raises:
        UserError: a file is damaged or of the wrong size; the first one is named.
    """
    images = np.empty((len(paths), spec.channel, spec.im_size, spec.im_size), dtype=np.uint8)

    def work(index):
        images[index] = np.atleast_3d(decode_image(paths[index], spec)).transpose(2, 0, 1)

    # Threads, because Pillow decodes and resizes without holding Python's lock.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(work, range(len(paths))))  # raises what the first one raised
    return images


def decode_image(path, spec):
    """Return one image as a uint8 array (H, W) or (H, W, 3).

    Raises:
        UserError: it is damaged, or of another size than `spec` wants.
    """
    try:
        with Image.open(path) as image:
            image = _in_8_bits(path, image).convert("L" if spec.channel == 1 else "RGB")
    except (MemoryError, UserError):
        raise
    except Exception as error:  # whatever a damaged file makes a decoder stumble over
        raise UserError(f"{path}: expected an image, found a damaged file ({one_line(error)[:60]})") from None
    size = spec.im_size
    if spec.resize:
        if not spec.antialias:
            image = functional.to_pil_image(functional.resize(functional.pil_to_tensor(image), size, antialias=False))
        image = functional.center_crop(functional.resize(image, size), [size, size])
    elif image.size != (size, size):
        width, height = image.size
        raise UserError(f"{path}: expected {size}x{size} pixels, found {width}x{height}; resize it")
    return np.asarray(image)


def _in_8_bits(path, image):
    """Return a Pillow image whose pixels fit 8 bits; those of 16 are scaled, where `convert` would clip them.

    Raises:
        UserError: its numbers have neither 8 nor 16 bits.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        kind = "floats" if image.mode == "F" else f"numbers from {values.min()} to {values.max()}"
        raise UserError(f"{path}: expected 8 or 16 bits a channel, found {kind}; save it as an 8-bit image")
    wide = image.mode.startswith("I;16") or values.max() > 255
    return Image.fromarray((values // 257 if wide else values).astype(np.uint8))
