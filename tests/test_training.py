import pytest
import torch

from utils import datasets, training
from utils.augment import DSA
from utils.datasets import Source
from utils.files import Checkpoint


def setting(count=3, model="ConvNetW32"):
    real = datasets.load("Digits", "", torch.device("cpu"))
    images, labels = real.train.batch(slice(0, 50))
    source = Source(images.double(), labels)
    members = [training.new_network(model, real, 0, k).double() for k in range(count)]
    recipe = training.Recipe(
        3, 0.05, 0.9, 5e-4, 20, DSA("color_crop_flip_scale_rotate", "idc"), ((0, 0.2),), cutmix=(0.5, 1.0)
    )
    return source, members, recipe


@pytest.mark.parametrize("model", ["ConvNetW32", "MLP"])
def test_stacked_networks_equal_networks_one_by_one(model):
    results = []
    for stacked in (False, True):
        source, members, recipe = setting(model=model)
        optimizers = None
        for stage in range(2):  # the second time with the momentum of the first
            keys = [("x", stage, k) for k in range(3)]
            optimizers = training.train_together(members, source, recipe, 0, keys, optimizers, stacked=stacked)
        results.append([p.detach() for member in members for p in member.parameters()])
    for one, other in zip(*results, strict=True):
        assert float((one - other).abs().max() / one.abs().max()) < 1e-10


def test_results_do_not_depend_on_how_many_train_together():
    source, members, recipe = setting()
    training.train_together(members, source, recipe, 0, [("x", k) for k in range(3)])
    _, alone, _ = setting()
    training.train(alone[1], source, recipe, 0, ("x", 1))
    assert all(torch.equal(p, q) for p, q in zip(members[1].parameters(), alone[1].parameters(), strict=True))


class Stop(Exception):
    pass


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("moment", [1, 4, 7])
def test_a_stopped_group_continues(stacked, moment, tmp_path):
    keys = [("x", k) for k in range(3)]
    source, expected, recipe = setting()
    training.train_together(expected, source, recipe, 0, keys, stacked=stacked)

    source, members, recipe = setting()
    checkpoint = Checkpoint(tmp_path / "c.pt", minutes=0)
    ticks = []
    original = checkpoint.tick

    def tick():
        original()
        ticks.append(1)
        if len(ticks) > moment % 3 if stacked else len(ticks) > moment:
            raise Stop

    checkpoint.tick = tick
    with pytest.raises(Stop):
        training.train_together(members, source, recipe, 0, keys, checkpoint=checkpoint, stacked=stacked)
    source, members, recipe = setting()
    training.train_together(members, source, recipe, 0, keys, checkpoint=Checkpoint(tmp_path / "c.pt"), stacked=stacked)
    for one, other in zip(expected, members, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
