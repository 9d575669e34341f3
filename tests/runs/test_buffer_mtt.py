import json

import pytest
import torch

import buffer_mtt
import networks
from tests.conftest import EXPERTS, call, files_of
from utils import training
from utils.augment import DSA, DCAugment
from utils.data import datasets
from utils.run.streams import stream
from utils.trajectories import buffer_folder, load_buffer

RECORD = [*EXPERTS, "--save_interval", 2, "--train_epochs", 4]


@pytest.fixture
def record(capsys, monkeypatch):
    """Runs buffer_mtt.py; returns (exit status, stderr)."""
    return lambda *words: call("buffer_mtt.py", *words, capsys=capsys, monkeypatch=monkeypatch)


def read_all(root):
    folder = root / "Digits" / "ConvNetW32"
    return [t for n in range(2) for t in load_buffer(folder / f"replay_buffer_{n}.pt")]


def test_files_have_the_documented_form(buffers):
    folder = buffers / "Digits" / "ConvNetW32"
    visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert visible == {"buffer.json", "replay_buffer_0.pt", "replay_buffer_1.pt"}
    shapes = [p.shape for p in networks.get_network("ConvNetW32", 1, 10, 8).parameters()]
    trajectories = read_all(buffers)
    assert [len(load_buffer(folder / f"replay_buffer_{n}.pt")) for n in range(2)] == [2, 1]
    for trajectory in trajectories:
        assert len(trajectory) == 5
        for entry in trajectory:
            assert [t.shape for t in entry] == shapes
            assert all(t.dtype == torch.float32 and t.device.type == "cpu" and not t.requires_grad for t in entry)
    first = [trajectory[0][0] for trajectory in trajectories]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_folders_are_named_as_published():
    assert str(buffer_folder("b", "CIFAR10", "ConvNet", False)) == "b/CIFAR10_NO_ZCA/ConvNet"
    assert str(buffer_folder("b", "CIFAR100", "ConvNet", True)) == "b/CIFAR100/ConvNet"
    assert str(buffer_folder("b", "Tiny", "ConvNetD4", False)) == "b/Tiny/ConvNetD4"
    assert str(buffer_folder("b", "ImageNet/imagewoof/128", "ConvNetD5", False)) == (
        "b/ImageNet/imagewoof/128/ConvNetD5"
    )


def test_an_expert_is_plain_sgd_with_augmentation(buffers):
    real = datasets.load("Digits", "", torch.device("cpu"))
    network = training.new_network("ConvNetW32", real, 0, "expert", 1)
    dsa = DSA("color_crop_cutout_flip_scale_rotate")
    found = read_all(buffers)[1]
    for epoch in range(2):
        for value, parameter in zip(found[epoch], network.parameters(), strict=True):
            torch.testing.assert_close(value, parameter.detach(), rtol=1e-4, atol=1e-5)
        rng = stream(0, "expert", 1, "train", epoch)
        order = rng.permutation(1437)
        for start in range(0, 1437, 128):
            x, y = real.train.batch(torch.from_numpy(order[start : start + 128]))
            x = dsa.apply(x, dsa.draw(len(x), rng))
            network.zero_grad()
            torch.nn.functional.cross_entropy(network(x), y).backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.03 * parameter.grad


def test_without_dsa_experts_see_the_augmentation_of_dc(buffers, tmp_path, record):  # SPEC 8.4
    """One step on all images: cropped as DC does, by its own numbers, and not as they are."""
    words = [
        "--train_epochs",
        1,
        "--num_experts",
        1,
        "--batch_train",
        2000,
        "--dsa",
        "False",
        "--buffer_path",
        tmp_path,
    ]
    assert record(*EXPERTS, *words)[0] == 0
    ((before, after),) = load_buffer(tmp_path / "Digits" / "ConvNetW32" / "replay_buffer_0.pt")
    real = datasets.load("Digits", "", torch.device("cpu"))
    rng = stream(0, "expert", 0, "train", 0)
    x, y = real.train.batch(torch.from_numpy(rng.permutation(1437)))
    u = DCAugment().draw(1437, rng)
    steps = {}
    for kind, images in (("plain", x), ("augmented", DCAugment().apply(x, u))):
        network = networks.get_network("ConvNetW32", 1, 10, 8)
        with torch.no_grad():
            for parameter, value in zip(network.parameters(), before, strict=True):
                parameter.copy_(value)
        torch.nn.functional.cross_entropy(network(images), y).backward()
        steps[kind] = torch.cat([(p - 0.03 * p.grad).detach().flatten() for p in network.parameters()])
    found = torch.cat([value.flatten() for value in after])
    torch.testing.assert_close(found, steps["augmented"], rtol=1e-5, atol=1e-6)
    assert float((found - steps["plain"]).abs().max()) > 1e-3


def test_experts_of_an_earlier_version_without_dsa_are_not_continued(tmp_path, record):
    """They saw images as they are; those with DSA are continued."""
    words = [*EXPERTS, "--train_epochs", 1, "--buffer_path", tmp_path]
    for dsa, tag in (("False", "plain"), ("True", "dsa")):
        words = [*EXPERTS, "--train_epochs", 1, "--dsa", dsa, "--buffer_path", tmp_path / tag]
        assert record(*words, "--num_experts", 1)[0] == 0
        (path,) = (tmp_path / tag).rglob("buffer.json")
        content = json.loads(path.read_text())
        assert content.pop("behaviour") == 2
        path.write_text(json.dumps(content))
        assert record(*words, "--num_experts", 1)[0] == 0
        status, message = record(*words, "--num_experts", 2)
        assert (status, "begun by an earlier version" in message) == ((2, True) if dsa == "False" else (0, False))


def test_more_experts_continue_the_same_set(buffers, tmp_path, record):
    for count in (1, 3):
        assert record(*RECORD, "--buffer_path", tmp_path, "--num_experts", count)[0] == 0
    found, expected = files_of(tmp_path), files_of(buffers)
    for n in range(2):
        assert found[f"Digits/ConvNetW32/replay_buffer_{n}.pt"] == expected[f"Digits/ConvNetW32/replay_buffer_{n}.pt"]


def test_finished_experts_need_no_writing(buffers, tmp_path, record, monkeypatch):
    monkeypatch.setattr(buffer_mtt, "locked", None)  # as in a folder that may only be read
    before = files_of(buffers)
    assert record(*RECORD, "--buffer_path", buffers, "--num_experts", 3)[0] == 0
    status, message = record(*RECORD, "--buffer_path", buffers, "--num_experts", 3, "--mom", 0.5, "--dry_run")
    assert status == 2 and "mom 0.0 there, 0.5 now" in message
    assert files_of(buffers) == before


def test_published_buffers_count_as_they_are(buffers, tmp_path, record):
    folder = tmp_path / "Digits" / "ConvNetW32"
    folder.mkdir(parents=True)
    torch.save(read_all(buffers), folder / "replay_buffer_0.pt", _use_new_zipfile_serialization=False)
    words = [*EXPERTS, "--train_epochs", 4, "--buffer_path", tmp_path]
    assert record(*words, "--num_experts", 3)[0] == 0
    status, message = record(*words, "--num_experts", 4)
    assert status == 2 and "3 experts made elsewhere" in message


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_pruned_weights_stay_zero(ratio, tmp_path, record):
    words = ["--num_experts", 1, "--train_epochs", 2, "--mom", 0.9, "--l2", 0.001, "--buffer_path", tmp_path]
    assert record(*EXPERTS, *words, "--use-random-pruning", "--sparse-ratio", ratio)[0] == 0
    folder = tmp_path / "Digits" / f"ConvNetW32_random_pruning_{ratio}"  # SPEC 8.7
    (trajectory,) = load_buffer(folder / "replay_buffer_0.pt")
    for start, middle, end in zip(*trajectory, strict=True):
        if start.dim() == 4:
            zeros = start == 0
            assert int(zeros.sum()) == round(ratio * start.numel())
            assert torch.equal(middle == 0, zeros) and torch.equal(end == 0, zeros)
        elif start.dim() == 2:
            assert not (end == 0).any()


def test_the_learning_rate_drops_after_half_of_the_epochs(buffers, tmp_path, record):
    words = ["--train_epochs", 5, "--num_experts", 1, "--decay", "--buffer_path", tmp_path]
    assert record(*EXPERTS, *words)[0] == 0
    ((*same, last),) = load_buffer(tmp_path / "Digits" / "ConvNetW32" / "replay_buffer_0.pt")
    for found, expected in zip(same, read_all(buffers)[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    before, moved = (
        sum(float((a - b).norm()) for a, b in zip(*entries, strict=True)) for entries in (same[-2:], (same[-1], last))
    )
    assert 0 < moved < 0.2 * before
