"""Folders of registered meshes in their layouts, meshes sampled from a head, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from heads_for_tests import make_head

from chebface.data.meshes import CLIP, Meshes, read_folder, sample_head
from chebface.errors import AssetError, InputError
from chebface.mesh import write_obj, write_ply

FACES = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]], np.int32)


@pytest.fixture(scope="module")
def small_head():
    return make_head(6)


def tetrahedron(seed=0):
    return np.random.default_rng(seed).normal(size=(4, 3)) * 0.1


def write_mica(folder, count=2):
    wanted = {}
    for actor in ("ann", "bob"):
        for i in range(count):
            vertices = tetrahedron(len(wanted))
            path = folder / "registrations" / actor / f"{i}.obj"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_obj(path, vertices, FACES)
            wanted[f"{actor}/{i}"] = vertices
    return wanted


@pytest.mark.parametrize("name", ["", "LYHM"])
def test_micas_registrations(tmp_path, name):
    wanted = write_mica(tmp_path / name)
    found = read_folder(tmp_path)
    prefix = f"{name}/" if name else ""
    assert found.actors == tuple(f"{prefix}{key.split('/')[0]}" for key in wanted)
    np.testing.assert_allclose(found.vertices, np.stack(list(wanted.values())), atol=1e-6)
    assert found.vertices.dtype == np.float32 and np.array_equal(found.faces, FACES)
    assert found.about["people"] == 2


def test_micas_parameters_are_neutral_heads(tmp_path, small_head):
    betas = np.random.default_rng(0).normal(size=400).astype(np.float32)
    path = tmp_path / "FLAME_parameters" / "ann" / "a.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, betas=betas, pose=np.ones(6, np.float32))
    found = read_folder(tmp_path, small_head)
    wanted = small_head.template + np.einsum("k,knc->nc", betas[:300], small_head.shape_dirs)
    np.testing.assert_allclose(found.vertices[0], wanted, atol=1e-6)
    assert found.actors == ("ann",)
    with pytest.raises(AssetError, match="want a head"):
        read_folder(tmp_path)
    np.savez(path, betas=betas[:10])
    with pytest.raises(AssetError, match=r"a\.npz: expected `betas`"):
        read_folder(tmp_path, small_head)


def test_flat_files_and_their_people(tmp_path):
    write_obj(tmp_path / "ann_1.obj", tetrahedron(1), FACES)
    write_ply(tmp_path / "ann_2.ply", tetrahedron(2), FACES)
    write_obj(tmp_path / "deep" / "x_1.obj", tetrahedron(3), FACES)
    many = np.stack([tetrahedron(4), tetrahedron(5)])
    np.savez(tmp_path / "bob.npz", vertices=many)
    np.savez(tmp_path / "crowd.npz", vertices=many, faces=FACES, actors=np.array(["c", "d"]))
    found = read_folder(tmp_path)
    assert found.actors == ("ann", "ann", "bob", "bob", "c", "d", "deep")
    np.testing.assert_allclose(found.vertices[[2, 3]], many, atol=1e-7)


def test_units_become_metres(tmp_path):
    write_obj(tmp_path / "a.obj", tetrahedron(1) * 1000, FACES)
    np.testing.assert_allclose(read_folder(tmp_path, unit="mm").vertices[0], tetrahedron(1), atol=1e-6)
    with pytest.raises(AssetError, match=r"a\.obj: spans .* m, which is no head; set unit"):
        read_folder(tmp_path)
    with pytest.raises(InputError, match="unit: expected one of m, cm, mm"):
        read_folder(tmp_path, unit="inch")


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(AssetError, match=r"no \.obj, \.ply or \.npz"):
        read_folder(tmp_path)
    with pytest.raises(AssetError, match="no such folder"):
        read_folder(tmp_path / "nowhere")


def test_meshes_without_faces_want_a_head(tmp_path, small_head):
    np.savez(tmp_path / "a.npz", vertices=small_head.template)
    assert np.array_equal(read_folder(tmp_path, small_head).faces, small_head.faces)
    with pytest.raises(AssetError, match="no file has faces"):
        read_folder(tmp_path)


def break_topology(path):
    write_obj(path, tetrahedron(), FACES[:, ::-1])


def break_count(path):
    write_obj(path, np.zeros((5, 3)) + np.arange(5)[:, None] * 0.1, np.vstack([FACES, [[0, 1, 4]]]))


def break_points(path):
    np.savez(path.with_suffix(".npz"), vertices=np.full((4, 3), np.nan))


def break_file(path):
    path.with_suffix(".npz").write_bytes(b"PK\3\4 cut short")


def break_kind(path):
    with open(path.with_suffix(".npz"), "wb") as file:
        np.save(file, np.zeros(3))


def break_text(path):
    path.write_text("v 1 2\nf 1 1 1\n")


def break_arrays(path):
    np.savez(path.with_suffix(".npz"), vertices=np.zeros((4, 2)))


def break_faces(path):
    np.savez(path.with_suffix(".npz"), vertices=tetrahedron(), faces=np.zeros((2, 4), np.int32))


def break_actors(path):
    np.savez(path.with_suffix(".npz"), vertices=tetrahedron()[None], actors=np.array(["a", "b"]))


def break_emptiness(path):
    np.savez(path.with_suffix(".npz"), vertices=np.zeros((0, 3)))


def break_size(path):
    np.savez(path.with_suffix(".npz"), vertices=np.zeros((3, 3)) + np.arange(3)[:, None] * 0.1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_topology, "another topology"),
        (break_count, r"another topology \(5 vertices, 5 triangles; the most have 4 and 4\)"),
        (break_points, "not finite"),
        (break_file, "not a whole npz"),
        (break_kind, "not a whole npz"),
        (break_text, "3 coordinates"),
        (break_arrays, "expected `vertices`"),
        (break_faces, "expected `faces`"),
        (break_actors, "expected `actors`"),
        (break_emptiness, "no vertices"),
        (break_size, "3 vertices, where the faces are of 4"),
    ],
)
def test_a_bad_file_among_good_ones_is_named(tmp_path, damage, message):
    for i in range(3):
        write_obj(tmp_path / f"z{i}.obj", tetrahedron(i), FACES)
    damage(tmp_path / "a.obj")  # the first in order: it is still the odd one
    with pytest.raises(AssetError, match=rf"1 of 4 files cannot be used: .*a\.(obj|npz).*{message}"):
        read_folder(tmp_path)


def test_many_bad_files_are_counted(tmp_path):
    write_obj(tmp_path / "z.obj", tetrahedron(), FACES)
    for i in range(8):
        (tmp_path / f"{i}.npz").write_bytes(b"")
    with pytest.raises(AssetError, match=r"8 of 9 files .* and 3 more\. Mend"):
        read_folder(tmp_path)


def test_splits_share_no_person_and_lose_none():
    actors = tuple(str(i // 3) for i in range(60))
    vertices = np.arange(60, dtype=np.float32)[:, None, None] * np.ones((1, 4, 3), np.float32)
    everyone = Meshes(vertices, FACES, actors)
    train, held_out = everyone.split(0.2, seed=1)
    assert len(set(held_out.actors)) == 4 and not set(train.actors) & set(held_out.actors)
    assert sorted([*train.vertices[:, 0, 0], *held_out.vertices[:, 0, 0]]) == list(range(60))
    again, other = everyone.split(0.2, seed=1), everyone.split(0.2, seed=2)
    assert again[1].actors == held_out.actors != other[1].actors
    assert len(set(everyone.split(0.999)[0].actors)) == 1


def test_splits_that_cannot_be():
    lonely = Meshes(np.zeros((2, 4, 3), np.float32), FACES, ("a", "a"))
    with pytest.raises(InputError, match="two actors"):
        lonely.split(0.5)
    with pytest.raises(InputError, match="share between 0 and 1"):
        lonely.split(1.0)


def test_sampled_people_are_the_heads_sum(small_head):
    found = sample_head(small_head, 5, seed=3)
    shape = np.clip(np.random.default_rng([3, 2]).normal(size=300), -CLIP, CLIP)
    wanted = small_head.template + np.einsum("k,knc->nc", shape, small_head.shape_dirs)
    np.testing.assert_allclose(found.vertices[2], wanted, atol=1e-6)
    assert found.actors == ("0", "1", "2", "3", "4")


def test_a_person_does_not_depend_on_the_others(small_head):
    some, more = sample_head(small_head, 3), sample_head(small_head, 9)
    np.testing.assert_allclose(some.vertices, more.vertices[:3], atol=1e-7)
    np.testing.assert_allclose(sample_head(small_head, 1, first=2).vertices[0], some.vertices[2], atol=1e-7)
    assert sample_head(small_head, 1, first=2).actors == ("2",)
    assert sample_head(small_head, 3, seed=1).sha256 != some.sha256


@pytest.mark.parametrize("names", [("smile",), ()])
def test_expressions_move_a_person_and_keep_the_shape(small_head, names):
    import dataclasses

    head = dataclasses.replace(small_head, expression_names=names)
    still = sample_head(head, 4).vertices
    found = sample_head(head, 4, expressions=3, strength=1.0)
    assert found.actors == tuple(str(i) for i in range(4) for _ in range(3))
    moved = found.vertices.reshape(4, 3, -1, 3)
    assert np.linalg.norm(moved - still[:, None], axis=-1).mean(2).min() > 1e-5
    behind = ~head.expression_dirs.any((0, 2))  # what no expression moves
    assert behind.any()
    np.testing.assert_allclose(
        moved[:, :, behind], np.broadcast_to(still[:, None, behind], moved[:, :, behind].shape), atol=1e-7
    )


def test_sampling_nobody_is_refused(small_head):
    for wrong in ({"people": 0}, {"people": 2, "expressions": 0}):
        with pytest.raises(InputError, match="at least 1"):
            sample_head(small_head, **wrong)
