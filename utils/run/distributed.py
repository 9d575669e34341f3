"""Many processes on one task, started by torchrun; without it there is one, and nothing here costs anything.

The processes (ranks) work in one of two ways: in step, where all make the same turns of a loop and sum tensors, or
apart, where each takes other pieces of work (`checkpoint.finish_each`). Rank 0 alone prints, and writes what belongs
to all. Results do not depend on the number of ranks, but for the rounding of sums.

Tensors travel by NCCL between GPUs and by gloo between CPUs; everything else by gloo. The result folders must be on a
file system that all machines share.
"""

import contextlib
import datetime
import functools
import math
import os

import torch
import torch.distributed as dist

from .errors import PeerLost, UserError

# A rank may wait for another's last network as long as that takes; torchrun notices when a process has ended.
TIMEOUT = datetime.timedelta(days=7)
START_TIMEOUT = datetime.timedelta(minutes=5)  # to find the other processes at the start
# Words of gloo, NCCL and the store about a rank that is gone.
LOST_PEER = ("onnection", "roken pipe", "imed out", "timeout", "emote process", "ocket")


def size():
    """Return the number of ranks; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Return the number of this process, 0 to `size()` - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_rank0():
    """True in the one process that prints and writes for all."""
    return rank() == 0


def local_rank():
    """Return this process's number on its machine."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def local_size():
    """Return the number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1


@contextlib.contextmanager
def _with_peers():
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error) for word in LOST_PEER):
            raise PeerLost from error
        raise


def all_reduce_sum(tensor, group=None):
    """Sum `tensor` over the ranks (of `group`), in place and on every rank with the same bits; returns it.

    Raises:
        PeerLost: another rank ended.
    """
    if size() > 1:
        with _with_peers():
            dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_max(number):
    """Return the largest of the ranks' whole numbers."""
    if size() == 1:
        return number
    value = torch.tensor(number)
    with _with_peers():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def barrier():
    """Return when every rank has come here."""
    all_reduce_max(0)


def gather(value):
    """Return the list of all ranks' `value`s, which pickle takes; tensors are on the CPU."""
    if size() == 1:
        return [value]
    found = [None] * size()
    with _with_peers():
        dist.all_gather_object(found, value)
    return found


def on_rank0(function):
    """Call `function` on rank 0 and return its value on every rank; the others wait.

    Raises:
        UserError: `function` did, on every rank.
    """
    if size() == 1:
        return function()
    said = [None, None]
    if is_rank0():
        try:
            said[0] = function()
        except UserError as error:
            said[1] = str(error)
    with _with_peers():
        dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise UserError(said[1])
    return said[0]


def broadcast_(tensors):
    """Give `tensors` (of one type and device) the values that they have on rank 0, in place."""
    if size() == 1:
        return
    tensors = list(tensors)
    with torch.no_grad(), _with_peers():
        whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.broadcast(whole, src=0)
        for tensor, part in zip(tensors, whole.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def deal(items):
    """Return the items in as many tuples as there are ranks, dealt one by one; empty ones are left out."""
    return [hand for hand in (tuple(items[start :: size()]) for start in range(size())) if hand]


def share(items, spread=True):
    """Return this rank's items: every `size()`th from `rank()` on; unless they may be `spread`, all are rank 0's."""
    return items[rank() :: size()] if spread else items[: len(items) * is_rank0()]


@contextlib.contextmanager
def leaders_first():
    """Enter with rank 0, then with one rank of every other machine, then with the rest.

    So what the first one caches is there for the others, on a shared disk as on each machine's own.
    """
    turn = 0 if is_rank0() else 1 if local_rank() == 0 else 2
    for now in range(3):
        if now == turn:
            yield
        if now < 2:
            barrier()


class Team:
    """Ranks that share the minibatches of one student.

    Args:
        position: this rank's in the team.
        count: ranks in the team; 1 for a rank on its own.
        group: torch.distributed's process group, None for all ranks.
    """

    def __init__(self, position=0, count=1, group=None):
        self.position, self.count, self.group = position, count, group

    def part(self, total):
        """Return (begin, end) of this rank's part of `total` inputs."""
        return total * self.position // self.count, total * (self.position + 1) // self.count

    def all_reduce_sum(self, tensor):
        """Sum `tensor` over the team, in place; returns it."""
        return all_reduce_sum(tensor, self.group) if self.count > 1 else tensor


ALONE = Team()


def form_teams(students, divisible=True):
    """Spread `students` that train side by side over the ranks.

    Every team has as many ranks and as many students: their greatest common divisor gives the teams.

    Args:
        students: how many.
        divisible: whether a student's minibatches may be split over ranks; else some ranks may go without a student.

    Returns:
        (`Team` of this rank, range of its students).
    """
    if size() == 1 or not divisible:
        return ALONE, range(rank(), students, size())
    teams = math.gcd(students, size())
    members = size() // teams
    mine, position = divmod(rank(), members)
    group = _group(members) if 1 < members < size() else None
    return Team(position, members, group), range(mine, students, teams)


@functools.cache  # stages share it
def _group(members):
    """Return this rank's group of `members` ranks; every rank must take part in making it."""
    return dist.new_subgroups(members, timeout=TIMEOUT)[0]
