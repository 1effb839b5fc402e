"""Made-up photographs of a head whose 486 parameters are known.

A face is drawn from the head's own statistics, lit by a few lamps, given hair, clothes, a background, sometimes
glasses or something in front of it, then degraded as cameras and phones do. Sample i of a seed is always the same.
With K images per actor, samples i K to i K + K - 1 show one person, who differs in everything but shape and skin; the
first of them is what a dataset of one image per actor has at that number.

The picture is taken with mild perspective, as a phone would; pose and camera are those of the scaled orthographic
camera that fits it best, which is what the regressor can know.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from numpy.random import Generator

from chebface import camera as cam
from chebface import params
from chebface.config import Synthesize, to_dict
from chebface.crop import ARCFACE_POINTS_PX, WIDE_MATRIX, WIDE_PX, estimate_similarity, five_points, transform
from chebface.data.sample import INDEX, Sample, write_shard
from chebface.errors import AssetError
from chebface.files import write_whole
from chebface.heads import Head, open_head
from chebface.mesh import vertex_normals
from chebface.native import keep_freed_memory
from chebface.render import raster
from chebface.render.light import CONSTANTS, harmonics, irradiance

_BATCH = 16
_NOT_ALONE = {"jawOpen", "mouthClose", "unit-mouth-open"}  # the jaw joint opens the mouth; the second only corrects it
# where the five points belong in the wide frame, ndc
_TARGET = cam.px_to_ndc(transform(ARCFACE_POINTS_PX, WIDE_MATRIX), WIDE_PX, WIDE_PX)


class Painter:
    """Draws the samples of one head.

    Args:
        head: any head with masks; without texture_dirs every skin is the mean skin.
        config: what to vary.
    """

    def __init__(self, head: Head, config: Synthesize) -> None:
        from chebface.flame import Flame

        self.head, self.config = head, config
        self._flame = Flame(head)
        nothing = np.zeros(len(head.template), bool)
        self._eyes = head.masks.get("eyeballs", nothing)
        self._hair_reach = _soften(head.masks.get("scalp", nothing).astype(np.float32), head.faces, 6)
        self._actions = _pair_actions(head.expression_names)

    def paint(self, indices: range) -> list[Sample]:
        """Make the samples with these numbers."""
        draws = [np.random.default_rng([self.config.seed, index]) for index in indices]
        parameters = np.stack([self._draw_parameters(rng) for rng in draws])
        for drawn, index in zip(parameters, indices, strict=True):
            if again := index % self.config.images_per_actor:
                self._draw_identity(np.random.default_rng([self.config.seed, index - again]), drawn)
        vertices, landmarks = self._decode(parameters)
        actors = [str(index // self.config.images_per_actor) for index in indices]
        return [self._take(*each) for each in zip(draws, actors, parameters, vertices, landmarks, strict=True)]

    def _decode(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.inference_mode():
            vertices, landmarks = self._flame.decode(torch.from_numpy(parameters))
        return vertices.numpy(), landmarks.numpy()

    def _draw_parameters(self, rng: Generator) -> np.ndarray:
        drawn = np.zeros(params.TOTAL, np.float32)
        self._draw_identity(rng, drawn)
        parts = params.split(drawn)
        parts["expression"][:] = self._draw_expression(rng)
        wide = rng.random() < 0.15
        yaw, pitch, roll = np.radians(
            rng.normal(size=3) * (self.config.yaw_sd_deg, self.config.pitch_sd_deg, self.config.roll_sd_deg)
        ) * (1.6 if wide else 1.0)
        parts["pose"][params.HEAD_POSE] = _axis_angle(_turn(np.clip(yaw, -1.2, 1.2), np.clip(pitch, -0.7, 0.7), roll))
        if rng.random() < 0.4:
            parts["pose"][params.JAW_POSE] = rng.beta(1.2, 3) * 0.35, rng.normal() * 0.02, 0
        parts["light"][:] = _draw_light(rng, self.config.ambient_low, self.config.ambient_high).ravel()
        return drawn

    @staticmethod
    def _draw_identity(rng: Generator, parameters: np.ndarray) -> None:
        """Put a person into parameters (486,): what all photographs of them share."""
        parts = params.split(parameters)
        parts["shape"][:] = np.clip(rng.normal(size=params.PARTS["shape"]), -2.8, 2.8)
        parts["texture"][:] = np.clip(rng.normal(size=params.PARTS["texture"]), -2.5, 2.5)

    def _draw_expression(self, rng: Generator) -> np.ndarray:
        expression = np.zeros(params.PARTS["expression"])
        mood = rng.choice([0.0, 0.25, 0.6, 1.0], p=[0.25, 0.4, 0.25, 0.1])
        for group in self._actions:
            if rng.random() < 0.3:
                strength = rng.beta(1.1, 2.0) * mood
                sides = np.clip(strength * rng.normal(1, 0.25, len(group)), 0, 1)
                expression[group] = sides
        if not self.head.expression_names:  # a head whose expressions are statistical, as FLAME's
            expression = rng.normal(size=len(expression)) * mood
        return expression

    def _take(
        self, rng: Generator, actor: str, parameters: np.ndarray, vertices: np.ndarray, landmarks: np.ndarray
    ) -> Sample:
        """One photograph: set up the camera as a detector and crop.py would, then draw."""
        parts = params.split(parameters)
        middle = landmarks[17:].mean(0)
        distance = 1 / rng.uniform(1 / 3.0, 1 / 0.45)  # m from the camera

        def look(points: np.ndarray) -> np.ndarray:  # perspective, scaled to true size at the face's middle
            seen = points - middle
            return seen[..., :2] * (distance / (distance - seen[..., 2:]))

        # What the detector says: the five points with its own error, as crop.align would map them.
        seen = look(landmarks)
        noise = rng.normal(size=(5, 2)) * rng.choice([0.0008, 0.002, 0.004], p=[0.5, 0.35, 0.15])
        to_ndc = estimate_similarity(five_points(seen) + noise, _TARGET)
        ndc = transform(seen, to_ndc)
        landmarks_px = cam.ndc_to_px(ndc, WIDE_PX, WIDE_PX)

        # The similarity's rotation becomes part of the head's pose; scale and shift the camera's.
        spin = _turn(0, 0, math.atan2(to_ndc[1, 0], to_ndc[0, 0]))
        parts["pose"][params.HEAD_POSE] = _axis_angle(spin @ _matrix(parts["pose"][params.HEAD_POSE]))
        scale, tx, ty = _fit_camera(landmarks @ spin.T, ndc)
        # The layer turns about the root joint, not about the origin: shift by what that differs.
        root = self._root(parameters)
        shift = root - spin @ root
        parts["camera"][:] = scale, tx - shift[0], ty - shift[1]

        def place(points: np.ndarray) -> np.ndarray:  # pixels and depth of points turned by `spin`
            unspun = points @ spin
            flat = cam.ndc_to_px(transform(look(unspun), to_ndc), WIDE_PX, WIDE_PX)
            return np.hstack([flat, -points[:, 2:]])

        picture = self._draw(rng, parts, vertices @ spin.T, place, landmarks_px)
        return Sample(picture, actor, parts["shape"], parameters, landmarks_px.astype(np.float32))

    def _root(self, parameters: np.ndarray) -> np.ndarray:
        parts = params.split(parameters)
        blend = np.concatenate([parts["shape"], parts["expression"]])
        return (self._flame.joints.numpy() + blend @ self._flame.joint_dirs.numpy())[:3]

    def _draw(
        self,
        rng: Generator,
        parts: dict[str, np.ndarray],
        vertices: np.ndarray,
        place: Callable[[np.ndarray], np.ndarray],
        landmarks_px: np.ndarray,
    ) -> np.ndarray:
        head = self.head
        normals = vertex_normals(vertices, head.faces)
        albedo = head.texture_mean + np.tensordot(parts["texture"], head.texture_dirs, 1)
        albedo = albedo * (1 + _field(rng, vertices, 0.02) * rng.uniform(0, 0.08))[:, None]
        hair_colour = _draw_hair_colour(rng)
        has_hair = rng.random() < self.config.hair
        if has_hair:
            cover = np.clip((self._hair_reach + _field(rng, vertices, 0.03) * 0.12 - 0.35) * 5, 0, 1)
            cover[self._eyes] = 0
            strands = 1 + _field(rng, vertices, 0.006) * 0.35
            albedo = albedo * (1 - cover[:, None]) + hair_colour * strands[:, None] * cover[:, None]
            volume = cover * rng.gamma(2.0, 0.006) * (1 + 0.4 * _field(rng, vertices, 0.04))
            vertices = vertices + normals * volume[:, None]
        shade = irradiance(normals, parts["light"])
        colour = np.clip(albedo, 0.01, 1) * np.clip(shade, 0.02, None)
        colour += self._gloss(rng, normals, parts["light"])[:, None]
        canvas = _draw_background(rng)
        _draw_behind(rng, canvas, landmarks_px, hair_colour if has_hair else None)
        triangle, barycentric = raster.rasterize(place(vertices), head.faces, WIDE_PX, WIDE_PX)
        drawn = raster.interpolate(colour, head.faces, triangle, barycentric)
        picture = np.where((triangle >= 0)[..., None], drawn, canvas.astype(np.float32) / 255)
        return self._photograph(rng, picture, landmarks_px)

    def _gloss(self, rng: Generator, normals: np.ndarray, light: np.ndarray) -> np.ndarray:
        main = light.reshape(9, 3)[1:4].mean(1)
        half_way = main / (np.linalg.norm(main) + 1e-6) + (0, 0, 1)
        half_way = half_way / (np.linalg.norm(half_way) + 1e-6)
        strength = np.where(self._eyes, 0.8, rng.uniform(0, 0.25))
        return strength * np.clip(normals @ half_way, 0, 1) ** rng.uniform(12, 40)

    def _photograph(self, rng: Generator, picture: np.ndarray, landmarks_px: np.ndarray) -> np.ndarray:
        """From radiance to a file: glasses and occluders, exposure, blur, grain, compression."""
        from PIL import Image, ImageFilter

        picture = picture * (rng.uniform(0.75, 1.25) * rng.uniform(0.92, 1.08, 3)).astype(np.float32)
        tone = (np.linspace(0, 1, 256) ** rng.uniform(0.8, 1.2) * 255).astype(np.uint8)
        image = Image.fromarray(tone[(np.clip(picture, 0, 1) * 255).astype(np.uint8)])
        if rng.random() < 0.6:
            _draw_teeth(rng, image, landmarks_px)
        if rng.random() < self.config.glasses:
            _draw_glasses(rng, image, landmarks_px)
        if rng.random() < self.config.occluder:
            _draw_occluder(rng, image, landmarks_px)
        if rng.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.8)))
        if rng.random() < 0.2:
            small = int(rng.integers(60, 160))
            image = image.resize((small, small), Image.Resampling.BOX).resize(
                (WIDE_PX, WIDE_PX), Image.Resampling.BICUBIC
            )
        if rng.random() < 0.06:
            image = image.convert("L").convert("RGB")
        if rng.random() < 0.5:
            grain = rng.standard_normal((WIDE_PX, WIDE_PX, 1), np.float32) * np.float32(rng.uniform(1, 9))
            image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
        if rng.random() < 0.3:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=int(rng.integers(25, 80)))
            image = Image.open(file)
        return np.asarray(image)


def synthesize(
    folder: str | Path,
    config: Synthesize,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a dataset of shards; shards that are there already are kept, so an interrupted run goes on.

    Args:
        folder: made if it is not there.
        config: what to make.
        workers: processes; None means one per core.
        progress: called with samples done and samples in all.

    Returns:
        the index file, written last: a folder without it is not a dataset yet.

    Raises:
        AssetError: the folder holds another dataset.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head = open_head(config.head)
    about = {"settings": to_dict(config), "head": head.facts}
    plan = folder / "plan.json"
    if plan.is_file() and _begun(plan) != about:
        raise AssetError(f"dataset {folder}: was begun with other settings or another head; choose an empty folder")
    _write_json(plan, about)
    Painter(head, config)  # what is missing for it is missed here, not in every process of the pool
    starts = range(0, config.count, config.shard)
    names = [f"{start // config.shard:05d}.tar" for start in starts]
    missing = [(name, start) for name, start in zip(names, starts, strict=True) if not (folder / name).is_file()]
    done = config.count - sum(min(config.shard, config.count - start) for _, start in missing)
    with ProcessPoolExecutor(max_workers=workers or os.cpu_count(), initializer=be_single_threaded) as pool:
        jobs = [
            pool.submit(_make_shard, folder / name, config, start, min(config.shard, config.count - start))
            for name, start in missing
        ]
        try:
            for job in as_completed(jobs):
                done += job.result()
                if progress:
                    progress(done, config.count)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return _write_json(folder / INDEX, about | {"count": config.count, "shards": names})


def _begun(plan: Path) -> dict:
    """The plan of a folder; those of earlier versions do not name the settings that came later."""
    begun = json.loads(plan.read_text())
    return begun | {
        "settings": {"first": 0, "images_per_actor": 1, "ambient_low": 0.25, "ambient_high": 0.9} | begun["settings"]
    }


def be_single_threaded() -> None:
    """Begin a worker process: as many of them as there are cores, so each is to use one.

    Without it, NumPy's BLAS keeps a second core spinning for every worker, which halves the photographs a second.
    """
    import torch
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
    torch.set_num_threads(1)
    keep_freed_memory()


def _make_shard(path: Path, config: Synthesize, start: int, count: int) -> int:
    painter = Painter(open_head(config.head), config)
    begin, stop = config.first + start, config.first + start + count
    batches = (painter.paint(range(first, min(first + _BATCH, stop))) for first in range(begin, stop, _BATCH))
    return write_shard(path, (sample for batch in batches for sample in batch), config.jpeg_quality, start)


def _write_json(path: Path, content: dict) -> Path:
    return write_whole(path, json.dumps(content, indent=2).encode() + b"\n")


def _pair_actions(names: tuple[str, ...]) -> list[list[int]]:
    """Indices of named facial actions, left and right of one action together."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name in _NOT_ALONE:
            continue
        groups.setdefault(name.replace("Left", "").replace("Right", ""), []).append(index)
    return list(groups.values())


def _turn(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Rotation matrix: roll about z after pitch about x after yaw about y, radians."""
    (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return about_z @ about_x @ about_y


def _axis_angle(matrix: np.ndarray) -> np.ndarray:
    angle = math.acos(float(np.clip((np.trace(matrix) - 1) / 2, -1, 1)))
    axis = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]]) / 2
    return axis * (angle / math.sin(angle) if angle > 1e-6 else 1.0)  # heads never turn by 180 degrees


def _matrix(axis_angle: np.ndarray) -> np.ndarray:
    angle = float(np.linalg.norm(axis_angle))
    if angle < 1e-9:
        return np.eye(3)
    x, y, z = axis_angle / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def _fit_camera(points: np.ndarray, ndc: np.ndarray) -> tuple[float, float, float]:
    """Least squares s, tx, ty with ndc = s (xy + t), over (P, 3) and (P, 2)."""
    centre, target = points[:, :2].mean(0), ndc.mean(0)
    flat, wanted = points[:, :2] - centre, ndc - target
    scale = float((flat * wanted).sum() / (flat**2).sum())
    tx, ty = target / scale - centre
    return scale, float(tx), float(ty)


def _soften(values: np.ndarray, faces: np.ndarray, rounds: int) -> np.ndarray:
    """Average over triangles and back, some times. (N,) -> (N,)."""
    count = np.bincount(faces.ravel(), minlength=len(values)).clip(1)
    for _ in range(rounds):
        mean = values[faces].mean(1)
        values = np.bincount(faces.ravel(), np.repeat(mean, 3), minlength=len(values)) / count
    return values.astype(np.float32)


def _field(rng: Generator, points: np.ndarray, size: float) -> np.ndarray:
    """A smooth random field of unit variance over (N, 3) points, with structures of about `size` metres. (N,)."""
    waves = rng.normal(size=(3, 6)) / size
    return (math.sqrt(2 / 6) * np.cos(points @ waves + rng.uniform(0, 2 * math.pi, 6))).sum(1)


def _draw_light(rng: Generator, low: float, high: float) -> np.ndarray:
    """(9, 3) harmonics of an even light and one to three lamps, at an exposure a camera would choose."""
    ambient = rng.uniform(low, high)
    light = np.zeros((9, 3))
    light[0] = ambient * rng.uniform(0.9, 1.1, 3) / CONSTANTS[0]
    for _ in range(rng.integers(1, 4)):
        direction = rng.normal(size=3) * (1, 0.6, 0.7) + (0, 0.5, 0.5)
        direction = direction / np.linalg.norm(direction)
        lamp = rng.uniform(0.1, 0.8) * rng.uniform(0.88, 1.12, 3)
        light += _lamp(direction)[:, None] * lamp
    frontal = float(irradiance(np.array([[0.0, 0.0, 1.0]]), light).mean())
    return light * (rng.uniform(0.65, 1.15) / max(frontal, 0.2))


def _lamp(direction: np.ndarray) -> np.ndarray:
    """(9,) coefficients of a far lamp of unit strength: irradiance max(0, n . direction), as nine harmonics can."""
    lobe = np.array([1 / math.pi] + [2 * math.pi / 3] * 3 + [math.pi / 4] * 5)  # the first is not in CONSTANTS
    return harmonics(direction) / lobe


def _draw_hair_colour(rng: Generator) -> np.ndarray:
    kinds = np.array(
        [
            (0.03, 0.025, 0.02),
            (0.12, 0.07, 0.04),
            (0.3, 0.19, 0.1),
            (0.6, 0.47, 0.3),
            (0.35, 0.14, 0.06),
            (0.6, 0.6, 0.6),
        ]
    )
    return np.clip(kinds[rng.choice(6, p=[0.34, 0.26, 0.15, 0.1, 0.04, 0.11])] * rng.uniform(0.6, 1.4), 0.01, 0.95)


def _draw_background(rng: Generator) -> np.ndarray:
    """(224, 224, 3) uint8: coarse random colours enlarged, sometimes with straight things in it."""
    from PIL import Image, ImageDraw

    cells = int(rng.integers(1, 12))
    spread = rng.uniform(0, 90)
    grey, tint = rng.normal(size=(cells, cells, 1)), rng.normal(size=(cells, cells, 3)) * rng.uniform(0, 0.7)
    coarse = np.clip(_any_colour(rng) + (grey + tint) * spread, 0, 255).astype(np.uint8)
    smooth = Image.Resampling.BICUBIC if rng.random() < 0.7 else Image.Resampling.NEAREST
    image = Image.fromarray(coarse).resize((WIDE_PX, WIDE_PX), smooth)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.poisson(1.5)):
        corners = [tuple(p) for p in rng.uniform(-40, WIDE_PX + 40, (int(rng.integers(3, 5)), 2))]
        draw.polygon(corners, fill=_any_colour(rng))
    return np.array(image)


def _draw_behind(rng: Generator, canvas: np.ndarray, landmarks_px: np.ndarray, hair: np.ndarray | None) -> None:
    """Shoulders, and long hair behind the head, onto the canvas."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    chin, middle = landmarks_px[8], landmarks_px[27]
    if hair is not None and rng.random() < 0.4:
        half_width, top = rng.uniform(55, 85), rng.uniform(40, 85)
        box = (middle[0] - half_width, middle[1] - top, middle[0] + half_width, chin[1] + rng.uniform(-20, 90))
        draw.rounded_rectangle(box, radius=half_width * 0.8, fill=_to_fill(hair * rng.uniform(0.6, 1.1)))
    left, right = rng.uniform(50, 110, 2)
    top = chin[1] + rng.uniform(18, 45)
    neck = rng.uniform(20, 40)
    outline = [(chin[0] - neck, top), (chin[0] + neck, top), (chin[0] + right, top + 40), (chin[0] + right, 300)]
    draw.polygon([*outline, (chin[0] - left, 300), (chin[0] - left, top + 40)], fill=_any_colour(rng))
    canvas[:] = np.asarray(image)


def _draw_teeth(rng: Generator, image, landmarks_px: np.ndarray) -> None:
    """Upper teeth in an open mouth; the mesh has none."""
    from PIL import ImageDraw

    upper, lower = landmarks_px[60:65], landmarks_px[[60, 67, 66, 65, 64]]
    if np.linalg.norm(upper[2] - lower[2]) < 3:
        return
    edge = upper + (lower - upper) * rng.uniform(0.3, 0.9)
    shade = np.asarray(image)[int(np.clip(landmarks_px[33, 1], 0, WIDE_PX - 1)), :, :].max() / 255
    white = np.array([0.95, 0.92, 0.86]) * min(1.0, float(shade) * rng.uniform(0.7, 1.1))
    ImageDraw.Draw(image).polygon([tuple(p) for p in [*upper, *edge[::-1]]], fill=_to_fill(white))


def _draw_glasses(rng: Generator, image, landmarks_px: np.ndarray) -> None:
    from PIL import Image, ImageDraw

    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    right, left = landmarks_px[36:42].mean(0), landmarks_px[42:48].mean(0)
    half = np.array([np.linalg.norm(landmarks_px[39] - landmarks_px[36]) * rng.uniform(0.75, 1.05), 0])
    half[1] = max(half[0] * rng.uniform(0.7, 1.0), 9)
    frame = (*_to_fill(rng.uniform(0, 0.5) * rng.uniform(0.5, 1, 3)), 255)
    tint = (*_any_colour(rng), int(rng.choice([0, 20, 200], p=[0.5, 0.3, 0.2])))
    width = int(rng.integers(1, 5))
    shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
    for eye in (right, left):
        shape((*(eye - half), *(eye + half)), fill=tint, outline=frame, width=width)
    draw.line([(right[0] + half[0], right[1]), (left[0] - half[0], left[1])], fill=frame, width=width)
    image.paste(layer, mask=layer)


def _draw_occluder(rng: Generator, image, landmarks_px: np.ndarray) -> None:
    """A mask, a hand-like blob or a slab over part of the face."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(image)
    colour = _any_colour(rng) if rng.random() < 0.6 else _to_fill(np.array([0.8, 0.6, 0.5]) * rng.uniform(0.3, 1.1))
    if rng.random() < 0.3:
        draw.polygon([tuple(p) for p in [*landmarks_px[2:15], landmarks_px[28]]], fill=colour)
        return
    centre = landmarks_px[rng.integers(0, 68)] + rng.normal(size=2) * 12
    half = rng.uniform(12, 45, 2)
    turn = rng.uniform(0, math.pi)
    angles = np.linspace(0, 2 * math.pi, int(rng.integers(4, 14)), endpoint=False) + turn
    ring = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * half * rng.uniform(0.8, 1.2, (len(angles), 1))
    draw.polygon([tuple(p) for p in ring], fill=colour)


def _any_colour(rng: Generator) -> tuple[int, int, int]:
    vividness = rng.beta(1, 2.5)  # most things are greyish
    return _to_fill(rng.random() * (1 - vividness) + rng.random(3) * vividness)


def _to_fill(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (np.clip(colour, 0, 1) * 255).astype(int).tolist()
    return red, green, blue
