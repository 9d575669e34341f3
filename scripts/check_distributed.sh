#!/usr/bin/env bash
# Many processes against one, on this machine's CPUs: the tests of torchrun with 2 and 4 ranks and with two nodes of 2
# (two agents on loopback), a rank killed and started again in each. Takes some minutes; arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/environment.sh" requirements-dev.txt

export OMP_NUM_THREADS=1
python -m pytest -m "" tests/runs/test_distributed.py "$@"
