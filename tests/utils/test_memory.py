import resource
import signal

import pytest
import torch

from utils import trajectories
from utils.memory import Stack, group_memory, saved_bytes


def test_a_write_that_the_disk_takes_in_part_is_not_trusted(tmp_path, monkeypatch):
    """A file-size limit lets the last write end half-way, which raises nothing by itself."""
    start, stack = torch.arange(6.0), Stack()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (start.nbytes * 5 // 2, hard))
        for number in range(5):
            stack.push(start + number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [tensor is not None for tensor in stack.memory] == [False, False, True, True, True]
    for number in reversed(range(5)):
        assert torch.equal(stack.pop(start), start + number)
    assert not list(tmp_path.iterdir())


def test_limits_of_containers_and_jobs_count(tmp_path):
    for folder, limit, stat in (("job/step", "max", "anon 7"), ("job", "1000", "file 600\nanon 300"),
                                ("memory/old", "500", "rss 100")):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        name = "memory.limit_in_bytes" if "old" in folder else "memory.max"
        (tmp_path / folder / name).write_text(f"{limit}\n")
        (tmp_path / folder / "memory.stat").write_text(f"{stat}\n")
    own = tmp_path / "cgroup"
    for text, expected in (("0::/job/step\n", [700]), ("9:cpu:/job\n8:memory:/old\n", [400]), ("0::/other\n", [])):
        own.write_text(text)
        assert group_memory(own, tmp_path) == expected
    assert group_memory(tmp_path / "nothing", tmp_path) == []


def test_saved_tensors_count_once():
    x = torch.zeros(5, 3, requires_grad=True)  # 60 bytes
    assert saved_bytes(lambda: x.exp()) == 60  # the result is what it saves
    assert saved_bytes(lambda: [x.sin(), x.cos()]) == 60 + 2 * 60


@pytest.mark.parametrize("archive,reads", [(True, 3), (False, 3 + 6)])
def test_mapped_experts_are_opened_once_and_others_do_not_pile_up(archive, reads, tmp_path, monkeypatch):
    for number in range(3):
        path, entry = tmp_path / f"replay_buffer_{number}.pt", [torch.full((2,), float(number))]
        torch.save([[entry, entry]], path, _use_new_zipfile_serialization=archive)
    opened, load = [], trajectories.load_buffer
    monkeypatch.setattr(trajectories, "load_buffer", lambda path, mmap: (opened.append(path), load(path, mmap))[1])
    experts = trajectories.Experts(tmp_path, [(2,)], 2, "a network")
    for expert in (0, 1, 2, 0, 1, 2):
        assert experts.parameters(expert, 1).tolist() == [expert] * 2
    assert len(opened) == reads and len(experts.loaded) == (3 if archive else 1)
