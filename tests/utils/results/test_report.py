import pytest
import torch
from PIL import Image

from utils.results import report


def test_table_and_spread():
    assert report.mean_std([1.0, 3.0]) == (2.0, 1.0)
    rows = report.stage_rows([1, 2], [1, 2], [[[10.0], [20.0]], [[12.0], [24.0]]])
    assert rows[1] == {"stage": 2, "ipc_total": 2, "accuracy_mean": 22.0, "accuracy_std": 2.0, "networks": 2}
    text = report.table({"config": {}, "models": {"ConvNet": {"stages": rows, "random": None, "full": rows[0]}}})
    assert "ConvNet stage 1-2 2 22.00 ± 2.00 200.0 2" in [" ".join(line.split()) for line in text.splitlines()]


def test_the_last_accuracy_counts_and_the_best_stands_beside_it():  # SPEC 8.11
    """Two networks, three checks in each of two stages."""
    runs = [[[10.0, 30.0, 20.0], [1.0, 2.0, 3.0]], [[40.0, 10.0, 0.0], [5.0, 4.0, 1.0]]]
    rows = report.stage_rows([1, 2], [1, 2], runs)
    assert rows[0] == {
        "stage": 1, "ipc_total": 1, "accuracy_mean": 10.0, "accuracy_std": 10.0, "networks": 2,
        "best_mean": 35.0, "best_std": 5.0, "checks": 3,
    }  # fmt: skip
    assert (rows[1]["accuracy_mean"], rows[1]["best_mean"]) == (2.0, 4.0)
    full = report.summary([[50.0]])
    assert "best_mean" not in full
    text = report.table({"config": {}, "models": {"ConvNet": {"stages": rows, "random": None, "full": full}}})
    header, _, first, *_, last = text.splitlines()
    assert header.split()[-10:] == ["accuracy", "(%)", "best", "of", "3", "(%)", "of", "full", "(%)", "networks"]
    assert first.split()[-8:] == ["10.00", "±", "10.00", "35.00", "±", "5.00", "20.0", "2"]
    assert last.split()[-3:] == ["all", "50.00", "1"]  # one network has no spread


@pytest.mark.parametrize("count,columns,rows", [(50, 50, 1), (60, 30, 2), (101, 34, 3)])
def test_classes_of_many_images_take_several_whole_rows(count, columns, rows, tmp_path):
    labels = torch.arange(2).repeat(count)
    pixels = labels[:, None, None, None].expand(-1, 3, 8, 8).float()
    report.save_grid(tmp_path / "grid.png", pixels, labels, upscale_to=8)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (columns * 10 + 2, 2 * rows * 10 + 2)
        white = [image.getpixel((6, 10 * row + 6)) == (255, 255, 255) for row in range(2 * rows)]
    assert white == [False] * rows + [True] * rows


def test_grids_have_one_row_for_each_class(tmp_path):
    pixels = torch.zeros(6, 3, 32, 32)
    pixels[[1, 4]] = 1.0
    report.save_grid(tmp_path / "grid.png", pixels, torch.tensor([0, 1, 2, 0, 1, 2]))
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (2 * 66 + 2, 3 * 66 + 2)
        assert image.getpixel((30, 66 + 30)) == (255, 255, 255) and image.getpixel((30, 30)) == (0, 0, 0)
