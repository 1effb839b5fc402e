"""Folders in MICA's layout, whole and damaged, and packing them; tiny pictures, a small head."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from heads_for_tests import make_head
from PIL import Image

from chebface import cli
from chebface.config import Pack, load
from chebface.crop import ARCFACE_POINTS_PX, WIDE_MATRIX, WIDE_PX, align, five_points, transform
from chebface.data import mica
from chebface.data.mica import Picture, Problem, find_names, find_pictures, pack, read_sample
from chebface.data.sample import Shards
from chebface.detect import open_detector
from chebface.errors import AssetError, ConfigError, InputError, UnsafeFileError
from chebface.heads import asset

ACTORS = ["F1001", "F1002", "M1003", "M1004", "M1005"]
SEED = 1  # holds out two of the five at a share of 0.4
WIDE_POINTS_PX = transform(ARCFACE_POINTS_PX, WIDE_MATRIX)


def make_landmarks(scale: float = 0.5, shift: tuple[float, float] = (4, 2)) -> np.ndarray:
    """68 points of a face whose five points are those of the aligned crop, scaled and shifted."""
    points = np.tile(ARCFACE_POINTS_PX[2], (68, 1))
    ring = np.stack([np.cos(np.arange(6)), np.sin(np.arange(6))], 1)
    ring -= ring.mean(0)
    points[36:42], points[42:48] = ARCFACE_POINTS_PX[0] + 5 * ring, ARCFACE_POINTS_PX[1] + 5 * ring
    points[48], points[54] = ARCFACE_POINTS_PX[3:]
    return points * scale + shift


def write_photo(path, size: tuple[int, int] = (64, 80), dots=()) -> None:
    """A smooth picture (H, W), with a bright spot at each of the dots."""
    y, x = np.mgrid[: size[0], : size[1]].astype(float)
    picture = np.stack([40 + 40 * x / size[1], 40 + 40 * y / size[0], np.full(size, 30.0)], -1)
    for dot in dots:
        picture += 170 * np.exp(-((x - dot[0]) ** 2 + (y - dot[1]) ** 2) / 8)[..., None]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path, quality=95)


def write_parameters(path, seed: int = 0, **changes) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **({"pose": rng.normal(size=15), "betas": rng.normal(size=400)} | changes))


def write_list(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.array(content, dtype=object), allow_pickle=True)


@pytest.fixture
def root(tmp_path):
    """STIRLING: five actors with two photographs and their landmarks each, and MICA's crops of all."""
    folder = tmp_path / "datasets" / "STIRLING"
    for number, actor in enumerate(ACTORS):
        write_parameters(folder / "FLAME_parameters" / actor / f"{actor}_N.npz", number)
        for photo in ("a.jpg", "b.png"):
            write_photo(folder / "images" / actor / photo)
            np.save(folder / "images" / actor / f"{photo[0]}_kpt.npy", make_landmarks())
            write_photo(folder / "arcface_input" / actor / photo, (224, 224))
    return tmp_path / "datasets"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    head = asset.save(make_head(6), tmp_path_factory.mktemp("head") / "small.npz")
    return Pack(head=str(head), held_out=0.4, seed=SEED, shard=4)


def betas_of(actor: str) -> np.ndarray:
    rng = np.random.default_rng(ACTORS.index(actor))
    rng.normal(size=15)
    return rng.normal(size=400)[:300].astype(np.float32)


def test_a_folder_without_a_list_gives_every_picture(root):
    assert find_names(root) == ["STIRLING"]
    pictures, problems = find_pictures(root, "STIRLING", Pack())
    assert not problems
    assert [(p.actor, p.path.name) for p in pictures] == [
        (f"STIRLING/{actor}", name) for actor in ACTORS for name in ("a.jpg", "b.png")
    ]
    for picture in pictures:
        np.testing.assert_array_equal(picture.shape, betas_of(picture.actor[9:]))
        assert picture.landmarks == picture.path.with_name(f"{picture.path.stem}_kpt.npy")
        assert (picture.path.parent.parent.name, picture.is_crop) == ("images", False)


def test_photographs_come_before_crops_and_either_can_be_asked_for(root):
    (root / "STIRLING" / "images" / "F1001" / "a.jpg").unlink()
    names = ["STIRLING/images/F1001/b.png", "STIRLING/arcface_input/F1001/a.jpg"]
    pictures, _ = find_pictures(root, "STIRLING", Pack())
    assert {p.path.relative_to(root).as_posix() for p in pictures if p.actor.endswith("F1001")} == set(names)
    assert sum(picture.is_crop for picture in pictures) == 1
    assert [p.is_crop for p in find_pictures(root, "STIRLING", Pack(pictures="images"))[0]] == [False] * 9
    assert [p.is_crop for p in find_pictures(root, "STIRLING", Pack(pictures="arcface"))[0]] == [True] * 10


def test_a_list_says_which_pictures_and_which_parameters(root):
    write_parameters(root / "STIRLING" / "FLAME_parameters" / "F1001" / "other.npz", 4)
    content = {
        "F1001": (["F1001/b.png", "F1001/gone.jpg"], "F1001/other.npz"),
        "M1003": (["M1003/a.jpg", "M1003/b.png"], "M1003/gone.npz"),
    }
    write_list(root / "image_paths" / "STIRLING.npy", content)
    pictures, problems = find_pictures(root, "STIRLING", Pack())
    assert [picture.path.name for picture in pictures] == ["b.png"]
    np.testing.assert_array_equal(pictures[0].shape, betas_of("M1005"))
    assert problems == [
        Problem("missing picture", "STIRLING/F1001/gone.jpg", "in the list, not in images or arcface_input", 1),
        Problem("missing parameters", "STIRLING/FLAME_parameters/M1003/gone.npz", "in the list, not there", 2),
    ]
    (root / "image_paths").rename(root.parent / "elsewhere")
    assert len(find_pictures(root, "STIRLING", Pack())[0]) == 10
    assert len(find_pictures(root, "STIRLING", Pack(lists=str(root.parent / "elsewhere")))[0]) == 1
    with pytest.raises(AssetError, match=r"STIRLING\.npy: not found; set lists"):
        find_pictures(root, "STIRLING", Pack(lists=str(root)))


class _Mischief:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ({"F1001": _Mischief()}, UnsafeFileError, "the pickle asks for builtins.print"),
        ({"F1001": (["../../secret.jpg"], "F1001/a.npz")}, AssetError, "leads out of the dataset's folder"),
        ({"F1001": (["F1001/a.jpg"], "/etc/a.npz")}, AssetError, "leads out of the dataset's folder"),
        ({"F1001": ["F1001/a.jpg"]}, AssetError, "actor 'F1001': expected"),
        ({"F1001": ([7], "F1001/a.npz")}, AssetError, "actor 'F1001': expected"),
        ([1, 2], AssetError, "expected named arrays"),
    ],
)
def test_a_list_that_is_none_is_refused(root, capsys, content, error, says):
    write_list(root / "image_paths" / "STIRLING.npy", content)
    with pytest.raises(error, match=rf"STIRLING\.npy: .*{says}"):
        find_pictures(root, "STIRLING", Pack())
    assert capsys.readouterr().out == ""


def test_a_dataset_without_the_expected_parts_is_named(root, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AssetError, match="no NAME/FLAME_parameters in it"):
        find_names(tmp_path / "empty")
    with pytest.raises(AssetError, match="LYHM: no FLAME_parameters in it; expected MICA's layout"):
        find_pictures(root, "LYHM", Pack())
    write_parameters(root / "LYHM" / "FLAME_parameters" / "00001" / "x.npz")
    with pytest.raises(AssetError, match="LYHM: no images or arcface_input in it; MICA's files come without"):
        find_pictures(root, "LYHM", Pack())
    with pytest.raises(AssetError, match="LYHM: no arcface_input in it"):
        find_pictures(root, "LYHM", Pack(pictures="arcface"))


def test_actors_without_one_part_are_reported(root):
    folder = root / "STIRLING"
    (folder / "FLAME_parameters" / "F1001" / "F1001_N.npz").unlink()
    write_parameters(folder / "FLAME_parameters" / "F1009" / "x.npz")
    write_photo(folder / "images" / "F1010" / "c.jpg")
    pictures, problems = find_pictures(root, "STIRLING", Pack())
    assert len(pictures) == 8
    assert [(p.kind, p.path, p.photos) for p in problems] == [
        ("missing parameters", "STIRLING/FLAME_parameters/F1001", 2),
        ("no pictures", "STIRLING/FLAME_parameters/F1009", 0),
        ("missing parameters", "STIRLING/FLAME_parameters/F1010", 1),
    ]


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: path.write_bytes(b"no zip"), "damaged, or not a file of arrays"),
        (lambda path: np.savez(path, pose=np.zeros(15), beta=np.zeros(400)), "expected `betas`, got pose, beta"),
        (lambda path: write_parameters(path, betas=np.zeros(100)), r"expected `betas` \(300 or more,\).*\(100,\)"),
        (lambda path: write_parameters(path, betas=np.zeros((20, 20))), r"\(20, 20\)"),
        (lambda path: write_parameters(path, betas=np.arange(400)), "int64"),
        (lambda path: write_parameters(path, betas=np.full(400, np.nan)), "not finite"),
        (lambda path: write_parameters(path, betas=np.array(_Mischief())), "refused"),
    ],
)
def test_parameters_that_cannot_be_used_are_reported(root, write, says):
    path = root / "STIRLING" / "FLAME_parameters" / "M1004" / "M1004_N.npz"
    write(path)
    pictures, problems = find_pictures(root, "STIRLING", Pack())
    assert "STIRLING/M1004" not in {picture.actor for picture in pictures}
    (problem,) = problems
    assert (problem.kind, problem.photos) == ("broken parameters", 2)
    assert problem.path == "STIRLING/FLAME_parameters/M1004/M1004_N.npz"
    assert re.search(says, problem.detail)


def test_a_photograph_with_landmarks_becomes_the_wide_frame(tmp_path):
    landmarks = make_landmarks()
    path = tmp_path / "a.png"
    write_photo(path, dots=five_points(landmarks)[2:3])
    np.savetxt(tmp_path / "a_kpt.txt", np.hstack([landmarks, np.ones((68, 1))]))  # a third column is let be
    picture = Picture("X/a", path, np.ones(300, np.float32), False, tmp_path / "a_kpt.txt")
    sample = read_sample(picture, None)
    assert (sample.actor, sample.parameters) == ("X/a", None)
    np.testing.assert_array_equal(sample.shape, np.ones(300))
    np.testing.assert_allclose(five_points(sample.landmarks_px), WIDE_POINTS_PX, atol=1e-3)
    brightest = np.array(np.unravel_index(sample.wide_u8.sum(-1).argmax(), (WIDE_PX, WIDE_PX)))[::-1]
    assert np.abs(brightest - WIDE_POINTS_PX[2]).max() < 2  # photo pixels are 2.7 wide pixels
    assert not sample.wide_u8[0].any()  # outside the photograph


def test_a_crop_of_micas_needs_no_detector(tmp_path):
    """insightface's crop of 224 px has the aligned pixel x at 2 x."""
    for side in (224, 112):
        path = tmp_path / f"{side}.png"
        write_photo(path, (side, side), ARCFACE_POINTS_PX * (side / 112))
        sample = read_sample(Picture("X/a", path, np.zeros(300, np.float32), True, None), None)
        assert sample.landmarks_px is None
        with Image.open(path) as image:
            small = np.asarray(image.resize((112, 112), Image.Resampling.BOX)).astype(int)
        inner = np.s_[4:-4, 4:-4]
        aligned = sample.aligned_u8.astype(int)
        assert np.abs(aligned[inner] - small[inner]).mean() < 3
        for point in ARCFACE_POINTS_PX:
            x, y = point.round().astype(int)
            around = aligned[y - 8 : y + 9, x - 8 : x + 9].sum(-1)
            peak = np.array(np.unravel_index(around.argmax(), around.shape))[::-1] - 8
            assert np.abs(peak - (point - (x, y))).max() < 1.6
        assert not sample.wide_u8[:20].any()  # black, where MICA cut


def test_a_photograph_without_landmarks_is_aligned_by_the_detector(astronaut):
    detector = open_detector("centerface", threads=1)
    picture = Picture("X/a", astronaut, np.zeros(300, np.float32), False, None)
    sample = read_sample(picture, detector)
    with Image.open(astronaut) as image:
        photo_u8 = np.asarray(image.convert("RGB"))
    want = align(photo_u8, detector.detect(photo_u8)[0].points_px)
    assert np.array_equal(sample.wide_u8, want.wide_u8(photo_u8))
    assert np.abs(sample.aligned_u8.astype(int) - want.aligned_u8).mean() < 6
    assert sample.landmarks_px is None


def _break(path, content) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)


@pytest.mark.parametrize(
    ("file", "content", "kind", "says"),
    [
        ("images/M1004/a.jpg", b"<html>", "broken picture", "not an image"),
        ("images/M1004/a.jpg", b"", "broken picture", "empty"),
        ("images/M1004/a_kpt.npy", b"no array", "broken landmarks", ""),
        ("images/M1004/a_kpt.npy", np.zeros((5, 2)), "broken landmarks", r"expected \(68, 2 or more\)"),
        ("images/M1004/a_kpt.npy", np.full((68, 2), "x"), "broken landmarks", "numbers, got"),
        ("images/M1004/a_kpt.npy", make_landmarks(shift=(60, 0)), "broken landmarks", "outside the picture of 80 x 64"),
        ("images/M1004/a_kpt.npy", make_landmarks() * np.nan, "broken landmarks", "68 outside the picture"),
        ("images/M1004/a_kpt.npy", np.full((68, 2), 9.0), "broken landmarks", "coincide"),
    ],
)
def test_a_picture_that_cannot_be_used_says_why(root, file, content, kind, says):
    path = root / "STIRLING" / file
    _break(path, content)
    pictures, _ = find_pictures(root, "STIRLING", Pack())
    (picture,) = (p for p in pictures if p.actor == "STIRLING/M1004" and p.path.name == "a.jpg")
    problem = read_sample(picture, None)
    assert isinstance(problem, Problem)
    assert (problem.kind, problem.photos) == (kind, 1)
    assert re.search(says, problem.detail)


def test_a_crop_of_another_size_and_a_photograph_without_a_face_say_so(tmp_path):
    path = tmp_path / "a.png"
    write_photo(path, (200, 224))
    crop = Picture("X/a", path, np.zeros(300, np.float32), True, None)
    assert read_sample(crop, None).detail == "expected a crop of 224 x 224, got 224 x 200"
    problem = read_sample(dataclasses.replace(crop, is_crop=False), SimpleNamespace(detect=lambda image: []))
    assert (problem.kind, problem.path) == ("no face", str(path))


def test_landmarks_a_little_outside_are_let_be(tmp_path):
    landmarks = make_landmarks()
    landmarks[8] = 40, 70  # a chin that the picture, 64 px high, cuts off
    write_photo(tmp_path / "a.png")
    np.save(tmp_path / "a_kpt.npy", landmarks)
    sample = read_sample(
        Picture("X/a", tmp_path / "a.png", np.zeros(300, np.float32), False, tmp_path / "a_kpt.npy"), None
    )
    assert np.isfinite(sample.landmarks_px).all()


def damage(root) -> None:
    """Three photographs that cannot be used, of two kinds."""
    (root / "STIRLING" / "images" / "F1002" / "b.png").write_bytes(b"<html>")
    (root / "STIRLING" / "FLAME_parameters" / "M1004" / "M1004_N.npz").write_bytes(b"")


def read_files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_packed_parts_share_no_actor_and_say_what_is_left_out(root, settings, tmp_path):
    damage(root)
    seen = []
    report = pack(root, ["STIRLING"], tmp_path / "o", settings, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (8, 8)
    assert report.left_out == {"broken parameters": 2, "broken picture": 1}
    assert {p.path for p in report.problems} == {
        "STIRLING/FLAME_parameters/M1004/M1004_N.npz",
        "STIRLING/images/F1002/b.png",
    }
    assert json.loads((tmp_path / "o" / "report.json").read_text()) == report.to_dict()
    with Shards(tmp_path / "o" / "train") as train, Shards(tmp_path / "o" / "held-out") as held_out:
        assert report.photos == {"train": len(train), "held-out": len(held_out)}
        assert len(train) + len(held_out) == 7
        people = set(train.actors), set(held_out.actors)
        assert report.actors == {"train": len(people[0]), "held-out": len(people[1])}
        assert not people[0] & people[1]
        assert people[0] | people[1] == {f"STIRLING/{a}" for a in ACTORS if a != "M1004"}
        for shards in (train, held_out):
            assert shards.about["head"]["name"] == "test6"
            for index, actor in enumerate(shards.actors):
                np.testing.assert_array_equal(shards[index].shape, betas_of(actor[9:]))
                np.testing.assert_allclose(five_points(shards[index].landmarks_px), WIDE_POINTS_PX, atol=1e-3)


def test_interrupted_packing_goes_on(root, settings, tmp_path):
    damage(root)
    report = pack(root, ["STIRLING"], tmp_path / "whole", settings)
    with pytest.raises(AssetError, match="begun with other settings, another head or other pictures"):
        pack(root, ["STIRLING"], tmp_path / "whole", dataclasses.replace(settings, seed=3))

    def stop(done, total):
        if done > 3:
            raise KeyboardInterrupt

    folder = tmp_path / "o"
    with pytest.raises(KeyboardInterrupt):
        pack(root, ["STIRLING"], folder, settings, progress=stop)
    assert "train/shards.json" not in read_files(folder)
    assert not [name for name in read_files(folder) if name.endswith(".partial")]
    assert pack(root, ["STIRLING"], folder, settings) == report
    assert read_files(folder) == read_files(tmp_path / "whole")
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}
    assert pack(root, ["STIRLING"], folder, settings) == report  # nothing is made twice, nothing forgotten
    assert kept == {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}


def test_crops_alone_are_packed_without_a_detector(root, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(mica, "open_detector", lambda *_, **__: pytest.fail("opened a detector"))
    crops = dataclasses.replace(settings, pictures="arcface", held_out=0.0)
    assert pack(root, ["STIRLING"], tmp_path / "o", crops).photos == {"train": 10}
    assert not (tmp_path / "o" / "held-out").exists()


def test_packing_opens_a_detector_where_a_photograph_has_no_landmarks(root, settings, tmp_path, monkeypatch):
    (root / "STIRLING" / "images" / "F1001" / "a_kpt.npy").unlink()
    points = five_points(make_landmarks())
    detector = SimpleNamespace(detect=lambda image: [SimpleNamespace(points_px=points)])
    monkeypatch.setattr(mica, "open_detector", lambda name, threads: detector)
    pack(root, ["STIRLING"], tmp_path / "o", dataclasses.replace(settings, held_out=0.0))
    with Shards(tmp_path / "o" / "train") as shards:
        assert [shards[i].landmarks_px is None for i in range(10)] == [True] + [False] * 9


def test_packing_refuses_what_cannot_be(root, settings, tmp_path):
    for names in ([], ["STIRLING", "STIRLING"]):
        with pytest.raises(InputError, match="names: expected one or more datasets, each once"):
            pack(root, names, tmp_path / "o", settings)
    mine = asset.save(dataclasses.replace(make_head(6), name="chebface-open"), tmp_path / "open.npz")
    with pytest.raises(InputError, match="head: the numbers in MICA's files are FLAME's"):
        pack(root, ["STIRLING"], tmp_path / "o", dataclasses.replace(settings, head=str(mine)))
    with pytest.raises(AssetError, match="10 pictures of 5 actors leave none for held-out"):
        pack(root, ["STIRLING"], tmp_path / "o", dataclasses.replace(settings, held_out=1e-6))
    for picture in (root / "STIRLING" / "images").glob("*/*.[jp]*g"):
        picture.write_bytes(b"<html>")
    with pytest.raises(AssetError, match=r"no picture for train can be used \(first problem: broken picture, STIRLING"):
        pack(root, ["STIRLING"], tmp_path / "o", settings)
    assert not list((tmp_path / "o").rglob("shards.json"))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("pictures=both", "pictures: expected one of auto, images, arcface"),
        ("held_out=1", "held_out: expected 0 or above and below 1"),
        ("shard=0", "shard: expected above 0"),
        ("jpeg_quality=0", "jpeg_quality: expected 1..95"),
    ],
)
def test_settings_are_checked(setting, says):
    with pytest.raises(ConfigError, match=says):
        load(Pack, None, [setting])


def test_the_command_packs_counts_and_names(root, settings, tmp_path):
    damage(root)
    sets = [f"--set={name}={getattr(settings, name)}" for name in ("head", "held_out", "seed")]
    result = CliRunner().invoke(cli.main, ["data", "pack", str(root), "-o", str(tmp_path / "o"), *sets])
    assert result.exit_code == 0, result.output
    assert "photos of" in result.stdout
    assert "left out, broken parameters: 2 photos; the first: STIRLING/FLAME_parameters/M1004" in result.stderr
    assert "report.json" in result.stderr
    again = ["data", "pack", str(root), "--name", "STIRLING", "-o", str(tmp_path / "o"), "--json", *sets]
    row = json.loads(CliRunner().invoke(cli.main, again).stdout)
    assert row["ok"]
    assert row["left_out"] == {"broken parameters": 2, "broken picture": 1}
    missing = ["data", "pack", str(root), "--name", "LYHM", "-o", str(tmp_path / "p"), *sets]
    result = CliRunner().invoke(cli.main, missing)
    assert (result.exit_code, "LYHM: no FLAME_parameters" in result.stderr) == (1, True)
