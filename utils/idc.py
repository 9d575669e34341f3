"""What distillation and evaluation of PDD+IDC share: data, networks, unions on disk."""

from pathlib import Path

import torch

import networks
from utils import datasets, files, idc_options
from utils.errors import UserError
from utils.runtime import seeded

# Options that may differ between a run and its continuation, besides those of every script.
FREE = (
    "data_dir",
    "imagenet_dir",
    "results",
    "override_save_dir",
    "override_load_dir",
    "workers",
    "print_freq",
    "time",
    "name",
    "transition_batch",
    "pretrain",
)


def load_data(options, device):
    """Load the data set of an IDC run."""
    statistics = idc_options.STATISTICS.get(options.dataset)
    return datasets.load(options.data, idc_options.data_folder(options), device, statistics=statistics)


def save_folder(options):
    """Return the folder that a run writes."""
    return Path(options.override_save_dir) if options.override_save_dir else idc_options.result_folder(options)


def build_network(options, real, net_type=None, depth=None, norm=None):
    """Return a network for the pictures of `real`; the distillation's own unless another is named."""
    own = net_type is None
    return networks.idc_network(
        net_type or options.net_type,
        real.channel,
        real.num_classes,
        real.im_size,
        depth or options.depth,
        options.width if own else 1.0,
        norm or options.norm_type,
    )


def check_network(options, real):
    """Refuse a network that the pictures are too small for.

    Raises:
        UserError: they are.
    """
    try:
        build_network(options, real)
    except ValueError as error:
        raise UserError(f"--net_type {options.net_type} on {real.name}: {error}") from None


def new_network(options, real, *keys, **other):
    """Return a network initialised from the stream `keys`, on the device of `real`."""
    with seeded(options.seed, "network", *keys):
        network = build_network(options, real, **other)
    return network.to(real.train.images.device)


def pretrained_path(options, number):
    """Return the file of pretrained network `number`."""
    folder = Path("pretrained") / options.dataset / idc_options.model_tag(options)
    held_out = f"_val{options.val_fraction:g}" if options.select_on == "val" else ""
    return folder / f"network_{number}_epoch{options.pt_from}{held_out}.pt"


def load_pretrained(options, real, number):
    """Return pretrained network `number`.

    Raises:
        UserError: it is missing, damaged or of another network.
    """
    path = pretrained_path(options, number)
    if not path.exists():
        raise UserError(
            f"{path}: expected a pretrained network, found none; make it by the same command with --pretrain"
        )
    network = build_network(options, real)
    try:
        saved = files.load(path, "a pretrained network")
        network.load_state_dict(saved)
        if not all(bool(value.isfinite().all()) for value in saved.values()):
            raise UserError(f"{path}: expected finite parameters, found NaN or infinity; make it anew with --pretrain")
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(
            f"{path}: expected a network {idc_options.model_tag(options)}, found another; make it anew with --pretrain"
        ) from None
    return network.to(real.train.images.device)


def union_path(folder, stage):
    """Return the file of the union of `stage` (from 0)."""
    return Path(folder) / f"interval_{stage}_data.pt"


def summary_path(folder, stage):
    """Return the file that says that `stage` (from 0) is complete."""
    return Path(folder) / f"interval_{stage}.json"


def read_summary(folder, stage):
    """Return what is known of a complete stage (from 0), {} where there is no file: before its end, or published.

    Raises:
        UserError: the file is damaged.
    """
    path = summary_path(folder, stage)
    return files.read_json(path, "the summary of a finished stage", {"complete": bool}) if path.exists() else {}


def save_union(folder, stage, union):
    """Write a union (K, n, stages, C, H, W) as the published code does: [images, labels], class after class."""
    images = union.flatten(1, 2).flatten(0, 1).cpu().clone()
    labels = torch.arange(len(union)).repeat_interleave(len(images) // len(union))
    files.save(union_path(folder, stage), [images, labels])


def load_union(folder, stage, real, ipc=None):
    """Read the union of `stage` (from 0).

    Args:
        folder: of the results.
        stage: whose union.
        real: `RealData` that it must fit.
        ipc: images of each class that a stage learned; None to take any.

    Returns:
        (K, n, stage + 1, C, H, W) float32 in [0, 1], on the CPU.

    Raises:
        UserError: the file is missing, damaged, or of another data set, size, class count or ipc.
    """
    path = union_path(folder, stage)
    value = files.load(path, "a union [images, labels]")
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, torch.Tensor) for v in value)
    good = good and value[0].is_floating_point() and not value[1].is_floating_point()
    if not good or value[0].dim() != 4 or value[1].dim() != 1 or len(value[0]) != len(value[1]):
        raise UserError(f"{path}: expected [images (N, C, H, W), labels (N,)], found something else; make it anew")
    images, labels = value[0].detach().float(), value[1].detach().long()
    expected = (real.channel, real.im_size, real.im_size)
    if tuple(images.shape[1:]) != expected:
        raise UserError(
            f"{path}: expected pictures {'x'.join(map(str, expected))} for {real.name}, found "
            f"{'x'.join(map(str, images.shape[1:]))}; name the right --dataset and --size"
        )
    if not bool(images.isfinite().all()):
        raise UserError(f"{path}: expected finite pixels, found NaN or infinity; make it anew")
    per_class = len(images) // real.num_classes
    wanted = torch.arange(real.num_classes).repeat_interleave(per_class)
    if per_class == 0 or not torch.equal(labels, wanted):
        raise UserError(
            f"{path}: expected {real.num_classes} classes of equal size one after the other, found {len(labels)} "
            f"labels from {int(labels.min()) if len(labels) else 0} to {int(labels.max()) if len(labels) else 0}; "
            "name the right --dataset and --nclass"
        )
    if per_class % (stage + 1) or (ipc and per_class != ipc * (stage + 1)):
        raise UserError(
            f"{path}: expected {ipc * (stage + 1) if ipc else f'a multiple of {stage + 1}'} images of each class, "
            f"found {per_class}; check --ipc"
        )
    return images.view(real.num_classes, -1, stage + 1, *expected)


def write_arguments(folder, options):
    """Write args.txt: one line for each option, as the run began."""
    if (Path(folder) / "args.txt").exists():
        return
    with files.atomic(Path(folder) / "args.txt", "w") as file:
        file.writelines(f"{name}: {value}\n" for name, value in vars(options).items())


def write_log(folder):
    """Write log.txt: the rows of all stages' metrics as plain lines."""
    lines = []
    for path in sorted(Path(folder).glob("interval_*_metrics.jsonl"), key=lambda p: int(p.name.split("_")[1])):
        for row in files.read_rows(path):
            lines.append("  ".join(f"{name} {value:.6g}" for name, value in row.items()) + "\n")
    with files.atomic(Path(folder) / "log.txt", "w") as file:
        file.writelines(lines)
