"""What the paper's losses buy, on data that anyone can make: three presets, equal budgets, scored by the NoW engine.

Every run fine-tunes the same backbone with a new mapping network, as the paper does. Training knows soft light, nearly
frontal heads and no occluders; the held-out faces are other people in four photographs each: like the training's,
under hard light, turned far, and occluded. A scan is the person's neutral head, cut finer, with a scanner's noise.

One row per preset and seed, one for the mean head, then paired bootstraps over people, with all photographs and seeds.
On request also REMEDIES, `ours` with one thing changed, and rows that say why it stands where it stands: how each term
pulls on the shape, and how well the mesh encoder's distance orders heads by their error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.record import where
from chebface import checkpoint, losses, params
from chebface.config import Synthesize, TrainEncoder, TrainReconstructor, load
from chebface.data.batches import collate
from chebface.data.sample import Shards
from chebface.data.synthetic import synthesize
from chebface.encoder import descriptor_distance
from chebface.flame import Flame
from chebface.heads import Head, open_head
from chebface.mesh import write_obj, write_ply
from chebface.now import metric
from chebface.now.compare import compare
from chebface.now.dataset import Dataset, Shot, head_landmarks
from chebface.now.run import read_distances, score
from chebface.regressor import normalize_crop
from chebface.train import build_objective, train_reconstructor
from chebface.train_encoder import train_encoder

PRESETS = ("ours", "mica", "deca")
SHARP = "sharp"  # in place of a file: an encoder trained here, by SHARP_ENCODER
# `ours` with one thing changed each. A tenth of the paper's lambda_2d brings the picture's pull on the parameters down
# to the vertices'.
REMEDIES: dict[str, dict[str, Any]] = {
    "no 2D": {"lambda_2d": 0.0},
    "no 2D, 3D-ID fourfold": {"lambda_2d": 0.0, "lambda_descriptor": 2.0},
    "no 2D, sharp code": {"lambda_2d": 0.0, "encoder": SHARP},
    "tenth of 2D": {"lambda_2d": 0.04},
}
SHARP_ENCODER = {"code": 32, "frame": "whitened", "epochs": 15, "decay": 0.8} | {  # the rest is the shipped encoder's
    "learning_rate": 1e-3,
    "std_floor": 1e-3,
    "noise": 5e-4,
}
MEAN_HEAD = "mean head"
TRAINING = {"yaw_sd_deg": 12, "pitch_sd_deg": 6, "occluder": 0, "glasses": 0, "ambient_low": 0.45, "shard": 1000}
CHALLENGES: dict[str, dict[str, Any]] = {
    "identities": TRAINING,
    "lights": TRAINING | {"ambient_low": 0.0, "ambient_high": 0.12},
    "poses": TRAINING | {"yaw_sd_deg": 40, "pitch_sd_deg": 18},
    "occlusions": TRAINING | {"occluder": 1, "glasses": 0.3},
}
HELD_OUT_SEED = 1000  # of the people; training has 0
# The paper's settings but for the optimiser, which is the demo weights', and the identity loss, which wants a face
# recognition network that nobody gives away freely.
SETTINGS: dict[str, Any] = {
    "backbone": "light",
    "images_per_actor": 2,
    "optimizer": "muon",
    "learning_rate": 1e-3,
    "muon_learning_rate": 0.01,
    "warmup_steps": 20,
    "final_learning_rate": 0.01,
    "weight_identity": 0,
    "precision": "bf16",
    "log_every": 10,
    "save_every": 100,
}
SCANNER_NOISE_MM = 0.1
REASONS = 512  # training photographs that the pulls are measured on
Say = Callable[[str], None]


def measure(
    work: Path,
    *,
    steps: int = 400,
    actors: int = 32,
    subjects: int = 100,
    seeds: Sequence[int] = (0, 1, 2),
    settings: dict[str, Any] | None = None,
    presets: Sequence[str] = PRESETS,
    remedies: bool = False,
    jobs: int = 1,
    device: str = "cpu",
    say: Say = lambda line: None,
) -> list[dict[str, Any]]:
    """Train, predict and score; what is in `work` already is kept, so an interrupted run goes on.

    Args:
        work: folder for data, runs, predictions and reports.
        steps: of each run.
        actors: in a batch, two photographs each.
        subjects: held-out people.
        seeds: of each preset.
        settings: of the training, over SETTINGS.
        presets: of config.PRESETS; the first is compared with the others.
        remedies: whether to run REMEDIES too; each is then compared with every preset, and the reasons are measured.
        jobs: processes for scoring.
        device: to train on.
        say: called with one line per stage.

    Raises:
        ChebfaceError: what the stages raise, a folder of other settings above all.
    """
    head = open_head()
    say("making photographs")
    synthesize(work / "train", _photos(TRAINING, seed=0, count=2 * actors * steps, images_per_actor=2))
    for name, challenge in CHALLENGES.items():
        synthesize(work / "held-out" / name, _photos(challenge, seed=HELD_OUT_SEED, count=subjects))
    backbone = work / "backbone.pth"
    if not backbone.exists():
        torch.save(checkpoint.load_regressor()[0].backbone.state_dict(), backbone)
    shots = [Shot(f"{k:04d}", name, f"{seed}.jpg") for k in range(subjects) for name in CHALLENGES for seed in seeds]
    dataset = Dataset(work / "now", "now", tuple(shots), tuple(CHALLENGES))
    _write_scans(dataset, work / "held-out" / "identities", head)
    encoder = _train_sharp(work, say) if remedies else None
    ways = {name: {"preset": name} for name in presets} | (REMEDIES if remedies else {})
    configs: dict[tuple[str, int], TrainReconstructor] = {}
    for name, changed in ways.items():
        for seed in seeds:
            values = SETTINGS | (settings or {}) | changed | {"seed": seed, "steps": steps, "batch": actors}
            values |= {"backbone_weights": backbone} | ({"encoder": encoder} if "encoder" in changed else {})
            config = load(TrainReconstructor, None, [f"{key}={value}" for key, value in values.items()])
            say(f"training {name}, seed {seed}")
            run = work / "runs" / f"{name}-{seed}"
            weights = train_reconstructor(config, work / "train", run, device=device)
            _predict(weights, work, work / "predictions" / name, seed, head)
            configs[name, seed] = config
    for seed in seeds:
        _predict(None, work, work / "predictions" / MEAN_HEAD, seed, head)
    reports = {}
    for name in (*ways, MEAN_HEAD):
        for metrical in (False, True):
            say(f"scoring {name}, {'metrical' if metrical else 'non-metrical'}")
            reports[name, metrical] = work / "reports" / f"{name}{'-metrical' if metrical else ''}"
            score(
                work / "predictions" / name,
                dataset,
                reports[name, metrical],
                head_landmarks(head),
                method=name,
                metrical=metrical,
                unit="m",
                jobs=jobs,
            )
    common = {"bench": "ablation", "steps": steps, "photos": 2 * actors * steps, "subjects": subjects, **where()}
    rows = [
        common | {"case": "errors", "preset": name, "seed": seed} | _errors(reports, name, seed, dataset)
        for name in (*ways, MEAN_HEAD)
        for seed in (seeds if name != MEAN_HEAD else seeds[:1])
    ]
    pairs = [(presets[0], other) for other in presets[1:]]
    pairs += [(name, other) for name in ways if name not in presets for other in presets]
    rows += [
        common | {"case": "bootstrap", "a": a, "b": b, "metrical": metrical} | row
        for a, b in pairs
        for metrical in (False, True)
        for row in _differences(reports[a, metrical], reports[b, metrical])
    ]
    if remedies:
        say("measuring pulls and codes")
        name, seed = presets[0], seeds[0]
        weights = work / "runs" / f"{name}-{seed}" / "regressor.safetensors"
        rows += [common | row for row in _reasons(configs[name, seed], weights, encoder, work, head)]
    return rows


def _train_sharp(work: Path, say: Say) -> Path:
    say("training a sharper mesh encoder")
    config = load(TrainEncoder, None, [f"{key}={value}" for key, value in SHARP_ENCODER.items()])
    return train_encoder(config, work / "encoder")


def _photos(values: dict[str, Any], **more: Any) -> Synthesize:
    return load(Synthesize, None, [f"{key}={value}" for key, value in (values | more).items()])


def _write_scans(dataset: Dataset, data: Path, head: Head) -> None:
    """The held-out people as scans (mm) with their seven landmarks, where NoW has them."""
    flame, source = Flame(head), head_landmarks(head)
    with Shards(data) as shards:
        for index in range(len(shards)):
            subject = f"{index:04d}"
            scan = dataset.folder / "scans" / subject / "scan.obj"
            marks = dataset.folder / "scans_lmks_onlypp" / subject / "scan.pp"
            if marks.exists():
                continue
            vertices = 1000 * flame.neutral(torch.tensor(shards[index].shape)[None])[0].double().numpy()
            points, faces = _cut_finer(vertices, head.faces)
            noise = np.random.default_rng([HELD_OUT_SEED, index]).normal(size=points.shape)
            write_obj(scan, points + SCANNER_NOISE_MM * noise, faces)
            marks.parent.mkdir(parents=True, exist_ok=True)
            rows = [f'<point x="{x:.6f}" y="{y:.6f}" z="{z:.6f}"/>' for x, y, z in source.locate(vertices, head.faces)]
            marks.write_text("\n".join(rows) + "\n")


def _cut_finer(points: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every triangle in four."""
    sides = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]], axis=2)
    edges, place = np.unique(sides.reshape(-1, 2), axis=0, return_inverse=True)
    ab, bc, ca = (len(points) + place.reshape(-1, 3)).T
    a, b, c = faces.T
    quarters = [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
    return np.concatenate([points, points[edges].mean(1)]), np.concatenate([np.stack(q, 1) for q in quarters])


def _predict(weights: Path | None, work: Path, output: Path, seed: int, head: Head) -> None:
    """The neutral head of every held-out photograph; the mean head where there are no weights."""
    flame = Flame(head)
    model = None if weights is None else checkpoint.load_regressor(weights)[0]
    for challenge in CHALLENGES:
        for first, crops in _crops(work / "held-out" / challenge):
            paths = [output / f"{first + k:04d}" / challenge / f"{seed}.ply" for k in range(len(crops))]
            if all(path.exists() for path in paths):
                continue
            with torch.inference_mode():
                shape = torch.zeros(len(crops), params.PARTS["shape"])
                if model is not None:
                    shape = params.split(model(normalize_crop(crops)))["shape"]
                for path, vertices in zip(paths, flame.neutral(shape).numpy(), strict=True):
                    write_ply(path, vertices, head.faces)


def _crops(data: Path, batch: int = 50) -> Iterator[tuple[int, torch.Tensor]]:
    with Shards(data) as shards:
        for first in range(0, len(shards), batch):
            yield first, collate([shards[k] for k in range(first, min(first + batch, len(shards)))]).crop


def _reasons(
    config: TrainReconstructor, weights: Path, sharp: Path | None, work: Path, head: Head
) -> Iterator[dict[str, Any]]:
    """Of a trained run, on training photographs: how each term pulls on the shape, norm and cosine with the vertices'
    pull; on held-out ones: Spearman's correlation of each encoder's distance with the vertex loss."""
    model = checkpoint.load_regressor(weights)[0]
    objective = build_objective(head, config)
    pulls: dict[str, list[torch.Tensor]] = {}
    with Shards(work / "train") as shards:
        count = min(len(shards), REASONS)
        for first in range(0, count, 16):
            batch = collate([shards[k] for k in range(first, min(first + 16, count))], wide=objective.wants_pictures)
            with torch.inference_mode():
                found = model(normalize_crop(batch.crop))
            predicted = found.clone().requires_grad_()
            for name, part in objective(predicted, batch)[1].items():
                (pull,) = torch.autograd.grad(part, predicted, retain_graph=True, allow_unused=True)
                pull = torch.zeros_like(predicted) if pull is None else pull
                pulls.setdefault(name, []).append(objective.weights[name] * pull)
    whole = {name: torch.cat(parts) for name, parts in pulls.items()}
    shapes = {name: params.split(pull)["shape"].flatten() for name, pull in whole.items()}
    for name, pull in shapes.items():
        cosine = torch.nn.functional.cosine_similarity(pull, shapes["vertices"], dim=0)
        yield {
            "case": "pull",
            "term": name,
            "norm": round(float(whole[name].norm()), 5),
            "norm_on_shape": round(float(pull.norm()), 5),
            "cosine_with_vertices": round(float(cosine), 4),
        }
    flame, regions = Flame(head), losses.region_weights(head)
    encoders = {path: checkpoint.load_encoder(path)[0].encoder for path in (None, sharp)}
    errors: list[float] = []
    distances: dict[Path | None, list[float]] = {path: [] for path in encoders}
    with Shards(work / "held-out" / "identities") as shards, torch.inference_mode():
        truth = flame.neutral(torch.stack([torch.tensor(shards[k].shape) for k in range(len(shards))]))
    for challenge in CHALLENGES:
        for first, crops in _crops(work / "held-out" / challenge):
            with torch.inference_mode():
                guess = flame.neutral(params.split(model(normalize_crop(crops)))["shape"])
                known = truth[first : first + len(crops)]
                errors += [float(losses.vertices(a, b, regions)) for a, b in zip(guess, known, strict=True)]
                for path, encoder in encoders.items():
                    distances[path] += descriptor_distance(encoder(guess), encoder(known)).tolist()
    for path, found in distances.items():
        order, found_order = (np.argsort(np.argsort(values)).astype(float) for values in (errors, found))
        rank = float(np.corrcoef(order, found_order)[0, 1])
        yield {"case": "code", "encoder": "shipped" if path is None else SHARP, "rank_correlation": round(rank, 3)}


def _errors(reports: dict[tuple[str, bool], Path], name: str, seed: int, dataset: Dataset) -> dict[str, Any]:
    """Median, mean and std of one preset and seed, non-metrical and metrical, of all photographs and by challenge."""
    row: dict[str, Any] = {}
    for metrical in (False, True):
        prefix = "metrical_" if metrical else ""
        for challenge in (None, *CHALLENGES):
            shots = [s for s in dataset.shots if Path(s.file).stem == str(seed) and challenge in (None, s.challenge)]
            found = metric.summarize(np.concatenate(read_distances(reports[name, metrical], shots)))
            for what in ("median_mm", "mean_mm", "std_mm") if challenge is None else ("median_mm",):
                row[f"{prefix}{what}" if challenge is None else f"{prefix}{challenge}_{what}"] = round(found[what], 4)
    return row


def _differences(ours: Path, other: Path) -> Iterator[dict[str, Any]]:
    result = compare(ours, other)
    for challenge, group in result["challenges"].items():
        for what in ("median", "mean") if challenge == "all" else ("median",):
            numbers = {key: None if v is None else round(v, 5) for key, v in group[what].items()}
            yield {
                "challenge": challenge,
                "what": what,
                "images": group["images"],
                "rounds": result["rounds"],
                **numbers,
            }
