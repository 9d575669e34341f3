"""Files of DSA and KIP, as their authors write them (SPEC 8.18)."""

import numpy as np
import pytest
import torch

from utils.data.info import KNOWN
from utils.results.other_methods import load_dsa, load_kip
from utils.run.errors import UserError

INFO = KNOWN["CIFAR10"]


@pytest.mark.parametrize("new_format", [True, False])
def test_the_last_set_of_a_file_of_dsa_is_read(new_format, tmp_path):
    sets = [[torch.randn(20, 3, 32, 32, requires_grad=True), torch.arange(10).repeat_interleave(2)] for _ in range(2)]
    path = tmp_path / "res_DSA_CIFAR10_ConvNet_2ipc.pt"
    torch.save({"data": sets, "accs_all_exps": {"ConvNet": [50.0]}}, path, _use_new_zipfile_serialization=new_format)
    images, labels = load_dsa(path, INFO)
    assert torch.equal(images, sets[1][0]) and not images.requires_grad and images.dtype == torch.float32
    assert torch.equal(labels, sets[1][1])


def test_a_file_of_kip_is_read(tmp_path):
    rng = np.random.default_rng(0)
    images, classes = rng.normal(size=(20, 32, 32, 3)), np.repeat(np.arange(10), 2)
    np.savez(tmp_path / "kip.npz", images=images, labels=np.eye(10)[classes] - 0.1)
    found, labels = load_kip(tmp_path / "kip.npz", INFO)
    assert found.shape == (20, 3, 32, 32) and found.dtype == torch.float32 and labels.tolist() == classes.tolist()
    assert float(found[7, 2, 4, 5]) == pytest.approx(images[7, 4, 5, 2])


@pytest.mark.parametrize(
    "value,words",
    [
        ({"images": 1}, "expected a set of DSA"),
        ({"data": []}, "expected a set of DSA"),
        ({"data": [[torch.zeros(20, 3, 32, 32)]]}, "expected a set of DSA"),
        ({"data": [[torch.zeros(20, 1, 28, 28), torch.arange(20) % 10]]}, "expected images 3x32x32 for CIFAR10"),
        ({"data": [[torch.zeros(20, 3, 32, 32), torch.arange(19) % 10]]}, "expected 10 classes of equal size"),
        ({"data": [[torch.zeros(20, 3, 32, 32), torch.arange(20)]]}, "expected 10 classes of equal size"),
        ({"data": [[torch.zeros(15, 3, 32, 32), torch.arange(15) % 10]]}, "expected 10 classes of equal size"),
    ],
)
def test_other_files_are_refused_in_one_line(value, words, tmp_path):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(UserError, match=words) as error:
        load_dsa(tmp_path / "x.pt", INFO)
    assert str(error.value).startswith(str(tmp_path / "x.pt")) and "\n" not in str(error.value)


def test_damaged_files_of_kip_are_refused(tmp_path):
    path = tmp_path / "kip.npz"
    with pytest.raises(UserError, match="No such file"):
        load_kip(path, INFO)
    path.write_text("text")
    with pytest.raises(UserError, match=r"kip\.npz: expected a set of KIP"):
        load_kip(path, INFO)
    np.savez(path, images=np.zeros((10, 32, 32, 3)))
    with pytest.raises(UserError, match="expected a set of KIP"):
        load_kip(path, INFO)
    np.savez(path, images=np.array([{}], dtype=object), labels=np.eye(10))  # a pickle
    with pytest.raises(UserError, match="expected a set of KIP"):
        load_kip(path, INFO)
