"""The C++ kernels against the definition in float64: layers of any shape, the encoder in one call, every processor."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from chebface import native
from chebface.errors import InputError, MissingDependencyError
from chebface.kernels import cpu, reference
from chebface.kernels.graph import Graph

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")

FORWARD, GRADIENT = 2e-6, 1e-5  # float32 against float64, relative to the largest entry
CHANNELS, TERMS, CODES = (3, 16, 16, 16, 32), 6, 8
SIZES = (400, 130, 45, 17, 6)
SHAPES = [  # (K, C, C_out)
    *((6, 3, 16), (6, 16, 16), (6, 16, 32), (6, 32, 16), (6, 16, 3)),
    *((1, 1, 1), (2, 3, 3), (3, 4, 5), (4, 5, 7), (6, 8, 17), (6, 9, 40), (5, 33, 3), (7, 2, 20), (2, 7, 1)),
]


def make_graph(n: int, seed: int = 0) -> Graph:
    """A grid cut into triangles, holes in it, one hub with many neighbours, and a part of its own."""
    side = int(np.ceil(np.sqrt(n)))
    i = np.arange(n - 4)
    steps = [(i, i + s) for s in (1, side, side + 1) if s < n - 4]
    edges = np.concatenate([np.stack([a, b], 1)[: len(i) - (b - a)[0]] for a, b in steps])
    rng = np.random.default_rng(seed)
    edges = edges[(rng.random(len(edges)) < 0.95) | (edges[:, 1] - edges[:, 0] == 1)]
    hub = np.stack([np.full(13, 2), rng.choice(np.arange(3, max(17, n - 4)), 13, replace=False) % (n - 4)], 1)
    apart = n - 4 + np.array([[0, 1], [1, 2], [2, 3]])
    return Graph.from_edges(np.concatenate([edges, hub, apart]), n)


GRAPH = make_graph(211)
KEEP = torch.arange(0, 211, 4, dtype=torch.int32)


def make_inside(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers with NaN before and after them in memory: who reads past the ends shows it."""
    size = int(np.prod(shape))
    big = torch.full((size + 64,), torch.nan)
    big[32 : 32 + size] = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return big[32 : 32 + size].view(shape)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    if not wanted.numel():
        return 0.0
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


def make_layer(batch, shape, bias=True):
    terms, channels, out = shape
    x = make_inside(batch, GRAPH.n, channels)
    weight = make_inside(*shape, seed=1) / (terms * channels) ** 0.5
    return x, weight, make_inside(out, seed=2) if bias else None


def differentiate(grad_y, x, weight, bias, keep, relu):
    """y and gradients by the definition, in float64."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = reference.cheb_conv(leaves[0], GRAPH, *leaves[1:], keep=keep, relu=relu)
    return y.detach(), torch.autograd.grad(y, leaves, grad_y.double())


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("keep", "relu", "bias"),
    [(KEEP, True, True), (None, False, False), (KEEP[:1] + 9, False, True), (None, True, True)],
)
def test_a_layer_is_its_definition(batch, shape, keep, relu, bias):
    x, weight, bias = make_layer(batch, shape, bias)
    y = cpu.forward(x, GRAPH, weight, bias, keep, relu)
    grad_y = make_inside(*y.shape, seed=3)
    wanted, gradients = differentiate(grad_y, x, weight, bias, keep, relu)
    assert relative(y, wanted) < FORWARD
    found = cpu.backward(grad_y, x, GRAPH, weight, bias, keep, relu, y if relu else None, True)
    assert (found[2] is None) == (bias is None)
    for got, want in zip(found, gradients, strict=False):
        # A gradient that is one sum over all vertices may cancel: measured against the sum of its parts.
        scale = max(1.0, float(x.abs().sum() / x.shape[2] / want.abs().max())) if want.numel() < 64 else 1.0
        assert relative(got, want) < GRADIENT * min(scale, 50)
    without = cpu.backward(grad_y, x, GRAPH, weight, bias, keep, relu, y if relu else None, False)
    assert without[0] is None and torch.equal(without[1], found[1])


def test_a_graph_too_large_for_short_indices():
    graph = make_graph(9001)
    x, weight, keep = (
        make_inside(2, 9001, 3),
        make_inside(4, 3, 16, seed=1),
        torch.arange(0, 9001, 5, dtype=torch.int32),
    )
    y = cpu.forward(x, graph, weight, None, keep, False)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = reference.cheb_conv(leaves[0], graph, leaves[1], keep=keep)
    assert relative(y, wanted.detach()) < FORWARD
    found = cpu.backward(y, x, graph, weight, None, keep, False, None, True)
    for got, want in zip(found, torch.autograd.grad(wanted, leaves, y.double()), strict=False):
        assert relative(got, want) < GRADIENT


def test_nothing_in_nothing_out():
    x, weight, bias = make_layer(2, (6, 3, 16))
    for some, keep, rows in ((x[:0], KEEP, 53), (x, KEEP[:0], 0)):
        y = cpu.forward(some, GRAPH, weight, bias, keep, True)
        assert y.shape == (len(some), rows, 16)
        grads = cpu.backward(y, some, GRAPH, weight, bias, keep, True, y, True)
        assert grads[0].shape == some.shape and not any(grad.any() for grad in grads)


def test_permuting_vertices_permutes_the_answer():
    x, weight, bias = make_layer(3, (6, 3, 16))
    order = torch.randperm(GRAPH.n, generator=torch.Generator().manual_seed(5))
    rows = np.repeat(np.arange(GRAPH.n), GRAPH.degree)
    moved = Graph.from_edges(np.argsort(order.numpy())[np.stack([rows, GRAPH.indices], 1)], GRAPH.n)
    y = cpu.forward(x, GRAPH, weight, bias, None, False)
    assert (
        relative(cpu.forward(x[:, order].contiguous(), moved, weight, bias, None, False), y[:, order].double()) < 1e-5
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(3, 3, 16), (3, 16, 16), (3, 16, 3)], ids=str)
def test_what_is_not_finite_spreads_as_defined(bad, shape):
    """To the vertices within two hops, through the ReLU, and to no other mesh of the batch."""
    x, weight, bias = make_layer(5, shape)
    x[3, 100, 1] = bad
    y = cpu.forward(x, GRAPH, weight, bias, None, True)
    wanted = reference.cheb_conv(x.double(), GRAPH, weight.double(), bias.double(), relu=True)
    assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())
    assert not y[3].isfinite().all() and y[3].isfinite().any() and y[[0, 1, 2, 4]].isfinite().all()


def make_encoder(sizes, channels=CHANNELS):
    """Graphs, keeps, weights, biases, linear map."""
    graphs = [make_graph(n) for n in sizes[:-1]]
    rng = np.random.default_rng(1)
    keeps = [np.sort(rng.permutation(n)[:m]).astype(np.int32) for n, m in pairwise(sizes)]
    shapes = [(TERMS, *pair) for pair in pairwise(channels)]
    weights = [make_inside(*s, seed=i) / (s[0] * s[1]) ** 0.5 for i, s in enumerate(shapes)]
    biases = [make_inside(s[2], seed=9 + i) * 0.1 for i, s in enumerate(shapes)]
    features = sizes[-1] * channels[-1]
    return graphs, keeps, weights, biases, make_inside(CODES, features, seed=20) / features**0.5, make_inside(CODES)


@pytest.fixture(scope="module")
def encoder():
    return make_encoder(SIZES)


def encode_reference(x, graphs, keeps, weights, biases, linear_weight, linear_bias):
    for graph, keep, weight, bias in zip(graphs, keeps, weights, biases, strict=True):
        x = reference.cheb_conv(x, graph, weight, bias, keep=torch.from_numpy(keep), relu=True)
    return x.flatten(1) @ linear_weight.T + linear_bias


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5, 13])
def test_the_encoder_is_its_layers(encoder, batch, threads):
    graphs, keeps, weights, biases, *linear = encoder
    x, grad_z = make_inside(batch, SIZES[0], 3, seed=30), make_inside(batch, CODES, seed=31)
    leaves = [t.double().requires_grad_() for t in (x, *weights, *biases, *linear)]
    z = encode_reference(leaves[0], graphs, keeps, leaves[1:5], leaves[5:9], *leaves[9:])
    gradients = torch.autograd.grad(z, leaves, grad_z.double())
    plan = cpu.prepare(*encoder)
    assert relative(cpu.encode(x, plan, threads=threads), z.detach()) < FORWARD
    grad_x, *groups, grad_linear_weight, grad_linear_bias = cpu.encode_backward(grad_z, x, plan, True, threads=threads)
    found = [grad_x, *groups[0], *groups[1], grad_linear_weight, grad_linear_bias]
    assert all(relative(got, want) < GRADIENT for got, want in zip(found, gradients, strict=True))
    again = cpu.encode_backward(grad_z, x, plan, False, threads=threads)
    assert again[0] is None and all(torch.equal(a, b) for a, b in zip(again[1], groups[0], strict=True))
    same, saved = cpu.encode_saving(x, plan, threads=threads)
    assert torch.equal(same, cpu.encode(x, plan, threads=threads))
    kept = cpu.encode_backward(grad_z, x, plan, True, saved=saved, threads=threads)
    assert torch.equal(kept[0], grad_x) and all(torch.equal(a, b) for a, b in zip(kept[1], groups[0], strict=True))
    frozen = cpu.encode_backward(grad_z, x, plan, True, saved=saved, need_weights=False, threads=threads)
    assert torch.equal(frozen[0], grad_x) and frozen[1:] == ([], [], None, None)


@pytest.mark.parametrize(
    ("sizes", "channels"),
    [((5000, 1300, 80), (3, 16, 16)), ((9000, 1300, 80), (4, 16, 9)), ((1501, 400, 7), (16, 16, 5))],
)
def test_a_team_of_threads_gives_what_one_does(sizes, channels):
    """One mesh large enough for threads to share it: the same bits, and every time."""
    made = make_encoder(sizes, channels)
    plan, x, grad_z = cpu.prepare(*made), make_inside(1, sizes[0], channels[0], seed=3), make_inside(1, CODES)
    alone = cpu.encode(x, plan, threads=1)
    graphs, keeps, weights, biases, *linear = made
    wanted = encode_reference(
        x.double(),
        graphs,
        keeps,
        [w.double() for w in weights],
        [b.double() for b in biases],
        *[t.double() for t in linear],
    )
    assert relative(alone, wanted) < FORWARD
    gradient = cpu.encode_backward(grad_z, x, plan, True, threads=1)[0]
    for threads in (2, 3) * 20:
        code, saved = cpu.encode_saving(x, plan, threads=threads)
        assert torch.equal(code, alone)
        assert torch.equal(cpu.encode_backward(grad_z, x, plan, True, saved=saved, threads=threads)[0], gradient)


def test_an_encoder_of_other_widths(encoder):
    """Two layers, first channels too many to share rows, last not whole vectors."""
    graphs, keeps = encoder[0][:2], encoder[1][:2]
    shapes = [(3, 18, 5), (3, 5, 7)]
    weights = [make_inside(*s, seed=i) / 4 for i, s in enumerate(shapes)]
    biases = [make_inside(s[2]) for s in shapes]
    linear = make_inside(3, SIZES[2] * 7, seed=4), make_inside(3)
    x, grad_z = make_inside(3, SIZES[0], 18), make_inside(3, 3, seed=5)
    leaves = [t.double().requires_grad_() for t in (x, *weights, *biases, *linear)]
    z = encode_reference(leaves[0], graphs, keeps, leaves[1:3], leaves[3:5], *leaves[5:])
    plan = cpu.prepare(graphs, keeps, weights, biases, *linear)
    assert relative(cpu.encode(x, plan), z.detach()) < FORWARD
    grad_x, *groups, grad_linear_weight, grad_linear_bias = cpu.encode_backward(grad_z, x, plan, True)
    found = [grad_x, *groups[0], *groups[1], grad_linear_weight, grad_linear_bias]
    gradients = torch.autograd.grad(z, leaves, grad_z.double())
    assert all(relative(got, want) < GRADIENT for got, want in zip(found, gradients, strict=True))
    saved = cpu.encode_saving(x, plan)[1]
    assert torch.equal(cpu.encode_backward(grad_z, x, plan, True, saved=saved)[0], grad_x)


def test_large_batches_save_nothing(encoder):
    x, plan = make_inside(17, SIZES[0], 3), cpu.prepare(*encoder)
    code, saved = cpu.encode_saving(x, plan)
    assert saved is None and torch.equal(code, cpu.encode(x, plan))


def test_a_plan_sees_steps_in_place_and_takes_other_weights(encoder):
    graphs, keeps, *parameters = encoder
    weights, biases, *linear = ([p.clone() for p in parameters[0]], parameters[1], *parameters[2:])
    plan = cpu.prepare(graphs, keeps, weights, biases, *linear)
    x = make_inside(2, SIZES[0], 3)
    before = cpu.encode(x, plan)
    weights[1].mul_(1.5)
    stepped = cpu.encode(x, plan)
    assert not torch.equal(stepped, before)
    assert torch.equal(cpu.encode(x, plan.with_weights(*parameters)), before)
    assert torch.equal(cpu.encode(x, plan), stepped)


def test_the_same_call_gives_the_same_bits_from_many_threads_at_once(encoder):
    plan = cpu.prepare(*encoder)
    x, grad_z = make_inside(11, SIZES[0], 3), make_inside(11, CODES)

    def work():
        return [cpu.encode(x, plan, threads=2), *cpu.encode_backward(grad_z, x, plan, True, threads=2)[1]]

    wanted, answers = work(), []
    workers = [threading.Thread(target=lambda: answers.extend(work() for _ in range(5))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(answers) == 20
    assert all(torch.equal(a, b) for answer in answers for a, b in zip(answer, wanted, strict=True))


def test_threads_are_there_after_a_fork():
    """A data loader's worker is a fork: it has none of the threads that its parent started."""
    program = """
import os, sys, numpy as np, torch
from chebface.kernels import Graph, cpu
ring = np.arange(3000)
graph = Graph.from_edges(np.stack([ring, np.roll(ring, 1)], 1), 3000)
x, weight = torch.randn(40, 3000, 3), torch.randn(6, 3, 16)
want = cpu.forward(x, graph, weight, None, None, True, threads=2)
child = os.fork()
if child == 0:
    got = cpu.forward(x, graph, weight, None, None, True, threads=2)
    os._exit(0 if torch.equal(got, want) else 1)
sys.exit(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=240, check=False)
    assert done.returncode == 0


def test_a_graph_lets_its_memory_go():
    graph = make_graph(50)
    weight = torch.randn(2, 3, 4)
    cpu.forward(torch.randn(1, 50, 3), graph, weight, None, None, False)
    handle = weakref.ref(cpu._handles[graph][None])
    assert handle() is not None
    del graph
    assert handle() is None


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """The module as if nothing had been compiled yet."""
    monkeypatch.setenv("CHEBFACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CHEBFACE_NATIVE", raising=False)
    monkeypatch.setattr(cpu, "_handles", weakref.WeakKeyDictionary())
    native.forget(), cpu._library.cache_clear()
    yield monkeypatch
    native.forget(), cpu._library.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64 processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_lesser_processors_compute_the_same(fresh, processor):
    fresh.setattr(native, "FLAGS", ("-O1", f"-march={processor}", *native.FLAGS[2:]))
    for shape in SHAPES[:6]:
        x, weight, bias = make_layer(7, shape)
        y = cpu.forward(x, GRAPH, weight, bias, KEEP, True)
        wanted, gradients = differentiate(y, x, weight, bias, KEEP, True)
        assert relative(y, wanted) < FORWARD
        found = cpu.backward(y, x, GRAPH, weight, bias, KEEP, True, y, True)
        assert all(relative(got, want) < GRADIENT for got, want in zip(found, gradients, strict=True))


@pytest.mark.skipif(not os.environ.get("CHEBFACE_SANITIZE"), reason="half a minute; set CHEBFACE_SANITIZE=1")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path, sanitizer):
    driver, program = Path(__file__).with_name("cpu_kernels_for_tests.cpp"), tmp_path / "driver"
    flags = ["-std=c++17", "-g", "-march=native", "-O0", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    source = f'-DSOURCE="{cpu._SOURCE}"'
    subprocess.run([native.find_compiler(), *flags, source, str(driver), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr


def test_without_a_compiler_it_says_why(fresh):
    fresh.setenv("CHEBFACE_NATIVE", "0")
    x, weight, bias = make_layer(1, (2, 3, 4))
    assert not cpu.available() and cpu.why_missing() == "CHEBFACE_NATIVE=0"
    with pytest.raises(MissingDependencyError, match="CHEBFACE_NATIVE=0"):
        cpu.forward(x, GRAPH, weight, bias, None, False)


def test_with_a_compiler_there_is_no_reason():
    assert cpu.available() and cpu.why_missing() is None


def test_no_memory_is_an_error(monkeypatch, encoder):
    class Full:
        def __getattr__(self, name):
            return lambda *arguments: 0 if name == "cheb_graph_new" else 1

    x, weight, bias = make_layer(1, (2, 3, 4))
    plan, points = cpu.prepare(*encoder), make_inside(1, SIZES[0], 3)
    y = cpu.forward(x, GRAPH, weight, bias, None, False)
    monkeypatch.setattr(cpu, "_library", Full)
    calls = [
        lambda: cpu.forward(x, GRAPH, weight, bias, None, False),
        lambda: cpu.backward(y, x, GRAPH, weight, bias, None, False, None, True),
        lambda: cpu.encode(points, plan),
        lambda: cpu.encode_backward(torch.ones(1, CODES), points, plan, True),
        lambda: cpu.forward(x[:, :60].contiguous(), make_graph(60), weight, bias, None, False),
    ]
    for call in calls:
        with pytest.raises(MemoryError, match="smaller batch"):
            call()


def test_wrong_layers_are_refused(monkeypatch):
    x, weight, bias = make_layer(2, (2, 3, 4))
    y = cpu.forward(x, GRAPH, weight, bias, None, True)

    def forward(**other):
        given = {"x": x, "weight": weight, "bias": bias, "keep": None} | other
        threads = given.pop("threads", None)
        cpu.forward(given["x"], GRAPH, given["weight"], given["bias"], given["keep"], True, threads=threads)

    for match, other in {
        r"x: expected \(B, 211, 3\), got \(211, 3\)": {"x": x[0]},
        r"x: expected \(2, 211, 3\), got \(2, 210, 3\)": {"x": x[:, 1:]},
        r"x: expected contiguous float32": {"x": x.double()},
        r"with strides": {"x": x.transpose(0, 1).contiguous().transpose(0, 1)},
        r"weight: expected \(K, C, C_out\), each at least 1, got \(0, 3, 4\)": {"weight": weight[:0]},
        r"bias: expected \(4,\), got \(3,\)": {"bias": bias[:3]},
        r"keep: expected \(M,\) int32": {"keep": KEEP.long()},
        r"keep: expected rising vertices in 0..210": {"keep": KEEP.flip(0)},
        r"threads: expected at least 1, got 0": {"threads": 0},
    }.items():
        with pytest.raises(InputError, match=match):
            forward(**other)
    with pytest.raises(InputError, match="y: with relu=True"):
        cpu.backward(y, x, GRAPH, weight, bias, None, True, None, True)
    with pytest.raises(InputError, match=r"grad_y: expected \(2, 211, 4\), got \(1, 211, 4\)"):
        cpu.backward(y[:1], x, GRAPH, weight, bias, None, True, y, True)
    with pytest.raises(InputError, match=r"y: expected \(2, 211, 4\)"):
        cpu.backward(y, x, GRAPH, weight, bias, None, True, y[:1], True)
    monkeypatch.setattr(cpu, "_MAX_VERTICES", 10)
    with pytest.raises(InputError, match="at most 10 vertices"):
        cpu.forward(x, make_graph(211, 1), weight, bias, None, False)


def test_wrong_encoders_are_refused(encoder):
    graphs, keeps, weights, biases, linear_weight, linear_bias = encoder
    for match, given in {
        r"expected 1..15 of each, got 4, 3": (graphs, keeps[:3], weights, biases, linear_weight, linear_bias),
        r"graphs\[1\]: expected the 130 vertices kept before it, got 45": (
            *([graphs[0], graphs[2]], keeps[::2], weights[:2], biases[:2], linear_weight, linear_bias),
        ),
        r"expected one of each for 4 layers, got 3, 4": (
            graphs,
            keeps,
            weights[:3],
            biases,
            linear_weight,
            linear_bias,
        ),
        r"weights\[0\]: expected \(K, C, C_out\)": (
            *(graphs, keeps, [w[:0] for w in weights], biases, linear_weight, linear_bias),
        ),
        r"weights\[2\]: expected \(K, C, C_out\), each": (
            *(graphs, keeps, [*weights[:2], weights[2][..., :0], weights[3]], biases, linear_weight, linear_bias),
        ),
        r"weights\[1\]: expected \(6, 16, 16\), got \(5, 16, 16\)": (
            *(graphs, keeps, [weights[0], weights[1][:5], *weights[2:]], biases, linear_weight, linear_bias),
        ),
        r"biases\[0\]: expected \(16,\)": (graphs, keeps, weights, biases[::-1], linear_weight, linear_bias),
        r"linear_weight: expected \(codes, features\), got \(192,\)": (
            *(graphs, keeps, weights, biases, linear_weight[0], linear_bias),
        ),
        r"linear_weight: expected \(8, 192\), got \(8, 191\)": (
            *(graphs, keeps, weights, biases, linear_weight[:, 1:], linear_bias),
        ),
        r"linear_bias: expected \(8,\), got \(7,\)": (
            *(graphs, keeps, weights, biases, linear_weight, linear_bias[1:]),
        ),
    }.items():
        with pytest.raises(InputError, match=match):
            cpu.prepare(*given)
    plan = cpu.prepare(*encoder)
    with pytest.raises(InputError, match=r"x: expected \(B, 400, 3\), got \(400, 3\)"):
        cpu.encode(torch.zeros(400, 3), plan)
    with pytest.raises(InputError, match=r"x: expected \(1, 400, 3\), got \(1, 399, 3\)"):
        cpu.encode(torch.zeros(1, 399, 3), plan)
    with pytest.raises(InputError, match=r"grad_z: expected \(1, 8\)"):
        cpu.encode_backward(torch.zeros(1, 7), torch.zeros(1, 400, 3), plan, True)
    with pytest.raises(InputError, match="saved: expected"):
        cpu.encode_backward(torch.zeros(1, CODES), torch.zeros(1, 400, 3), plan, True, saved=torch.zeros(5))
