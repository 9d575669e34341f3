"""Downloads through gdown as it is, from a Google Drive that lives in this file."""

import io
import re
import shlex
import shutil
import urllib.parse

import pytest
import requests
import torch
import urllib3

from scripts import download
from tests.conftest import EXPERIMENT, STAGES, call, files_of, run_script
from tests.faults.test_damage import RAN, Malice, cut
from utils.results.load import load_distilled


class Drive(requests.adapters.BaseAdapter):
    """Answers requests to Google Drive with the files of local folders."""

    def __init__(self):
        super().__init__()
        self.files, self.folders = {}, {}
        self.asked = []  # (identity of a file, where its bytes begin)
        self.breaks_after = None  # bytes of a file that arrive
        self.offline, self.quota, self.claimed = False, False, None

    def share(self, identity, folder):
        """Offer the contents of `folder` as the Drive folder `identity`."""
        links = []
        for path in sorted(folder.iterdir()):
            child = f"{len(self.files) + len(self.folders):033d}"
            kind = "drive/folders/{}" if path.is_dir() else "file/d/{}/view"
            links.append(f'<a href="https://drive.google.com/{kind.format(child)}">{path.name}</a>')
            if path.is_dir():
                self.folders[child] = ""
                self.share(child, path)
            else:
                self.files[child] = path
        self.folders[identity] = f"<html><title>{folder.name}</title>{''.join(links)}</html>"

    def send(self, request, **_):
        if self.offline:
            raise requests.exceptions.ConnectionError("Failed to resolve 'drive.google.com'")
        address = urllib.parse.urlsplit(request.url)
        identity = urllib.parse.parse_qs(address.query)["id"][0]
        if address.path == "/embeddedfolderview":
            return self.answer(request, self.folders[identity].encode(), {"Content-Type": "text/html"})
        if self.quota:
            page = '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>'
            return self.answer(request, page.encode(), {"Content-Type": "text/html"})
        return self.send_file(request, identity)

    def send_file(self, request, identity):
        content = self.files[identity].read_bytes()
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f'attachment; filename="{self.files[identity].name}"',
            "Last-Modified": "Wed, 01 May 2024 10:00:00 GMT",
        }
        first, status = 0, 200
        if part := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
            first, status = int(part[1]), 206
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = str(self.claimed or len(content) - first)
        self.asked.append((identity, first))
        body = content[first:]
        return self.answer(request, body if self.breaks_after is None else body[: self.breaks_after], headers, status)

    @staticmethod
    def answer(request, body, headers, status=200):
        answer = requests.Response()
        answer.status_code, answer.url, answer.request = status, request.url, request
        answer.headers = requests.structures.CaseInsensitiveDict(headers)
        answer.raw = urllib3.HTTPResponse(io.BytesIO(body), headers=headers, status=status, preload_content=False,
                                          enforce_content_length=False)  # fmt: skip
        return answer

    def close(self):
        pass


@pytest.fixture
def drive(monkeypatch, tmp_path):
    drive = Drive()
    monkeypatch.setattr(requests.Session, "get_adapter", lambda self, url: drive)
    monkeypatch.setattr(download, "RETRIES", 0)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return drive


@pytest.fixture
def shared(tmp_path, buffers, drive):
    """The experts on Digits, and the same files under another data set's name, as a shared folder of buffers."""
    for name in ("Digits", "Digits100"):
        shutil.copytree(buffers / "Digits" / "ConvNetW32", tmp_path / "drive" / name / "ConvNetW32",
                        ignore=shutil.ignore_patterns(".lock", "*.json"))  # fmt: skip
    drive.share(download.FOLDERS["buffers"][0], tmp_path / "drive")
    return tmp_path / "drive"


@pytest.fixture
def fetched(tmp_path, capsys, monkeypatch):
    """Downloads; returns (exit status, stdout, stderr, folder)."""

    def run(what, *extra):
        out, printed = tmp_path / "out", io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", printed)
            status, message = call("scripts.download", what, "--out", out, *extra, capsys=capsys, monkeypatch=patch)
        return status, printed.getvalue(), message, out

    return run


def plain(folder):
    return {name: content for name, content in files_of(folder).items() if not name.endswith(".lock")}


def test_buffers_arrive_and_are_named_for_the_next_script(shared, drive, fetched):
    status, printed, message, out = fetched("buffers")
    assert status == 0 and plain(out) == plain(shared)
    assert "[1/4] Digits/ConvNetW32/replay_buffer_0.pt: " in message and "kB, loads" in message
    assert f"{out}/Digits/ConvNetW32: 2 files; distill_mtt.py --buffer_path {out}/Digits/ConvNetW32\n" in printed
    drive.asked.clear()
    status, _, message, _ = fetched("buffers")
    assert status == 0 and drive.asked == [] and message.count("there already") == 4
    words = printed.split("distill_mtt.py ")[1].splitlines()[0].split()
    done = run_script("distill_mtt.py", *STAGES, *words, "--root_log_dir", out, "--dry_run")
    assert f"input   experts: {out}/Digits/ConvNetW32" in done.stdout


def test_one_data_set(shared, fetched):
    status, _, _, out = fetched("buffers", "--dataset", "digits")
    assert status == 0 and set(plain(out)) == {f"Digits/ConvNetW32/replay_buffer_{n}.pt" for n in (0, 1)}
    status, _, message, _ = fetched("buffers", "--dataset", "CIFAR10")
    assert status == 2 and message.endswith("no such files in this folder; there are Digits, Digits100\n")


def test_an_interrupted_download_goes_on(shared, drive, fetched):
    original = (shared / "Digits" / "ConvNetW32" / "replay_buffer_0.pt").read_bytes()
    drive.breaks_after = len(original) // 2
    status, _, message, out = fetched("buffers", "--dataset", "Digits")
    folder = out / "Digits" / "ConvNetW32"
    (part,) = folder.iterdir()
    assert status == 2 and message.count("\n") == 1 and "Google Drive does not give all of it" in message
    assert part.suffix == ".part" and part.read_bytes() == original[: len(original) // 2]
    drive.breaks_after, begun = None, len(drive.asked)
    status, _, _, _ = fetched("buffers", "--dataset", "Digits")
    assert status == 0 and plain(out / "Digits") == plain(shared / "Digits")
    assert len(original) // 2 in [first for _, first in drive.asked[begun:]]


def test_a_file_that_arrived_but_was_not_checked_is_not_fetched_again(shared, drive, fetched, tmp_path):
    folder = tmp_path / "out" / "Digits" / "ConvNetW32"
    folder.mkdir(parents=True)
    shutil.copy(shared / "Digits" / "ConvNetW32" / "replay_buffer_1.pt", folder / "replay_buffer_1.pt.download")
    status, _, _, out = fetched("buffers", "--dataset", "Digits")
    assert status == 0 and plain(out / "Digits") == plain(shared / "Digits")


@pytest.mark.parametrize(
    "damage,words",
    [
        (cut, "damaged or cut-off"),
        (lambda p: p.write_bytes(b"<html>quota</html>"), "expected a replay buffer"),
        (lambda p: torch.save([Malice()], p), "asks to run code"),
        (lambda p: torch.save(torch.zeros(3), p), "expected a replay buffer"),
    ],
)
def test_a_bad_file_is_refused_and_the_others_arrive(damage, words, shared, fetched):
    path = shared / "Digits" / "ConvNetW32" / "replay_buffer_0.pt"
    damage(path)
    status, _, message, out = fetched("buffers")
    last = message.splitlines()[-1]
    assert status == 2 and last.startswith("error: 1 of 4 files refused and removed, the first: ")
    assert f"{out}/Digits/ConvNetW32/replay_buffer_0.pt: " in last and re.search(words, last)
    assert set(plain(out)) == set(plain(shared)) - {"Digits/ConvNetW32/replay_buffer_0.pt"}
    assert not RAN.exists()


@pytest.mark.parametrize("what", list(download.FOLDERS))
def test_offline_one_line_and_nothing_written(what, drive, fetched):
    drive.offline = True
    status, printed, message, out = fetched(what)
    assert status == 2 and printed == "" and message.count("\n") == 1
    assert re.match(r"error: https://drive.google.com/drive/folders/\S+: Google Drive cannot be reached", message)
    assert not out.exists()


def test_a_lost_connection_and_a_quota_stop_with_one_line(shared, drive, fetched, monkeypatch):
    drive.quota = True
    status, _, message, _ = fetched("buffers")
    assert status == 2 and message.count("\n") == 1 and "Too many users have viewed" in message
    drive.quota, drive.claimed = False, 10**18
    status, _, message, out = fetched("buffers")
    assert status == 2 and message.count("\n") == 1 and "replay_buffer_0.pt need 1000000000.0 GB" in message
    monkeypatch.setattr(drive, "send_file", lambda *_: (_ for _ in ()).throw(requests.exceptions.ReadTimeout()))
    status, _, message, out = fetched("buffers")
    assert status == 2 and message.count("\n") == 1 and "cannot be reached (ReadTimeout)" in message
    assert not list(out.rglob("*.pt"))


def test_large_files_show_their_progress(drive, fetched, tmp_path):
    folder = tmp_path / "drive" / "CIFAR10"
    folder.mkdir(parents=True)
    torch.save([[[torch.zeros(1_500_000)]]], folder / "replay_buffer_0.pt")
    drive.share(download.FOLDERS["buffers"][0], tmp_path / "drive")
    status, _, message, _ = fetched("buffers")
    assert status == 0 and "[1/1] CIFAR10/replay_buffer_0.pt, MB 6/6" in message and "6.0 MB, loads" in message


def test_distilled_sets_arrive_and_evaluate(distilled, drive, fetched, tmp_path):
    published = tmp_path / "drive"
    for stage in sorted(distilled.glob("interval*")):
        for path in stage.glob("*_best.pt"):
            target = published / "Digits" / EXPERIMENT / stage.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    drive.share(download.FOLDERS["distilled_mtt"][0], published)
    status, printed, _, out = fetched("distilled_mtt")
    assert status == 0 and plain(out) == plain(published)
    command = shlex.split(printed.split("evaluate_mtt.py ")[1])
    done = run_script("evaluate_mtt.py", *command, "--num_experts", 1, "--epoch_eval_train", 1, "--skip_full",
                      "--skip_random")  # fmt: skip
    assert "stage 1-3" in done.stdout
    assert len(load_distilled(out / "Digits" / EXPERIMENT)) == 30


def test_advice_for_folders_in_other_places(tmp_path):
    for name in (EXPERIMENT, "mine"):
        (tmp_path / name / "interval1_epoch1-2").mkdir(parents=True)
        (tmp_path / name / "interval1_epoch1-2" / "images_best.pt").touch()
    first, second = download.advice("distilled_mtt", tmp_path)
    assert first.startswith(f"{tmp_path}/{EXPERIMENT}: move it to {tmp_path}/Digits/{EXPERIMENT}, then evaluate_mtt.py")
    assert second.startswith(f"{tmp_path}/mine: 1 stages of unknown options")
    (tmp_path / "interval_0_data.pt").touch()
    assert download.advice("distilled_idc", tmp_path) == [f"{tmp_path}: evaluate_idc.py --override-load-dir {tmp_path}"]


def test_idc_files_arrive(drive, fetched, tmp_path):
    folder = (
        tmp_path / "drive" / "cifar10" / "conv3in_progressive_grad_mse_nd2000_cut_niter2000_factor2_lr0.005_mix_ipc2"
    )
    folder.mkdir(parents=True)
    torch.save([torch.rand(20, 3, 32, 32), torch.arange(10).repeat_interleave(2)], folder / "interval_0_data.pt")
    (folder / "log.txt").write_text("a log\n")
    drive.share(download.FOLDERS["distilled_idc"][0], tmp_path / "drive")
    status, printed, _, out = fetched("distilled_idc", "--dataset", "CIFAR10")
    assert status == 0 and plain(out) == plain(tmp_path / "drive")
    words = "-d cifar10 -f 2 --decode_type single"
    assert f"evaluate_idc.py {words} --override-load-dir {out}/cifar10/{folder.name}\n" in printed
    assert len(load_distilled(out / "cifar10" / folder.name)) == 80
