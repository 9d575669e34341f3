"""Export a distilled set for other programs, or as images to look at.

    # tensors, labels, learning rates and the stage of each image, with a JSON of how they were made
    python scripts/export.py logged_files/CIFAR10/CIFAR10_ConvNet_S_ipc2_… --format pt
    # a PNG for each image in class folders, and a contact sheet
    python scripts/export.py results/cifar10/conv3in_progressive_…_ipc2 --format png --out images

Reads an experiment of PDD+MTT (or one of its stages) or a result of PDD+IDC or PDD+DM, the authors' published ones
too; what their files and names do not say must be given. In Python, pdd.results.load.load_distilled reads a result and
its export alike. Formats: pt (torch.load), npz (numpy.load), safetensors, png (8 bits, clipped to [0, 1]).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from utils import zca
from utils.options import COUNT, Parser, truth
from utils.results import formats, known
from utils.results.load import load_stage
from utils.results.names import read_mtt_stage
from utils.results.report import save_grid
from utils.run import errors
from utils.run.device import versions
from utils.run.errors import UserError
from utils.run.log import print0


def parse():
    parser = Parser(__doc__)
    parser.add_argument("folder", help="of the result")
    parser.add_argument("--format", default="pt", choices=formats.FORMATS, help="to write")
    parser.add_argument("--out", help="folder to write (default: export/FORMAT in the result's folder)")
    group = parser.add_argument_group("what published folders may not say")
    group.add_argument("--dataset", help="name of the data set, as the distillation's --dataset")
    group.add_argument("--data_path", help="folder of the data set: for class names, and for ZCA")
    group.add_argument("--zca", type=truth, nargs="?", const=True, help="the set is whitened")
    group.add_argument("--factor", type=COUNT, help="IDC: small images on each side of a synthetic one")
    group.add_argument("--decode_type", choices=("single", "multi", "bound"), help="IDC: how images are decoded")
    return parser.parse_args()


def main():
    args = parse()
    if Path(args.folder).is_dir() and (about := formats.find_export(args.folder)):
        raise UserError(f"{about}: expected a result, found an export of one; name the folder of the result")
    found = known.find(args.folder, args.dataset, args.data_path, args.zca, args.factor, args.decode_type)
    sets = {stage: load_stage(found, stage) for stage in sorted(found.stages)}
    data = sets[max(sets)]
    check_unions(found, sets)
    tensors = tensors_of(sets)
    out = Path(args.out) if args.out else Path(args.folder) / "export" / args.format
    with formats.replaced(out) as folder:
        formats.write(folder, args.format, tensors, describe(found, sets))
        if args.format == "png":
            save_grid(folder / formats.SHEET, tensors["pixels"], data.labels)
    print0(f"{out}: {len(data)} images of {data.num_classes} classes, stages 1 to {max(sets)}")
    if args.format == "png":
        moved = (tensors["pixels"] * 255).round() / 255 - data.exact_pixels
        print0(
            f"PNG rounds to 8 bits and clips to [0, 1]: values moved by {float(moved.abs().mean()):.4f} on average, "
            f"{float(moved.abs().max()):.4f} at most"
        )
    if data.info.zca and data.info.whitening is None:
        print0(f"note: without {zca.FILE} and --data_path the ZCA transform of test images is unknown and left out")


def check_unions(found, sets):
    """Compare every union with the beginning of the last one.

    Raises:
        UserError: a stage holds other images.
    """
    if found.decode_type == "bound":
        return  # decodes the same images otherwise in a larger union
    last = sets[max(sets)]
    for stage, data in sets.items():
        kept = last.stage <= stage
        if not (torch.equal(last.images[kept], data.images) and torch.equal(last.tensors[1][kept], data.tensors[1])):
            raise UserError(
                f"{found.stages[stage]}: expected the images that stage {max(sets)} keeps of stages 1 to {stage}, "
                "found others; the stages do not belong together"
            )


def tensors_of(sets):
    """Return the tensors of an export (see utils/results/formats.py) of {stage: `DistilledSet`}."""
    last = max(sets)
    data = sets[last]
    tensors = {"images": data.images, "pixels": data.pixels, "labels": data.labels, "stage": data.stage}
    if data.soft_labels is not None:
        tensors["soft_labels"] = data.soft_labels
    if data.syn_lr is not None:
        rates = [sets[stage].syn_lr if stage in sets else float("nan") for stage in range(1, last + 1)]
        tensors["syn_lr"] = torch.tensor(rates)
    if whitening := data.info.whitening:
        tensors["zca_mean"] = whitening.mean_vector.view(-1)
        tensors["zca_matrix"] = whitening.transform_matrix
    return tensors


def describe(found, sets):
    """Return the dict of how {stage: `DistilledSet`} of a `Distillation` were made."""
    data = sets[max(sets)]
    stages = []
    for stage in range(1, max(sets) + 1):  # a folder of one stage holds the images of all before, but not their files
        row = {"stage": stage, "pictures": int((data.stage == stage).sum()), "syn_lr": None}  # the file format's word
        if stage in sets:
            summary = read_mtt_stage(found.stages[stage]) if found.method == "PDD+MTT" else {}
            row["syn_lr"] = sets[stage].syn_lr
            row |= {key: summary[key] for key in ("best_accuracy", "best_iteration", "select_on") if key in summary}
        stages.append(row)
    return {
        **data.about,
        "source": str(found.folder),
        "shape": list(data.images.shape),
        "stages": stages,
        "data": data.info.as_json(),
        "export_versions": versions(),
    }


if __name__ == "__main__":
    errors.run(main)
