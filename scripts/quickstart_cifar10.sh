#!/usr/bin/env bash
# PDD+DM on real images, on a CPU: two narrow experts of CIFAR-10, five stages of two images per class, evaluation.
# CIFAR-10 is read from FOLDER (default: data), or downloaded there. Results go to quickstart_cifar10/ (or the second
# argument). Run it again to continue or to see the table.
#
#     bash scripts/quickstart_cifar10.sh [FOLDER] [RESULTS]
set -euo pipefail
[[ ${1:-} != -* ]] || { sed -n '2,${s/^# \{0,1\}//p;}' "$0"; exit 2; }
data=${1:-data} out=${2:-quickstart_cifar10}
[[ $# -lt 1 || $data = /* ]] || data=$PWD/$data # the next line but one leaves this folder
[[ $# -lt 2 || $out = /* ]] || out=$PWD/$out
. "$(dirname "$0")/environment.sh" requirements.txt

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
common=(-d cifar10 --data_dir "$data" --model ConvNetW32 --factor 2 --ipc 2 --num-intervals 5 --metric cf
    --calibration 0.5 --Iteration 300 --epochs 100 --buffer_path "$out/buffers" --results "$out")

python buffer_mtt.py --dataset CIFAR10 --data_path "$data" --model ConvNetW32 --num_experts 2 --train_epochs 6 \
    --lr_teacher 0.02 --mom 0.9 --buffer_path "$out/buffers"
python distill_dm.py "${common[@]}"
python evaluate_idc.py --method dm "${common[@]}" --eval_models self --repeat 3 --checks 1 --full_epochs 4
