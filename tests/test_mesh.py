from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest

from chebface import mesh
from chebface.errors import AssetError, InputError

RNG = np.random.default_rng(0)
# An octahedron pulled out of shape: closed, counter-clockwise from outside.
VERTICES = np.array([(1, 0, 0), (-1.2, 0, 0), (0, 0.7, 0), (0, -1, 0), (0, 0, 1.5), (0, 0, -1)], np.float32) / 10
FACES = np.array([(0, 2, 4), (2, 1, 4), (1, 3, 4), (3, 0, 4), (2, 0, 5), (1, 2, 5), (3, 1, 5), (0, 3, 5)], np.int32)
COLORS = RNG.random((6, 3))
WRITERS = {"obj": mesh.write_obj, "ply": mesh.write_ply, "glb": mesh.write_glb}
READERS = {"obj": mesh.read_obj, "ply": mesh.read_ply}


def _trimesh(path):
    trimesh = pytest.importorskip("trimesh")
    return trimesh.load(path, process=False, maintain_order=True, force="mesh")


def _glb(path):
    content = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", content)
    size, kind = struct.unpack_from("<I4s", content, 12)
    assert (magic, version, length, kind) == (b"glTF", 2, len(content), b"JSON")
    document = json.loads(content[20 : 20 + size])
    rest, kind = struct.unpack_from("<I4s", content, 20 + size)
    assert kind == b"BIN\0" and 28 + size + rest == length and length % 4 == 0
    return document, content[28 + size :]


def test_normals_agree_with_trimesh_and_point_outwards():
    trimesh = pytest.importorskip("trimesh")
    normals = mesh.vertex_normals(VERTICES, FACES)
    solid = trimesh.Trimesh(VERTICES, FACES, process=False)
    crosses = np.cross(*(solid.triangles[:, k] - solid.triangles[:, 0] for k in (1, 2)))
    want = solid.faces_sparse @ crosses
    np.testing.assert_allclose(normals, want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-5)
    assert normals.dtype == np.float32 and ((normals * VERTICES).sum(1) > 0).all()


def test_normals_turn_with_the_mesh():
    turn, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    vertices = VERTICES.astype(np.float64)
    np.testing.assert_allclose(
        mesh.vertex_normals(vertices @ turn.T, FACES), mesh.vertex_normals(vertices, FACES) @ turn.T, atol=1e-12
    )


def test_a_vertex_without_faces_has_a_unit_normal():
    normals = mesh.vertex_normals(np.concatenate([VERTICES, [[9, 9, 9]]]), FACES)
    np.testing.assert_array_equal(normals[-1], [0, 0, 1])


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("colors", [None, COLORS])
def test_trimesh_reads_what_is_written(form, colors, tmp_path):
    path = WRITERS[form](tmp_path / "new" / f"head.{form}", VERTICES, FACES, colors, comment="a head; metres")
    solid = _trimesh(path)
    np.testing.assert_allclose(solid.vertices, VERTICES, atol=1e-6)
    np.testing.assert_array_equal(solid.faces, FACES)
    if colors is not None and form != "glb":
        np.testing.assert_allclose(solid.visual.vertex_colors[:, :3] / 255, colors, atol=0.003)


@pytest.mark.parametrize("form", READERS)
@pytest.mark.parametrize("colors", [None, COLORS])
def test_what_is_written_is_read_back(form, colors, tmp_path):
    path = WRITERS[form](tmp_path / f"head.{form}", VERTICES, FACES, colors, comment="one\ntwo")
    back = READERS[form](path)
    np.testing.assert_allclose(back.vertices, VERTICES, atol=1e-7)
    np.testing.assert_array_equal(back.faces, FACES)
    assert back.faces.dtype == np.int32 and (back.colors is None) == (colors is None)
    if colors is not None:
        np.testing.assert_allclose(back.colors, colors, atol=0.003)


def test_glb_is_what_the_standard_says(tmp_path):
    document, binary = _glb(mesh.write_glb(tmp_path / "head.glb", VERTICES, FACES, COLORS, comment="CC0"))
    primitive = document["meshes"][0]["primitives"][0]
    arrays = {}
    for name, number in (primitive["attributes"] | {"indices": primitive["indices"]}).items():
        accessor = document["accessors"][number]
        view = document["bufferViews"][accessor["bufferView"]]
        kind = {5126: "<f4", 5125: "<u4"}[accessor["componentType"]]
        chunk = binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
        arrays[name] = np.frombuffer(chunk, kind).reshape(accessor["count"], -1)
        assert view["byteOffset"] % 4 == 0 and view["target"] == (34963 if name == "indices" else 34962)
    np.testing.assert_array_equal(arrays["POSITION"], VERTICES)
    np.testing.assert_array_equal(arrays["indices"].reshape(-1, 3), FACES)
    np.testing.assert_allclose(np.linalg.norm(arrays["NORMAL"], axis=1), 1, atol=1e-6)
    linear = np.where(COLORS <= 0.04045, COLORS / 12.92, ((COLORS + 0.055) / 1.055) ** 2.4)
    np.testing.assert_allclose(arrays["COLOR_0"], linear, atol=1e-6)
    box = document["accessors"][primitive["attributes"]["POSITION"]]
    np.testing.assert_array_equal([box["min"], box["max"]], [VERTICES.min(0), VERTICES.max(0)])
    assert document["buffers"] == [{"byteLength": len(binary)}]
    assert document["asset"] == {"version": "2.0", "generator": "chebface", "copyright": "CC0"}
    assert document["materials"][0]["pbrMetallicRoughness"]["metallicFactor"] == 0


def test_obj_keeps_texture_coordinates(tmp_path):
    uv, uv_faces = RNG.random((9, 2)), RNG.integers(0, 9, (8, 3)).astype(np.int32)
    back = mesh.read_obj(mesh.write_obj(tmp_path / "x.obj", VERTICES, FACES, uv=uv, uv_faces=uv_faces))
    np.testing.assert_allclose(back.uv, uv, atol=1e-6)
    np.testing.assert_array_equal(back.uv_faces, uv_faces)
    np.testing.assert_array_equal(back.faces, FACES)


def test_obj_in_every_form(tmp_path):
    path = tmp_path / "forms.obj"
    path.write_bytes(
        b"# caf\xe9\r\nmtllib none.mtl\no head\nv 0 0 0 1 0 0\nv 1 0 0 0 1 0\n\nv 1 1 0 0 0 1\nv 0 1 0 1 1 1 \n"
        b"vn 0 0 1\ns off\nusemtl skin\nf 1 2 3 4\nf 1//1 2//1 3//1\nf -4 -3 -2\nv 0 0 1 0 0 0\nf 5 \\\n1 2\n"
    )
    back = mesh.read_obj(path)
    np.testing.assert_array_equal(back.faces, [(0, 1, 2), (0, 2, 3), (0, 1, 2), (0, 1, 2), (4, 0, 1)])
    np.testing.assert_array_equal(back.colors[:2], [(1, 0, 0), (0, 1, 0)])
    assert back.vertices.shape == (5, 3) and back.uv is None
    path.write_text("v 0 0 0 1.0\nv 1 0 0 1.0\nv 1 1 0 1.0\nvt 0 0\nvt 1 0 0\nvt 1 1\nf 1/3/1 2/2/1 3/-3/1\n")
    back = mesh.read_obj(path)
    np.testing.assert_array_equal(back.uv_faces, [(2, 1, 0)])
    assert back.colors is None and back.vertices.shape == (3, 3)
    path.write_text("v 0 0 0\nv 1 0 0\n")
    assert mesh.read_obj(path).faces.shape == (0, 3)


FORMS = {
    "plain": "v 0 0 0\nv 1 0 0\nv 0 1 -1e-3\nf 1 2 3\nf 3 2 1\n",
    "windows, spaces and a comment": "# made\r\nv  0 0 0 \r\nv  1 0 0 \r\nv  0 +1. .5 \r\n\r\nf  1 2 3 \r\n",
    "colours, normals between": "v 0 0 0 1 0 0\nvn 0 0 1\nv 1 0 0 0 1 0\nvn 0 0 1\nv 0 1 0 0 0 1\nf 1//1 2//2 3//1\n",
    "weights": "v 0 0 0 1\nv 1 0 0 1\nv 0 1 0 1\nf 1 2 3\n",
    "texture": "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nf 1/1 2/2 3/1\nf 3/2 2/2 1/1\n",
    "texture of three": "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0 0\nvt 1 0 0\nvn 0 0 1\ng a\nf 1/1/1 2/2/1 3/1/1\n",
    "texture unused": "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nf 1 2 3\n",
    "quads": "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 3/1 4/1\nf 4/1 3/1 2/1 1/1\n",
    "no faces": "v 0 0 0\nv 1 0 0\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_obj_in_bulk_is_what_it_is_line_by_line(name, tmp_path):
    path = tmp_path / "x.obj"
    path.write_bytes(FORMS[name].encode())
    careful = mesh._any_obj(path, path.read_bytes())
    bulk = mesh._regular_obj(path.read_bytes())
    assert bulk is not None
    for field in dataclasses.fields(mesh.Mesh):
        one, other = getattr(bulk, field.name), getattr(careful, field.name)
        assert (one is None) == (other is None), field.name
        if one is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


ABC = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"
ODD = ["v 1.5-2 0\nv 1 0 0\n", "v 1.2.3 1.2.3 1.2.3\n", "v 1_0 0 0\n", " v 1 0 0\n", "v 1 0 0 # here\n", "\tv 1 0 0\n"]
ODD += ["v 1 0 0 1 1 1\n", "v 1 0\n", "v\n", "v nan 0 0\n", "v 1 0 0\\\nv 1 0 0\n", "v 1 0 0\x0cv 1 0 0\n", "f 1 2\n"]
ODD += [
    "v 1 0 0\rv 2 0 0\n",
    "v 1\xa00 0\n",
    "f 1 2 0\n",
    "f 1 2 -1\n",
    "f 1 2 2147483649\n",
    "f 1 2 99999999999999999999\n",
]
ODD += [
    "f 1// 2// 3//\n",
    "f 1/ 2/ 3/\n",
    "f 1//1 2/1/ 3//1\n",
    "f 1/1 2/1 3/1\n",
    "f 1/1//1 2/1//1 3/1//1\n",
    "f 1 2 3/1\n",
]
ODD += [
    "f 1.0 2 3\n",
    "f 1 2 3\nf 1 2 3 1\n",
    "f 1//1 2//1 3//1\nf 1 2 3\n",
    "f\n",
    "vt 0\nf 1/1 2/1 3/1\n",
    "vt a 0\n",
]
ODD += ["vt 0 0\nvt 0 0 0\n", "v 1e 0 0\n", "v e 0 0\n", "f 1\n"]


@pytest.mark.parametrize("more", ODD)
def test_obj_that_is_odd_in_any_way_is_read_line_by_line(more, tmp_path):
    for text in (ABC + more, more + ABC):
        assert mesh._regular_obj(text.encode("latin-1")) is None
    assert mesh._regular_obj(b"") is None


PLY_HEAD = "comment made by hand\nelement vertex 4\nproperty double x\nproperty float y\nproperty float z\n"
PLY_TAIL = "element face 2\nproperty list uchar uint vertex_index\nproperty uchar flag\n"
PLY_TAIL += "element edge 1\nproperty int a\n"


def test_ply_as_text_with_quads_colours_and_more(tmp_path):
    path = tmp_path / "x.ply"
    colors = "".join(f"property uchar {name}\n" for name in ("red", "green", "blue", "alpha"))
    path.write_text(
        f"ply\nformat ascii 1.0\n{PLY_HEAD}{colors}{PLY_TAIL}end_header\n"
        "0 0 0 255 0 0 9\n1 0 0 0 255 0 9\n1 1 0 0 0 255 9\n0 1 0 51 51 51 9\n4 0 1 2 3 7\n3 0 1 3 7\n5\n"
    )
    back = mesh.read_ply(path)
    np.testing.assert_array_equal(back.faces, [(0, 1, 2), (0, 2, 3), (0, 1, 3)])
    np.testing.assert_allclose(back.colors[[0, 3]], [(1, 0, 0), (0.2, 0.2, 0.2)])


@pytest.mark.parametrize("order", ["<", ">"])
def test_ply_in_both_byte_orders(order, tmp_path):
    name = {"<": "binary_little_endian", ">": "binary_big_endian"}[order]
    body = b"".join(struct.pack(order + "dff", *row) for row in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0.5)))
    body += struct.pack(order + "B4IB", 4, 0, 1, 2, 3, 7) + struct.pack(order + "B3IB", 3, 0, 1, 3, 7)
    path = tmp_path / "x.ply"
    head = f"ply\r\nformat {name} 1.0\r\n{PLY_HEAD}{PLY_TAIL}end_header\r\n" if order == "<" else ""
    head = head or f"ply\nformat {name} 1.0\n{PLY_HEAD}{PLY_TAIL}end_header\n"
    path.write_bytes(head.encode() + body + struct.pack(order + "i", 1))
    back = mesh.read_ply(path)
    np.testing.assert_array_equal(back.faces, [(0, 1, 2), (0, 2, 3), (0, 1, 3)])
    np.testing.assert_array_equal(back.vertices[3], [0, 1, 0.5])
    assert back.colors is None


def test_trimesh_agrees_on_real_scans(assets):
    for name in ("scans/meshmonk/DemoFace_10K.obj", "flame_topology/head_template_uv.obj"):
        back, solid = mesh.read_obj(assets / name), _trimesh(assets / name)
        np.testing.assert_array_equal(back.faces, solid.faces)
        np.testing.assert_allclose(back.vertices, solid.vertices, atol=1e-6)


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = mesh.write_whole(tmp_path / "a" / "b.txt", b"old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(mesh.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        mesh.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["b.txt"]


OUTSIDE = np.array([[0, 1, 6]])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: mesh.vertex_normals(VERTICES[:, :2], FACES), r"vertices: expected \(N, 3\) floats"),
        (lambda p: mesh.vertex_normals(VERTICES, FACES[:, :2]), r"faces: expected \(M, 3\) integers"),
        (lambda p: mesh.vertex_normals(VERTICES, OUTSIDE), r"indices in 0\.\.5, got 0\.\.6"),
        (lambda p: mesh.write_ply(p, VERTICES * np.nan, FACES), "vertices: expected finite"),
        (lambda p: mesh.write_glb(p, VERTICES, FACES, COLORS * 255), r"colors: expected \(6, 3\) in \[0, 1\]"),
        (lambda p: mesh.write_obj(p, VERTICES, FACES, COLORS[:3]), "colors: expected"),
        (lambda p: mesh.write_obj(p, VERTICES, FACES, uv=np.zeros((3, 2))), "both or neither"),
        (lambda p: mesh.write_obj(p, VERTICES, FACES, uv=np.zeros((3, 3)), uv_faces=FACES), "uv, uv_faces: expected"),
        (lambda p: mesh.write_obj(p, VERTICES, FACES, uv=np.zeros((3, 2)), uv_faces=FACES), "uv_faces: expected"),
    ],
)
def test_wrong_arrays_are_named(call, words, tmp_path):
    with pytest.raises(InputError, match=words):
        call(tmp_path / "x")
    assert not list(tmp_path.iterdir())


THREE = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<html>", "expected vertices with 3 coordinates"),
        ("v 0 0\nv 1 0\n", "expected vertices with 3 coordinates"),
        ("v 0 0 zero\n", "line 1 cannot be read"),
        (THREE + "f 1 2\n", "a face with 2 corners"),
        (THREE + "f 1 2 0\n", "line 4 cannot be read .*index 0 with 3"),
        (THREE + "f 1 2 -4\n", "index -4"),
        (THREE + "f 1 2 4\n", r"faces point outside 0\.\.2"),
        (THREE + "vt 0 0\nf 1/1 2/1 3/2\n", r"texture faces point outside 0\.\.0"),
        (THREE + "vt 0\nf 1/1 2/1 3/1\n", "texture points with 2 coordinates"),
        (THREE + "v nan 0 0\nf 1 2 3\n", "not finite"),
        (THREE + f"f 1 2 {10**12}\n", "a face with the index 999999999999"),
    ],
)
def test_a_damaged_obj_is_named(text, words, tmp_path):
    path = tmp_path / "x.obj"
    path.write_text(text)
    with pytest.raises(AssetError, match=words) as error:
        mesh.read_obj(path)
    assert str(path) in str(error.value)


ASCII = "ply\nformat ascii 1.0\n"
XYZ = "property float x\nproperty float y\nproperty float z\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<html>", r"not a PLY \(no header\)"),
        (ASCII + "element vertex 1\nend_header\n0 0 0\n", "no vertices with x, y, z"),
        (ASCII + "element vertex many\nend_header\n", "header line cannot be read: 'element vertex many'"),
        (ASCII + "element vertex 1\nproperty quaternion x\nend_header\n", "header line cannot be read"),
        (f"ply\nformat morse 1.0\nelement vertex 1\n{XYZ}end_header\n", "format ascii or binary, got 'morse'"),
        (f"{ASCII}element vertex 2\n{XYZ}end_header\n0 0 0\n", "1 of 2 vertex lines"),
        (f"{ASCII}element vertex 1\n{XYZ}end_header\n0 0\n", "cut short or damaged"),
        (
            f"{ASCII}element vertex 1\n{XYZ}element face 1\nproperty list uchar int vertex_indices\nend_header\n"
            "0 0 0\n3 0 0\n",
            "2 of 3 entries in a list",
        ),
        (
            f"{ASCII}element vertex 1\n{XYZ}element face 1\nproperty list uchar int vertex_indices\nend_header\n"
            "0 0 0\n2 0 0\n",
            "a face with 2 corners",
        ),
        (f"{ASCII}element vertex 1\n{XYZ}end_header\ninf 0 0\n", "not finite"),
    ],
)
def test_a_damaged_ply_is_named(text, words, tmp_path):
    path = tmp_path / "x.ply"
    path.write_text(text)
    with pytest.raises(AssetError, match=words) as error:
        mesh.read_ply(path)
    assert str(path) in str(error.value)


def test_a_ply_cut_anywhere_is_named(tmp_path):
    whole = mesh.write_ply(tmp_path / "x.ply", VERTICES, FACES, COLORS).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.ply").write_bytes(whole[:length])
        with pytest.raises(AssetError, match=r"cut\.ply"):
            mesh.read_ply(tmp_path / "cut.ply")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AssetError, match=r"mesh .*none\.obj: cannot be read \(No such file"):
        mesh.read_obj(tmp_path / "none.obj")
    with pytest.raises(AssetError, match=r"mesh .*none\.ply: cannot be read"):
        mesh.read_ply(tmp_path / "none.ply")
