"""The regressor: an aligned face to the 486 parameters. ArcFace backbone, then a mapping network.

Source: the paper, section 3.1; mapping depth and slope as in MICA (Zielonka et al., ECCV 2022).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from chebface import params
from chebface.arcface import EMBEDDING, build_backbone
from chebface.errors import InputError

HIDDEN = 300
SLOPE = 0.2
# A head of ordinary size fills the aligned crop with this camera (camera.py), so training starts from there.
CAMERA_BIAS = (6.7, 0.0, 0.0)
# What one unit of the network's output means, part by part, so that every part learns at a like pace.
OUTPUT_UNIT = {
    "shape": (1.0,),
    "pose": (0.3,),
    "expression": (0.3,),
    "texture": (1.0,),
    "camera": (0.5, 0.01, 0.01),
    "light": (0.5,),
}


class Regressor(nn.Module):
    """Aligned crop -> parameters.

    Args:
        backbone: a name of `arcface.BACKBONES`.
        normalize: L2-normalise the embedding, as MICA does with pretrained ArcFace weights.
        skip: add a linear path beside the mapping network; alone it learned shape faster (weights/demo-1.toml).
    """

    def __init__(self, backbone: str = "light", normalize: bool = False, skip: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        self.backbone = build_backbone(backbone)
        sizes = (EMBEDDING, HIDDEN, HIDDEN, HIDDEN, HIDDEN)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(SLOPE)]
        self.mapping = nn.Sequential(*layers)
        self.output = nn.Linear(HIDDEN, params.TOTAL)
        self.skip = nn.Linear(EMBEDDING, params.TOTAL, bias=False) if skip else None
        for module in self.mapping:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, a=SLOPE, nonlinearity="leaky_relu")
                nn.init.zeros_(module.bias)
        nn.init.kaiming_normal_(self.output.weight, a=SLOPE, nonlinearity="leaky_relu")
        with torch.no_grad():  # small but never zero: a zero head would starve the backbone of gradient
            self.output.weight *= 0.25
            self.output.bias.zero_()
            if self.skip is not None:
                self.skip.weight *= 0.25
        unit = torch.cat([torch.tensor(OUTPUT_UNIT[name]).expand(size) for name, size in params.PARTS.items()])
        offset = torch.zeros(params.TOTAL)
        offset[params.SLICES["camera"]] = torch.tensor(CAMERA_BIAS)
        offset[params.SLICES["light"]][:3] = 2.5  # an evenly lit face: constant harmonic only
        self.register_buffer("unit", unit, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, crop: Tensor) -> Tensor:
        """Predict.

        Args:
            crop: (B, 3, 112, 112) float, RGB in [-1, 1], aligned by crop.py.

        Returns:
            (B, 486), see params.py.

        Raises:
            InputError: another shape.
        """
        if crop.ndim != 4 or crop.shape[1:] != (3, 112, 112):
            raise InputError(f"crop: expected (B, 3, 112, 112), got {tuple(crop.shape)}")
        embedding = self.backbone(crop)
        if self.normalize:
            embedding = nn.functional.normalize(embedding)
        output = self.output(self.mapping(embedding))
        if self.skip is not None:
            output = output + self.skip(embedding)
        return output * self.unit + self.offset


def normalize_crop(crop_u8: Tensor) -> Tensor:
    """(B, 112, 112, 3) uint8 RGB -> (B, 3, 112, 112) float32 in [-1, 1], as ArcFace wants it: (x - 127.5) / 127.5."""
    return (crop_u8.permute(0, 3, 1, 2).float() - 127.5) / 127.5
