"""Hours of CPU or GPU that made a result, in a file beside it."""

from pathlib import Path

from ..run import files

FILE = "hours.json"
EVALUATIONS = ("evaluate_mtt.py", "evaluate_idc.py")


def read(folder):
    """Return {script: {"hours": float, "unit": "CPU" or "GPU"}}; empty if nothing measured them.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / FILE
    return files.read_json(path, "hours of a result's scripts") if path.exists() else {}


def add(folder, script, hours, unit):
    """Add hours of `script` to those that the file in `folder` has for it: of a run and its continuations."""
    found = read(folder)
    before = found.get(script, {"hours": 0.0})
    found[script] = {"hours": before["hours"] + hours, "unit": unit}
    files.write_json(Path(folder) / FILE, found)


def copy(source, folder):
    """Write what the file in the folder `source` says beside what is known in `folder`."""
    files.write_json(Path(folder) / FILE, read(folder) | read(source))


def of_distillation(found):
    """Return (hours, unit) of experts and distillation together, evaluations left out; None if they are not known."""
    parts = [part for script, part in found.items() if script not in EVALUATIONS]
    if not any(script.startswith("distill") for script in found) or len({part["unit"] for part in parts}) != 1:
        return None
    return sum(part["hours"] for part in parts), parts[0]["unit"]
