import json
import re

import numpy as np
import pytest
import torch

import distill_mtt
from tests.conftest import EXPERIMENT, SHORT, STAGES, files_of, run_script
from utils import datasets, files, progressive, synset, training
from utils.augment import DSA
from utils.reparam import flatten
from utils.trajectories import load_buffer

FOLDERS = ["interval1_epoch1-2", "interval2_epoch3-4", "interval3_epoch5-6"]


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
        assert not (folder / "checkpoint.pt").exists() and not list(folder.glob("*.tmp"))
        assert (folder / "replay_buffer_0.pt").exists() == (stage < 3)


def test_metrics_have_every_iteration_and_evaluation_once(distilled):
    for stage, name in enumerate(FOLDERS, 1):
        rows = [json.loads(line) for line in (distilled / name / "metrics.jsonl").read_text().splitlines()]
        assert all(row["stage"] == stage for row in rows)
        assert [row["iteration"] for row in rows if "loss" in row] == [0, 1, 2, 3, 4]
        assert [row["iteration"] for row in rows if "accuracy_mean" in row] == [0, 2, 4, 5]


def test_a_stage_never_changes_the_bits_of_earlier_subsets(distilled):
    for stage, name in enumerate(FOLDERS[1:], 2):
        before = torch.load(distilled / FOLDERS[stage - 2] / "images_best.pt", weights_only=True)
        for path in (distilled / name).glob("images_*.pt"):
            after = torch.load(path, weights_only=True)
            assert torch.equal(after[: len(before)], before)
        first = torch.load(distilled / name / "images_0.pt", weights_only=True)
        last = torch.load(distilled / name / f"images_{max_tag(distilled / name)}.pt", weights_only=True)
        if max_tag(distilled / name):
            assert not torch.equal(first[len(before) :], last[len(before) :])


def max_tag(folder):
    return max(int(m[1]) for p in folder.glob("images_*.pt") if (m := re.fullmatch(r"images_(\d+)\.pt", p.name)))


def run_of(monkeypatch, buffers, root):
    monkeypatch.setattr(
        "sys.argv", ["distill_mtt.py", *STAGES, *SHORT, "--buffer_path", str(buffers), "--root_log_dir", str(root)]
    )
    options = distill_mtt.parse()
    real = datasets.load("Digits", "", torch.device("cpu"))
    return distill_mtt.Run(options, real, distill_mtt.experiment_folder(options))


def test_the_student_of_a_later_stage_sees_the_union(monkeypatch, buffers, distilled):
    run = run_of(monkeypatch, buffers, distilled.parent.parent)
    subset, labels = synset.new_subset(run.real, 1, "real", 0, 3)
    union = run.union(3).extend(subset, labels, torch.tensor(0.03))
    assert len(union) == 30 and union.first_learned == 20
    _, _, steps = run.plan(3, 0, union, run.experts(3))
    seen = torch.cat([step.index for step in steps[:3]])
    assert sorted(seen.tolist()) == list(range(30))


def test_iterations_take_experts_and_epochs_as_specified(monkeypatch, buffers, distilled):
    run = run_of(monkeypatch, buffers, distilled.parent.parent)
    experts = run.experts(1)
    union = synset.empty_set(run.real).extend(*synset.new_subset(run.real, 1, "real", 0, 1), torch.tensor(0.03))
    vectors = {
        (k, t): flatten(trajectory[t])
        for k, trajectory in enumerate(
            t for n in range(2) for t in load_buffer(buffers / "Digits" / "ConvNetW32" / f"replay_buffer_{n}.pt")
        )
        for t in range(5)
    }
    used = []
    for iteration in range(60):
        start, target, steps = run.plan(1, iteration, union, experts)
        (k, t) = next(key for key, vector in vectors.items() if torch.equal(vector, start))
        assert torch.equal(target, vectors[k, t + 2]) and len(steps) == 4
        assert all(len(step.index) == 10 for step in steps)
        used.append((k, t))
    assert all(sorted(k for k, _ in used[i : i + 3]) == [0, 1, 2] for i in range(0, 60, 3))
    assert {t for _, t in used} == {0, 1}


def test_the_transition_starts_from_union_trained_weights(monkeypatch, buffers, distilled):
    run = run_of(monkeypatch, buffers, distilled.parent.parent)
    union = synset.load_set(distilled / FOLDERS[0])
    trajectories = load_buffer(distilled / FOLDERS[0] / "replay_buffer_0.pt")
    assert len(trajectories) == 3 and all(len(trajectory) == 2 + 2 + 2 for trajectory in trajectories)
    for k in (0, 2):
        network = run.network_at(run.experts(1).parameters(k, 0))
        recipe = training.Recipe(
            4, float(union.syn_lr), 0.9, 5e-4, 128, DSA("color_crop_cutout_flip_scale_rotate"), drops=((3, 0.1),)
        )
        training.train(network, progressive.synthetic_source(union), recipe, 0, ("transition", 1, k))
        assert torch.equal(flatten(network.parameters()), flatten(trajectories[k][0]))


def test_two_runs_are_bit_identical_and_the_first_stage_needs_no_checkpoint(tmp_path, buffers, distilled):
    run_script("distill_mtt.py", *STAGES, *SHORT, "--buffer_path", buffers, "--root_log_dir", tmp_path)
    found, expected = files_of(tmp_path / "Digits" / EXPERIMENT), files_of(distilled)
    # Other tests evaluate there, which leaves files beside the stages'.
    expected = {key: value for key, value in expected.items() if key in found or key.startswith("interval")}
    assert found.keys() == expected.keys()
    assert [key for key in found if key != "config.json" and found[key] != expected[key]] == []


def test_kept_graphs_change_nothing(tmp_path, buffers, distilled):
    run_script(
        "distill_mtt.py", *STAGES, *SHORT, "--buffer_path", buffers, "--root_log_dir", tmp_path, "--kept_steps", "1"
    )
    found = torch.load(tmp_path / "Digits" / EXPERIMENT / FOLDERS[2] / "images_best.pt", weights_only=True)
    expected = torch.load(distilled / FOLDERS[2] / "images_best.pt", weights_only=True)
    assert torch.equal(found, expected)


def test_a_later_stage_begins_from_what_is_on_disk(tmp_path, buffers, distilled):
    folder = tmp_path / "Digits" / EXPERIMENT
    folder.mkdir(parents=True)
    for name in FOLDERS[:2]:
        (folder / name).mkdir()
        for path in (distilled / name).iterdir():
            if path.name != "stage.json":  # published results have none
                (folder / name / path.name).write_bytes(path.read_bytes())
    run_script(
        "distill_mtt.py", *STAGES, *SHORT, "--buffer_path", buffers, "--root_log_dir", tmp_path, "--start_interval", "3"
    )
    assert (folder / FOLDERS[2] / "images_best.pt").read_bytes() == (
        distilled / FOLDERS[2] / "images_best.pt"
    ).read_bytes()


def test_a_finished_run_does_nothing(distilled, buffers):
    before = files_of(distilled)
    done = run_script(
        "distill_mtt.py", *STAGES, *SHORT, "--buffer_path", buffers, "--root_log_dir", distilled.parent.parent
    )
    assert "done already" in done.stderr
    assert files_of(distilled) == before


def test_one_stage_lies_in_the_experiments_own_folder(tmp_path, buffers):
    arguments = [a if a != "3" else "1" for a in STAGES]
    run_script(
        "distill_mtt.py",
        *arguments,
        *SHORT,
        "--buffer_path",
        buffers,
        "--root_log_dir",
        tmp_path,
        "--pix_init",
        "noise",
        "--tag",
        "try",
        "--force_save",
        "--no_aug",
    )
    folder = tmp_path / "Digits" / f"{EXPERIMENT}_try"
    assert (folder / "images_best.pt").exists() and (folder / "images_5.pt").exists()
    assert not list(folder.glob("interval*")) and not list(folder.glob("replay*"))


def test_texture_learns_canvases(tmp_path, buffers):
    arguments = [a if a != "3" else "2" for a in STAGES]
    extra = ["--texture", "--canvas_size", "2", "--canvas_samples", "2"]
    run_script("distill_mtt.py", *arguments, *SHORT, *extra, "--buffer_path", buffers, "--root_log_dir", tmp_path)
    folder = tmp_path / "Digits" / EXPERIMENT
    images = torch.load(folder / FOLDERS[1] / "images_best.pt", weights_only=True)
    assert images.shape == (20, 1, 16, 16)
    short = ["--num_experts", 1, "--epoch_eval_train", 2, "--num_eval", 1, "--skip_full"]
    paths = ["--buffer_path", buffers, "--save_path", tmp_path]
    done = run_script("evaluate_mtt.py", *arguments, *extra, *short, *paths)
    assert "stage 1-2" in done.stdout
    done = run_script("evaluate_mtt.py", *arguments, *short, *paths, check=False)
    assert done.returncode == 2 and "images_best.pt: expected pictures 1x8x8 for Digits, found 1x16x16" in done.stderr
    for kind in ("safetensors", "png"):
        run_script("-m", "utils.export", folder, "--format", kind, "--out", tmp_path / kind)
    data = synset.load_distilled(folder)
    assert torch.equal(data.images, images)
    assert torch.equal(synset.load_distilled(tmp_path / "safetensors").images, images)
    assert synset.load_distilled(tmp_path / "png").images.shape == images.shape
    torch.manual_seed(0)
    windows = [data[3][0] for _ in range(50)]
    everywhere = images[3].repeat(1, 2, 2).unfold(1, 8, 1).unfold(2, 8, 1).reshape(-1, 8, 8)
    assert all((everywhere == window[0]).all(dim=(1, 2)).any() for window in windows)
    assert len({tuple(window.flatten().tolist()) for window in windows}) > 20


def test_zca_saves_pictures_for_the_eye(whitened, cifar_tree):
    pixels = torch.load(whitened / "images_zca_0.pt", weights_only=True)
    real = datasets.read("CIFAR10", cifar_tree).train_images
    start = np.rint(pixels.numpy() * 255)
    assert pixels.shape == (10, 3, 32, 32)
    assert all((np.abs(real.astype(float) - picture).max(axis=(1, 2, 3)) < 1.5).any() for picture in start)


@pytest.mark.parametrize("stage,expected", [(1, 0.5), (2, 1e-5)])
def test_syn_lr_moves_slowly_from_the_second_stage_of_cifar10_at_one_image(monkeypatch, tmp_path, stage, expected):
    made = []
    original = torch.optim.SGD

    monkeypatch.setattr("sys.argv", ["distill_mtt.py", "--ipc", "1", "--lr_lr", "0.5", "--lr_img", "7"])
    options = distill_mtt.parse()
    real = datasets.load("Digits", "", torch.device("cpu"))
    run = distill_mtt.Run(options, real, tmp_path)
    run.union = lambda stage: synset.empty_set(real)

    def collect(parameters, **keywords):
        made.append(keywords["lr"])
        return original(parameters, **keywords)

    monkeypatch.setattr(torch.optim, "SGD", collect)
    monkeypatch.setattr(files.Checkpoint, "loop", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.learn(stage, tmp_path, [], files.Checkpoint())
    assert made == [7.0, expected]
