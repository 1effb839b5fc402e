"""The Triton model repository: checked before a server loads it, and copied for the pip server."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from chebface import signature
from chebface.errors import AssetError, MissingDependencyError
from chebface.signature import LEAVES, OPTIONAL, SERVED, Model

ONNX_TYPES = {
    "FP32": "tensor(float)",
    "FP16": "tensor(float16)",
    "UINT8": "tensor(uint8)",
    "INT32": "tensor(int32)",
    "BYTES": "tensor(string)",
}

SUMS = "SHA256SUMS"  # of what lies beside it, as sha256sum writes and checks it
OPERATORS = "operators.so"  # beside a model.onnx that wants chebface.operators
FIX = "`python -m export all` fills a model repository"
_SERVED = re.compile(r"^version_policy \{ specific \{ versions: \[ ([1-9][0-9]*) \] \} \}$", re.MULTILINE)
_BACKEND = re.compile(r'^backend: "(\w+)"$', re.MULTILINE)


def check_repository(repository: str | Path) -> Path:
    """Make sure that a model repository is complete before a server is asked to load it.

    Every model of signature.py must have its config.pbtxt, every leaf a model file whose tensors are those of
    signature.py, and which has not changed since it was put there; of the optional ones, those that have a model file.

    Returns:
        The repository's resolved path.

    Raises:
        AssetError: a part is missing or a model file is not what signature.py says.
        MissingDependencyError: onnxruntime is not installed.
    """
    folder = Path(repository).resolve()
    if not folder.is_dir():
        raise AssetError(f"model repository {folder}: not found; {FIX}")
    leaves = LEAVES | find_optional(folder)
    for name in SERVED:
        config = folder / name / "config.pbtxt"
        if name in OPTIONAL and name not in leaves:
            continue
        if not config.is_file():
            raise AssetError(f"model repository {folder}: {name}/config.pbtxt is missing; {FIX}")
        if f'"{signature.digest()}"' not in config.read_text():
            raise AssetError(f"{config}: was written for another version of signature.py; {FIX}")
    for name, model in leaves.items():
        path = find_model(folder, name)
        if not path.is_file():
            raise AssetError(f"model repository {folder}: {path.relative_to(folder)} is missing; {FIX}")
        session = _open_model(path)
        lead = 1 if model.batched else 0
        for kind, want, got in (
            ("input", model.inputs, session.get_inputs()),
            ("output", model.every_output, session.get_outputs()),
        ):
            found = {t.name: (t.type, tuple(t.shape[lead:]), not lead or isinstance(t.shape[0], str)) for t in got}
            wanted = {t.name: (ONNX_TYPES[t.dtype], t.shape, True) for t in want}
            if found != wanted:
                raise AssetError(
                    f"{path}: its {kind}s are not those of signature.py: expected {_spell(wanted)}, "
                    f"got {_spell(found)}; export it again with `python -m export all`"
                )
        check_sums(path.parent)
    return folder


def check_sums(folder: Path) -> None:
    """Compare the files of a version's folder with its SUMS, where it has them.

    Raises:
        AssetError: one is missing or another than it was.
    """
    sums = folder / SUMS
    for line in sums.read_text(errors="replace").splitlines() if sums.is_file() else ():
        wanted, _, name = line.partition("  ")
        if Path(name).name != name or not (folder / name).is_file():
            raise AssetError(f"{folder / name}: {SUMS} names it, and it is not there; {FIX}")
        with open(folder / name, "rb") as file:
            found = hashlib.sha256()
            while block := file.read(1 << 20):
                found.update(block)
        if found.hexdigest() != wanted:
            raise AssetError(f"{folder / name}: is not the file that was exported (its SHA-256 is another); {FIX}")


def find_model(repository: Path, name: str) -> Path:
    """Where the ONNX file of a model lies: in the version that its config.pbtxt serves. It need not exist.

    Raises:
        AssetError: the configuration is missing, or does not name one version.
    """
    config = repository / name / "config.pbtxt"
    if not config.is_file():
        raise AssetError(f"model repository {repository}: {name}/config.pbtxt is missing; {FIX}")
    return config.parent / _served_version(config) / "model.onnx"


def find_optional(repository: Path) -> dict[str, Model]:
    """The optional models that a repository has: those with a model file."""
    configured = {name: model for name, model in OPTIONAL.items() if (repository / name / "config.pbtxt").is_file()}
    return {name: model for name, model in configured.items() if find_model(repository, name).is_file()}


def _served_version(config: Path) -> str:
    found = _SERVED.findall(config.read_text())
    if len(found) != 1:
        raise AssetError(f"{config}: expected one version_policy of one specific version, got {len(found)}; {FIX}")
    return str(found[0])


def _spell(tensors: dict[str, tuple[str, tuple[int, ...], bool]]) -> str:
    return ", ".join(
        f"{name} {kind}{'' if free else ' fixed batch'} {list(shape)}" for name, (kind, shape, free) in tensors.items()
    )


def _open_model(path: Path) -> Any:
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as failures
    except ImportError as error:
        raise MissingDependencyError("onnxruntime is not installed: pip install 'chebface[server]'") from error
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    if (library := path.with_name(OPERATORS)).is_file():
        options.register_custom_ops_library(str(library))
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _refusals(failures) as error:
        raise AssetError(f"{path}: onnxruntime cannot read it ({error}); run `python -m export all`") from error


def _refusals(failures: Any) -> tuple[type[Exception], ...]:
    """What onnxruntime raises for a damaged, truncated or empty file; the classes share no root."""
    names = ("Fail", "InvalidProtobuf", "InvalidGraph", "InvalidArgument", "NotImplemented", "RuntimeException")
    return tuple(getattr(failures, name) for name in names)


def use_backend(config: str, name: str, where: str) -> str:
    """A leaf's config.pbtxt for the backend "onnxruntime", or for the Python one that runs leaf.py.

    Raises:
        AssetError: it is for neither.
    """
    names = {"onnxruntime": "model.onnx", "python": "model.py"}
    found = next(iter(_BACKEND.findall(config)), "")
    model = f'default_model_filename: "{names.get(found)}"'
    if config.count(model) != 1:
        raise AssetError(
            f"{where}: expected one backend, {' or '.join(names)}, and its model file; write it again with "
            "`python -m export repository`"
        )
    config = config.replace(f'backend: "{found}"', f'backend: "{name}"')
    return config.replace(model, f'default_model_filename: "{names[name]}"')


def model_code(model: Model) -> str:
    """The model.py of a leaf under the Python backend, or of a program under any."""
    return Path(__file__).with_name(f"{model.program or 'leaf'}.py").read_text()


def materialise(repository: Path, folder: Path, backend: str = "python") -> Path:
    """Make what the pip server reads of a repository: configurations, each model.py, links to the model files.

    Args:
        repository: checked.
        folder: does not exist.
        backend: what runs the leaves there, as for `use_backend`.

    Raises:
        AssetError: a config.pbtxt was edited beyond recognition.
    """
    absent = OPTIONAL.keys() - find_optional(repository)
    for name, model in SERVED.items():
        if name in absent:
            continue
        source = repository / name / "config.pbtxt"
        config, version = source.read_text(), folder / name / _served_version(source)
        version.mkdir(parents=True)
        if model.program:
            (version / "model.py").write_text(model_code(model))
        else:
            config = use_backend(config, backend, str(source))
            if backend == "python":
                (version / "model.py").write_text(model_code(model))
            for file in find_model(repository, name).parent.iterdir():  # the model, data or operators it names, engines
                if file.is_file() and file.name != "model.py":
                    (version / file.name).symlink_to(file)
        (folder / name / "config.pbtxt").write_text(config)
    return folder
