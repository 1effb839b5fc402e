"""A server that is none, for the tests of programs that use Client: it answers, or is busy, dead or slow as told.

fake = FakeTransport()
client = Client(transport=fake, detector=FakeDetector())
fake.fail("busy", times=1)          # the next request is refused, the client sends it again
face = client.reconstruct(photo)    # parameters[0] is the mean of the crop, in [0, 1]
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from chebface import params, signature
from chebface.client.memory import Region
from chebface.client.wire import Failure, Part, Request, Transport, pack
from chebface.crop import ARCFACE_POINTS_PX
from chebface.detect import Detection, Detector
from chebface.errors import ConfigError, PhotoError
from chebface.served import Served
from chebface.signature import (
    CROP_PX,
    HEAD_FACTS,
    LANDMARKS_M,
    MOST,
    PARAMETERS,
    RECONSTRUCT_PHOTO,
    TRIANGLES,
    VERTICES_HALF,
    VERTICES_M,
)

Answer = Callable[[Request], Mapping[str, np.ndarray]]
FACTS = {"name": "fake", "version": "0", "licence": "CC0-1.0", "sha256": "0" * 64}
FAILURES = {  # as a real server says it, over gRPC
    "busy": Failure("UNAVAILABLE", "Exceeds maximum queue size"),
    "dead": Failure("UNAVAILABLE", "failed to connect to all addresses"),
    "hung": Failure("DEADLINE_EXCEEDED", "Deadline Exceeded"),
    "broken": Failure("INTERNAL", "onnx runtime error 1"),
}


class FakeTransport(Transport):
    """Answers in this process, with a ball of a head's size: Client(transport=FakeTransport())."""

    name = "fake"

    def __init__(self, answer: Answer | None = None, *, delay_s: float = 0.0, faces: int = 1) -> None:
        """
        Args:
            answer: arrays by output name for a request, in place of the ball; a PhotoError from it reaches the client.
            delay_s: how long each request takes; it may be changed at any time.
            faces: that it finds in a photo, where the client leaves that to the server.
        """
        self.url = "fake:8001"
        self.delay_s = delay_s
        self.requests: list[Request] = []  # those that came, failed ones too
        self.timeouts_s: list[float] = []  # what the client said that each of them had
        self.is_closed = False
        self._answer = answer or functools.partial(answer_ball, faces=faces)
        self._script: deque[Failure] = deque()
        self._for_good: Failure | None = None
        self._lock = threading.Lock()

    def fail(self, how: str | Failure, *, times: int | None = None) -> None:
        """Fail the next requests.

        Args:
            how: "busy", "dead", "hung" or "broken", or a Failure. "hung" takes its whole time, and for
                good it does not say that it is alive either.
            times: how often; None is until `recover`.

        Raises:
            ConfigError: another word.
        """
        if isinstance(how, str) and how not in FAILURES:
            raise ConfigError(f"how: expected one of {', '.join(FAILURES)}, or a Failure, got {how!r}")
        failure = FAILURES[how] if isinstance(how, str) else how
        with self._lock:
            if times is None:
                self._for_good = failure
            else:
                self._script.extend([failure] * times)

    def recover(self) -> None:
        """Answer again."""
        with self._lock:
            self._script.clear()
            self._for_good = None

    def send(self, request: Request, timeout_s: float, region: Region | None = None) -> dict[str, Part]:
        """See Transport."""
        with self._lock:
            self.requests.append(request)
            self.timeouts_s.append(timeout_s)
            failure = self._script.popleft() if self._script else self._for_good
            delay_s = self.delay_s
        if (failure and failure.status == "DEADLINE_EXCEEDED") or delay_s >= timeout_s:
            time.sleep(timeout_s)
            raise Failure("DEADLINE_EXCEEDED", "Deadline Exceeded")
        time.sleep(delay_s)
        if failure:
            raise Failure(failure.status, failure.text)
        wanted = {tensor.name: tensor.dtype for tensor in request.outputs}
        try:
            arrays = {name: array for name, array in self._answer(request).items() if name in wanted}
        except PhotoError as error:
            raise Failure("INVALID_ARGUMENT", f"{type(error).__name__}: {error}") from error
        return {
            name: Part(wanted[name], array.shape, pack(np.ascontiguousarray(array))) for name, array in arrays.items()
        }

    def probe(self, what: str, timeout_s: float) -> bool:
        """Alive and ready, unless told to be dead or hung for good."""
        with self._lock:
            return self._for_good is None or not self._for_good.is_lost

    def close(self) -> None:
        """See Transport."""
        self.is_closed = True


class FakeDetector(Detector):
    """Finds `count` faces in any photo, side by side, each where the aligned crop wants it; no model files."""

    name, threshold = "fake", 0.5

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def detect(self, image_u8: np.ndarray) -> list[Detection]:
        """See Detector; the faces are squares of 112 pixels from the top left corner on."""
        return [
            Detection(
                np.array([CROP_PX * k, 0, CROP_PX * (k + 1), CROP_PX]), 1.0, np.add(ARCFACE_POINTS_PX, (CROP_PX * k, 0))
            )
            for k in range(self.count)
        ]

    def _find(self, picture_u8: np.ndarray) -> np.ndarray:
        return np.zeros((0, 15))


def answer_ball(request: Request, faces: int = 1) -> dict[str, np.ndarray]:
    """Every output there is: parameters whose first is the mean of the crop in [0, 1], camera facing; a ball.

    Args:
        request: any; one with a photo is read and cut as FakeDetector(faces) does.
        faces: in a photo.

    Raises:
        PhotoError, NoFaceError: the photo cannot be read, or there is no face.
    """
    if request.model is RECONSTRUCT_PHOTO:
        served = Served(
            lambda model, crops_u8: answer_ball(Request.make(model, {model.inputs[0].name: crops_u8})),
            detector=FakeDetector(faces),
        )
        given = dict(zip((tensor.name for tensor in request.inputs), request.arrays, strict=True))
        most = {"most": int(given[MOST.name][0])} if MOST.name in given else {}
        return served.answer(request.arrays[0][0], [tensor.name for tensor in request.outputs], **most)
    batch, first = request.batch or 1, request.arrays[0]
    parameters = np.zeros((batch, *PARAMETERS.shape), np.float32)
    if request.model.batched:
        parameters[:, 0] = first.reshape(batch, -1).mean(1) / 255
    parameters[:, params.SLICES["camera"].start] = 8.0  # 1/m: the ball fills the wide crop
    k = np.arange(signature.VERTICES)
    height, turn = 1 - (2 * k + 1) / signature.VERTICES, k * np.pi * (3 - np.sqrt(5))  # a spiral of even density
    ball = np.stack([np.cos(turn), np.zeros(len(k)), np.sin(turn)], 1) * np.sqrt(1 - height**2)[:, None]
    ball[:, 1] = height
    vertices = np.broadcast_to((ball * (0.08, 0.12, 0.1)).astype(np.float32), (batch, *VERTICES_M.shape))
    steps = np.array([(0, 55, 144), (0, 144, 89)])[np.arange(signature.FACES) % 2]  # neighbours on the spiral
    corners = np.minimum(np.arange(signature.FACES)[:, None] // 2 + steps, signature.VERTICES - 1)
    return {
        PARAMETERS.name: parameters,
        VERTICES_M.name: vertices,
        VERTICES_HALF.name: vertices.astype(np.float16),
        LANDMARKS_M.name: np.ascontiguousarray(vertices[:, :: signature.VERTICES // LANDMARKS_M.shape[0]][:, :68]),
        TRIANGLES.name: corners.astype(np.int32),
        HEAD_FACTS.name: np.array([json.dumps(FACTS).encode()], np.object_),
    }
