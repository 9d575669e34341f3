import itertools

import numpy as np
import pytest
import torch

from utils.run.streams import EndlessShuffle, seeded, stream, torch_seeded


def numbers(*keys):
    return tuple(stream(*keys).integers(2**62, size=4).tolist())


def test_equal_keys_give_equal_numbers_and_other_keys_other_ones():
    keys = [
        (0,), (1,), (0, 1), (1, 1), (0, "a"), (0, "b"), (0, "a", 1), (0, 1, "a"), (0, "a", "b"), (0, "b", "a"),
        (0, "ab"), (0, "a", 1, 2), (0, "a", 2, 1), (0, "a", 12), (0, "1"),
    ]  # fmt: skip
    drawn = [numbers(*key) for key in keys]
    assert drawn == [numbers(*key) for key in keys]
    assert all(one != other for one, other in itertools.combinations(drawn, 2))


def test_numpys_whole_numbers_are_keys_like_pythons():
    assert numbers(3, "a", np.int64(5)) == numbers(3, "a", 5)


def test_streams_of_this_version_are_those_of_every_version():
    """Results and interrupted runs of earlier versions depend on these numbers."""
    assert stream(0, "subset", 1).integers(1000, size=6).tolist() == [35, 46, 436, 800, 376, 727]
    assert stream(7, "matching", 2, 11).permutation(8).tolist() == [1, 0, 3, 4, 7, 5, 6, 2]
    with seeded(0, "network", "student"):
        assert torch.randint(1000, (6,)).tolist() == [538, 389, 927, 905, 352, 127]


def test_inside_torch_is_seeded_and_outside_nothing_changes():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(0, "network", 1):
        first = torch.rand(3)
        with torch_seeded(9, torch.device("cpu")):
            inner = torch.rand(3)
        rest = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(0, "network", 1):
        assert torch.equal(torch.rand(6), torch.cat([first, rest]))
    assert torch.equal(inner, torch.rand(3, generator=torch.Generator().manual_seed(9)))
    with seeded(0, "network", 2):
        assert not torch.equal(torch.rand(3), first)


def test_an_error_inside_leaves_the_generator_as_it_was():
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="inside"), seeded(0):
        torch.rand(3)
        raise ValueError("inside")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_endless_shuffle_repeats_nothing_inside_a_permutation():  # SPEC 8.17
    """11 in minibatches of 3: three of each permutation, the last two are not used."""
    shuffle = EndlessShuffle(range(100, 111), 0, "x")
    batches = [shuffle.batch(number, 3).tolist() for number in range(30)]
    for at in range(0, 30, 3):
        seen = [*itertools.chain(*batches[at : at + 3])]
        assert len(seen) == len(set(seen)) == 9 and set(seen) <= set(range(100, 111))
    assert len({tuple(batches[at]) for at in range(0, 30, 3)}) == 10
    again = EndlessShuffle(range(100, 111), 0, "x")
    assert [again.batch(number, 3).tolist() for number in (29, 4, 5, 0)] == [batches[k] for k in (29, 4, 5, 0)]
    assert EndlessShuffle(range(100, 111), 0, "y").batch(0, 3).tolist() != batches[0]
