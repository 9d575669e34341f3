import argparse
import json
import re
import shutil
import types

import numpy as np
import pytest
import torch

import distill_mtt
from networks.reparam import flatten
from tests.conftest import EXPERIMENT, SHORT, STAGES, call, files_of, run_script
from utils import forgetting, training
from utils.augment import DSA
from utils.data import datasets
from utils.results.load import load_distilled
from utils.results.names import mtt_learned
from utils.run.errors import UserError
from utils.run.files import human_bytes
from utils.synthetic import SyntheticSet, empty_set, load_mtt
from utils.trajectories import Experts, load_buffer
from utils.trajectory_matching import TrajectoryMatcher

FOLDERS = ["interval1_epoch1-2", "interval2_epoch3-4", "interval3_epoch5-6"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a script that has to succeed in this process."""

    def run(script, *words):
        status, message = call(script, *words, capsys=capsys, monkeypatch=monkeypatch)
        assert status == 0, message

    return run


@pytest.fixture
def distil(run, buffers, tmp_path):
    """Runs distill_mtt.py below the temporary folder; returns the experiment's folder."""

    def distil(*words, stages=3):
        paths = ["--buffer_path", buffers, "--root_log_dir", tmp_path]
        run("distill_mtt.py", *STAGES, *SHORT, *paths, "--num_intervals", stages, *words)
        return tmp_path / "Digits" / EXPERIMENT

    return distil


@pytest.mark.parametrize(
    "words,option,epochs",  # entries of a trajectory: start epochs, expert epochs and 2, of stages 2 and 3
    [
        ([], "max_start_epoch = 2", [2, 2]),
        (["--start_epochs", "0:2,1:3,2:4"], "start_epochs = ((0, 2), (1, 3), (2, 4))", [3, 4]),
        (["--soft_labels", "--lr_label", "2"], "lr_label = 2.0", [2, 2]),
        (["--grow_start_epoch", "3"], "grow_start_epoch = 3", [2, 2]),
        (["--ipc", "3,1,1"], "ipc = (3, 1, 1)", [2, 2]),
        (["--syn_lr_form", "exp", "--clip_grad", "0.5"], "syn_lr_form = exp", [2, 2]),
        (["--ema", "0.9"], "ema = 0.9", [2, 2]),
    ],
)
def test_a_dry_run_says_what_a_run_would_do_and_writes_nothing(
    words, option, epochs, buffers, tmp_path, capsys, monkeypatch
):
    paths = ["--buffer_path", buffers, "--root_log_dir", tmp_path / "logged", "--dry_run"]
    monkeypatch.setattr("sys.argv", ["distill_mtt.py", *map(str, [*STAGES, *SHORT, *paths, *words])])
    distill_mtt.main()
    lines = capsys.readouterr().out.splitlines()
    assert f"option  {option}" in lines
    assert [line for line in lines if line.startswith("steps")] == [
        "steps   3 stages of 5 iterations of 4 student steps"
    ]
    numbers = sum(p.numel() for p in distill_mtt.networks.get_network("ConvNetW32", 1, 10, 8).parameters())
    disk = 4 * numbers * sum(count + 4 for count in epochs) * 3  # float32, of three experts
    totals = [3, 4, 5] if "3,1,1" in words else [1, 2, 3]
    disk += 4 * 10 * 8 * 8 * sum(totals) * 4  # images: the best ones, and those of three evaluations
    assert f"disk    {human_bytes(disk)}" in lines
    assert not (tmp_path / "logged").exists()


def best_images(folder, stage):
    return torch.load(folder / FOLDERS[stage - 1] / "images_best.pt", weights_only=True)


def test_files_have_the_documented_names_shapes_and_types(distilled):
    assert sorted(p.name for p in distilled.iterdir() if p.is_dir()) == FOLDERS
    for stage, name in enumerate(FOLDERS, 1):
        folder = distilled / name
        tags = {re.fullmatch(r"images_(\w+)\.pt", p.name)[1] for p in folder.glob("images_*.pt")}
        assert {"best", "0"} <= tags
        for tag in tags:
            images = torch.load(folder / f"images_{tag}.pt", weights_only=True)
            labels = torch.load(folder / f"labels_{tag}.pt", weights_only=True)
            syn_lr = torch.load(folder / f"syn_lr_{tag}.pt", weights_only=True)
            assert images.shape == (10 * stage, 1, 8, 8) and images.dtype == torch.float32
            assert labels.tolist() == list(range(10)) * stage and labels.dtype == torch.int64
            assert syn_lr.shape == () and syn_lr.dtype == torch.float32
            assert (folder / f"images_{tag}.png").stat().st_size > 100
        known = json.loads((folder / "stage.json").read_text())
        assert known["complete"] and known["select_on"] == "test"
        best = {kind: (folder / f"{kind}_best.pt").read_bytes() for kind in ("images", "labels", "syn_lr")}
        assert best == {kind: (folder / f"{kind}_{known['best_iteration']}.pt").read_bytes() for kind in best}
        assert not (folder / "checkpoint.pt").exists() and not (folder / "partial").exists()
        assert not list(folder.glob(".*.tmp"))
        assert (folder / "replay_buffer_0.pt").exists() == (stage < 3)


def test_metrics_have_every_iteration_and_evaluation_once(distilled):
    for stage, name in enumerate(FOLDERS, 1):
        rows = [json.loads(line) for line in (distilled / name / "metrics.jsonl").read_text().splitlines()]
        assert all(row["stage"] == stage for row in rows)
        assert [row["iteration"] for row in rows if "loss" in row] == [0, 1, 2, 3, 4]
        assert [row["iteration"] for row in rows if "accuracy_mean" in row] == [0, 2, 4, 5]


def test_a_stage_never_changes_the_bits_of_earlier_subsets(distilled):
    moved = 0
    for stage, name in enumerate(FOLDERS[1:], 2):
        before, first = best_images(distilled, stage - 1), None
        for path in sorted((distilled / name).glob("images_*.pt")):
            after = torch.load(path, weights_only=True)
            assert torch.equal(after[: len(before)], before)
            first = after if first is None else first
            moved += not torch.equal(after[len(before) :], first[len(before) :])
    assert moved


def test_the_transition_starts_from_union_trained_weights(monkeypatch, buffers, distilled):
    words = ["--buffer_path", str(buffers), "--root_log_dir", str(distilled.parent.parent)]
    monkeypatch.setattr("sys.argv", ["distill_mtt.py", *STAGES, *SHORT, *words])
    run = distill_mtt.Run(distill_mtt.parse(), datasets.load("Digits", "", torch.device("cpu")))
    union = load_mtt(distilled / FOLDERS[0])
    trajectories = load_buffer(distilled / FOLDERS[0] / "replay_buffer_0.pt")
    assert len(trajectories) == 3 and all(len(trajectory) == 2 + 2 + 2 for trajectory in trajectories)
    dsa = DSA("color_crop_cutout_flip_scale_rotate")
    # --override_epoch_eval_train 4 is epochs 0 to 4, the learning rate drops after 4 // 2 + 1: SPEC 8.1.
    config = training.TrainConfig(5, float(union.syn_lr), 0.9, 5e-4, 128, dsa, lr_milestones=((3, 0.1),))
    for k in (0, 2):
        network = run.network_at(run.experts(1).parameters(k, 0))
        training.train(network, union.dataset(), config, 0, ("transition", 1, k))
        assert torch.equal(flatten(network.parameters()), flatten(trajectories[k][0]))


def test_two_runs_are_bit_identical(tmp_path, buffers, distilled):
    run_script("distill_mtt.py", *STAGES, *SHORT, "--buffer_path", buffers, "--root_log_dir", tmp_path)
    found, expected = files_of(tmp_path / "Digits" / EXPERIMENT), files_of(distilled)
    # Other tests evaluate there, which leaves files beside the stages'.
    expected = {key: value for key, value in expected.items() if key in found or key.startswith("interval")}
    assert found.keys() == expected.keys()
    assert [key for key in found if key != "config.json" and found[key] != expected[key]] == []


def test_retained_graphs_change_nothing(distil, distilled):
    assert torch.equal(best_images(distil("--kept_steps", 1), 3), best_images(distilled, 3))


def test_a_later_stage_begins_from_what_is_on_disk(tmp_path, distil, distilled):
    for name in FOLDERS[:2]:
        folder = tmp_path / "Digits" / EXPERIMENT / name
        folder.mkdir(parents=True)
        for path in (distilled / name).iterdir():
            if path.name != "stage.json":  # published results have none
                (folder / path.name).write_bytes(path.read_bytes())
    assert torch.equal(best_images(distil("--start_interval", 3), 3), best_images(distilled, 3))


def test_one_stage_is_in_the_experiments_own_folder(distil):
    folder = distil("--pix_init", "noise", "--tag", "try", "--force_save", "--no_aug", stages=1)
    folder = folder.with_name(f"{EXPERIMENT}_try")
    assert (folder / "images_best.pt").exists() and (folder / "images_5.pt").exists()
    assert not list(folder.glob("interval*")) and not list(folder.glob("replay*"))


def test_texture_learns_canvases(tmp_path, buffers, run, distil, capsys, monkeypatch):
    extra = ["--texture", "--canvas_size", 2, "--canvas_samples", 2]
    folder = distil(*extra, stages=2)
    images = best_images(folder, 2)
    assert images.shape == (20, 1, 16, 16)
    words = [*STAGES, "--num_intervals", 2, "--num_experts", 1, "--epoch_eval_train", 2, "--num_eval", 1, "--skip_full",
             "--buffer_path", buffers, "--save_path", tmp_path]  # fmt: skip
    run("evaluate_mtt.py", *words, *extra)
    assert [row["ipc_total"] for row in json.loads((folder / "report.json").read_text())["stages"]] == [1, 2]
    status, message = call("evaluate_mtt.py", *words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and "images_best.pt: expected images 1x8x8 for Digits, found 1x16x16" in message
    for kind in ("safetensors", "png"):
        run("scripts.export", folder, "--format", kind, "--out", tmp_path / kind)
    data = load_distilled(folder)
    assert torch.equal(data.images, images)
    assert torch.equal(load_distilled(tmp_path / "safetensors").images, images)
    assert load_distilled(tmp_path / "png").images.shape == images.shape
    torch.manual_seed(0)
    windows = [data[3][0] for _ in range(50)]
    everywhere = images[3].repeat(1, 2, 2).unfold(1, 8, 1).unfold(2, 8, 1).reshape(-1, 8, 8)
    assert all((everywhere == window[0]).all(dim=(1, 2)).any() for window in windows)
    assert len({tuple(window.flatten().tolist()) for window in windows}) > 20


def test_evaluations_start_from_the_experts_of_the_file_at_hand(distil, monkeypatch):  # SPEC 8.3
    """Experts 0 and 1 share a file; an iteration takes one expert of a pass of three."""
    started, drawn, draw = {}, [], Experts.drawn

    def evaluate(stage, iteration, synthetic, experts, starts, run):
        started[iteration] = starts
        return {"ConvNetW32": [50.0]}

    def note(self, *arguments):
        drawn.append(draw(self, *arguments))
        return drawn[-1]

    monkeypatch.setattr(distill_mtt, "evaluate", evaluate)
    monkeypatch.setattr(Experts, "drawn", note)
    distil("--Iteration", 12, "--eval_it", 1, stages=1)
    assert len(drawn) == 12 and sorted(started) == list(range(13))
    for iteration in range(12):
        turn = drawn[iteration // 3 * 3 : iteration // 3 * 3 + 3]
        assert sorted(turn) == [0, 1, 2]
        shares = [2] if drawn[iteration] == 2 else [expert for expert in turn if expert != 2]
        assert started[iteration] == shares
    assert len(set(map(tuple, started.values()))) > 1


def test_network_k_starts_from_the_k_th_of_them(monkeypatch, buffers, tmp_path):  # SPEC 8.3
    monkeypatch.setattr(
        "sys.argv", ["distill_mtt.py", *STAGES, *SHORT, "--buffer_path", str(buffers), "--eval_mode", "C"]
    )
    real = datasets.load("Digits", "", torch.device("cpu"))
    run = distill_mtt.Run(distill_mtt.parse(), real)
    begun = {}

    def train_and_test(make, count, union, config, test, seed, keys, folder):
        begun[keys[-1]] = [flatten(make(k).parameters()) for k in range(5)]
        return [float(count)] * count

    monkeypatch.setattr(distill_mtt.stages, "train_and_test", train_and_test)
    experts = run.experts(1)
    synthetic = empty_set(real).extended(torch.zeros(10, 1, 8, 8), torch.arange(10), syn_lr=torch.tensor(0.01))
    assert distill_mtt.evaluate(1, 0, synthetic, experts, [2, 0], run) == {
        "ConvNetW32": [2.0] * 2,
        "ConvNet": [2.0] * 2,
    }
    for k, expert in enumerate([2, 0, 2, 0, 2]):
        assert torch.equal(begun["ConvNetW32"][k], experts.parameters(expert, 0))
    assert len({tuple(start.tolist()) for start in begun["ConvNet"]}) == 5  # others start anew


def test_all_experts_are_matched_and_trained_on(distil, distilled):  # SPEC 8.5
    """--num_experts is accepted and caps nothing."""
    folder = distil("--num_experts", 1)
    assert len(load_buffer(folder / FOLDERS[0] / "replay_buffer_0.pt")) == 3
    assert torch.equal(best_images(folder, 3), best_images(distilled, 3))


def test_experts_are_chosen_once(distil):
    """Every stage goes on with those that the first one chose: --max_experts is of a file of the first one's."""
    folder = distil("--max_experts", 1, "--Iteration", 1)
    assert [len(load_buffer(folder / stage / "replay_buffer_0.pt")) for stage in FOLDERS[:2]] == [2, 2]


def test_a_new_best_of_any_network_saves_the_union_unclamped(distil, monkeypatch):  # SPEC 8.6
    """The mean over both networks falls at iteration 2, where the second one is better than before."""
    accuracies = {
        0: {"ConvNetW32": [50.0, 52.0], "ConvNet": [50.0, 50.0]},
        2: {"ConvNetW32": [30.0, 30.0], "ConvNet": [50.0, 51.0]},
        4: {"ConvNetW32": [50.0, 51.0], "ConvNet": [50.0, 50.5]},
        5: {"ConvNetW32": [51.0, 51.0], "ConvNet": [50.0, 51.0]},
    }
    unions = {}

    def evaluate(stage, iteration, synthetic, *_):
        unions[iteration] = synthetic.images.detach().clone()
        return accuracies[iteration]

    monkeypatch.setattr(distill_mtt, "evaluate", evaluate)
    folder = distil("--pix_init", "noise", "--eval_mode", "C", stages=1)
    folder = folder.with_name(EXPERIMENT.replace("_S_", "_C_")) if not folder.exists() else folder
    images = torch.load(folder / "images_best.pt", weights_only=True)
    assert torch.equal(images, unions[2]) and not torch.equal(images, unions[0])
    assert {p.name for p in folder.glob("images_*.pt")} == {"images_best.pt", "images_0.pt", "images_2.pt"}
    summary = json.loads((folder / "stage.json").read_text())
    assert (summary["best_iteration"], summary["best_accuracy"]) == (2, (30 + 30 + 50 + 51) / 4)
    black, white = (0 - 0.3054) / 0.3760, (1 - 0.3054) / 0.3760
    assert images.min() < black - 1 and images.max() > white + 1


@pytest.mark.parametrize("slope,expected", [(-1, True), (1, False)])
def test_a_stage_that_matching_did_not_improve_says_so(slope, expected, buffers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        distill_mtt, "evaluate", lambda stage, iteration, *_: {"ConvNetW32": [50.0 + slope * iteration]}
    )
    words = [*STAGES, *SHORT, "--num_intervals", 1, "--buffer_path", buffers, "--root_log_dir", tmp_path]
    status, message = call("distill_mtt.py", *words, capsys=capsys, monkeypatch=monkeypatch)
    warned = "warning: stage 1: matching made the images no better than their initialisation" in message
    assert status == 0 and warned == expected and ("change --lr_img or raise --Iteration" in message) == expected


# Methods that followed MTT --------------------------------------------------------------------------------------------


def as_float64(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("form", ["plain", "exp"])
def test_a_step_is_sgd_with_momentum_of_images_and_of_syn_lr_or_its_logarithm(form, clip):
    rng = np.random.default_rng(0)
    images, rate = torch.from_numpy(rng.standard_normal((3, 1, 2, 2))), 0.02
    union = SyntheticSet(images.clone(), torch.arange(3), as_float64(rate), [1, 2])
    optimizers = {
        "images_sgd": torch.optim.SGD([union.learned], 5.0, 0.5),
        "syn_lr_sgd": torch.optim.SGD([union.syn_lr], 0.4, 0.5),
    }
    args = argparse.Namespace(syn_lr_form=form, clip_grad=clip)
    learned, momentum = images[1:].numpy().copy(), [0.0, 0.0]
    for _ in range(4):
        gradients = [rng.standard_normal(learned.shape), float(rng.standard_normal()) / rate]
        union.learned.grad, union.syn_lr.grad = map(as_float64, gradients)
        distill_mtt.step(union, optimizers, args)
        if form == "exp":
            gradients[1] *= rate
        for k in range(2):
            norm = np.sqrt(np.square(gradients[k]).sum())
            momentum[k] = 0.5 * momentum[k] + gradients[k] * (min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
        learned -= 5.0 * momentum[0]
        rate = rate * np.exp(-0.4 * momentum[1]) if form == "exp" else rate - 0.4 * momentum[1]
        assert np.abs(union.learned.numpy() - learned).max() < 1e-12 and abs(float(union.syn_lr) / rate - 1) < 1e-12
    assert torch.equal(union.images[:1], images[:1]) and (form == "plain" or rate > 0)


@pytest.mark.parametrize("lr_img,lr_lr", [(100, 0.1), (1e4, 10), (1e8, 1e3)])
def test_rates_that_stop_a_run_do_not_with_exp_and_clipping(
    lr_img, lr_lr, distil, buffers, tmp_path, capsys, monkeypatch
):
    rates = ["--lr_img", lr_img, "--lr_lr", lr_lr, "--Iteration", 6]
    words = [*STAGES, *SHORT, *rates, "--num_intervals", 1, "--buffer_path", buffers, "--root_log_dir", tmp_path / "x"]
    status, message = call("distill_mtt.py", *words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and re.search(r"iteration \d: .*became (NaN|-)", message.splitlines()[-1])
    clip = min(1 / lr_img, 0.1 / lr_lr)
    distil(*rates, "--syn_lr_form", "exp", "--clip_grad", clip, stages=1)


def test_the_running_mean_of_the_images_is_evaluated_and_kept(distil, monkeypatch):
    """The images move as they do without it: only what is evaluated and kept differs."""
    moved, evaluated = [], {}
    step = distill_mtt.step

    def note(synthetic, *arguments):
        if not moved:
            moved.append(synthetic.learned.clone())
        step(synthetic, *arguments)
        moved.append(synthetic.learned.clone())

    def evaluate(stage, iteration, synthetic, *_):
        evaluated[iteration] = synthetic.images.clone()
        return {"ConvNetW32": [50.0 + iteration]}

    monkeypatch.setattr(distill_mtt, "step", note)
    monkeypatch.setattr(distill_mtt, "evaluate", evaluate)
    folder = distil("--ema", 0.75, "--pix_init", "noise", stages=1)
    mean = moved[0].double()
    for iteration in range(6):
        mean = 0.75 * mean + 0.25 * moved[iteration].double() if iteration else mean
        if iteration in evaluated:
            torch.testing.assert_close(evaluated[iteration].double(), mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.load(folder / "images_best.pt", weights_only=True), evaluated[5])
    evaluated.clear()
    averaged, moved[:] = list(moved), []
    distil("--pix_init", "noise", "--tag", "plain", stages=1)
    assert all(torch.equal(one, other) for one, other in zip(averaged, moved, strict=True))
    assert torch.equal(evaluated[5], moved[5])


def test_subsets_of_unequal_size_and_windows_that_move(distil, monkeypatch, tmp_path, buffers, run):
    windows, plan = {1: set(), 2: set(), 3: set()}, TrajectoryMatcher.plan

    def note(matcher, number):
        drawn, parameters = [], matcher.experts.parameters
        matcher.experts.parameters = lambda expert, epoch: drawn.append(epoch) or parameters(expert, epoch)
        found = plan(matcher, number)
        matcher.experts.parameters = parameters
        windows[matcher.stage].add(drawn[0])
        assert drawn[1] == drawn[0] + 2
        return found

    monkeypatch.setattr(TrajectoryMatcher, "plan", note)
    folder = distil("--ipc", "2,1,3", "--start_epochs", "0:1,1:3,2:5", "--Iteration", 20, "--eval_it", 10)
    assert not folder.exists()
    folder = folder.with_name(EXPERIMENT.replace("ipc1", "ipc2-1-3"))
    assert windows == {1: {0}, 2: {1, 2}, 3: {2, 3, 4}}
    for stage, entries in ((1, 3 + 2 + 2), (2, 5 + 2 + 2)):  # of the stage after it
        assert {len(t) for t in load_buffer(folder / FOLDERS[stage - 1] / "replay_buffer_0.pt")} == {entries}
    data = load_distilled(folder)
    assert data.stage.tolist() == [1] * 20 + [2] * 10 + [3] * 30
    assert data.labels.tolist() == [k // 2 for k in range(20)] + list(range(10)) + [k // 3 for k in range(30)]
    assert torch.equal(data.images[:30], best_images(folder, 2)) and len(load_distilled(folder, 1)) == 20
    words = [*STAGES, "--ipc", "2,1,3", "--num_experts", 1, "--num_eval", 1, "--epoch_eval_train", 2, "--skip_full",
             "--buffer_path", buffers, "--save_path", tmp_path]  # fmt: skip
    run("evaluate_mtt.py", *words)
    assert [row["ipc_total"] for row in json.loads((folder / "report.json").read_text())["stages"]] == [2, 3, 6]
    run("scripts.export", folder, "--out", tmp_path / "export")
    assert torch.equal(load_distilled(tmp_path / "export").stage, data.stage)
    run("scripts.compare", folder, "--out", tmp_path / "compare")


SOFT = ["--soft_labels", "--lr_label", 20]


def test_soft_labels_start_as_an_experts_and_are_learned(distil, buffers, run, capsys, monkeypatch, tmp_path):
    starts, steps, step = [], [], distill_mtt.step

    def note(synthetic, *arguments):
        if len(steps) % 5 == 0:
            starts.append((synthetic.images.clone(), synthetic.soft.clone()))
        steps.append(1)
        step(synthetic, *arguments)
        assert float(synthetic.soft.min()) >= 0
        torch.testing.assert_close(synthetic.soft.sum(1), torch.ones(len(synthetic)))

    monkeypatch.setattr(distill_mtt, "step", note)
    accuracies = iter(range(100))  # each evaluation is the best so far
    monkeypatch.setattr(distill_mtt, "evaluate", lambda *_: {"ConvNetW32": [float(next(accuracies))]})
    folder = distil(*SOFT, "--soft_temperature", 2)
    real = datasets.load("Digits", "", torch.device("cpu"))
    network = training.new_network("ConvNetW32", real, 0)
    for stage, (images, soft) in enumerate(starts, 1):
        experts = buffers / "Digits" / "ConvNetW32" if stage == 1 else folder / FOLDERS[stage - 2]
        with torch.no_grad():
            last = load_buffer(experts / "replay_buffer_0.pt")[0][-1]
            for parameter, value in zip(network.parameters(), last, strict=True):
                parameter.copy_(value)
            expected = (network(images[10 * stage - 10 :]) / 2).softmax(1)
        torch.testing.assert_close(soft[10 * stage - 10 :], expected)
        learned = torch.load(folder / FOLDERS[stage - 1] / "labels_best.pt", weights_only=True)
        assert torch.equal(learned[: 10 * stage - 10], soft[: 10 * stage - 10])  # frozen with their subset
        assert float((learned[10 * stage - 10 :] - soft[10 * stage - 10 :]).abs().max()) > 1e-4
    data = load_distilled(folder)
    assert torch.equal(data.soft_labels, learned) and data.labels.tolist() == list(range(10)) * 3
    assert torch.equal(data[4][1], learned[4])
    for kind in ("pt", "npz", "safetensors", "png"):
        run("scripts.export", folder, "--format", kind, "--out", tmp_path / kind)
        again = load_distilled(tmp_path / kind, 2)
        assert torch.equal(again.soft_labels, learned[:20]) and torch.equal(again.labels, data.labels[:20])


def test_one_hot_labels_that_are_not_learned_give_the_hard_run(distil, distilled):
    folder = distil("--soft_labels", "--soft_init", "onehot", "--lr_label", 0)
    for stage in (1, 2, 3):
        torch.testing.assert_close(best_images(folder, stage), best_images(distilled, stage), rtol=1e-4, atol=1e-4)


def test_the_best_union_is_the_one_that_the_checkpoint_says(distilled, tmp_path):
    """A killed run may have found another best after its last save, which a GPU need not find again."""
    folder = shutil.copytree(distilled, tmp_path / "copy")
    stage = folder / "interval1_epoch1-2"
    run = types.SimpleNamespace(folder=lambda _: stage)
    for part in ("images", "labels", "syn_lr"):
        shutil.copy(stage / f"{part}_0.pt", stage / f"{part}_7.pt")
        torch.save(torch.zeros(1), stage / f"{part}_best.pt")
    distill_mtt.Run.keep_best(run, 1, None)
    assert torch.load(stage / "images_best.pt").numel() == 1
    distill_mtt.Run.keep_best(run, 1, 7)
    for part in ("images", "labels", "syn_lr"):
        assert (stage / f"{part}_best.pt").read_bytes() == (stage / f"{part}_0.pt").read_bytes()


def test_every_stage_asks_for_its_best_union(distil, monkeypatch):
    asked = []
    monkeypatch.setattr(distill_mtt.Run, "keep_best", lambda run, *about: asked.append(about))
    distil(stages=2)
    assert asked == [(1, None), (2, None)]


def test_a_stage_that_stops_after_its_first_images_is_not_finished(buffers, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise UserError("stopped before the first row of the log")

    monkeypatch.setattr(distill_mtt.Log, "write", stop)
    words = [*STAGES, *SHORT, "--buffer_path", buffers, "--root_log_dir", tmp_path]
    assert call("distill_mtt.py", *words, capsys=capsys, monkeypatch=monkeypatch)[0] == 2
    (best,) = tmp_path.rglob("images_best.pt")
    assert not mtt_learned(best.parent)


def test_compiling_what_is_not_compiled_is_told(buffers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distill_mtt.explicit, "applies", lambda *_: False)
    words = [*STAGES, *SHORT, "--buffer_path", buffers, "--root_log_dir", tmp_path, "--compile", "--dry_run"]
    _, said = call("distill_mtt.py", *words, capsys=capsys, monkeypatch=monkeypatch)
    assert "note: --compile changes nothing" in said


# --drop_easy ----------------------------------------------------------------------------------------------------------


def test_nothing_is_dropped_unless_it_is_asked_for(distil, distilled):
    folder = distil("--drop_easy", 0.0)
    found, expected = files_of(folder), files_of(distilled)
    found.pop("config.json")
    assert len(found) > 20 and [key for key in found if found[key] != expected[key]] == []


def test_later_stages_do_without_easy_images(distil, distilled, buffers, monkeypatch, tmp_path):
    own = tmp_path / "experts"
    shutil.copytree(buffers, own)
    scored, used = [], []
    score, trained = forgetting.expert_scores, distill_mtt.stages.transition
    monkeypatch.setattr(forgetting, "expert_scores", lambda *a: scored.append(score(*a)) or scored[-1])

    def transition(*arguments):
        used.append(arguments[4])
        return trained(*arguments)

    monkeypatch.setattr(distill_mtt.stages, "transition", transition)
    folder = distil("--drop_easy", 0.5, "--buffer_path", own)
    assert len(scored) == 1 and scored[0].shape == (1437,)  # once for three stages
    labels = datasets.load("Digits", "", torch.device("cpu")).train.labels
    counts = torch.bincount(labels)
    for share, images in zip((0.25, 0.5), used, strict=True):  # of stages 2 and 3
        assert torch.bincount(images.labels).tolist() == [n - int(share * n) for n in counts.tolist()]
    assert torch.equal(best_images(folder, 1), best_images(distilled, 1))
    assert not torch.equal(best_images(folder, 3), best_images(distilled, 3))
    before = files_of(folder)
    distil("--drop_easy", 0.5, "--buffer_path", own, "--tag", "x")
    assert len(scored) == 1  # kept beside the experts
    other = files_of(folder.with_name(f"{EXPERIMENT}_x"))
    assert [k for k in before if k != "config.json" and not k.startswith("data.json") and before[k] != other[k]] == []
    (path,) = own.rglob("replay_buffer_1.pt")
    (trajectory,) = load_buffer(path, mmap=False)
    torch.save([[[value + 0.01 for value in entry] for entry in trajectory]], path)
    distil("--drop_easy", 0.5, "--buffer_path", own, "--tag", "y")
    assert len(scored) == 2  # of other experts


def test_zca_also_saves_pixels(whitened, cifar_tree):
    pixels = torch.load(whitened / "images_zca_0.pt", weights_only=True)
    real = datasets.read("CIFAR10", cifar_tree).train_images
    start = np.rint(pixels.numpy() * 255)
    assert pixels.shape == (10, 3, 32, 32)
    assert all((np.abs(real.astype(float) - image).max(axis=(1, 2, 3)) < 1.5).any() for image in start)


@pytest.mark.parametrize("stage,form,expected", [(1, "plain", 0.5), (2, "plain", 1e-5), (2, "exp", 0.5)])
def test_syn_lr_moves_slowly_from_the_second_stage_of_cifar10_at_one_image(monkeypatch, stage, form, expected):
    words = ["--ipc", "1", "--num_intervals", "2", "--lr_lr", "0.5", "--lr_img", "7", "--syn_lr_form", form]
    monkeypatch.setattr("sys.argv", ["distill_mtt.py", *words])
    real = datasets.load("Digits", "", torch.device("cpu"))
    run = distill_mtt.Run(distill_mtt.parse(), real)
    run.union = lambda stage: empty_set(real)
    run.experts = lambda stage: []
    rates = []

    def sgd(parameters, lr, momentum):
        rates.append((lr, momentum))
        return torch.optim.SGD(parameters, lr, momentum)

    class Begun(Exception):
        pass

    def begin(*_, **__):
        raise Begun

    monkeypatch.setattr(distill_mtt, "SGD", sgd)
    monkeypatch.setattr(distill_mtt, "Checkpoint", begin)
    with pytest.raises(Begun):
        distill_mtt.learn_subset(stage, run)
    assert rates == [(7.0, 0.5), (expected, 0.5)]
