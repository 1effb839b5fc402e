"""FLAME's own files become one head, the same that smplx sees in them."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from heads_for_tests import make_head, write_flame

from chebface.errors import AssetError, UnsafeFileError
from chebface.flame import Flame
from chebface.heads.asset import REGIONS
from chebface.heads.flame_files import SKIN_RGB, read_flame

PARTS = {
    **dict.fromkeys(("face", "nose", "lips", "eye_region", "forehead", "scalp", "neck")),
    **{"left_ear": "ears", "right_ear": "ears", "left_eyeball": "eyeballs", "right_eyeball": "eyeballs"},
}
SIZE = 24, 40  # of the texture space; never square


@pytest.fixture(scope="module")
def source():
    return make_head(10, seed=5)


@pytest.fixture(scope="module")
def files(source, tmp_path_factory):
    """A complete set of files by the name of read_flame's argument."""
    folder = tmp_path_factory.mktemp("flame")
    path = write_flame(source, folder)
    rng = np.random.default_rng(0)
    masks = {}
    for part, region in PARTS.items():
        inside = source.masks[region or part]
        side = source.template[:, 0] * (1 if part.startswith("left") else -1) > 0
        masks[part] = np.flatnonzero(inside & side if region else inside)
    (folder / "FLAME_masks.pkl").write_bytes(pickle.dumps(masks, protocol=2))
    np.savez(
        folder / "FLAME_texture.npz",
        mean=rng.uniform(0, 255, (*SIZE, 3)),
        tex_dir=rng.normal(size=(*SIZE, 3, 60)).astype(np.float32),
        vt=source.uv,
        ft=source.uv_faces,
    )
    lines = ["# uv", "mtllib template.mtl", "o head"]
    lines += ["v {:.6f} {:.6f} {:.6f}".format(*vertex) for vertex in source.template]
    lines += ["vt {:.9f} {:.9f}".format(*point) for point in source.uv]
    corners = np.stack([source.faces, source.uv_faces], axis=-1) + 1
    lines += ["f " + " ".join(f"{vertex}/{point}" for vertex, point in face) for face in corners]
    (folder / "template.obj").write_text("\n".join(lines) + "\n")
    return {
        "path": path,
        "landmarks": folder / "flame_static_embedding.pkl",
        "contour": folder / "flame_dynamic_embedding.npy",
        "masks": folder / "FLAME_masks.pkl",
        "texture": folder / "FLAME_texture.npz",
        "uv": folder / "template.obj",
    }


def read(files, *optional, **others):
    chosen = {name: files[name] for name in ("landmarks", "contour", *optional)}
    return read_flame(files["path"], **(chosen | others))


def edited(files, tmp_path, **changes):
    """The model file with keys changed, or removed where None."""
    model = pickle.loads(files["path"].read_bytes()) | changes
    path = tmp_path / "generic_model.pkl"
    path.write_bytes(pickle.dumps({key: value for key, value in model.items() if value is not None}, protocol=2))
    return path


# oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vertices_landmarks_and_gradients_are_smplx(files, dtype):
    smplx = pytest.importorskip("smplx")
    compare_with_smplx(smplx, files["path"].parent, read(files), dtype)


def test_on_flames_own_mesh_too(assets, tmp_path):
    """FLAME 2023 Open's template and identities, its published landmarks; expression, pose and skin made up."""
    smplx = pytest.importorskip("smplx")
    with np.load(assets / "flame_open" / "flame2023_open_id60.npz") as real:
        template, faces, dirs = real["v_template"], real["faces"], real["shapedirs"]
    rng = np.random.default_rng(0)
    waves = np.sin(template @ rng.normal(size=(3, 12)) * 20)  # (N, 12), smooth
    weights = np.exp(waves[:, :5])
    nearest = np.argsort(np.abs(template[:, None] - template[rng.integers(len(template), size=5)]).sum(-1), axis=0)[:9]
    regressor = np.zeros((5, len(template)))
    np.put_along_axis(regressor, nearest.T, 1 / 9, axis=1)
    more = np.einsum("nw,wck->nck", waves, rng.normal(size=(12, 3, 376))) * 3e-4
    model = {
        "v_template": template.astype(np.float64),
        "f": faces.astype(np.uint32),
        "shapedirs": np.concatenate([dirs, more[..., :340]], axis=2),
        "posedirs": more[..., 340:],
        "J_regressor": regressor,
        "weights": weights / weights.sum(1, keepdims=True),
        "kintree_table": np.array([[4294967295, 0, 1, 1, 1], range(5)], np.uint32),
    }
    (tmp_path / "FLAME_NEUTRAL.pkl").write_bytes(pickle.dumps(model, protocol=2))
    topology = assets / "flame_topology"
    with np.load(topology / "landmark_embedding.npz") as points:
        static = {"lmk_face_idx": points["static_lmk_faces_idx"], "lmk_b_coords": points["static_lmk_bary_coords"]}
    (tmp_path / "flame_static_embedding.pkl").write_bytes(pickle.dumps(static, protocol=2))
    with np.load(topology / "flame_dynamic_embedding.npz") as rows:  # smplx warns about the published lists
        np.save(tmp_path / "flame_dynamic_embedding.npy", np.array(dict(rows), dtype=object), allow_pickle=True)
    head = read_flame(
        tmp_path / "FLAME_NEUTRAL.pkl",
        landmarks=topology / "landmark_embedding.npy",
        contour=topology / "flame_dynamic_embedding.npy",
        masks=topology / "FLAME_masks.pkl",
        uv=topology / "head_template_uv.obj",
    )
    compare_with_smplx(smplx, tmp_path, head, torch.float32)
    assert head.uv.shape == (5118, 2)
    assert head.masks["face"].sum() == 1787
    assert head.masks["ears"].sum() == 2 * 588
    tip = Flame(head)(torch.zeros(1, 300), torch.zeros(1, 100), torch.zeros(1, 6))[1][0, 30]
    assert tip[2] > np.quantile(head.template[:, 2], 0.999)  # iBUG's point 30 is the tip of the nose


def compare_with_smplx(smplx, folder, head, dtype):
    rival = smplx.FLAME(
        str(folder), num_betas=300, num_expression_coeffs=100, use_face_contour=True, create_transl=False, dtype=dtype
    )
    generator = torch.Generator().manual_seed(2)
    shape, expression, pose = (torch.randn(1, n, generator=generator, dtype=dtype) for n in (300, 100, 6))
    pose = pose * torch.tensor([0.3, 0, 0, 0.3, 0.1, 0.1])  # no yaw: see test_flame for the contour's sign
    parts = [part.requires_grad_() for part in (shape, expression, pose)]
    theirs = rival(betas=shape, expression=expression, global_orient=pose[:, :3], jaw_pose=pose[:, 3:])
    vertices, landmarks = Flame(head, dtype)(*parts)
    inner = theirs.joints[:, 5:56]
    torch.testing.assert_close(vertices, theirs.vertices, rtol=0, atol=1e-5)
    torch.testing.assert_close(landmarks[:, 17:], inner, rtol=0, atol=1e-5)
    torch.testing.assert_close(landmarks[:, :17], theirs.joints[:, 56:], rtol=0, atol=1e-5)
    weights = torch.randn(vertices.shape, generator=generator, dtype=dtype)
    ours = torch.autograd.grad((vertices * weights).sum(), parts)
    wanted = torch.autograd.grad((theirs.vertices * weights).sum(), parts)
    for got, want in zip(ours, wanted, strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


# law


def test_every_array_arrives(files, source):
    head = read(files, "masks", "uv", name="flame", version="2020", licence="mine")
    same = {"name", "version", "licence", "source", "texture_mean", "texture_dirs", "expression_names"}
    for field in fields(source):
        got, want = getattr(head, field.name), getattr(source, field.name)
        if field.name == "masks":
            assert set(got) == set(REGIONS)
            # the halves of ears and eyeballs above leave out the middle plane, as FLAME's do
            assert all(np.array_equal(got[region], want[region]) for region in REGIONS)
        elif field.name.startswith("landmark"):
            np.testing.assert_array_equal(got, want)
        elif field.name not in same:
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-8)
    assert (head.name, head.version, head.licence) == ("flame", "2020", "mine")
    assert head.source == "FLAME_NEUTRAL.pkl, flame_static_embedding.pkl, flame_dynamic_embedding.npy, " + (
        "FLAME_masks.pkl, template.obj"
    )


def test_chumpy_sparse_and_npz_models_are_the_same_head(files, source, tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    plain = read(files)
    regressor = sparse.csc_matrix(source.joint_regressor.astype(np.float64))
    assert read(files | {"path": edited(files, tmp_path, J_regressor=regressor)}).sha256 == plain.sha256
    model = pickle.loads(files["path"].read_bytes())
    np.savez(tmp_path / "flame.npz", **model)
    assert read(files | {"path": tmp_path / "flame.npz"}).sha256 == plain.sha256


def test_what_is_not_given_is_what_the_docstring_says(files, source):
    head = read(files)
    assert head.masks == {}
    assert not head.texture_dirs.any()
    np.testing.assert_allclose(head.texture_mean, np.tile(np.float32(SKIN_RGB), (len(source.template), 1)))
    assert head.name == "FLAME_NEUTRAL"
    assert "research only" in head.licence
    assert head.uv.shape == (len(source.template), 2)
    assert head.uv.min() >= 0
    assert head.uv.max() <= 1
    nose = head.landmark_triangles[30]
    np.testing.assert_allclose(head.uv[head.uv_faces[nose], 0].mean(), 0.5, atol=0.05)  # the front is the middle
    left = source.template[:, 0] > 0.02
    assert head.uv[left, 0].min() > 0.5


def test_landmark_files_of_each_layout_agree(files, source, tmp_path):
    full = {"lmk_face_idx": source.landmark_triangles, "lmk_b_coords": source.landmark_barycentric}
    np.savez(tmp_path / "static68.npz", **full)
    both = {
        "static_lmk_faces_idx": source.landmark_triangles[17:],
        "static_lmk_bary_coords": source.landmark_barycentric[17:],
        "dynamic_lmk_faces_idx": torch.tensor(source.contour_triangles).long(),
        "dynamic_lmk_bary_coords": torch.tensor(source.contour_barycentric),
    }
    np.save(tmp_path / "landmark_embedding.npy", np.array(both, dtype=object), allow_pickle=True)
    for head in (
        read(files),
        read(files, landmarks=tmp_path / "static68.npz"),
        read(files, landmarks=tmp_path / "landmark_embedding.npy", contour=None),
    ):
        for name in ("landmark_triangles", "landmark_barycentric", "contour_triangles", "contour_barycentric"):
            np.testing.assert_array_equal(getattr(head, name), getattr(source, name))


def test_the_texture_space_is_sampled_at_the_vertices(files, source, tmp_path):
    """Channels linear in u and v come back exactly; BGR becomes RGB; v = 1 is the top row."""
    height, width = SIZE
    u = (np.arange(width) + 0.5) / width
    v = 1 - (np.arange(height) + 0.5) / height
    blue, green = np.meshgrid(u, v)
    mean = 255 * np.stack([blue, green, np.full(SIZE, 0.25)], axis=2)
    dirs = mean[..., None] * np.arange(1, 61) / 10
    np.savez(tmp_path / "t.npz", mean=mean, tex_dir=dirs, vt=source.uv, ft=source.uv_faces)
    head = read(files, texture=tmp_path / "t.npz")
    inside = (np.abs(source.uv - 0.5) < 0.5 - 1 / np.array([width, height])).all(1)
    wanted = np.column_stack([np.full(len(source.uv), 0.25), source.uv[:, 1], source.uv[:, 0]])
    np.testing.assert_allclose(head.texture_mean[inside], wanted[inside], atol=1e-5)
    np.testing.assert_allclose(head.texture_dirs[2][inside], 0.3 * wanted[inside], atol=1e-5)
    assert head.texture_dirs.shape[0] == 50
    np.testing.assert_allclose(head.uv, source.uv, atol=1e-7)  # taken from the texture file
    with_obj = read(files, "uv", texture=tmp_path / "t.npz")
    np.testing.assert_allclose(with_obj.texture_mean, head.texture_mean, atol=1e-6)


def test_a_vertex_on_a_texture_seam_is_the_mean_of_its_sides(files, source, tmp_path):
    uv = np.concatenate([source.uv, [[0.25, 0.5]]])
    uv_faces = source.uv_faces.copy()
    vertex = source.faces[0, 1]
    uv_faces[0, 1] = len(source.uv)
    uv[vertex] = [0.75, 0.5]
    mean = np.zeros((*SIZE, 3))
    mean[:, : SIZE[1] // 2] = 255
    np.savez(tmp_path / "t.npz", mean=mean, tex_dir=np.zeros((*SIZE, 3, 50)), vt=uv, ft=uv_faces)
    np.testing.assert_allclose(read(files, texture=tmp_path / "t.npz").texture_mean[vertex], 0.5)


# error


def test_landmarks_and_contour_are_asked_for(files):
    with pytest.raises(AssetError, match=r"landmarks: no file given; take landmark_embedding\.npy"):
        read(files, landmarks=None)
    with pytest.raises(AssetError, match=r"contour: no file given.*flame_dynamic_embedding\.npy"):
        read(files, contour=None)


def test_a_partial_model_names_what_it_lacks(files, assets):
    with pytest.raises(AssetError, match="no f, posedirs, J_regressor, weights, kintree_table"):
        read(files | {"path": assets / "flame_open" / "flame2023_open_id60.npz"})


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("posedirs", lambda model: None, "not a whole FLAME model, no posedirs"),
        ("shapedirs", lambda model: model["shapedirs"][..., :20], "300 shape . 100 expression directions, got 20"),
        ("shapedirs", lambda model: model["shapedirs"][:5], r"shapedirs: expected numbers \(\d+, 3, \*\), got \(5, 3"),
        ("v_template", lambda model: "text", "v_template: expected numbers .*, got str"),
        ("weights", lambda model: model["weights"].astype(str), "weights: expected numbers .* <U"),
        ("f", lambda model: [[0, 1, 2], [1, 2]], "f: expected numbers .* got list"),
        ("kintree_table", lambda model: np.zeros((2, 5), int), r"wanted parents \(-1, 0, 1, 1, 1\), got \(0, 0, 0"),
        ("f", lambda model: model["f"] + 1, "faces points outside template"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(files, tmp_path, key, change, message):
    model = pickle.loads(files["path"].read_bytes())
    with pytest.raises(AssetError, match=message):
        read(files | {"path": edited(files, tmp_path, **{key: change(model)})})


def test_a_model_that_asks_for_code_is_refused_by_name(files, tmp_path):
    class Asks:
        def __reduce__(self):
            return print, ("never printed",)

    with pytest.raises(UnsafeFileError, match=r"generic_model\.pkl: the pickle asks for .*print"):
        read(files | {"path": edited(files, tmp_path, v_template=Asks())})


def test_companions_of_another_mesh_are_refused(files, source, tmp_path):
    np.savez(tmp_path / "masks.npz", **{part: np.array([len(source.template)]) for part in PARTS})
    with pytest.raises(AssetError, match=r"face points outside the .* made for another mesh"):
        read(files, masks=tmp_path / "masks.npz")
    np.savez(tmp_path / "few.npz", lmk_face_idx=np.arange(5), lmk_b_coords=np.ones((5, 3)))
    with pytest.raises(AssetError, match="expected 51 or 68 landmarks, got 5"):
        read(files, landmarks=tmp_path / "few.npz")
    other = replace(source, faces=source.faces[::-1].copy())
    (tmp_path / "turned.obj").write_text(
        "v 0 0 0\n" * len(source.template)
        + "vt 0 0\n" * len(source.uv)
        + "".join("f " + " ".join(f"{v + 1}/1" for v in face) + "\n" for face in other.faces)
    )
    with pytest.raises(AssetError, match="its triangles are not the model's"):
        read(files, uv=tmp_path / "turned.obj")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v 0 0 0\n" * 3 + "f 1 2 3\n", "has no texture coordinates"),
        ("v 0 0 0\n" * 4 + "vt 0 0\nf 1/1 2/1 3/1 4/1\n", "its triangles are not the model's"),
        ("vt 0 x\n", "line 1 cannot be read"),
    ],
)
def test_an_obj_without_texture_triangles_is_refused(files, tmp_path, text, says):
    (tmp_path / "head.obj").write_text(text)
    with pytest.raises(AssetError, match=says):
        read(files, uv=tmp_path / "head.obj")


def test_a_missing_obj_is_refused(files, tmp_path):
    with pytest.raises(AssetError, match=r"no\.obj: cannot be read"):
        read(files, uv=tmp_path / "no.obj")


def test_a_texture_space_that_does_not_fit_is_refused(files, source, tmp_path):
    whole = dict(np.load(files["texture"]))
    np.savez(tmp_path / "few.npz", **(whole | {"tex_dir": whole["tex_dir"][..., :20]}))
    with pytest.raises(AssetError, match="tex_dir: wanted 50 directions, got 20"):
        read(files, texture=tmp_path / "few.npz")
    np.savez(tmp_path / "off.npz", **(whole | {"ft": whole["ft"] + 1}))
    with pytest.raises(AssetError, match="texture triangles point outside"):
        read(files, texture=tmp_path / "off.npz")
    np.savez(tmp_path / "square.npz", **(whole | {"mean": whole["mean"][:, :9]}))
    with pytest.raises(AssetError, match=r"tex_dir: expected numbers \(24, 9, 3, \*\)"):
        read(files, texture=tmp_path / "square.npz")
