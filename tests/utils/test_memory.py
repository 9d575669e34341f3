import resource
import signal

import torch

from utils.memory import Stack, saved_bytes


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


def test_saved_tensors_count_once():
    x = torch.zeros(5, 3, requires_grad=True)  # 60 bytes
    assert saved_bytes(lambda: x.exp()) == 60  # the result is what it saves
    assert saved_bytes(lambda: [x.sin(), x.cos()]) == 60 + 2 * 60
