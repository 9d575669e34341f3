"""Many processes on one task, started by torchrun; without it there is one, and nothing here costs anything.

The processes (ranks) work in one of two ways: in step, where all make the same turns of a loop and sum tensors, or
apart, where each takes other pieces of work (`files.Checkpoint.spread`). Rank 0 alone prints, and writes what belongs
to all. Results do not depend on the number of ranks, but for the rounding of sums.

Tensors travel by NCCL between GPUs and by gloo between CPUs; everything else by gloo. The result folders must be on a
file system that all machines share.
"""

import contextlib
import datetime
import math
import os
import sys
import time
import uuid

import torch
import torch.distributed as dist

from utils.errors import PeerLost, UserError
from utils.errors import run as run_alone

# A rank may wait for another's last network as long as that takes; torchrun notices when a process has ended.
PATIENCE = datetime.timedelta(days=7)
MEETING = datetime.timedelta(minutes=5)  # to find the other processes at the start
# Words of gloo, NCCL and the store about a rank that is gone.
LOST = ("onnection", "roken pipe", "imed out", "timeout", "emote process", "ocket")


def run(main, memory):
    """Run a script's `main` in every process of torchrun, or as it is without; ends as `errors.run` says.

    Of several ranks that fail, the first one alone says why. Arguments as for `errors.run`.
    """
    if not dist.is_torchelastic_launched():
        run_alone(main, memory)
        return
    store, number, count = next(dist.rendezvous("env://", timeout=MEETING))
    store = _meet(store, number, count)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group_store = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group_store, rank=number, world_size=count, timeout=PATIENCE)

    def speaks():
        try:
            return store.add("spoken", 1) == 1
        except RuntimeError:
            return True

    status = 0
    try:
        run_alone(main, memory, speaks)
    except SystemExit as end:
        status = end.code or 0
    # Taking the group apart would wait for ranks that are gone, and can abort where another one is quicker.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _meet(store, number, count):
    """Return a store of this start of the job alone, known to every rank.

    The store that torchrun gives outlives the ranks: after a restart it holds what they wrote before, and machines
    may have counted different numbers of restarts. So every rank says hello with a name that nobody had before, and
    rank 0 answers with the name of the start.
    """
    name = uuid.uuid4().hex
    if number:
        store.set(f"hello/{number}", name)
        start = store.get(f"welcome/{name}").decode()  # waits for it
        store.set(f"{start}/here/{number}", "")
        return dist.PrefixStore(start, store)
    missing = set(range(1, count))
    until = time.monotonic() + MEETING.total_seconds()
    while missing:
        if time.monotonic() > until:
            raise TimeoutError(f"ranks {sorted(missing)} of {count} have not come within {MEETING}")
        for other in [other for other in missing if store.check([f"hello/{other}"])]:
            store.set(f"welcome/{store.get(f'hello/{other}').decode()}", name)
        time.sleep(0.01)
        missing = {other for other in missing if not store.check([f"{name}/here/{other}"])}
    return dist.PrefixStore(name, store)


def size():
    """Return the number of ranks; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Return the number of this process, 0 to `size()` - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    """True in the one process that prints and writes for all."""
    return rank() == 0


def local_rank():
    """Return the number of this process on its machine."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def local_size():
    """Return the number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1


@contextlib.contextmanager
def _with_peers():
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error) for word in LOST):
            raise PeerLost from error
        raise


def sum_(tensor, group=None):
    """Sum `tensor` over the ranks (of `group`), in place and on every rank with the same bits; returns it.

    Raises:
        PeerLost: another rank ended.
    """
    if size() > 1:
        with _with_peers():
            dist.all_reduce(tensor, group=group)
    return tensor


def largest(number):
    """Return the largest of the ranks' whole numbers."""
    if size() == 1:
        return number
    value = torch.tensor(number)
    with _with_peers():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def wait():
    """Return when every rank has come here."""
    largest(0)


def gather(value):
    """Return the list of all ranks' `value`s, which pickle takes; tensors are on the CPU."""
    if size() == 1:
        return [value]
    found = [None] * size()
    with _with_peers():
        dist.all_gather_object(found, value)
    return found


def first(function):
    """Call `function` on rank 0 and return its value on every rank; the others wait.

    Raises:
        UserError: `function` did, on every rank.
    """
    if size() == 1:
        return function()
    said = [None, None]
    if is_first():
        try:
            said[0] = function()
        except UserError as error:
            said[1] = str(error)
    with _with_peers():
        dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise UserError(said[1])
    return said[0]


def copy_from_first(tensors):
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


def share(items):
    """Return the items of this rank: every `size()`th from `rank()` on."""
    return items[rank() :: size()]


@contextlib.contextmanager
def leaders_first():
    """Enter with rank 0, then with one rank of every other machine, then with the rest.

    So what the first one caches is there for the others, on a shared disk as on each machine's own.
    """
    turn = 0 if is_first() else 1 if local_rank() == 0 else 2
    for _ in range(turn):
        wait()
    yield
    for _ in range(2 - turn):
        wait()


class Team:
    """Ranks that share the minibatches of one student.

    Args:
        position: of this rank in the team.
        count: ranks of the team; 1 for a rank on its own.
        group: of torch.distributed, None for all ranks.
    """

    def __init__(self, position=0, count=1, group=None):
        self.position, self.count, self.group = position, count, group

    def part(self, total):
        """Return (begin, end) of this rank's part of `total` inputs."""
        return total * self.position // self.count, total * (self.position + 1) // self.count

    def sum_(self, tensor):
        """Sum `tensor` over the team, in place; returns it."""
        return sum_(tensor, self.group) if self.count > 1 else tensor


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
    if teams == 1:
        return Team(position, members), range(students)
    # Every rank must take part in making every group.
    groups = [dist.new_group(list(range(t * members, (t + 1) * members)), timeout=PATIENCE) for t in range(teams)]
    return Team(position, members, groups[mine]), range(mine, students, teams)
