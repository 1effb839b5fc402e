"""The rules of the house, kept by walking the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "chebface"
MODULES = sorted(SOURCE.rglob("*.py"))
PROGRAMS = sorted([*(ROOT / "export").glob("*.py"), *(ROOT / "bench").glob("*.py")])

# A module imports only from lines below its own (and from its own folder).
LAYERS = [
    {"cli"},
    {"cli_now", "cli_serve"},
    {"descriptor_report"},
    {"train_encoder", "train"},
    {"canary", "supervise", "proxy"},
    {"objective", "held_out", "snapshot", "reconstruct", "server", "client", "leaf", "photo_leaf"},
    {"repository", "wheel", "backend", "now", "served"},
    {"pipeline", "data", "foreign"},
    {"checkpoint", "losses", "optimizer"},
    {"face", "flame", "regressor", "encoder", "foreign_onnx"},
    {"hierarchy"},
    {"heads", "arcface", "render.cpu", "kernels"},
    {"render.heat", "render.chart"},
    {"render.view"},
    {"render", "render.raster", "render.light"},
    {"detect"},
    {"operators"},
    {"camera", "mesh", "photo", "crop", "native"},
    {"signature", "config", "cache", "files", "command"},
    {"params"},
    {"errors", ""},
]
# The only places that may import a heavy package.
DOORS = {
    "tritonclient": ("client/", "export/"),
    "onnx": ("export/", "bench/", "foreign_onnx.py"),
    "tensorrt": ("export/",),
    "tensorrt_rtx": ("export/",),
    "tensorrt_rtx_bindings": ("export/",),
    "click": ("cli.py", "cli_now.py", "cli_serve.py", "command.py", "export/", "bench/"),
    "anny": ("heads/",),
    "onnxruntime": ("canary.py", "detect.py", "foreign_onnx.py", "repository.py", "leaf.py", "export/", "bench/"),
    "safetensors": ("checkpoint.py", "foreign.py"),
    "nvdiffrast": ("render/",),
    "pytorch3d": ("render/",),
    "torch_geometric": ("kernels/",),
    "insightface": ("detect.py",),
    "rich": ("cli.py", "command.py", "export/"),
    "igl": ("now/",),
}
TORCH_FREE = (
    *("params", "signature", "config", "errors", "cache", "files", "command", "mesh", "detect", "crop", "photo"),
    *(
        "camera",
        "face",
        "native",
        "operators",
        "pipeline",
        "client",
        "server",
        "repository",
        "wheel",
        "backend",
        "leaf",
        "cli",
    ),
    *("served", "photo_leaf"),
    *("cli_now", "cli_serve", "canary", "supervise", "proxy", "render.raster", "render.light", "render.view"),
    *("now", "now.predict"),
)
CEILING = 600  # lines of a module
FORBIDDEN_NAMES = {"utils", "helpers", "common", "base", "manager"}


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Every module that a file imports, as dotted names; type-checking imports do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(name: str) -> int | None:
    for candidate in (name, name.split(".", maxsplit=1)[0]):
        for depth, layer in enumerate(LAYERS):
            if candidate in layer:
                return depth
    return None


def test_every_module_has_a_layer():
    homeless = [name_of(path) for path in MODULES if layer_of(name_of(path)) is None]
    assert MODULES and not homeless


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    own = layer_of(name_of(path))
    known = {name_of(p) for p in MODULES}
    for target in imports(path):
        if not target.startswith("chebface"):
            continue
        name = target.removeprefix("chebface").lstrip(".")
        if name not in known or name.split(".")[0] == name_of(path).split(".")[0]:
            continue
        assert layer_of(name) > own, f"{name_of(path)} may not import {name}"


@pytest.mark.parametrize("path", [*MODULES, *PROGRAMS], ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_come_through_their_door(path):
    where = str(path.relative_to(SOURCE if path in MODULES else ROOT))
    for target in imports(path):
        doors = DOORS.get(target.split(".")[0])
        assert doors is None or where.startswith(doors), f"{where} may not import {target}"


def test_programs_import_no_other_program():
    for path in [*MODULES, *PROGRAMS]:
        own = path.relative_to(ROOT).parts[0]
        others = {"export", "bench"} - {own}
        assert not {target.split(".")[0] for target in imports(path)} & others


@pytest.mark.parametrize("name", TORCH_FREE)
def test_light_modules_load_without_torch(name):
    module = f"chebface.{name}"
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'tritonclient', 'onnxruntime')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_prints_and_logs_nothing():
    code = "import logging, chebface, chebface.cli, chebface.client; assert not logging.getLogger().handlers"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", [*MODULES, *PROGRAMS], ids=lambda p: str(p.relative_to(ROOT)))
def test_each_file_is_plain(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= CEILING
    assert path.stem not in FORBIDDEN_NAMES
    assert ast.get_docstring(tree), "every module says what is in it"
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "errors, not asserts"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"load", "loads"} and isinstance(node.value, ast.Name):
            loads_foreign = node.value.id == "pickle" or (node.value.id == "torch" and "weights_only=True" not in text)
            assert not loads_foreign, "foreign files go through a restricted loader"
        if isinstance(node, ast.alias):
            assert node.asname != "F", "F is faces"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}.{node.name} has no docstring"


def test_repository_names_no_machine_and_no_registry():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = ["/" + "work/", "/" + "root/", "pypi" + ".org", "python" + "hosted", "deb." + "debian"]
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.suffix in {".png", ".safetensors", ".jpg"} or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        assert not [word for word in words if word in text], name
