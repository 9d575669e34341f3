#!/usr/bin/env bash
# PDD+IDC from nothing to a table in a minute or two on a CPU: three stages of one image per class on the bundled
# digits, then evaluation. Results go to quickstart_idc/ (or the folder given). Run it again to continue.
set -euo pipefail
[[ ${1:-} != -* ]] || { sed -n '2,${s/^# \{0,1\}//p;}' "$0"; exit 2; }
out=${1:-quickstart_idc}
[[ $# = 0 || $out = /* ]] || out=$PWD/$out # the next line leaves this folder
. "$(dirname "$0")/environment.sh" requirements.txt

export OMP_NUM_THREADS=1  # images of 8x8 pixels keep no second core busy
common=(-d digits --ipc 1 --num-intervals 3 --results "$out")

python distill_idc.py "${common[@]}" --epochs 100 --niter 1
python evaluate_idc.py "${common[@]}" --epochs 100 --niter 1 --repeat 3 --full_epochs 20
