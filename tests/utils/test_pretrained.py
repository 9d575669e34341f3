"""Files of pretrained networks of PDD+IDC."""

import pytest
import torch

from utils import training
from utils.data import datasets
from utils.data.datasets import ImageDataset
from utils.pretrained import find_pretrained, load_pretrained, pretrain
from utils.run.errors import UserError


def test_networks_of_all_seeds_and_of_the_epochs_asked_for_are_found(tmp_path):  # SPEC 8.15
    for seed in (0, 3, 11):
        for epoch in range(1, 6):
            (tmp_path / f"network_{seed}_epoch{epoch}.pt").write_text("")
    (tmp_path / "network_0_epoch2_val0.1.pt").write_text("")
    (tmp_path / "network_7_epoch12.pt").write_text("")
    found = find_pretrained(tmp_path, range(2, 4), "")  # --pt_from 2 --pt_num 2
    assert {path.name for path in found} == {f"network_{s}_epoch{e}.pt" for s in (0, 3, 11) for e in (2, 3)}
    assert len(found) == 6
    (held_out,) = find_pretrained(tmp_path, range(2, 4), "_val0.1")
    assert held_out.name == "network_0_epoch2_val0.1.pt"
    assert [path.name for path in find_pretrained(tmp_path, range(5, 13), "")] == [
        *(f"network_{seed}_epoch5.pt" for seed in (0, 11, 3)), "network_7_epoch12.pt",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"expected pretrained networks .*epoch6\.pt.*found none"):
        find_pretrained(tmp_path, range(6, 8), "")


def test_a_training_saves_the_networks_of_its_last_epochs(tmp_path):  # SPEC 8.15
    real = datasets.load("Digits", "", torch.device("cpu"))
    real.train = ImageDataset(*real.train.batch(slice(0, 60)))
    config = training.TrainConfig(4, 0.02, 0.9, batch_size=20)

    def new():
        return training.new_network("MLP", real, 5)

    pretrain(tmp_path, new(), real, config, 5, range(2, 5), "")
    assert {path.name for path in tmp_path.iterdir()} == {f"network_5_epoch{epoch}.pt" for epoch in (2, 3, 4)}
    for epochs in (2, 3, 4):
        expected = new()
        training.train(expected, real.train, training.TrainConfig(epochs, 0.02, 0.9, batch_size=20), 5, ("pretrain", 5))
        found = load_pretrained(tmp_path / f"network_5_epoch{epochs}.pt", new())
        assert all(torch.equal(p, q) for p, q in zip(found.parameters(), expected.parameters(), strict=True))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    pretrain(tmp_path, new(), real, config, 5, range(2, 5), "")  # nothing is left to do
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
