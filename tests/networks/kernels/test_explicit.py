import pytest
import torch
from torch.nn import functional as F

import networks
from networks.convnet import ConvNet
from networks.kernels import explicit
from tests.conftest import SHORT, STAGES, run_script
from utils.synthetic import load_mtt


def relative(found, expected):
    # Together: the gradients of offsets in front of a normalisation are zero but for rounding.
    found, expected = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


# Depth, width, pixels and channels: convolutions as they are, as columns, and a mixture of both.
@pytest.mark.parametrize("depth,width,size,channel", [(1, 3, 4, 1), (2, 4, 8, 1), (3, 8, 32, 3), (3, 6, 16, 4)])
@pytest.mark.parametrize("compiling", [False, True])
def test_gradient_and_products_equal_autograd(depth, width, size, channel, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)  # what a compiler is given, run as it is
    torch.manual_seed(0)
    network = ConvNet(channel, 5, size, width=width, depth=depth).double()
    with torch.no_grad():
        for parameter in network.parameters():  # norms do not start at one and zero
            parameter += 0.3 * torch.randn_like(parameter)
    x = torch.randn(7, channel, size, size, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (7,))
    assert explicit.applies(network, x)
    parameters = list(network.parameters())
    vectors = [torch.randn_like(p) for p in parameters]

    network.fuses = False
    loss = F.cross_entropy(network(x), labels, reduction="sum") / 9
    expected = torch.autograd.grad(loss, parameters, create_graph=True)
    inner = sum((g * v).sum() for g, v in zip(expected, vectors, strict=True))
    *expected_products, expected_images = torch.autograd.grad(inner, [*parameters, x])

    with torch.no_grad():
        plain = [p.detach() for p in parameters]
        gradients, saved = explicit.gradient(plain, x.detach(), labels, 9)
        assert relative(gradients, [g.detach() for g in expected]) < 1e-11
        for _ in range(2):  # what is saved stays as it was
            products, images = explicit.vjp(plain, saved, vectors, 9)
            assert relative([*products, images], [*expected_products, expected_images]) < 1e-10
        nothing, images = explicit.vjp(plain, saved, vectors, 9, of_parameters=False)
        assert nothing is None and relative([images], [expected_images]) < 1e-10


def test_probabilities_in_place_of_labels_have_derivatives():
    torch.manual_seed(0)
    network = ConvNet(3, 5, 8, width=4, depth=2).double()
    x = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    labels = torch.randint(5, (7,))
    soft = torch.rand(7, 5, dtype=torch.float64).softmax(1).requires_grad_()
    parameters = list(network.parameters())
    vectors = [torch.randn_like(p) for p in parameters]

    network.fuses = False
    loss = -(soft * network(x).log_softmax(1)).sum() / 9
    expected = torch.autograd.grad(loss, parameters, create_graph=True)
    inner = sum((g * v).sum() for g, v in zip(expected, vectors, strict=True))
    (expected_labels,) = torch.autograd.grad(inner, soft)

    with torch.no_grad():
        plain = [p.detach() for p in parameters]
        gradients, saved = explicit.gradient(plain, x, soft.detach(), 9)
        assert relative(gradients, [g.detach() for g in expected]) < 1e-11
        _, _, found = explicit.vjp(plain, saved, vectors, 9, of_labels=True)
        assert relative([found], [expected_labels]) < 1e-10
        one_hot, classes = (explicit.gradient(plain, x, y, 9)[0] for y in (F.one_hot(labels, 5).double(), labels))
        assert all(torch.equal(a, b) for a, b in zip(one_hot, classes, strict=True))


@pytest.mark.parametrize("size,channel", [(8, 1), (32, 3)])
def test_bfloat16_maps_give_nearly_the_same_in_float32(size, channel):
    torch.manual_seed(0)
    parameters = [p.detach() for p in ConvNet(channel, 5, size, width=16, depth=2).parameters()]
    x, labels, vectors = (
        torch.randn(6, channel, size, size),
        torch.randint(5, (6,)),
        [torch.randn_like(p) for p in parameters],
    )
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        gradients, saved = explicit.gradient(parameters, x.to(dtype), labels, 6)
        products, images = explicit.vjp(parameters, saved, vectors, 6)
        assert images.dtype == dtype and all(g.dtype == torch.float32 for g in [*gradients[2::4], *products[2::4]])
        found.append([torch.cat([t.float().flatten() for t in ts]) for ts in (gradients, products, [images])])
    for exact, half in zip(*found, strict=True):
        assert 0.98 < float(torch.cosine_similarity(exact, half, 0)) < 1
        assert float(half.norm()) == pytest.approx(float(exact.norm()), rel=0.1)


@pytest.mark.parametrize(
    "name,channel,size,wanted",
    [
        ("ConvNet", 3, 32, True),
        ("ConvNetD4", 3, 64, True),
        ("ConvNet", 1, 28, False),  # its first convolution pads more
        ("ConvNetD3", 3, 36, False),  # odd planes
        ("ConvNetGAP", 3, 32, False),
        ("ConvNetBN", 3, 32, False),
        ("ConvNetMP", 3, 32, False),
        ("MLP", 3, 32, False),
    ],
)
def test_other_networks_are_left_to_autograd(name, channel, size, wanted):
    network = networks.get_network(name, channel, 10, size)
    for device in ("cpu", "meta"):
        assert explicit.applies(network, torch.zeros(1, channel, size, size, device=device)) == wanted


def test_without_a_working_compiler_one_note_is_printed(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler found\nmore words")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    notes = []
    function = explicit.compiled(lambda a, b: a + b, notes.append)
    assert [function(1, 2), function(3, 4)] == [3, 7]
    assert notes == ["note: --compile does not work here (no compiler found); running without"]


@pytest.mark.parametrize("compiling", [True, False])
def test_the_products_of_a_compiled_gradient_need_no_compiler(compiling, monkeypatch):
    """One of both may fail to compile, or be beyond the compiler's limit."""
    torch.manual_seed(0)
    parameters = [p.detach().double() for p in ConvNet(3, 5, 16, width=4, depth=2).parameters()]
    x, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.randint(5, (4,))
    found = []
    for other in (compiling, not compiling):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        _, saved = explicit.gradient(parameters, x, labels, 4)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda other=other: other)
        products, images = explicit.vjp(parameters, saved, parameters, 4)
        found.append([*products, images])
    assert relative(*found) < 1e-11


@pytest.mark.slow
def test_compiled_steps_distil_the_same(buffers, tmp_path):
    for name, words in (("plain", []), ("compiled", ["--compile"])):
        one = [*STAGES, *SHORT, "--num_intervals", 1, "--buffer_path", buffers, "--root_log_dir", tmp_path / name]
        done = run_script("distill_mtt.py", *one, *words)
        assert "--compile does not work" not in done.stderr
    found = [load_mtt(path.parent) for path in sorted(tmp_path.rglob("images_best.pt"))]
    assert len(found) == 2
    torch.testing.assert_close(found[0].images, found[1].images, rtol=1e-3, atol=1e-4)
