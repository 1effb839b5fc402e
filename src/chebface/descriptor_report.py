"""What the mesh descriptor knows: a report by command, as JSON and pictures.

- Reconstruction in mm, by region, beside as many principal components of the same meshes.
- Cosine between descriptors of one person (scan noise, other expressions) and of two people.
- What the 3D identity loss, 1 - cos, makes of a smooth change of 1 mm at nose, jaw and brow; beside it, the same
  energy spread over all vertices as noise, and another person.

The code is linear, so its origin and axes are free and only cosines depend on them: everything is given for the code
as it was learned (raw), about the mean person (centered), and with unit covariance (whitened). The setting `frame`
chooses one. Beside them stand the first principal components (pca) and the meshes themselves (vertices), both about
the mean: what the code loses, and what a cosine loses whatever it compares.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chebface import checkpoint
from chebface.config import ENCODER_FRAMES
from chebface.data.meshes import Meshes, sample_head
from chebface.encoder import MeshAutoencoder, descriptor_distance
from chebface.errors import AssetError
from chebface.files import write_whole
from chebface.heads import Head
from chebface.mesh import vertex_normals
from chebface.render import chart
from chebface.train_encoder import (
    assess,
    encode_all,
    error_map,
    frame_of,
    principal_components,
    recall,
)

PLACES = {"nose": 30, "jaw": 8, "brow": 21}  # the landmark in the change's middle: tip, chin, a brow's inner end
PEAK = 0.001  # m, along the normal
REACH = 0.012  # m: the standard deviation of the change's bell
NOISE = 0.0005  # m per coordinate: what a good scanner leaves
PEOPLE = 200
EXPRESSIONS = 3
FEW = 40  # people whose meshes are changed
SEED = 4
NEW = 1_000_000  # index of the first person: nobody in any training
BLIND = 1e-4  # of the distance to another person: a change below this hardly moves the loss
STEADY = 0.95  # cosine that one person should keep under scan noise
KINDS = (*ENCODER_FRAMES, "pca", "vertices")


def report(weights: str | Path | None, output: str | Path, *, meshes: str | Path | None = None) -> dict[str, Any]:
    """Write descriptor.json, descriptor.png and error_map.png.

    Args:
        weights: a checkpoint of `train_encoder`, or None for the shipped one.
        output: the folder.
        meshes: the folder that it was trained on; None where it was trained on a sampled head.

    Returns:
        What descriptor.json holds: `reconstruction` (as `evaluate_encoder`), `cosines` and `sensitivity` by kind of
        code, and `findings`, sentences.

    Raises:
        AssetError: weights that cannot be read, meshes that they were not trained on, or a topology without a head.
    """
    output = Path(output)
    model, card = checkpoint.load_encoder(weights)
    material = recall(card, meshes)
    head = material.head
    if head is None:
        raise AssetError("the report wants the head of the meshes' topology, for its landmarks and regions; set head")
    describe = _Describer(model, card, material.train)
    reconstruction, maps = assess(model, material)
    cosines = _compare(describe, head, material.held_out)
    found: dict[str, Any] = {
        "head": head.name,
        "code": model.code,
        "frame": card["training"]["frame"],
        "reconstruction": reconstruction,
        "cosines": {frame: {name: _sum_up(row) for name, row in rows.items()} for frame, rows in cosines.items()},
        "sensitivity": _probe(describe, head, material.held_out),
    }
    found["findings"] = _conclude(found)
    content = io.BytesIO()
    _draw(found, cosines[found["frame"]]).save(content, "PNG")
    error_map(output / "error_map.png", material, maps)
    write_whole(output / "descriptor.png", content.getvalue())
    write_whole(output / "descriptor.json", json.dumps(found, indent=2).encode() + b"\n")
    return found


class _Describer:
    """Meshes to codes of every kind."""

    def __init__(self, model: MeshAutoencoder, card: dict[str, Any], train: Meshes) -> None:
        self.model = model
        self.origin = torch.tensor(card["frame"]["origin"])
        self.back = torch.linalg.inv(torch.tensor(card["frame"]["matrix"]))
        codes = self._raw(train.vertices)
        self.frames = {name: frame_of(codes, name) for name in ENCODER_FRAMES}
        self.mean, self.components = principal_components(train.vertices, model.code)

    def _raw(self, vertices: np.ndarray) -> Tensor:
        return encode_all(self.model, vertices) @ self.back.T + self.origin

    def __call__(self, vertices: np.ndarray) -> dict[str, Tensor]:
        """Vertices (S, N, 3) m to (S, code) by kind; of kind "vertices", (S, 3N)."""
        raw = self._raw(vertices)
        away = torch.from_numpy((vertices - self.mean).reshape(len(vertices), -1))
        codes = {name: (raw - origin) @ matrix.T for name, (matrix, origin) in self.frames.items()}
        return codes | {"pca": away @ torch.from_numpy(self.components).T, "vertices": away}


def _compare(describe: _Describer, head: Head, held_out: Meshes) -> dict[str, dict[str, np.ndarray]]:
    """Cosines by kind of code and of pair. People are new ones of the head, and those of the folder where it has more
    than one mesh of a person."""
    rng = np.random.default_rng(SEED)
    plain = sample_head(head, PEOPLE, seed=SEED, first=NEW).vertices
    moved = sample_head(head, PEOPLE, seed=SEED, first=NEW, expressions=EXPRESSIONS, strength=1.0).vertices
    noisy = plain + NOISE * rng.standard_normal(plain.shape, np.float32)
    one, again, other = describe(plain), describe(noisy), describe(moved)
    mates = [
        (i, j)
        for i in range(len(held_out))
        for j in range(i + 1, len(held_out))
        if held_out.actors[i] == held_out.actors[j]
    ]
    folder = describe(held_out.vertices) if mates else {}
    shift = 1 + rng.integers(0, PEOPLE - 1, PEOPLE)
    stranger = (np.arange(PEOPLE) + shift) % PEOPLE
    rows: dict[str, dict[str, np.ndarray]] = {}
    for frame in KINDS:
        code, with_expression = one[frame], other[frame].unflatten(0, (PEOPLE, EXPRESSIONS))
        pairs = {
            "same person, noise": (code, again[frame]),
            "same person, expression": (code[:, None].expand_as(with_expression), with_expression),
            "other person": (code, code[stranger]),
        }
        if mates:
            first, second = np.array(mates).T
            pairs["same person, other mesh"] = (folder[frame][first], folder[frame][second])
        rows[frame] = {name: (1 - descriptor_distance(a, b)).flatten().numpy() for name, (a, b) in pairs.items()}
    return rows


def _sum_up(cosines: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(cosines, (5, 50, 95))
    return {"mean": _round(cosines.mean()), "p5": _round(low), "p50": _round(middle), "p95": _round(high)}


def bell(head: Head, vertices: np.ndarray, landmark: int) -> np.ndarray:
    """A smooth change (N, 3) in metres of a mesh (N, 3): 1 mm outward at a landmark, a bell of 12 mm around it."""
    corners = head.faces[head.landmark_triangles[landmark]]
    middle = head.landmark_barycentric[landmark] @ vertices[corners]
    square = ((vertices - middle) ** 2).sum(1)
    height = PEAK * np.exp(-square / (2 * REACH**2))
    return np.asarray(height[:, None] * vertex_normals(vertices, head.faces), np.float32)


def _probe(describe: _Describer, head: Head, held_out: Meshes) -> dict[str, Any]:
    """Mean 1 - cos by kind of code and place: of the change, of its energy as noise, of another person."""
    rng = np.random.default_rng(SEED)
    still = held_out.vertices[:FEW]
    before = describe(still)
    strangers = {frame: descriptor_distance(code, code.roll(1, 0)).mean() for frame, code in before.items()}
    rows: dict[str, Any] = {frame: {} for frame in KINDS}
    for place, landmark in PLACES.items():
        change = np.stack([bell(head, mesh, landmark) for mesh in still])
        noise = rng.standard_normal(change.shape, np.float32)
        noise *= np.linalg.norm(change, axis=(1, 2), keepdims=True) / np.linalg.norm(noise, axis=(1, 2), keepdims=True)
        with_change, with_noise = describe(still + change), describe(still + noise)
        for frame in KINDS:
            local = float(descriptor_distance(before[frame].double(), with_change[frame].double()).mean())
            spread = float(descriptor_distance(before[frame].double(), with_noise[frame].double()).mean())
            rows[frame][place] = {
                "local": _round(local),
                "noise": _round(spread),
                "local_over_noise": _round(local / max(spread, 1e-15)),
                "local_over_other_person": _round(local / max(float(strangers[frame]), 1e-15)),
            }
        for frame in KINDS:
            rows[frame]["other_person"] = _round(float(strangers[frame]))
    return rows


def _conclude(found: dict[str, Any]) -> list[str]:
    frame, rebuilt = found["frame"], found["reconstruction"]
    seen, pairs = found["sensitivity"][frame], found["cosines"][frame]
    text = [
        f"Through {found['code']} numbers, held-out people come back to {rebuilt['mm']['all']:.2f} mm "
        f"({rebuilt['pca_mm']['all']:.2f} mm with as many principal components, {rebuilt['mean_mm']['all']:.2f} mm "
        "with the mean head)."
    ]
    raw, other = found["cosines"]["raw"]["other person"], pairs["other person"]
    text.append(
        f"Two people have a cosine of {other['mean']:.2f} on average in the frame {frame!r} ({raw['mean']:.2f} raw); "
        f"one person with scan noise {pairs['same person, noise']['mean']:.4f}, with expressions "
        f"{pairs['same person, expression']['mean']:.2f}."
    )
    if pairs["same person, noise"]["mean"] < STEADY:
        text.append(
            f"Noise of {1000 * NOISE:g} mm moves the code as another person does: coordinates that hardly vary over "
            "the training meshes are blown up by their standard deviation. Settings against it: std_floor (1e-3), "
            "noise."
        )
    if pairs["same person, expression"]["p5"] < other["p95"]:
        text.append(
            "Expressions move the code by as much as some identities differ: compare heads without expression and "
            "pose, as the identity loss does by default."
        )
    for place in PLACES:
        row, whole = seen[place], found["sensitivity"]["vertices"][place]
        times = whole["local_over_other_person"] / max(row["local_over_other_person"], 1e-15)
        line = (
            f"1 mm at the {place} costs {row['local']:.1e}, {row['local_over_other_person']:.1e} of what another "
            f"person costs, {times:.0f} times less than a cosine of whole meshes would make of it; the same energy as "
            f"noise costs {row['noise']:.1e}"
        )
        text.append(line + (", more than the change." if row["local_over_noise"] < 1 else "."))
    if any(seen[place]["local_over_other_person"] < BLIND for place in PLACES):
        text.append(
            "So the loss is all but blind to local changes of 1 mm: 1 - cos is flat at its minimum, where a change "
            "counts by its square, and few numbers hold only what heads differ in most. Leave such detail to the "
            'vertex loss, or take settings that sharpen the code: code = 32 with frame = "whitened" (on the open head '
            "4 to 50 times as sensitive as 8 numbers, for a cosine that expressions lower more)."
        )
    return text


def _draw(found: dict[str, Any], cosines: dict[str, np.ndarray]) -> Any:
    rebuilt, frame = found["reconstruction"], found["frame"]
    names = list(rebuilt["mm"])
    first = chart.bars(
        f"Reconstruction of held-out people through {found['code']} numbers, mm",
        names,
        {"autoencoder": [rebuilt["mm"][n] for n in names], "PCA": [rebuilt["pca_mm"][n] for n in names]},
    )
    second = chart.histograms(f"Cosine of descriptors, {frame}", cosines, (-1.0, 1.0))
    places = list(PLACES)
    seen = found["sensitivity"][frame]
    third = chart.bars(
        f"1 - cos of a 1 mm change, {frame} (another person: {seen['other_person']:.2f})",
        places,
        {"local": [seen[p]["local"] for p in places], "as noise": [seen[p]["noise"] for p in places]},
        log=True,
    )
    return chart.stack([first, second, third])


def _round(value: float) -> float:
    return float(f"{value:.4g}")
