"""Subsets of ImageNet by the names of their class folders (WordNet identifiers).

MTT names its subsets by class indices 0-999: the places of these folders among all thousand in alphabetical order.
IDC's ImageNet-10 and ImageNet-100 are the first lines of imagenet100_wnids.txt; a seed chooses other lines.
"""

import re
from pathlib import Path

import numpy as np

from ..run.errors import UserError

SUBSETS = {
    "imagenette": "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 n03888257",
    "imagewoof": "n02096294 n02093754 n02111889 n02088364 n02086240 n02089973 n02087394 n02115641 n02099601 n02105641",
    "imagemeow": "n02123045 n02123159 n02123394 n02123597 n02124075 n02129165 n02129604 n02128925 n02128757 n02127052",
    "imagesquawk": "n01806143 n02007558 n01818515 n02051845 n02056570 "
    "n01614925 n01843383 n01518878 n01860187 n01819313",
    "imagefruit": "n07753275 n07753592 n07745940 n07747607 n07749582 n07768694 n07753113 n07720875 n07718472 n07742313",
    "imageyellow": "n02206856 n12057211 n07753592 n07749582 n12144580 "
    "n04146614 n03530642 n02129165 n01773157 n01531178",
}
SUBSETS = {name: folders.split() for name, folders in SUBSETS.items()}
IDC_CLASSES = (Path(__file__).parent / "imagenet100_wnids.txt").read_text().split()
IDC_SUBSET = re.compile(r"imagenet(\d+)(?:-seed(\d+))?")


def subset_classes(subset):
    """Return the class folders of a subset in the order of their labels.

    Args:
        subset: a key of `SUBSETS`, `imagenet{N}` or `imagenet{N}-seed{S}` (IDC), or a text file with one folder name on
            each line.

    Raises:
        UserError: neither, or a file that names no folder or one twice.
    """
    if subset in SUBSETS:
        return SUBSETS[subset]
    match = IDC_SUBSET.fullmatch(subset)
    if match and 2 <= int(match[1]) <= len(IDC_CLASSES):
        count, seed = int(match[1]), int(match[2] or 0)
        order = np.random.RandomState(seed).permutation(len(IDC_CLASSES)) if seed else range(len(IDC_CLASSES))
        return [IDC_CLASSES[line] for line in order[:count]]
    try:
        folders = Path(subset).read_text().split()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"--subset {subset}: expected {', '.join(SUBSETS)}, imagenet2 to imagenet{len(IDC_CLASSES)}, or a text "
            "file with one class folder on each line, found neither"
        ) from None
    if len(folders) < 2 or len(set(folders)) < len(folders):
        raise UserError(f"--subset {subset}: expected two class folders or more, each once, found {len(folders)} names")
    return folders
