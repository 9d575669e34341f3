"""Take a distilled set away, for other programs and for the eye.

    # tensors, labels, learning rates and the stage of each picture, with a JSON of how they were made
    python -m utils.export logged_files/CIFAR10/CIFAR10_ConvNet_S_ipc2_… --format pt
    # one PNG for each picture in class folders, and a contact sheet
    python -m utils.export results/cifar10/conv3in_progressive_…_ipc2 --format png --out pictures

Reads an experiment of PDD+MTT (or one of its stages) or a result of PDD+IDC, published ones too; what their files and
names do not say is asked for. In Python, utils.synset.load_distilled reads the result and its export alike. Formats:
pt (torch.load), npz (numpy.load), safetensors, png (8 bits, clipped to [0, 1]).
"""

import dataclasses
from pathlib import Path

import torch

import utils.options as o
from utils import errors, formats, progressive, report, results, synset
from utils.errors import UserError
from utils.runtime import versions


def parse():
    parser = o.Parser(__doc__)
    parser.add_argument("folder", help="of the result")
    parser.add_argument("--format", default="pt", choices=formats.FORMATS, help="to write")
    parser.add_argument("--out", help="folder to write (default: export/FORMAT in the result's folder)")
    known = parser.add_argument_group("what published folders may not say")
    known.add_argument("--dataset", help="name of the data set, as the distillation's --dataset")
    known.add_argument("--data_path", help="folder of the data set: for class names, and for ZCA")
    known.add_argument("--zca", type=o.truth, nargs="?", const=True, help="the set is whitened")
    known.add_argument("--factor", type=o.COUNT, help="IDC: pictures on each side of one image")
    known.add_argument("--decode_type", choices=("single", "multi", "bound"), help="IDC: how images are decoded")
    return parser.parse_args()


def main():
    options = parse()
    result = results.find(
        options.folder, options.dataset, options.data_path, options.zca, options.factor, options.decode_type
    )
    sets = {stage: synset.load_stage(result, stage) for stage in sorted(result.stages)}
    data = sets[max(sets)]
    refuse_other_beginnings(result, sets)
    tensors = tensors_of(sets)
    about = describe(result, sets)
    out = Path(options.out) if options.out else Path(options.folder) / "export" / options.format
    with formats.replaced(out) as folder:
        formats.write(folder, options.format, tensors, about)
        if options.format == formats.PICTURES:
            report.save_grid(folder / formats.SHEET, tensors["pixels"], data.labels)
    print(f"{out}: {len(data)} pictures of {data.num_classes} classes, stages 1 to {max(sets)}")
    if result.space.facts.zca and "zca_matrix" not in tensors:
        print(
            f"note: without {results.WHITENING} and --data_path the ZCA transform of test pictures is not known; "
            "it is left out"
        )


def refuse_other_beginnings(result, sets):
    """Compare every union with the beginning of the last one.

    Raises:
        UserError: a stage holds other pictures.
    """
    if result.decode_type == "bound":
        return  # decodes the same images otherwise in a larger union
    last = sets[max(sets)]
    for stage, data in sets.items():
        kept = last.stage <= stage
        if not (torch.equal(last.images[kept], data.images) and torch.equal(last.labels[kept], data.labels)):
            raise UserError(
                f"{result.stages[stage]}: expected the pictures that stage {max(sets)} keeps of stages 1 to {stage}, "
                "found others; the stages do not belong together"
            )


def tensors_of(sets):
    """Return the tensors of an export (see utils.formats) of {stage: `DistilledSet`}."""
    last = max(sets)
    data = sets[last]
    tensors = {"images": data.images, "pixels": data.pixels, "labels": data.labels, "stage": data.stage}
    if data.syn_lr is not None:
        rates = [sets[stage].syn_lr if stage in sets else float("nan") for stage in range(1, last + 1)]
        tensors["syn_lr"] = torch.tensor(rates)
    whitening = data.space.whitening
    if whitening:
        tensors["zca_mean"] = whitening["mean_vector"].view(-1)
        tensors["zca_matrix"] = whitening["transform_matrix"]
    return tensors


def describe(result, sets):
    """Return the dict of how {stage: `DistilledSet`} of a `Result` were made."""
    data = sets[max(sets)]
    stages = []
    for stage in range(1, max(sets) + 1):
        known = {}
        if result.method == "PDD+MTT" and stage in sets:
            known = progressive.read_stage(result.stages[stage])
        stages.append(
            {
                "stage": stage,
                "pictures": int((data.stage == stage).sum()),
                "syn_lr": sets[stage].syn_lr if stage in sets else None,
                **{key: known[key] for key in ("best_accuracy", "best_iteration", "select_on") if key in known},
            }
        )
    return {
        **data.about,
        "source": str(result.folder),
        "shape": list(data.images.shape),
        "stages": stages,
        "data": dataclasses.asdict(result.space.facts),
        "export_versions": versions(),
    }


if __name__ == "__main__":
    errors.run(main)
