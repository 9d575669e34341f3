"""The networks of PDD+IDC's outer iterations, against training written out."""

import dataclasses

import numpy as np
import pytest
import torch

from utils import idc_student, training
from utils.data import datasets
from utils.data.datasets import ImageDataset
from utils.idc_student import Student, StudentConfig
from utils.run.streams import EndlessShuffle

EARLIER = training.TrainConfig(2, 0.05, 0.9, 5e-4, 16)
EARLY = training.TrainConfig(2, 0.02, 0.9, 5e-4, 64)
REAL = training.TrainConfig(1, 0.02, 0.9, 5e-4, 64)


@pytest.fixture(scope="module")
def real():
    return datasets.load("Digits", "", torch.device("cpu"))


@pytest.fixture
def make(real, tmp_path):
    """Returns a function of unions, early epochs and n_data that makes a `Student` of stage 2."""

    def make(unions, early=None, n_data=500, epochs=1):
        config = StudentConfig(EARLIER, early, training.TrainConfig(epochs, *list(vars(REAL).values())[1:]), n_data)
        new = lambda number: training.new_network("MLP", real, 0, number)  # noqa: E731
        return Student(new, unions, real.train, config, 4, 3, 7, 2, tmp_path, [len(unions), bool(early)])

    return make


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def momenta(optimizer):
    return [optimizer.state[p]["momentum_buffer"] for group in optimizer.param_groups for p in group["params"]]


def test_each_earlier_union_has_an_optimiser_of_its_own(make, real):  # SPEC 8.12
    """Weights are carried, momentum is not; neither union's momentum reaches the sweeps."""
    unions = [ImageDataset(*real.train.batch(slice(0, count))) for count in (20, 40)]
    student = make(unions)
    student.begin(1)
    expected, carried = (training.new_network("MLP", real, 0, 1) for _ in range(2))
    optimizer = None
    for before, union in enumerate(unions):
        training.train(expected, union, EARLIER, 7, ("earlier", 2, 1, before))
        optimizer = training.train(carried, union, EARLIER, 7, ("earlier", 2, 1, before), optimizer)
    assert same(student.network.parameters(), expected.parameters())
    assert not same(expected.parameters(), carried.parameters())
    assert not student.optimizer.state


def test_early_epochs_and_sweeps_share_the_optimiser(make, real):  # SPEC 8.12
    student = make([ImageDataset(*real.train.batch(slice(0, 20)))], EARLY)
    student.begin(0)
    expected = training.new_network("MLP", real, 0, 0)
    training.train(expected, ImageDataset(*real.train.batch(slice(0, 20))), EARLIER, 7, ("earlier", 2, 0, 0))
    optimizer = training.train(expected, real.train, EARLY, 7, ("early", 2, 0))
    assert same(student.network.parameters(), expected.parameters())
    assert same(momenta(student.optimizer), momenta(optimizer)) and student.optimizer.param_groups[0]["lr"] == 0.02
    before = [m.clone() for m in momenta(student.optimizer)]
    student.begin(1)  # the next one has its own, and none of this one's
    assert same(before, momenta(optimizer)) and not same(before, momenta(student.optimizer))


@pytest.mark.parametrize("n_data,count", [(500, 8), (512, 9), (63, 1), (64, 2), (2000, 32), (0, 0)])
def test_an_update_takes_one_minibatch_more_than_fit(n_data, count, make, monkeypatch):  # SPEC 8.17
    """n_data // 64 + 1 whole minibatches, but none of no images."""
    sizes, step = [], torch.optim.SGD.step

    def minibatches(*arguments):
        for batch in training_minibatches(*arguments):
            sizes.append(len(batch[0]))
            yield batch

    training_minibatches, steps = training.minibatches, []
    monkeypatch.setattr(training, "minibatches", minibatches)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: (steps.append(1), step(*a, **k))[1])
    student = make([], n_data=n_data)
    student.begin(0)
    student.train_on_real(0, 0)
    assert sizes == [64] * count and len(steps) == count


def test_fewer_images_than_a_minibatch_has(make, real, monkeypatch):
    """An update has as many steps then, too, each on all of them."""
    sizes, epoch = [], training.train_epoch
    monkeypatch.setattr(training, "train_epoch", lambda *a: sizes.append((a[3].batch_size, len(a[5]))) or epoch(*a))
    student = make([])
    student.real = ImageDataset(*real.train.batch(slice(0, 30)))
    student.shuffle = EndlessShuffle(np.arange(30), 7, "real", 2)
    student.begin(0)
    student.train_on_real(0, 0)
    assert sizes == [(30, 8 * 30)]


@pytest.mark.parametrize("taught,fix_iter,expected", [(True, 1, [0, 1, 0, 1]), (True, 2, [0, 0, 1, 1]),
                                                     (False, 1, [0, 1, 2, 3]), (False, 2, [0, 0, 2, 2])])  # fmt: skip
def test_a_pool_is_of_networks_that_earlier_unions_have_taught(taught, fix_iter, expected, make, real):
    student = make([ImageDataset(*real.train.batch(slice(0, 20)))] * taught)
    student.config = dataclasses.replace(student.config, pool=2, fix_iter=fix_iter)
    new, made, used = student.new_network, [], []
    student.new_network = lambda number: (made.append(number), new(number))[1]
    for outer in range(4):
        begun = len(made)
        student.begin(outer)
        used += made[begun : begun + 1] or used[-1:]  # the first one that is made is the one it works with
    assert used == expected


def test_a_continued_run_finds_the_networks_that_were_trained_together(make, real, monkeypatch):
    """3 at a time: a run that goes on with outer iteration 4 needs networks 3 to 5, which are there."""
    unions = [ImageDataset(*real.train.batch(slice(0, 20)))]
    first, second = make(unions), make(unions)
    for student in (first, second):
        student.config = dataclasses.replace(student.config, batch=3)
        student.last = 9
    first.begin(3)
    monkeypatch.setattr(training, "train_together", None)
    second.begin(4)
    states = [student.started[4][0] for student in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_updates_go_through_all_images_before_any_comes_again(make, monkeypatch):  # SPEC 8.17
    """1437 images are 22 minibatches of 64 in a permutation; an update of two epochs takes 2 x 4 of them."""
    taken = []

    monkeypatch.setattr(idc_student.training, "train_epoch", lambda *given: taken.append(given[-1]))
    student = make([], n_data=200, epochs=2)
    for outer in range(2):
        student.begin(outer)
        for inner in range(3):
            student.train_on_real(outer, inner)
    batches = torch.cat(taken).view(-1, 64)
    assert len(batches) == 2 * 3 * 2 * 4
    for at in (0, 22):
        pass_ = batches[at : at + 22].flatten().tolist()
        assert len(set(pass_)) == 22 * 64
    assert set(batches[:22].flatten().tolist()) != set(batches[22:44].flatten().tolist())
