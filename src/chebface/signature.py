"""Every tensor that crosses a process boundary: name, dtype, shape.

ONNX graphs, config.pbtxt files, server and client are all checked against this file. Shapes are per item; the
batch dimension comes first and is not listed. A dimension that only the answer tells is -1.
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
MAX_FACES = 256  # of one photo, when the server looks for them; the largest are kept
MAX_PHOTO_MIB = 10  # of a photo that is sent as a file


@dataclass(frozen=True)
class Tensor:
    """One named tensor; dtype as Triton spells it (UINT8, INT32, FP32, BYTES, and FP16 where it is asked for)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """One served model. It is a model.onnx, unless it is a program."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batched: bool = True
    on_request: tuple[Tensor, ...] = ()  # further outputs, which our client asks for by name only
    optional: tuple[Tensor, ...] = ()  # inputs that a request may leave out
    program: str = ""  # the module of this package that is its model.py

    @property
    def every_output(self) -> tuple[Tensor, ...]:
        """All that the served model has."""
        return self.outputs + self.on_request


CROP = Tensor("crop", "UINT8", (CROP_PX, CROP_PX, 3))  # RGB, aligned by crop.py
PARAMETERS = Tensor("parameters", "FP32", (params.TOTAL,))
VERTICES_M = Tensor("vertices", "FP32", (VERTICES, 3))  # metres, posed, with expression
VERTICES_HALF = Tensor("vertices_half", "FP16", (VERTICES, 3))  # metres: half the bytes, 0.25 mm of error at most
LANDMARKS_M = Tensor("landmarks", "FP32", (LANDMARKS, 3))  # metres
NEUTRAL = Tensor("vertices", "FP32", (VERTICES, 3))  # metres, of a head at rest: identity alone
DESCRIPTOR = Tensor("descriptor", "FP32", (DESCRIPTOR_SIZE,))  # compared by the cosine

REQUEST = Tensor("request", "INT32", (1,))  # any value: a served model must have an input
TRIANGLES = Tensor("faces", "INT32", (FACES, 3))
HEAD_FACTS = Tensor("head", "BYTES", (1,))  # JSON object: name, version, licence, sha256

PHOTO = Tensor("photo", "BYTES", (1,))  # a JPEG, PNG or WebP file
MOST = Tensor("most", "INT32", (1,))  # faces to reconstruct, the largest first

# What a photograph is answered with. The first dimension is its faces, the largest first; pixels are the photo's,
# upright, with centres at integers.
BOXES_PX = Tensor("boxes_px", "FP32", (-1, 4))  # x0, y0, x1, y1
POINTS_PX = Tensor("points_px", "FP32", (-1, 5, 2))  # eyes, nose tip, mouth corners
SCORES = Tensor("scores", "FP32", (-1,))
CROPS = Tensor("crops", "UINT8", (-1, CROP_PX, CROP_PX, 3))
PHOTO_TO_CROP = Tensor("photo_to_crop", "FP32", (-1, 2, 3))  # px -> px, affine
PHOTO_SIZE = Tensor("photo_size", "INT32", (2,))  # height, width
FOUND = Tensor("found", "INT32", (1,))  # faces in the photo, those beyond `most` too
TIMINGS_MS = Tensor("timings_ms", "FP32", (3,))  # read, detect, align


def _per_face(tensor: Tensor) -> Tensor:
    return Tensor(tensor.name, tensor.dtype, (-1, *tensor.shape))


REGRESS = Model("regress", (CROP,), (PARAMETERS,))
DECODE = Model("decode", (PARAMETERS,), (VERTICES_M, LANDMARKS_M), on_request=(VERTICES_HALF,))
TOPOLOGY = Model("topology", (REQUEST,), (TRIANGLES, HEAD_FACTS), batched=False)
# regress and decode as one graph: one queue, one batch and one hop less than an ensemble of the two.
RECONSTRUCT = Model("reconstruct", (CROP,), (PARAMETERS, VERTICES_M, LANDMARKS_M), on_request=(VERTICES_HALF,))
ENCODE = Model("encode", (NEUTRAL,), (DESCRIPTOR,))
MODELS = {model.name: model for model in (REGRESS, DECODE, TOPOLOGY, RECONSTRUCT, ENCODE)}  # each is one ONNX file

DETECTED = (BOXES_PX, POINTS_PX, SCORES, CROPS, PHOTO_TO_CROP, PHOTO_SIZE, FOUND, TIMINGS_MS)
LANDMARKS_PX = Tensor("landmarks_px", "FP32", (-1, LANDMARKS, 2))
RECONSTRUCT_PHOTO = Model(
    "reconstruct_photo",
    (PHOTO,),
    (*map(_per_face, RECONSTRUCT.outputs), LANDMARKS_PX, *DETECTED),
    batched=False,
    on_request=(_per_face(VERTICES_HALF),),
    optional=(MOST,),
    program="photo_leaf",
)
SERVED = MODELS | {RECONSTRUCT_PHOTO.name: RECONSTRUCT_PHOTO}
PRIORITIES = {"high": 1, "normal": 2}  # in a queue, "high" goes first
# What Triton says, in lower case, when it refuses because of load, and when it will not recover by itself. Codes
# alone do not tell: UNAVAILABLE is both a full queue and a restricted interface.
BUSY_TEXTS = ("maximum queue size", "timeout expired", "request timeout")
DEAD_TEXTS = ("is not healthy", "stub process", "server is stopping", "shutting down")
PHOTO_ERRORS = ("NoFaceError: ", "PhotoError: ")  # begin what our own program says of a photo that is at fault

# A head without a mesh encoder (FLAME's files bring none) is exported and served without these: no model file.
OPTIONAL = {ENCODE.name: ENCODE}
LEAVES = {name: model for name, model in MODELS.items() if name not in OPTIONAL}  # those that are always there


def digest() -> str:
    """Digest of everything that crosses the wire: two programs with the same one can talk."""
    models = {name: asdict(model) for name, model in SERVED.items()}
    return hashlib.sha256(json.dumps(models, sort_keys=True).encode()).hexdigest()[:16]
