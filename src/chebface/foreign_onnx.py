"""A backbone's weights out of an ONNX file, such as insightface's `w600k_r50.onnx`, `glintr100.onnx`, `w600k_mbf.onnx`.

Those were exported by `arcface_torch` from the networks of `arcface.py`, in eval mode: batch norms are folded into the
convolutions before them, and what was folded has lost its name. So names are not looked at. The graph and our network
are walked side by side from crop to embedding, each layer takes the constants of the operator that stands where it
stands, and the result counts only if it gives the embedding that onnxruntime gives. Files that insightface made with
MXNet begin by normalising the crop themselves; they are refused.

Sources: deepinsight/insightface recognition/arcface_torch/torch2onnx.py, python-package/insightface/model_zoo/
arcface_onnx.py; the ONNX operators Conv, BatchNormalization, PRelu, Gemm, MatMul.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from chebface.arcface import BACKBONES, build_backbone
from chebface.errors import AssetError, MissingDependencyError

LIMIT = 1e-3  # the most that an embedding may differ between the file and ours, of its length


def read_backbone(path: Path) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """Read a recognition network.

    Returns:
        which of BACKBONES it is, its weights by that network's names, and what to know of them.

    Raises:
        AssetError: damaged, another network, or it computes something else than ours with the same weights.
        MissingDependencyError: onnx or onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401  missed before the long part
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingDependencyError(f"{error.name} is not installed: pip install 'chebface[export]'") from error
    try:
        graph = _Graph(onnx.load(str(path)))
        name = _name(graph)
        network = build_backbone(name).eval()
        walk = _Walk(network, graph)
    except (DecodeError, onnx.checker.ValidationError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise AssetError(f"damaged, or no ONNX file ({error})") from error
    known = network.state_dict()
    for key, tensor in walk.found.items():
        if tensor.shape != known[key].shape:
            raise AssetError(f"no {name}: {key}: wanted {tuple(known[key].shape)}, got {tuple(tensor.shape)}")
    network.load_state_dict(known | walk.found)
    notes = [
        f"run beside onnxruntime: embeddings differ by {_run_both(network, graph.input, path):.1e} of their length"
    ]
    if walk.folded:
        notes.append(
            f"{walk.folded} batch norms came folded into the layers before them: exact in eval mode, but their "
            "statistics are lost, so that training them starts with a jolt; a .pth of the same network has none"
        )
    return name, walk.found, tuple(notes)


class _Step(NamedTuple):
    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


class _Graph:
    """An ONNX graph by who reads what. Operators that change nothing are left out."""

    def __init__(self, proto: Any) -> None:
        from onnx import helper, numpy_helper

        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        self.readers: dict[str, list[_Step]] = defaultdict(list)
        self.kinds = Counter(node.op_type for node in proto.graph.node)
        same: dict[str, str] = {}
        for node in proto.graph.node:
            inputs = tuple(same.get(name, name) for name in node.input)
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant" and "value" in attributes:
                self.constants[node.output[0]] = numpy_helper.to_array(attributes["value"])
            elif node.op_type in ("Identity", "Dropout"):
                same[node.output[0]] = inputs[0]
            else:
                for name in set(inputs):
                    self.readers[name].append(_Step(node.op_type, inputs, node.output[0], attributes))
        inputs = tuple(entry.name for entry in proto.graph.input if entry.name not in self.constants)
        if len(inputs) != 1 or len(proto.graph.output) != 1:
            raise ValueError(f"wanted one input and one output, got {len(inputs)} and {len(proto.graph.output)}")
        self.input, output = inputs[0], proto.graph.output[0].name
        self.output = same.get(output, output)


def _name(graph: _Graph) -> str:
    """The network with that many convolutions; no two have as many."""
    counts = {}
    for name in BACKBONES:
        with torch.device("meta"):
            counts[name] = sum(isinstance(module, nn.Conv2d) for module in build_backbone(name).modules())
        if counts[name] == graph.kinds["Conv"]:
            return name
    known = ", ".join(f"{name} {count}" for name, count in counts.items())
    raise AssetError(f"has {graph.kinds['Conv']} convolutions (operators: {', '.join(graph.kinds)}); wanted {known}")


class _Walk:
    """Network and graph side by side. `found` are the weights, `folded` the number of batch norms that were gone."""

    def __init__(self, network: nn.Module, graph: _Graph) -> None:
        self.graph = graph
        self.found: dict[str, Tensor] = {}
        self.folded = 0
        self._spare: dict[str, Tensor] = {}  # where it ends up -> a bias for which our layer has no place
        modules = dict(network.named_modules())
        at: dict[Any, str] = {}  # a node of the network -> its output in the graph
        for node in fx.symbolic_trace(network).graph.nodes:
            sources = [at[argument] for argument in node.args if isinstance(argument, fx.Node)]
            where = str(node.target)
            if node.op == "placeholder":
                at[node] = graph.input
            elif node.op == "output":
                if sources != [graph.output]:
                    raise AssetError("no network of ours: it goes on after the embedding")
            elif node.op == "call_module":
                at[node] = self._layer(modules[where], where, sources[0])
            elif len(sources) == 2:
                at[node] = self._step("a sum", sources[0], "Add", beside=sources[1]).output
            else:
                at[node] = self._step("the last map", sources[0], "Flatten", "Reshape").output

    def _layer(self, layer: nn.Module, where: str, here: str) -> str:
        """Take the weights of one layer; where it ends."""
        if isinstance(layer, nn.Identity):
            return here
        if isinstance(layer, nn.Flatten):
            return self._step(where, here, "Flatten", "Reshape").output
        if isinstance(layer, nn.PReLU):
            step = self._step(where, here, "PRelu")
            self.found[f"{where}.weight"] = self._weight(where, step, 1).reshape(-1)
            return step.output
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            return self._norm(layer, where, here)
        return self._product(layer, where, here)

    def _product(self, layer: nn.Module, where: str, here: str) -> str:
        step = self._step(where, here, *(("Conv",) if isinstance(layer, nn.Conv2d) else ("Gemm", "MatMul")))
        weight = self._weight(where, step, 1)
        if step.kind == "MatMul" or (step.kind == "Gemm" and not step.attributes.get("transB")):
            weight = weight.movedim(0, -1).contiguous()
        self.found[f"{where}.weight"] = weight
        bias = self._weight(where, step, 2) if len(step.inputs) > 2 else torch.zeros(len(weight))
        if layer.bias is None:
            self._spare[step.output] = bias
        else:
            self.found[f"{where}.bias"], self._spare[step.output] = bias, torch.zeros_like(bias)
        return step.output

    def _norm(self, layer: nn.BatchNorm1d | nn.BatchNorm2d, where: str, here: str) -> str:
        """A norm; one that was folded away becomes one that only adds the bias of the layer before it."""
        spare = self._spare.get(here)
        if spare is not None and all(step.kind != "BatchNormalization" for step in self.graph.readers[here]):
            self.folded += 1
            one = torch.ones(len(spare))
            values, end = (one, spare, 0 * one, one - layer.eps), here
        else:
            step = self._step(where, here, "BatchNormalization")
            scale, bias, mean, variance = (self._weight(where, step, index) for index in range(1, 5))
            mean = mean if spare is None else mean - spare
            values = scale, bias, mean, variance + (step.attributes.get("epsilon", 1e-5) - layer.eps)
            end = step.output
        for name, value in zip(("weight", "bias", "running_mean", "running_var"), values, strict=True):
            self.found[f"{where}.{name}"] = value
        return end

    def _step(self, where: str, tensor: str, *kinds: str, beside: str = "") -> _Step:
        """The one operator of these kinds that reads a tensor (and the one beside it)."""
        there = self.graph.readers[tensor]
        found = [step for step in there if step.kind in kinds and (not beside or beside in step.inputs)]
        if len(found) != 1:
            got = ", ".join(step.kind for step in there) or "nothing"
            raise AssetError(f"no network of ours: at {where} wanted one {' or '.join(kinds)}, got {got}")
        return found[0]

    def _weight(self, where: str, step: _Step, index: int) -> Tensor:
        """A constant input of a step, as float32."""
        array = self.graph.constants.get(step.inputs[index]) if index < len(step.inputs) else None
        if array is None:
            raise AssetError(f"no network of ours: at {where} input {index} of {step.kind} is no constant")
        return torch.from_numpy(array.astype("float32"))


def _run_both(network: nn.Module, name: str, path: Path) -> float:
    """How far the file's embedding of a crop is from the network's, of its length."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    crop = 2 * torch.rand((1, 3, 112, 112), generator=torch.Generator().manual_seed(0)) - 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        theirs = torch.from_numpy(session.run(None, {name: crop.numpy()})[0]).float()
    except Exception as error:  # onnxruntime's have nothing in common
        raise AssetError(f"onnxruntime does not run it ({error})") from error
    with torch.inference_mode():
        ours = network(crop)
    apart = ((ours - theirs).norm() / theirs.norm()).item() if ours.shape == theirs.shape else float("inf")
    if not apart <= LIMIT:
        raise AssetError(
            f"its weights in our network give another embedding: {apart:.2g} of its length off, at most {LIMIT:g} is "
            "allowed; it computes something else between its layers"
        )
    return apart
