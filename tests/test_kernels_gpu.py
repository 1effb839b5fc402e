"""The GPU encoder without a GPU: encoder.cu, unmodified, on CPU threads against its definition; and as a race check."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from chebface import native
from chebface.errors import InputError, MissingDependencyError
from chebface.hierarchy import for_head
from chebface.kernels import gpu, nvrtc, pairs, reference
from chebface.kernels.graph import Graph

HERE = Path(__file__).resolve().parent
SOURCE = Path(gpu.__file__).with_name("encoder.cu")
THREADS = 64
TINY = (230, 100, 60, 33, 20)
FLOAT32, GRADIENT = 2e-6, 1e-5
SPILLS = 128  # bytes: some registers, once around a level

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler to emulate the GPU with")


def compile_emulation(folder: Path, source: Path, macros: list[str], *options: str) -> Path:
    """encoder.cu as a library for the CPU."""
    built = folder / f"emulation{len(list(folder.iterdir()))}.so"
    command = [native.find_compiler(), "-std=c++17", "-pthread", "-shared", "-fPIC", "-w", *macros, *options]
    command += [f'-DCUDA_SOURCE="{source}"']
    done = subprocess.run(
        [*command, str(HERE / "cuda_emulation.cpp"), "-o", str(built)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return built


class EmulatedProgram:
    """`gpu.Program` on CPU threads."""

    NAMES = ("encode", "backward", "weight_gradient", "tell")

    def __init__(self, built: Path) -> None:
        self.library = ctypes.CDLL(str(built))
        figures, call = (ctypes.c_int * 6)(), gpu.Call()
        call.partial = ctypes.addressof(figures)
        self.launch("tell", (1, 1), call)
        self.figures = list(figures)

    def launch(self, name: str, grid: tuple[int, int], call: gpu.Call) -> None:
        self.library.launch(self.NAMES.index(name), *grid, ctypes.byref(call))


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """As `gpu.load_program`, for the CPU."""
    folder = tmp_path_factory.mktemp("emulation")

    @cache
    def load_program(device, sizes, blocks):
        macros = gpu.make_macros(sizes, blocks, THREADS, THREADS)
        return EmulatedProgram(compile_emulation(folder, SOURCE, macros, "-O1"))

    return load_program


@pytest.fixture
def emulate(monkeypatch, compile_once):
    """The GPU is this CPU."""
    monkeypatch.setattr(gpu, "load_program", compile_once)


def random_graph(n: int, seed: int) -> Graph:
    """A ring with random chords: degrees from 2 to 30, no pair of neighbours special."""
    draw = np.random.default_rng(seed)
    ring = np.stack([np.arange(n), (np.arange(n) + 1) % n], 1)
    hub = np.stack([np.zeros(min(n - 3, 30), int), np.arange(2, 2 + min(n - 3, 30))], 1)
    return Graph.from_edges(np.concatenate([ring, hub, draw.integers(0, n, (n, 2))]), n)


def random_meshes(sizes: tuple[int, ...], seed: int = 0) -> tuple[list[Graph], list[np.ndarray]]:
    draw = np.random.default_rng(seed)
    graphs = [random_graph(n, seed + n) for n in sizes[:-1]]
    keeps = [np.sort(draw.choice(n, m, replace=False)).astype(np.int32) for n, m in itertools.pairwise(sizes)]
    return graphs, keeps


def random_parameters(last: int, seed: int = 1) -> tuple[list, list, torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    weights = [draw(*shape) * (shape[0] * shape[1]) ** -0.5 for shape in gpu.SHAPES]
    return weights, [draw(s[2]) * 0.1 for s in gpu.SHAPES], draw(8, 32 * last) * 0.05, draw(8)


def define(x, graphs, keeps, weights, biases, linear_weight, linear_bias) -> torch.Tensor:
    """The encoder by the definition of its layers."""
    for graph, keep, weight, bias in zip(graphs, keeps, weights, biases, strict=True):
        x = reference.cheb_conv(x, graph, weight, bias, keep=torch.as_tensor(keep), relu=True)
    return x.flatten(1) @ linear_weight.T + linear_bias


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    want = want.detach()
    return float((got.double() - want).norm() / want.norm())


def check_against_definition(plan: gpu.Plan, graphs, keeps, parameters, batch: int, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, graphs[0].n, 3), generator=make)
    grad = torch.randn((batch, 8), generator=make)
    code, saved = gpu.encode_saving(x, plan)
    exact = [p.double().requires_grad_() for p in (*parameters[0], *parameters[1], *parameters[2:])]
    wide = x.double().requires_grad_()
    want = define(wide, graphs, keeps, exact[:4], exact[4:8], exact[8], exact[9])
    assert relative(code, want) < FLOAT32
    assert torch.equal(gpu.encode(x, plan), code)
    wanted = torch.autograd.grad((want * grad.double()).sum(), [wide, *exact])
    grad_x, weights, biases, linear, bias = gpu.encode_backward(grad, x, plan, True, saved=saved)
    for got, exactly in zip([grad_x, *weights, *biases, linear, bias], wanted, strict=True):
        assert got.shape == exactly.shape
        assert relative(got, exactly) < GRADIENT


@pytest.fixture(scope="module")
def tiny():
    graphs, keeps = random_meshes(TINY)
    return graphs, keeps, random_parameters(TINY[-1])


@needs_compiler
@pytest.mark.parametrize("blocks", [1, 4])
def test_kernels_agree_with_the_definition(emulate, tiny, blocks):
    graphs, keeps, parameters = tiny
    plan = replace(gpu.prepare(graphs, keeps, *parameters, blocks=blocks), chunks=3)
    check_against_definition(plan, graphs, keeps, parameters, batch=2, seed=blocks)


@needs_compiler
def test_kernels_agree_on_the_head(emulate, head):
    levels = for_head(head).levels[:-1]
    graphs, keeps = [level.graph for level in levels], [level.down for level in levels]
    parameters = random_parameters(len(keeps[-1]))
    plan = replace(gpu.prepare(graphs, keeps, *parameters, blocks=4), chunks=2)
    check_against_definition(plan, graphs, keeps, parameters, batch=1, seed=0)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_exactly(emulate, tiny, dtype):
    graphs, keeps, parameters = tiny
    plan = gpu.prepare(graphs, keeps, *parameters, blocks=4)
    x = torch.randn((2, graphs[0].n, 3), generator=torch.Generator().manual_seed(3)).to(dtype)
    x[0, :4] = torch.tensor([[0.0, -0.0, 1e-7], [6e-5, -6e-8, 1e-5], [1000.0, -3e4, 1.0], [-1e-6, 2e-6, -3e-7]]).to(
        dtype
    )
    assert torch.equal(gpu.encode(x, plan), gpu.encode(x.float(), plan))
    grad_x, *_, none = gpu.encode_backward(torch.ones(2, 8), x, plan, True, need_weights=False)
    assert grad_x.dtype == dtype and none is None
    broken = x.clone()
    broken[1, 5, 2] = float("inf")
    code = gpu.encode(broken, plan)
    assert torch.equal(code[0], gpu.encode(x, plan)[0]) and not code[1].isfinite().all()


@needs_compiler
def test_gradients_come_as_asked_for(emulate, tiny):
    graphs, keeps, parameters = tiny
    plan = replace(gpu.prepare(graphs, keeps, *parameters, blocks=1), chunks=3)
    x, grad = torch.randn(2, graphs[0].n, 3)[:, :, [0, 2, 1]], torch.randn(8, 2).T
    grad_x, weights, biases, linear, bias = gpu.encode_backward(grad, x, plan, True)
    only_x = gpu.encode_backward(grad, x, plan, True, need_weights=False)
    no_x = gpu.encode_backward(grad, x, plan, False)
    assert torch.equal(only_x[0], grad_x) and only_x[1:] == ([], [], None, None)
    assert no_x[0] is None
    for got, want in zip([*no_x[1], *no_x[2], *no_x[3:]], [*weights, *biases, linear, bias], strict=True):
        assert torch.equal(got, want)


@needs_compiler
def test_a_plan_sees_weights_change_in_place_and_takes_others(emulate, tiny):
    graphs, keeps, parameters = tiny
    weights, *rest = parameters
    own = [weight.clone() for weight in weights]
    plan = gpu.prepare(graphs, keeps, own, *rest, blocks=1)
    x = torch.randn(1, graphs[0].n, 3)
    before = gpu.encode(x, plan)
    own[2].mul_(1.5)
    after = gpu.encode(x, plan)
    assert not torch.equal(before, after)
    assert torch.equal(gpu.encode(x, plan.with_weights(weights, *rest)), before)


@needs_compiler
def test_no_mesh_gives_no_code(emulate, tiny):
    graphs, keeps, parameters = tiny
    plan = replace(gpu.prepare(graphs, keeps, *parameters, blocks=1), chunks=2)
    x = torch.empty(0, graphs[0].n, 3)
    assert gpu.encode(x, plan).shape == (0, 8)
    grad_x, weights, *_ = gpu.encode_backward(torch.empty(0, 8), x, plan, True)
    assert grad_x.shape == x.shape and not weights[0].any()


@pytest.fixture(scope="module")
def race_check(tmp_path_factory):
    """encoder.cu for a tiny mesh on system threads under ThreadSanitizer: line to leave out -> what was printed."""
    folder = tmp_path_factory.mktemp("races")
    probe, compiler = folder / "probe.cpp", native.find_compiler()
    probe.write_text("int main() { return 0; }")
    command = [compiler, "-fsanitize=thread", str(probe), "-o", str(folder / "probe")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("the compiler has no ThreadSanitizer")
    if subprocess.run([folder / "probe"], capture_output=True, check=False).returncode:
        pytest.skip("ThreadSanitizer does not run on this kernel's address layout")
    sizes = (60, 36, 22, 12, 5)
    graphs, keeps = random_meshes(sizes)
    plan = gpu.prepare(graphs, keeps, *random_parameters(sizes[-1]), blocks=4)
    built = folder / "emulation"
    options = ["-std=c++17", "-pthread", "-w", "-g1", "-O1", "-fsanitize=thread", "-DEMULATE_WITH_THREADS"]
    command = [compiler, *options, *gpu.make_macros(plan.sizes, 4, 32, 32), f'-DCUDA_SOURCE="{SOURCE}"']
    subprocess.run([*command, str(HERE / "cuda_emulation.cpp"), "-o", str(built)], check=True)
    figures = [int(word) for word in subprocess.run([built], capture_output=True, check=True).stdout.split()]
    x, code, grad, grad_x = torch.randn(1, 60, 3), torch.empty(1, 8), torch.randn(1, 8), torch.empty(1, 60, 3)
    saved, grads, partial = torch.empty(figures[3]), torch.empty(figures[4]), torch.empty(2, figures[5])
    call = gpu.Call.from_buffer_copy(plan._call)
    own = {
        "x": x,
        "code": code,
        "grad_code": grad,
        "grad_x": grad_x,
        "saved": saved,
        "grads": grads,
        "partial": partial,
    }
    for name, tensor in own.items():
        setattr(call, name, tensor.data_ptr())
    call.batch = 1
    parts = [*plan._tables, *plan.weights, *plan.biases, plan.linear_weight, plan.linear_bias, *own.values()]
    places = {part.data_ptr(): index for index, part in enumerate(parts, start=1)}
    words = np.frombuffer(bytes(call), np.uint64).copy()
    pointers = gpu.Call.kind.offset // 8
    words[:pointers] = [places[int(word)] for word in words[:pointers]]
    contents = [part.numpy().tobytes() for part in parts]
    header = np.array([len(parts), *map(len, contents)], np.int64)
    (folder / "call").write_bytes(header.tobytes() + b"".join(contents) + words.tobytes())

    def run(line: int) -> tuple[bytes, str]:
        command = [built, folder / "call", "2", str(line)]
        done = subprocess.run(command, capture_output=True, check=False, timeout=120)
        return done.stdout, done.stderr.decode(errors="replace")

    wide = define(x.double(), graphs, keeps, *(_double(p) for p in (plan.weights, plan.biases)), *_double(parts[-9:-7]))
    return run, wide


def _double(tensors) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors]


@needs_compiler
def test_no_two_threads_meet_in_memory(race_check):
    run, want = race_check
    code, report = run(0)
    assert "data race" not in report, report[:3000]
    assert relative(torch.frombuffer(bytearray(code), dtype=torch.float32)[None], want) < FLOAT32


@needs_compiler
@pytest.mark.parametrize("after", ["hop<P>(owned, in, k & 1 ? A : B", "void level_done() {"])
def test_a_removed_barrier_is_reported(race_check, after):
    run, _ = race_check
    text = SOURCE.read_text()
    found = re.compile(r"__syncthreads\(\);|cluster_sync\(\);").search(text, text.index(after))
    assert "data race" in run(text.count("\n", 0, found.start()) + 1)[1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: registers and spills are not looked at")
def test_the_compiler_spills_nothing(tmp_path):
    sizes = (
        ("CHEB_N0", 5023),
        ("CHEB_N4", 20),
        *((f"CHEB_P{level}", count) for level, count in enumerate((2513, 630, 159, 40))),
    )
    command = ["nvcc", "-cubin", "-Xptxas", "-v", "--gpu-architecture=sm_90", "--std=c++17", *gpu.make_macros(sizes, 4)]
    done = subprocess.run(
        [*command, str(SOURCE), "-o", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(spills) == 8 and max(spills) <= SPILLS
    assert len(registers) == 4 and max(registers) * gpu.THREADS <= 65536


def test_pairs_hold_every_edge_once(tiny):
    graphs, keeps, _ = tiny
    tables = pairs.lay_out(tuple(graphs), tuple(keeps))
    for level, (table, graph) in enumerate(zip(tables, graphs, strict=True)):
        size, count = (4 if level == 0 else 16), len(table.pairs)
        at = {int(slot): v for v, slot in enumerate(table.slots)}
        entries = np.ascontiguousarray(table.pairs[:, :6]).view("<u2") // size
        assert sorted([*table.slots, *table.free]) == list(range(2 * count))
        for p, (record, near) in enumerate(zip(table.pairs, entries, strict=True)):
            used, start, more = record[6] >> 24 & 15, record[7] >> 8, record[7] & 255
            tails = table.tails[start : start + more] if record[6] >> 28 else []
            for side in (0, 1):
                v = at.get(p + side * count)
                got = [at[int(near[e])] for e in range(used) if record[6] >> (e + 12 * side) & 1]
                got += [at[int(word & 0xFFFF) // size] for word in tails if word >> (16 + side) & 1]
                other = at.get(p + (1 - side) * count)
                if v is None:
                    assert not got
                    continue
                wanted = set(graph.indices[graph.indptr[v] : graph.indptr[v + 1]].tolist())
                assert len(got) == len(set(got)) and set(got) == wanted - {other}
                assert other is None or other in wanted
                assert record.view(np.float32)[8 + side] == np.float32(1 / len(wanted))
        kept = [at.get(int(word) // size) for word in table.kept[:, 8]]
        if level + 1 < len(tables):
            following = tables[level + 1]
            assert [kept[slot] for slot in following.slots] == keeps[level].tolist()
            assert all(kept[slot] is None and not table.kept[slot, 9:].any() for slot in following.free)
        else:
            assert kept == keeps[level].tolist()


def test_reads_are_ordered_to_spare_memory_banks(head):
    levels = for_head(head).levels[:-1]
    tables = pairs.lay_out(tuple(level.graph for level in levels), tuple(level.down for level in levels))
    assert len(tables[0].pairs) < 0.505 * 5023  # hardly a vertex without a partner
    assert [round(table.conflicts, 1) <= limit for table, limit in zip(tables, (2.0, 1.6, 1.6, 1.7), strict=True)] == [
        True
    ] * 4


@pytest.mark.parametrize(("batch", "blocks"), [(1, 4), (8, 4), (33, 4), (66, 4), (128, 1), (512, 1)])
def test_small_batches_take_a_cluster_for_each_mesh(batch, blocks):
    assert gpu.choose_blocks(batch, 132) == blocks


def test_layers_that_do_not_fit_are_refused(tiny):
    graphs, keeps, parameters = tiny
    for message, changed in {
        "takes 4 of each": (graphs[:3], keeps),
        r"downs\[1\]: expected rising": (graphs, [keeps[0], keeps[1][::-1], *keeps[2:]]),
        r"graphs\[1\]: expected 99 vertices": (graphs, [keeps[0][:-1], *keeps[1:]]),
        "linear_weight": (graphs, [*keeps[:3], keeps[3][:-1]]),
    }.items():
        with pytest.raises(InputError, match=message):
            gpu.prepare(*changed, *parameters)
    with pytest.raises(InputError, match="blocks: expected 1, 4 or None, got 2"):
        gpu.prepare(graphs, keeps, *parameters, blocks=2)
    with pytest.raises(InputError, match="expected 4, one for each"):
        pairs.lay_out(tuple(graphs), tuple(keeps[:3]))
    big = random_graph(17000, 0)
    with pytest.raises(InputError, match="beyond 16-bit addresses"):
        pairs.lay_out((big,), (np.arange(5),))
    star = Graph.from_edges(np.stack([np.zeros(300, int), np.arange(1, 301)], 1), 301)
    with pytest.raises(InputError, match="at most 267 neighbours of a pair of vertices, got 299"):
        pairs.lay_out((star,), (np.arange(5),))


def test_weights_that_do_not_fit_are_refused(tiny):
    graphs, keeps, (weights, biases, linear, bias) = tiny
    odd = torch.empty(6 * 16 * 16 + 1)[1:].view(6, 16, 16)
    for message, changed in {
        "expected 4 of each": (weights[:3], biases, linear, bias),
        r"weights\[0\]: the GPU kernel takes \(6, 3, 16\)": ([weights[0][:5], *weights[1:]], biases, linear, bias),
        r"biases\[3\]: the GPU kernel takes \(32,\)": (weights, [*biases[:3], biases[2]], linear, bias),
        "linear_bias: expected contiguous float32": (weights, biases, linear, bias.double()),
        r"weights\[1\]: expected memory aligned": ([weights[0], odd, *weights[2:]], biases, linear, bias),
    }.items():
        with pytest.raises(InputError, match=message):
            gpu.prepare(graphs, keeps, *changed)


def test_inputs_that_do_not_fit_are_refused(tiny):
    graphs, keeps, parameters = tiny
    plan = gpu.prepare(graphs, keeps, *parameters, blocks=1)
    with pytest.raises(InputError, match=r"x: expected \(B, 230, 3\)"):
        gpu.encode(torch.zeros(1, 229, 3), plan)
    with pytest.raises(InputError, match=r"x: expected float32, float16 or bfloat16 on cpu, got torch\.float64"):
        gpu.encode(torch.zeros(1, 230, 3, dtype=torch.float64), plan)
    with pytest.raises(InputError, match=r"grad_z: expected \(1, 8\) float32"):
        gpu.encode_backward(torch.zeros(2, 8), torch.zeros(1, 230, 3), plan, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tiny):
    graphs, keeps, parameters = tiny
    assert not gpu.available()
    assert gpu.why_missing() == "torch sees no CUDA GPU"
    assert gpu.implementation() == "encoder: reference (torch sees no CUDA GPU); single layers: reference (no kernel)"
    with pytest.raises(MissingDependencyError, match="the GPU kernels: torch sees no CUDA GPU"):
        gpu.encode(torch.zeros(1, 230, 3), gpu.prepare(graphs, keeps, *parameters, blocks=1))


@pytest.mark.parametrize(
    ("capability", "compiler", "want"),
    [
        ((8, 0), None, "the GPU is of compute capability 8.0, 9.x (H100, H200) or 10.x is needed"),
        ((9, 0), "no compiler", "no compiler"),
        ((9, 0), None, None),
    ],
)
def test_a_gpu_must_suit(monkeypatch, capability, compiler, want):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(nvrtc, "why_missing", lambda: compiler)
    assert gpu.why_missing() == want
    assert gpu.available() == (want is None)


def test_single_layers_are_the_definition(tiny):
    graph, weight, bias = tiny[0][0], tiny[2][0][0], tiny[2][1][0]
    x, grad = torch.randn(2, graph.n, 3), torch.randn(2, graph.n, 16)
    y = reference.cheb_conv(x, graph, weight, bias, relu=True)
    assert torch.equal(gpu.forward(x, graph, weight, bias, None, True), y)
    for got, want in zip(
        gpu.backward(grad, x, graph, weight, bias, None, True, y, True),
        reference.backward(grad, x, graph, weight, bias, None, True, y, True),
        strict=True,
    ):
        assert torch.equal(got, want)
    half = gpu.forward(x.half(), graph, weight.half(), None, None, False)
    assert half.dtype == torch.float16
    assert gpu.backward(grad.half(), x.half(), graph, weight.half(), None, None, False, None, False)[::2] == (
        None,
        None,
    )


class TestNvrtc:
    """Compiling and loading, with stand-ins for the libraries."""

    @pytest.fixture(autouse=True)
    def bare(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CHEBFACE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(nvrtc, "_nvrtc", lambda: None)
        monkeypatch.setattr(nvrtc, "_driver", lambda: None)
        monkeypatch.setattr(nvrtc.shutil, "which", lambda name: None)

    def test_nothing_there_is_said(self):
        assert "neither NVRTC" in nvrtc.why_missing()
        with pytest.raises(MissingDependencyError, match="neither NVRTC"):
            nvrtc.compile_cubin(SOURCE, [])
        with pytest.raises(MissingDependencyError, match="neither NVRTC"):
            nvrtc.Module(b"")

    def test_no_driver_is_said(self, monkeypatch):
        monkeypatch.setattr(nvrtc.shutil, "which", lambda name: "nvcc")
        assert nvrtc.why_missing() == "no CUDA driver (libcuda.so.1)"

    @pytest.fixture
    def nvcc(self, monkeypatch, tmp_path):
        script = tmp_path / "nvcc"
        script.write_text(
            '#!/bin/sh\n[ "$1" = --version ] && { echo release 1; exit; }\necho call >> "$0.calls"\n'
            'case "$*" in *-DBAD*) echo no such thing >&2; exit 1;; esac\n'
            'for word; do last=$word; done; printf code > "$last"\n'
        )
        script.chmod(0o755)
        monkeypatch.setattr(nvrtc.shutil, "which", lambda name: str(script))
        return script

    def test_nvcc_compiles_once(self, nvcc):
        assert nvrtc.compile_cubin(SOURCE, ["-DA=1"]) == b"code"
        assert nvrtc.compile_cubin(SOURCE, ["-DA=1"]) == b"code"
        assert nvrtc.compile_cubin(SOURCE, ["-DA=2"]) == b"code"
        assert Path(f"{nvcc}.calls").read_text().count("call") == 2

    def test_nvcc_refusing_is_told(self, nvcc):
        with pytest.raises(MissingDependencyError, match=r"nvcc refuses encoder.cu: no such thing"):
            nvrtc.compile_cubin(SOURCE, ["-DBAD"])

    def test_nvrtc_compiles_and_refuses(self, monkeypatch):
        def fill(text: bytes):
            return lambda program, buffer: ctypes.memmove(buffer, text, len(text)) and 0

        def size(text: bytes):
            def get(program, into):
                into._obj.value = len(text)
                return 0

            return get

        library = type("Library", (), {})()
        library.nvrtcVersion = lambda major, minor: 0
        library.nvrtcCreateProgram = lambda *words: 0
        library.nvrtcCompileProgram = lambda program, count, words: int(b"-DBAD" in words[:count])
        library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog = size(b"a typo"), fill(b"a typo")
        library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN = size(b"co\0de"), fill(b"co\0de")
        library.nvrtcDestroyProgram = lambda program: 0
        monkeypatch.setattr(nvrtc, "_nvrtc", lambda: library)
        assert nvrtc.compile_cubin(SOURCE, []) == b"co\0de"
        with pytest.raises(MissingDependencyError, match=r"NVRTC refuses encoder\.cu: a typo"):
            nvrtc.compile_cubin(SOURCE, ["-DBAD"])
        library.nvrtcCreateProgram = lambda *words: 7
        with pytest.raises(MissingDependencyError, match=r"NVRTC cannot start on encoder.cu \(error 7\)"):
            nvrtc.compile_cubin(SOURCE, ["-DOTHER"])

    def test_the_driver_refusing_is_told(self, monkeypatch):
        driver = type("Driver", (), {"cuModuleLoadData": lambda self, *words: 209, "cuCtxGetCurrent": lambda *w: 0})()

        def explain(code, into):
            into._obj.value = b"no kernel image"
            return 0

        driver.cuGetErrorString = explain
        monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
        with pytest.raises(
            MissingDependencyError, match=r"CUDA cannot load the kernels: no kernel image \(error 209\)"
        ):
            nvrtc.Module(b"")


@pytest.mark.skipif(not gpu.available(), reason=f"no GPU to run on: {gpu.why_missing()}")
@pytest.mark.parametrize("blocks", [1, 4])
def test_the_gpu_agrees_with_the_definition(tiny, blocks):
    graphs, keeps, parameters = tiny
    weights, biases, linear, bias = parameters
    plan = gpu.prepare(
        graphs, keeps, [w.cuda() for w in weights], [b.cuda() for b in biases], linear.cuda(), bias.cuda()
    )
    x = torch.randn(5, graphs[0].n, 3)
    code = gpu.encode(x.cuda(), replace(plan, blocks=blocks)).cpu()
    wide = [_double(weights), _double(biases), linear.double(), bias.double()]
    assert relative(code, define(x.double(), graphs, keeps, *wide)) < FLOAT32
