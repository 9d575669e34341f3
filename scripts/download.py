"""Download the authors' published files from Google Drive and check them.

    python scripts/download.py buffers --out buffers --dataset CIFAR10
    python scripts/download.py distilled_mtt --out logged_files
    python scripts/download.py distilled_idc --out results

The same command again continues an interrupted download. A file gets its name once it is complete and has loaded
safely; files that end in .download or .part have not.
"""

import contextlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import synthetic
from utils.data.info import IDC_NAMES
from utils.options import Parser
from utils.results import known
from utils.results.names import STAGE_FOLDER, mtt_stages
from utils.run import errors, files
from utils.run.errors import UserError, one_line
from utils.run.log import Progress, log0, print0
from utils.trajectories import buffer_files, load_buffer

# The folders that the authors name in their readme, and the scripts' default folders.
FOLDERS = {
    "buffers": ("1ZKamN6ledxEnmLyya4Mbl57Fu_H1Axb6", "buffers"),
    "distilled_mtt": ("1OKnCiKO78-MOuMXRJWGyE3uV69t2kIMV", "logged_files"),
    "distilled_idc": ("1uyrRHFt5MX_cnZFKOFJ8ouE_Vtt7_Fg9", "results"),
}
URL = "https://drive.google.com/drive/folders/"
TIMEOUT = (5, 60)  # seconds to connect, and between two bytes
RETRIES = 3
MEGABYTE = 10**6


def parse():
    parser = Parser(__doc__)
    parser.add_argument("what", choices=tuple(FOLDERS), help="which of the published folders")
    parser.add_argument("--out", help="folder to write (default: buffers, logged_files or results)")
    parser.add_argument("--dataset", help="only the files of this data set, such as CIFAR10 or cifar10")
    return parser.parse_args()


def main():
    args = parse()
    folder_id, default = FOLDERS[args.what]
    out = Path(args.out or default)
    wanted = select(list_files(folder_id), args.dataset)
    refused = []
    with files.locked(out, alone=False):  # other scripts may write below it
        for number, (file_id, path) in enumerate(wanted, 1):
            refused += fetch(file_id, out / path, f"[{number}/{len(wanted)}] {path}")
    for line in advice(args.what, out):
        print0(line)
    if refused:
        raise UserError(f"{len(refused)} of {len(wanted)} files refused and removed, the first: {refused[0]}")


@contextlib.contextmanager
def one_line_errors(what):
    """Turn what gdown raises about `what` into a `UserError`."""
    from gdown.exceptions import DownloadError
    from requests.exceptions import HTTPError, RequestException

    try:
        yield
    except (DownloadError, HTTPError) as error:
        raise UserError(
            f"{what}: Google Drive does not give all of it ({one_line(error)[:160]}); run the same command again to "
            "continue; if that does not help, remove the .part or use a browser"
        ) from None
    except RequestException as error:
        raise UserError(
            f"{what}: Google Drive cannot be reached ({type(error).__name__}); check the connection and run the same "
            "command again to continue"
        ) from None


def list_files(folder_id):
    """Return [(id, path)] of the files in a folder of Google Drive.

    Raises:
        UserError: it cannot be reached.
    """
    import gdown

    with one_line_errors(f"{URL}{folder_id}"):
        found = gdown.download_folder(id=folder_id, output="", quiet=True, skip_download=True, timeout=TIMEOUT)
    if not found:
        raise UserError(f"{URL}{folder_id}: expected files, found none; look there with a browser")
    return [(file.id, file.path) for file in found]


def select(found, dataset):
    """Return the files [(id, path)] of `dataset`, by either of its names; all if it is None.

    Raises:
        UserError: there are none.
    """
    if not dataset:
        return found
    pairs = [{idc_name.lower(), name.lower()} for idc_name, name in IDC_NAMES.items()]
    names = next((pair for pair in pairs if dataset.lower() in pair), {dataset.lower()})
    pattern = re.compile(rf"({'|'.join(map(re.escape, names))})(_.*)?")
    wanted = [(id, path) for id, path in found if any(pattern.fullmatch(p.lower()) for p in Path(path).parts[:-1])]
    if not wanted:
        there = sorted({Path(path).parts[0] for _, path in found})
        raise UserError(f"--dataset {dataset}: no such files in this folder; there are {', '.join(there)[:300]}")
    return wanted


def fetch(file_id, path, label):
    """Download one file to `path`, or continue, and check it; returns [why it was refused and removed] or [].

    gdown.download_folder can neither leave files out nor have them checked before they get their names.

    Raises:
        UserError: the connection is lost, or the disk is full.
    """
    import gdown

    if path.exists():
        log0(f"{label}: there already, {files.human_bytes(path.stat().st_size)}")
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    arrived = path.with_name(f"{path.name}.download")
    bar = None

    def progress(done, total):
        nonlocal bar
        if total and total >= MEGABYTE:
            if bar is None:
                files.need_disk(path.parent, total - done, f"the rest of {path.name}")
                bar = Progress(total // MEGABYTE, f"{label}, MB", done // MEGABYTE)
                stack.callback(bar.close)
            bar.update(done // MEGABYTE - bar.bar.n)

    settings = {"quiet": True, "resume": True, "timeout": TIMEOUT, "retries": RETRIES, "progress": progress}
    with one_line_errors(path), contextlib.ExitStack() as stack:
        gdown.download(id=file_id, output=str(arrived), **settings)
    try:
        check(arrived, path.name)
    except UserError as error:
        arrived.unlink()
        reason = str(error).replace(str(arrived), str(path))
        log0(f"refused: {reason}")
        return [reason]
    arrived.replace(path)
    log0(f"{label}: {files.human_bytes(path.stat().st_size)}, loads")
    return []


def check(path, name):
    """Load a file safely, as its name `name` asks.

    Raises:
        UserError: it is damaged, unsafe, or not what its name says.
    """
    if re.fullmatch(r"replay_buffer_\d+\.pt", name):
        load_buffer(path, mmap=False)  # reads all of it
    elif known.IDC_FILE.fullmatch(name):
        synthetic.read_idc(path)
    elif match := re.fullmatch(r"(images(?:_zca)?|labels|syn_lr)_\w+\.pt", name):
        synthetic.read_mtt_part(path, match[1].removesuffix("_zca"))
    elif name.endswith(".pt"):
        files.load(path)


def advice(what, out):
    """Return lines that say which options use what lies below `out`."""
    if what == "buffers":
        folders = sorted({path.parent for path in out.rglob("replay_buffer_*.pt")})
        return [f"{path}: {len(buffer_files(path))} files; distill_mtt.py --buffer_path {path}" for path in folders]
    if what == "distilled_idc":
        folders = sorted({path.parent for path in out.rglob("interval_*_data.pt")})
        return [f"{path}: evaluate_idc.py{_options_idc(path)} --override-load-dir {path}" for path in folders]
    stages = {path.parent for path in out.rglob("images_best.pt")}
    folders = sorted({path.parent if STAGE_FOLDER.fullmatch(path.name) else path for path in stages})
    return [_advice_mtt(folder) for folder in folders]


def _options_idc(folder):
    names = {"dataset": "-d", "factor": "-f", "decode_type": "--decode_type"}
    return "".join(f" {names[option]} {value}" for option, value in known.parse_idc_name(folder).items())


def _advice_mtt(folder):
    name, stages = known.MTT_NAME.fullmatch(folder.name), len(mtt_stages(folder)) or 1
    if not name:
        return f"{folder}: {stages} stages of unknown options; try python scripts/export.py {folder} --dataset …"
    words = f"--dataset {name['dataset']} --model {name['model']} --ipc {name['ipc']}{' --zca' if name['zca'] else ''}"
    root, place = folder.parent, folder.parent / name["dataset"] / folder.name
    first = f"move it to {place}, then "
    if root.name == name["dataset"]:
        root, first = root.parent, ""
    return (
        f"{folder}: {first}evaluate_mtt.py {words} --num_intervals {stages} --save_path {root} "
        f"--override_load_path {folder.name}"
    )


if __name__ == "__main__":
    errors.run(main)
