"""--select_on val: held-out training images choose the best iteration; the test set is only reported."""

import json
import shutil

import pytest
import torch

import distill_idc
from tests.conftest import EXPERIMENT, EXPERTS, SHORT, STAGES, call, files_of
from tests.runs.test_idc import SHORT as IDC
from utils import training
from utils.data import datasets
from utils.run import files
from utils.trajectories import held_out_fraction, load_buffer

VAL = ["--select_on", "val", "--val_fraction", "0.2"]
HELD_OUT_NOW = "these experts have seen images that are held out now"  # of a warning
ALONE = ["--skip_random", "--skip_full"]


def digits():
    return datasets.load("Digits", "", torch.device("cpu"))


def rows(images):
    return {tuple(x.flatten().tolist()) for x in images.images}


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a script in this process; returns (exit status, stderr)."""
    return lambda script, *words: call(script, *words, capsys=capsys, monkeypatch=monkeypatch)


class Unseen:
    """An `ImageDataset` of which nobody may take an image."""

    def __init__(self, images):
        self.labels = images.labels

    def __len__(self):
        return len(self.labels)

    @property
    def images(self):
        raise AssertionError("an image of the test set was used")

    def batch(self, index):
        return self.images


@pytest.fixture
def without_test(monkeypatch):
    """Data whose test images nobody may look at."""
    original = datasets.load

    def load(*arguments, **options):
        real = original(*arguments, **options)
        real.test = Unseen(real.test)
        return real

    monkeypatch.setattr(datasets, "load", load)


@pytest.fixture
def seen(monkeypatch):
    """The real images that trainings see, a set; measuring an accuracy on them does not count."""
    images, measuring = set(), []
    batch, accuracy = datasets.ImageDataset.batch, training.accuracy

    def noted(self, index):
        if self.images.dtype == torch.uint8 and not measuring:
            images.update(tuple(x.flatten().tolist()) for x in self.images[index])
        return batch(self, index)

    def measured(*arguments):
        measuring.append(True)
        try:
            return accuracy(*arguments)
        finally:
            measuring.pop()

    monkeypatch.setattr(datasets.ImageDataset, "batch", noted)
    monkeypatch.setattr(training, "accuracy", measured)
    return images


@pytest.fixture
def measured_on(monkeypatch):
    """The sizes of the sets on which accuracies are measured, a set."""
    found, accuracy = set(), training.accuracy
    monkeypatch.setattr(training, "accuracy", lambda *given: found.add(len(given[1])) or accuracy(*given))
    return found


def test_mtt_looks_at_neither_test_nor_held_out_images(buffers, tmp_path, without_test, seen, measured_on, run):
    """Neither for the first images nor in a transition: the held-out ones are for evaluations alone."""
    part = digits().held_out(0.2)
    words = [*STAGES, *SHORT, *VAL, "--num_intervals", 2, "--buffer_path", buffers, "--root_log_dir", tmp_path]
    status, message = run("distill_mtt.py", *words)
    assert status == 0, message
    assert seen and not seen & (rows(part.selection) - rows(part.train))
    assert measured_on == {len(part.selection)}
    assert "held-out accuracy" in message and "test accuracy" not in message
    assert message.count(HELD_OUT_NOW) == 1
    for path in tmp_path.rglob("stage.json"):
        known = json.loads(path.read_text())
        assert known["select_on"] == "val" and known["val_fraction"] == 0.2


def test_experts_that_saw_none_of_them(tmp_path, seen, run):
    words = [*EXPERTS, "--num_experts", 1, "--train_epochs", 4, "--buffer_path", tmp_path / "b"]
    assert run("buffer_mtt.py", *words, "--val_fraction", 0.3)[0] == 0
    assert seen <= rows(digits().held_out(0.3).train)
    (folder,) = (path.parent for path in (tmp_path / "b").rglob("replay_buffer_0.pt"))
    assert held_out_fraction(folder) == 0.3 and len(load_buffer(folder / "replay_buffer_0.pt")) == 1
    words = [*STAGES, *SHORT, "--num_intervals", 1, "--buffer_path", tmp_path / "b", "--root_log_dir", tmp_path]
    status, message = run("distill_mtt.py", *words, *VAL)
    assert status == 0 and HELD_OUT_NOW not in message
    status, message = run("distill_mtt.py", *words, *VAL, "--val_fraction", 0.4, "--tag", "x")
    assert status == 0 and message.count(HELD_OUT_NOW) == 1


@pytest.mark.parametrize("script", ["distill_mtt.py", "distill_idc.py", "distill_dm.py"])
def test_no_held_out_images_are_refused(script, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    data = "Digits" if script == "distill_mtt.py" else "digits"
    status, message = run(script, "--dataset", data, "--ipc", 1, "--select_on", "val", "--val_fraction", 0)
    assert status == 2 and "--select_on val: expected --val_fraction above 0, found 0" in message


def test_idc_looks_at_neither_test_nor_held_out_images(tmp_path, without_test, seen, measured_on, run, monkeypatch):
    part, matched = digits().held_out(0.2), []

    class Noted(distill_idc.GradientMatcher):
        def __init__(self, real, *rest):
            super().__init__(real, *rest)
            matched.append(real)

    monkeypatch.setattr(distill_idc, "GradientMatcher", Noted)
    words = [*IDC, "--num-intervals", 2, "--early", 1, *VAL, "--results", tmp_path]
    status, message = run("distill_idc.py", *words)
    assert status == 0, message
    assert seen and not seen & (rows(part.selection) - rows(part.train))
    assert measured_on == {len(part.selection)} and "held-out accuracy" in message
    assert len(matched) == 2 and all(torch.equal(real.train.images, part.train.images) for real in matched)
    assert all(max(map(max, real.class_indices)) < len(real.train) for real in matched)
    for stage in (0, 1):
        (path,) = tmp_path.rglob(f"interval_{stage}.json")
        known = json.loads(path.read_text())
        assert known["select_on"] == "val" and known["val_fraction"] == 0.2


def evaluate(script, words, folder, capsys, monkeypatch):
    """Return the printed table and the report."""
    from importlib import import_module

    monkeypatch.setattr("sys.argv", [script, *map(str, words)])
    capsys.readouterr()
    import_module(script.removesuffix(".py")).main()
    return capsys.readouterr().out, json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    "summary,kind,line",
    [
        ({}, "test", "selected on: the test set"),
        ({"select_on": "val", "val_fraction": 0.1}, "test, val", "selected on: the test set, held-out training"),
        (None, "test, unknown", "selected on: the test set, unknown"),
    ],
)
def test_the_report_says_what_was_selected_on(summary, kind, line, buffers, distilled, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "Digits" / EXPERIMENT
    shutil.copytree(distilled, folder)
    path = folder / "interval1_epoch1-2" / "stage.json"
    if summary is None:  # as the published code leaves a stage
        path.unlink()
        path.with_name("metrics.jsonl").unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | summary))
    words = [*STAGES, "--num_experts", 1, "--epoch_eval_train", 1, *ALONE, "--buffer_path", buffers, "--save_path",
             tmp_path]  # fmt: skip
    printed, report = evaluate("evaluate_mtt.py", words, folder, capsys, monkeypatch)
    assert report["select_on"] == kind and line in printed


def test_the_report_of_idc_says_it_too(tmp_path, run, capsys, monkeypatch):
    words = [*IDC, "--num-intervals", 1, "--results", tmp_path]
    assert run("distill_idc.py", *words, *VAL)[0] == 0
    (folder,) = (path.parent for path in tmp_path.rglob("interval_0.json"))
    words += ["--epochs", 1, *ALONE]
    printed, report = evaluate("evaluate_idc.py", words, folder, capsys, monkeypatch)
    assert report["select_on"] == "val"
    assert "kept: the last iteration; watched on: held-out training images" in printed
    for name in ("interval_0.json", "interval_0_metrics.jsonl"):  # which the published code does not write
        (folder / name).unlink()
    assert evaluate("evaluate_idc.py", words, folder, capsys, monkeypatch)[1]["select_on"] == "unknown"


def test_folders_made_before_the_option_continue_as_they_were_made(buffers, tmp_path, run):
    words = [*STAGES, *SHORT, "--num_intervals", 1, "--buffer_path", buffers, "--root_log_dir", tmp_path]
    assert run("distill_mtt.py", *words)[0] == 0
    (config,) = tmp_path.rglob("config.json")
    value = json.loads(config.read_text())
    for name in ("select_on", "val_fraction"):
        del value["options"][name]
    files.write_json(config, value)
    before = files_of(tmp_path)
    status, message = run("distill_mtt.py", *words)
    assert status == 0 and "done already" in message
    status, message = run("distill_mtt.py", *words, *VAL)
    assert status == 2 and "select_on test there, val now" in message
    assert files_of(tmp_path) == before


def test_buffers_made_before_the_option_keep_all_images(buffers, tmp_path, run):
    shutil.copytree(buffers, tmp_path / "b")
    (about,) = (tmp_path / "b").rglob("buffer.json")
    value = json.loads(about.read_text())
    del value["options"]["val_fraction"]
    files.write_json(about, value)
    words = [*EXPERTS, "--num_experts", 3, "--save_interval", 2, "--train_epochs", 4, "--buffer_path", tmp_path / "b"]
    assert run("buffer_mtt.py", *words)[0] == 0
    status, message = run("buffer_mtt.py", *words, "--val_fraction", 0.1)
    assert status == 2 and "val_fraction 0.0 there, 0.1 now" in message


def test_pretrained_networks_of_the_two_kinds_are_different_files(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for extra in ([], VAL):
        assert run("distill_idc.py", *IDC, "--pt_from", 1, "--pretrain", *extra)[0] == 0
    names = {path.name for path in tmp_path.rglob("*.pt")}
    assert names == {"network_0_epoch1.pt", "network_0_epoch1_val0.2.pt"}
