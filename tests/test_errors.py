"""How scripts end: one line and an exit status."""

import errno
import importlib

import pytest
import torch

from tests.conftest import call
from utils import datasets, errors

SCRIPTS = ["buffer_mtt.py", "distill_mtt.py", "evaluate_mtt.py", "distill_idc.py", "evaluate_idc.py"]
WORDS = {"distill_idc.py": ["--ipc", 1, "-d", "digits"], "evaluate_idc.py": ["--ipc", 1, "-d", "digits"]}


def cpu_without_memory():
    torch.empty(10**15)


def raising(error):
    def work():
        raise error

    return work


FULL = [
    cpu_without_memory,
    raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has …")),
    raising(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")),
    raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
    raising(MemoryError("Unable to allocate 1 PiB for an array")),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fill", FULL)
def test_too_little_memory_names_options_of_the_script(fill, script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script.removesuffix(".py"))
    if script == "evaluate_mtt.py":
        monkeypatch.setattr("utils.progressive.find_stages", lambda *_: [])
    monkeypatch.setattr(datasets, "load", lambda *_, **__: fill())
    status, message = call(script, *WORDS.get(script, []), capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and message.count("\n") == 1 and message.startswith("error: too little memory (")
    assert message.strip().endswith(module.MEMORY)
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit):
        module.parse()
    known = capsys.readouterr().out
    named = [word.rstrip(",") for word in module.MEMORY.split() if word.startswith("--")]
    assert named and all(f"{name} " in known for name in named)


@pytest.mark.parametrize(
    "error,words",
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b.pt"), "cannot write a/b.pt: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: cannot be used (Permission denied)"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: cannot be used (Not a directory)"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a/b"), "a/b: cannot be used (Is a directory)"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), "a: cannot be used (Too many levels"),
    ],
)
def test_places_that_cannot_be_written(error, words, capsys):
    with pytest.raises(SystemExit) as end:
        errors.run(raising(error), "nothing")
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and words in message


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError("no number"), KeyError("x")])
def test_faults_of_the_program_keep_their_traceback(error):
    with pytest.raises(type(error)):
        errors.run(raising(error), "nothing")


def test_names_that_are_no_text_can_be_printed(capsys):
    errors.run(lambda: print("folder b\udcff"), "nothing")
    assert capsys.readouterr().out == "folder b\\udcff\n"
