#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the tests that need one, then the tables of six benchmarks, for RESULTS.md.
# --data_path names CIFAR-10 as class folders or the authors' files; further arguments go to the benchmarks.
set -euo pipefail
. "$(dirname "$0")/environment.sh" requirements-dev.txt

python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "error: expected an NVIDIA GPU that PyTorch can use, found none; see python -m torch.utils.collect_env" >&2; exit 2; }
data=(--data_path data)
if [ "${1:-}" = --data_path ]; then
    data=(--data_path "$2")
    shift 2
fi
status=0
PDD_TEST_GPU=1 python -m pytest -rs tests/runs/test_gpu.py || status=$?
for benchmark in matching memory dsa evaluation; do
    python "benchmarks/$benchmark.py" --device cuda --json "$@" || status=$?
done
for benchmark in experts idc_sweep; do
    python "benchmarks/$benchmark.py" --device cuda --json "${data[@]}" "$@" || status=$?
done
exit $status
