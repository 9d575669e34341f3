#!/usr/bin/env bash
# PDD+MTT from nothing to a table in a few minutes on a CPU: experts on the bundled digits, three stages of one image
# per class, evaluation. Results go to quickstart/ (or the folder given). Run it again to continue or to see the table.
set -euo pipefail
[[ ${1:-} != -* ]] || { sed -n '2,${s/^# \{0,1\}//p;}' "$0"; exit 2; }
out=${1:-quickstart}
[[ $# = 0 || $out = /* ]] || out=$PWD/$out # the next line leaves this folder
. "$(dirname "$0")/environment.sh" requirements.txt

export OMP_NUM_THREADS=1  # images of 8x8 pixels keep no second core busy
common=(--dataset Digits --model ConvNetW32 --lr_teacher 0.03 --batch_train 64)
stages=(--ipc 1 --num_intervals 3 --max_start_epoch 5 --expert_epochs 2 --syn_steps 20 --lr_img 100 --lr_lr 1e-05)

python buffer_mtt.py "${common[@]}" --num_experts 5 --train_epochs 8 --buffer_path "$out/buffers"
python distill_mtt.py "${common[@]}" "${stages[@]}" --Iteration 100 --eval_it 50 --num_eval 2 \
    --override_epoch_eval_train 80 --buffer_path "$out/buffers" --root_log_dir "$out/logged_files"
python evaluate_mtt.py "${common[@]}" "${stages[@]}" --num_experts 5 --epoch_eval_train 80 --full_epochs 20 \
    --buffer_path "$out/buffers" --save_path "$out/logged_files"
