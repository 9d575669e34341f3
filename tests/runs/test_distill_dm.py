"""PDD+DM through its command line, on Digits."""

import json
import shlex

import pytest
import torch

from tests.conftest import call, files_of, run_script
from tests.support import torchrun
from utils.results import compare, known
from utils.results.load import load_distilled

D, E = "distill_dm.py", "evaluate_idc.py"
SHORT = shlex.split(
    "-d digits --model ConvNetW32 --ipc 2 -f 2 --num-intervals 3 --Iteration 4 --eval_it 2 --epochs 3 --batch_real 8 "
    "--print-freq 1"
)
NAME = "ConvNetW32_dm_mean_it4_factor2_lr0.01_b_real8_mix_ipc2"


@pytest.fixture(scope="module")
def results(tmp_path_factory, buffers):
    root = tmp_path_factory.mktemp("dm")
    run_script(D, *SHORT, "--results", root, "--buffer_path", buffers)
    return root / "digits" / NAME


@pytest.fixture
def run(capsys, monkeypatch, buffers):
    """Runs a script in this process; returns (exit status, stderr)."""
    return lambda script, *words: call(
        script, *SHORT, "--buffer_path", buffers, *words, capsys=capsys, monkeypatch=monkeypatch
    )


def unions(folder, stages=3):
    return [torch.load(folder / f"interval_{s}_data.pt", weights_only=True) for s in range(stages)]


def test_files_are_those_of_idc(results):
    names = {path.name for path in results.iterdir()}
    for stage, (images, labels) in enumerate(unions(results)):
        wanted = {"data.pt", "init.png", "img2.png", "img4.png", "metrics.jsonl"}
        assert {f"interval_{stage}_{name}" for name in wanted} | {f"interval_{stage}.json"} <= names
        assert images.shape == (20 * (stage + 1), 1, 8, 8) and images.min() >= 0 and images.max() <= 1
        assert labels.tolist() == sorted(list(range(10)) * 2 * (stage + 1))
    rows = [json.loads(line) for line in (results / "interval_1_metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["iteration"] for row in rows if "accuracy_mean" in row] == [2, 4]
    assert not any(name.endswith("checkpoint.pt") or name == "partial" for name in names)


def test_frozen_bits_stay_over_three_stages_and_all_newest_images_move(results, run, tmp_path):
    positions = [images.view(10, 2, s + 1, 1, 8, 8) for s, (images, _) in enumerate(unions(results))]
    for stage in (1, 2):
        assert torch.equal(positions[stage][:, :, :stage], positions[stage - 1])
    assert run(D, "--results", tmp_path, "--lr_img", 1e-12)[0] == 0
    (still,) = (tmp_path / "digits").iterdir()
    for stage, (images, _) in enumerate(unions(still)):
        moved = (images.view(10, 2, stage + 1, -1) - positions[stage].flatten(3))[:, :, -1].abs().amax(2)
        assert (moved > 1e-3).all()


def test_two_runs_are_bit_identical(results, run, tmp_path):
    assert run(D, "--results", tmp_path)[0] == 0
    found, expected = files_of(tmp_path / "digits" / NAME), files_of(results)
    assert [name for name in expected if name.startswith("interval") and found[name] != expected[name]] == []


@pytest.mark.parametrize(
    "extra,name",
    [
        ("--metric cf --cf_alpha 0.2 --calibration 0.1", "dm_cf_a0.2_cal0.1_it4"),
        ("--window stage --factor 1 --init noise", "dm_mean_window_it4_factor1_lr0.01_b_real8_noise"),
        ("--transition union --inner_loop 3 --n_data 64 --buffer_path nowhere", "dm_mean_union_nd64_inloop3_cut_it4"),
        ("--decode_type multi --drop_easy 0.2 --select_on val", "factor2_multi_lr0.01"),
    ],
)
def test_variants_run_evaluate_and_load(extra, name, run, tmp_path):
    words = [*extra.split(), "--num-intervals", 2, "--epochs", 1, "--results", tmp_path]
    status, message = run(D, *words)
    assert status == 0
    assert ("these experts have seen images that are held out now" in message) == ("val" in words)
    (folder,) = (tmp_path / "digits").iterdir()
    assert name in folder.name
    words = " ".join(map(str, words)).replace("--drop_easy 0.2 --select_on val", "").split()  # of distillations alone
    assert run(E, "--method", "dm", *words, "--skip_full", "--skip_random")[0] == 0
    found = compare.read(folder)
    assert found.method == "PDD+DM" and found.report["model"] == "ConvNetW32" and set(found.logs) == {1, 2}
    data = load_distilled(folder)
    assert data.about["method"] == known.find(folder).method == "PDD+DM"
    assert len(data) == 40 * (1 if "--factor 1" in extra else 5 if "multi" in extra else 4)


def test_the_networks_are_those_of_the_window(buffers, monkeypatch, tmp_path, capsys):
    """A stage sees its part of the trajectories and no other."""
    import distill_dm

    seen, mixture = [], distill_dm.mixture
    monkeypatch.setattr(distill_dm, "mixture", lambda e, k, p: (seen.append((k, p)), mixture(e, k, p))[1])
    words = [*SHORT, "--Iteration", 30, "--eval_it", 50, "--window", "stage", "--test", "--buffer_path", buffers]
    assert call(D, *words, "--results", tmp_path, capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    for stage in range(3):  # of four epochs
        experts, positions = zip(*seen[30 * stage : 30 * (stage + 1)], strict=True)
        assert set(experts) == {0, 1, 2}
        assert 4 * stage / 3 <= min(positions) < max(positions) < 4 * (stage + 1) / 3


def test_a_result_is_evaluated_as_what_it_is(results, capsys, monkeypatch):
    words = ["-d", "digits", "--ipc", 2, "-f", 2, "--override-load-dir", results, "--num-intervals", 1]
    status, message = call(E, *words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and "made with --method dm, found --method idc; give --method dm" in message


def test_what_is_refused(run, tmp_path):
    status, message = run(D, "--buffer_path", tmp_path, "--results", tmp_path)
    assert status == 2 and "expected replay_buffer_0.pt and so on, found none" in message
    status, message = run(D, "--model", "ConvNet", "--results", tmp_path)
    assert status == 2 and message.startswith("error: ") and message.count("\n") == 1
    status, message = run(D, "--start-interval", 3, "--results", tmp_path)
    assert status == 2 and "--start-interval 3: expected less than --num-intervals 3" in message
    for words in (["--transition", "union", "--window", "stage"], ["--n_data", 9], ["--cf_alpha", 0.3]):
        status, message = run(D, *words, "--results", tmp_path)
        assert status == 2 and f"error: {words[-2]}: changes nothing with" in message
    status, message = run(E, "--method", "gm")
    assert status == 2 and "argument --method: invalid choice: 'gm'" in message
    assert not list(tmp_path.iterdir())


def test_two_ranks_learn_what_one_learns(results, buffers, tmp_path):
    torchrun.ranks(D, *SHORT, "--results", tmp_path, "--buffer_path", buffers)
    for (found, labels), (expected, expected_labels) in zip(
        unions(tmp_path / "digits" / NAME), unions(results), strict=True
    ):
        assert torch.equal(labels, expected_labels)
        assert float((found - expected).abs().max()) < 1e-3  # Adam enlarges the rounding of tiny gradients
