import itertools

import pytest
import torch

from networks.reparam import flatten, set_flat
from utils import stages, training
from utils.data import datasets
from utils.data.datasets import ImageDataset
from utils.run.errors import UserError
from utils.stages import evaluation_config, random_unions, staged_accuracies, train_and_test
from utils.trajectories import BufferWriter, Experts, load_buffer, record_trajectory


@pytest.fixture(scope="module")
def real():
    return datasets.load("Digits", "", torch.device("cpu"))


def union(real, first, last):
    return ImageDataset(*real.train.batch(slice(first, last)))


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps of SGD."""
    taken, step = [], torch.optim.SGD.step

    def count(optimizer, closure=None):
        taken.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", count)
    return taken


def test_training_on_a_union_drops_its_learning_rate_after_half():  # SPEC 8.1
    config = evaluation_config(10, torch.tensor(0.5), 32, None)
    assert [config.lr_at(epoch) for epoch in range(11)] == pytest.approx([0.5] * 7 + [0.05] * 4)
    assert (config.epochs, config.momentum, config.weight_decay, config.batch_size) == (11, 0.9, 5e-4, 32)
    assert isinstance(config.lr, float)


def test_an_evaluation_of_four_epochs_takes_five(real, tmp_path, steps):  # SPEC 8.1
    """20 images in minibatches of 8 are 3 steps an epoch; the learning rate drops after index 4 // 2 + 1."""
    config = evaluation_config(4, 0.5, 8, None)
    make = lambda k: training.new_network("MLP", real, 0, k)  # noqa: E731
    train_and_test(make, 2, union(real, 0, 20), config, real.test, 0, ("x",), tmp_path)
    assert steps == pytest.approx(([0.5] * 12 + [0.05] * 3) * 2)


def test_momentum_is_carried_from_union_to_union(real):
    """Against one loop of epochs with one optimiser."""
    unions, configs = (
        [union(real, 0, 20), union(real, 0, 40)],
        [training.TrainConfig(3, lr, 0.9) for lr in (0.02, 0.01)],
    )
    network = training.new_network("MLP", real, 0)
    accuracies = staged_accuracies(network, unions, configs.__getitem__, real.test, 5, ("x", 1))

    twin = training.new_network("MLP", real, 0)
    optimizer, expected = torch.optim.SGD(twin.parameters(), 0.02, 0.9), []
    for index, images in enumerate(unions):
        for group in optimizer.param_groups:
            group["lr"] = (0.02, 0.01)[index]
        for epoch in range(3):
            rng = training.stream(5, "x", 1, index, epoch)
            training.train_epoch(twin, optimizer, images, configs[index], rng)
        expected.append(training.accuracy(twin, real.test))
    assert same(network.parameters(), twin.parameters()) and accuracies == [[value] for value in expected]

    other = training.new_network("MLP", real, 0)
    for index, images in enumerate(unions):  # a new optimiser for each union is something else
        training.train(other, images, configs[index], 5, ("x", 1, index))
    assert not same(network.parameters(), other.parameters())
    anew = training.new_network("MLP", real, 0)  # SPEC 8.12: an evaluation inside a stage
    staged_accuracies(anew, unions, configs.__getitem__, real.test, 5, ("x", 1), carry=False)
    assert same(anew.parameters(), other.parameters())


@pytest.mark.parametrize("epochs,checks,after", [(6, 3, [2, 4, 6]), (5, 2, [2, 5]), (2, 50, [1, 2]), (4, 1, [4])])
def test_checks_are_at_equal_distances_and_the_last_is_the_end(epochs, checks, after, real):  # SPEC 8.11
    config = training.TrainConfig(epochs, 0.02, 0.9, batch_size=16)
    network = training.new_network("MLP", real, 0)
    unions = [union(real, 0, 20), union(real, 0, 40)]
    found = staged_accuracies(network, unions, lambda _: config, real.test, 5, ("x",), checks=checks)
    twin, optimizer, expected = training.new_network("MLP", real, 0), None, []
    for index, images in enumerate(unions):
        tested = {}
        optimizer = training.train(
            twin, images, config, 5, ("x", index), optimizer,
            after_epoch=lambda epoch, _, tested=tested: tested.update({epoch + 1: training.accuracy(twin, real.test)}),
        )  # fmt: skip
        expected.append([tested[epoch] for epoch in after])
    assert found == expected


def test_random_unions_are_nested_and_of_their_classes(real):
    unions = random_unions(real, [(0, 2), (0, 4), (0, 6)], 0, (1,))
    assert [len(u) for u in unions] == [20, 40, 60]
    rows = [[tuple(x.flatten().tolist()) for x in u.batch(slice(None))[0]] for u in unions]
    network_space, labels = real.train.batch(slice(None))
    for small, large in itertools.pairwise(range(3)):
        for label in range(10):
            few, many = (
                [row for row, y in zip(rows[k], unions[k].labels, strict=True) if y == label] for k in (small, large)
            )
            assert many[: len(few)] == few and len(few) == unions[small].labels.eq(label).sum() == 2 * (small + 1)
            assert set(many) <= {tuple(x.flatten().tolist()) for x in network_space[labels == label]}
    again, other = (random_unions(real, [(0, 2), (0, 4), (0, 6)], 0, (k,)) for k in (1, 2))
    assert torch.equal(again[0].images, unions[0].images) and not torch.equal(other[0].images, unions[0].images)

    first, second = random_unions(real, [(0, 2), (2, 6)], 0, (1,))  # of --new_only
    both = torch.cat([first.images, second.images]).flatten(1)
    assert len(second) == 40 and len(both.unique(dim=0)) == len(unions[2].images.flatten(1).unique(dim=0)) == 60


@pytest.mark.parametrize("imagenet", [None, "no_crop"])
def test_random_unions_are_augmented_as_the_real_images(real, imagenet):
    """ImageNet's augmentation is made for pixels in [0, 1]."""
    (union,) = random_unions(real, [(0, 20)], 0, ())
    config = training.TrainConfig(1, 0.01, batch_size=200, imagenet=imagenet)
    seen = []

    class Watched(torch.nn.Linear):
        def forward(self, x):
            seen.append(x)
            return super().forward(x.flatten(1))

    training.train(Watched(64, 10), union, config, 0, ())
    low, high = real.train.batch(slice(None))[0].aminmax()
    assert seen[0].min() < low / 2 < 0 and seen[0].max() > high / 2 > 0.5


def test_evaluation_networks_are_trained_once(real, tmp_path):
    images, config, made = union(real, 0, 20), evaluation_config(2, 0.02, 16, None), []

    def make(k):
        made.append(k)
        return training.new_network("MLP", real, 0, k)

    def evaluate(folder, make=make):
        return train_and_test(make, 3, images, config, real.test, 7, ("evaluation", 1, 0), folder)

    expected = []
    for k in range(3):
        network = training.new_network("MLP", real, 0, k)
        training.train(network, images, config, 7, ("evaluation", 1, 0, k))
        expected.append(training.accuracy(network, real.test))
    assert len(set(expected)) > 1

    def killed(k):
        if k == 2:
            raise KeyboardInterrupt
        return make(k)

    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, killed)
    assert evaluate(tmp_path) == expected and made == [0, 1, 2]
    images.images[0] += 1  # another union
    evaluate(tmp_path)
    assert made == [0, 1, 2, 0, 1, 2]


def test_evaluations_of_several_architectures_keep_what_each_has_finished(real, tmp_path):
    images, config, made = union(real, 0, 20), evaluation_config(1, 0.02, 16, None), []

    def evaluate(stop=None):
        for name in ("A", "B"):

            def make(k, name=name):
                if (name, k) == stop:
                    raise KeyboardInterrupt
                made.append((name, k))
                return training.new_network("MLP", real, 0, k)

            train_and_test(make, 2, images, config, real.test, 7, ("evaluation", 1, 0, name), tmp_path)

    for _ in range(2):  # killed twice at the same place
        with pytest.raises(KeyboardInterrupt):
            evaluate(("B", 1))
    evaluate()
    assert made == [("A", 0), ("A", 1), ("B", 0), ("B", 1)]


@pytest.fixture
def transition(real, tmp_path, monkeypatch):
    """A transition of three experts, two to a replay buffer; returns a function of the folder and `after_expert`."""
    network = training.new_network("ConvNetW32", real, 0)
    trajectories = []
    for k in range(3):
        start = training.new_network("ConvNetW32", real, 0, k)
        trajectories.append([training.snapshot(start)] * 2)
    writer = BufferWriter(tmp_path / "before", 3, 2)
    for k, trajectory in enumerate(trajectories):
        writer.add(k, trajectory)
    experts = Experts(tmp_path / "before", [p.shape for p in network.parameters()], 2, "ConvNetW32")

    def at(vector):
        made = training.new_network("ConvNetW32", real, 0)
        set_flat(made, vector)
        return made

    images, config = union(real, 0, 20), evaluation_config(2, 0.02, 16, None)
    part, real_config = union(real, 100, 140), training.TrainConfig(2, 0.03, 0.5, 1e-3, 16)

    def run(folder, after_expert=lambda *_: None):
        monkeypatch.setattr(stages.Progress, "update", after_expert)
        stages.transition(at, experts, images, config, part, real_config, folder, 2, 3, 1)
        return [t for n in (0, 1) for t in load_buffer(folder / f"replay_buffer_{n}.pt")]

    run.plain = []
    for k in range(3):
        trained = at(flatten(trajectories[k][0]))
        training.train(trained, images, config, 3, ("transition", 1, k))
        run.plain.append(record_trajectory(trained, part, real_config, 3, ("trajectory", 1, k)))
    return run


def test_a_transition_of_two_epochs_takes_three_on_the_union(transition, tmp_path, steps):  # SPEC 8.1
    """20 images in minibatches of 16: 2 steps an epoch; then 2 epochs on 40 real ones, 3 steps each."""
    transition(tmp_path / "after")
    assert steps == pytest.approx(([0.02] * 3 * 2 + [0.03] * 2 * 3) * 3)


def test_a_transition_trains_each_expert_on_the_union_then_records_it(transition, tmp_path):
    found = transition(tmp_path / "after")
    assert len(found) == 3 and sorted(p.name for p in (tmp_path / "after").iterdir()) == [
        "replay_buffer_0.pt",
        "replay_buffer_1.pt",
    ]
    for trajectory, expected in zip(found, transition.plain, strict=True):
        assert len(trajectory) == 3
        assert all(same(entry, truth) for entry, truth in zip(trajectory, expected, strict=True))


def test_a_transition_that_diverges_stops_and_keeps_nothing_of_it(transition, tmp_path, monkeypatch):
    recorded = stages.record_trajectory

    def diverging(*arguments):
        trajectory = recorded(*arguments)
        return [*trajectory[:-1], [tensor * torch.inf for tensor in trajectory[-1]]]

    monkeypatch.setattr(stages, "record_trajectory", diverging)
    with pytest.raises(UserError, match="stage 1, transition, expert 1: its parameters became NaN or infinite; begin"):
        transition(tmp_path / "after")
    assert not list((tmp_path / "after").glob("replay_buffer_*.pt"))


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_an_interrupted_transition_keeps_its_finished_experts(moment, transition, tmp_path):
    counted = []

    def after(limit):
        def count(_progress):
            counted.append(1)
            if len(counted) == limit:
                raise KeyboardInterrupt

        return count

    with pytest.raises(KeyboardInterrupt):
        transition(tmp_path / "after", after(moment))
    counted.clear()
    found = transition(tmp_path / "after", after(99))
    assert len(counted) == 3 - moment
    for trajectory, expected in zip(found, transition.plain, strict=True):
        assert all(same(entry, truth) for entry, truth in zip(trajectory, expected, strict=True))
