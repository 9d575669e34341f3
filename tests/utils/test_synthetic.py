import numpy as np
import pytest
import torch

from utils.data import datasets
from utils.run import files
from utils.run.errors import UserError
from utils.synthetic import SyntheticSet, empty_set, init_subset, load_idc, load_mtt, save_idc, save_mtt

CLASSES, IPC = 10, 2


@pytest.fixture(scope="module")
def real():
    return datasets.load("Digits", "", torch.device("cpu"))


def code(stage, label, slot):
    """Return what every pixel of an image is in these tests, in thousandths."""
    return 100 * stage + 10 * label + slot


def union_of(stages):
    """Return a union of `stages` stages whose pixels say which image they belong to."""
    union = SyntheticSet(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))
    for stage in range(1, stages + 1):
        values = torch.tensor([code(stage, label, slot) for label in range(CLASSES) for slot in range(IPC)]) / 1000
        labels = torch.arange(CLASSES).repeat_interleave(IPC)
        union = union.extended(values.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous(), labels, torch.tensor(0.02))
    return union


def codes(images):
    flat = images.flatten(-3)
    assert (flat == flat[..., :1]).all()
    return (1000 * flat[..., 0]).round().int().tolist()


def test_a_union_knows_its_stages():
    union = union_of(3)
    assert len(union) == 60 and union.counts == [20, 20, 20] and union.first_learned == 40
    assert union.stage.tolist() == [1] * 20 + [2] * 20 + [3] * 20
    expected = [code(s, c, k) for s in (1, 2, 3) for c in range(CLASSES) for k in range(IPC)]
    assert codes(union.images) == expected
    assert codes(union.union(2).images) == expected[:40] and union.union(2).counts == [20, 20]
    assert len(union.union(0)) == 0 and union.union(0).counts == []
    assert codes(union.subset(2).images) == expected[20:40] and union.subset(2).counts == [20]
    assert union.subset(2).labels.tolist() == union.labels.tolist()[20:40]
    assert float(union.union(2).syn_lr) == float(union.subset(1).syn_lr) == pytest.approx(0.02)


def test_only_the_newest_subset_is_learned_and_it_is_a_view():
    union = union_of(2)
    before = union.images.clone()
    union.learned += 0.5
    assert torch.equal(union.images[:20], before[:20])
    assert torch.equal(union.images[20:], before[20:] + 0.5)
    assert union.learned.data_ptr() == union.images[20:].data_ptr()
    older = union_of(1)
    older.extended(older.learned, older.labels).learned.zero_()
    assert codes(older.images) == codes(union_of(1).images)  # an extended set has its own images


def test_a_class_is_one_block_position_after_position_stage_by_stage():
    union = union_of(3)
    blocks = union.by_class(CLASSES)
    assert blocks.shape == (CLASSES, 3 * IPC, 1, 8, 8)
    for label in range(CLASSES):
        expected = [code(s, label, slot) for slot in range(IPC) for s in (1, 2, 3)]
        assert codes(blocks[label]) == expected


def test_clamped_leaves_the_set_as_it_was():
    union = union_of(1)
    union.learned.sub_(0.15).mul_(40)
    clamped = union.clamped()
    assert clamped.images.min() == 0 and clamped.images.max() == 1
    assert union.images.min() < 0 and union.images.max() > 1
    inside = (union.images >= 0) & (union.images <= 1)
    assert inside.any() and torch.equal(clamped.images[inside], union.images[inside])


def test_the_set_to_train_on_has_no_graph():
    union = union_of(1)
    union.images.requires_grad_()
    images, labels = union.dataset().batch(slice(0, 3))
    assert not images.requires_grad and labels.tolist() == [0, 0, 1]
    assert torch.equal(images, union.images[:3].detach())


def test_mtt_files_round_trip(tmp_path, real):
    union = union_of(2)
    union.syn_lr.requires_grad_()
    save_mtt(tmp_path, "best", union)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images_best.pt", "labels_best.pt", "syn_lr_best.pt"]
    found = load_mtt(tmp_path, "best", info=real.info)
    assert torch.equal(found.images, union.images) and torch.equal(found.labels, union.labels)
    assert found.syn_lr == union.syn_lr.detach() and found.syn_lr.dim() == 0 and not found.syn_lr.requires_grad
    assert found.counts == [40] and found.images.dtype == torch.float32 and found.labels.dtype == torch.int64


def soft_union():
    union = union_of(2)
    soft = torch.rand(40, CLASSES, generator=torch.Generator().manual_seed(0)).softmax(1)
    return SyntheticSet(union.images, union.labels, union.syn_lr, union.counts, soft)


def test_soft_labels_stay_with_their_images():
    union = soft_union()
    assert torch.equal(union.targets, union.soft) and torch.equal(union.dataset().labels, union.soft)
    assert torch.equal(union.union(1).soft, union.soft[:20]) and torch.equal(union.copy().soft, union.soft)
    assert union.hard().soft is None and torch.equal(union.hard().targets, union.labels)
    assert torch.equal(union.learned_soft, union.soft[20:]) and len(union.parameters) == 3
    more = union.extended(union.learned, union.labels[20:], soft=union.learned_soft)
    more.learned_soft.zero_()
    assert torch.equal(more.soft[:40], union.soft) and not more.soft[40:].any() and union.learned_soft.all()
    late = union_of(1).extended(union.learned, union.labels[20:], soft=union.learned_soft)  # after hard ones
    assert torch.equal(late.soft[:20].argmax(1), late.labels[:20]) and late.soft[:20].sum() == 20


def test_files_of_soft_labels_round_trip(tmp_path, real):
    union = soft_union()
    save_mtt(tmp_path, "best", union)
    assert torch.equal(torch.load(tmp_path / "labels_best.pt", weights_only=True), union.soft)
    assert torch.equal(torch.load(tmp_path / "classes_best.pt", weights_only=True), union.labels)
    found = load_mtt(tmp_path, "best", info=real.info, shares=(1, 1))
    assert torch.equal(found.soft, union.soft) and torch.equal(found.labels, union.labels)


@pytest.mark.parametrize(
    "part,value,words",
    [
        ("labels", torch.full((39, 10), 0.1), "expected soft labels (40, 10) >= 0 whose rows sum to 1, found (39, 10)"),
        ("labels", torch.full((40, 9), 1 / 9), "expected soft labels (40, 10) >= 0 whose rows sum to 1, found (40, 9)"),
        ("labels", torch.full((40, 10), 0.2), "found (40, 10) of torch.float32 from 0.2 to 0.2"),
        ("labels", torch.eye(10).repeat(4, 1).sub(0.1).add(0.1 * torch.eye(10)[[1]]), "from -0.1 to"),
        ("classes", torch.arange(39) % 10, "expected soft labels (39, 10)"),
        ("classes", torch.arange(40), "expected labels below 10 for Digits, found 39"),
        ("classes", None, "expected labels (N,), found no file"),
    ],
)
def test_files_of_soft_labels_that_do_not_fit_are_refused(part, value, words, tmp_path, real):
    save_mtt(tmp_path, "best", soft_union())
    path = tmp_path / f"{part}_best.pt"
    path.unlink() if value is None else files.save(path, value)
    with pytest.raises(UserError) as error:
        load_mtt(tmp_path, info=real.info)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "part,value,words",
    [
        ("labels", torch.arange(39) % 10, "expected 40 integer labels >= 0, found 39"),
        ("labels", torch.zeros(40), "expected 40 integer labels >= 0, found 40 of torch.float32"),
        ("labels", torch.arange(40), "expected labels below 10 for Digits, found 39"),
        ("images", torch.zeros(40, 1, 8, 9), "expected square images"),
        ("images", torch.zeros(40, 3, 8, 8), "expected images 1x8x8 for Digits, found 3x8x8"),
        ("images", torch.zeros(40, 64), "expected images (N, C, H, W), found shape (40, 64)"),
        ("images", torch.full((40, 1, 8, 8), float("nan")), "expected finite numbers"),
        ("syn_lr", torch.tensor(-0.1), "expected a learning rate > 0"),
        ("syn_lr", torch.zeros(2), "expected one number, found shape (2,)"),
        ("syn_lr", "0.1", "expected one number, found str"),
    ],
)
def test_mtt_files_that_do_not_fit_are_refused(part, value, words, tmp_path, real):
    save_mtt(tmp_path, "best", union_of(2))
    path = tmp_path / f"{part}_best.pt"
    files.save(path, value)
    with pytest.raises(UserError) as error:
        load_mtt(tmp_path, info=real.info)
    assert str(error.value).startswith(str(path)) and words in str(error.value)


@pytest.mark.parametrize("value", [0.02, torch.tensor([0.02]), torch.tensor(0.02, dtype=torch.float64)])
def test_a_published_learning_rate_may_be_any_single_number(value, tmp_path):
    save_mtt(tmp_path, "best", union_of(1))
    files.save(tmp_path / "syn_lr_best.pt", value)
    found = load_mtt(tmp_path).syn_lr
    assert found.dim() == 0 and found.dtype == torch.float32 and float(found) == pytest.approx(0.02)


@pytest.mark.parametrize("stages", [1, 3])
def test_idc_files_round_trip_in_the_published_order(stages, tmp_path, real):
    union = union_of(4).union(stages)
    save_idc(tmp_path, stages, union, CLASSES)
    path = tmp_path / f"interval_{stages - 1}_data.pt"  # counts from 0
    images, labels = torch.load(path, weights_only=True)
    order = [(label, slot, s) for label in range(CLASSES) for slot in range(IPC) for s in range(1, stages + 1)]
    assert codes(images) == [code(s, label, slot) for label, slot, s in order]
    assert labels.tolist() == [label for label, _, _ in order]
    assert len(images.untyped_storage()) == images.nbytes  # nothing but the images is in the file
    found = load_idc(tmp_path, stages, real.info, IPC)
    assert torch.equal(found.images, union.images) and torch.equal(found.labels, union.labels)
    assert found.counts == union.counts and found.syn_lr is None


@pytest.mark.parametrize(
    "value,words",
    [
        ([torch.zeros(40, 1, 8, 8)], "expected [images (N, C, H, W), labels (N,)]"),
        ([torch.zeros(40, 1, 8, 8), torch.zeros(40)], "expected [images (N, C, H, W), labels (N,)]"),
        ([torch.zeros(40, 1, 8, 8), torch.arange(20)], "expected [images (N, C, H, W), labels (N,)]"),
        ([torch.full((40, 1, 8, 8), float("inf")), torch.arange(10).repeat_interleave(4)], "expected finite pixels"),
        ([torch.zeros(40, 1, 9, 9), torch.arange(10).repeat_interleave(4)], "expected images 1x8x8 for Digits"),
        ([torch.zeros(40, 1, 8, 8), torch.arange(10).repeat(4)], "one after the other"),
        ([torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)], "found 0 labels from 0 to 0"),
        ([torch.zeros(20, 1, 8, 8), torch.arange(10).repeat_interleave(2)], "expected 4 images of each class, found 2"),
    ],
)
def test_idc_files_that_do_not_fit_are_refused(value, words, tmp_path, real):
    files.save(tmp_path / "interval_1_data.pt", value)
    with pytest.raises(UserError) as error:
        load_idc(tmp_path, 2, real.info, IPC)
    assert str(error.value).startswith(str(tmp_path / "interval_1_data.pt")) and words in str(error.value)


def test_before_the_first_stage_there_is_nothing(real):
    union = empty_set(real, canvas=2)
    assert len(union) == 0 and union.images.shape == (0, 1, 16, 16)
    first = empty_set(real).extended(*init_subset(real, 1, "real", np.random.default_rng(0)))
    assert first.counts == [10] and first.first_learned == 0


def rows(images):
    return {tuple(image.flatten().tolist()) for image in images}


def test_real_images_are_of_their_class_and_in_network_space(real):
    images, labels = init_subset(real, 3, "real", np.random.default_rng(0))
    assert images.shape == (30, 1, 8, 8) and labels.tolist() == [c for c in range(10) for _ in range(3)]
    network_space, _ = real.train.batch(slice(None))
    for label in range(10):
        own = rows(images[labels == label])
        assert len(own) == 3 and own <= rows(network_space[real.train.labels == label])


def test_random_images_of_idc_are_pixels(real):
    images, labels = init_subset(real, 2, "random", np.random.default_rng(0), pixels=True)
    assert images.shape == (20, 1, 8, 8) and images.min() >= 0 and images.max() <= 1
    pixels = real.train.images.float() / 255
    assert all(rows(images[labels == c]) <= rows(pixels[real.train.labels == c]) for c in range(10))


def test_noise_is_normal(real):
    images, labels = init_subset(real, 50, "noise", np.random.default_rng(0))
    assert images.shape == (500, 1, 8, 8) and len(labels) == 500
    assert abs(float(images.mean())) < 0.02 and abs(float(images.std()) - 1) < 0.02
    pixels, _ = init_subset(real, 50, "noise", np.random.default_rng(0), pixels=True)
    assert torch.equal(pixels, (images / 4 + 0.5).clamp(0, 1))


def test_canvases_are_grids_of_real_images(real):
    images, labels = init_subset(real, 2, "real", np.random.default_rng(0), canvas=2)
    assert images.shape == (20, 1, 16, 16)
    network_space, _ = real.train.batch(slice(None))
    for label in range(10):
        own = rows(network_space[real.train.labels == label])
        for image in images[labels == label]:
            parts = [image[:, y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]
            assert len(rows(parts)) == 4 and rows(parts) <= own
    noise, _ = init_subset(real, 1, "noise", np.random.default_rng(0), canvas=2)
    assert noise.shape == (10, 1, 16, 16)


@pytest.mark.parametrize(
    "factor,cells,taken",
    [
        (2, [(0, 4), (4, 8)], {4: [0, 2, 4, 6]}),
        (3, [(0, 3), (3, 6), (6, 8)], {3: [0, 2, 5], 2: [0, 4]}),  # floor(8 i / 3), floor(8 i / 2)
    ],
)
def test_mix_packs_shrunk_images_of_the_class(factor, cells, taken, real):  # SPEC 8.8
    """Nearest neighbour; cells of a size that the factor does not divide: the first ones are one pixel larger."""
    ipc = 2
    images, labels = init_subset(real, ipc, "mix", np.random.default_rng(0), factor=factor, pixels=True)
    assert images.shape == (20, 1, 8, 8) and images.min() >= 0 and images.max() <= 1
    rng = np.random.default_rng(0)
    for label in range(10):
        drawn = real.random_indices(label, ipc * factor**2, rng, "").reshape(factor, factor, ipc)
        for row, (top, bottom) in enumerate(cells):
            for column, (left, right) in enumerate(cells):
                chosen = real.train.images[torch.from_numpy(drawn[row, column])].float() / 255
                shrunk = chosen[:, :, taken[bottom - top]][:, :, :, taken[right - left]]
                assert torch.equal(images[labels == label][:, :, top:bottom, left:right], shrunk)


def test_mix_with_factor_one_is_a_random_image(real):
    found = [init_subset(real, 2, init, np.random.default_rng(3), pixels=True)[0] for init in ("mix", "random")]
    assert torch.equal(*found)
