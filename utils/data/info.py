"""What is known of a data set without its images: classes, size, normalisation, whitening.

One description serves loaded data, synthetic sets, their files (data.json) and exports.
"""

import dataclasses
import hashlib

import numpy as np
import torch

from .. import zca
from ..run.errors import UserError


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """One data set.

    Attributes:
        name: as `--dataset` of PDD+MTT spells it.
        num_classes: number of classes.
        class_names: one string for each class.
        channel: 1 (grey) or 3 (RGB).
        im_size: height and width in pixels.
        mean, std: of pixels in [0, 1], per channel; not used if `zca`.
        zca: networks see ZCA-whitened images instead of normalised ones.
        fingerprint: {"train": {class name: "COUNT:DIGEST"}, "test": {…}} of the data that it was read from; None if
            unknown. Of class folders, DIGEST covers names and sizes of the files; of other data sets, the pixels.
        whitening: the fitted kornia.enhance.ZCAWhitening; None without ZCA, or if it is not known.
    """

    name: str
    num_classes: int
    class_names: list
    channel: int
    im_size: int
    mean: list
    std: list
    zca: bool = False
    fingerprint: dict | None = None
    whitening: object = dataclasses.field(default=None, compare=False, repr=False)

    def normalise(self, pixels):
        """Return pixels (N, C, H, W) in [0, 1] in network space: normalised, or whitened.

        Raises:
            UserError: they are to be whitened and the transform is not known.
        """
        if self.zca:
            return self._known_whitening()(pixels)
        mean, std = self._statistics(pixels.device)
        return (pixels - mean) / std

    def to_pixels(self, images):
        """Return network-space images (N, C, H, W) as pixels, in [0, 1] if they are real images.

        Raises:
            UserError: they are whitened and the transform is not known.
        """
        if self.zca:
            return self._known_whitening().inverse_transform(images)
        mean, std = self._statistics(images.device)
        return images * std + mean

    @property
    def transform(self):
        """The torchvision transform of pixels in [0, 1], (C, H, W) or (N, C, H, W), into network space.

        Raises:
            UserError: they are to be whitened and the transform is not known.
        """
        from torchvision.transforms import v2  # takes seconds, and training does not need it

        if not self.zca:
            return v2.Normalize(self.mean, self.std)
        whitening = self._known_whitening()
        return v2.LinearTransformation(whitening.transform_matrix, whitening.mean_vector.view(-1))

    def _statistics(self, device):
        return (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (self.mean, self.std))

    def _known_whitening(self):
        if self.whitening is None:
            raise UserError(
                f"these images are whitened and neither {zca.FILE} nor the data set says how; name the folder of "
                f"{self.name} with --data_path (data_path=… in Python)"
            )
        return self.whitening

    @property
    def network_shape(self):
        """What `networks.get_network` and `idc_network` need to know of the images, as a dict."""
        cifar = self.name.startswith("CIFAR")
        return {"channel": self.channel, "num_classes": self.num_classes, "im_size": self.im_size, "cifar": cifar}

    def replace(self, **changes):
        """Return this description with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def as_json(self):
        """Return the dict that data.json and exports hold: everything but the whitening."""
        return {name: value for name, value in vars(self).items() if name != "whitening"}

    @classmethod
    def from_json(cls, found, where, whitening=None):
        """Return the description in the dict `found`, as `as_json` returned it, today or in an earlier version.

        Raises:
            UserError: it is something else; the message begins with `where`.
        """
        try:
            return cls(**found, whitening=whitening)
        except TypeError:
            raise UserError(f"{where}: expected the description of a data set, found something else") from None


CIFAR_MEAN, CIFAR_STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _fixed(name, classes, channel, im_size, mean, std):
    return DatasetInfo(name, classes, [str(label) for label in range(classes)], channel, im_size, mean, std)


# Data sets of fixed size, their classes called by number until the data are read.
KNOWN = {
    info.name: info
    for info in (
        _fixed("CIFAR10", 10, 3, 32, CIFAR_MEAN, CIFAR_STD),
        _fixed("CIFAR100", 100, 3, 32, CIFAR_MEAN, CIFAR_STD),
        _fixed("Tiny", 200, 3, 64, IMAGENET_MEAN, IMAGENET_STD),
        # Mean and standard deviation of scikit-learn's digits, measured on the 1,437 training images.
        _fixed("Digits", 10, 1, 8, [0.3054], [0.3760]),
        _fixed("SVHN", 10, 3, 32, [0.4377, 0.4438, 0.4728], [0.1980, 0.2010, 0.1970]),
        _fixed("MNIST", 10, 1, 28, [0.1307], [0.3081]),
        _fixed("FashionMNIST", 10, 1, 28, [0.2861], [0.3530]),
    )
}
SIZED = ("ImageNet", "folder")  # brought to --res pixels (PDD+IDC: --size)
NAMES = (*KNOWN, *SIZED)

# The names that PDD+IDC's scripts give to the same data sets.
IDC_NAMES = {
    "mnist": "MNIST",
    "fashion": "FashionMNIST",
    "svhn": "SVHN",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "tiny-imagenet": "Tiny",
    "imagenet": "ImageNet",
    "digits": "Digits",
    "folder": "folder",
}
# IDC normalises Tiny ImageNet by statistics of its own.
IDC_STATISTICS = {"tiny-imagenet": ([0.4802, 0.4481, 0.3975], [0.2302, 0.2265, 0.2262])}


def count_and_digest(count, content):
    """Return "COUNT:DIGEST" of a class: how many images, and a digest of `content` (bytes or a C-contiguous array)."""
    return f"{count}:{hashlib.sha1(content).hexdigest()[:16]}"


def pixel_fingerprint(arrays, class_names):
    """Return the fingerprint of images in memory.

    Args:
        arrays: train images (N, C, H, W), train labels (N,), test images, test labels: NumPy arrays.
        class_names: list.
    """
    found = {}
    for part, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
        members = [np.flatnonzero(labels == label) for label in range(len(class_names))]
        found[part] = {
            name: count_and_digest(len(index), images[index]) for name, index in zip(class_names, members, strict=True)
        }
    return found


def changes(before, now, most=3):
    """Return in words how the data changed between two fingerprints (see `DatasetInfo`); None if they are equal.

    Only `most` changes are named, of the rest the number is given.
    """
    words = []
    for name in dict.fromkeys([*before["train"], *now["train"]]):
        if name not in before["train"]:
            words.append(f"class {name!r} is new")
        elif name not in now["train"]:
            words.append(f"class {name!r} is gone")
        else:
            for part in ("train", "test"):
                was, found = before[part].get(name, "0:"), now[part].get(name, "0:")
                count, new_count = was.partition(":")[0], found.partition(":")[0]
                if count != new_count:
                    words.append(f"class {name!r}: {count} {part} images, now {new_count}")
                elif was != found:
                    words.append(f"class {name!r}: other files in {part}")
    if not words and list(before["train"]) != list(now["train"]):
        words = ["the classes are in another order"]
    if len(words) > most:
        words[most:] = [f"and {len(words) - most} more changes"]
    return "; ".join(words) or None
