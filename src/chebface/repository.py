"""The Triton model repository: checked before a server loads it, and copied for the pip server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chebface import signature
from chebface.errors import AssetError, MissingDependencyError
from chebface.signature import LEAVES, MODELS

ONNX_TYPES = {"FP32": "tensor(float)", "UINT8": "tensor(uint8)", "INT32": "tensor(int32)", "BYTES": "tensor(string)"}


def check_repository(repository: str | Path) -> Path:
    """Make sure that a model repository is complete before a server is asked to load it.

    Every model of signature.py must have its config.pbtxt, every leaf a model file whose tensors are those of
    signature.py.

    Returns:
        The repository's resolved path.

    Raises:
        AssetError: a part is missing or a model file is not what signature.py says.
        MissingDependencyError: onnxruntime is not installed.
    """
    folder = Path(repository).resolve()
    fix = "`python -m export all` fills a model repository"
    if not folder.is_dir():
        raise AssetError(f"model repository {folder}: not found; {fix}")
    for name in MODELS:
        config = folder / name / "config.pbtxt"
        if not config.is_file():
            raise AssetError(f"model repository {folder}: {name}/config.pbtxt is missing; {fix}")
        if f'"{signature.digest()}"' not in config.read_text():
            raise AssetError(f"{config}: was written for another version of signature.py; {fix}")
    for name, model in LEAVES.items():
        path = folder / name / "1" / "model.onnx"
        if not path.is_file():
            raise AssetError(f"model repository {folder}: {name}/1/model.onnx is missing; {fix}")
        session = _open_model(path)
        lead = 1 if model.batched else 0
        for kind, want, got in (
            ("input", model.inputs, session.get_inputs()),
            ("output", model.outputs, session.get_outputs()),
        ):
            found = {t.name: (t.type, tuple(t.shape[lead:]), not lead or isinstance(t.shape[0], str)) for t in got}
            wanted = {t.name: (ONNX_TYPES[t.dtype], t.shape, True) for t in want}
            if found != wanted:
                raise AssetError(
                    f"{path}: its {kind}s are not those of signature.py: expected {_spell(wanted)}, "
                    f"got {_spell(found)}; export it again with `python -m export all`"
                )
    return folder


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
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (failures.Fail, failures.InvalidProtobuf, failures.InvalidGraph, failures.NotImplemented) as error:
        raise AssetError(f"{path}: onnxruntime cannot read it ({error}); run `python -m export all`") from error


def materialise(repository: Path, folder: Path) -> Path:
    """Copy a repository for the pip server, whose only backend is the Python one: same files, leaf.py as model.py.

    Raises:
        AssetError: a config.pbtxt was edited beyond recognition.
    """
    code = Path(__file__).with_name("leaf.py").read_text()
    for name, model in MODELS.items():
        version = folder / name / "1"
        version.mkdir(parents=True)
        config = (repository / name / "config.pbtxt").read_text()
        if not model.steps:
            for old, new in (('backend: "onnxruntime"', 'backend: "python"'), ('"model.onnx"', '"model.py"')):
                if config.count(old) != 1:
                    raise AssetError(
                        f"{repository / name / 'config.pbtxt'}: expected one {old}; "
                        "write it again with `python -m export repository`"
                    )
                config = config.replace(old, new)
            (version / "model.py").write_text(code)
            (version / "model.onnx").symlink_to(repository / name / "1" / "model.onnx")
        (folder / name / "config.pbtxt").write_text(config)
    return folder
