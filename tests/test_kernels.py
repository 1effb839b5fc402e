"""Chebyshev convolution: the definition against closed forms and others, every kernel against the definition."""

from __future__ import annotations

import gc
import sys
import weakref

import numpy as np
import pytest
import scipy.sparse
import torch

from chebface import kernels
from chebface.errors import InputError, MissingDependencyError
from chebface.kernels import Graph, cheb_conv, reference
from chebface.kernels.graph import find

FORWARD = 2e-6  # of float32 against the float64 definition, relative to the largest value
GRADIENT = 1e-5
SIZES = (1, 3, 5, 16, 32)


def make_graph(n=41, seed=0):
    """A path with chords and one hub: degrees from 1 to over 16."""
    dice = np.random.default_rng(seed)
    path = np.stack([np.arange(n - 1), np.arange(1, n)], 1)
    hub = np.stack([np.full(17, n // 2), dice.choice(np.arange(n - 2), 17, replace=False)], 1)
    return Graph.from_edges(np.concatenate([path, hub, dice.integers(0, n - 1, (n, 2))]), n)


GRAPH = make_graph()
KEEP = torch.tensor([0, 3, 4, 9, 20, 21, 33, 40], dtype=torch.int32)


def make_layer(batch=2, channels=3, terms=6, out=5, graph=GRAPH, dtype=torch.float64, seed=0):
    dice = torch.Generator().manual_seed(seed)
    shapes = (batch, graph.n, channels), (terms, channels, out), (out,)
    return [torch.randn(shape, generator=dice, dtype=torch.float64).to(dtype) for shape in shapes]


def dense_laplacian(graph):
    """L - I by scipy, from the adjacency alone."""
    adjacency = scipy.sparse.csr_matrix((np.ones(len(graph.indices)), graph.indices, graph.indptr), (graph.n, graph.n))
    return scipy.sparse.csgraph.laplacian(adjacency, normed=True).toarray() - np.eye(graph.n)


def dense_answer(x, graph, weight, bias=None):
    """T_k(cos t) = cos(k t), on the eigenvalues: no recursion."""
    values, vectors = np.linalg.eigh(dense_laplacian(graph))
    angle = np.arccos(np.clip(values, -1, 1))
    total = sum(
        np.einsum("nm,bmc,cd->bnd", (vectors * np.cos(k * angle)) @ vectors.T, x.numpy(), matrix.numpy())
        for k, matrix in enumerate(weight)
    )
    return total if bias is None else total + bias.numpy()


def relative(found, wanted):
    found, wanted = found.detach().double(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(params=["reference", "native"])
def runs(request, monkeypatch):
    """Runs the test on each implementation, with memory that starts as NaN."""
    if request.param == "reference":
        monkeypatch.setattr(kernels, "_find_kernel", lambda device: (None, "set aside by a test"))
    elif kernels.implementation() != "native":
        pytest.skip(f"no native kernel: {kernels.implementation()}")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch then fills fresh memory with NaN
    if not (torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()):
        pytest.fail("fresh memory is not NaN")
    yield request.param
    torch.use_deterministic_algorithms(before)


# The definition


@pytest.mark.parametrize("terms", range(1, 8))
def test_definition_is_the_chebyshev_polynomial_of_the_laplacian(terms):
    x, weight, bias = make_layer(terms=terms)
    np.testing.assert_allclose(
        reference.cheb_conv(x, GRAPH, weight, bias).numpy(), dense_answer(x, GRAPH, weight, bias), atol=1e-12
    )


def test_one_term_is_a_linear_layer():
    x, weight, bias = make_layer(terms=1)
    torch.testing.assert_close(reference.cheb_conv(x, GRAPH, weight, bias), x @ weight[0] + bias)


def test_eigenvectors_scale_by_the_polynomials():
    values, vectors = np.linalg.eigh(dense_laplacian(GRAPH))
    x = torch.tensor(vectors.T[:, :, None])  # one eigenvector for each member of the batch
    for k in range(7):
        weight = torch.zeros(7, 1, 1, dtype=torch.float64)
        weight[k] = 1
        scale = np.polynomial.chebyshev.Chebyshev.basis(k)(values)
        np.testing.assert_allclose(
            reference.cheb_conv(x, GRAPH, weight)[..., 0].numpy(), scale[:, None] * vectors.T, atol=1e-12
        )


def test_constant_flow_of_the_walk():
    """sqrt(degree) is the eigenvector of -1: T_k gives (-1)^k."""
    x = torch.tensor(np.sqrt(GRAPH.degree)[None, :, None])
    y = reference.cheb_conv(x, GRAPH, torch.ones(6, 1, 1, dtype=torch.float64))
    np.testing.assert_allclose(y.numpy(), 0, atol=1e-12)


def test_numbering_does_not_matter():
    x, weight, bias = make_layer()
    new = np.random.default_rng(3).permutation(GRAPH.n)  # vertex v is called new[v]
    rows = np.repeat(np.arange(GRAPH.n), GRAPH.degree)
    renamed = Graph.from_edges(np.stack([new[rows], new[GRAPH.indices]], 1), GRAPH.n)
    moved = torch.empty_like(x)
    moved[:, new] = x
    y = reference.cheb_conv(moved, renamed, weight, bias)
    torch.testing.assert_close(y[:, new], reference.cheb_conv(x, GRAPH, weight, bias))


def test_written_out_adjoint_is_autograds():
    inputs = [tensor.requires_grad_() for tensor in make_layer()]
    for keep in (None, KEEP):
        for relu in (False, True):
            y = reference.cheb_conv(inputs[0], GRAPH, *inputs[1:], keep=keep, relu=relu)
            grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
            wanted = torch.autograd.grad(y, inputs, grad)
            with torch.no_grad():
                found = reference.backward(grad, inputs[0], GRAPH, *inputs[1:], keep, relu, y, True)
                without = reference.backward(grad, inputs[0], GRAPH, inputs[1], None, keep, relu, y, False)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b)
            assert without[0] is without[2] is None
            torch.testing.assert_close(without[1], wanted[1])


def test_torch_geometric_agrees():
    from chebface.kernels import _pyg

    inputs = [tensor.requires_grad_() for tensor in make_layer()]
    answers = []
    for layer in (reference.cheb_conv, _pyg.cheb_conv):
        y = layer(inputs[0], GRAPH, *inputs[1:], keep=KEEP, relu=True)
        answers.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        _pyg.cheb_conv(inputs[0], GRAPH, inputs[1]), reference.cheb_conv(inputs[0], GRAPH, inputs[1])
    )


def test_torch_geometric_missing_is_named(monkeypatch):
    from chebface.kernels import _pyg

    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(MissingDependencyError, match="torch_geometric: not installed"):
        _pyg.make_layer(torch.zeros(2, 3, 4))


# Every implementation


@pytest.mark.parametrize("out", SIZES)
@pytest.mark.parametrize("channels", SIZES)
def test_forward_matches_the_definition(runs, channels, out):
    for terms in range(1, 8):
        for batch in (1, 3, 8, 17, 64) if terms == 6 else (1, 3):
            layer = make_layer(batch, channels, terms, out)
            x, weight, bias = (tensor.float() for tensor in layer)
            for keep, relu, shift in ((None, False, None), (KEEP, True, bias), (KEEP, False, None), (None, True, bias)):
                wanted = reference.cheb_conv(
                    x.double(), GRAPH, weight.double(), None if shift is None else bias.double(), keep=keep
                )
                y = cheb_conv(x, GRAPH, weight, shift, keep=keep, relu=relu)
                assert y.is_contiguous() and y.dtype == torch.float32
                scale = wanted.abs().max()
                assert float((y.double() - (wanted.relu() if relu else wanted)).abs().max() / scale) < FORWARD


@pytest.mark.parametrize(("channels", "out"), [(1, 1), (3, 16), (16, 16), (16, 32), (32, 16), (16, 3), (5, 3), (1, 32)])
def test_gradients_match_the_definition(runs, channels, out):
    for terms, batch in ((1, 3), (2, 8), (3, 1), (6, 1), (6, 3), (6, 8), (6, 17), (6, 64), (7, 3)):
        inputs = [tensor.float().requires_grad_() for tensor in make_layer(batch, channels, terms, out)]
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        for keep, relu in ((None, False), (KEEP, True)):
            wanted = reference.cheb_conv(exact[0], GRAPH, *exact[1:], keep=keep)
            y = cheb_conv(inputs[0], GRAPH, *inputs[1:], keep=keep, relu=relu)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            # The float32 answer says where the ReLU lets through: at zero, rounding may decide.
            mask = (y > 0).double() if relu else 1
            right = torch.autograd.grad((wanted * mask * grad.double()).sum(), exact)
            for found, answer in zip(torch.autograd.grad(y, inputs, grad), right, strict=True):
                assert relative(found, answer) < GRADIENT


def test_face_sized_mesh(runs, head):
    graph = Graph.from_faces(head.faces, len(head.template))
    keep = torch.arange(1, graph.n, 4, dtype=torch.int32)
    for batch in (1, 9):
        inputs = [t.float().requires_grad_() for t in make_layer(batch, 3, 6, 16, graph)]
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        wanted = reference.cheb_conv(exact[0], graph, *exact[1:], keep=keep)
        y = cheb_conv(inputs[0], graph, *inputs[1:], keep=keep)
        assert relative(y, wanted) < FORWARD
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        answers = torch.autograd.grad(wanted, exact, grad.double())
        for found, answer in zip(torch.autograd.grad(y, inputs, grad), answers, strict=True):
            assert relative(found, answer) < GRADIENT


def test_slices_of_larger_tensors(runs):
    x, weight, bias = make_layer(dtype=torch.float32)
    keep = torch.zeros(len(KEEP), 2, dtype=torch.int32)
    keep[:, 1] = KEEP
    wide = [torch.full((*tensor.shape, 2), float("nan")) for tensor in (x, weight, bias)]
    for room, tensor in zip(wide, (x, weight, bias), strict=True):
        room[..., 1] = tensor
    parts = [room[..., 1].requires_grad_() for room in wide]
    whole = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    turned = x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    y = cheb_conv(whole[0], GRAPH, *whole[1:], keep=KEEP, relu=True)
    sliced = cheb_conv(parts[0], GRAPH, *parts[1:], keep=keep[:, 1], relu=True)
    torch.testing.assert_close(sliced, y, rtol=0, atol=0)
    torch.testing.assert_close(cheb_conv(turned, GRAPH, weight, bias, keep=KEEP, relu=True), y, rtol=0, atol=0)
    grad = torch.randn(y.shape[::-1], generator=torch.Generator().manual_seed(2)).permute(2, 1, 0)
    for a, b in zip(torch.autograd.grad(sliced, parts, grad), torch.autograd.grad(y, whole, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    expanded = bias.detach()[:1].expand(5)  # strides of zero
    torch.testing.assert_close(cheb_conv(x, GRAPH, weight, expanded), cheb_conv(x, GRAPH, weight, expanded.clone()))


def test_keep_is_slicing(runs):
    x, weight, bias = make_layer(dtype=torch.float32)
    everything = cheb_conv(x, GRAPH, weight, bias)
    torch.testing.assert_close(cheb_conv(x, GRAPH, weight, bias, keep=KEEP), everything[:, KEEP.long()])
    all_kept = torch.arange(GRAPH.n, dtype=torch.int32)
    torch.testing.assert_close(cheb_conv(x, GRAPH, weight, bias, keep=all_kept), everything)
    torch.testing.assert_close(cheb_conv(x, GRAPH, weight, bias, keep=KEEP[-1:]), everything[:, -1:])


def test_linear_in_x_and_in_weight(runs):
    (x, weight, _), (x2, weight2, _) = (make_layer(dtype=torch.float32, seed=seed) for seed in (0, 1))
    near = {"rtol": 1e-4, "atol": 1e-4}
    combined = cheb_conv(2 * x - x2, GRAPH, weight)
    torch.testing.assert_close(combined, 2 * cheb_conv(x, GRAPH, weight) - cheb_conv(x2, GRAPH, weight), **near)
    combined = cheb_conv(x, GRAPH, weight + 3 * weight2)
    torch.testing.assert_close(combined, cheb_conv(x, GRAPH, weight) + 3 * cheb_conv(x, GRAPH, weight2), **near)


def test_each_mesh_of_a_batch_is_its_own(runs):
    x, weight, bias = make_layer(17, dtype=torch.float32)
    together = cheb_conv(x, GRAPH, weight, bias, keep=KEEP)
    for b in (0, 7, 16):
        torch.testing.assert_close(cheb_conv(x[b : b + 1], GRAPH, weight, bias, keep=KEEP)[0], together[b])
    x[3] = float("nan")
    assert torch.isfinite(cheb_conv(x, GRAPH, weight, bias, keep=KEEP)[[0, 1, 2, 4, 16]]).all()


def test_same_bits_again(runs):
    inputs = [tensor.float().requires_grad_() for tensor in make_layer(9)]
    answers = []
    for _ in range(2):
        y = cheb_conv(inputs[0], GRAPH, *inputs[1:], keep=KEEP, relu=True)
        answers.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_empty_batch_and_nothing_kept(runs):
    x, weight, bias = (tensor.float().requires_grad_() for tensor in make_layer())
    y = cheb_conv(x[:0], GRAPH, weight, bias, keep=KEEP)
    assert y.shape == (0, len(KEEP), 5)
    y.sum().backward()
    assert float(weight.grad.abs().max()) == float(bias.grad.abs().max()) == 0
    y = cheb_conv(x, GRAPH, weight, bias, keep=KEEP[:0])
    assert y.shape == (2, 0, 5)
    y.sum().backward()
    assert float(x.grad.abs().max()) == 0


def test_only_wanted_gradients(runs):
    x, weight, bias = make_layer(dtype=torch.float32)
    y = cheb_conv(x.requires_grad_(), GRAPH, weight, bias)
    y.sum().backward()
    assert x.grad is not None and weight.grad is None
    y = cheb_conv(x.detach(), GRAPH, weight.requires_grad_())
    y.sum().backward()
    assert weight.grad is not None
    with torch.inference_mode():
        assert not cheb_conv(x, GRAPH, weight, bias, keep=KEEP.clone()).requires_grad


# The operator


@pytest.mark.parametrize("keep", [None, KEEP], ids=["all", "kept"])
def test_gradcheck(keep):
    graph = Graph.from_edges(
        np.array([(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), *((k, k + 1) for k in range(3, 40))]), 41
    )
    x, weight, bias = (t.requires_grad_() for t in make_layer(2, 2, 4, 3, graph))
    for relu in (False, True):
        assert torch.autograd.gradcheck(
            lambda *a, relu=relu: cheb_conv(a[0], graph, *a[1:], keep=keep, relu=relu),
            (x, weight, bias),
            fast_mode=True,
        )
        y = cheb_conv(x, graph, weight, bias, keep=keep, relu=relu)
        assert torch.equal(y, reference.cheb_conv(x, graph, weight, bias, keep=keep, relu=relu))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    x, weight, bias = (t.requires_grad_() for t in make_layer(dtype=dtype))
    tensors = GRAPH.tensors()
    for arguments in (
        (x, *tensors, weight, bias, KEEP, True),
        (x, *tensors, weight, None, None, False),
        (x.detach(), *tensors, weight, bias, None, True),
    ):
        torch.library.opcheck(torch.ops.chebface.cheb_conv.default, arguments)
    y = cheb_conv(x, GRAPH, weight, bias, keep=KEEP, relu=True).detach()
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    backward = torch.ops.chebface.cheb_conv_backward.default
    torch.library.opcheck(backward, (y, x, *tensors, weight, bias, KEEP, True, y, True))
    torch.library.opcheck(backward, (y, x, *tensors, weight, None, KEEP, False, None, False))


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        first, second = make_layer(dtype=torch.float32), make_layer(channels=5, dtype=torch.float32)
        self.weights = torch.nn.ParameterList([first[1], second[1]])
        self.bias = torch.nn.Parameter(first[2])
        self.graph = GRAPH

    def forward(self, x):
        x = cheb_conv(x, self.graph, self.weights[0], self.bias, relu=True)
        return cheb_conv(x, self.graph, self.weights[1], keep=KEEP)


def test_compile_takes_it_whole():
    model = TwoLayers()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 4):
        x = make_layer(batch, dtype=torch.float32)[0].requires_grad_()
        y, wanted = compiled(x), model(x)
        torch.testing.assert_close(y, wanted)
        for a, b in zip(
            torch.autograd.grad(y.square().sum(), (x, *model.parameters())),
            torch.autograd.grad(wanted.square().sum(), (x, *model.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_export_takes_it_whole(tmp_path):
    model = TwoLayers().eval()
    x = make_layer(3, dtype=torch.float32)[0]
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    calls = [node for node in program.graph.nodes if node.target is torch.ops.chebface.cheb_conv.default]
    assert len(calls) == 2
    torch.export.save(program, tmp_path / "layers.pt2")
    again = torch.export.load(tmp_path / "layers.pt2").module()
    for batch in (3, 8):
        x = make_layer(batch, dtype=torch.float32)[0]
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_second_derivatives_are_refused():
    x, weight, bias = (t.requires_grad_() for t in make_layer())
    (grad,) = torch.autograd.grad(cheb_conv(x, GRAPH, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(InputError, match=r"create_graph: .* first derivatives only"):
        grad.sum().backward()


def test_implementation_says_which_and_why(monkeypatch):
    assert kernels.implementation() == "native" or kernels.implementation().startswith("reference (")
    assert kernels.implementation("meta") == "reference (no kernel for 'meta')"
    from chebface.kernels import cpu

    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cpu, "why_missing", lambda: "no C++ compiler found")
    assert kernels.implementation() == "reference (no C++ compiler found)"
    x, weight, bias = make_layer(dtype=torch.float32)
    assert torch.equal(cheb_conv(x, GRAPH, weight, bias), reference.cheb_conv(x, GRAPH, weight, bias))


LAYER = make_layer(dtype=torch.float32)


def call(x=LAYER[0], graph=GRAPH, weight=LAYER[1], bias=LAYER[2], keep=KEEP):
    return cheb_conv(x, graph, weight, bias, keep=keep)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"graph": GRAPH.indptr}, "graph: expected a Graph"),
        ({"x": LAYER[0][:, 1:]}, r"x: expected \(B, 41, C\), a row for each vertex of the graph, got \(2, 40, 3\)"),
        ({"x": LAYER[0][0]}, r"x: expected \(B, 41, C\)"),
        ({"x": LAYER[0].int()}, r"x: expected float32 or float64, got torch\.int32"),
        ({"weight": LAYER[1][:, 1:]}, r"weight: expected \(K, 3, C_out\), got \(6, 2, 5\)"),
        ({"weight": LAYER[1][0]}, r"weight: expected \(K, 3, C_out\)"),
        ({"weight": LAYER[1][:0]}, r"weight: expected K, C and C_out of at least 1, got \(0, 3, 5\)"),
        ({"weight": LAYER[1][..., :0], "bias": None}, "weight: expected K, C and C_out of at least 1"),
        ({"weight": LAYER[1].double()}, r"weight: expected torch\.float32 as x has"),
        ({"weight": LAYER[1].to("meta")}, "weight: expected on cpu as x is"),
        ({"bias": LAYER[2][1:]}, r"bias: expected \(5,\), got \(4,\)"),
        ({"bias": LAYER[2].double()}, r"bias: expected torch\.float32 as x has"),
        ({"keep": KEEP.long()}, r"keep: expected \(M,\) int32"),
        ({"keep": KEEP[None]}, r"keep: expected \(M,\) int32"),
        ({"keep": KEEP.flip(0)}, r"keep: expected rising vertices in 0\.\.40"),
        ({"keep": torch.tensor([1, 1], dtype=torch.int32)}, "keep: expected rising"),
        ({"keep": torch.tensor([-1, 1], dtype=torch.int32)}, "keep: expected rising"),
        ({"keep": torch.tensor([1, 41], dtype=torch.int32)}, "keep: expected rising"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        call(**arguments)


def test_keep_is_checked_again_when_it_changes():
    keep = KEEP.clone()
    call(keep=keep)
    keep[0] = 40
    with pytest.raises(InputError, match="keep: expected rising"):
        call(keep=keep)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_for_the_gpu(dtype):
    x, weight, bias = (tensor.to(dtype) for tensor in LAYER)
    with pytest.raises(InputError, match=rf"x: {dtype} is for the GPU kernel only.*float32"):
        cheb_conv(x, GRAPH, weight, bias)


# Graphs


def test_graph_of_faces():
    faces = np.array([(0, 1, 2), (2, 1, 3), (0, 1, 2), (3, 3, 4)])
    graph = Graph.from_faces(faces, 5)
    assert graph.indptr.tolist() == [0, 2, 5, 8, 11, 12] and graph.n == 5
    assert graph.indices.tolist() == [1, 2, 0, 2, 3, 0, 1, 3, 1, 2, 4, 3]
    assert graph.degree.tolist() == [2, 3, 3, 3, 1]
    assert {graph.indptr.dtype, graph.indices.dtype, graph.degree.dtype} == {np.dtype(np.int32)}
    one_way = Graph.from_edges(np.array([(0, 1), (2, 1), (2, 0), (1, 3), (3, 2), (4, 3), (3, 4), (1, 1)]), 5)
    np.testing.assert_array_equal(one_way.indices, graph.indices)


def test_graph_cannot_be_changed():
    indices = GRAPH.indices.copy()
    graph = Graph(GRAPH.indptr, indices)
    indices[:] = 0
    np.testing.assert_array_equal(graph.indices, GRAPH.indices)
    with pytest.raises(ValueError, match="read-only"):
        graph.indices[0] = 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Graph.from_faces(np.array([(0, 1, 2)]), 4), r"vertex 3 is isolated \(1 of 4 have no neighbour\)"),
        (lambda: Graph.from_faces(np.array([(0, 1, 1), (2, 2, 2)]), 3), "vertex 2 is isolated"),
        (lambda: Graph.from_faces(np.array([(0, 1, 3)]), 3), r"faces: expected vertices in 0\.\.2, got 0\.\.3"),
        (lambda: Graph.from_faces(np.array([(0, 1)]), 3), r"faces: expected \(M, 3\) integers"),
        (lambda: Graph.from_edges(np.array([(0, -1)]), 3), r"edges: expected vertices in 0\.\.2, got -1"),
        (lambda: Graph.from_edges(np.array([(0.0, 1.0)]), 3), r"edges: expected \(M, 2\) integers"),
        (lambda: Graph.from_edges(np.zeros((0, 2), int), 0), "n: expected at least one vertex"),
        (lambda: Graph.from_edges(np.zeros((0, 2), int), 1), "vertex 0 is isolated"),
        (
            lambda: Graph(np.array([0, 1, 2, 3]), np.array([1, 2, 0])),
            "not symmetric: 1 is a neighbour of 0 but 0 is not",
        ),
        (lambda: Graph(np.array([0, 1, 1]), np.array([1])), "vertex 1 is isolated"),
        (lambda: Graph(np.array([0, 2, 3]), np.array([0, 1, 0])), "vertex 0 is its own neighbour"),
        (lambda: Graph(np.array([0, 2, 3, 4]), np.array([2, 1, 0, 0])), "in rising order"),
        (lambda: Graph(np.array([0, 2, 4]), np.array([1, 1, 0, 0])), "in rising order, each once"),
        (lambda: Graph(np.array([0, 1, 2]), np.array([1, 2])), r"indices: expected vertices in 0\.\.1, got 2"),
        (lambda: Graph(np.array([0, 1, 3]), np.array([1, 0])), "indptr: expected N"),
        (lambda: Graph(np.array([0, 2, 1, 2]), np.array([1, 0])), "indptr: expected N"),
        (lambda: Graph(np.array([], int), np.array([], int)), "indptr: expected N"),
        (lambda: Graph(np.array([0.0]), np.array([1])), "indptr: expected one row of integers"),
        (lambda: Graph(np.array([0, 1, 2]), np.array([1, -1])), r"indices: expected numbers in 0\.\.2\^31"),
        (lambda: find(torch.tensor([0, 1, 2]), torch.tensor([1, 0])), "indptr: expected int32"),
        (lambda: find(torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 0])), "indices: expected int32"),
    ],
)
def test_bad_graphs_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_graph_is_found_from_its_tensors():
    indptr, indices = GRAPH.tensors()
    assert find(indptr, indices) is GRAPH
    rebuilt = find(indptr.clone(), indices.clone())
    assert rebuilt is not GRAPH and find(indptr.clone(), indices.clone()) is rebuilt
    np.testing.assert_array_equal(rebuilt.indices, GRAPH.indices)
    assert find(indptr, indices.clone()) is rebuilt  # a partner that is not its own: by content
    foreign = make_graph(seed=5)
    mixed = indptr, foreign.tensors()[1]
    with pytest.raises(InputError):
        find(*mixed)


def test_graph_is_freed():
    graph = make_graph(seed=6)
    call(graph=graph)
    gone = weakref.ref(graph)
    del graph
    gc.collect()
    assert gone() is None
