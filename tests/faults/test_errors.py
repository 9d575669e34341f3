"""Too little memory, wherever it shows: one line that names options of the script, and exit status 2."""

import importlib

import pytest
import torch

from tests.conftest import call
from tests.support import small
from utils.data import datasets

WORDS = {script: ["--ipc", 1, "-d", "digits"] for script in (small.DISTILL_IDC, small.EVALUATE_IDC, small.DISTILL_DM)}


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


@pytest.mark.parametrize("script", small.SCRIPTS)
@pytest.mark.parametrize("fill", FULL)
def test_too_little_memory_names_options_of_the_script(fill, script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr("utils.results.names.find_mtt_stages", lambda *_: [])
    monkeypatch.setattr(datasets, "load", lambda *_, **__: fill())
    status, message = call(script, *WORDS.get(script, []), capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and message.count("\n") == 1 and message.startswith("error: too little memory (")
    assert message.strip().endswith(module.OOM_ADVICE)
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit):
        module.parse()
    known = capsys.readouterr().out
    named = [word.rstrip(",") for word in module.OOM_ADVICE.split() if word.startswith("--")]
    assert named and all(f"{name} " in known for name in named)
