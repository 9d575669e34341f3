import itertools

import pytest

from utils.results import names
from utils.run import files
from utils.run.errors import UserError

MTT = {
    "dataset": "CIFAR10",
    "model": "ConvNet",
    "eval_mode": "S",
    "ipc": 2,
    "max_start_epoch": 5,
    "syn_steps": 50,
    "expert_epochs": 2,
    "lr_img": 1000.0,
    "lr_lr": 1e-07,
    "lr_teacher": 0.01,
    "zca": True,
    "tag": "",
}


@pytest.mark.parametrize(
    "changes,name",
    [
        ({}, "CIFAR10_ConvNet_S_ipc2_max5_syn50_real2_img1000.0_1e-07_0.01_increase_zca"),
        ({"tag": "x"}, "CIFAR10_ConvNet_S_ipc2_max5_syn50_real2_img1000.0_1e-07_0.01_increase_zca_x"),
        (
            {"dataset": "Tiny", "model": "ConvNetD4", "ipc": 10, "max_start_epoch": 20, "syn_steps": 20, "zca": False,
             "lr_img": 10000.0, "lr_lr": 1e-04, "eval_mode": "M"},
            "Tiny_ConvNetD4_M_ipc10_max20_syn20_real2_img10000.0_0.0001_0.01_increase",
        ),
    ],
)  # fmt: skip
def test_experiments_of_trajectory_matching(changes, name):
    assert names.mtt_experiment(MTT | changes) == name


def test_stages_of_trajectory_matching():
    folders = [names.mtt_stage("e", stage, 3, 5).as_posix() for stage in (1, 2, 3)]
    assert folders == ["e/interval1_epoch1-5", "e/interval2_epoch6-10", "e/interval3_epoch11-15"]
    assert names.mtt_stage("e", 1, 1, 5).as_posix() == "e"


def make_stages(experiment, *folders):
    """Make folders of stages as the published code leaves them."""
    for folder in folders:
        (experiment / folder).mkdir(parents=True)
        (experiment / folder / "images_best.pt").touch()
    return experiment


def test_stages_are_found_whatever_options_made_them(tmp_path, capsys):
    made = ["interval1_epoch1-5", "interval2_epoch9-20", "interval3_epoch1-2"]
    experiment = make_stages(tmp_path / "e", *made, "interval4", "interval4_epoch", "old_interval4_epoch1-2")
    assert names.mtt_stages(experiment) == {
        1: [experiment / made[0]],
        2: [experiment / made[1]],
        3: [experiment / made[2]],
    }
    assert names.find_mtt_stages(experiment, 2) == [experiment / made[0], experiment / made[1]]
    note = f"note: {experiment}: evaluating 2 of 3 stages; --num_intervals 3 evaluates all\n"
    assert capsys.readouterr().err == note
    assert names.find_mtt_stages(experiment, 2, ["b", "a"]) == [experiment / "b", experiment / "a"]


def test_a_single_stage_may_be_in_the_experiments_own_folder(tmp_path):
    experiment = make_stages(tmp_path / "e")
    experiment.mkdir()
    (experiment / "images_best.pt").write_text("")
    assert names.find_mtt_stages(experiment, 1) == [experiment]


@pytest.mark.parametrize(
    "folders,stages,given,words",
    [
        (None, 1, None, "expected the folder of a distillation, found none"),
        (["interval1_epoch1-5"], 2, None, "expected 2 finished stages, found stage 1 alone; finish with the same"),
        (["interval2_epoch6-10"], 2, None, "expected 2 finished stages, found no stage 1; finish with the same"),
        (["interval1_epoch1-5", "interval1_epoch1-6"], 1, None, "expected one folder interval1_epoch…, found 2"),
        (["a", "b"], 2, ["a"], "--override_interval_names: expected 2 names joined by dots (num_intervals), found 1"),
    ],
)
def test_stages_that_cannot_be_found(folders, stages, given, words, tmp_path):
    experiment = tmp_path / "e"
    if folders:
        make_stages(experiment, *folders)
    with pytest.raises(UserError) as error:
        names.find_mtt_stages(experiment, stages, given)
    assert words in str(error.value)


IDC = {  # the release's defaults
    "net_type": "convnet", "depth": 3, "width": 1.0, "norm_type": "instance", "tag": "", "match": "grad", "bias": False,
    "fc": False, "metric": "l1", "pt_from": -1, "pt_num": 1, "fix_iter": -1, "early": 0, "n_data": 500,
    "inner_loop": 100, "mixup_net": "cut", "lr": 0.01, "weight_decay": 5e-4, "niter": 500, "factor": 1,
    "decode_type": "single", "aug_type": "color_crop_cutout", "lr_img": 5e-3, "momentum": 0.9, "batch_real": 64,
    "batch_syn_max": 128, "init": "random", "ipc": 10, "f_idx": "4",
}  # fmt: skip
PACKED = {"tag": "progressive", "factor": 2, "init": "mix", "ipc": 2}
CIFAR = PACKED | {"metric": "mse", "n_data": 2000, "niter": 2000}


@pytest.mark.parametrize(
    "changes,name",
    [
        (CIFAR, "conv3in_progressive_grad_mse_nd2000_cut_niter2000_factor2_lr0.005_mix_ipc2"),
        (CIFAR | {"ipc": 10}, "conv3in_progressive_grad_mse_nd2000_cut_niter2000_factor2_lr0.005_mix_ipc10"),
        (CIFAR | {"niter": 1000}, "conv3in_progressive_grad_mse_nd2000_cut_niter1000_factor2_lr0.005_mix_ipc2"),
        (PACKED | {"metric": "mse"}, "conv3in_progressive_grad_mse_nd500_cut_factor2_lr0.005_mix_ipc2"),
        (
            PACKED | {"lr_img": 1e-4, "mixup_net": "vanilla", "aug_type": "color_crop"},
            "conv3in_progressive_grad_l1_nd500_factor2_color_crop_lr0.0001_mix_ipc2",
        ),
        (
            PACKED | {"net_type": "resnet_ap", "depth": 10, "early": 10, "factor": 3, "decode_type": "bound",
                      "lr_img": 3e-3, "ipc": 20},
            "resnet10apin_progressive_grad_l1_ely10_nd500_cut_factor3_bound_lr0.003_mix_ipc20",
        ),
        (
            {"tag": "t", "match": "feat", "bias": True, "fc": True, "metric": "cos", "pt_from": 5, "pt_num": 3,
             "fix_iter": 4, "early": 7, "inner_loop": 20, "lr": 0.1, "weight_decay": 1e-4, "niter": 0.5, "factor": 2,
             "decode_type": "multi", "aug_type": "flip", "momentum": 0.5, "batch_real": 128, "batch_syn_max": 32},
            "conv3in_t_f4_b_fc_cos_pt5_3_fix4_ely7_nd500_inloop20_cut_nlr0.1_wd0.0001_niter0.5_factor2_multi_flip_"
            "lr0.005_mom0.5_b_real128_synmax32_random_ipc10",
        ),
    ],
)  # fmt: skip
def test_folders_of_gradient_matching(changes, name):
    assert names.idc_folder(IDC | changes) == name


@pytest.mark.parametrize(
    "changes,name,earlier",
    [
        (
            {},
            "conv3in_grad_l1_nd500_cut_factor1_lr0.005_random_ipc10",
            "conv3in_grad_l1_nd500_cut_lr0.005_random_ipc10",
        ),
        (
            {"match": "feat", "metric": "mse", "f_idx": "1,2", "factor": 2},
            "conv3in_f1,2_mse_nd500_cut_factor2_lr0.005_random_ipc10",
            "conv3in_feat_mse_nd500_cut_factor2_lr0.005_random_ipc10",
        ),
        (
            {"net_type": "resnet", "norm_type": "batch", "depth": 18, "decode_type": "multi"},
            "resnet18_grad_l1_nd500_cut_factor1_multi_lr0.005_random_ipc10",
            "resnet18bn_grad_l1_nd500_cut_lr0.005_random_ipc10",
        ),
    ],
)
def test_spellings_of_this_version_and_earlier_ones(changes, name, earlier):  # SPEC 8.13, 8.14
    assert names.idc_folder(IDC | changes) == name
    assert names.idc_folder(IDC | changes, old=True) == earlier


DM = {
    "model": "ConvNet",
    "tag": "",
    "metric": "mean",
    "cf_alpha": 0.5,
    "calibration": 0.0,
    "window": "all",
    "transition": "experts",
    "fix_iter": -1,
    "early": 0,
    "n_data": 500,
    "inner_loop": 100,
    "mixup_net": "cut",
    "lr": 0.01,
    "weight_decay": 5e-4,
    "Iteration": 1000,
    "factor": 2,
    "decode_type": "single",
    "aug_type": "color_crop_cutout",
    "lr_img": 0.01,
    "momentum": 0.9,
    "batch_real": 64,
    "init": "mix",
    "ipc": 2,
}


@pytest.mark.parametrize(
    "changes,name",
    [
        ({}, "ConvNet_dm_mean_factor2_lr0.01_mix_ipc2"),
        ({"tag": "a", "metric": "cf", "cf_alpha": 0.3}, "ConvNet_a_dm_cf_a0.3_factor2_lr0.01_mix_ipc2"),
        ({"cf_alpha": 0.3, "calibration": 0.1, "window": "stage"},
         "ConvNet_dm_mean_cal0.1_window_factor2_lr0.01_mix_ipc2"),
        ({"transition": "union", "window": "stage", "inner_loop": 20, "early": 2, "fix_iter": 3},
         "ConvNet_dm_mean_union_fix3_ely2_nd500_inloop20_cut_factor2_lr0.01_mix_ipc2"),
        ({"Iteration": 50, "decode_type": "multi", "aug_type": "crop", "batch_real": 9, "lr": 0.1, "momentum": 0.5},
         "ConvNet_dm_mean_nlr0.1_it50_factor2_multi_crop_lr0.01_mom0.5_b_real9_mix_ipc2"),
    ],
)  # fmt: skip
def test_folders_of_feature_matching(changes, name):
    assert names.dm_folder(DM | changes) == name
    assert names.base_method(DM | changes) == "DM"


def test_networks_in_folder_names_differ():
    found = [
        names.idc_model(IDC | {"net_type": kind, "depth": depth, "norm_type": norm, "width": width})
        for kind, depth, norm, width in itertools.product(
            ("convnet", "resnet", "resnet_ap"), (3, 10), ("instance", "batch", "sn", "none"), (1.0, 0.25)
        )
    ]
    # The published names tell instance normalisation alone (SPEC 8.14).
    kinds = [
        f"{kind}{depth}{pool}" for kind, pool in (("conv", ""), ("resnet", ""), ("resnet", "ap")) for depth in (3, 10)
    ]
    assert set(found) == {f"{kind}{norm}{width}" for kind in kinds for norm in ("in", "") for width in ("", "_w0.25")}
    for net_type in ("densenet", "efficient"):  # SPEC 8.18
        assert names.idc_model(IDC | {"net_type": net_type, "norm_type": "batch"}) == net_type


def test_a_stage_has_learned_if_its_summary_says_so_or_it_is_published(tmp_path):
    files.write_json(tmp_path / "interval_0.json", {"complete": True})
    (tmp_path / "interval_1_data.pt").touch()  # as the published code leaves it
    (tmp_path / "interval_2_data.pt").touch()
    assert names.idc_stages(tmp_path) == [1, 2, 3]
    (tmp_path / "interval_2_metrics.jsonl").touch()
    assert names.idc_stages(tmp_path) == [1, 2]


def test_data_sets_in_parts_are_called_by_them():
    found = [names.dataset_title(*pair) for pair in (("CIFAR10", "cifar10"), ("folder", "folder/pets/32"))]
    assert found == ["CIFAR10", "pets"]


def test_summaries_of_stages(tmp_path):
    assert names.read_mtt_stage(tmp_path) == names.read_idc_stage(tmp_path, 1) == {}
    complete = {"select_on": "test", "best_accuracy": 50, "best_iteration": 3, "complete": True}
    files.write_json(tmp_path / "stage.json", complete)
    assert names.read_mtt_stage(tmp_path) == complete
    assert names.idc_summary(tmp_path, 3) == tmp_path / "interval_2.json"
    files.write_json(tmp_path / "interval_2.json", {"complete": True})
    assert names.read_idc_stage(tmp_path, 3) == {"complete": True} and names.read_idc_stage(tmp_path, 2) == {}
    for key in complete:
        files.write_json(tmp_path / "stage.json", {name: value for name, value in complete.items() if name != key})
        with pytest.raises(UserError, match=f'stage.json: expected the summary of a finished stage with "{key}"'):
            names.read_mtt_stage(tmp_path)


def test_what_accuracies_were_measured_on():
    assert names.selection({"select_on": "test", "val_fraction": 0.1}) == {"select_on": "test"}
    assert names.selection({"select_on": "val", "val_fraction": 0.1}) == {"select_on": "val", "val_fraction": 0.1}
    assert names.selected_on([{"select_on": "val"}, {"select_on": "val"}]) == "val"
    assert names.selected_on([{"select_on": "val"}, {}, {"select_on": "test"}]) == "test, unknown, val"
