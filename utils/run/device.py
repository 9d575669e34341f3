"""The device that a run computes on, and the versions that its results name."""

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from . import distributed
from .errors import UserError


def setup_device(name, precision="fp32"):
    """Return the torch.device called `name`; `auto` takes cuda, then mps (one process), then cpu.

    A note says if bfloat16 (`precision` bf16) will not be quicker there.

    Under torchrun `cuda` is a GPU for each rank of a machine.

    Raises:
        UserError: the device is not there.
    """
    if name == "auto":
        alone = torch.backends.mps.is_available() and distributed.size() == 1  # processes cannot exchange its tensors
        name = "cuda" if torch.cuda.is_available() else "mps" if alone else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and distributed.size() > 1:
            if device.index is not None:
                raise UserError(f"--device {name}: expected cuda under torchrun, which gives every rank its own GPU")
            device = torch.device("cuda", distributed.local_rank())
            if device.index >= (count := torch.cuda.device_count()):
                raise UserError(
                    f"torchrun: expected a GPU for each process of this machine, found {count} for process "
                    f"{device.index + 1}; lower --nproc_per_node, or take --device cpu"
                )
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); use auto or cpu") from None
    if device.type == "cuda":
        # The published runs had TF32 convolutions by PyTorch's default. Products stay in float32: color and ZCA
        # are products and must be exact, and a ConvNet has only one, its classifier.
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cpu":
        _keep_freed_memory()
        if precision == "bf16" and not _has_bfloat16_units() and distributed.is_rank0():
            note = "note: --precision bf16: this processor has no bfloat16 units, so it will not be quicker"
            print(note, file=sys.stderr, flush=True)
    return device


def _has_bfloat16_units():
    """Return whether the processor multiplies bfloat16 numbers itself, True if that is not known."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return True
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


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


def to_device(array, device):
    """Return a NumPy array as a tensor on `device`, without waiting for what the device still has to do."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def versions():
    """Return what a result should say about its making: versions, processor, git commit."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["gpu"] = torch.cuda.get_device_name()
    folder = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        found["git_commit"] = commit.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["git_commit"] = None
    return found
