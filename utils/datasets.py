"""Real data: one tensor on the device, read from class folders or from the files of a data set's authors."""

import contextlib
import copy
import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import torch

from utils import distributed, files, imagenet, originals, zca
from utils.errors import UserError
from utils.pictures import CACHE, Form, from_folders, note_no_cache
from utils.runtime import stream

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SPLIT_SEED = 0  # of the held-out pictures, whatever the seed of a run


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is known of a data set before it is read: classes, channels, pixels, mean and standard deviation."""

    num_classes: int
    channel: int
    im_size: int
    statistics: tuple


KINDS = {
    "CIFAR10": Kind(10, 3, 32, CIFAR),
    "CIFAR100": Kind(100, 3, 32, CIFAR),
    "Tiny": Kind(200, 3, 64, IMAGENET),
    # Mean and standard deviation of the 1,437 training digits below.
    "Digits": Kind(10, 1, 8, ((0.3054,), (0.3760,))),
    "SVHN": Kind(10, 3, 32, ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))),
    "MNIST": Kind(10, 1, 28, ((0.1307,), (0.3081,))),
    "FashionMNIST": Kind(10, 1, 28, ((0.2861,), (0.3530,))),
}
SIZED = ("ImageNet", "folder")  # their pictures are brought to --res pixels
STATISTICS = {name: kind.statistics for name, kind in KINDS.items()} | {"ImageNet": IMAGENET}
NAMES = (*KINDS, *SIZED)
RES = 128
WHITENED = 3 * 64 * 64  # values of a picture that ZCA is offered for; its matrices grow with their square


class Source:
    """Pictures and labels to train or test on, as tensors on one device.

    Args:
        images: (N, C, H, W): uint8 pixels, float32 pixels in [0, 1], or float32 in network space.
        labels: (N,) int64.
        statistics: (mean, std) of pixels in [0, 1], per channel; None where images are in network space.
    """

    def __init__(self, images, labels, statistics=None):
        self.images = images
        self.labels = labels
        if statistics is not None:
            mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in statistics)
            self.mean, self.std = mean, std
        self.normalise = statistics is not None

    def __len__(self):
        return len(self.labels)

    def batch(self, index):
        """Return network-space pictures (B, C, H, W) float32 and labels (B,) at `index` (a tensor or slice)."""
        images = self.images[index]
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        if self.normalise:
            images = images.sub(self.mean).div_(self.std)
        return images, self.labels[index]

    def subset(self, index):
        """Return the `Source` of the pictures at `index` (an int64 tensor)."""
        part = copy.copy(self)
        part.images, part.labels = self.images[index], self.labels[index]
        return part


class RealData:
    """A data set on a device.

    Attributes:
        name, num_classes, channel, im_size, class_names: what it is; im_size in pixels.
        train, test: `Source`s.
        selection: `Source` that accuracies inside a stage are measured on: `test`, or pictures `held_out` of `train`.
    """

    def __init__(self, name, pictures, device, whitening=None, statistics=None):
        self.name = name
        self.num_classes = len(pictures.class_names)
        self.class_names = pictures.class_names
        self.channel, self.im_size = pictures.train_images.shape[1:3]
        self.statistics = statistics or pictures.statistics or STATISTICS[name]
        self.whitening = whitening
        self.train = self._source(pictures.train_images, pictures.train_labels, device)
        self.test = self._source(pictures.test_images, pictures.test_labels, device)
        self.selection = self.test
        labels = pictures.train_labels
        self.class_indices = [np.flatnonzero(labels == label) for label in range(self.num_classes)]

    def held_out(self, fraction):
        """Return these data with a share of each class's training pictures moved from `train` to `selection`.

        The pictures are the same for every seed, and those of a smaller share are among those of a larger one. ZCA
        whitening stays that of all training pictures, so that results are in the same space as others.

        Args:
            fraction: share of the training pictures, 0 to 1; 0 moves none.

        Raises:
            UserError: it leaves a class without pictures on one of the two sides.
        """
        if not fraction:
            return self
        kept, held = [], []
        for label, indices in enumerate(self.class_indices):
            count = round(fraction * len(indices))
            if not 0 < count < len(indices):
                raise UserError(
                    f"--val_fraction {fraction:g}: expected a share that holds out some of the {len(indices)} training "
                    f"pictures of class {self.class_names[label]!r} and keeps some, found {count} held out; change it"
                )
            order = stream(SPLIT_SEED, "held out", label).permutation(indices)
            held.append(order[:count])
            kept.append(order[count:])
        view, device = copy.copy(self), self.train.labels.device
        kept, held = (torch.from_numpy(np.sort(np.concatenate(parts))).to(device) for parts in (kept, held))
        view.train, view.selection = self.train.subset(kept), self.train.subset(held)
        labels = view.train.labels.cpu().numpy()
        view.class_indices = [np.flatnonzero(labels == label) for label in range(self.num_classes)]
        return view

    def _source(self, images, labels, device):
        labels = torch.from_numpy(np.array(labels, dtype=np.int64)).to(device)
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        if self.whitening is None:
            return Source(pixels, labels, self.statistics)
        whitened = torch.empty(pixels.shape, device=device)
        for start in range(0, len(pixels), 10000):
            whitened[start : start + 10000] = self.whitening(pixels[start : start + 10000].float() / 255)
        return Source(whitened, labels)

    def to_pixels(self, images):
        """Return network-space `images` (N, C, H, W) as pixels, 0 to 1 where they are real pictures."""
        if self.whitening is not None:
            return self.whitening.inverse_transform(images)
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in self.statistics)
        return images * std + mean

    def source(self, pixels, labels):
        """Return a `Source` of pictures (N, C, H, W) in [0, 1] that are normalised as the real ones are."""
        return Source(pixels, labels, self.statistics)

    def random_indices(self, label, count, rng):
        """Return `count` different indices of training pictures of class `label`, drawn from `rng`.

        Raises:
            UserError: the class has fewer pictures.
        """
        indices = self.class_indices[label]
        if count > len(indices):
            raise UserError(
                f"{count} pictures of class {self.class_names[label]!r} asked for, "
                f"{self.name} has {len(indices)}; lower --ipc"
            )
        return rng.choice(indices, count, replace=False)


def load(name, data_path, device, whiten=False, statistics=None, subset=None, res=None):
    """Load data set `name` and put it on `device`.

    Args:
        name: one of `NAMES`.
        data_path: folder of the data.
        device: torch.device.
        whiten: ZCA whitening fitted on the training pictures instead of mean and standard deviation.
        statistics: (mean, std) instead of the data set's own.
        subset, res: which part of ImageNet; pixels of ImageNet and of own folders (default: `RES`).

    Raises:
        UserError: the data are missing or damaged.
    """
    with distributed.leaders_first():
        pictures = read(name, data_path, subset, res)
        whitening = _whitening(pictures.train_images, data_path, device) if whiten else None
    return RealData(name, pictures, device, whitening, None if whiten else statistics)


def _whitening(images, data_path, device):
    """Fit ZCA on uint8 `images`, or take the fit that was cached for the very same pictures."""
    values = images[0].size
    if values > WHITENED:
        raise UserError(
            f"--zca: expected pictures of at most {WHITENED} values (3x64x64), found {values}: its two matrices would "
            f"take {8 * values**2 / 1e9:.0f} GB; leave --zca out or lower --res"
        )
    key = hashlib.sha1(np.ascontiguousarray(images)).hexdigest()[:16]
    path = Path(data_path) / CACHE / f"zca-{key}.pt"
    if path.exists():
        with contextlib.suppress(UserError):  # a damaged cache is made anew
            return zca.restore(files.load(path, "a cached ZCA transform"), images[0].size, device)
    whitening = zca.fit(torch.from_numpy(np.ascontiguousarray(images)).to(device).float() / 255)
    try:
        files.save(path, zca.state(whitening))
    except OSError as error:
        note_no_cache(path, error)
    return whitening


def read(name, data_path, subset=None, res=None):
    """Return the `Pictures` of data set `name` below `data_path`.

    Raises:
        UserError: the data are missing or damaged, or `res` is given for pictures of a fixed size.
    """
    root = Path(data_path)
    if name in SIZED:
        _need_train(name, root)
        form = Form(3, res or RES, resize=True, measure=name == "folder")
        classes = imagenet.subset_classes(subset) if name == "ImageNet" else None
        return from_folders(place(name, root, subset, res).replace("/", "-"), root, form, classes=classes)
    kind = KINDS[name]
    if res not in (None, kind.im_size):
        raise UserError(f"--res {res}: expected none for {name}, whose pictures have {kind.im_size} pixels")
    if name == "Digits":
        return originals.digits()
    if (root / "train").is_dir():
        return from_folders(name, root, Form(kind.channel, kind.im_size), kind.num_classes)
    if name not in originals.READERS:
        _need_train(name, root)
    pictures = originals.READERS[name](name, root)
    for part, labels in (("train", pictures.train_labels), ("test", pictures.test_labels)):
        present = np.unique(labels)
        if not np.array_equal(present, np.arange(kind.num_classes)):
            raise UserError(
                f"{root}: expected {kind.num_classes} classes in {part} of {name}, found {len(present)} "
                f"(labels {present.min()} to {present.max()}); check the data"
            )
    return pictures


def _need_train(name, root):
    if not (root / "train").is_dir():
        raise UserError(
            f"{root}: expected {name} with a folder train in it, found "
            f"{'none' if root.is_dir() else 'no such folder'}; name the folder with --data_path, "
            "for PDD+IDC with --data_dir or --imagenet_dir"
        )


def place(name, data_path, subset=None, res=None):
    """Return where results of a data set lie below the root of all results.

    Its name; `ImageNet/{subset}/{res}` (MTT); for own pictures `folder/{name of the folder}/{res}`.
    """
    if name == "ImageNet":
        return f"{name}/{imagenet.subset_name(subset)}/{res or RES}"
    if name == "folder":
        return f"{name}/{Path(data_path).resolve().name}/{res or RES}"
    return name
