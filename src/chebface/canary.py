"""A known face through a server, and its answer against the same model files run in this process."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from chebface import signature
from chebface.client.connection import Connection
from chebface.client.wire import Deadline, Retry, Transport
from chebface.errors import MissingDependencyError, ServerError
from chebface.repository import OPERATORS, find_model
from chebface.signature import DECODE, RECONSTRUCT

WORST_MM = 0.1  # of a vertex or landmark: above what another runtime's float32 arithmetic makes, below what is seen


class WrongAnswerError(ServerError):
    """The server answers, and its head is not the one that its model files give."""

    exit_code = 3


def draw_face() -> np.ndarray:
    """A drawing of a face where an aligned crop has its parts, the same on every machine.

    Returns:
        (112, 112, 3) uint8 RGB.
    """
    y, x = np.mgrid[: signature.CROP_PX, : signature.CROP_PX]
    picture = np.stack([90 + y // 2, 110 + x // 4, 150 - y // 3], -1)  # a wall, lit from one side
    parts = [  # centre x, centre y, half width, half height, colour; eyes and mouth where ArcFace's template has them
        (56, 60, 40, 54, (224, 172, 140)),
        (38, 52, 7, 4, (245, 245, 245)),
        (74, 52, 7, 4, (245, 245, 245)),
        (38, 52, 3, 3, (60, 40, 30)),
        (74, 52, 3, 3, (60, 40, 30)),
        (56, 72, 5, 8, (205, 150, 120)),
        (56, 92, 15, 4, (170, 70, 70)),
    ]
    for cx, cy, half_width, half_height, colour in parts:
        inside = ((x - cx) * half_height) ** 2 + ((y - cy) * half_width) ** 2 <= (half_width * half_height) ** 2
        picture[inside] = colour
    return picture.astype(np.uint8)


def run_here(repository: str | Path, crops_u8: np.ndarray) -> dict[str, np.ndarray]:
    """What the `reconstruct` of a repository gives, by onnxruntime on its model files.

    Args:
        repository: the model repository.
        crops_u8: (B, 112, 112, 3) uint8 RGB.

    Returns:
        Arrays by output name, as signature.py has them.

    Raises:
        AssetError: the repository is not filled.
        MissingDependencyError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime is not installed: pip install 'chebface[server]'") from error
    path, options = find_model(Path(repository), RECONSTRUCT.name), onnxruntime.SessionOptions()
    if (library := path.with_name(OPERATORS)).is_file():
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in RECONSTRUCT.outputs]
    return dict(zip(names, session.run(names, {RECONSTRUCT.inputs[0].name: crops_u8}), strict=True))


def check_answer(transport: Transport, repository: str | Path, *, deadline_s: float = 30.0) -> dict[str, float]:
    """Send the drawn face to a server and compare its answer with that of the repository's model files.

    Args:
        transport: the way to the server, see `chebface.client.connection.open_transport`; closed afterwards.
        repository: what the server serves.
        deadline_s: how long the answer may take.

    Returns:
        round_trip_ms, and worst_mm: the largest difference of a coordinate.

    Raises:
        ServerUnavailableError, ServerBusyError, ServerError: there is no answer.
        WrongAnswerError: there is another one.
        AssetError, MissingDependencyError: as `run_here`.
    """
    crops_u8 = draw_face()[None]
    wanted = run_here(repository, crops_u8)
    connection = Connection([transport], retry=Retry(), shared_memory="off")
    try:
        began = time.perf_counter()
        got = connection.infer(RECONSTRUCT, {RECONSTRUCT.inputs[0].name: crops_u8}, Deadline(deadline_s))
        round_trip_ms = 1e3 * (time.perf_counter() - began)
    finally:
        connection.close()
    placed = [tensor.name for tensor in DECODE.outputs]
    worst_mm = max(float(1e3 * np.abs(got[name] - wanted[name]).max()) for name in placed)
    if not worst_mm <= WORST_MM:  # NaN, too
        raise WrongAnswerError(
            f"{transport.url}: the known face came back {worst_mm:.3g} mm from what the models in {repository} give "
            f"(at most {WORST_MM} mm): it serves another repository, or its arithmetic is broken"
        )
    return {"round_trip_ms": round_trip_ms, "worst_mm": worst_mm}
