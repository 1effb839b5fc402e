"""One frozen dataclass per program. Defaults, then a TOML file, then `--set key=value`; an unknown key is an error."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from chebface.errors import ConfigError

C = TypeVar("C")
ENCODER_FRAMES = ("raw", "centered", "whitened")
PICTURES = ("auto", "images", "arcface")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name}: expected above 0, got {getattr(config, name)}")


def _check_quality(jpeg_quality: int) -> None:
    if not 1 <= jpeg_quality <= 95:
        raise ConfigError(f"jpeg_quality: expected 1..95, got {jpeg_quality}")


# What of the paper each known method keeps; under the settings of a file or of --set.
PRESETS: dict[str, dict[str, Any]] = {
    "ours": {},
    "mica": {"lambda_2d": 0.0, "lambda_descriptor": 0.0},  # vertices alone
    "deca": {"lambda_3d": 0.0},  # the picture alone
}


@dataclass(frozen=True)
class TrainReconstructor:
    """Settings of `chebface train reconstructor`. Optimiser, steps, batch, losses and lambdas are the paper's."""

    preset: str = "ours"
    # the network
    backbone: str = "iresnet100"
    backbone_weights: str = ""  # a checkpoint of arcface_torch; "" starts from random numbers
    trained: str = "last"  # of the backbone: the last blocks, as the paper, or all
    normalize_embedding: bool = False
    skip: bool = False  # a linear path beside the mapping network
    start: str = ""  # a reconstructor's checkpoint to begin from, of the same network and head
    head: str = "open"
    # the steps
    steps: int = 160_000
    batch: int = 8  # actors, over all processes
    images_per_actor: int = 2
    accumulate: int = 1  # parts that a batch goes through the network in, for less memory
    optimizer: str = "adamw"  # or muon: Muon for the hidden layers, AdamW for the rest
    learning_rate: float = 1e-5
    muon_learning_rate: float = 0.02
    weight_decay: float = 2e-4
    warmup_steps: int = 0
    final_learning_rate: float = 1.0  # share of the rates, reached on a cosine at the last step; 1 keeps them constant
    clip_gradient: float = 10.0  # largest gradient norm
    # the paper's losses, equations 1 to 3, and DECA's weights within the first
    lambda_2d: float = 0.4
    lambda_3d: float = 0.6
    lambda_vertices: float = 0.5  # the paper's lambda_1
    lambda_descriptor: float = 0.5  # the paper's lambda_2, of the 3D-ID loss
    weight_landmarks: float = 1.0
    weight_eyes: float = 1.0
    weight_lips: float = 0.5
    weight_photometric: float = 2.0
    weight_identity: float = 0.2
    weight_regularizer: float = 1e-4
    weight_light_color: float = 1.0
    shape_consistency: bool = True
    deca_compat: bool = False  # compare unlit pictures with photos, as DECA's released code does
    truth_mesh: str = "neutral"  # or posed, where every sample has all parameters
    encoder: str = ""  # a mesh encoder's checkpoint; "" is the shipped one, of the open head
    recognition: str = ""  # a checkpoint of arcface_torch for the identity loss
    recognition_backbone: str = "iresnet50"
    renderer: str = "auto"
    # what known parameters of synthetic pairs can add; weights of the mean losses below
    weight_reprojection: float = 0.0  # every vertex in the picture, in [-1, 1]
    weight_pose: float = 0.0  # rotation matrices
    weight_shape: float = 0.0  # coefficients, each in proportion to how far it moves the vertices
    weight_texture: float = 0.0
    weight_camera: float = 0.0
    weight_light: float = 0.0
    # how
    precision: str = "fp32"  # or bf16
    compile: bool = False  # the network, by torch.compile
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    picture_every: int = 0  # steps between pictures of a few faces; 0 for none
    tensorboard: bool = False  # scalars and pictures for it, too

    def __post_init__(self) -> None:
        positive = "steps batch images_per_actor accumulate learning_rate muon_learning_rate clip_gradient log_every"
        _check_positive(self, *positive.split(), "save_every")
        for name, values in (
            ("preset", tuple(PRESETS)),
            ("trained", ("last", "all")),
            ("optimizer", ("adamw", "muon")),
            ("truth_mesh", ("neutral", "posed")),
            ("precision", ("fp32", "bf16")),
        ):
            if getattr(self, name) not in values:
                raise ConfigError(f"{name}: expected {' or '.join(values)}, got {getattr(self, name)!r}")
        if self.start and self.backbone_weights:
            raise ConfigError("start: has a backbone of its own; leave backbone_weights empty")


@dataclass(frozen=True)
class TrainEncoder:
    """Settings of `chebface train encoder`. Sizes, optimiser and batch are the paper's and CoMA's."""

    head: str = "open"  # sampled where no folder is given; else its regions and parameters are used. "" for none
    count: int = 4_000  # people to sample where no folder is given
    expression: float = 0.0  # strength of their expressions; the identity loss compares heads without
    unit: str = "m"  # of a folder's files: m, cm or mm
    held_out: float = 0.1  # share of the people
    code: int = 8  # numbers in the descriptor
    terms: int = 6  # K of every convolution
    # The code is linear, so its origin and axes do not change what is reconstructed, but a cosine depends on them.
    # centered: the mean person has code zero. whitened: in addition the codes of people have unit covariance.
    frame: str = "centered"
    face_weight: float = 1.0  # of the face's vertices in the loss, where the rest has 1
    # Where training meshes never move, noise is divided by this: heads that are symmetric or cut alike want 1e-3.
    std_floor: float = 1e-7  # m
    noise: float = 0.0  # m, a standard deviation: added to what the encoder sees, not to what is to come back
    epochs: int = 300
    batch: int = 16
    learning_rate: float = 8e-3
    decay: float = 0.99  # of the rate, each epoch
    seed: int = 0
    log_every: int = 50  # steps
    save_every: int = 5  # epochs; held-out people are measured then

    def __post_init__(self) -> None:
        if self.frame not in ENCODER_FRAMES:
            raise ConfigError(f"frame: expected one of {', '.join(ENCODER_FRAMES)}, got {self.frame!r}")
        for name in ("count", "code", "terms", "epochs", "batch", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("expression", "noise"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected 0 or above, got {getattr(self, name)}")
        for name in ("learning_rate", "decay", "std_floor", "face_weight"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Synthesize:
    """Settings of `chebface data synthesize`: what the made-up photographs vary over."""

    head: str = "open"
    count: int = 50_000
    first: int = 0  # number of the first one: photographs of a seed may be made in several parts, on several machines
    shard: int = 2_000
    seed: int = 0
    images_per_actor: int = 1  # photographs of one person, one after the other
    yaw_sd_deg: float = 22.0
    pitch_sd_deg: float = 11.0
    roll_sd_deg: float = 6.0
    hair: float = 0.85  # share of heads with hair
    glasses: float = 0.18
    occluder: float = 0.12
    ambient_low: float = 0.25  # least and greatest strength of the even light; the less, the harder the shadows
    ambient_high: float = 0.9
    jpeg_quality: int = 92

    def __post_init__(self) -> None:
        _check_positive(self, "count", "shard", "images_per_actor")
        if self.first < 0:
            raise ConfigError(f"first: expected 0 or above, got {self.first}")
        if not 0 <= self.ambient_low <= self.ambient_high:
            raise ConfigError(f"ambient: expected 0 <= low <= high, got {self.ambient_low} and {self.ambient_high}")
        _check_quality(self.jpeg_quality)


@dataclass(frozen=True)
class Pack:
    """Settings of `chebface data pack`: how folders of photographs of known heads become shards."""

    head: str = "flame2020"  # whose shape numbers the folders hold
    # auto: the photograph where it is there, else MICA's crop of it, which is black around the face. images, arcface:
    # only the one, or only the other.
    pictures: str = "auto"
    lists: str = ""  # folder of MICA's image lists, NAME.npy; "" for image_paths beside the datasets, if it is there
    detector: str = "auto"  # for photographs without landmarks
    held_out: float = 0.1  # share of the actors; 0 for none
    seed: int = 0  # of who is held out
    shard: int = 2_000
    jpeg_quality: int = 92

    def __post_init__(self) -> None:
        _check_positive(self, "shard")
        _check_quality(self.jpeg_quality)
        if self.pictures not in PICTURES:
            raise ConfigError(f"pictures: expected one of {', '.join(PICTURES)}, got {self.pictures!r}")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out: expected 0 or above and below 1, got {self.held_out}")


def load(kind: type[C], path: str | Path | None = None, overrides: Iterable[str] = ()) -> C:
    """Settle a configuration.

    Args:
        kind: one of the dataclasses here.
        path: a TOML file of flat `key = value` lines, or None.
        overrides: "key=value" texts, applied last. A `preset` among them comes before everything else.

    Raises:
        ConfigError: unreadable file, unknown key, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values.update(_read_toml(Path(path)))
    for text in overrides:
        key, found, value = text.partition("=")
        if not found:
            raise ConfigError(f"--set {text}: expected key=value")
        values[key.strip()] = value.strip()
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(hints))}")
    preset = PRESETS.get(str(values.get("preset", "")), {}) if "preset" in hints else {}
    return kind(**{key: _convert(key, value, hints[key]) for key, value in {**preset, **values}.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain values, for JSON."""
    return dataclasses.asdict(config)


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"settings file {path}: {error}") from error


def _convert(key: str, value: Any, want: type) -> Any:
    try:
        if want is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(value, str) and want is not str:
            return want(value)
        if want is float and type(value) is int:
            return float(value)
    except (ValueError, KeyError):
        raise ConfigError(f"{key}: expected {want.__name__}, got {value!r}") from None
    if type(value) is not want:
        raise ConfigError(f"{key}: expected {want.__name__}, got {value!r}")
    return value
