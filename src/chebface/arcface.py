"""ArcFace backbones: an aligned 112 x 112 face to a 512-d embedding. State-dict names are those of `arcface_torch`,
so its published weights load unchanged.

Sources: Deng et al., ArcFace (CVPR 2019) for the improved residual network; Chen et al., MobileFaceNets (CCBR 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chebface.errors import ConfigError

EMBEDDING = 512
_IRESNET_BLOCKS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
BACKBONES = (*_IRESNET_BLOCKS, "mobilefacenet", "light")


def build_backbone(name: str) -> nn.Module:
    """Make a backbone with random weights.

    Args:
        name: one of BACKBONES.

    Returns:
        A module (B, 3, 112, 112) in [-1, 1] -> (B, 512), not normalised.

    Raises:
        ConfigError: unknown name.
    """
    if name in _IRESNET_BLOCKS:
        return IResNet(_IRESNET_BLOCKS[name])
    if name == "mobilefacenet":
        return MobileFaceNet()
    if name == "light":
        return Light()
    raise ConfigError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name!r}")


def last_blocks(name: str) -> tuple[str, ...]:
    """How the names of the parameters begin that fine-tuning trains: the last stage and what follows it.

    Source: MICA trains `layer4`, `bn2`, `fc` and `features` of ArcFace; the paper says "the last 3 ResNet blocks",
    which are those of `layer4`.
    """
    if name in _IRESNET_BLOCKS:
        return ("layer4.", "bn2.", "fc.", "features.")
    if name == "mobilefacenet":
        return ("layers.6.", "layers.7.", "conv_sep.", "features.")
    if name == "light":
        return ("layers.4.", "layers.5.", "conv_sep.", "features.")
    raise ConfigError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name!r}")


class _IBasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + self.downsample(x)


class IResNet(nn.Module):
    """The improved residual network of ArcFace. `layer1` to `layer4` are its four stages."""

    def __init__(self, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        widths = (64, 64, 128, 256, 512)
        for i, count in enumerate(blocks):
            stage = [
                _IBasicBlock(widths[i] if j == 0 else widths[i + 1], widths[i + 1], 2 - (j > 0)) for j in range(count)
            ]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.bn2 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512 * 7 * 7, EMBEDDING)
        self.features = nn.BatchNorm1d(EMBEDDING)
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 112, 112) -> (B, 512)
        x = self.prelu(self.bn1(self.conv1(x)))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.features(self.fc(torch.flatten(self.bn2(x), 1)))


class _Conv(nn.Module):
    """Convolution, batch norm and, unless linear, PReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        pad: int = 0,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.layers = nn.Sequential(*layers, *([] if linear else [nn.PReLU(outputs)]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _DepthWise(nn.Module):
    def __init__(self, inputs: int, outputs: int, inner: int, stride: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            _Conv(inputs, inner, 1),
            _Conv(inner, inner, 3, stride, 1, groups=inner),
            _Conv(inner, outputs, 1, linear=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class _Residual(nn.Module):
    def __init__(self, width: int, count: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_DepthWise(width, width, inner, 1, True) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Embed(nn.Module):
    """Global depth-wise convolution over the 7 x 7 map, then a linear embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _Conv(512, 512, 7, groups=512, linear=True),
            nn.Flatten(),
            nn.Linear(512, EMBEDDING, bias=False),
            nn.BatchNorm1d(EMBEDDING),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MobileFaceNet(nn.Module):
    """MobileFaceNet as `arcface_torch` has it (`mbf`): 128 and 256 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                _Conv(3, 128, 3, 2, 1),
                _Conv(128, 128, 3, 1, 1, groups=64),
                _DepthWise(128, 128, 128, 2, False),
                _Residual(128, 4, 128),
                _DepthWise(128, 256, 256, 2, False),
                _Residual(256, 6, 256),
                _DepthWise(256, 256, 512, 2, False),
                _Residual(256, 2, 256),
            ]
        )
        self.conv_sep = _Conv(256, 512, 1)
        self.features = _Embed()
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 112, 112) -> (B, 512)
        for layer in self.layers:
            x = layer(x)
        return self.features(self.conv_sep(x))


class Light(nn.Module):
    """Ours, of MobileFaceNet's size: ArcFace's residual blocks, narrow, with MobileFaceNet's ends.

    Dense 3 x 3 convolutions keep a CPU busy where depth-wise ones wait for memory.
    """

    def __init__(self) -> None:
        super().__init__()
        widths, blocks = (24, 48, 96, 192), (2, 2, 2)
        self.stem = _Conv(3, widths[0], 3, 2, 1)
        self.layers = nn.Sequential(
            *(
                _IBasicBlock(widths[i] if j == 0 else widths[i + 1], widths[i + 1], 2 if j == 0 else 1)
                for i, count in enumerate(blocks)
                for j in range(count)
            )
        )
        self.conv_sep = _Conv(widths[-1], 512, 1)
        self.features = _Embed()
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 112, 112) -> (B, 512)
        return self.features(self.conv_sep(self.layers(self.stem(x))))


def _initialize(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
