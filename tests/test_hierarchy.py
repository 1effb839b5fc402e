"""Mesh hierarchies: what each level keeps, the maps between levels, awkward meshes, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from chebface import hierarchy
from chebface.errors import AssetError, InputError
from chebface.kernels.graph import Graph
from chebface.mesh import read_obj

HEAD_DIGEST = "e905e93dc31edf7576dd3f32dc83a39fc8345eb08267613051d89125bfbab100"


def ball(steps=3, radius=1.0, centre=(0.0, 0.0, 0.0)):
    """A subdivided octahedron, pushed onto a sphere."""
    points = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    faces = [(0, 2, 4), (2, 1, 4), (1, 3, 4), (3, 0, 4), (2, 0, 5), (1, 2, 5), (3, 1, 5), (0, 3, 5)]
    for _ in range(steps):
        middle, finer = {}, []
        for face in faces:
            m = []
            for a, b in zip(face, (*face[1:], face[0]), strict=True):
                key = min(a, b), max(a, b)
                if key not in middle:
                    middle[key] = len(points)
                    p = np.add(points[a], points[b])
                    points.append(tuple(p / np.sqrt((p * p).sum())))
                m.append(middle[key])
            finer += [(face[0], m[0], m[2]), (face[1], m[1], m[0]), (face[2], m[2], m[1]), tuple(m)]
        faces = finer
    return np.array(points, np.float32) * np.float32(radius) + np.array(centre, np.float32), np.array(faces)


def sheet(side=13):
    """A flat square of triangles in z = 0, from 0 to 1."""
    grid = np.linspace(0, 1, side)
    points = np.stack([*np.meshgrid(grid, grid), np.zeros((side, side))], -1).reshape(-1, 3)
    a = (np.arange(side - 1)[:, None] * side + np.arange(side - 1)).ravel()
    return points, np.concatenate([np.stack([a, a + 1, a + side], 1), np.stack([a + 1, a + side + 1, a + side], 1)])


def join(*meshes):
    starts = np.cumsum([0, *(len(points) for points, _ in meshes)])
    faces = [faces + start for (_, faces), start in zip(meshes, starts, strict=False)]
    return np.concatenate([points for points, _ in meshes]), np.concatenate(faces)


def areas_and_normals(vertices, faces):
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    normals = np.cross(b - a, c - a)
    length = np.linalg.norm(normals, axis=1)
    return length / 2, normals / np.maximum(length, 1e-30)[:, None]


def edge_counts(faces):
    return Counter(
        tuple(sorted(edge)) for face in faces.tolist() for edge in zip(face, face[1:] + face[:1], strict=True)
    )


def go_up(fine, coarse):
    return (coarse.vertices[fine.up_index] * fine.up_weight[..., None].astype(np.float64)).sum(1)


@pytest.fixture(scope="module")
def of_head(head):
    return hierarchy.build(head.template, head.faces)


def check_maps(built):
    for fine, coarse in zip(built.levels, built.levels[1:], strict=False):
        assert fine.down.dtype == np.int32 and (np.diff(fine.down) > 0).all()
        np.testing.assert_array_equal(coarse.vertices, fine.vertices[fine.down])
        assert fine.up_index.dtype == np.int32 and fine.up_weight.dtype == np.float32
        assert (fine.up_weight >= 0).all() and (fine.up_weight.sum(1) == 1).all()
        triangles = {tuple(face) for face in coarse.faces.tolist()}
        assert {tuple(corners) for corners in fine.up_index.tolist()} <= triangles
        np.testing.assert_array_equal(go_up(fine, coarse)[fine.down], coarse.vertices)  # kept vertices: themselves
    last = built.levels[-1]
    assert last.down is last.up_index is last.up_weight is None


def test_head_levels_have_the_sizes_of_the_paper(of_head, head):
    assert of_head.sizes == (5023, 1256, 314, 79, 20)
    np.testing.assert_array_equal(of_head.levels[0].vertices, head.template)
    np.testing.assert_array_equal(of_head.levels[0].faces, head.faces)
    check_maps(of_head)
    for level in of_head.levels:
        assert level.faces.dtype == np.int32 and level.vertices.dtype == np.float32
        assert isinstance(level.graph, Graph) and level.graph.n == len(level.vertices)


def test_head_levels_stay_surfaces(of_head):
    characteristics = []
    for level in of_head.levels:
        edges = edge_counts(level.faces)
        assert max(edges.values()) == 2
        assert len({frozenset(face) for face in level.faces.tolist()}) == len(level.faces)
        assert (areas_and_normals(level.vertices, level.faces)[0] > 0).all()
        characteristics.append(len(level.vertices) - len(edges) + len(level.faces))
    parts = [len(np.unique(hierarchy._find_parts(level.faces, len(level.vertices)))) for level in of_head.levels]
    assert parts == [4, 4, 4, 4, 1]
    assert len(set(characteristics[:4])) == 1  # no hole closed or torn while every part is there


def test_head_errors_grow_slowly(of_head):
    worst_mean_mm = (0.4, 1.6, 6, 13)
    for fine, coarse, limit in zip(of_head.levels, of_head.levels[1:], worst_mean_mm, strict=False):
        assert 1000 * np.linalg.norm(go_up(fine, coarse) - fine.vertices, axis=1).mean() < limit


def sample_surface(vertices, faces, count, dice):
    area = areas_and_normals(vertices, faces)[0]
    corners = vertices[faces[dice.choice(len(faces), count, p=area / area.sum())]].astype(np.float64)
    weights = dice.dirichlet((1, 1, 1), count)
    return (corners * weights[..., None]).sum(1)


def mean_distance(a, b):
    """Symmetric mean distance of two surfaces, by sampling."""
    dice, found = np.random.default_rng(0), []
    for (vertices, faces), (others, other_faces) in ((a, b), (b, a)):
        points = sample_surface(vertices, faces, 2000, dice)
        corners = others[other_faces].astype(np.float64)
        face, weight = hierarchy._nearest(points, corners)
        found.append(np.linalg.norm((corners[face] * weight[..., None]).sum(1) - points, axis=1).mean())
    return sum(found) / 2


def test_no_worse_than_a_decimation_library(of_head):
    import fast_simplification as library

    fine, coarse = of_head.levels[:2]
    theirs = library.simplify(
        fine.vertices * 1000, fine.faces.astype(np.int64), target_count=len(coarse.faces), agg=5
    )  # it works in mm: its thresholds are absolute. Its vertices may lie anywhere, ours are a subset
    assert len(theirs[1]) == pytest.approx(len(coarse.faces), abs=2)
    original = fine.vertices, fine.faces
    error_mm = 1000 * mean_distance(original, (coarse.vertices, coarse.faces))
    assert error_mm < mean_distance((fine.vertices * 1000, fine.faces), theirs)
    assert error_mm < 0.15


def test_same_bytes_on_every_machine(of_head):
    assert of_head.sha256 == HEAD_DIGEST
    code = (
        "from tests.test_hierarchy import ball; from chebface import hierarchy; import sys;"
        "sys.stdout.write(hierarchy.build(*ball(), sizes=(60, 13)).sha256)"
    )
    plain = {"PYTHONHASHSEED": "7", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=os.environ | plain, capture_output=True, text=True, check=True
    )
    assert done.stdout == hierarchy.build(*ball(), sizes=(60, 13)).sha256


@pytest.mark.parametrize("change", [lambda p: p * 1024, lambda p: p + 64], ids=["scaled", "moved"])
def test_unit_and_origin_do_not_matter(change):
    points, faces = ball()
    points = np.rint(points * 2**12).astype(np.float64) / 2**12  # so that both changes are exact
    a, b = (hierarchy.build(p, faces, (60, 13)) for p in (points, change(points)))
    for first, second in zip(a.levels[:-1], b.levels[:-1], strict=True):
        np.testing.assert_array_equal(first.down, second.down)
        np.testing.assert_array_equal(first.up_index, second.up_index)


def test_ball_stays_a_ball():
    built = hierarchy.build(*ball(), (100, 30, 4))
    check_maps(built)
    for level in built.levels:
        normals = areas_and_normals(level.vertices, level.faces)[1]
        assert ((normals * level.vertices[level.faces].mean(1)).sum(1) > 0).all()  # none turned over
        assert set(edge_counts(level.faces).values()) == {2}


def test_flat_sheet_keeps_its_border():
    built = hierarchy.build(*sheet(), (40, 4))
    check_maps(built)
    for level in built.levels:
        assert areas_and_normals(level.vertices, level.faces)[0].sum() == pytest.approx(1)
    assert {tuple(p) for p in built.levels[-1].vertices.tolist()} == {(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)}


def test_parts_shrink_then_go():
    built = hierarchy.build(*join(ball(), ball(2, 0.2, (1.5, 0, 0))), (40, 8))
    check_maps(built)
    first, middle, last = built.levels
    part, gone = first.vertices[:, 0] > 1.2, middle.vertices[:, 0] > 1.2
    assert gone.sum() == 4  # the small ball has become a tetrahedron
    assert (first.vertices[first.down][first.up_index[part]][..., 0] > 1.2).all()  # up to its own part only
    assert (last.vertices[:, 0] < 1.2).all()
    assert (np.linalg.norm(go_up(middle, last)[gone] - middle.vertices[gone], axis=1) < 1.5).all()
    assert (go_up(middle, last)[gone][:, 0] > 0).all()  # the side of the large ball that faces it


def test_far_part_outlives_a_near_one_of_its_size():
    near, far = ball(2, 0.2, (1.25, 0, 0)), ball(2, 0.2, (9, 0, 0))
    last = hierarchy.build(*join(ball(), near, far), (12,)).levels[-1]
    assert (last.vertices[:, 0] > 8).sum() == 4 and not ((last.vertices[:, 0] > 1.04) & (last.vertices[:, 0] < 8)).any()


def test_awkward_triangles_are_left_out_or_harmless():
    points, faces = ball()
    extra = [[0, 0, 1], [5, 5, 5], faces[3].tolist(), faces[4][::-1].tolist()]
    mixed = np.concatenate([extra[:2], faces, extra[2:]])
    assert hierarchy.build(points, mixed, (60,)).sha256 == hierarchy.build(points, faces, (60,)).sha256
    squashed = points.copy()
    squashed[squashed[:, 2] > 0.5] = (0, 0, 1)  # triangles without area, vertices at one place
    built = hierarchy.build(squashed, faces, (60, 12))
    check_maps(built)
    assert built.sizes == (len(points), 60, 12)


def test_leaves_on_one_spine():
    """Three sheets share an edge: no surface, and still it shrinks."""
    points, faces = sheet(9)
    turned = [points[:, [0, 1, 2]], points * (-1, 1, 1), points[:, [2, 1, 0]]]
    everything, index = np.unique(np.concatenate(turned).round(9), axis=0, return_inverse=True)
    leaves = np.concatenate([index.reshape(-1)[faces + k * len(points)] for k in range(3)])
    built = hierarchy.build(everything, leaves, (60, 8))
    check_maps(built)
    assert max(edge_counts(built.levels[-1].faces).values()) == 3
    assert areas_and_normals(built.levels[-1].vertices, built.levels[-1].faces)[0].sum() == pytest.approx(3)


def test_topology_gives_way_last():
    ring = np.arange(8)
    u, v = (k.ravel() * np.pi / 4 for k in np.meshgrid(ring, ring, indexing="ij"))
    points = np.stack([(2 + np.cos(v)) * np.cos(u), (2 + np.cos(v)) * np.sin(u), np.sin(v)], 1)
    a, b = (k.ravel() for k in np.meshgrid(ring, ring, indexing="ij"))
    corner = [((a + i) % 8) * 8 + (b + j) % 8 for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))]
    faces = np.concatenate([np.stack([corner[0], corner[1], corner[2]], 1), np.stack([corner[0], *corner[2:]], 1)])
    built = hierarchy.build(points, faces, (20, 4, 3))
    check_maps(built)
    counts = [len(level.vertices) - len(edge_counts(level.faces)) + len(level.faces) for level in built.levels]
    assert counts[:2] == [0, 0]  # a torus
    assert built.sizes == (64, 20, 4, 3)


def test_nearest_triangle_is_nearest():
    dice = np.random.default_rng(1)
    points, corners = dice.normal(size=(40, 3)), dice.normal(size=(30, 1, 3)) + dice.normal(size=(30, 3, 3)) * 0.3
    corners[0, 2] = corners[0, 1]  # no area: a line
    corners[1] = corners[1, :1]  # a point
    points[0], points[1] = corners[1, 0] + 0.01, corners[0, 1]
    face, weight = hierarchy._nearest(points, corners)
    assert (weight >= 0).all() and np.allclose(weight.sum(1), 1)
    distance = np.linalg.norm((corners[face] * weight[..., None]).sum(1) - points, axis=1)
    steps = np.arange(61) / 60
    grid = np.array([(1 - s - t, s, t) for s in steps for t in steps if s + t < 1 + 1e-9])
    everywhere = np.einsum("gk,fkc->fgc", grid, corners).reshape(-1, 3)
    by_search = np.linalg.norm(points[:, None] - everywhere, axis=2).min(1)
    assert (distance <= by_search + 1e-12).all() and (distance > by_search - 0.03).all()
    assert face[0] == 1 and distance[1] < 1e-12


def test_equally_near_triangles_the_first_wins():
    corners = np.array([[(0, 0, 1), (1, 0, 1), (0, 1, 1)], [(0, 0, -1), (1, 0, -1), (0, 1, -1)]], float)
    assert hierarchy._nearest(np.array([[0.2, 0.2, 0.0]]), corners)[0].tolist() == [0]
    assert hierarchy._nearest(np.array([[0.2, 0.2, 0.0]]), corners[::-1])[0].tolist() == [0]


def _change(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p, f: (p[:0], f, (4,)), "mesh is empty"),
        (lambda p, f: (p, f[:0], (4,)), "mesh is empty"),
        (lambda p, f: (p[:, :2], f, (4,)), r"vertices: expected \(N, 3\) floats"),
        (lambda p, f: (p.astype(int), f, (4,)), "vertices: expected"),
        (lambda p, f: (_change(p, (7, 1), np.nan), f, (4,)), "vertex 7 is not finite"),
        (lambda p, f: (_change(p, (3, 0), np.inf), f, (4,)), "vertex 3 is not finite"),
        (lambda p, f: (p, f[:, :2], (4,)), r"faces: expected \(M, 3\)"),
        (lambda p, f: (p, f.astype(float), (4,)), r"faces: expected \(M, 3\)"),
        (lambda p, f: (p, _change(f, (0, 0), len(p)), (4,)), "faces: expected vertices in 0"),
        (lambda p, f: (p, _change(f, (0, 0), -1), (4,)), "faces: expected vertices in 0"),
        (lambda p, f: (np.concatenate([p, p[:1]]), f, (4,)), "vertex 66 is in no triangle"),
        (lambda p, f: (p, f, ()), "sizes: expected numbers falling"),
        (lambda p, f: (p, f, (66,)), "sizes: expected numbers falling"),
        (lambda p, f: (p, f, (20, 20)), "sizes: expected numbers falling"),
        (lambda p, f: (p, f, (20, 30)), "sizes: expected numbers falling"),
        (lambda p, f: (p, f, (20, 2)), "sizes: expected numbers falling"),
    ],
)
def test_bad_input(edit, message):
    points, faces = ball(2)
    with pytest.raises(InputError, match=message):
        hierarchy.build(*edit(points, faces))


def test_size_that_cannot_be_reached():
    three = join(*[(np.array([(0, 0, k), (1, 0, k), (0, 1, k)], float), np.array([[0, 1, 2]])) for k in range(3)])
    with pytest.raises(InputError, match="cannot be brought below 6 vertices, wanted 4"):
        hierarchy.build(*three, (4,))
    assert hierarchy.build(*three, (6, 3)).sizes == (9, 6, 3)


def test_flame_topology(assets):
    mesh = read_obj(assets / "flame_topology" / "mica_head_template.obj")
    built = hierarchy.build(mesh.vertices, mesh.faces)
    assert built.sizes == (5023, 1256, 314, 79, 20)
    check_maps(built)
    sizes = [np.bincount(hierarchy._find_parts(level.faces, len(level.vertices))) for level in built.levels]
    assert [len(parts) for parts in sizes] == [3, 3, 3, 3, 1] and sizes[0].tolist() == [3931, 546, 546]


def test_file_round_trip(tmp_path):
    built = hierarchy.build(*ball(), (60, 13))
    path = hierarchy.save(built, tmp_path / "new" / "ball.npz", head_sha256="abc")
    again = hierarchy.load(path, head_sha256="abc")
    assert again.sha256 == built.sha256 and again.sizes == built.sizes
    np.testing.assert_array_equal(again.levels[1].graph.indices, built.levels[1].graph.indices)
    assert [p.name for p in path.parent.iterdir()] == ["ball.npz"]


def test_bad_files_are_named(tmp_path):
    path = hierarchy.save(hierarchy.build(*ball(), (60, 13)), tmp_path / "ball.npz", head_sha256="abc")
    whole = path.read_bytes()
    with pytest.raises(AssetError, match=r"other\.npz: not found"):
        hierarchy.load(tmp_path / "other.npz")
    with pytest.raises(AssetError, match=r"ball\.npz: made for head abc, wanted xyz"):
        hierarchy.load(path, head_sha256="xyz")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AssetError, match=r"ball\.npz: not a whole hierarchy"):
        hierarchy.load(path)
    path.write_bytes(whole)
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **(arrays | {"0_vertices": arrays["0_vertices"] + 1}))
    with pytest.raises(AssetError, match="differ from the recorded sha256"):
        hierarchy.load(path)
    header = json.loads(arrays["header"].tobytes()) | {"format": 0}
    np.savez(path, **(arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}))
    with pytest.raises(AssetError, match="format 0, wanted 1"):
        hierarchy.load(path)


def test_heads_hierarchy_is_built_once_and_again_when_damaged(head, of_head, tmp_path, monkeypatch):
    monkeypatch.setenv("CHEBFACE_CACHE", str(tmp_path))
    builds = []
    monkeypatch.setattr(hierarchy, "build", lambda *mesh: builds.append(mesh) or of_head)
    assert hierarchy.for_head(head).sha256 == of_head.sha256
    assert hierarchy.for_head(head).sha256 == of_head.sha256
    (path,) = (tmp_path / "hierarchies").iterdir()
    assert path.name == f"{head.sha256[:12]}-v1.npz" and len(builds) == 1
    path.write_bytes(b"not much")
    with pytest.warns(RuntimeWarning, match="building it again"):
        assert hierarchy.for_head(head).sha256 == of_head.sha256
    assert len(builds) == 2 and hierarchy.load(path).sha256 == of_head.sha256
