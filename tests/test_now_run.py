"""Benchmarks from end to end: the numbers, the official files, resuming, processes, and every bad input by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from heads_for_tests import make_head
from now_for_tests import (
    BOX,
    PICTURE,
    make_now_dataset,
    make_predictions,
    random_rotation,
    seven_of,
    write_box,
    write_prediction,
)

from chebface import cli, detect, params
from chebface.crop import ARCFACE_POINTS_PX
from chebface.errors import AssetError, InputError, MissingDependencyError, NoFaceError
from chebface.heads import save
from chebface.heads.unpickle import read_named
from chebface.mesh import read_obj
from chebface.now import metric, predict, run
from chebface.now.dataset import Shot, landmark_source, open_dataset

SOURCE = landmark_source()
FEW = ("multiview_neutral", "selfie")
NAMES = ("median_mm", "mean_mm", "std_mm")


@pytest.fixture(scope="module")
def head():
    return make_head(8)


@pytest.fixture(scope="module")
def made(head, tmp_path_factory):
    """Two people, two challenges, one picture each, and predictions half a millimetre off, in metres."""
    folder = tmp_path_factory.mktemp("now")
    made = make_now_dataset(folder / "data", head, challenges=FEW, rounds=1)
    make_predictions(folder / "ours", made)
    return made


@pytest.fixture(scope="module")
def ours(made):
    return made.folder.parent / "ours"


@pytest.fixture(scope="module")
def report(made, ours, tmp_path_factory):
    """The numbers of the predictions, and the folder they are in."""
    output = tmp_path_factory.mktemp("report")
    return run.score(ours, open_dataset(made.folder), output, SOURCE), output


@pytest.fixture
def mine(made, ours, tmp_path):
    """A copy of data and predictions to break."""
    shutil.copytree(made.folder, tmp_path / "data")
    shutil.copytree(ours, tmp_path / "ours")
    return replace(made, folder=tmp_path / "data")


@pytest.fixture
def call():
    return lambda *arguments: CliRunner().invoke(cli.main, ["evaluate", *map(str, arguments)])


def score(made, output, **options):
    return run.score(
        options.pop("predictions", made.folder.parent / "ours"), open_dataset(made.folder), output, SOURCE, **options
    )


def numbers(summary, challenge="all"):
    return [summary["challenges"][challenge][name] for name in NAMES]


def test_end_to_end_by_command(call, made, ours, report, tmp_path):
    result = call("now", ours, "--dataset", made.folder, "-o", tmp_path, "--method", "RECON")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["challenges"] == report[0]["challenges"]
    assert f"{'selfie':24}" in result.stdout and f"{numbers(summary)[0]:8.3f}" in result.stdout
    assert (tmp_path / "report.html").is_file() and str(tmp_path / "report.html") in result.stdout
    assert summary["complete"] and not summary["warnings"] and not summary["missing"]
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["dataset_folder"] == str(made.folder) and settings["landmarks"] == "files"
    assert settings["unit"] is None and settings["radius"] == 1.4 and settings["method"] == "RECON"
    assert (tmp_path / "RECON_computed_distances.npy").is_file()


def test_the_numbers_are_those_of_all_distances_pooled(made, ours, report):
    summary, output = report
    data = open_dataset(made.folder)
    pooled = {"all": []}
    for shot in data.shots:
        scan, mesh = data.scan(shot.subject), read_obj(ours / f"{shot.stem}.obj")
        marks = np.load(ours / f"{shot.stem}.npy")
        fit = metric.fit(scan.vertices, scan.landmarks, mesh.vertices, mesh.faces, marks)
        with np.load(output / "pairs" / f"{shot.stem}.npz", allow_pickle=False) as pair:
            np.testing.assert_allclose(pair["distances_mm"], fit.distances_mm, rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(pair["kept"], fit.kept)
            assert pair["distances_mm"].dtype == np.float32 and pair["kept"].dtype == np.int32
            for name in ("scale", "rotation", "translation_mm", "cost", "start_cost"):
                np.testing.assert_allclose(pair[name], getattr(fit, name))
        for name in ("all", shot.challenge):
            pooled.setdefault(name, []).append(fit.distances_mm)
    assert set(summary["challenges"]) == {"all", *FEW}
    for name, parts in pooled.items():
        everything = np.concatenate(parts)
        wanted = np.median(everything), everything.mean(), everything.std()
        np.testing.assert_allclose(numbers(summary, name), wanted, rtol=1e-5)
        assert summary["challenges"][name]["images"] == len(parts)
        assert summary["challenges"][name]["vertices"] == len(everything)


def test_the_official_files(report, made):
    summary, output = report
    names = ["", *(f"_{challenge}" for challenge in FEW)]
    files = {path.name for path in output.glob("*_computed_distances*")}
    assert files == {f"chebface_computed_distances{n}.npy{end}" for n in names for end in ("", ".meanmedian")}
    for name, challenge in (("", "all"), ("_selfie", "selfie")):
        path = output / f"chebface_computed_distances{name}.npy"
        found = read_named(path)
        lines = [line for line in made.lines if challenge in ("all", line.split("/")[1])]
        assert set(found) == {"computed_distances", "num_missing_files", "input_files"}
        assert found["input_files"].tolist() == lines and found["num_missing_files"] == 0
        pairs = run.read_distances(output, [Shot(*line.split("/")) for line in lines])
        assert isinstance(found["computed_distances"], list)
        for array, pair in zip(found["computed_distances"], pairs, strict=True):
            assert array.dtype == np.float64 and array.ndim == 1
            np.testing.assert_array_equal(array, pair)
        median, mean = map(float, path.with_name(f"{path.name}.meanmedian").read_text().splitlines())
        assert [median, mean] == pytest.approx(numbers(summary, challenge)[:2], rel=1e-9)
    # As the official plots read it: a dictionary in an array without dimensions.
    with open(path, "rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((), False, np.dtype(object))


@pytest.fixture(scope="module")
def exact(head, tmp_path_factory):
    """A scan without noise, holes and hair."""
    folder = tmp_path_factory.mktemp("exact") / "data"
    return make_now_dataset(
        folder, head, subjects=1, challenges=("selfie",), rounds=1, noise_mm=0, holes=0, hairs=0, seed=3
    )


def test_the_truth_under_any_similarity_has_no_error(exact, tmp_path):
    rng = np.random.default_rng(0)
    truth = next(iter(exact.people.values()))
    vertices = 3 * truth @ random_rotation(rng).T + rng.normal(size=3)
    write_prediction(tmp_path / "ours", exact.lines[0], exact.head, vertices)
    summary = score(exact, tmp_path / "r", predictions=tmp_path / "ours")
    assert numbers(summary)[0] < 1e-3 and numbers(summary)[1] < 1e-3  # OBJ has seven digits


def test_a_wrong_size_counts_only_when_metrical(exact, tmp_path):
    truth = next(iter(exact.people.values()))
    write_prediction(tmp_path / "ours", exact.lines[0], exact.head, 1.1 * truth)
    free = score(exact, tmp_path / "a", predictions=tmp_path / "ours")
    sized = score(exact, tmp_path / "b", predictions=tmp_path / "ours", metrical=True, unit="m")
    assert numbers(free)[1] < 1e-3 and numbers(sized)[1] > 0.5
    assert (tmp_path / "b" / "chebface_metrical_computed_distances.npy").is_file()
    write_prediction(tmp_path / "ours", exact.lines[0], exact.head, truth)
    assert numbers(score(exact, tmp_path / "b", predictions=tmp_path / "ours", metrical=True, unit="m"))[1] < 1e-3


def test_a_unit_that_is_not_declared_is_detected_and_said(call, exact, tmp_path):
    for unit in ("mm", "cm"):
        make_predictions(tmp_path / unit, exact, unit=unit)
        options = "--dataset", exact.folder, "--metrical", "-o", tmp_path / f"r{unit}"
        result = call("now", tmp_path / unit, *options)
        assert result.exit_code == 0, result.output
        assert f"warning: unit: not declared; the size of the first mesh says {unit}" in result.stderr
        assert json.loads((tmp_path / f"r{unit}" / "settings.json").read_text())["unit"] == unit


def test_finished_pairs_are_kept_while_their_files_are_the_same(mine, tmp_path, monkeypatch):
    first = score(mine, tmp_path / "r")
    fits, real = [], metric.fit

    def counting(*arguments, **options):
        fits.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(metric, "fit", counting)
    steps = []
    assert score(mine, tmp_path / "r", progress=lambda done, total: steps.append((done, total))) == first
    assert not fits and steps == [(k, 4) for k in (1, 2, 3, 4)]
    one, two, three, _ = (Shot(*line.split("/")) for line in mine.lines)
    run.pair_path(tmp_path / "r", one).unlink()
    run.pair_path(tmp_path / "r", two).write_bytes(b"half")
    assert score(mine, tmp_path / "r") == first and len(fits) == 2
    write_prediction(tmp_path / "ours", three.line, mine.head, mine.people[three.subject] * (1.0, 1.0, 1.02))
    assert numbers(score(mine, tmp_path / "r")) != numbers(first) and len(fits) == 3
    marks = next((mine.folder / "scans_lmks_onlypp" / one.subject).glob("*.pp"))
    marks.write_text(marks.read_text() + "\n")
    score(mine, tmp_path / "r")
    assert len(fits) == 5  # both images of the subject whose landmarks were touched


def test_an_interrupted_run_goes_on(mine, tmp_path, monkeypatch):
    real = metric.fit
    fits = []

    def third_time_unlucky(*arguments, **options):
        fits.append(1)
        if len(fits) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(metric, "fit", third_time_unlucky)
    with pytest.raises(KeyboardInterrupt):
        score(mine, tmp_path / "r")
    assert len(list((tmp_path / "r").rglob("*.npz"))) == 2 and not (tmp_path / "r" / "summary.json").exists()
    assert score(mine, tmp_path / "r")["complete"] and len(fits) == 5
    assert not list((tmp_path / "r").rglob("*.partial"))


def test_other_settings_want_another_folder(mine, tmp_path):
    score(mine, tmp_path / "r")
    with pytest.raises(AssetError, match=r"other settings \(metrical was False, is True; unit was None, is 'm'\)"):
        score(mine, tmp_path / "r", metrical=True, unit="m")
    with pytest.raises(AssetError, match="method was 'chebface', is 'x'"):
        score(mine, tmp_path / "r", method="x")
    few = run.score(tmp_path / "ours", open_dataset(mine.folder, "now", ["selfie"]), tmp_path / "r", SOURCE)
    assert set(few["challenges"]) == {"all", "selfie"} and few["challenges"]["all"]["images"] == 2
    # The official name without a challenge stands for all of them.
    names = {path.name for path in (tmp_path / "r").glob("*.npy")}
    assert names == {"chebface_computed_distances_selfie.npy"}
    (tmp_path / "r" / "settings.json").write_text("{")
    with pytest.raises(AssetError, match=r"settings\.json: damaged"):
        score(mine, tmp_path / "r")


def test_processes_change_nothing_and_name_errors_too(mine, report, tmp_path):
    bad = (tmp_path / "ours" / mine.lines[1]).with_suffix(".obj")
    whole = bad.read_bytes()
    bad.write_bytes(b"")
    steps = []
    two = score(mine, tmp_path / "r", jobs=2, allow_missing=True, progress=lambda *step: steps.append(step))
    assert [each["file"] for each in two["unreadable"]] == [mine.lines[1]] and steps[-1] == (4, 4)
    bad.write_bytes(whole)
    assert score(mine, tmp_path / "r", jobs=2)["challenges"] == report[0]["challenges"]


def test_missing_extra_and_unreadable_fail_the_run_unless_allowed(call, mine, tmp_path):
    ours = tmp_path / "ours"
    gone, broken = (Shot(*line.split("/")) for line in mine.lines[:2])
    score(mine, tmp_path / "r", method="ours")
    (ours / f"{gone.stem}.obj").unlink()
    (ours / f"{broken.stem}.obj").write_text("v 1 2 nan\n")
    shutil.copy(ours / f"{Shot(*mine.lines[2].split('/')).stem}.obj", ours / "stray.obj")
    arguments = "now", ours, "--dataset", mine.folder, "-o", tmp_path / "r"
    result = call(*arguments)
    assert result.exit_code == 1
    for word in ("1 missing", gone.line, "1 extra (stray.obj)", "1 unreadable", broken.line, "--allow-missing"):
        assert word in result.stderr
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert not summary["complete"] and not list((tmp_path / "r").glob("*.npy"))
    assert summary["missing"] == [gone.line] and summary["extra"] == ["stray.obj"]
    assert [each["file"] for each in summary["unreadable"]] == [broken.line]
    assert summary["challenges"]["all"]["images"] == 2
    assert not run.pair_path(tmp_path / "r", gone).exists() and not run.pair_path(tmp_path / "r", broken).exists()
    result = call(*arguments, "--allow-missing")
    assert result.exit_code == 0 and "1 missing: see" in result.stdout and "1 unreadable: see" in result.stdout
    assert read_named(tmp_path / "r" / "ours_computed_distances.npy")["num_missing_files"] == 2
    as_json = json.loads(call(*arguments, "--allow-missing", "--json").stdout)
    assert as_json["ok"] and as_json["missing"] == [gone.line]


def prediction(mine, ending):
    return (mine.folder.parent / "ours" / mine.lines[0]).with_suffix(ending)


def scan(mine):
    return next((mine.folder / "scans" / mine.lines[0].split("/")[0]).glob("*.obj"))


def marks(mine):
    return next((mine.folder / "scans_lmks_onlypp" / mine.lines[0].split("/")[0]).glob("*.pp"))


def shift(path):
    np.save(path, np.load(path) + 5.0)


BAD = {
    "scan without faces": (lambda m: scan(m).write_text("v 1 2 3\nv 1 2 4\nv 1 3 3\n"), r"scan .*: has no faces", 2),
    "empty scan": (lambda m: scan(m).write_bytes(b""), r"natural_head_rotation.*expected vertices", 2),
    "nan in the scan": (lambda m: scan(m).write_text("v nan 0 0\n" + scan(m).read_text()), "not finite", 2),
    "pp with too few points": (
        lambda m: marks(m).write_text("\n".join(marks(m).read_text().splitlines()[:12])),
        r"picked_points\.pp: expected seven points on lines 9 to 15, got 4",
        2,
    ),
    "empty pp": (lambda m: marks(m).write_bytes(b""), r"picked_points\.pp: expected seven points", 2),
    "empty prediction": (lambda m: prediction(m, ".obj").write_bytes(b""), r"IMG_0000\.obj: expected vertices", 1),
    "nan in the prediction": (lambda m: prediction(m, ".obj").write_text("v nan 0 0\nf 1 1 1"), "not finite", 1),
    "prediction without faces": (lambda m: prediction(m, ".obj").write_text("v 0 0 0\n"), "has no faces", 1),
    "empty landmarks": (lambda m: prediction(m, ".npy").write_bytes(b""), r"IMG_0000\.npy: not an array", 1),
    "no landmarks": (lambda m: prediction(m, ".npy").unlink(), r"no landmarks IMG_0000\.npy or \.txt", 1),
    "nan landmarks": (lambda m: np.save(prediction(m, ".npy"), np.full((7, 3), np.nan)), "not finite", 1),
    "landmarks far off the mesh": (lambda m: shift(prediction(m, ".npy")), "landmarks: expected points on the mesh", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_counted(mine, tmp_path, name):
    harm, says, images = BAD[name]
    harm(mine)
    with pytest.raises(AssetError, match=says):
        score(mine, tmp_path / "r")
    summary = score(mine, tmp_path / "r", allow_missing=True)
    assert [each["file"] for each in summary["unreadable"]] == list(mine.lines[:images])
    assert summary["challenges"]["all"]["images"] == 4 - images


def test_metres_when_millimetres_were_said(call, made, ours, tmp_path):
    options = "--dataset", made.folder, "--metrical", "--unit", "mm", "-o", tmp_path
    result = call("now", ours, *options)
    assert result.exit_code == 1
    assert "outer eye corners" in result.stderr and "when read in mm; expected 30 to 300" in result.stderr
    assert "nothing could be scored" in result.stderr
    assert len(json.loads((tmp_path / "summary.json").read_text())["unreadable"]) == 4


def test_nothing_to_score(made, tmp_path):
    with pytest.raises(AssetError, match="no such folder"):
        score(made, tmp_path / "r", predictions=tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AssetError, match=r"4 missing \(.*\).*nothing could be scored"):
        score(made, tmp_path / "r", predictions=tmp_path / "empty", metrical=True, allow_missing=True)


def test_a_mirrored_prediction_is_said(exact, tmp_path):
    truth = next(iter(exact.people.values()))
    write_prediction(tmp_path / "ours", exact.lines[0], exact.head, truth * (-1, 1, 1))
    marks_mirrored = seven_of(exact.head, truth * (-1, 1, 1))
    np.save((tmp_path / "ours" / exact.lines[0]).with_suffix(".npy"), marks_mirrored)
    (warning,) = score(exact, tmp_path / "r", predictions=tmp_path / "ours")["warnings"]
    assert exact.lines[0] in warning and "mirrored" in warning


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"jobs": 0}, "jobs: expected 1 or more, got 0"),
        ({"unit": "inch"}, "unit: expected one of m, dm, cm, mm, got 'inch'"),
        ({"method": ""}, "method: expected"),
        ({"method": "a/b"}, "method: expected"),
    ],
)
def test_arguments_that_cannot_be(made, tmp_path, options, says):
    with pytest.raises(InputError, match=says):
        score(made, tmp_path, **options)


def test_what_is_not_installed_ends_the_run(made, tmp_path, monkeypatch):
    def lacking(*_, **__):
        raise MissingDependencyError("igl: not installed")

    monkeypatch.setattr(metric, "fit", lacking)
    with pytest.raises(MissingDependencyError, match="igl"):
        score(made, tmp_path)


def test_a_prediction_that_vanishes_and_a_pair_that_is_gone(made, tmp_path):
    shot = Shot("a", "b", "c.jpg")
    task = run.Task(open_dataset(made.folder), tmp_path, tmp_path, SOURCE, False, None)
    assert "gone since the run began" in run.score_one(task, shot)
    with pytest.raises(AssetError, match=r"pair .*c\.npz: cannot be read"):
        run.read_distances(tmp_path, [shot])


def test_the_commit_is_empty_outside_of_a_source_tree(monkeypatch):
    def nothing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(run.subprocess, "run", nothing)
    assert run._commit() == ""


def test_stirling_by_command(call, exact, tmp_path):
    subject, data = next(iter(exact.people)), tmp_path / "stirling"
    found = open_dataset(exact.folder).scan(subject)
    (data / "scans").mkdir(parents=True)
    shutil.copy(open_dataset(exact.folder).scan_files(subject)[0], data / "scans" / "F1001_N.obj")
    (data / "annotations").mkdir()
    rows = "\n".join(f"{k + 1} {x} {y} {z}" for k, (x, y, z) in enumerate(found.landmarks.tolist()))
    (data / "annotations" / "F1001_N.lnd").write_text(rows)
    (data / "imagepaths.txt").write_text("F1001_N/HQ/a.jpg\nF1001_N/LQ/b.jpg\n")
    for line in ("F1001_N/HQ/a.jpg", "F1001_N/LQ/b.jpg"):
        write_prediction(tmp_path / "ours", line, exact.head, exact.people[subject])
    result = call("stirling", tmp_path / "ours", "--dataset", data, "-o", tmp_path / "r", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["benchmark"] == "stirling" and summary["radius"] == 1.2
    assert set(summary["challenges"]) == {"all", "HQ", "LQ"} and numbers(summary)[1] < 1e-3
    kept = len(metric.crop_scan(found.vertices, found.landmarks, 1.2))
    assert summary["challenges"]["HQ"]["vertices"] == kept


def test_compare_by_command(call, made, report, tmp_path):
    make_predictions(tmp_path / "theirs", made, off_mm=3, seed=5)
    assert call("now", tmp_path / "theirs", "--dataset", made.folder, "-o", tmp_path / "r").exit_code == 0
    result = call("compare", report[1], tmp_path / "r", "--rounds", 50, "-o", tmp_path / "c")
    assert result.exit_code == 0, result.output
    assert "all median: chebface" in result.stdout and (tmp_path / "c" / "compare.html").is_file()
    found = json.loads(
        call("compare", report[1], tmp_path / "r", "--rounds", 50, "-o", tmp_path / "c", "--json").stdout
    )
    assert found["ok"] and found["challenges"]["all"]["mean"]["difference_mm"] < 0
    assert call("compare", report[1], tmp_path / "no").exit_code == 1


# --predict


class FixedDetector(detect.Detector):
    """Says the same for every picture, and remembers what it saw."""

    name, threshold = "fixed", 0.5

    def __init__(self, *found):
        self.found, self.seen = found, []

    def detect(self, image_u8):
        self.seen.append(image_u8)
        return list(self.found)

    def _find(self, picture_u8):
        return np.zeros((0, 15))


class FakePipeline:
    """A pipeline whose faces have given shape coefficients and are posed, grinning and far away."""

    def __init__(self, head, weights, detector, sha256=None):
        self.topology = SimpleNamespace(head=head.facts | ({"sha256": sha256} if sha256 else {}))
        self.detector, self.weights, self.points = detector, weights, []

    def reconstruct(self, photo):
        found = self.detector.detect(photo)
        if not found:
            raise NoFaceError("photo: no face")
        self.points.append(found[0].points_px)
        parameters = np.full(params.TOTAL, 0.7, np.float32)
        parameters[params.SLICES["shape"]] = self.weights
        return SimpleNamespace(parameters=parameters)


@pytest.fixture
def model(head, monkeypatch):
    """Predicts with fakes: model(dataset, folder) -> record; model.pipelines, model.inner."""
    weights = np.random.default_rng(9).normal(size=params.PARTS["shape"]).astype(np.float32)
    side = 34 * predict.SCALE
    face = detect.Detection(np.array([0.2, 0.1, 0.8, 0.7]).repeat(1) * side, 0.9, ARCFACE_POINTS_PX / 112 * side)
    state = SimpleNamespace(inner=FixedDetector(face), pipelines=[], weights=weights, face=face, sha256=None)
    monkeypatch.setattr(predict, "open_detector", lambda name: state.inner)

    def open_pipeline(detector):
        state.pipelines.append(FakePipeline(head, weights, detector, state.sha256))
        return state.pipelines[-1]

    state.open = open_pipeline
    state.predict = lambda data, folder, **options: predict.predict(open_pipeline, head, data, folder, **options)
    return state


def test_predictions_are_neutral_heads_with_landmarks(model, head, made, tmp_path):
    data, steps = open_dataset(made.folder), []
    record = model.predict(data, tmp_path / "p", progress=lambda *step: steps.append(step))
    assert record["claimed"] == [] and record["failed"] == [] and steps == [(k, 4) for k in (1, 2, 3, 4)]
    wanted = head.template + np.einsum("k,knc->nc", model.weights.astype(float), head.shape_dirs)
    for shot in data.shots:
        found = read_obj(tmp_path / "p" / f"{shot.stem}.obj")
        np.testing.assert_allclose(found.vertices, wanted, atol=1e-6)
        np.testing.assert_array_equal(found.faces, head.faces)
        np.testing.assert_allclose(np.load(tmp_path / "p" / f"{shot.stem}.npy"), seven_of(head, wanted), atol=1e-6)
    assert run.score(tmp_path / "p", data, tmp_path / "r", SOURCE, metrical=True, unit="m")["complete"]


def test_the_box_is_enlarged_as_in_deca(model, made, tmp_path):
    """DECA: the mean side times 1.6, about the middle, 12 % further down."""
    data = open_dataset(made.folder)
    model.predict(data, tmp_path / "p")
    wide, high = BOX["right"] - BOX["left"], BOX["bottom"] - BOX["top"]
    centre, side = predict.square(data.box(data.shots[0]))
    assert side == pytest.approx(1.6 * (wide + high) / 2)
    assert centre == pytest.approx(((BOX["left"] + BOX["right"]) / 2, (BOX["top"] + BOX["bottom"]) / 2 + 0.12 * 34))
    seen = model.inner.seen[0]
    assert seen.shape == (round(side), round(side), 3) and seen.dtype == np.uint8
    photo = np.random.default_rng(0).integers(1, 256, (60, 80, 3), np.uint8)
    cut = predict.cut_out(photo, np.array([40.0, 30.0]), 11.0)
    np.testing.assert_array_equal(cut, photo[24:35, 34:45])
    cut = predict.cut_out(photo, np.array([2.0, 57.0]), 10.0)
    np.testing.assert_array_equal(cut[:8, 3:], photo[52:, :7])
    assert not cut[8:].any() and not cut[:, :3].any()  # black outside of the photo
    with pytest.raises(AssetError, match="outside of a photo of 80 x 60"):
        predict.cut_out(photo, np.array([-40.0, 30.0]), 11.0)


def test_the_box_says_where_the_face_is_when_nothing_is_found(model, made, tmp_path):
    data = open_dataset(made.folder)
    stray = replace(model.face, box_px=np.array([0.0, 53.0, 1.0, 54.0]))  # in a corner, not in the box
    for number, inner in enumerate((FixedDetector(), FixedDetector(stray))):
        model.inner = inner
        record = model.predict(data, tmp_path / f"p{number}")
        assert record["claimed"] == list(made.lines)
        points = model.pipelines[-1].points[0]
        middle = points.mean(0)
        side = round(34 * predict.SCALE)
        assert middle == pytest.approx((side / 2, side / 2 - 0.12 * 34), abs=0.15 * 34)
        assert 0.25 < np.linalg.norm(points[1] - points[0]) / 34 < 0.45  # eyes, of the box's side
    model.inner = FixedDetector(stray, model.face)
    assert model.predict(data, tmp_path / "p2")["claimed"] == []
    np.testing.assert_array_equal(model.pipelines[-1].points[0], model.face.points_px)
    with pytest.raises(InputError, match="image_u8"):
        predict.BoxDetector(detect.open_detector("centerface")).detect(np.zeros((3, 3), np.uint8))


def test_stirling_without_boxes_takes_the_largest_face(model, exact, tmp_path):
    data = replace(open_dataset(exact.folder), benchmark="stirling", shots=(Shot("s", "HQ", "a.jpg"),))
    data = replace(data, folder=tmp_path, challenges=("HQ",))
    picture = next((exact.folder / "NoW_Dataset").rglob("*.jpg"))
    data.picture(data.shots[0]).parent.mkdir(parents=True)
    shutil.copy(picture, data.picture(data.shots[0]))
    assert model.predict(data, tmp_path / "p")["failed"] == []
    assert model.inner.seen[0].shape == (*PICTURE, 3)
    model.inner = FixedDetector()
    assert model.predict(data, tmp_path / "q")["failed"] == [{"file": "s/HQ/a.jpg", "error": "photo: no face"}]


def test_predicting_goes_on_where_it_was_and_lists_photos_that_fail(model, mine, tmp_path):
    data = open_dataset(mine.folder)
    model.inner = FixedDetector()
    model.predict(open_dataset(mine.folder, "now", ["selfie"]), tmp_path / "p")
    first, second = (shot for shot in data.shots if shot.challenge != "selfie")
    data.picture(first).write_bytes(b"no picture")
    write_box((mine.folder / data.layout.boxes / second.line).with_suffix(".npy"), right=0.0)
    record = model.predict(data, tmp_path / "p")
    assert [each["file"] for each in record["failed"]] == [first.line, second.line]
    assert "left < right" in record["failed"][1]["error"]
    assert record["claimed"] == [shot.line for shot in data.shots if shot.challenge == "selfie"]
    assert not model.inner.seen[2:]  # the finished ones are kept
    assert not (tmp_path / "p" / f"{first.stem}.obj").exists()


def test_predictions_of_another_model_are_kept_apart(model, made, ours, tmp_path):
    data = open_dataset(made.folder)
    model.predict(data, tmp_path / "p", about={"weights": "a"})
    with pytest.raises(AssetError, match="holds predictions of another weights; give another folder"):
        model.predict(data, tmp_path / "p", about={"weights": "b"})
    with pytest.raises(AssetError, match=r"has meshes but no predict\.json"):
        model.predict(data, ours)
    (tmp_path / "p" / "predict.json").write_text("[]")
    with pytest.raises(AssetError, match=r"predict\.json: damaged"):
        model.predict(data, tmp_path / "p")
    model.sha256 = "0" * 64
    with pytest.raises(AssetError, match="head test8: the model was made with test8; give that"):
        model.predict(data, tmp_path / "q")


def test_predict_by_command(call, model, head, made, tmp_path, monkeypatch):
    import chebface.reconstruct

    monkeypatch.setattr(chebface.reconstruct, "Reconstructor", lambda weights, head, detector: model.open(detector))
    model.inner = FixedDetector()
    name = save(head, tmp_path / "head.npz")
    options = "--dataset", made.folder, "--head", name, "-o", tmp_path / "r", "--metrical"
    result = call("now", tmp_path / "p", *options, "--predict")
    assert result.exit_code == 0, result.output
    assert "warning: 4 faces were placed by the dataset's box alone" in result.stderr
    settings = json.loads((tmp_path / "r" / "settings.json").read_text())
    assert settings["unit"] == "m" and settings["method"] == "p"
    assert call("now", tmp_path / "p", *options, "--weights", "x").exit_code == 2
    result = call("now", tmp_path / "p", *options, "--predict", "--weights", tmp_path / "x")
    assert result.exit_code == 1 and "not found" in result.stderr


def test_grid_by_command(call, tmp_path, monkeypatch):
    import chebface.now.grid
    import chebface.reconstruct

    calls = []

    def draw(photos, output, pipeline, *, most):
        calls.append((photos, output, pipeline, most))
        return [{"photo": photo, "faces": 1, "error": "dark" if photo == "b" else None} for photo in photos]

    monkeypatch.setattr(chebface.reconstruct, "Reconstructor", lambda weights, detector: (weights, detector))
    monkeypatch.setattr(chebface.now.grid, "grid", draw)
    output = tmp_path / "g.png"
    result = call("grid", "a", "-o", output)
    assert (result.exit_code, result.stdout) == (0, f"{output}\n")
    result = call("grid", "a", "b", "-o", output, "--all-faces", "--json")
    assert result.exit_code == 1 and not json.loads(result.stdout)["ok"]
    assert calls == [(("a",), output, (None, "auto"), 1), (("a", "b"), output, (None, "auto"), None)]
    assert "error: dark" in call("grid", "b", "-o", output).stderr
    assert call("grid", "a", "--server", "x:1", "--weights", "w").exit_code == 2
