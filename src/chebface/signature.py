"""Every tensor that crosses a process boundary: name, dtype, shape.

ONNX graphs, config.pbtxt files, server and client are all checked against this file. Shapes are per item; the
batch dimension comes first and is not listed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from chebface import params

VERTICES = 5023
FACES = 9976
LANDMARKS = 68
CROP_PX = 112  # the aligned ArcFace crop
DESCRIPTOR_SIZE = 8
MAX_BATCH = 32  # faces per request; clients split larger batches


@dataclass(frozen=True)
class Tensor:
    """One named tensor; dtype as Triton spells it (UINT8, INT32, FP32, BYTES)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """One served model: its inputs, its outputs, whether requests are batched, and what an ensemble runs in order."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batched: bool = True
    steps: tuple[str, ...] = ()


CROP = Tensor("crop", "UINT8", (CROP_PX, CROP_PX, 3))  # RGB, aligned by crop.py
PARAMETERS = Tensor("parameters", "FP32", (params.TOTAL,))
VERTICES_M = Tensor("vertices", "FP32", (VERTICES, 3))  # metres, posed, with expression
LANDMARKS_M = Tensor("landmarks", "FP32", (LANDMARKS, 3))  # metres
NEUTRAL = Tensor("vertices", "FP32", (VERTICES, 3))  # metres, of a head at rest: identity alone
DESCRIPTOR = Tensor("descriptor", "FP32", (DESCRIPTOR_SIZE,))  # compared by the cosine

REQUEST = Tensor("request", "INT32", (1,))  # any value: a served model must have an input
TRIANGLES = Tensor("faces", "INT32", (FACES, 3))
HEAD_FACTS = Tensor("head", "BYTES", (1,))  # JSON object: name, version, licence, sha256

REGRESS = Model("regress", (CROP,), (PARAMETERS,))
DECODE = Model("decode", (PARAMETERS,), (VERTICES_M, LANDMARKS_M))
TOPOLOGY = Model("topology", (REQUEST,), (TRIANGLES, HEAD_FACTS), batched=False)
RECONSTRUCT = Model("reconstruct", (CROP,), (PARAMETERS, VERTICES_M, LANDMARKS_M), steps=("regress", "decode"))
ENCODE = Model("encode", (NEUTRAL,), (DESCRIPTOR,))
MODELS = {model.name: model for model in (REGRESS, DECODE, TOPOLOGY, RECONSTRUCT, ENCODE)}
# What Triton says, in lower case, when it refuses because of load, and when it will not recover by itself. Codes
# alone do not tell: UNAVAILABLE is both a full queue and a restricted interface.
BUSY_TEXTS = ("maximum queue size", "timeout expired", "request timeout")
DEAD_TEXTS = ("is not healthy", "stub process", "server is stopping", "shutting down")

# A head without a mesh encoder (FLAME's files bring none) is exported and served without these: no model file.
OPTIONAL = {ENCODE.name: ENCODE}
LEAVES = {name: m for name, m in MODELS.items() if not m.steps and name not in OPTIONAL}  # those with a model file


def digest() -> str:
    """Digest of everything that crosses the wire: two programs with the same one can talk."""
    models = {name: asdict(model) for name, model in MODELS.items()}
    return hashlib.sha256(json.dumps(models, sort_keys=True).encode()).hexdigest()[:16]
