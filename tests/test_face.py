from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from chebface import crop, mesh, params
from chebface.detect import Detection
from chebface.errors import InputError, PhotoError
from chebface.face import Face, project_to_photo

HEIGHT, WIDTH = 300, 400
# Photo to aligned crop: turned by 10 degrees and halved; the wide frame lies inside the photo.
TURN = np.deg2rad(10)
MATRIX = 0.5 * np.array([[np.cos(TURN), -np.sin(TURN), 0], [np.sin(TURN), np.cos(TURN), 0]])
MATRIX[:, 2] = (55.5, 60.0) - MATRIX[:, :2] @ (200.0, 150.0)


def _ball(rows=24, columns=32, radius=0.09):
    """A closed ball with its poles up and down."""
    t = np.linspace(0, np.pi, rows + 2)[1:-1]
    u = np.arange(columns) * 2 * np.pi / columns
    rings = np.stack(
        [np.outer(np.sin(t), np.sin(u)), np.outer(np.cos(t), np.ones(columns)), np.outer(np.sin(t), np.cos(u))], -1
    )
    vertices = np.concatenate([[[0, 1, 0]], rings.reshape(-1, 3), [[0, -1, 0]]]) * radius
    at = 1 + np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = at[:-1], np.roll(at[:-1], -1, 1), at[1:], np.roll(at[1:], -1, 1)
    sides = np.concatenate([np.stack([a, c, b], -1).reshape(-1, 3), np.stack([b, c, d], -1).reshape(-1, 3)])
    top = np.stack([np.zeros(columns, int), at[0], np.roll(at[0], -1)], -1)
    bottom = np.stack([np.full(columns, rows * columns + 1), np.roll(at[-1], -1), at[-1]], -1)
    return vertices.astype(np.float32), np.concatenate([sides, top, bottom]).astype(np.int32)


def _face(vertices, faces, scale=9.0, shift=(0.0, 0.0), matrix=MATRIX):
    parameters = np.zeros(params.TOTAL, np.float32)
    parameters[params.SLICES["camera"]] = (scale, *shift)
    cut = crop.Crop(np.zeros((112, 112, 3), np.uint8), matrix)
    landmarks = vertices[np.linspace(0, len(vertices) - 1, 68).astype(int)]
    return Face(
        parameters=parameters,
        vertices=vertices,
        landmarks=landmarks,
        landmarks_px=project_to_photo(landmarks, parameters[params.SLICES["camera"]], cut)[:, :2],
        faces=faces,
        crop=cut,
        detection=Detection(np.array([100.0, 50, 300, 250]), 0.9, np.arange(10.0).reshape(5, 2)),
        photo_size=(HEIGHT, WIDTH),
        head={"name": "ball", "version": "1", "licence": "CC0", "sha256": "00"},
        timings_ms={"read": 1.23456, "total": 2.0},
    )


def _halves():
    """Red where x is below 200, else blue."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:, :200, 0], image[:, 200:, 2] = 255, 255
    return image


@pytest.fixture(scope="module")
def ball():
    return _face(*_ball())


def test_projection_by_hand():
    cut = crop.Crop(np.zeros((112, 112, 3), np.uint8), MATRIX)
    got = project_to_photo(np.array([[0.01, 0.02, 0.03]]), np.array([8.0, 0.001, -0.002]), cut)
    wide = ((8 * 0.011 + 1) * 112 - 0.5, (1 - 8 * 0.018) * 112 - 0.5)
    np.testing.assert_allclose(cut.photo_to_wide(got[:, :2]), [wide], atol=1e-9)
    zoom = 0.5 * 4 / 3  # wide pixels per photo pixel
    np.testing.assert_allclose(got[0, 2], -8 * 0.03 * 112 / zoom)


def test_the_projection_is_scaled_orthographic(ball):
    """Distances across the photo and in depth are the metres, all times one factor."""
    points = ball.vertices_px()
    ratio = np.linalg.norm(np.diff(points, axis=0), axis=1) / np.linalg.norm(np.diff(ball.vertices, axis=0), axis=1)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert points[ball.vertices[:, 2].argmax(), 2] == points[:, 2].min()
    assert points[0, 1] < points[-1, 1]  # the upper pole is higher in the picture


def test_what_is_seen_has_the_colour_of_the_photo(ball):
    colors, x = ball.colors(_halves()), ball.vertices_px()[:, 0]
    front = ball.vertices[:, 2] > 0.05
    assert np.abs(colors[front & (x < 196)] - (1, 0, 0)).max() < 0.01
    assert np.abs(colors[front & (x > 204)] - (0, 0, 1)).max() < 0.01
    assert colors.shape == ball.vertices.shape and colors.dtype == np.float32


def test_what_is_hidden_is_carried_on_smoothly(ball):
    colors = ball.colors(_halves())
    back = ball.vertices[:, 2] < 0
    assert colors.min() >= 0 and colors.max() <= 1
    np.testing.assert_allclose(colors[back].sum(1), 1, atol=0.02)  # nothing but red and blue
    left, right = back & (ball.vertices[:, 0] < -0.04), back & (ball.vertices[:, 0] > 0.04)
    assert colors[left, 0].mean() > 0.8 and colors[right, 2].mean() > 0.8
    edges = ball.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    behind = edges[(ball.vertices[edges, 2] < -0.02).all(1)]
    assert np.abs(colors[behind[:, 0]] - colors[behind[:, 1]]).max() < 0.3


def test_what_lies_around_the_head_does_not_bleed_in(ball):
    points = ball.vertices_px()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    centre, radius = points[:, :2].mean(0), np.ptp(points[:, 0]) / 2
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[np.hypot(x - centre[0], y - centre[1]) < radius, 1] = 255
    np.testing.assert_allclose(ball.colors(image), np.broadcast_to([0, 1, 0], points.shape), atol=0.02)


def test_a_plate_behind_another_is_not_coloured_through_it():
    grid = np.stack(np.meshgrid(np.linspace(-0.05, 0.05, 11), np.linspace(-0.05, 0.05, 11)), -1).reshape(-1, 2)
    at = np.arange(121).reshape(11, 11)
    a, b, c, d = at[:-1, :-1], at[:-1, 1:], at[1:, :-1], at[1:, 1:]
    plate = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([b, d, c], -1).reshape(-1, 3)])
    near = np.column_stack([grid * 1.2, np.full(121, 0.05)])
    far = np.column_stack([grid, np.zeros(121)])
    face = _face(np.concatenate([near, far]).astype(np.float32), np.concatenate([plate, plate + 121]).astype(np.int32))
    assert (mesh.vertex_normals(face.vertices, face.faces)[:, 2] > 0.99).all()
    colors = face.colors(_halves())
    assert np.ptp(colors[:121, 0]) > 0.9  # the near plate shows both halves
    np.testing.assert_allclose(colors[121:], np.broadcast_to(colors[121], (121, 3)), atol=1e-6)


def test_a_head_outside_the_photo_still_has_colours():
    face = _face(*_ball(), shift=(5.0, 5.0))
    np.testing.assert_allclose(face.colors(_halves()), np.full((len(face.vertices), 3), 0.6), atol=1e-6)
    np.testing.assert_array_equal(face.overlay(_halves()), _halves())


def test_a_head_half_outside_takes_no_black_from_there():
    face = _face(*_ball(), shift=(0.13, 0.0))
    assert face.vertices_px()[:, 0].max() > WIDTH + 20
    image = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    np.testing.assert_allclose(face.colors(image), 200 / 255, atol=0.01)
    assert face.overlay(image).shape == image.shape


def test_the_overlay_covers_the_head_and_nothing_else(ball):
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    over = ball.overlay(image)
    changed = (over != image).any(-1)
    points = ball.vertices_px()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    centre, radius = (points[:, :2].min(0) + points[:, :2].max(0)) / 2, np.ptp(points[:, 0]) / 2
    away = np.hypot(x - centre[0], y - centre[1])
    assert changed[away < radius - 3].mean() > 0.99
    assert not changed[away > radius + 5].any()
    assert (image == 90).all() and over.dtype == np.uint8


def test_the_overlay_is_lit_from_the_front_and_marks_the_landmarks(ball):
    black = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    over = replace(ball, landmarks_px=np.zeros((68, 2))).overlay(black).astype(int)
    points = ball.vertices_px()
    x, y = np.rint((points[:, :2].min(0) + points[:, :2].max(0)) / 2).astype(int)
    reach = int(np.ptp(points[:, 0]) / 2)
    assert over[y, x].sum() > 1.5 * over[y, x + reach - 3].sum()
    over = ball.overlay(black).astype(int)
    seen = ball.landmarks[:, 2] > 0.02
    at = np.rint(ball.landmarks_px[seen]).astype(int)
    greenish = over[at[:, 1], at[:, 0], 1] - over[at[:, 1], at[:, 0], 0]
    assert (greenish > 60).all()


def test_a_large_photo_gives_the_same_picture_larger(ball):
    large = _face(ball.vertices, ball.faces, matrix=np.column_stack([MATRIX[:, :2] / 5, MATRIX[:, 2]]))
    large = replace(large, photo_size=(HEIGHT * 5, WIDTH * 5))
    image = np.kron(_halves(), np.ones((5, 5, 1), np.uint8))
    small = np.array(Image.fromarray(large.overlay(image)).resize((WIDTH, HEIGHT), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - ball.overlay(_halves())).mean() < 2.5
    assert np.abs(large.colors(image) - ball.colors(_halves())).mean() < 0.02


def test_json_names_every_part_and_unit(ball):
    record = json.loads(json.dumps(ball.to_json()))
    assert {name: len(part) for name, part in record["parameters"].items()} == params.PARTS
    assert record["parameters"]["camera"] == [9.0, 0.0, 0.0]
    assert record["units"]["length"] == "m" and record["photo"] == {"height": HEIGHT, "width": WIDTH, "faces": 1}
    np.testing.assert_allclose(record["landmarks_m"], ball.landmarks, atol=1e-6)
    np.testing.assert_allclose(record["landmarks_px"], ball.landmarks_px, atol=1e-6)
    np.testing.assert_allclose(record["crop"]["photo_to_aligned"], MATRIX, atol=1e-6)
    assert record["head"] == ball.head and record["timings_ms"] == {"read": 1.235, "total": 2.0}
    assert record["detection"]["score"] == 0.9 and len(record["detection"]["points_px"]) == 5


def test_saves_five_files_and_replaces_them_whole(ball, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    folder = tmp_path / "new" / "out"
    for _ in range(2):
        paths = ball.save(folder, _halves())
    assert {name: path.name for name, path in paths.items()} == {
        "obj": "head.obj",
        "ply": "head.ply",
        "glb": "head.glb",
        "overlay": "overlay.png",
        "params": "params.json",
    }
    assert sorted(folder.iterdir()) == sorted(paths.values())
    for form in ("obj", "ply", "glb"):
        solid = trimesh.load(paths[form], process=False, maintain_order=True, force="mesh")
        np.testing.assert_allclose(solid.vertices, ball.vertices, atol=1e-6)
        np.testing.assert_array_equal(solid.faces, ball.faces)
    np.testing.assert_allclose(mesh.read_ply(paths["ply"]).colors, ball.colors(_halves()), atol=0.003)
    assert b"licence=CC0" in paths["obj"].read_bytes()[:200]
    np.testing.assert_array_equal(np.array(Image.open(paths["overlay"])), ball.overlay(_halves()))
    assert json.loads(paths["params"].read_text()) == ball.to_json()


def test_saves_from_the_path_of_the_photo(ball, tmp_path):
    Image.fromarray(_halves()).save(tmp_path / "photo.png")
    assert all(path.is_file() for path in ball.save(tmp_path / "out", tmp_path / "photo.png").values())


def test_another_photo_is_refused_before_anything_is_written(ball, tmp_path):
    with pytest.raises(InputError, match=r"expected the photo that was reconstructed, \(300, 400, 3\) uint8"):
        ball.save(tmp_path / "out", np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(PhotoError, match="not found"):
        ball.save(tmp_path / "out", tmp_path / "none.png")
    with pytest.raises(InputError, match="image_u8: expected"):
        ball.colors(_halves() / 255)
    with pytest.raises(InputError, match="image_u8: expected"):
        ball.overlay(_halves()[:-1])
    assert not (tmp_path / "out").exists()
