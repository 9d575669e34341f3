"""How the five scripts run: alone or as many processes of torchrun, stopped by signals, ended with one line."""

import os
import sys
import time
import uuid

import torch
import torch.distributed as dist

from . import signals
from .distributed import START_TIMEOUT, TIMEOUT
from .errors import run as run_alone


def run_script(main, oom_advice):
    """Run a script's `main` in every process of torchrun, or alone without it; ends as `errors.run` says.

    Of several ranks that fail, the first one alone says why. Arguments as for `errors.run`.
    """
    signals.listen()
    if not dist.is_torchelastic_launched():
        run_alone(main, oom_advice)
        return
    store, number, count = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    store = _join(store, number, count)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group_store = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group_store, rank=number, world_size=count, timeout=TIMEOUT)

    def speaks():
        try:
            return store.add("spoken", 1) == 1
        except RuntimeError:
            return True

    status = 0
    try:
        run_alone(main, oom_advice, speaks)
    except SystemExit as end:
        status = end.code or 0
    # Taking the group apart would wait for ranks that are gone, and can abort where another one is quicker.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _join(store, number, count):
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
    until = time.monotonic() + START_TIMEOUT.total_seconds()
    while missing:
        if time.monotonic() > until:
            raise TimeoutError(f"ranks {sorted(missing)} of {count} have not come within {START_TIMEOUT}")
        for other in [other for other in missing if store.check([f"hello/{other}"])]:
            store.set(f"welcome/{store.get(f'hello/{other}').decode()}", name)
        time.sleep(0.01)
        missing = {other for other in missing if not store.check([f"{name}/here/{other}"])}
    return dist.PrefixStore(name, store)
