"""Named random streams: every random decision of a run is drawn from a generator named after its place.

So a run needs no generator state to continue, results do not depend on the order of the work or on how many networks
train at once, and a CPU and a GPU see the same draws.
"""

import contextlib
import zlib

import numpy as np
import torch


def stream(seed, *keys):
    """Return the numpy.random.Generator that belongs to `keys` (stage, iteration, epoch, …) of the run's `seed`.

    Args:
        seed: the run's seed, an int >= 0.
        keys: ints >= 0 and strings.
    """
    return np.random.default_rng([seed, *(zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in keys)])


class EndlessShuffle:
    """Minibatches of one random permutation after another, without replacement inside each.

    Args:
        indices: what is shuffled.
        seed, keys: of `stream`; each permutation adds its number.
    """

    def __init__(self, indices, seed, *keys):
        self.indices, self.seed, self.keys = np.asarray(indices), seed, keys
        self.turn, self.order = None, None

    def batch(self, number, size):
        """Return minibatch `number` (from 0) of `size` indices; what is left of a permutation is not used."""
        turn, position = divmod(number, len(self.indices) // size)
        if turn != self.turn:
            self.turn, self.order = turn, stream(self.seed, *self.keys, turn).permutation(self.indices)
        return self.order[position * size : (position + 1) * size]


def seeded(seed, *keys):
    """Return a context in which torch's CPU generator is seeded for `keys`: networks are initialised inside it."""
    return torch_seeded(int(stream(seed, *keys).integers(2**63)), torch.device("cpu"))


@contextlib.contextmanager
def torch_seeded(seed, device):
    """Seed torch's generators for the CPU and for `device` inside this context; outside it nothing changes."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.random.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        yield
