"""Real data: one tensor on the device, read from class folders or from the files of a data set's authors."""

import contextlib
import copy
import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import torch

from .. import zca
from ..run import distributed, files
from ..run.errors import UserError
from ..run.streams import stream
from . import class_folders, imagenet, torchvision_sets
from .info import IMAGENET_MEAN, IMAGENET_STD, KNOWN, DatasetInfo, pixel_fingerprint

SPLIT_SEED = 0  # of the held-out images, whatever the seed of a run
RES = 128  # pixels of `SIZED` data sets by default
WHITENED = 3 * 64 * 64  # values of an image that ZCA is offered for; its matrices grow with their square


@dataclasses.dataclass(frozen=True)
class ImageArrays:
    """A data set in NumPy arrays.

    Attributes:
        train_images, test_images: uint8 (N, C, H, W).
        train_labels, test_labels: int64 (N,).
        info: `DatasetInfo`.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    info: DatasetInfo


class ImageDataset:
    """Images and labels to train or test on, as tensors on one device.

    Args:
        images: (N, C, H, W): uint8 pixels, float32 pixels in [0, 1], or float32 in network space.
        labels: (N,) int64.
        statistics: (mean, std) of pixels in [0, 1], per channel; None if images are in network space.
    """

    def __init__(self, images, labels, statistics=None):
        self.images = images
        self.labels = labels
        if statistics is not None:
            mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in statistics)
            self.mean, self.std = mean, std
        self.in_pixels = statistics is not None

    def __len__(self):
        return len(self.labels)

    def batch(self, index):
        """Return network-space images (B, C, H, W) float32 and labels (B,) at `index` (a tensor or slice)."""
        return self.normalise(self.pixels(index)), self.labels[index]

    def pixels(self, index):
        """Return the images (B, C, H, W) float32 at `index`: pixels in [0, 1], or network space if they are in it."""
        images = self.images[index]
        return images.float().div_(255) if images.dtype == torch.uint8 else images

    def normalise(self, pixels):
        """Return what `pixels` returned in network space."""
        return pixels.sub(self.mean).div_(self.std) if self.in_pixels else pixels

    def subset(self, index):
        """Return the `ImageDataset` of the images at `index` (an int64 tensor)."""
        part = copy.copy(self)
        part.images, part.labels = self.images[index], self.labels[index]
        return part


class RealData:
    """A data set on a device.

    Args:
        info: `DatasetInfo`, with the fitted whitening if `info.zca`.
        arrays: `ImageArrays`.
        device: torch.device.

    Attributes:
        info: `DatasetInfo`.
        train, test: `ImageDataset`s.
        selection: `ImageDataset` that accuracies inside a stage are measured on: `test`, or images `held_out` of
            `train`.
        class_indices: for each label, the indices of its images in `train` (int64 NumPy array).
    """

    def __init__(self, info, arrays, device):
        self.info = info
        self.train = _on_device(info, arrays.train_images, arrays.train_labels, device)
        self.test = _on_device(info, arrays.test_images, arrays.test_labels, device)
        self.selection = self.test
        self.class_indices = self._indices_by_class()

    def held_out(self, fraction):
        """Return these data with a share of each class's training images moved from `train` to `selection`.

        The images are the same for every seed, and those of a smaller share are among those of a larger one. ZCA
        whitening stays that of all training images, so that results are in the same space as others.

        Args:
            fraction: share of the training images, 0 to 1; 0 moves none.

        Raises:
            UserError: it leaves a class without images on one of the two sides.
        """
        if not fraction:
            return self
        kept, held = [], []
        for label, indices in enumerate(self.class_indices):
            count = round(fraction * len(indices))
            if not 0 < count < len(indices):
                raise UserError(
                    f"--val_fraction {fraction:g}: expected a share that holds out some of the {len(indices)} training "
                    f"images of class {self.info.class_names[label]!r} and keeps some, found {count}; change it"
                )
            order = stream(SPLIT_SEED, "held out", label).permutation(indices)
            held.append(order[:count])
            kept.append(order[count:])
        view = self.keeping(kept)
        view.selection = self.keeping(held).train
        return view

    def keeping(self, parts):
        """Return these data with the training images at the indices in `parts` (list of arrays) alone, in order."""
        view, index = copy.copy(self), np.sort(np.concatenate(parts))
        view.train = self.train.subset(torch.from_numpy(index).to(self.train.labels.device))
        view.class_indices = view._indices_by_class()
        return view

    def _indices_by_class(self):
        labels = self.train.labels.cpu().numpy()
        return [np.flatnonzero(labels == label) for label in range(self.info.num_classes)]

    def pixel_dataset(self, pixels, labels):
        """Return an `ImageDataset` of images (N, C, H, W) in [0, 1] that are normalised as the real ones are."""
        return ImageDataset(pixels, labels, (self.info.mean, self.info.std))

    @property
    def smallest_class(self):
        """Number of training images of the class that has fewest."""
        return min(map(len, self.class_indices))

    def random_indices(self, label, count, rng, advice):
        """Return `count` different indices of training images of class `label`, drawn from `rng`.

        Raises:
            UserError: the class has fewer images; the message ends with `advice`.
        """
        indices = self.class_indices[label]
        if count > len(indices):
            raise UserError(
                f"class {self.info.class_names[label]!r} of {self.info.name}: expected at least {count} training "
                f"images, found {len(indices)}; {advice}"
            )
        return rng.choice(indices, count, replace=False)


def _on_device(info, images, labels, device):
    labels = torch.from_numpy(np.array(labels, dtype=np.int64)).to(device)
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    if not info.zca:
        return ImageDataset(pixels, labels, (info.mean, info.std))
    whitened = torch.empty(pixels.shape, device=device)
    for start in range(0, len(pixels), 10000):
        whitened[start : start + 10000] = info.normalise(pixels[start : start + 10000].float() / 255)
    return ImageDataset(whitened, labels)


def load(name, data_path, device, whiten=False, statistics=None, subset=None, res=None, antialias=True):
    """Load data set `name` and put it on `device`.

    Args:
        name: one of `NAMES`.
        data_path: folder of the data.
        device: torch.device.
        whiten: ZCA whitening fitted on the training images instead of mean and standard deviation.
        statistics: (mean, std) instead of the data set's own.
        subset, res: which part of ImageNet; pixels of ImageNet and of own folders (default: `RES`).
        antialias: when bringing them to these pixels.

    Returns:
        `RealData`.

    Raises:
        UserError: the data are missing or damaged.
    """
    with distributed.leaders_first():
        arrays = read(name, data_path, subset, res, antialias)
        info = arrays.info
        if whiten:
            info = info.replace(zca=True, whitening=_whitening(arrays.train_images, data_path, device))
    if statistics:
        info = info.replace(mean=list(statistics[0]), std=list(statistics[1]))
    return RealData(info, arrays, device)


def _whitening(images, data_path, device):
    """Fit ZCA on uint8 `images`, or take the fit that was cached for the very same images."""
    values = images[0].size
    if values > WHITENED:
        raise UserError(
            f"--zca: expected images of at most {WHITENED} values (3x64x64), found {values}: its two matrices would "
            f"take {8 * values**2 / 1e9:.0f} GB; leave --zca out or lower --res"
        )
    images = np.ascontiguousarray(images)
    path = Path(data_path) / class_folders.CACHE / f"zca-{hashlib.sha1(images).hexdigest()[:16]}.pt"
    if path.exists():
        with contextlib.suppress(UserError):  # a damaged cache is made anew
            return zca.restore(files.load(path, "a cached ZCA transform"), values, device)
    whitening = zca.fit(torch.from_numpy(images).to(device).float() / 255)
    try:
        files.save(path, zca.state(whitening))
    except OSError as error:
        class_folders.note_no_cache(path, error)
    return whitening


def read(name, data_path, subset=None, res=None, antialias=True):
    """Return the `ImageArrays` of data set `name` below `data_path`; arguments as for `load`.

    Raises:
        UserError: the data are missing or damaged, or `res` is given for images of a fixed size.
    """
    root, info = Path(data_path), KNOWN.get(name)
    if info and res not in (None, info.im_size):
        raise UserError(f"--res {res}: expected none for {name}, whose images have {info.im_size} pixels")
    if name == "Digits":
        arrays, class_names = torchvision_sets.digits(), info.class_names
    elif name in torchvision_sets.NAMES and not (root / "train").is_dir():
        arrays, class_names = torchvision_sets.read(info, root)
    else:
        return _read_folders(name, root, info, subset, res, antialias)
    return ImageArrays(
        *arrays, info.replace(class_names=class_names, fingerprint=pixel_fingerprint(arrays, class_names))
    )


def _read_folders(name, root, info, subset, res, antialias):
    if not (root / "train").is_dir():
        raise UserError(
            f"{root}: expected train/<class>/… and test/<class>/… of {name}, found no "
            f"{'folder train' if root.is_dir() else 'such folder'}; name the folder with --data_path, for PDD+IDC with "
            "--data_dir or --imagenet_dir"
        )
    if info:
        spec = class_folders.DecodeSpec(info.channel, info.im_size)
        arrays, names, _, fingerprint = class_folders.read(name, root, spec, info.num_classes)
        return ImageArrays(*arrays, info.replace(class_names=names, fingerprint=fingerprint))
    size = res or RES
    spec = class_folders.DecodeSpec(3, size, resize=True, measure=name == "folder", antialias=antialias)
    classes = imagenet.subset_classes(subset) if name == "ImageNet" else None
    cache = dataset_subdir(name, root, subset, res).replace("/", "-") + "-sharp" * (not antialias)
    arrays, names, measured, fingerprint = class_folders.read(cache, root, spec, classes=classes)
    mean, std = measured or (IMAGENET_MEAN, IMAGENET_STD)
    return ImageArrays(*arrays, DatasetInfo(name, len(names), names, 3, size, mean, std, fingerprint=fingerprint))


def dataset_subdir(name, data_path, subset=None, res=None):
    """Return where results of a data set lie below the root of all results.

    Its name; `ImageNet/{subset}/{res}` (MTT); for own images `folder/{name of the folder}/{res}`.
    """
    if name == "ImageNet":
        return f"{name}/{Path(subset).stem}/{res or RES}"  # of a file that lists the classes; other names stay whole
    if name == "folder":
        return f"{name}/{Path(data_path).resolve().name}/{res or RES}"
    return name
