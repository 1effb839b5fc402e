"""The model repository as Triton reads it: config.pbtxt written from signature.py, model files checked, then copied."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from chebface import signature
from chebface.errors import AssetError, MissingDependencyError
from chebface.files import write_whole
from chebface.signature import LEAVES, MODELS, Model, Tensor
from export.to_onnx import Say, check_graph, read_manifest

VERSION = "1"
QUEUE_SIZE = 256  # requests that wait before the server refuses
QUEUE_TIMEOUT_US = 60_000_000  # the longest that a request may wait; a client's own deadline only shortens it


def _type(tensor: Tensor) -> str:
    return "TYPE_STRING" if tensor.dtype == "BYTES" else f"TYPE_{tensor.dtype}"


def _tensors(field: str, tensors: tuple[Tensor, ...]) -> str:
    rows = [f'  {{ name: "{t.name}" data_type: {_type(t)} dims: [ {", ".join(map(str, t.shape))} ] }}' for t in tensors]
    return f"{field} [\n" + ",\n".join(rows) + "\n]\n"


def _warmup(model: Model) -> str:
    text = ""
    for batch in (1, signature.MAX_BATCH) if model.batched else (0,):
        inputs = "".join(
            f'  inputs {{ key: "{t.name}" value {{ data_type: {_type(t)} dims: [ {", ".join(map(str, t.shape))} ]'
            " zero_data: true } }\n"
            for t in model.inputs
        )
        name = f"zeros, batch {batch}" if batch else "zeros"
        text += f'model_warmup {{\n  name: "{name}"\n  batch_size: {batch}\n{inputs}}}\n'
    return text


def _parameters(values: dict[str, str]) -> str:
    return "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n' for key, value in values.items()
    )


def config_text(model: Model) -> str:
    """The config.pbtxt of one model, for Triton's native onnxruntime backend (server.py adapts it to the pip server).

    Facts about one exported file (head, weights) are not here but in the file's own metadata and in what the
    topology model answers, so that this text changes only with signature.py.
    """
    text = f'# Written by `python -m export repository` from src/chebface/signature.py.\nname: "{model.name}"\n'
    text += (
        'platform: "ensemble"\n' if model.steps else 'backend: "onnxruntime"\ndefault_model_filename: "model.onnx"\n'
    )
    text += f"max_batch_size: {signature.MAX_BATCH if model.batched else 0}\n"
    text += _tensors("input", model.inputs) + _tensors("output", model.outputs)
    text += f"version_policy {{ specific {{ versions: [ {VERSION} ] }} }}\n"
    facts = {"chebface.signature": signature.digest()}
    if model.steps:
        text += "ensemble_scheduling {\n"
        for step in model.steps:
            text += f'  step {{\n    model_name: "{step}"\n    model_version: {VERSION}\n'
            for field, tensors in (("input_map", MODELS[step].inputs), ("output_map", MODELS[step].outputs)):
                text += "".join(f'    {field} {{ key: "{t.name}" value: "{t.name}" }}\n' for t in tensors)
            text += "  }\n"
        return text + "}\n" + _parameters(facts)
    text += "instance_group [ { count: 1 kind: KIND_CPU } ]\n"
    if model.batched:
        text += (
            "dynamic_batching {\n  default_queue_policy {\n    timeout_action: REJECT\n"
            f"    default_timeout_microseconds: {QUEUE_TIMEOUT_US}\n    allow_timeout_override: true\n"
            f"    max_queue_size: {QUEUE_SIZE}\n  }}\n}}\n"
        )
    threads = {"intra_op_thread_count": "1", "inter_op_thread_count": "1"}
    return text + _warmup(model) + _parameters(threads | facts | {"chebface.precision": "fp32"})


def check_config(text: str, model: Model, where: str) -> None:
    """Parse a config.pbtxt as Triton does and compare it with signature.py.

    Raises:
        AssetError: it does not parse, or names, types, shapes or batching differ.
        MissingDependencyError: tritonclient, which carries the format, is not installed.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise MissingDependencyError("tritonclient is not installed: pip install 'chebface[client]'") from error
    try:
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise AssetError(f"{where}: {error}; write it again with `python -m export repository`") from error

    def read(tensors: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {t.name: (model_config_pb2.DataType.Name(t.data_type), tuple(t.dims)) for t in tensors}

    found = {
        "name": config.name,
        "max_batch_size": config.max_batch_size,
        "input": read(config.input),
        "output": read(config.output),
        "steps": tuple(step.model_name for step in config.ensemble_scheduling.step),
    }
    wanted = {
        "name": model.name,
        "max_batch_size": signature.MAX_BATCH if model.batched else 0,
        "input": {t.name: (_type(t), t.shape) for t in model.inputs},
        "output": {t.name: (_type(t), t.shape) for t in model.outputs},
        "steps": model.steps,
    }
    for key, value in wanted.items():
        if found[key] != value:
            raise AssetError(
                f"{where}: {key}: signature.py says {value}, the file {found[key]}; "
                "write it again with `python -m export repository`"
            )


def fill_repository(source: str | Path, repository: str | Path, say: Say = lambda line: None) -> dict[str, Any]:
    """Bring a model repository up to date with exported files; nothing is touched before everything is checked.

    Args:
        source: the folder that `export_onnx` wrote.
        repository: the model repository.
        say: called with one line per step.

    Returns:
        {"repository", "changed": [paths relative to it], "models": {name: sha256 of its file}}.

    Raises:
        AssetError: no export there, it was changed since, or it is not what signature.py says.
        MissingDependencyError: onnx or tritonclient is not installed.
    """
    source, folder = Path(source), Path(repository)
    manifest = read_manifest(source)
    if manifest is None:
        raise AssetError(
            f"{source}: no whole export there (manifest.json, "
            f"{', '.join(f'{name}.onnx' for name in LEAVES)}); run `python -m export onnx`"
        )
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError("onnx is not installed: pip install 'chebface[export]'") from error
    heads = set()
    for name, model in LEAVES.items():
        path = source / manifest["files"][name]["file"]
        proto = onnx.load(str(path))
        check_graph(proto, model, str(path))
        heads.add({entry.key: entry.value for entry in proto.metadata_props}.get("chebface.head_sha256"))
    if len(heads) != 1 or None in heads:
        raise AssetError(f"{source}: its files were exported for different heads; run `python -m export onnx --force`")
    texts = {name: config_text(model) for name, model in MODELS.items()}
    for name, text in texts.items():
        check_config(text, MODELS[name], f"{name}/config.pbtxt")
    changed = []
    for name, text in texts.items():
        config, version = folder / name / "config.pbtxt", folder / name / VERSION
        version.mkdir(parents=True, exist_ok=True)
        if not config.is_file() or config.read_text() != text:
            write_whole(config, text.encode())
            changed.append(f"{name}/config.pbtxt")
        if name in LEAVES:
            target, wanted = version / "model.onnx", manifest["files"][name]["sha256"]
            if not target.is_file() or hashlib.sha256(target.read_bytes()).hexdigest() != wanted:
                write_whole(target, (source / manifest["files"][name]["file"]).read_bytes())
                changed.append(f"{name}/{VERSION}/model.onnx")
    say(f"{folder}: {', '.join(changed) if changed else 'up to date'}")
    models = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    return {"repository": str(folder), "changed": changed, "models": models}
