"""The spectral mesh autoencoder: a registered mesh to a descriptor of 8 numbers, and back to the mesh.

Four Chebyshev convolutions, each with bias, ReLU and pooling to the next coarser mesh, then a linear map to the code;
the decoder mirrors it. The code is linear (CoMA puts a ReLU on it, which confines cosines to [0, 1] and allows 0/0).
Source: Ranjan et al., ECCV 2018 (CoMA), table 1; the reconstructor's 3D identity loss compares two descriptors.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chebface.errors import AssetError, InputError
from chebface.hierarchy import Hierarchy, Level
from chebface.kernels import Graph, cheb_conv, cpu

WIDTH = (16, 16, 16, 32)
TERMS = 6
CODE = 8
STD_FLOOR = 1e-7  # m
EPS = 1e-8
_LEVEL = "hierarchy"
_BROKEN = (ValueError, KeyError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error)


class ChebConv(nn.Module):
    """One Chebyshev convolution on one mesh, with what is fused into it.

    Initialised as CoMA does: weights from a normal of standard deviation 0.1 cut at two of them, biases 0.1.

    Args:
        graph: of N vertices.
        channels: in and out.
        K: terms T_0 to T_{K-1}.
        keep: (M,) int32, rising: the only vertices to compute; all where None.
        bias, relu: whether to add a bias, to cut at zero.
    """

    keep: Tensor | None

    def __init__(
        self,
        graph: Graph,
        channels: tuple[int, int],
        K: int,
        *,
        keep: np.ndarray | None = None,
        bias: bool = True,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.graph, self.relu = graph, relu
        self.weight = nn.Parameter(_truncated_normal(K, *channels))
        self.bias = nn.Parameter(torch.full((channels[1],), 0.1)) if bias else None
        self.register_buffer("keep", None if keep is None else torch.tensor(keep, dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, M, C_out)."""
        return cheb_conv(x, self.graph, self.weight, self.bias, keep=self.keep, relu=self.relu)


class Upsample(nn.Module):
    """Values of a coarse mesh read at the vertices of the finer one: barycentric, (B, V_next, C) to (B, V, C)."""

    index: Tensor
    weight: Tensor
    back_index: Tensor
    back_weight: Tensor
    back_start: Tensor

    def __init__(self, level: Level, coarse: int) -> None:
        super().__init__()
        if level.up_index is None or level.up_weight is None:
            raise InputError("hierarchy: the last level has nothing to come up from")
        corner = level.up_index.reshape(-1)
        order = np.argsort(corner, kind="stable")
        start = np.concatenate([[0], np.cumsum(np.bincount(corner, minlength=coarse))])
        arrays = {
            "index": level.up_index.astype(np.int64),
            "weight": level.up_weight.astype(np.float32),
            "back_index": order // 3,
            "back_weight": level.up_weight.reshape(-1)[order].astype(np.float32),
            "back_start": start,
        }
        for name, array in arrays.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, V_next, C) to (B, V, C)."""
        batch, _, channels = x.shape
        rows: Tensor = _Mix.apply(x.transpose(0, 1).flatten(1), self)
        return rows.view(-1, batch, channels).transpose(0, 1)


class _Mix(torch.autograd.Function):
    """Rows (V_next, D) to weighted sums of three (V, D). Its adjoint gathers too: autograd's own would scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, up: Upsample) -> Tensor:
        ctx.up = up
        return torch.nn.functional.embedding_bag(
            up.index, rows.contiguous(), mode="sum", per_sample_weights=up.weight.to(rows.dtype)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        up = ctx.up
        back = torch.nn.functional.embedding_bag(
            up.back_index,
            grad.contiguous(),
            up.back_start,
            mode="sum",
            per_sample_weights=up.back_weight.to(grad.dtype),
            include_last_offset=True,
        )
        return back, None


class _Encode(torch.autograd.Function):
    """The encoder's layers and linear map in one kernel call, and their gradients in another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: cpu.Plan, *parameters: Tensor) -> Tensor:
        if not any(ctx.needs_input_grad):
            return cpu.encode(x, plan)
        code, saved = cpu.encode_saving(x, plan)
        ctx.plan = plan
        ctx.save_for_backward(x, saved, *parameters)  # parameters: a step in between is noticed
        return code

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, saved, *parameters = ctx.saved_tensors
        need_x, _, *need_weights = ctx.needs_input_grad
        grad_x, weights, biases, linear_weight, linear_bias = cpu.encode_backward(
            grad.contiguous(), x, ctx.plan, need_x, saved=saved, need_weights=any(need_weights)
        )
        if not any(need_weights):
            return grad_x, None, *(None for _ in parameters)
        return grad_x, None, *weights, *biases, linear_weight, linear_bias


class MeshEncoder(nn.Module):
    """Meshes to descriptors.

    Vertices are first standardised: per vertex and coordinate, the training meshes' `mean` taken away and divided by
    their `std`; both are buffers of (N, 3) metres that travel with the weights.

    Args:
        hierarchy: of the meshes' topology.
        width: channels after each convolution, one per step down the hierarchy.
        K: terms of each convolution.
        code: numbers in the descriptor.

    Raises:
        InputError: as many widths as steps are wanted, and everything at least 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, hierarchy: Hierarchy, width: tuple[int, ...] = WIDTH, K: int = TERMS, code: int = CODE) -> None:
        super().__init__()
        levels = hierarchy.levels
        _check_sizes(hierarchy, width, K, code)
        self.register_buffer("mean", torch.tensor(levels[0].vertices, dtype=torch.float32))
        self.register_buffer("std", torch.ones_like(self.mean))
        channels = (3, *width)
        self.conv = nn.Sequential(
            *(
                ChebConv(level.graph, (channels[i], channels[i + 1]), K, keep=level.down)
                for i, level in enumerate(levels[:-1])
            )
        )
        self.fc = _linear(len(levels[-1].vertices) * width[-1], code)
        self._plan: tuple[tuple[int, ...], cpu.Plan] | None = None

    def normalize(self, vertices: Tensor) -> Tensor:
        """Vertices (B, N, 3) in metres as multiples of `std` from `mean`.

        Raises:
            InputError: not (B, N, 3).
        """
        if vertices.ndim != 3 or vertices.shape[1:] != self.mean.shape:
            raise InputError(f"vertices: expected (B, {len(self.mean)}, 3), got {tuple(vertices.shape)}")
        return (vertices - self.mean) / self.std

    def describe(self, normalized: Tensor) -> Tensor:
        """Descriptors (B, code) of what `normalize` gave. On a CPU it is one kernel call."""
        plan = None if torch.compiler.is_compiling() else self._prepare(normalized)
        if plan is not None:
            code: Tensor = _Encode.apply(normalized.contiguous(), plan, *self._parameters_in_order())
            return code
        features: Tensor = self.conv(normalized)
        code = self.fc(features.flatten(1))
        return code

    def forward(self, vertices: Tensor) -> Tensor:
        """Descriptors (B, code) of vertices (B, N, 3) in metres.

        Raises:
            InputError: not (B, N, 3).
        """
        return self.describe(self.normalize(vertices))

    @torch.no_grad()
    def encode(self, vertices: Tensor | np.ndarray) -> Tensor:
        """As calling it, without gradients, for meshes from outside: they are checked.

        Args:
            vertices: (B, N, 3) or (N, 3) m.

        Returns:
            (B, code), or (code,).

        Raises:
            InputError: a wrong shape, or vertices that are not finite.
        """
        given = torch.as_tensor(vertices, dtype=self.mean.dtype, device=self.mean.device)
        if not torch.isfinite(given.sum()):
            raise InputError("vertices: expected finite numbers, got NaN or infinity; check the mesh")
        if given.ndim == 2:
            return self.encode(given[None])[0]
        return self(given)

    def _parameters_in_order(self) -> list[Tensor]:
        """Weights, then biases, then the linear map's: as the kernels have them."""
        layers = [layer for layer in self.conv if isinstance(layer, ChebConv)]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        return [*(layer.weight for layer in layers), *biases, self.fc.weight, self.fc.bias]

    def _prepare(self, x: Tensor) -> cpu.Plan | None:
        """What the one-call kernel wants to know, where it runs; it sees changes in place, so only moves renew it."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or not cpu.available():
            return None
        parameters = self._parameters_in_order()
        if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in parameters):
            return None
        places = tuple(parameter.data_ptr() for parameter in parameters)
        if self._plan is None or self._plan[0] != places:
            layers = [layer for layer in self.conv if isinstance(layer, ChebConv)]
            count = len(layers)
            graphs, keeps = [layer.graph for layer in layers], [layer.keep for layer in layers]
            plan = cpu.prepare(graphs, keeps, parameters[:count], parameters[count:-2], *parameters[-2:])
            self._plan = places, plan
        return self._plan[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plan": None}  # addresses in this process's memory: no copy may have them

    @torch.no_grad()
    def set_statistics(self, mean: np.ndarray, std: np.ndarray, floor: float = STD_FLOOR) -> None:
        """Take mean and standard deviation (N, 3) in metres; a deviation below the floor is raised to it.

        Raises:
            InputError: another shape, or not finite.
        """
        for name, array in (("mean", mean), ("std", std)):
            if array.shape != tuple(self.mean.shape) or not np.isfinite(array).all():
                raise InputError(f"{name}: expected finite {tuple(self.mean.shape)}, got {array.shape}")
        self.mean.copy_(torch.from_numpy(mean))
        self.std.copy_(torch.from_numpy(np.maximum(std, floor)))


class MeshDecoder(nn.Module):
    """Descriptors to standardised meshes: linear, ReLU, then up a level and convolve, four times; a last linear
    convolution to 3 coordinates, without bias. Args as `MeshEncoder`.
    """

    def __init__(self, hierarchy: Hierarchy, width: tuple[int, ...] = WIDTH, K: int = TERMS, code: int = CODE) -> None:
        super().__init__()
        levels = hierarchy.levels
        _check_sizes(hierarchy, width, K, code)
        self.coarsest = len(levels[-1].vertices)
        self.fc = _linear(code, self.coarsest * width[-1])
        self.up = nn.ModuleList()
        self.conv = nn.ModuleList()
        channels = (*width, width[-1])
        for step in reversed(range(len(width))):
            self.up.append(Upsample(levels[step], len(levels[step + 1].vertices)))
            self.conv.append(ChebConv(levels[step].graph, (channels[step + 1], channels[step]), K))
        self.out = ChebConv(levels[0].graph, (width[0], 3), K, bias=False, relu=False)

    def forward(self, descriptor: Tensor) -> Tensor:
        """(B, code) to (B, N, 3), as `MeshEncoder.normalize` gives meshes.

        Raises:
            InputError: not (B, code).
        """
        if descriptor.ndim != 2 or descriptor.shape[1] != self.fc.in_features:
            raise InputError(f"descriptor: expected (B, {self.fc.in_features}), got {tuple(descriptor.shape)}")
        x = self.fc(descriptor).relu().unflatten(1, (self.coarsest, -1))
        for up, conv in zip(self.up, self.conv, strict=True):
            x = conv(up(x))
        mesh: Tensor = self.out(x)
        return mesh


class MeshAutoencoder(nn.Module):
    """Encoder and decoder over one hierarchy: 30 056 weights with the usual sizes. Args as `MeshEncoder`."""

    def __init__(self, hierarchy: Hierarchy, width: tuple[int, ...] = WIDTH, K: int = TERMS, code: int = CODE) -> None:
        super().__init__()
        self.hierarchy, self.width, self.K, self.code = hierarchy, tuple(width), K, code
        self.encoder = MeshEncoder(hierarchy, width, K, code)
        self.decoder = MeshDecoder(hierarchy, width, K, code)

    @property
    def weights(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.numel() for parameter in self.parameters())

    def decode(self, descriptor: Tensor) -> Tensor:
        """Vertices (B, N, 3) in metres from descriptors (B, code).

        Raises:
            InputError: not (B, code).
        """
        mesh: Tensor = self.decoder(descriptor) * self.encoder.std + self.encoder.mean
        return mesh

    def reconstruct(self, vertices: Tensor) -> Tensor:
        """Vertices (B, N, 3) in metres through the code and back.

        Raises:
            InputError: not (B, N, 3).
        """
        return self.decode(self.encoder(vertices))

    def forward(self, vertices: Tensor) -> Tensor:
        """As `reconstruct`, still standardised: what training compares with `encoder.normalize(vertices)`."""
        mesh: Tensor = self.decoder(self.encoder(vertices))
        return mesh

    @torch.no_grad()
    def change_frame(self, matrix: Tensor, origin: Tensor) -> None:
        """Give codes another origin and axes, c' = matrix (c - origin), and leave reconstructions as they are.

        The code is linear on both sides, so both are free, and the reconstruction does not settle them: but a cosine
        depends on them.

        Args:
            matrix: (code, code), invertible.
            origin: (code,).
        """
        code, back = self.encoder.fc, self.decoder.fc
        back.bias.add_(back.weight @ origin)
        back.weight.copy_(back.weight @ torch.linalg.inv(matrix))
        code.bias.copy_(matrix @ (code.bias - origin))
        code.weight.copy_(matrix @ code.weight)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint needs, hierarchy included: no head is wanted to read it back."""
        tensors = self.state_dict()
        for i, level in enumerate(self.hierarchy.levels):
            for name in ("vertices", "faces", "down", "up_index", "up_weight"):
                array = getattr(level, name)
                if array is not None:
                    tensors[f"{_LEVEL}.{i}.{name}"] = torch.tensor(array)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> MeshAutoencoder:
        """The reverse, in eval mode; facts are `width`, `K` and `code`.

        Raises:
            AssetError: tensors or facts are not those of a mesh autoencoder.
        """
        try:
            levels: dict[int, dict[str, np.ndarray]] = {}
            for key, tensor in tensors.items():
                if key.startswith(f"{_LEVEL}."):
                    _, i, name = key.split(".")
                    levels.setdefault(int(i), {})[name] = tensor.numpy()
            hierarchy = Hierarchy(tuple(_level(levels[i]) for i in range(len(levels))))
            made = cls(hierarchy, tuple(facts["width"]), facts["K"], facts["code"])
            made.load_state_dict({key: t for key, t in tensors.items() if not key.startswith(f"{_LEVEL}.")})
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise AssetError(f"not a mesh encoder of this version ({error})") from error
        return made.eval()


def descriptor_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - cos between descriptors (..., code): (...), in [0, 2]; 1 where one of them is zero.

    Raises:
        InputError: their sizes differ.

    Source: the paper, equation 6.
    """
    if first.ndim < 1 or first.shape[-1] != second.shape[-1]:
        raise InputError(f"descriptors: expected one size, got {tuple(first.shape)} and {tuple(second.shape)}")
    return 1 - torch.nn.functional.cosine_similarity(first, second, dim=-1, eps=EPS)


def read_coma(path: str | Path, name: str) -> dict[str, Tensor]:
    """The weights of one of CoMA's trained models as a state dict, without mean and std (its file has none).

    Args:
        path: an npz of arrays named `<model>/encoder/conv1/weights` and so on, as TensorFlow had them.
        name: the model, for example "bareteeth".

    Raises:
        AssetError: no such file or model, or arrays of other shapes.
    """
    places = {f"encoder.conv.{i}": f"encoder/conv{i + 1}" for i in range(4)}
    places |= {f"decoder.conv.{i}": f"decoder/upconv{i + 1}" for i in range(4)}
    state = {}
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as file:
            for ours, theirs in {**places, "decoder.out": "decoder"}.items():
                rows = torch.from_numpy(file[f"{name}/{theirs}/weights"])  # row c K + k is channel c, term k
                state[f"{ours}.weight"] = rows.unflatten(0, (-1, TERMS)).transpose(0, 1).contiguous()
                if theirs != "decoder":
                    state[f"{ours}.bias"] = torch.from_numpy(file[f"{name}/{theirs}/bias"]).flatten()
            for ours, theirs in (("encoder.fc", "encoder/fc"), ("decoder.fc", "decoder/fc2")):
                state[f"{ours}.weight"] = torch.from_numpy(file[f"{name}/{theirs}/weights"]).T.contiguous()
                state[f"{ours}.bias"] = torch.from_numpy(file[f"{name}/{theirs}/bias"])
    except (*_BROKEN, RuntimeError) as error:
        raise AssetError(f"CoMA weights {path}, model {name!r}: cannot be read ({error})") from error
    return state


def _level(arrays: dict[str, np.ndarray]) -> Level:
    vertices, faces = arrays["vertices"], arrays["faces"]
    graph = Graph.from_faces(faces, len(vertices))
    return Level(vertices, faces, graph, *(arrays.get(name) for name in ("down", "up_index", "up_weight")))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(_truncated_normal(outputs, inputs))
        layer.bias.fill_(0.1)
    return layer


def _truncated_normal(*shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), std=0.1, a=-0.2, b=0.2)


def _check_sizes(hierarchy: Hierarchy, width: tuple[int, ...], K: int, code: int) -> None:
    steps = len(hierarchy.levels) - 1
    if len(width) != steps or steps < 1:
        raise InputError(f"width: expected {steps} numbers, one per step of the hierarchy, got {tuple(width)}")
    if K < 1 or code < 1 or min(width) < 1:
        raise InputError(f"width, K, code: expected at least 1, got {tuple(width)}, {K}, {code}")
