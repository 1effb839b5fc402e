"""Reading the benchmarks' files and any method's predictions; what is refused, by name."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from heads_for_tests import make_head
from now_for_tests import BOX, CHALLENGES, make_now_dataset, make_predictions, seven_of, write_box, write_pp

from chebface import cli_now
from chebface.errors import AssetError, InputError, UnsafeFileError
from chebface.heads import save
from chebface.mesh import Mesh, write_obj
from chebface.now import dataset as layouts
from chebface.now.dataset import (
    LAYOUTS,
    UNITS_MM,
    Shot,
    check_unit,
    detect_unit,
    find_extra,
    find_prediction,
    head_landmarks,
    landmark_source,
    open_dataset,
    read_box,
    read_lnd,
    read_pp,
    read_prediction,
)

SEVEN = np.arange(21.0).reshape(7, 3) - 3.25


@pytest.fixture(scope="module")
def head():
    return make_head(6)


@pytest.fixture(scope="module")
def made(head, tmp_path_factory):
    return make_now_dataset(tmp_path_factory.mktemp("now"), head, rounds=0)


@pytest.fixture
def mine(made, tmp_path):
    """A copy to break."""
    shutil.copytree(made.folder, tmp_path / "now")
    return replace(made, folder=tmp_path / "now")


def test_the_official_layout(made):
    found = open_dataset(made.folder)
    assert tuple(shot.line for shot in found.shots) == made.lines and found.asked == list(found.shots)
    assert found.challenges == CHALLENGES and found.layout.radius == 1.4
    for subject, person in made.people.items():
        scan = found.scan(subject)
        assert len(scan.faces) and scan.vertices.shape[1] == 3
        inside = (scan.landmarks - made.translations_mm[subject]) @ made.rotations[subject]
        np.testing.assert_allclose(inside, 1000 * seven_of(made.head, person), atol=1e-3)
    assert all(found.picture(shot).is_file() for shot in found.shots)
    np.testing.assert_array_equal(found.box(found.shots[0]), list(BOX.values()))


def test_colored_scans_read_like_plain_ones(made):
    plain, colored = (open_dataset(made.folder).scan_files(subject)[0] for subject in made.people)
    widths = [len(path.read_text().split("\n", 1)[0].split()) for path in (plain, colored)]
    assert widths == [4, 7]
    subject = list(made.people)[1]
    scan = open_dataset(made.folder).scan(subject)
    bare = [line.split()[1:4] for line in colored.read_text().splitlines() if line.startswith("v ")]
    np.testing.assert_array_equal(scan.vertices, np.array(bare, float))


def test_only_some_challenges_and_another_list(made, tmp_path):
    found = open_dataset(made.folder, "now", ["selfie"])
    assert {shot.challenge for shot in found.asked} == {"selfie"} and len(found.shots) == len(made.lines)
    (tmp_path / "few.txt").write_text(f"\nsome/where/{made.lines[0]}\n\n")
    assert [shot.line for shot in open_dataset(made.folder, images=tmp_path / "few.txt").shots] == [made.lines[0]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"imagepathsvalidation\.txt: cannot be read"),
        ("", "has no image of multiview_neutral"),
        ("a/selfie/x.jpg\nselfie/y.jpg\n", "line 2: expected <subject>/<challenge>/<image>.jpg, got 'selfie/y.jpg'"),
        ("../selfie/x.jpg\n", "line 1: expected"),
        ("a/selfie/x\n", "line 1: expected"),
        ("a/selfie/x.jpg\na/selfie/x.jpg\n", "each image once, got a/selfie/x.jpg again"),
    ],
)
def test_lists_that_are_no_lists(tmp_path, text, says):
    if text is not None:
        (tmp_path / "imagepathsvalidation.txt").write_text(text)
    with pytest.raises(AssetError, match=says):
        open_dataset(tmp_path)


def test_unknown_benchmarks_and_challenges(made):
    with pytest.raises(InputError, match="benchmark: expected one of now, stirling, got 'later'"):
        open_dataset(made.folder, "later")
    with pytest.raises(InputError, match=r"challenge: expected some of .*selfie, got selfies"):
        open_dataset(made.folder, "now", ["selfies"])


def test_the_command_offers_what_the_layouts_have():
    assert LAYOUTS["now"].challenges == cli_now._NOW and LAYOUTS["stirling"].challenges == cli_now._STIRLING
    assert tuple(UNITS_MM) == cli_now._UNITS


def test_stirling_as_assumed(head, tmp_path):
    rows = "".join(f"{k + 1} {x} {y} {z}\n" for k, (x, y, z) in enumerate(SEVEN.tolist()))
    for path, text in (
        ("imagepaths.txt", "F1001_N/HQ/a.jpg\nF1001_N/LQ/b.jpg\n"),
        ("annotations/F_3D_N/f1001_N.lnd", rows + "\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    write_obj(tmp_path / "scans" / "women" / "F1001_n.obj", head.template, head.faces)
    found = open_dataset(tmp_path, "stirling", ["LQ"])
    assert [shot.line for shot in found.asked] == ["F1001_N/LQ/b.jpg"] and found.layout.radius == 1.2
    scan = found.scan("F1001_N")
    np.testing.assert_array_equal(scan.landmarks, SEVEN)
    assert len(scan.vertices) == len(head.template)
    assert found.box(found.shots[0]) is None
    box = write_box(tmp_path / "detected_face/F1001_N/HQ/a.npy", left=1.0)
    assert found.box(found.shots[0])[0] == 1 and box.is_file()
    with pytest.raises(AssetError, match=r"scans: expected one F2\.obj, found 0"):
        found.scan("F2")


def official(path):
    """What the official tool's reader sees: the attributes on lines 8 to 14, counted from 0."""
    lines = path.read_text().splitlines()[8:15]
    words = [dict(word.split("=") for word in line.split(" ") if "=" in word) for line in lines]
    return np.array([[float(word[axis].strip('"')) for axis in "xyz"] for word in words])


def test_pp_has_the_points_that_the_official_tool_takes(tmp_path):
    path = write_pp(tmp_path / "a.pp", SEVEN)
    np.testing.assert_array_equal(read_pp(path), SEVEN)
    np.testing.assert_array_equal(official(path), SEVEN)
    head, points = path.read_text().splitlines()[:8], path.read_text().splitlines()[8:]
    # Without a header of eight lines, the lines still count: points 8 to 14 of fifteen.
    path.write_text("\n".join([*(' <point x="9" y="9" z="9"/>' for _ in range(8)), *points[:7]]))
    np.testing.assert_array_equal(read_pp(path), SEVEN)
    np.testing.assert_array_equal(official(path), SEVEN)
    # Seven points and no more are unmistakable wherever they stand, as in files without user and template.
    path.write_text("\r\n".join([*head[:3], head[7], *points[:7], "</PickedPoints>"]))
    np.testing.assert_array_equal(read_pp(path), SEVEN)
    path.write_text("".join([*head, *points[:7]]))
    np.testing.assert_array_equal(read_pp(path), SEVEN)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: "", r"a\.pp: expected seven points on lines 9 to 15, got 0 there and 0 in all"),
        (lambda text: "\n".join(text.splitlines()[:14]), "got 6 there and 6 in all"),
        (lambda text: "\n".join(text.splitlines()[1:]).replace("<point", "\n<point"), "got 4 there and 9 in all"),
        (lambda text: text.replace(' z="', ' w="', 1), "a point without x, y, z"),
        (lambda text: text.replace(' x="-3.25"', ' x="far"'), "a point without x, y, z"),
        (lambda text: text.replace(' x="-3.25"', ' x="nan"'), "not finite"),
    ],
)
def test_pp_files_that_are_refused(tmp_path, change, says):
    path = write_pp(tmp_path / "a.pp", SEVEN)
    path.write_text(change(path.read_text()))
    with pytest.raises(AssetError, match=says):
        read_pp(path)
    with pytest.raises(AssetError, match=r"no\.pp: cannot be read"):
        read_pp(tmp_path / "no.pp")


@pytest.mark.parametrize(
    ("text", "says"),
    [("1 2 3\n", "seven rows"), ("1 2 3 4\n" * 6 + "1 2 nan 4\n", "finite"), ("a b c d\n" * 7, "rows of as many")],
)
def test_lnd_files_that_are_refused(tmp_path, text, says):
    (tmp_path / "a.lnd").write_text(text)
    with pytest.raises(AssetError, match=says):
        read_lnd(tmp_path / "a.lnd")


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_boxes_that_are_refused(tmp_path, capsys):
    path = write_box(tmp_path / "a.npy")
    np.testing.assert_array_equal(read_box(path), [21, 12, 55, 46])
    for edges, says in (({"right": 3.0}, "left < right"), ({"top": np.nan}, "left < right"), ({"top": "x"}, "numbers")):
        with pytest.raises(AssetError, match=says):
            read_box(write_box(path, **edges))
    np.save(path, np.array({"left": 1.0}, object), allow_pickle=True)
    with pytest.raises(AssetError, match=r"numbers named left, top, right, bottom, got \['left'\]"):
        read_box(path)
    np.save(path, np.array({"left": Bomb()}, object), allow_pickle=True)
    with pytest.raises(UnsafeFileError, match=r"builtins\.print"):
        read_box(path)
    assert "boom" not in capsys.readouterr().out
    with pytest.raises(AssetError, match="cannot be read"):
        read_box(tmp_path / "no.npy")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda obj, pp: obj.write_text("v 1 2 3\nv 2 3 4\n"), r"scan .*\.obj: has no faces"),
        (lambda obj, pp: obj.write_text(""), "expected vertices"),
        (lambda obj, pp: obj.write_text(obj.read_text().replace("v ", "v nan ", 1)), "not finite|3 coordinates"),
        (lambda obj, pp: obj.unlink(), r"expected one \*\.obj, found 0"),
        (lambda obj, pp: shutil.copy(obj, obj.with_name("b.obj")), r"expected one \*\.obj, found 2"),
        (lambda obj, pp: pp.unlink(), r"expected one \*\.pp, found 0"),
    ],
)
def test_scans_that_are_refused(mine, harm, says):
    subject = next(iter(mine.people))
    found = open_dataset(mine.folder)
    harm(*found.scan_files(subject))
    with pytest.raises(AssetError, match=says):
        found.scan(subject)


def test_nan_in_a_scan_is_named(mine):
    found, subject = open_dataset(mine.folder), next(iter(mine.people))
    path, _ = found.scan_files(subject)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["v nan 0 0", *lines[1:]]))
    with pytest.raises(AssetError, match="not finite"):
        found.scan(subject)


@pytest.mark.parametrize("kind", ["obj", "ply"])
@pytest.mark.parametrize("marks", ["npy", "txt"])
def test_predictions_in_every_official_form(made, tmp_path, kind, marks):
    make_predictions(tmp_path, made, kind=kind, landmarks=marks, off_mm=1e-6)
    for shot in open_dataset(made.folder).shots:
        path = find_prediction(tmp_path, shot)
        assert path.suffix == f".{kind}"
        found = read_prediction(path, landmark_source())
        np.testing.assert_allclose(found.vertices, made.people[shot.subject], atol=1e-6)
        np.testing.assert_allclose(found.landmarks, seven_of(made.head, made.people[shot.subject]), atol=1e-6)
        np.testing.assert_array_equal(found.faces, made.head.faces)
    assert find_prediction(tmp_path, Shot("a", "b", "c.jpg")) is None


def test_extra_meshes(made, tmp_path):
    make_predictions(tmp_path, made)
    found = open_dataset(made.folder, "now", ["selfie"])
    assert find_extra(tmp_path, found) == []  # the other challenges' are no strangers
    one = tmp_path / made.lines[0]
    shutil.copy(one.with_suffix(".obj"), one.with_suffix(".ply"))
    shutil.copy(one.with_suffix(".obj"), tmp_path / "stray.obj")
    assert find_extra(tmp_path, found) == [made.lines[0].replace(".jpg", ".ply"), "stray.obj"]


def write_marks(path, content):
    if isinstance(content, str):
        path.with_suffix(".txt").write_text(content)
    else:
        np.save(path.with_suffix(".npy"), content, allow_pickle=True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no landmarks a.npy or .txt beside it"),
        (np.zeros((6, 3)), "expected 7, or 51 or 68"),
        (np.zeros((7, 2)), r"expected \(7, 3\) numbers"),
        (np.full((7, 3), np.nan), "not finite"),
        (np.array({"x": 1}, object), "not an array of numbers"),
        (np.array(["a"]), "not an array of numbers"),
        ("", "expected"),
        ("1 2 3\n1 2\n", "rows of as many numbers"),
    ],
)
def test_landmark_files_that_are_refused(head, tmp_path, content, says):
    path = write_obj(tmp_path / "a.obj", head.template, head.faces)
    if content is not None:
        write_marks(path, content)
    with pytest.raises(AssetError, match=says):
        read_prediction(path, landmark_source())


def test_landmark_files_of_seven_or_more_points(head, tmp_path):
    path = write_obj(tmp_path / "a.obj", head.template, head.faces)
    corners = head.template[head.faces[head.landmark_triangles]]
    everything = np.einsum("pk,pkc->pc", head.landmark_barycentric.astype(float), corners)
    wanted = seven_of(head, head.template.astype(float))
    for marks in (wanted, wanted[None], everything, everything[17:]):
        np.save(path.with_suffix(".npy"), marks)
        np.testing.assert_allclose(read_prediction(path, landmark_source()).landmarks, wanted, atol=1e-9)
    path.with_suffix(".npy").unlink()
    path.with_suffix(".txt").write_text("\n".join(", ".join(map(str, row)) for row in wanted.tolist()))
    np.testing.assert_allclose(read_prediction(path, landmark_source()).landmarks, wanted, atol=1e-9)
    path.with_suffix(".npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(AssetError, match=r"a\.npy: not an array of numbers"):
        read_prediction(path, landmark_source())


def test_landmarks_from_the_topology_of_a_head(head, tmp_path):
    source = landmark_source("embedding", str(save(head, tmp_path / "head.npz")))
    wanted = seven_of(head, head.template.astype(float))
    np.testing.assert_allclose(source.locate(head.template, head.faces), wanted, atol=1e-9)
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(head.faces)[:, [1, 2, 0]]
    np.testing.assert_allclose(source.locate(head.template, shuffled), wanted, atol=1e-9)
    path = write_obj(tmp_path / "b.obj", head.template, head.faces[:, ::-1])
    with pytest.raises(AssetError, match=rf"b\.obj: its {len(head.faces)} triangles are not those of head"):
        read_prediction(path, source)
    with pytest.raises(AssetError, match="read from files here"):
        landmark_source().locate(head.template, head.faces)


def test_landmarks_from_vertex_numbers(head, tmp_path):
    mesh = Mesh(head.template.astype(float), head.faces)
    numbers = np.array([5, 3, 9, 11, 2, 30, 31])
    (tmp_path / "seven.txt").write_text(" ".join(map(str, numbers)))
    (tmp_path / "all.txt").write_text("\n".join(map(str, range(68))))
    np.save(tmp_path / "seven.npy", numbers)
    for name, wanted in (
        ("seven.txt", numbers),
        ("seven.npy", numbers),
        ("all.txt", 17 + np.array(layouts.LANDMARKS_51)),
    ):
        source = landmark_source(tmp_path / name)
        np.testing.assert_array_equal(source.read(tmp_path / "x.obj", mesh), mesh.vertices[wanted])
    assert landmark_source(tmp_path / "seven.txt").name != landmark_source(tmp_path / "all.txt").name
    with pytest.raises(AssetError, match=r"x\.obj: vertices all.txt \w+ wants number 54, the mesh has 40"):
        landmark_source(tmp_path / "all.txt").read(tmp_path / "x.obj", Mesh(mesh.vertices[:40], head.faces))


@pytest.mark.parametrize("form", ["npz", "npy", "pkl"])
@pytest.mark.parametrize(
    "names", [("static_lmk_faces_idx", "static_lmk_bary_coords"), ("lmk_face_idx", "lmk_b_coords")]
)
def test_landmarks_from_flame_embeddings(head, tmp_path, form, names):
    path = tmp_path / f"e.{form}"
    values = head.landmark_triangles[17:].astype(np.uint32), head.landmark_barycentric[17:].astype(float)
    record = dict(zip(names, values, strict=True))
    if form == "npz":
        np.savez(path, **record)
    elif form == "npy":
        np.save(path, np.array(record, object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(record, protocol=2))
    found = landmark_source(path).locate(head.template, head.faces)
    np.testing.assert_allclose(found, seven_of(head, head.template.astype(float)), atol=1e-9)
    with pytest.raises(AssetError, match="wants number"):
        landmark_source(path).locate(head.template, head.faces[:9])


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("a.txt", lambda p: None, "cannot be read"),
        ("a.npy", lambda p: None, "cannot be read"),
        ("a.txt", lambda p: p.write_text("1 2 3"), "expected 7, or 51 or 68"),
        ("a.txt", lambda p: p.write_text("1 2 3 4 5 6 -7"), "vertex numbers from 0"),
        ("a.txt", lambda p: p.write_text("1 2 3 4 5 6 0.5"), "vertex numbers from 0"),
        ("a.npz", lambda p: np.savez(p, x=np.zeros(3)), r"expected lmk_face_idx and lmk_b_coords, got \['x'\]"),
        ("a.npz", lambda p: np.savez(p, lmk_face_idx=np.arange(51), lmk_b_coords=np.zeros((51, 3))), "barycentric"),
    ],
)
def test_landmark_lists_that_are_refused(tmp_path, name, write, says):
    write(tmp_path / name)
    with pytest.raises(AssetError, match=says):
        landmark_source(tmp_path / name)


def test_predictions_without_faces(tmp_path):
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n")
    with pytest.raises(AssetError, match=r"prediction .*a\.obj: has no faces"):
        read_prediction(tmp_path / "a.obj", landmark_source())


@pytest.mark.parametrize("unit", list(UNITS_MM))
def test_units_tell_themselves_by_the_eyes(head, tmp_path, unit):
    marks = seven_of(head, head.template.astype(float)) * 1000 / UNITS_MM[unit]
    assert detect_unit(marks) == unit
    check_unit(tmp_path / "a.obj", marks, unit)
    for other in set(UNITS_MM) - {unit}:
        with pytest.raises(InputError, match=rf"a\.obj: outer eye corners .* mm apart when read in {other};"):
            check_unit(tmp_path / "a.obj", marks, other)


def test_a_size_that_is_no_face(head):
    with pytest.raises(InputError, match=r"unit: outer eye corners .* apart are no face"):
        detect_unit(seven_of(head, head.template.astype(float)) * 1e9)


def test_the_released_embedding(assets):
    """FLAME's own embedding gives the same seven points from each of its files."""
    folder = assets / "flame_topology"
    with np.load(assets / "flame_open" / "flame2023_open_id60.npz", allow_pickle=False) as flame:
        vertices, faces = flame["v_template"].astype(float), flame["faces"].astype(np.int32)
    names = ("landmark_embedding.npy", "landmark_embedding.npz", "flame_static_embedding_68.pkl")
    seven = [landmark_source(folder / name).locate(vertices, faces) for name in names]
    np.testing.assert_allclose(seven[1], seven[0], atol=1e-9)
    np.testing.assert_allclose(seven[2], seven[0], atol=2e-3)
    right, left = seven[0][0], seven[0][3]
    assert right[0] < 0 < left[0] and 0.07 < np.linalg.norm(left - right) < 0.12
    assert detect_unit(seven[0]) == "m"
    with pytest.raises(AssetError, match="are not those of head chebface-open"):
        landmark_source("embedding").locate(vertices, faces)


def test_the_open_head_knows_its_landmarks(head):
    assert head_landmarks(head).locate(head.template, head.faces).shape == (7, 3)
