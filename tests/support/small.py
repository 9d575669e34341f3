"""The smallest runs of the scripts that still have two stages and a transition, all below one folder."""

import shutil
from pathlib import Path

from tests.conftest import EXPERTS

BUFFER, DISTILL, EVALUATE = "buffer_mtt.py", "distill_mtt.py", "evaluate_mtt.py"
DISTILL_IDC, EVALUATE_IDC = "distill_idc.py", "evaluate_idc.py"
DISTILL_DM = "distill_dm.py"
SCRIPTS = [BUFFER, DISTILL, EVALUATE, DISTILL_IDC, EVALUATE_IDC, DISTILL_DM]
DISTILLATIONS = [BUFFER, DISTILL, DISTILL_IDC, DISTILL_DM]

_stages = "--ipc 1 --num_intervals 2 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2 --lr_img 100 --lr_lr 1e-05"
_idc = (
    "-d digits --ipc 1 --num-intervals 2 --niter 0.04 --inner_loop 2 --net_epoch 1 --n_data 64 --batch_real 8 "
    "--save_ckpt True"
)
_words = {  # PDD+MTT trains on unions for one epoch more than its options say
    BUFFER: "--num_experts 2 --save_interval 2 --train_epochs 2",
    DISTILL: f"{_stages} --Iteration 3 --eval_it 2 --num_eval 1 --override_epoch_eval_train 1 --num_experts 2",
    EVALUATE: f"{_stages} --num_experts 1 --num_eval 1 --epoch_eval_train 7 --full_epochs 2 --save_model",
    DISTILL_IDC: f"{_idc} --epochs 5",
    EVALUATE_IDC: f"{_idc} --epochs 8 --full_epochs 2",
    DISTILL_DM: "-d digits --model ConvNetW32 --ipc 1 --num-intervals 2 --Iteration 3 --epochs 5 --batch_real 8",
}
EXPERIMENT = "l/Digits/Digits_ConvNetW32_S_ipc1_max1_syn2_real1_img100.0_1e-05_0.03_increase"
STAGE = f"{EXPERIMENT}/interval1_epoch1-1"
EXPERT_FOLDER = "b/Digits/ConvNetW32"
IDC_FOLDER = "r/digits/conv2in_w0.25_grad_mse_nd64_inloop2_cut_niter0.04_factor1_lr0.05_b_real8_random_ipc1"
DM_FOLDER = "m/digits/ConvNetW32_dm_mean_it3_factor1_lr0.01_b_real8_random_ipc1"
# Folders that a script reads and the one it writes, below the common one.
READS = {BUFFER: "", DISTILL: "b", EVALUATE: "bl", DISTILL_IDC: "", EVALUATE_IDC: "r", DISTILL_DM: "b"}
WRITES = {BUFFER: "b", DISTILL: "l", EVALUATE: "l", DISTILL_IDC: "r", EVALUATE_IDC: "r", DISTILL_DM: "m"}


def arguments(script, root):
    """Return the arguments of `script` for a run below `root`."""
    paths = {
        BUFFER: ["--buffer_path", f"{root}/b"],
        DISTILL: ["--buffer_path", f"{root}/b", "--root_log_dir", f"{root}/l"],
        EVALUATE: ["--buffer_path", f"{root}/b", "--save_path", f"{root}/l"],
        DISTILL_DM: ["--buffer_path", f"{root}/b", "--results", f"{root}/m"],
    }
    common = EXPERTS if script in (BUFFER, DISTILL, EVALUATE) else []
    return [*common, *_words[script].split(), *paths.get(script, ["--results", f"{root}/r"])]


class Reference:
    """What uninterrupted runs of all scripts wrote below `root`."""

    def __init__(self, root):
        self.distilled, self.evaluated = Path(root) / "distilled", Path(root) / "evaluated"
        self.runs = {}  # `killer.Ended` by script

    def prepare(self, script, place):
        """Put what `script` reads into the folder `place`."""
        for name in READS[script]:
            shutil.copytree(self.distilled / name, Path(place) / name)

    def expected(self, script):
        """Return the folder that a complete run of `script` writes."""
        return (self.evaluated if script.startswith("evaluate") else self.distilled) / WRITES[script]
