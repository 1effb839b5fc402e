"""Photograph -> Face in this process, with torch. Client does the same over a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from chebface import checkpoint
from chebface.detect import Detector
from chebface.flame import Flame
from chebface.heads import Head, open_head
from chebface.pipeline import Pipeline, Topology
from chebface.regressor import normalize_crop


class Reconstructor(Pipeline):
    """Reconstructs faces in this process.

    >>> face = Reconstructor().reconstruct("me.jpg")      # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        head: Head | None = None,
        detector: str | Detector = "auto",
        device: str = "cpu",
    ) -> None:
        """Load weights and head.

        Args:
            weights: a checkpoint of `chebface train reconstructor`; None takes the shipped demo weights.
            head: the head that the weights were trained with; None finds it by the name in their card.
            detector: a name for `open_detector`, or a detector.
            device: as torch names it.

        Raises:
            AssetError: weights or head are missing, damaged, or not made for each other.
        """
        import torch

        super().__init__(detector=detector)
        model, card = checkpoint.load_regressor(weights)
        head = open_head(card["training"]["head"]) if head is None else head
        checkpoint.check_head(card, head)
        self._device = torch.device(device)
        self._model, self._flame = model.to(self._device), Flame(head).to(self._device)
        self._topology = Topology(faces=head.faces, head=head.facts)

    @property
    def topology(self) -> Topology:
        """Triangles and facts of the head."""
        return self._topology

    def _infer(self, crops_u8: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        import torch

        with torch.inference_mode():
            parameters = self._model(normalize_crop(torch.from_numpy(crops_u8).to(self._device)))
            vertices, landmarks = self._flame.decode(parameters)
        return parameters.cpu().numpy(), vertices.cpu().numpy(), landmarks.cpu().numpy()
