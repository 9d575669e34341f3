import itertools
import shutil

import numpy as np
import pytest
import torch

from utils import training
from utils.data import datasets
from utils.data.datasets import ImageDataset
from utils.run import files
from utils.run.errors import UserError
from utils.trajectories import (
    BufferWriter,
    Experts,
    buffer_files,
    buffer_folder,
    find_buffers,
    held_out_fraction,
    load_buffer,
    record_trajectory,
)

# Epochs of one expert -------------------------------------------------------------------------------------------------

EPOCHS = 3
CONFIG = training.TrainConfig(EPOCHS, 0.03, 0.9, 1e-3, 16, lr_milestones=((1, 0.1),))


@pytest.fixture(scope="module")
def digits():
    return datasets.load("Digits", "", torch.device("cpu"))


class Killed(BaseException):
    """What stands for SIGKILL: nobody catches it."""


def record(digits, folder=None, model="ConvNetBN", stop_after=None, pruned=False):
    """Record one expert; returns (trajectory, epochs trained)."""
    images = ImageDataset(*digits.train.batch(slice(0, 40)))
    network = training.new_network(model, digits, 0, "expert")
    if pruned:
        training.prune(network, 0.5, np.random.default_rng(0))
    trained = []

    def after_epoch(epoch, _loss):
        trained.append(epoch)
        if epoch == stop_after:
            raise Killed

    trajectory = record_trajectory(network, images, CONFIG, 0, ("expert", 0), folder, after_epoch)
    return trajectory, trained


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(p, q) for a, b in zip(one, other, strict=True) for p, q in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_an_expert_killed_after_any_epoch_goes_on_bit_for_bit(epoch, pruned, digits, tmp_path):
    """With momentum, a milestone, and statistics of batches that are no parameters."""
    expected, trained = record(digits, pruned=pruned)
    assert len(expected) == EPOCHS + 1 and trained == [0, 1, 2]
    with pytest.raises(Killed):
        record(digits, tmp_path, stop_after=epoch, pruned=pruned)
    found, trained = record(digits, tmp_path, pruned=pruned)
    assert equal(found, expected) and trained == list(range(epoch + 1, EPOCHS))


@pytest.mark.parametrize("damaged,again", [(0, [0, 1, 2]), (1, [1, 2]), (2, [2])])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "text"])
def test_epochs_whose_file_is_damaged_are_trained_again(damage, damaged, again, digits, tmp_path):
    expected, _ = record(digits, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"epoch_000{n}.pt" for n in range(3)]
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    path = tmp_path / f"epoch_000{damaged}.pt"
    if damage == "gone":
        path.unlink()
    elif damage == "changed":
        state = files.load(path)
        next(iter(state["network"].values())).add_(1e-6)
        files.save(path, state)
    else:
        path.write_bytes(before[path][:-100] if damage == "cut" else b"text")
    found, trained = record(digits, tmp_path)
    assert equal(found, expected) and trained == again
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


# Buffers --------------------------------------------------------------------------------------------------------------

SHAPES = [(2, 3), (2,)]


def trajectory(number, entries=3):
    return [[torch.full(shape, float(10 * number + entry)) for shape in SHAPES] for entry in range(entries)]


def numbers(folder):
    """Return {file: numbers of its experts}."""
    return {p.name: [int(t[0][0][0, 0]) // 10 for t in load_buffer(p)] for p in buffer_files(folder)}


WHOLE = {"replay_buffer_0.pt": [0, 1], "replay_buffer_1.pt": [2, 3], "replay_buffer_2.pt": [4]}


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0, 3, 1)])
@pytest.mark.parametrize("moment", range(6))
def test_any_order_and_interruption_give_the_same_files(order, moment, tmp_path):
    writer = BufferWriter(tmp_path, 5, 2)
    for number in order[:moment]:
        writer.add(number, trajectory(number))
    writer = BufferWriter(tmp_path, 5, 2)  # another process
    assert writer.missing() == sorted(order[moment:])
    for number in order[moment:]:
        writer.add(number, trajectory(number))
    assert writer.missing() == [] and numbers(tmp_path) == WHOLE
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(WHOLE)


def test_several_processes_store_and_one_merges(tmp_path):
    writers = [BufferWriter(tmp_path, 5, 2) for _ in range(2)]
    for number in range(5):
        writers[number % 2].add(number, trajectory(number), alone=False)
    assert numbers(tmp_path) == {}
    writers[0].merge()
    assert numbers(tmp_path) == WHOLE and not (tmp_path / "partial").exists()


def test_a_kill_between_a_buffer_and_its_parts_costs_nothing(tmp_path, monkeypatch):
    writer = BufferWriter(tmp_path, 2, 2)
    writer.add(0, trajectory(0))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: (_ for _ in ()).throw(Killed))
        writer.add(1, trajectory(1))
    assert BufferWriter(tmp_path, 2, 2).missing() == []
    BufferWriter(tmp_path, 2, 2).merge()
    assert numbers(tmp_path) == {"replay_buffer_0.pt": [0, 1]} and not (tmp_path / "partial").exists()


def test_more_experts_complete_the_last_buffer(tmp_path):
    for count in (1, 3, 5):
        writer = BufferWriter(tmp_path, count, 2)
        for number in writer.missing():
            writer.add(number, trajectory(number))
    assert numbers(tmp_path) == WHOLE


def test_a_stored_expert_needs_its_epochs_no_more(tmp_path):
    writer = BufferWriter(tmp_path, 2, 2)
    epochs = writer.epochs(1)
    assert epochs == tmp_path / "partial" / "expert_00001"
    files.save(epochs / "epoch_0000.pt", {})
    writer.add(1, trajectory(1))
    assert not epochs.exists() and writer.missing() == [0]


@pytest.mark.parametrize("name", ["replay_buffer_0.pt", "partial/expert_00003.pt"])
@pytest.mark.parametrize("value", [b"text", [], [1], {"a": 1}, [[torch.zeros(2, dtype=torch.int64)]]])
def test_damaged_buffers_are_refused(name, value, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(value) if isinstance(value, bytes) else files.save(path, value)
    with pytest.raises(UserError, match=f"{path}: expected a re(play buffer|corded expert)"):
        BufferWriter(tmp_path, 5, 2)


# Experts --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    writer = BufferWriter(tmp_path / "b", 5, 2)
    for number in range(5):
        writer.add(number, trajectory(number))
    return tmp_path / "b"


@pytest.mark.parametrize("load_all", [False, True])
@pytest.mark.parametrize(
    "limits,expected",
    [
        ((None, None), [0, 1, 2, 3, 4]),
        ((3, None), [0, 1, 2, 3, 4]),
        ((9, 2), [0, 1, 2, 3, 4]),
        ((None, 1), [0, 2, 4]),
    ],
)
def test_limits_choose_experts(limits, expected, load_all, folder):
    experts = Experts(folder, SHAPES, 3, "Net", *limits, load_all, np.random.default_rng(0))
    assert len(experts) == len(expected)
    for number, expert in enumerate(expected):
        for epoch in range(3):
            assert experts.parameters(number, epoch).tolist() == [10.0 * expert + epoch] * 8


def test_max_files_are_chosen_at_random(folder):  # SPEC 8.5
    chosen = set()
    for seed in range(40):
        experts = Experts(folder, SHAPES, 3, "Net", max_files=2, rng=np.random.default_rng(seed))
        numbers = [int(experts.parameters(k, 0)[0]) // 10 for k in range(len(experts))]
        again = Experts(folder, SHAPES, 3, "Net", max_files=2, rng=np.random.default_rng(seed))
        assert again.paths == experts.paths
        chosen.add(tuple(numbers))
    assert chosen == {(0, 1, 2, 3), (0, 1, 4), (2, 3, 4)}


def test_experts_in_memory_are_those_of_the_file_that_is_read(folder):  # SPEC 8.3
    experts = Experts(folder, SHAPES, 3, "Net")
    order = [3, 2, 4, 1, 0]  # experts 0 and 1 share a file, 2 and 3 another
    assert [experts.in_memory(number, order) for number in range(7)] == [
        [3, 2], [3, 2], [4], [1, 0], [1, 0], [3, 2], [3, 2],
    ]  # fmt: skip
    assert [experts.drawn(number, order, None) for number in range(7)] == [3, 2, 4, 1, 0, 3, 2]
    few = Experts(folder, SHAPES, 3, "Net", max_experts=1)
    assert [few.in_memory(number, [1, 0, 2]) for number in range(3)] == [[1], [0], [2]]
    assert Experts(folder, SHAPES, 3, "Net", load_all=True).in_memory(2, order) == [0, 1, 2, 3, 4]


def test_load_all_draws_with_replacement(folder):  # SPEC 8.5
    experts = Experts(folder, SHAPES, 3, "Net", load_all=True)
    drawn = [experts.drawn(number, [3, 2, 4, 1, 0], np.random.default_rng(number)) for number in range(500)]
    assert all(abs(drawn.count(expert) - 100) < 45 for expert in range(5))  # 5 standard deviations
    # A pass of 5 draws misses no expert with probability 5! / 5^5 = 0.0384; 100 passes, 5 standard deviations.
    assert sum(sorted(drawn[at : at + 5]) == [0, 1, 2, 3, 4] for at in range(0, 500, 5)) < 14


def test_a_pass_shuffles_files_and_the_experts_inside_a_file(folder):
    experts = Experts(folder, SHAPES, 3, "Net")
    groups = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2}
    orders = [tuple(experts.order(np.random.default_rng(seed))) for seed in range(300)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert all(len(list(itertools.groupby(order, groups.get))) == 3 for order in orders)  # file after file
    assert len(set(orders)) == 24  # 3! orders of files, 2 · 2 inside them


def test_experts_that_do_not_fit_are_refused(folder):
    with pytest.raises(UserError, match="expected 1 parameter tensors, found 2"):
        Experts(folder, SHAPES[:1], 3, "Net")
    with pytest.raises(UserError, match=r"parameter 1 of shape \(3,\), found \(2,\)"):
        Experts(folder, [(2, 3), (3,)], 3, "Net")
    with pytest.raises(UserError, match=r"expected trajectories of 4 entries at least .*, found 3"):
        Experts(folder, SHAPES, 4, "Net")
    with pytest.raises(UserError, match=r"expected replay_buffer_0\.pt and so on, found none"):
        Experts(folder / "none", SHAPES, 3, "Net")
    broken = trajectory(0)
    broken[2][1][0] = float("inf")
    files.save(folder / "replay_buffer_0.pt", [trajectory(0), broken])
    experts = Experts(folder, SHAPES, 3, "Net")
    experts.parameters(1, 1)
    with pytest.raises(UserError, match=r"replay_buffer_0\.pt: expert 1 after epoch 2 holds NaN or infinite"):
        experts.parameters(1, 2)


def test_buffers_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("replay_buffer_10.pt", "replay_buffer_2.pt", "replay_buffer_x.pt", "replay_buffer_1.pt.tmp"):
        (tmp_path / name).write_text("")
    assert [p.name for p in buffer_files(tmp_path)] == ["replay_buffer_2.pt", "replay_buffer_10.pt"]
    assert buffer_files(tmp_path / "none") == []


def test_buffers_are_found_below_their_root_or_in_the_folder_itself(folder, tmp_path):
    layout = ("CIFAR10", "ConvNet", False)
    nested = buffer_folder(tmp_path / "root", *layout)
    assert nested == tmp_path / "root" / "CIFAR10_NO_ZCA" / "ConvNet"
    assert buffer_folder("root", "CIFAR10", "ConvNet", True).as_posix() == "root/CIFAR10/ConvNet"
    assert buffer_folder("root", "Tiny", "ConvNetD4", False).as_posix() == "root/Tiny/ConvNetD4"
    assert find_buffers(folder, *layout) == folder
    with pytest.raises(UserError, match=r"CIFAR10_NO_ZCA/ConvNet: expected replay_buffer_0\.pt and so on, found none"):
        find_buffers(tmp_path / "root", *layout)
    shutil.copytree(folder, nested)
    assert find_buffers(tmp_path / "root", *layout) == nested


@pytest.mark.parametrize("zca", [False, True])
def test_experts_that_saw_images_in_another_space_are_refused(zca, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "own")
    files.write_json(tmp_path / "own" / "buffer.json", {"options": {"zca": zca}})
    assert find_buffers(tmp_path / "own", "Digits", "ConvNet", zca) == tmp_path / "own"
    with pytest.raises(UserError, match=f"recorded with{'' if zca else 'out'} --zca; take others, or the same here"):
        find_buffers(tmp_path / "own", "Digits", "ConvNet", not zca)


def test_buffers_of_another_resolution_are_named(folder, tmp_path):
    for res in (32, 64):
        shutil.copytree(folder, buffer_folder(tmp_path, f"ImageNet/imagewoof/{res}", "ConvNetD5", False))
    buffer_folder(tmp_path, "ImageNet/imagewoof/256", "ConvNetD5", False).mkdir(parents=True)
    with pytest.raises(UserError, match=r"imagewoof/128/ConvNetD5: .* found none \(but for --res 32, 64\); record"):
        find_buffers(tmp_path, "ImageNet/imagewoof/128", "ConvNetD5", False)


def test_what_experts_never_saw_is_in_their_config(tmp_path):
    assert held_out_fraction(tmp_path) == 0.0  # published ones
    for content, expected in (({"options": {}}, 0.0), ({"options": {"val_fraction": 0.2}}, 0.2)):
        files.write_json(tmp_path / "buffer.json", content)
        assert held_out_fraction(tmp_path) == expected
    files.write_json(tmp_path / "buffer.json", {"options": {"val_fraction": "0.2"}})
    with pytest.raises(UserError, match=r"buffer\.json: expected a number val_fraction, found '0.2'"):
        held_out_fraction(tmp_path)
