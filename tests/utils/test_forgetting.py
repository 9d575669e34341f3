"""How hard images are to learn, counted by hand, and data without the easy ones."""

import numpy as np
import pytest
import torch

import networks
from utils import forgetting, training
from utils.data import datasets
from utils.data.datasets import ImageDataset
from utils.forgetting import cached, correct, dropped_fraction, expert_scores, hardness, training_scores, without_easy
from utils.trajectories import BufferWriter, Experts, record_trajectory


@pytest.fixture(scope="module")
def real():
    return datasets.load("Digits", "", torch.device("cpu"))


@pytest.mark.parametrize(
    "epochs,expected",
    [
        ("1111", 0),  # learned at once, never forgotten
        ("0111", 0.2),
        ("0001", 0.6),
        ("1011", 1),
        ("1101", 1),
        ("0110", 1.2),
        ("1010", 2),
        ("0101", 1.2),
        ("0000", 4.8),  # never learned: harder than any that was
    ],
)
def test_forgetting_events_by_hand(epochs, expected):
    history = torch.tensor([[digit == "1"] for digit in epochs])
    assert hardness(history).tolist() == pytest.approx([expected])


def test_images_are_scored_beside_each_other():
    history = torch.tensor([[0, 1, 0], [1, 0, 0], [1, 1, 0]]).bool()
    assert hardness(history).tolist() == pytest.approx([0.25, 1.0, 3.75])


class ByThreshold(torch.nn.Module):
    """Class 1 for pixels above a parameter, else class 0."""

    def __init__(self):
        super().__init__()
        self.threshold = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        above = (x.flatten(1)[:, :1] > self.threshold).float()
        return torch.cat([1 - above, above], dim=1)


def test_which_images_a_network_classifies_right():
    images = ImageDataset(torch.tensor([-1.0, 1.0, -2.0, 3.0, 5.0]).view(5, 1, 1, 1), torch.tensor([0, 1, 1, 0, 1]))
    network = ByThreshold()
    for size in (1, 2, 5, 100):
        assert correct(network, images, size).tolist() == [True, True, False, False, True]
    assert network.training


def test_scores_of_experts_are_the_mean_over_trajectories(tmp_path):
    """Two experts whose threshold moves: 0.5 counts as class 1 below it."""
    for number, thresholds in enumerate([(9, 0, 9, 0), (9, 9, 9, 0)]):
        trajectory = [[torch.tensor([float(value)])] for value in thresholds]
        BufferWriter(tmp_path, 2, 2).add(number, trajectory)
    images = ImageDataset(torch.tensor([0.5, -1.0, 0.5]).view(3, 1, 1, 1), torch.tensor([1, 0, 0]))
    experts = Experts(tmp_path, [(1,)], 4, "Net")
    found = expert_scores(ByThreshold(), experts, 3, images)
    # Epochs 1 to 3 of image 0: 101 and 001; of image 1: 111 twice; of image 2: 010 and 110.
    assert found.tolist() == pytest.approx([(1 + 0.5) / 2, 0, (1.25 + 1) / 2])


def test_experts_with_batch_statistics_are_scored_by_those_of_their_minibatches(real, tmp_path):
    """Their buffers hold parameters alone. The images come class after class, as those of folders do."""
    part = ImageDataset(*real.train.batch(slice(0, 300)))
    many = part.subset(part.labels.argsort(stable=True).repeat_interleave(20))
    network = training.new_network("ConvNetBN", real, 0)
    config = training.TrainConfig(4, 0.05, 0.9, batch_size=50)
    BufferWriter(tmp_path, 1, 1).add(0, record_trajectory(network, part, config, 0, ("x",)))
    experts = Experts(tmp_path, [p.shape for p in network.parameters()], 5, "ConvNetBN")
    fresh = networks.get_network("ConvNetBN", 1, 10, 8)
    kept = expert_scores(fresh, experts, 4, many) < 1  # learned, and not forgotten
    assert float(kept.float().mean()) > 0.86  # 0.83 if they were taken class after class


def test_scores_of_networks_that_are_trained_for_it(real, monkeypatch):
    monkeypatch.setattr(forgetting, "NETWORKS", 2)
    part = ImageDataset(*real.train.batch(slice(0, 60)))
    config = training.TrainConfig(3, 0.05, 0.9, batch_size=20)

    def new(k):
        return training.new_network("MLP", real, 0, k)

    expected = torch.zeros(60)
    for k in range(2):
        network, history = new(k), []
        optimizer = training.sgd(network, config)
        for epoch in range(3):
            one = training.TrainConfig(epoch + 1, 0.05, 0.9, batch_size=20)
            training.train(network, part, one, 5, ("forgetting", k), optimizer, first_epoch=epoch)
            network.eval()
            history.append(network(part.images).argmax(1) == part.labels)
        expected += hardness(torch.stack(history)) / 2
    found = training_scores(new, config, part, 5)
    torch.testing.assert_close(found, expected)
    assert len(set(found.tolist())) > 2


def test_one_stage_drops_nothing_and_says_so(capsys):
    assert forgetting.dropped_fraction(0.5, 1, 1) == 0
    forgetting.note_one_stage(0.5, 1)
    assert "note: --drop_easy changes nothing with one stage" in capsys.readouterr().err
    forgetting.note_one_stage(0.5, 2), forgetting.note_one_stage(0.0, 1)
    assert capsys.readouterr().err == ""


def test_what_is_dropped_grows_linearly():
    assert [dropped_fraction(0.4, stage, 5) for stage in range(1, 6)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [dropped_fraction(0.5, stage, 2) for stage in (1, 2)] == [0, 0.5]
    assert dropped_fraction(0.5, 1, 1) == 0


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.999, 1.0])
def test_the_easiest_of_every_class_are_left_out(fraction, real):
    scores = torch.from_numpy(np.random.default_rng(0).permutation(len(real.train)).astype(np.float32))
    before = real.train.images.clone()
    view = without_easy(real, scores, fraction)
    kept = {tuple(image.flatten().tolist()) for image in view.train.images}
    for label in range(10):
        members = sorted(real.class_indices[label], key=lambda index: float(scores[index]))
        count = max(1, len(members) - int(fraction * len(members)))
        hardest = {tuple(real.train.images[index].flatten().tolist()) for index in members[-count:]}
        indices = view.class_indices[label]
        assert len(indices) == count and (view.train.labels[indices] == label).all()
        assert {tuple(image.flatten().tolist()) for image in view.train.images[indices]} == hardest <= kept
        view.random_indices(label, count, np.random.default_rng(0), "")
    assert len(view.train) == sum(map(len, view.class_indices))
    assert torch.equal(real.train.images, before) and view.test is real.test and view.info is real.info


def test_images_as_hard_as_each_other_leave_in_their_order(real):
    view = without_easy(real, torch.zeros(len(real.train)), 0.5)
    expected = np.sort(np.concatenate([indices[len(indices) // 2 :] for indices in real.class_indices]))
    assert torch.equal(view.train.images, real.train.images[torch.from_numpy(expected)])
    assert without_easy(real, torch.zeros(len(real.train)), 0.0) is real


@pytest.mark.parametrize("damage", ["none", "key", "count", "bytes"])
def test_scores_are_computed_once_and_kept(damage, tmp_path):
    path, computed = tmp_path / "forgetting.pt", []

    def compute(count):
        computed.append(count)
        return torch.arange(count).float()

    assert cached(path, ["a", torch.ones(2)], 3, lambda: compute(3)).tolist() == [0, 1, 2]
    key, count = ["a", torch.ones(2) + (damage == "key")], 4 if damage == "count" else 3
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:-50])
    assert cached(path, key, count, lambda: compute(count)).tolist() == list(range(count))
    assert computed == [3] + [count] * (damage != "none")
    cached(path, key, count, lambda: compute(count))
    assert len(computed) == 1 + (damage != "none")
