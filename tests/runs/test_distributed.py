"""Several processes give what one gives: experts, reports and IDC bit for bit, matching to the rounding of a sum.

The default is two ranks; four ranks, and two nodes of two as two agents on this machine, are slow tests, which
scripts/check_distributed.sh runs.
"""

import json
import re
import shutil
import signal

import pytest
import torch
from filelock import FileLock

from tests.conftest import EXPERIMENT, EXPERTS, SHORT, STAGES, call, files_of, run_script
from tests.support import ranks, torchrun
from tests.support.killer import differing
from utils.run import files
from utils.trajectories import BufferWriter

B, D, E = "buffer_mtt.py", "distill_mtt.py", "evaluate_mtt.py"
RECORD = [*EXPERTS, "--num_experts", 3, "--save_interval", 2, "--train_epochs", 4]
IDC = ["-d", "digits", "--ipc", 2, "--num-intervals", 2, "--niter", 0.04, "--inner_loop", 2, "--epochs", 5,
       "--net_epoch", 1, "--n_data", 64, "--batch_real", 8, "--repeat", 2]  # fmt: skip

# Nodes and the ranks of each.
SHAPES = [
    pytest.param((1, 2), id="2"),
    pytest.param((1, 4), id="4", marks=pytest.mark.slow),
    pytest.param((2, 2), id="2x2", marks=pytest.mark.slow),
]
shapes = pytest.mark.parametrize("shape", SHAPES, scope="module")


def words(message, kind):
    """Return the lines of a job's stderr that are messages of this `kind`; torchrun writes others."""
    return [line for line in message.splitlines() if line.startswith(f"{kind}:")]


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@shapes
def test_one_iteration_and_one_sweep_are_those_of_one_process(shape, tmp_path):
    torchrun.ranks("tests/support/ranks.py", tmp_path / "found.pt", shape=shape)
    one = {"matchings": ranks.matchings(), "sweeps": ranks.idc_sweeps()}
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    count = shape[0] * shape[1]
    assert found["order"] == list(range(count))
    assert sorted(n for hand in found["dealt"] for n in hand) == list(range(5)) and len(found["dealt"]) == count
    assert found["same on every rank"]
    assert found["matchings"].keys() == one["matchings"].keys()
    for name, values in found["matchings"].items():
        for value, truth in zip(values, one["matchings"][name], strict=True):
            assert relative(value, truth) < 1e-10, name
    for value, truth in zip(found["sweeps"], one["sweeps"], strict=True):
        assert relative(value, truth) < 1e-10


@shapes
def test_experts_are_bit_identical(shape, buffers, tmp_path):
    _, out, err = torchrun.ranks(B, *RECORD, "--buffer_path", tmp_path, shape=shape)
    assert differing(tmp_path, buffers) == []
    assert out.count("done, 3 experts in 2 files") == 1 and not words(err, "error")


@pytest.fixture
def record(tmp_path, capsys, monkeypatch):
    """Runs buffer_mtt.py in this process, which waits for no lock; returns (exit status, stderr)."""
    monkeypatch.setattr(files, "LOCK_TIMEOUT", 0.0)
    return lambda *more: call(B, *RECORD, "--buffer_path", tmp_path, *more, capsys=capsys, monkeypatch=monkeypatch)


def test_shards_are_bit_identical_and_the_last_one_merges(buffers, tmp_path, record):
    folder = tmp_path / "Digits" / "ConvNetW32"
    assert record("--shard", "2/2")[0] == 0
    assert not (folder / "replay_buffer_0.pt").exists() and (folder / "partial" / "expert_00001.pt").exists()
    status, message = record("--shard", "2/2", "--mom", 0.5)
    assert status == 2 and "mom 0.0 there, 0.5 now" in message
    assert record("--shard", "1/2")[0] == 0
    assert differing(tmp_path, buffers) == [] and not (folder / "partial").exists()
    for wrong in ("0/2", "3/2", "1", "a/b"):
        status, message = record("--shard", wrong)
        assert status == 2 and "expected i/n" in message


def test_a_whole_run_and_shards_keep_out_of_each_others_way(buffers, tmp_path, record):
    folder = tmp_path / "Digits" / "ConvNetW32"
    being_written = folder / "partial" / "expert_00002" / ".epoch_0001.pt.1.tmp"
    being_written.parent.mkdir(parents=True)
    being_written.touch()
    with FileLock(folder / "partial" / ".lock_shard1of2"):  # shard 1 at work
        status, message = record()
        assert status == 2 and "another process is writing there" in message
        assert record("--shard", "2/2")[0] == 0
        status, message = record("--shard", "1/2")
        assert status == 2 and "another process is writing there" in message
        assert being_written.exists()
    with FileLock(folder / ".lock"):  # a whole run at work
        for words in ([], ["--shard", "1/2"]):
            status, message = record(*words)
            assert status == 2 and "another process is writing there" in message
        assert being_written.exists()
    assert record()[0] == 0
    assert differing(tmp_path, buffers) == [] and not (folder / "partial").exists()


def test_a_shard_that_cannot_merge_leaves_it_to_the_next(buffers, tmp_path, record, monkeypatch):
    folder = tmp_path / "Digits" / "ConvNetW32"
    with monkeypatch.context() as patch:
        merging, add = FileLock(folder / ".lock"), BufferWriter.add
        patch.setattr(BufferWriter, "add", lambda *words: (add(*words), merging.acquire()))
        assert record("--shard", "1/1")[0] == 0
        merging.release(force=True)
    assert not (folder / "replay_buffer_0.pt").exists() and len(list((folder / "partial").glob("expert*"))) == 3
    assert record("--shard", "1/1")[0] == 0
    assert differing(tmp_path, buffers) == []


@pytest.fixture(scope="module")
def spread(request, shape, buffers, tmp_path_factory):
    """Three stages of PDD+MTT over several ranks; returns the experiment's folder."""
    root = tmp_path_factory.mktemp("spread")
    torchrun.ranks(D, *STAGES, *SHORT, "--buffer_path", buffers, "--root_log_dir", root, shape=shape)
    return root / "Digits" / EXPERIMENT


@shapes
def test_stages_agree_with_one_process_to_rounding(shape, spread, distilled):
    found, expected = files_of(spread), files_of(distilled)
    assert {name for name in found if "best" in name} == {name for name in expected if "best" in name}
    # The first union has seen a handful of float32 sums in another order, the third one all the stages before it.
    for stage, tolerance in ((1, 1e-4), (2, 1e-3), (3, 1e-2)):
        name = f"interval{stage}_epoch{2 * stage - 1}-{2 * stage}"
        images = [torch.load(root / name / "images_0.pt", weights_only=True) for root in (spread, distilled)]
        assert relative(*images) < tolerance
        rows = [
            [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
            for root in (spread, distilled)
        ]
        for row, truth in zip(*rows, strict=True):
            assert row.keys() == truth.keys() and row["iteration"] == truth["iteration"]
            assert row.get("loss", 0) == pytest.approx(truth.get("loss", 0), rel=tolerance)
    assert not [name for name in found if name.endswith((".part", "checkpoint.pt"))]


@pytest.mark.long
@shapes
def test_a_killed_rank_ends_the_job_and_torchruns_restart_resumes(shape, spread, buffers, tmp_path):
    arguments = [*STAGES, *SHORT, "--buffer_path", buffers, "--root_log_dir", tmp_path, "--checkpoint_minutes", 0]
    job = torchrun.Job(D, *arguments, shape=shape, restarts=2)
    job.signal(signal.SIGKILL, r"stage 2, iteration 2: ")
    _, out, err = job.end()
    assert differing(tmp_path / "Digits" / EXPERIMENT, spread) == []
    said = words(err, "error") + words(err, "stopped")
    assert len(said) == 1 and said[0].endswith("run the same command again to continue")
    assert out.count("done, 3 stages") == 1


@pytest.fixture(scope="module")
def idc(tmp_path_factory):
    """Two stages of PDD+IDC by one process."""
    root = tmp_path_factory.mktemp("idc")
    run_script("distill_idc.py", *IDC, "--results", root)
    return root


@pytest.mark.long
@shapes
def test_idc_is_bit_identical_and_goes_on_with_another_number_of_ranks(shape, idc, tmp_path):
    arguments = [*IDC, "--results", tmp_path, "--checkpoint_minutes", 0]
    job = torchrun.Job("distill_idc.py", *arguments, "--phase", 0, "--nclass_sub", 5, shape=shape)
    job.signal(signal.SIGTERM, r"stage 2/2, sweep 0/")
    status, _, err = job.end(check=False)
    (said,) = words(err, "stopped") + words(err, "error")
    assert status == 1 and re.match(r"stopped: by SIGTERM; state saved to .*interval_1_checkpoint\.pt; run the", said)
    assert err.count("note: --phase and --nclass_sub change nothing") == 1
    run_script("distill_idc.py", *arguments)
    assert differing(tmp_path, idc) == []


@shapes
def test_reports_are_equal(shape, buffers, distilled, tmp_path, capsys, monkeypatch):
    arguments = [*STAGES, "--num_experts", 3, "--num_eval", 2, "--epoch_eval_train", 4, "--full_epochs", 2,
                 "--eval_mode", "C", "--buffer_path", buffers, "--override_load_path", EXPERIMENT]  # fmt: skip
    reports = []
    for name in ("one", "many"):
        shutil.copytree(distilled.parent, tmp_path / name / "Digits")
        words = [*arguments, "--save_path", tmp_path / name]
        if name == "one":
            assert call(E, *words, capsys=capsys, monkeypatch=monkeypatch)[0] == 0
        else:
            _, out, _ = torchrun.ranks(E, *words, shape=shape)
            assert out.count("trained on") == 1
        folder = tmp_path / name / "Digits" / EXPERIMENT
        reports.append(json.loads((folder / "report.json").read_text())["models"])
        assert not list(folder.glob("*.part"))
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "arguments,message",
    [(["--ipc", 0], "expected a whole number >= 1"), (["--buffer_path", "/nowhere"], "expected replay_buffer_0.pt")],
)
def test_a_mistake_is_one_line_of_one_process(arguments, message, tmp_path):
    status, out, err = torchrun.ranks(D, *STAGES, "--root_log_dir", tmp_path, *arguments, check=False)
    (said,) = words(err, "error")
    assert message in said and status == 2 and out == ""
    assert not list(tmp_path.iterdir())


def test_torchrun_names_a_mistake_as_the_cause(tmp_path):
    status, out, err = torchrun.Job(D, *STAGES, "--root_log_dir", tmp_path, "--ipc", 0).end(check=False)
    (said,) = words(err, "error")
    assert "expected a whole number >= 1" in said and status == 1 and out == ""
    assert re.search(r"Root Cause.*?exitcode  : 2 ", err, re.DOTALL)
    assert "traceback : To enable traceback" in err and "errors.py" not in err
