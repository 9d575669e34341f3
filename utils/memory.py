"""Memory: what graphs save, what is free, and a place for tensors outside of the device's memory."""

import contextlib
import tempfile
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from .run import distributed

ASSUMED = 4 * 2**30  # bytes that are free, if nothing says how many are


def saved_bytes(make):
    """Return the bytes of all tensors that what `make()` returns keeps for the backward pass.

    Args:
        make: returns nested lists of tensors, which count themselves, too, and of partial functions of tensors.
    """
    stores = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        stores[id(storage)] = storage  # kept: on the device meta they have no address to tell them by
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = make()
    for leaf in tree_leaves(graph):
        for tensor in tree_leaves(getattr(leaf, "args", leaf)):
            if isinstance(tensor, torch.Tensor):
                pack(tensor)
    return sum(storage.nbytes() for storage in stores.values())


def free_memory(device):
    """Return the bytes that this process can still allocate on `device`; ranks of one machine share its memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([*_host_memory(), *group_memory()], default=ASSUMED) // distributed.local_size()


def _host_memory():
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        return [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
    return []


def group_memory(own="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """Return what the containers or SLURM jobs that this process is in may still use, a list of bytes.

    Args:
        own: the file that names the control groups of this process.
        root: their folder.
    """
    found = []
    with contextlib.suppress(OSError):
        for line in Path(own).read_text().splitlines():
            _, version, group = line.split(":", 2)
            limit, used = {"": ("memory.max", "anon"), "memory": ("memory.limit_in_bytes", "rss")}.get(version, (0, 0))
            place = Path(root, version, group.lstrip("/"))
            for folder in (place, *place.parents) if limit else ():
                with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                    stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                    found.append(int((folder / limit).read_text()) - int(stat[used]))
    return found


class Stack:
    """A stack of equal tensors outside of the device's memory.

    Those of a CUDA GPU go to the host, without waiting for either. Those of a CPU go to a file without a name in the
    folder for temporary files (TMPDIR), which the system caches as long as memory is free. If there is no room, and on
    other devices, they stay in memory.
    """

    def __init__(self):
        self.memory, self.file = [], None  # None in `memory` stands for a tensor in the file

    def push(self, tensor):
        """Put `tensor` on top; the caller may not change it afterwards."""
        away = tensor
        if tensor.is_cuda:
            with contextlib.suppress(RuntimeError):  # the host may refuse to pin
                away = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        elif tensor.device.type == "cpu":
            with contextlib.suppress(OSError):
                away = self._write(tensor)
        self.memory.append(away)

    def _write(self, tensor):
        self.file = self.file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed with the stack)
        self.file.seek(len(self.memory) * tensor.nbytes)
        if self.file.write(_bytes(tensor)) != tensor.nbytes:
            raise OSError("no room for the whole tensor")

    def pop(self, like):
        """Return the top tensor and take it off; `like` is a tensor of its kind."""
        tensor = self.memory.pop()
        if tensor is not None:
            return tensor.to(like.device, non_blocking=True)
        tensor = torch.empty_like(like)
        self.file.seek(len(self.memory) * tensor.nbytes)
        if self.file.readinto(_bytes(tensor)) != tensor.nbytes:
            raise RuntimeError("the temporary file of the student's parameters was cut off")
        return tensor


def _bytes(tensor):
    """Return the memory of a contiguous tensor of the CPU, without a copy."""
    return tensor.detach().view(torch.uint8).numpy()
