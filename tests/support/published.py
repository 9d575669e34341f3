"""The published readmes' commands in their own words, and files as the published code writes them."""

import torch

import networks

SEED_COMMANDS = [  # (distillation, evaluation) of the published readme, in its own words
    ("--dataset=CIFAR10 --model=ConvNet --ipc=2 --syn_steps=50 --expert_epochs=2 --max_start_epoch=5 --zca "
     "--lr_img=1000 --lr_lr=1e-07 --lr_teacher=0.01 --num_intervals 5 --root_log_dir logged_files",
     "--dataset=CIFAR10 --model=ConvNet --ipc=2 --syn_steps=50 --expert_epochs=2 --max_start_epoch=5 --zca "
     "--lr_img=1000 --lr_lr=1e-07 --lr_teacher=0.01 --num_intervals 5 --num_experts 5 --override_load_path "
     "CIFAR10_ConvNet_S_ipc2_max5_syn50_real2_img1000.0_1e-07_0.01_increase_zca --save_path logged_files "
     "--epoch_eval_train 500"),
    ("--dataset=CIFAR10 --model=ConvNet --ipc=10 --syn_steps=30 --expert_epochs=2 --max_start_epoch=15 --zca "
     "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --num_intervals 5 --root_log_dir logged_files",
     "--dataset=CIFAR10 --model=ConvNet --ipc=10 --syn_steps=20 --expert_epochs=2 --max_start_epoch=15 --zca "
     "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --num_intervals 5 --num_experts 5 --override_load_path "
     "CIFAR10_ConvNet_S_ipc10_max15_syn30_real2_img1000.0_1e-05_0.01_increase_zca --save_path logged_files "
     "--epoch_eval_train 500"),
    ("--dataset=CIFAR100 --model=ConvNet --ipc=2 --syn_steps=20 --expert_epochs=3 --max_start_epoch=20 --zca "
     "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --num_intervals 5 --root_log_dir logged_files",
     "--dataset=CIFAR100 --model=ConvNet --ipc=2 --syn_steps=20 --expert_epochs=3 --max_start_epoch=20 --zca "
     "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --num_intervals 5 --num_experts 5 --override_load_path "
     "CIFAR100_ConvNet_S_ipc2_max20_syn20_real3_img1000.0_1e-05_0.01_increase_zca --save_path logged_files "
     "--epoch_eval_train 500"),
    ("--dataset=CIFAR100 --model=ConvNet --ipc=10 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --zca "
     "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --num_intervals 5 --root_log_dir logged_files --batch_syn 512",
     "--dataset=CIFAR100 --model=ConvNet --ipc=10 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --zca "
     "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --num_intervals 5 --num_experts 5 --override_load_path "
     "CIFAR100_ConvNet_S_ipc10_max20_syn20_real2_img1000.0_1e-05_0.01_increase_zca --save_path logged_files "
     "--epoch_eval_train 500"),
    ("--dataset=Tiny --model=ConvNetD4 --ipc=2 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --lr_img=10000 "
     "--lr_lr=1e-04 --lr_teacher=0.01 --num_intervals 5 --data_path data/tiny-imagenet-200 --batch_syn 64",
     "--dataset=Tiny --model=ConvNetD4 --ipc=2 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --lr_img=10000 "
     "--lr_lr=1e-04 --lr_teacher=0.01 --num_intervals 5 --data_path data/tiny-imagenet-200 --num_intervals 5 "
     "--override_load_path Tiny_ConvNetD4_S_ipc2_max20_syn20_real2_img10000.0_0.0001_0.01_increase "
     "--epoch_eval_train 500 --save_path logged_files"),
    ("--dataset=Tiny --model=ConvNetD4 --ipc=10 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --lr_img=10000 "
     "--lr_lr=1e-04 --lr_teacher=0.01 --num_intervals 5 --data_path data/tiny-imagenet-200 --batch_syn 64",
     "--dataset=Tiny --model=ConvNetD4 --ipc=10 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 --lr_img=10000 "
     "--lr_lr=1e-04 --lr_teacher=0.01 --num_intervals 5 --data_path data/tiny-imagenet-200 --num_intervals 5 "
     "--override_load_path Tiny_ConvNetD4_S_ipc10_max20_syn20_real2_img10000.0_0.0001_0.01_increase "
     "--epoch_eval_train 500 --save_path logged_files"),
]  # fmt: skip

IDC_COMMANDS = [  # (distillation, folder)
    ("-d cifar10 --ipc 2 -f 2 --niter 2000 --reproduce --data_dir data --tag progressive --start-interval 0",
     "cifar10/conv3in_progressive_grad_mse_nd2000_cut_niter2000_factor2_lr0.005_mix_ipc2"),
    ("-d cifar10 --ipc 10 -f 2 --niter 2000 --reproduce --data_dir data --tag progressive --start-interval 0",
     "cifar10/conv3in_progressive_grad_mse_nd2000_cut_niter2000_factor2_lr0.005_mix_ipc10"),
    ("-d cifar100 --ipc 2 -f 2 --niter 2000 --reproduce --data_dir data --tag progressive --start-interval 0",
     "cifar100/conv3in_progressive_grad_mse_nd2000_cut_niter2000_factor2_lr0.005_mix_ipc2"),
    ("-d cifar100 --ipc 10 -f 2 --niter 1000 --reproduce --data_dir data --tag progressive --start-interval 0",
     "cifar100/conv3in_progressive_grad_mse_nd2000_cut_niter1000_factor2_lr0.005_mix_ipc10"),
    ("-d svhn --ipc 2 -f 2 --reproduce --tag progressive",
     "svhn/conv3in_progressive_grad_mse_nd500_cut_factor2_lr0.005_mix_ipc2"),
    ("-d mnist --ipc 2 -f 2 --reproduce --tag progressive",
     "mnist/conv3in_progressive_grad_l1_nd500_factor2_color_crop_lr0.0001_mix_ipc2"),
    ("-d imagenet --nclass 10 -f 3 --ipc 20 --reproduce --tag progressive",
     "imagenet10/resnet10apin_progressive_grad_l1_ely10_nd500_cut_factor3_bound_lr0.003_mix_ipc20"),
]  # fmt: skip

MTT_EXPERIMENT = "CIFAR10_ConvNetW32_S_ipc1_max2_syn2_real1_img1000.0_1e-05_0.01_increase"


def write_mtt(root, new_format):
    """Write results and experts on CIFAR-10: leaves that require gradients, lists of parameters.

    Args:
        root: of `logs` and `buffers`.
        new_format: of torch.save; the published files are older.

    Returns:
        The experiment's folder.
    """

    def save(value, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, path, _use_new_zipfile_serialization=new_format)

    experiment = root / "logs" / "CIFAR10" / MTT_EXPERIMENT
    images = torch.randn(20, 3, 32, 32)
    for stage in (1, 2):
        folder = experiment / f"interval{stage}_epoch{2 * stage - 1}-{2 * stage}"
        save(images[: 10 * stage].clone().requires_grad_(), folder / "images_best.pt")
        save(torch.arange(10).repeat(stage), folder / "labels_best.pt")
        save(torch.tensor(0.012, requires_grad=True), folder / "syn_lr_best.pt")
    network = networks.get_network("ConvNetW32", 3, 10, 32)
    as_tensors = [p.detach().clone() for p in network.parameters()]
    moved = [p * 1.1 for p in as_tensors]
    trajectories = [[list(network.parameters()), moved, as_tensors], [as_tensors, moved, as_tensors]]
    save(trajectories, root / "buffers" / "CIFAR10_NO_ZCA" / "ConvNetW32" / "replay_buffer_0.pt")
    return experiment


def write_idc(folder, new_format):
    """Write two unions of 2 images per class and stage on CIFAR-10 into the new folder `folder`."""
    folder.mkdir()
    for stage in range(2):
        count = 2 * (stage + 1)
        value = [torch.rand(10 * count, 3, 32, 32), torch.arange(10).repeat_interleave(count)]
        torch.save(value, folder / f"interval_{stage}_data.pt", _use_new_zipfile_serialization=new_format)
