"""Held-out training pictures choose the best iteration (--select_on val); the test set is only reported then."""

import json

import numpy as np
import pytest
import torch

import distill_idc
import distill_mtt
from tests.conftest import EXPERIMENT, EXPERTS, SHORT, STAGES, call, files_of
from tests.test_idc import SHORT as IDC
from utils import datasets, files, synset
from utils.errors import UserError
from utils.trajectories import held_out_share, load_buffer

VAL = ["--select_on", "val", "--val_fraction", "0.2"]
TWO = ["--num_intervals", "2"]


def digits():
    return datasets.load("Digits", "", torch.device("cpu"))


def rows(source):
    return {tuple(x.flatten().tolist()) for x in source.images}


def test_the_split_is_stratified_and_leaves_nothing_on_both_sides():
    real, part = digits(), digits().held_out(0.2)
    assert real.selection is real.test
    assert len(part.train) + len(part.selection) == len(real.train) == 1437
    for label in range(10):
        total = int((real.train.labels == label).sum())
        assert int((part.selection.labels == label).sum()) == round(0.2 * total)
        assert (part.train.labels[part.class_indices[label]] == label).all()
    assert sum(map(len, part.class_indices)) == len(part.train)
    # One picture stands twice among the digits' training pictures.
    assert len(rows(part.train) & rows(part.selection)) <= len(real.train) - len(rows(real.train))
    assert torch.equal(part.test.images, real.test.images)
    held, kept = part.selection.batch(slice(0, 3))[0], real.train.batch(slice(0, 3))[0]
    assert held.dtype == kept.dtype and held.shape == kept.shape and held.min() < 0


def test_larger_shares_hold_out_the_pictures_of_smaller_ones():
    small, large = digits().held_out(0.1), digits().held_out(0.3)
    assert rows(small.selection) < rows(large.selection)
    assert torch.equal(small.selection.images, digits().held_out(0.1).selection.images)
    assert digits().held_out(0.0).selection is not None and len(digits().held_out(0.0).train) == 1437


@pytest.mark.parametrize("fraction", [0.001, 0.999, 1.0])
def test_shares_that_empty_a_class_are_refused(fraction):
    with pytest.raises(UserError, match=r"--val_fraction .*: expected a share that holds out some of the"):
        digits().held_out(fraction)


def test_whitened_pictures_are_held_out_in_the_same_space(cifar_tree):
    real = datasets.load("CIFAR10", cifar_tree, torch.device("cpu"), whiten=True)
    part = real.held_out(0.25)
    assert len(part.train) == 90 and len(part.selection) == 30
    assert rows(part.train) | rows(part.selection) == rows(real.train)
    pixels = part.to_pixels(part.selection.batch(slice(None))[0])
    assert pixels.min() > -0.1 and pixels.max() < 1.1


class Spy:
    """Stands for a `Source` of which nobody may take a picture."""

    def __init__(self, source):
        self.labels = source.labels

    def __len__(self):
        return len(self.labels)

    @property
    def images(self):
        raise AssertionError("a picture of the test set was used")

    def batch(self, index):
        return self.images


@pytest.fixture
def without_test(monkeypatch):
    """Data whose test pictures nobody may look at."""
    original = datasets.load

    def load(*arguments, **options):
        real = original(*arguments, **options)
        real.test = Spy(real.test)
        return real

    monkeypatch.setattr(datasets, "load", load)


@pytest.fixture
def everything(monkeypatch):
    """Collects the pictures that any training on real data sees."""
    seen, original = set(), datasets.Source.batch

    def batch(self, index):
        seen.update(tuple(x.flatten().tolist()) for x in self.images[index] if self.images.dtype == torch.uint8)
        return original(self, index)

    monkeypatch.setattr(datasets.Source, "batch", batch)
    return seen


def test_mtt_looks_at_neither_test_nor_held_out_pictures(buffers, tmp_path, without_test, everything, capsys,
                                                         monkeypatch):  # fmt: skip
    """Neither for starting pictures nor in a transition; held-out ones serve evaluations alone."""
    held = rows(digits().held_out(0.2).selection) - rows(digits().held_out(0.2).train)
    accuracy, during = distill_mtt.training.accuracy, []

    def measured(network, source, **options):
        before = set(everything)
        value = accuracy(network, source, **options)
        during.append(len(source))
        everything.clear(), everything.update(before)
        return value

    monkeypatch.setattr(distill_mtt.training, "accuracy", measured)
    words = [*STAGES, *SHORT, *TWO, *VAL, "--buffer_path", buffers, "--root_log_dir", tmp_path]
    status, message = call("distill_mtt.py", *words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0, message
    assert everything and not everything & held
    assert set(during) == {len(digits().held_out(0.2).selection)}
    assert "held-out accuracy" in message and "test accuracy" not in message
    warnings = [line for line in message.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "have seen pictures that are held out now" in warnings[0]
    for path in tmp_path.rglob("stage.json"):
        known = json.loads(path.read_text())
        assert known["select_on"] == "val" and known["val_fraction"] == 0.2


def test_experts_that_saw_none_of_them(tmp_path, everything, capsys, monkeypatch):
    options = {"capsys": capsys, "monkeypatch": monkeypatch}
    words = [*EXPERTS, "--num_experts", 1, "--train_epochs", 4, "--buffer_path", tmp_path / "b"]
    assert call("buffer_mtt.py", *words, "--val_fraction", 0.3, **options)[0] == 0
    # Its report of the test accuracy looks at the test set, the training at no held-out picture.
    part = digits().held_out(0.3)
    assert everything <= rows(part.train) | rows(part.test)
    (folder,) = (path.parent for path in (tmp_path / "b").rglob("replay_buffer_0.pt"))
    assert held_out_share(folder) == 0.3 and len(load_buffer(folder / "replay_buffer_0.pt")) == 1
    words = [*STAGES, *SHORT, "--num_intervals", 1, "--buffer_path", tmp_path / "b", "--root_log_dir", tmp_path]
    status, message = call("distill_mtt.py", *words, *VAL, **options)
    assert status == 0 and "warning" not in message
    status, message = call("distill_mtt.py", *words, *VAL, "--val_fraction", 0.4, "--tag", "x", **options)
    assert status == 0 and message.count("warning: ") == 1


def test_idc_looks_at_neither_test_nor_held_out_pictures(tmp_path, without_test, capsys, monkeypatch):
    part = digits().held_out(0.2)
    sizes, accuracy = set(), distill_idc.training.accuracy
    learner, seen = distill_idc.Learner, []

    class Spied(learner):
        def __init__(self, run, *rest):
            super().__init__(run, *rest)
            seen.append(run.real)

    monkeypatch.setattr(distill_idc, "Learner", Spied)
    monkeypatch.setattr(distill_idc.training, "accuracy", lambda n, s: sizes.add(len(s)) or accuracy(n, s))
    words = [*IDC, "--num-intervals", 2, "--batch_real", 8, "--early", 1, *VAL, "--results", tmp_path]
    status, message = call("distill_idc.py", *words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0, message
    assert sizes == {len(part.selection)} and "held-out accuracy" in message
    assert all(torch.equal(real.train.images, part.train.images) for real in seen)
    assert all(max(map(max, real.class_indices)) < len(real.train) for real in seen)
    for stage in (0, 1):
        (path,) = tmp_path.rglob(f"interval_{stage}.json")
        known = json.loads(path.read_text())
        assert known["select_on"] == "val" and known["val_fraction"] == 0.2


def test_starting_pictures_are_kept_ones():
    part = digits().held_out(0.5)
    images, labels = synset.new_subset(part, 20, "real", 0, 1)
    pixels = {tuple(x.flatten().tolist()) for x in (part.to_pixels(images) * 255).round()}
    assert pixels <= rows(part.train) and len(labels) == 200
    for index in (part.random_indices(3, 30, np.random.default_rng(0)),):
        assert (part.train.labels[index] == 3).all()


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
    import shutil

    folder = tmp_path / "Digits" / EXPERIMENT
    shutil.copytree(distilled, folder)
    path = folder / "interval1_epoch1-2" / "stage.json"
    if summary is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | summary))
    words = [*STAGES, "--num_experts", 1, "--epoch_eval_train", 1, "--skip_random", "--skip_full", "--buffer_path",
             buffers, "--save_path", tmp_path]  # fmt: skip
    printed, report = evaluate("evaluate_mtt.py", words, folder, capsys, monkeypatch)
    assert report["select_on"] == kind and line in printed


def test_the_report_of_idc_says_it_too(tmp_path, capsys, monkeypatch):
    words = [*IDC, "--num-intervals", 1, "--batch_real", 8, "--results", tmp_path]
    assert call("distill_idc.py", *words, *VAL, capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    (folder,) = (path.parent for path in tmp_path.rglob("interval_0.json"))
    words += ["--epochs", 1, "--skip_random", "--skip_full"]
    printed, report = evaluate("evaluate_idc.py", words, folder, capsys, monkeypatch)
    assert (
        report["select_on"] == "val" and "kept: the last iteration; watched on: held-out training pictures" in printed
    )
    (folder / "interval_0.json").unlink()
    assert evaluate("evaluate_idc.py", words, folder, capsys, monkeypatch)[1]["select_on"] == "unknown"


def test_folders_made_before_the_option_continue_as_they_were_made(buffers, tmp_path, capsys, monkeypatch):
    options = {"capsys": capsys, "monkeypatch": monkeypatch}
    words = [*STAGES, *SHORT, "--num_intervals", 1, "--buffer_path", buffers, "--root_log_dir", tmp_path]
    assert call("distill_mtt.py", *words, **options)[0] == 0
    (config,) = tmp_path.rglob("config.json")
    value = json.loads(config.read_text())
    for name in ("select_on", "val_fraction"):
        del value["options"][name]
    files.write_json(config, value)
    before = files_of(tmp_path)
    status, message = call("distill_mtt.py", *words, **options)
    assert status == 0 and "done already" in message
    status, message = call("distill_mtt.py", *words, *VAL, **options)
    assert status == 2 and "select_on test there, val now" in message
    assert files_of(tmp_path) == before


def test_buffers_made_before_the_option_keep_all_pictures(buffers, tmp_path, capsys, monkeypatch):
    import shutil

    shutil.copytree(buffers, tmp_path / "b")
    (about,) = (tmp_path / "b").rglob("buffer.json")
    value = json.loads(about.read_text())
    del value["options"]["val_fraction"]
    files.write_json(about, value)
    words = [*EXPERTS, "--num_experts", 3, "--save_interval", 2, "--train_epochs", 4, "--buffer_path", tmp_path / "b"]
    options = {"capsys": capsys, "monkeypatch": monkeypatch}
    assert call("buffer_mtt.py", *words, **options)[0] == 0
    status, message = call("buffer_mtt.py", *words, "--val_fraction", 0.1, **options)
    assert status == 2 and "val_fraction 0.0 there, 0.1 now" in message


def test_pretrained_networks_of_the_two_kinds_are_different_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*IDC, "--pt_from", 1, "--pretrain"]
    for extra in ([], VAL):
        assert call("distill_idc.py", *words, *extra, capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    names = {path.name for path in tmp_path.rglob("*.pt")}
    assert names == {"network_0_epoch1.pt", "network_0_epoch1_val0.2.pt"}
