"""Device, random streams, signals and versions: the surroundings of a run."""

import contextlib
import ctypes
import platform
import signal
import subprocess
import zlib
from pathlib import Path

import numpy as np
import torch

from utils import distributed
from utils.errors import UserError


def choose_device(name):
    """Return the torch.device called `name`; `auto` takes cuda, then mps, then cpu.

    Under torchrun `cuda` is a GPU for each rank of a machine.

    Raises:
        UserError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and distributed.size() > 1:
            if device.index is not None:
                raise UserError(f"--device {name}: expected cuda under torchrun, which gives every rank its own GPU")
            device = torch.device("cuda", distributed.local_rank())
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); use auto or cpu") from None
    if device.type == "cuda":
        # The published runs had TF32 convolutions by PyTorch's default. Products stay in float32: augmentation and ZCA
        # are made of them and would lose bits of every pixel, while a network has but one, its classifier.
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def _keep_freed_memory():
    """Let glibc's allocator reuse large blocks instead of giving them back to the system at once.

    By default every tensor of some megabytes is mapped anew, and touching its fresh pages costs more than computing
    its contents: ConvNet training steps on a CPU take twice as long. Other C libraries are left as they are.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of <malloc.h>
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        pass


def stream(seed, *keys):
    """Return the random generator (numpy.random.Generator) that belongs to `keys` of the run's `seed`.

    Every random decision of a run is drawn from a stream named after its place (stage, iteration, epoch, …), on the
    CPU. So a run needs no generator state to continue, results do not depend on the order of the work or on how many
    networks train at once, and a CPU and a GPU see the same draws.

    Args:
        seed: the run's seed, an int >= 0.
        keys: ints >= 0 and strings.
    """
    return np.random.default_rng([seed, *(_code(key) for key in keys)])


def to_device(array, device):
    """Return a NumPy array as a tensor on `device`, without waiting for what the device still has to do."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def _code(key):
    return zlib.crc32(key.encode()) if isinstance(key, str) else int(key)


def seeded(seed, *keys):
    """Return a context like `draws_of` on the CPU, seeded for `keys`: network initialisations run inside it."""
    return draws_of(int(stream(seed, *keys).integers(2**63)), torch.device("cpu"))


@contextlib.contextmanager
def draws_of(seed, device):
    """A context in which torch's generators of the CPU and of `device` are seeded; outside it nothing changes."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.random.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        yield


class Signals:
    """Remembers SIGTERM and SIGINT, so that a loop can finish its step and save before it stops.

    A second signal of the same kind ends the process at once; not so under torchrun, which passes on what a cluster
    has already sent to every process. Signals belong to the process: what one object was told, all know.
    """

    received = None

    def __init__(self):
        if Signals.received is None:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._remember)

    def _remember(self, number, _frame):
        Signals.received = number
        if distributed.size() == 1:
            signal.signal(number, signal.SIG_DFL)

    def take(self):
        """Return the number of the signal that came, once; None where none came."""
        number, Signals.received = Signals.received, None
        return number


def versions():
    """Return what a result should say about its making: versions, processor, git commit."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["gpu"] = torch.cuda.get_device_name()
    folder = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        found["git_commit"] = commit.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["git_commit"] = None
    return found
