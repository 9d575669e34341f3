"""Decode image files on all cores.

Importing this takes seconds (torchvision), which a start from the cache does not need.
"""

import dataclasses
import mmap
import os

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import functional

from ..run.errors import UserError, one_line

BATCH = 250  # images between two reports of a worker


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decodes image files into the rows of an array: a map-style dataset for a `DataLoader`.

    Attributes:
        paths: the files.
        spec: `class_folders.DecodeSpec`.
        images: uint8 (N, C, H, W), shared with forked processes.
    """

    paths: list
    spec: object
    images: np.ndarray

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        """Decode image `index`; returns None, or the message about a damaged one (workers wrap what they raise)."""
        try:
            pixels = decode_image(self.paths[index], self.spec)
        except UserError as error:
            return str(error)
        self.images[index] = pixels if self.spec.channel == 1 else pixels.transpose(2, 0, 1)
        return None


def shared_array(shape):
    """Return a uint8 array of zeros that forked processes write into, too."""
    return np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), dtype=np.uint8).reshape(shape)


def decode(paths, spec, images):
    """Decode the files `paths` into `images` (N, C, H, W), a shared memory map.

    Raises:
        UserError: a file is damaged or of the wrong size; the first one is named.
    """
    workers = min(len(os.sched_getaffinity(0)), -(-len(paths) // BATCH))
    workers = 0 if workers == 1 else workers
    loader = DataLoader(
        Decoder(paths, spec, images),
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=_first_error,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # else it draws from the global one, which the run may have seeded
    )
    error = next(filter(None, loader), None)
    if error:
        raise UserError(error)


def _first_error(messages):
    return next(filter(None, messages), None)


def decode_image(path, spec):
    """Return one image as a uint8 array (H, W) or (H, W, 3).

    Raises:
        UserError: it is damaged, or of another size than `spec` wants.
    """
    try:
        with Image.open(path) as image:
            image = image.convert("L" if spec.channel == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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
