"""What distillation and evaluation of PDD+IDC share: data, networks, their files."""

from pathlib import Path

import networks
from utils import datasets, files, idc_options
from utils.errors import UserError
from utils.runtime import seeded
from utils.synset import load_union as load_union
from utils.synset import save_union as save_union
from utils.synset import union_path as union_path

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
    "phase",
    "nclass_sub",
)


def load_data(options, device):
    """Load the data set of an IDC run."""
    statistics = idc_options.STATISTICS.get(options.dataset)
    size = options.size if options.dataset in idc_options.SIZED else None
    folder, subset = idc_options.data_folder(options), idc_options.subset(options)
    return datasets.load(options.data, folder, device, statistics=statistics, subset=subset, res=size)


def save_folder(options):
    """Return the folder that a run writes."""
    return Path(options.override_save_dir) if options.override_save_dir else idc_options.result_folder(options)


def build_network(options, real):
    """Return the distillation's network for the pictures of `real`."""
    return networks.idc_network(
        options.net_type,
        real.channel,
        real.num_classes,
        real.im_size,
        options.depth,
        options.width,
        options.norm_type,
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


def new_network(options, real, *keys):
    """Return the distillation's network initialised from the stream `keys`, on the device of `real`."""
    with seeded(options.seed, "network", *keys):
        network = build_network(options, real)
    return network.to(real.train.images.device)


def floats_of(network):
    """Return the parameters of `network` and what else its forward pass computes with, as a list of tensors."""
    return [*network.parameters(), *(buffer for buffer in network.buffers() if buffer.is_floating_point())]


def on_cpu(state):
    """Return the state dict of a network with its tensors on the CPU, as files hold it."""
    return {name: value.cpu() for name, value in state.items()}


def pretrained_path(options, number):
    """Return the file of pretrained network `number`."""
    folder = Path("pretrained") / idc_options.place(options) / idc_options.model_tag(options)
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
