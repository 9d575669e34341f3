"""Fetch the published files from Google Drive and check them.

    python -m utils.download buffers --out buffers --dataset CIFAR10
    python -m utils.download distilled_mtt --out logged_files
    python -m utils.download distilled_idc --out results

The same command again goes on where a download stopped. A file gets its name when it is complete and loads safely, so
whatever has its name is good; the others end in .download or .part.
"""

import re
from pathlib import Path

import utils.options as o
from utils import errors, files, idc_options, results, synset
from utils.errors import UserError, one_line
from utils.report import Progress, say
from utils.trajectories import buffer_files, load_buffer

# The folders that the authors name in their readme, and where the scripts look by default.
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
    parser = o.Parser(__doc__)
    parser.add_argument("what", choices=tuple(FOLDERS), help="which of the published folders")
    parser.add_argument("--out", help="folder to write (default: where the scripts look)")
    parser.add_argument("--dataset", help="fetch the files of this data set only, such as CIFAR10 or cifar10")
    return parser.parse_args()


def main():
    options = parse()
    identity, default = FOLDERS[options.what]
    out = Path(options.out or default)
    wanted = chosen(listing(identity), options.dataset)
    refused = []
    with files.locked(out):
        for number, (file, path) in enumerate(wanted, 1):
            try:
                fetch(file, out / path, f"[{number}/{len(wanted)}] {path}")
            except BadFile as error:
                say(f"refused: {error}")
                refused.append(str(error))
    for line in advice(options.what, out):
        print(line)
    if refused:
        raise UserError(f"{len(refused)} of {len(wanted)} files refused and removed, the first: {refused[0]}")


class BadFile(UserError):
    """A file that arrived complete and is not what it should be."""


def listing(identity):
    """Return [(identity, path)] of the files in a folder of Google Drive.

    Raises:
        UserError: it cannot be reached.
    """
    import gdown

    with _reaching(f"{URL}{identity}"):
        found = gdown.download_folder(id=identity, output="", quiet=True, skip_download=True, timeout=TIMEOUT)
    if not found:
        raise UserError(f"{URL}{identity}: expected files, found none; look there with a browser")
    return [(file.id, file.path) for file in found]


class _reaching:
    """Turns what gdown raises into one line."""

    def __init__(self, what):
        self.what = what

    def __enter__(self):
        pass

    def __exit__(self, _kind, error, _trace):
        from gdown.exceptions import DownloadError
        from requests.exceptions import HTTPError, RequestException

        if isinstance(error, (DownloadError, HTTPError)):
            raise UserError(
                f"{self.what}: Google Drive does not give all of it ({one_line(error)[:160]}); run the same command "
                "again, it goes on where it stopped; where that does not help, remove the .part or use a browser"
            ) from None
        if isinstance(error, RequestException):
            raise UserError(
                f"{self.what}: Google Drive cannot be reached ({type(error).__name__}); check the connection and run "
                "the same command again, it goes on where it stopped"
            ) from None


def chosen(found, dataset):
    """Return the files of `dataset`, all without one.

    Raises:
        UserError: there are none.
    """
    if not dataset:
        return found
    names = {dataset.lower()}
    for name, (other, *_) in idc_options.DATASETS.items():
        if dataset.lower() in (name, other.lower()):
            names |= {name, other.lower()}

    def matches(part):
        return any(re.fullmatch(rf"{re.escape(name)}(_.*)?", part.lower()) for name in names)

    wanted = [(file, path) for file, path in found if any(matches(part) for part in Path(path).parts[:-1])]
    if not wanted:
        there = sorted({Path(path).parts[0] for _, path in found})
        raise UserError(f"--dataset {dataset}: no such files in this folder; there are {', '.join(there)[:300]}")
    return wanted


def fetch(file, path, label):
    """Download one file of Google Drive to `path`, or go on with it, and check it.

    Raises:
        UserError: the connection is lost, or the disk is full.
        BadFile: the file is damaged, or loading it is unsafe.
    """
    import gdown

    if path.exists():
        say(f"{label}: there already, {size(path)}")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    arriving = path.with_name(f"{path.name}.download")
    with Arrival(path, label) as progress, _reaching(path):
        gdown.download(
            id=file,
            output=str(arriving),
            quiet=True,
            resume=True,
            progress=progress,
            timeout=TIMEOUT,
            retries=RETRIES,
        )
    try:
        check(arriving, path.name)
    except UserError as error:
        arriving.unlink()
        raise BadFile(str(error).replace(str(arriving), str(path))) from None
    arriving.replace(path)
    say(f"{label}: {size(path)}, loads")


class Arrival:
    """Shows how far a large file is; called by gdown with (bytes so far, bytes in all or None)."""

    def __init__(self, path, label):
        self.path, self.label, self.shown = path, label, None

    def __enter__(self):
        return self

    def __call__(self, done, total):
        if total is None or total < MEGABYTE:
            return
        if self.shown is None:
            files.need_disk(self.path.parent, total - done, f"the rest of {self.path.name}")
            self.shown = Progress(total // MEGABYTE, f"{self.label}, MB", done // MEGABYTE)
        self.shown.update(done // MEGABYTE - self.shown.done)

    def __exit__(self, *_):
        if self.shown:
            self.shown.close()


def size(path):
    """Return the size of a file in words."""
    return f"{path.stat().st_size / MEGABYTE:.3g} MB"


def check(path, name):
    """Load a file safely.

    Args:
        path: of the file.
        name: that it will have.

    Raises:
        UserError: it is damaged, unsafe, or not what its name says.
    """
    if re.fullmatch(r"replay_buffer_\d+\.pt", name):
        load_buffer(path, mmap=False)  # all of it, not only what is looked at
    elif results.UNION_FILE.fullmatch(name):
        synset.read_union(path)
    elif match := re.fullmatch(r"(images(?:_zca)?|labels|syn_lr)_\w+\.pt", name):
        synset.read_part(path, match[1].removesuffix("_zca"))
    elif name.endswith(".pt"):
        files.load(path)


def advice(what, out):
    """Return lines that say which options use what lies below `out`."""
    if what == "buffers":
        folders = sorted({path.parent for path in out.rglob("replay_buffer_*.pt")})
        return [
            f"{folder}: {len(buffer_files(folder))} files; distill_mtt.py --buffer_path {folder}" for folder in folders
        ]
    if what == "distilled_idc":
        folders = sorted({path.parent for path in out.rglob("interval_*_data.pt")})
        return [f"{folder}: evaluate_idc.py --override-load-dir {folder}" for folder in folders]
    stages = {path.parent for path in out.rglob("images_best.pt")}
    return [
        _advice_mtt(folder)
        for folder in sorted({s.parent if results.STAGE_FOLDER.fullmatch(s.name) else s for s in stages})
    ]


def _advice_mtt(folder):
    name = results.MTT_NAME.fullmatch(folder.name)
    stages = len(results.stage_folders(folder)) or 1
    if not name:
        return f"{folder}: {stages} stages of unknown options; look at it with utils.export {folder} --dataset …"
    words = f"--dataset {name['dataset']} --model {name['model']} --ipc {name['ipc']}{' --zca' if name['zca'] else ''}"
    words += f" --num_intervals {stages}"
    place = folder.parent
    if place.name == name["dataset"]:
        return f"{folder}: evaluate_mtt.py {words} --save_path {place.parent} --override_load_path {folder.name}"
    return (
        f"{folder}: move it to {place / name['dataset'] / folder.name}, then evaluate_mtt.py {words} "
        f"--save_path {place} --override_load_path {folder.name}"
    )


if __name__ == "__main__":
    errors.run(main)
