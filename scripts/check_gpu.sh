#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the tests that need one, then every benchmark's table there, for RESULTS.md.
# --data_path names CIFAR-10 as class folders or the authors' files; further arguments go to the benchmarks.
set -euo pipefail
. "$(dirname "$0")/environment.sh" requirements-dev.txt

python - <<'END'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("error: expected an NVIDIA GPU that this PyTorch can use, found none; torch " + torch.__version__)
END
data=(--data_path data)
if [ "${1:-}" = --data_path ]; then
    data=(--data_path "$2")
    shift 2
fi
status=0
PDD_TEST_GPU=1 python -m pytest -rs tests/test_gpu.py || status=$?
for benchmark in matching memory dsa evaluation; do
    python "benchmarks/$benchmark.py" --device cuda --json "$@" || status=$?
done
for benchmark in experts idc_sweep; do
    python "benchmarks/$benchmark.py" --device cuda --json "${data[@]}" "$@" || status=$?
done
exit $status
