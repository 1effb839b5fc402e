"""The model repository as Triton reads it: config.pbtxt written from signature.py, model files checked, then copied."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chebface import operators, signature
from chebface.detect import NAMES as DETECTORS
from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.files import write_whole
from chebface.repository import (
    FIX,
    OPERATORS,
    SUMS,
    check_repository,
    find_model,
    find_optional,
    model_code,
    use_backend,
)
from chebface.signature import LEAVES, MODELS, OPTIONAL, PRIORITIES, SERVED, Model, Tensor
from export.folder import find_changed, read_manifest, read_record
from export.graphs import check_graph

TARGETS = ("ngc", "pip")
QUEUE_SIZE = 48  # requests that wait before the server refuses: of 8 faces each, later ones would wait in vain
QUEUE_TIMEOUT_US = 2_000_000  # the longest that a request may wait; a client's own deadline only shortens it
# Of a network, a thread each. More than cores: Triton says that an instance is free just before it is, and where none
# other is idle, a batch that could begin is then begun half a second later, or when the next request comes.
INSTANCES = 4
PHOTO_INSTANCES = 2  # one reads and detects while another's faces are in the network
# What a running leaf holds under --rate-limit=execution_count; no program does, or it would wait for itself.
CORE = "core"

Say = Callable[[str], None]
Engines = dict[str, dict[str, Path]]  # model -> compute capability, as "8.9" -> its engine


def _type(tensor: Tensor) -> str:
    return "TYPE_STRING" if tensor.dtype == "BYTES" else f"TYPE_{tensor.dtype}"


def _tensors(field: str, tensors: tuple[Tensor, ...], optional: tuple[Tensor, ...] = ()) -> str:
    rows = [
        f'  {{ name: "{t.name}" data_type: {_type(t)} dims: [ {", ".join(map(str, t.shape))} ]'
        f"{' optional: true' if t in optional else ''} }}"
        for t in (*tensors, *optional)
    ]
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


def config_text(
    model: Model,
    *,
    version: int = 1,
    instances: int | None = None,
    precision: str = "fp32",
    capabilities: tuple[str, ...] = (),
    detector: str = "auto",
    detector_opened: str = "at start",
) -> str:
    """The config.pbtxt of one model, for Triton's native backends (chebface.repository adapts it to the pip server).

    Facts about one exported file (head, weights) are not here but in the file's own metadata and in what the
    topology model answers, so that this text changes only with signature.py and what is asked for here.

    Args:
        model: of signature.py.
        version: the one that is served.
        instances: side by side; None is PHOTO_INSTANCES of a program, INSTANCES of what takes batches, else 1.
        precision: of the leaf's file.
        capabilities: of the GPUs that there are engines for, as "8.9"; none serves the ONNX file on the CPU.
        detector: which one a program uses, by its name for `open_detector`.
        detector_opened: "at start", or "at the first photo" where a quick start matters more.
    """
    text = f'# Written by `python -m export repository` from src/chebface/signature.py.\nname: "{model.name}"\n'
    if model.program:
        text += 'backend: "python"\ndefault_model_filename: "model.py"\n'
    elif capabilities:
        text += 'backend: "tensorrt"\n'
        text += "".join(
            f'cc_model_filenames {{ key: "{capability}" value: "{_plan_name(capability)}" }}\n'
            for capability in capabilities
        )
    else:
        text += 'backend: "onnxruntime"\ndefault_model_filename: "model.onnx"\n'
    text += f"max_batch_size: {signature.MAX_BATCH if model.batched else 0}\n"
    text += _tensors("input", model.inputs, model.optional) + _tensors("output", model.every_output)
    text += "response_cache { enable: false }\n"  # photos of faces are kept by nobody
    text += f"version_policy {{ specific {{ versions: [ {version} ] }} }}\n"
    facts = {"chebface.signature": signature.digest()}
    kind = "KIND_GPU" if capabilities else "KIND_CPU"
    holds = "" if capabilities or model.program else f' rate_limiter {{ resources [ {{ name: "{CORE}" count: 1 }} ] }}'
    count = instances or (PHOTO_INSTANCES if model.program else INSTANCES if model.batched else 1)
    text += f"instance_group [ {{ count: {count} kind: {kind}{holds} }} ]\n"
    if model.batched or model.program:
        text += (
            f"dynamic_batching {{\n  priority_levels: {len(PRIORITIES)}\n"
            f"  default_priority_level: {PRIORITIES['normal']}\n  default_queue_policy {{\n    timeout_action: REJECT\n"
            f"    default_timeout_microseconds: {QUEUE_TIMEOUT_US}\n    allow_timeout_override: true\n"
            f"    max_queue_size: {QUEUE_SIZE}\n  }}\n}}\n"
        )
    if model.program:
        how = {"chebface.detector": detector, "chebface.detector_opened": detector_opened}
        return text + _parameters(facts | how)
    threads = {} if capabilities else {"intra_op_thread_count": "1", "inter_op_thread_count": "1"}
    return text + _warmup(model) + _parameters(threads | facts | {"chebface.precision": precision})


def _plan_name(capability: str) -> str:
    return f"model.sm{capability.replace('.', '')}.plan"


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

    def spell(tensors: tuple[Tensor, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {t.name: (_type(t), t.shape) for t in tensors}

    found = {
        "name": config.name,
        "max_batch_size": config.max_batch_size,
        "input": read(config.input),
        "optional": sorted(t.name for t in config.input if t.optional),
        "output": read(config.output),
    }
    wanted = {
        "name": model.name,
        "max_batch_size": signature.MAX_BATCH if model.batched else 0,
        "input": spell((*model.inputs, *model.optional)),
        "optional": sorted(t.name for t in model.optional),
        "output": spell(model.every_output),
    }
    for key, value in wanted.items():
        if found[key] != value:
            raise AssetError(
                f"{where}: {key}: signature.py says {value}, the file {found[key]}; "
                "write it again with `python -m export repository`"
            )


def fill_repository(
    source: str | Path,
    repository: str | Path,
    *,
    target: str = "ngc",
    version: int = 1,
    instances: int = INSTANCES,
    photo_instances: int = PHOTO_INSTANCES,
    detector: str = "auto",
    engines: str | Path | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Bring a model repository up to date with exported files; nothing is touched before everything is checked.

    Args:
        source: the folder that `export_onnx` wrote.
        repository: the model repository.
        target: "ngc" for the native backends of NVIDIA's container (`chebface serve` reads it as well), "pip" for a
            tritonserver that has the Python backend alone.
        version: the one to write and to serve; the files of other versions stay.
        instances: how many of each network run side by side, a thread each on a CPU.
        photo_instances: how many of reconstruct_photo do: photos that are read and searched at once.
        detector: what it searches with, by its name for `open_detector`.
        engines: folder of TensorRT engines built from these very files; their models are then served by them.
        say: called with one line per step.

    Returns:
        {"repository", "target", "version", "changed": [paths relative to it], "models": {name: sha256 of its file}}.

    Raises:
        ConfigError: a target, version, number of instances or detector that cannot be.
        AssetError: no export there, it was changed since, or it is not what signature.py says; so for engines.
        MissingDependencyError: onnx or tritonclient is not installed.
    """
    source, folder = Path(source), Path(repository)
    _check_wishes(target, version, instances, photo_instances, detector, engines)
    manifest = _read_export(source)
    leaves = {name: model for name, model in MODELS.items() if name in manifest["files"]}
    served = {name: model for name, model in SERVED.items() if model.program or name in leaves}
    plans = _find_engines(Path(engines), manifest) if engines is not None else {}
    files: dict[str, bytes | Path] = {}
    stale = [folder / name / str(version) / OPERATORS for name in leaves]
    for name, model in served.items():
        entry = manifest["files"].get(name, {})
        text = config_text(
            model,
            version=version,
            instances=photo_instances if model.program else instances if model.batched else None,
            precision=entry.get("precision", "fp32"),
            capabilities=tuple(plans.get(name, ())),
            detector=detector,
        )
        check_config(text, model, f"{name}/config.pbtxt")
        if name in leaves:
            text, parts = _leaf_files(text, name, target, source / entry["file"], entry["operators"])
            parts |= {each["file"]: source / each["file"] for each in entry.get("external", ())}
            parts |= {_plan_name(capability): plan for capability, plan in plans.get(name, {}).items()}
            parts[SUMS] = _sums(parts)
            files |= {f"{name}/{version}/{file}": content for file, content in parts.items()}
        if model.program:
            files[f"{name}/{version}/model.py"] = model_code(model).encode()
        files[f"{name}/config.pbtxt"] = text.encode()
    changed = []
    for place, content in files.items():  # a configuration comes after what it speaks of
        (folder / Path(place).parts[0] / str(version)).mkdir(parents=True, exist_ok=True)
        new = content if isinstance(content, bytes) else content.read_bytes()
        if not (folder / place).is_file() or (folder / place).read_bytes() != new:
            write_whole(folder / place, new)
            changed.append(place)
    for path in stale:
        if str(path.relative_to(folder)) not in files and path.is_file():
            path.unlink()
            changed.append(str(path.relative_to(folder)))
    for name in OPTIONAL.keys() - served.keys():
        if (folder / name).is_dir():  # Triton refuses a repository with an empty model
            shutil.rmtree(folder / name)
            say(f"note: {folder / name} removed: this export has no {name}")
            changed.append(name)
    say(f"{folder}: {', '.join(changed) if changed else 'up to date'}")
    models = {name: manifest["files"][name]["sha256"] for name in leaves}
    return {
        "repository": str(folder),
        "target": target,
        "version": version,
        "changed": changed,
        "models": models,
    }


def _sums(files: dict[str, bytes | Path]) -> bytes:
    contents = {name: each if isinstance(each, bytes) else each.read_bytes() for name, each in files.items()}
    contents.pop("model.py", None)  # code is compared with this version's
    rows = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(contents.items())]
    return "".join(rows).encode()


def _check_wishes(
    target: str, version: int, instances: int, photo_instances: int, detector: str, engines: str | Path | None
) -> None:
    if target not in TARGETS:
        raise ConfigError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    if min(version, instances, photo_instances) < 1:
        raise ConfigError(
            f"version, instances, photo_instances: expected 1 or more, got {version}, {instances} and {photo_instances}"
        )
    if detector not in DETECTORS:
        raise ConfigError(f"detector: expected one of {', '.join(DETECTORS)}, got {detector!r}")
    if engines is not None and target == "pip":
        raise ConfigError("engines: the pip server has no TensorRT backend; fill a repository with --target ngc")


def _leaf_files(config: str, name: str, target: str, onnx_file: Path, kind: str) -> tuple[str, dict[str, bytes | Path]]:
    """A leaf's configuration for its target, and by name what lies in its version's folder."""
    files: dict[str, bytes | Path] = {"model.onnx": onnx_file}
    if kind == "native":
        if target != "pip":
            raise ConfigError(
                f"target: {name}.onnx wants native operators, whose library is compiled for this machine; fill a "
                "repository with --target pip, or export with --operators standard"
            )
        files[OPERATORS] = operators.library()
    if target == "pip":
        config = use_backend(config, "python", f"{name}/config.pbtxt")
        files["model.py"] = model_code(MODELS[name]).encode()
    return config, files


def verify_repository(repository: str | Path, say: Say = lambda line: None) -> dict[str, Any]:
    """Check a repository as it lies there, before a server is asked to load it; nothing is changed.

    Every config.pbtxt is parsed as Triton parses it, every model file opened and compared with signature.py.

    Returns:
        {"repository", "changed": [], "models": {name: sha256 of its file}}.

    Raises:
        AssetError: a part is missing, damaged, truncated, or not what signature.py says.
        MissingDependencyError: onnxruntime or tritonclient is not installed.
    """
    folder = check_repository(repository)
    leaves = LEAVES | find_optional(folder)
    models = {}
    for name, model in SERVED.items():
        config = folder / name / "config.pbtxt"
        if name in OPTIONAL and name not in leaves:
            if config.is_file():
                raise AssetError(f"{config}: has no model file, and Triton refuses that; remove {config.parent}")
            continue
        text = config.read_text()
        check_config(text, model, str(config))
        if model.program:
            _check_code(find_model(folder, name).with_name("model.py"), model)
        if name in leaves:
            path = find_model(folder, name)
            if 'backend: "python"' in text:
                _check_code(path.with_name("model.py"), model)
            for plan in _plan_names(text):
                if not path.with_name(plan).is_file() or not path.with_name(plan).stat().st_size:
                    raise AssetError(f"{path.with_name(plan)} is missing or empty; {FIX}")
            if not path.with_name(SUMS).is_file():
                raise AssetError(f"{path.with_name(SUMS)} is missing; {FIX}")
            models[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    say(f"{folder}: as it should be")
    return {"repository": str(folder), "changed": [], "models": models}


def _check_code(path: Path, model: Model) -> None:
    if not path.is_file() or path.read_text() != model_code(model):
        raise AssetError(f"{path} is missing, or of another version of chebface; {FIX}")


def _plan_names(config: str) -> list[str]:
    return [line.split('"')[3] for line in config.splitlines() if line.startswith("cc_model_filenames")]


def _read_export(source: Path) -> dict[str, Any]:
    """The manifest of an export whose files are what signature.py says, all of one head."""
    manifest = read_manifest(source)
    if manifest is None:
        record = read_record(source)
        if record and (changed := find_changed(source, record)):
            raise AssetError(
                f"{source}: {', '.join(changed.values())}; export anew with `python -m export onnx --force`"
            )
        raise AssetError(
            f"{source}: no whole export there (manifest.json, "
            f"{', '.join(f'{name}.onnx' for name in LEAVES)}); run `python -m export onnx`"
        )
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError("onnx is not installed: pip install 'chebface[export]'") from error
    heads = set()
    for name, entry in manifest["files"].items():
        path = source / entry["file"]
        check_graph(path, MODELS[name], str(path))
        proto = onnx.load(path, load_external_data=False)
        heads.add({item.key: item.value for item in proto.metadata_props}.get("chebface.head_sha256"))
    if len(heads) != 1 or None in heads:
        raise AssetError(f"{source}: its files were exported for different heads; run `python -m export onnx --force`")
    return manifest


def _find_engines(folder: Path, manifest: dict[str, Any]) -> Engines:
    """TensorRT's engines of this export by model and compute capability, the reports beside them believed.

    TensorRT-RTX's are passed over: Triton's TensorRT backend reads none.
    """
    found: Engines = {}
    for path in sorted(folder.glob("*.plan")):
        try:
            report = json.loads(path.with_suffix(".json").read_text())
            name, flavour, target = (report[key] for key in ("model", "flavour", "architecture"))
            digest, source = report["engine"]["sha256"], report["onnx"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AssetError(f"{path}: no report of an engine beside it ({error!r}); build it again") from error
        if flavour != "tensorrt":
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise AssetError(f"{path}: not the file that its report describes; build it again")
        if manifest["files"].get(name, {}).get("sha256") != source:
            raise AssetError(f"{path}: built from another {name}.onnx than the export's; build it again")
        if not target.removeprefix("sm").isdigit():
            raise AssetError(f"{path}: built for {target}; Triton chooses by one GPU's capability: build it for one")
        digits = target.removeprefix("sm")
        found.setdefault(name, {})[f"{digits[:-1]}.{digits[-1]}"] = path
    if not found:
        raise AssetError(f"{folder}: no TensorRT engine of this export there; run `python -m export engine`")
    return found
