"""Start scripts of the project by torchrun, as on a cluster, and find the processes of its ranks.

Where torchrun itself is not what a test is about, `ranks` starts the processes in its place and in a tenth of its time.
"""

import os
import queue
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

from torch.distributed import TCPStore

from tests.conftest import PROJECT
from tests.support import killer


class Job:
    """One script in several processes.

    Args:
        script: path below the project.
        arguments: of its command line.
        shape: (nodes, ranks of each); the nodes are agents on this machine.
        restarts: how often torchrun starts it again.
    """

    def __init__(self, script, *arguments, shape=(1, 2), restarts=0):
        nodes, ranks = shape
        self.agents, self.errors = [], ""
        self.lines = queue.SimpleQueue()  # of stderr; None when an agent has ended
        port = free_port()
        for node in range(nodes):
            place = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
            if nodes > 1:
                place = [f"--nnodes={nodes}", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *place,
                       f"--max-restarts={restarts}", str(PROJECT / script), *map(str, arguments)]  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            agent = subprocess.Popen(command, cwd=PROJECT, env=environment, text=True, **pipes)
            self.agents.append(agent)
            threading.Thread(target=self._read, args=(agent,), daemon=True).start()

    def _read(self, agent):
        for line in agent.stderr:
            self.lines.put(line)
        self.lines.put(None)

    def _wait(self, line):
        """Return when an agent prints a line with the regular expression `line`, or has ended; says whether it did."""
        while (found := self.lines.get()) is not None:
            self.errors += found
            if re.search(line, found):
                return True
        return False

    def workers(self):
        """Return the process ids of the ranks that run now."""
        found = []
        for agent in self.agents:
            try:
                found += map(int, Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split())
            except FileNotFoundError:
                continue
        return found

    def signal(self, number, line, worker=-1):
        """Send a signal to one rank, as soon as a line with the regular expression `line` comes on stderr."""
        if not self._wait(line):
            raise AssertionError(f"ended before the signal:\n{self.errors}")
        os.kill(self.workers()[worker], number)

    def end(self, check=True):
        """Wait for the end; returns (largest exit status, stdout, stderr) of all agents together."""
        for _ in self.agents:
            self._wait("(?!)")
        out = "".join(agent.stdout.read() for agent in self.agents)
        status = max(abs(agent.wait()) for agent in self.agents)
        if check and status:
            raise AssertionError(f"torchrun ended with {status}:\n{out}\n{self.errors}")
        return status, out, self.errors


def ranks(script, *arguments, check=True, shape=(1, 2)):
    """Run a script to its end in as many processes as torchrun would start, with the variables that it sets.

    Returns:
        (largest exit status, stdout, stderr) of all together.
    """
    nodes, local = shape
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives the ranks, as torchrun's does
    environments = [
        {"RANK": node * local + rank, "LOCAL_RANK": rank, "WORLD_SIZE": nodes * local, "LOCAL_WORLD_SIZE": local,
         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
         "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": 1}
        for node in range(nodes) for rank in range(local)
    ]  # fmt: skip
    environments = [{name: str(value) for name, value in variables.items()} for variables in environments]
    done = killer.run_together(script, arguments, environments)
    status = max(abs(one.returncode) for one in done)
    out, err = ("".join(texts) for texts in zip(*((one.stdout, one.stderr) for one in done), strict=True))
    if check and status:
        raise AssertionError(f"{script} ended with {status}:\n{out}\n{err}")
    return status, out, err


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
