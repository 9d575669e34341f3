"""A killed run, started again, ends with the files of an uninterrupted one, bit for bit, and repeats little of it.

`PDD_KILLS` sets how often each script is killed by each signal: 10, so that each is killed 20 times; 50 in the longer
mode, 100 times each.
"""

import os
import re
import signal

import pytest

from tests.support import small
from tests.support.killer import WORK, Kill, check_cost, differing, kill_often, run

KILLS = int(os.environ.get("PDD_KILLS", "10"))
B, D, E, DI, EI, DM = small.SCRIPTS
AGAIN = "run the same command again to continue"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("script", small.SCRIPTS)
def test_killed_runs_continue(script, number, reference, tmp_path):
    def begin(place):
        reference.prepare(script, place)
        return small.arguments(script, place)

    def check(place):
        assert differing(place / small.WRITES[script], reference.expected(script)) == []

    kill_often(script, begin, KILLS, reference.runs[script], tmp_path, number, check)


SUCCESSORS = ["--ema", 0.9, "--syn_lr_form", "exp", "--clip_grad", 0.1, "--grow_start_epoch", 2, "--soft_labels"]
UNION = ["--transition", "union", "--inner_loop", 2, "--n_data", 64]
# Script, more options, the event at which it is killed, which of them, epochs and iterations that this costs.
COSTS = [
    pytest.param(B, ["--train_epochs", 4], r"write epoch_0002\.pt", 2, 1, id="an-epoch-of-an-expert"),
    pytest.param(B, ["--num_experts", 3], r"write expert_00001\.pt", 1, 0, id="an-expert"),
    pytest.param(D, [], r"write checkpoint\.pt", 3, 1, id="a-matching-iteration"),
    pytest.param(D, SUCCESSORS, r"write checkpoint\.pt", 3, 1, id="a-matching-iteration-of-the-methods-after-mtt"),
    pytest.param(D, ["--precision", "bf16"], r"write checkpoint\.pt", 3, 1, id="a-matching-iteration-in-bf16"),
    pytest.param(D, ["--num_eval", 3], "write evaluation-.*", 2, 2, id="a-network-of-an-evaluation-in-a-stage"),
    pytest.param(D, ["--num_experts", 2], r"write expert_00001\.pt", 1, 5, id="an-expert-of-a-transition"),
    pytest.param(DI, [], r"write interval_1_checkpoint\.pt", 3, 2, id="an-idc-sweep-and-its-real-epoch"),
    pytest.param(DI, ["--precision", "bf16"], r"write interval_1_checkpoint\.pt", 3, 2, id="an-idc-sweep-in-bf16"),
    pytest.param(DI, ["--repeat", 3], "write evaluation-.*", 2, 5, id="a-network-of-an-idc-evaluation-in-a-stage"),
    pytest.param(DI, ["--transition_pool", 2], "write starts-.*", 2, 1, id="a-network-of-an-idc-transition"),
    pytest.param(DM, [], r"write interval_1_checkpoint\.pt", 3, 1, id="a-dm-iteration"),
    pytest.param(DM, UNION, r"write interval_1_checkpoint\.pt", 3, 2, id="a-dm-iteration-and-its-real-epoch"),
    pytest.param(E, ["--num_experts", 3], "write distilled-.*", 3, 16, id="a-network-of-an-evaluation"),
    pytest.param(E, ["--full_networks", 2], "write full-.*", 2, 2, id="a-network-on-the-full-training-set"),
    pytest.param(EI, ["--repeat", 3], "write random-.*", 2, 16, id="a-network-of-an-idc-evaluation"),
]


@pytest.mark.parametrize("script,more,event,turn,cost", COSTS)
def test_what_a_kill_costs(script, more, event, turn, cost, reference, tmp_path):
    """No more than one unit of work: the one that was not saved yet."""

    def begin(place, trigger=None):
        if not place.exists():
            reference.prepare(script, place)
        return run(script, [*small.arguments(script, place), *more, "--checkpoint_minutes", 0], trigger)

    whole, first = begin(tmp_path / "whole"), begin(tmp_path / "killed", Kill(event, turn))
    assert first.status == -signal.SIGKILL and first.lost() == cost and len(first.units()) < len(whole.units())
    second = begin(tmp_path / "killed")
    assert whole.status == second.status == 0
    assert second.units() == whole.units()[len(first.units()) :]
    assert second.work() == whole.work() - first.work() + cost
    check_cost([first, second], whole)
    assert differing(tmp_path / "killed", tmp_path / "whole") == []


# The checkpoint that is saved when a signal comes during the third epoch, and how many epochs that costs: those of an
# expert's epoch or of the network of an evaluation.
STOPPED = {
    B: (None, 1),
    D: (f"{small.STAGE}/checkpoint.pt", 1),
    E: (None, 3),
    DI: (f"{small.IDC_FOLDER}/interval_0_checkpoint.pt", 0),
    EI: (None, 3),
    DM: (f"{small.DM_FOLDER}/interval_0_checkpoint.pt", 3),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("script", small.SCRIPTS)
def test_a_signal_stops_a_run_before_its_next_epoch(script, number, reference, tmp_path):
    """With the default schedule, too, where no state would be saved for minutes."""
    reference.prepare(script, tmp_path)
    words, (saved, cost) = small.arguments(script, tmp_path), STOPPED[script]
    first = run(script, words, Kill("epoch", 3, number))
    assert first.status == 128 + number and first.events.count("epoch") == 3
    saved = f"state saved to {tmp_path / saved}; " if saved else ""
    assert first.lines[-1] == f"stopped: by {signal.Signals(number).name}; {saved}{AGAIN}"
    second = run(script, words)
    assert second.status == 0
    assert first.work() + second.work() == reference.runs[script].work() + cost
    assert differing(tmp_path / small.WRITES[script], reference.expected(script)) == []


@pytest.mark.parametrize(
    "script,event", [(D, r"remove checkpoint\.pt"), (DI, r"remove interval_0_checkpoint\.pt"), (D, "read .*")]
)
def test_a_signal_outside_of_loops_stops_a_run_at_once(script, event, reference, tmp_path):
    """Between two stages, and while a file is read, which must not pass for a damaged one."""
    reference.prepare(script, tmp_path)
    words = small.arguments(script, tmp_path)
    ended = run(script, words, Kill(event, 1, signal.SIGTERM))
    assert ended.status == 143 and ended.lines[-1] == f"stopped: by SIGTERM; {AGAIN}"
    first = next(at for at, found in enumerate(ended.events) if re.fullmatch(event, found))
    assert ended.events[first + 1] == "not done" and not set(ended.events[first:]) & set(WORK)
    assert run(script, words).status == 0
    assert differing(tmp_path / small.WRITES[script], reference.expected(script)) == []


@pytest.mark.parametrize("script", small.SCRIPTS)
def test_a_finished_command_changes_nothing(script, reference, tmp_path):
    """It computes nothing; an evaluation trains the networks again that it is to save, and finds the same."""
    reference.prepare(script, tmp_path)
    words = small.arguments(script, tmp_path)
    for turn in range(2):
        ended = run(script, words)
        assert ended.status == 0
        assert differing(tmp_path / small.WRITES[script], reference.expected(script)) == []
        whole = reference.runs[script].work()
        if turn and script not in small.DISTILLATIONS:
            assert 0 < ended.work() < whole
        else:
            assert ended.work() == (0 if turn else whole)
