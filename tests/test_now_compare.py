"""Two methods compared: pooled medians are right, subjects are what is drawn, and unlike reports are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from chebface.errors import AssetError, InputError
from chebface.now import compare as compared
from chebface.now.compare import STEP_MM, compare, write_compare

SETTINGS = {"benchmark": "now", "method": "ours", "dataset": "NoW", "metrical": False, "radius": 1.4}


def write_folder(folder, distances, kept=None, **settings):
    """A report folder with these distances (S,) mm by image."""
    for image, values in distances.items():
        path = folder / "pairs" / f"{image}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        index = np.arange(len(values), dtype=np.int32) if kept is None else kept
        np.savez(path, distances_mm=np.asarray(values, np.float32), kept=index)
    (folder / "settings.json").write_text(json.dumps(SETTINGS | settings))
    names = {image.split("/")[1] for image in distances}
    summary = {"challenges": {"all": {"images": len(distances)}} | {name: {} for name in names}, "commit": "abc"}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def draw_distances(rng, subjects=6, images=2, points=51, shift=0.0):
    """Errors that subjects have in common, by image of two challenges; of any count of points."""
    levels = rng.gamma(8, 0.12, subjects)
    return {
        f"S{subject}/{challenge}/IMG_{image}": levels[subject] * rng.gamma(2, 0.5, points + subject) + shift
        for subject in range(subjects)
        for challenge in ("selfie", "multiview_neutral")
        for image in range(images)
    }


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(3)
    one, other = draw_distances(rng), draw_distances(rng)
    return write_folder(tmp_path / "a", one), write_folder(tmp_path / "b", other, method="theirs"), one, other


def test_medians_and_means_are_those_of_all_distances_pooled(folders):
    a, b, one, other = folders
    result = compare(a, b, rounds=50)
    assert list(result["challenges"]) == ["all", "multiview_neutral", "selfie"]
    for challenge, row in result["challenges"].items():
        images = [image for image in one if challenge in ("all", image.split("/")[1])]
        assert (row["images"], row["subjects"]) == (len(images), 6)
        for key, distances in (("a_mm", one), ("b_mm", other)):
            pooled = np.concatenate([distances[image].astype(np.float32) for image in images]).astype(np.float64)
            assert row["vertices"] == len(pooled)
            assert row["median"][key] == pytest.approx(np.median(pooled), abs=STEP_MM / 2 + 1e-9)
            assert row["mean"][key] == pytest.approx(pooled.mean(), abs=1e-9)
        assert row["median"]["difference_mm"] == row["median"]["a_mm"] - row["median"]["b_mm"]


def test_drawn_medians_are_those_of_repeated_distances():
    rng = np.random.default_rng(0)
    for sizes in ((5, 8, 1, 40), (1, 1), (4, 4, 4)):
        parts = [rng.gamma(2, rng.uniform(0.1, 5), size) for size in sizes]
        draws = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), 40)
        pools = [compared._count(part) for part in parts]
        for row, median, mean in zip(
            draws, compared._medians(pools, draws)[1:], compared._means(pools, draws)[1:], strict=True
        ):
            pooled = np.concatenate([np.tile(part, times) for part, times in zip(parts, row, strict=True)])
            assert median == pytest.approx(np.median(pooled), abs=STEP_MM / 2 + 1e-9)
            assert mean == pytest.approx(pooled.mean())


def test_a_constant_gain_is_found_exactly(tmp_path):
    distances = draw_distances(np.random.default_rng(1))
    a = write_folder(tmp_path / "a", distances)
    b = write_folder(tmp_path / "b", {image: values + 0.1 for image, values in distances.items()})
    for row in compare(a, b, rounds=400)["challenges"].values():
        for what in ("median", "mean"):
            assert [row[what][key] for key in ("difference_mm", "low_mm", "high_mm")] == pytest.approx(
                [-0.1] * 3, abs=1e-3
            )
            assert row[what]["p"] == 2**-5  # six subjects that agree; 2 / 401 by the rounds alone


def test_the_other_way_round_only_the_sign_changes(folders):
    there, back = (compare(*pair, rounds=300)["challenges"] for pair in (folders[:2], folders[1::-1]))
    for challenge, row in there.items():
        one, other = row["median"], back[challenge]["median"]
        keys = ("difference_mm", "low_mm", "high_mm", "p")
        assert [one[key] for key in keys] == pytest.approx(
            [-other["difference_mm"], -other["high_mm"], -other["low_mm"], other["p"]]
        )


def test_more_images_of_the_same_subjects_are_no_more_evidence(folders, tmp_path):
    a, b, one, other = folders
    twice = [
        write_folder(
            tmp_path / f"{k}{k}", {image + copy: v for image, v in distances.items() for copy in ("", "_again")}
        )
        for k, distances in enumerate((one, other))
    ]
    few, many = compare(a, b, rounds=300)["challenges"], compare(*twice, rounds=300)["challenges"]
    for challenge in few:
        assert many[challenge]["images"] == 2 * few[challenge]["images"]
        assert many[challenge]["mean"] == pytest.approx(few[challenge]["mean"])
        assert many[challenge]["median"] == pytest.approx(few[challenge]["median"], abs=2 * STEP_MM)


def test_a_report_against_itself_differs_in_nothing(folders):
    row = compare(folders[0], folders[0], rounds=99)["challenges"]["all"]["median"]
    assert (row["difference_mm"], row["low_mm"], row["high_mm"], row["p"]) == (0, 0, 0, 1)


def test_one_subject_gives_no_interval(tmp_path):
    distances = draw_distances(np.random.default_rng(1), subjects=1)
    a, b = (write_folder(tmp_path / name, distances) for name in "ab")
    row = compare(a, b, rounds=9)["challenges"]["all"]["mean"]
    assert row["p"] is row["low_mm"] is row["high_mm"] is None
    assert row["difference_mm"] == 0


def test_images_of_one_report_alone_are_left_out_and_named(folders, tmp_path):
    a, _, one, other = folders
    first = next(iter(one))
    fewer = write_folder(tmp_path / "c", {image: values for image, values in other.items() if image != first})
    result = compare(a, fewer, rounds=9)
    assert result["challenges"]["all"]["images"] == len(one) - 1
    assert (result["a"]["only"], result["b"]["only"]) == ([first], [])
    page = write_compare(result, tmp_path / "out").read_text()
    assert f"<li>{first}</li>" in page and "Left out, since only A scored them: 1" in page


def test_pages_say_what_the_numbers_say(folders, tmp_path):
    result = compare(*folders[:2], rounds=99, seed=5)
    page = write_compare(result, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == result
    text = (tmp_path / "out" / "compare.md").read_text()
    row = result["challenges"]["all"]["median"]
    for shown in (page.read_text(), text):
        assert f"{row['a_mm']:.3f}" in shown and "99 rounds, seed 5" in shown and "ours" in shown and "theirs" in shown
    assert "| **all** | **24** | **6** |" in text


def test_the_sentence_names_the_better_one(tmp_path):
    distances = draw_distances(np.random.default_rng(1))
    a = write_folder(tmp_path / "a", distances)
    better = write_folder(tmp_path / "b", {image: 0.5 * values for image, values in distances.items()})
    few = write_folder(tmp_path / "e", {k: v / 2 for k, v in distances.items() if k[:2] in ("S0", "S1", "S2")})
    alone = write_folder(tmp_path / "c", {key: value for key, value in distances.items() if key.startswith("S0")})
    half = write_folder(tmp_path / "d", {k: v / 2 for k, v in distances.items() if k.startswith("S0")})
    for pair, said in (
        ((a, better), "error of B is"),
        ((better, a), "more than chance."),
        ((a, few), "not more than chance may do."),
        ((a, a), "are equal"),
        ((alone, half), "Fewer than two subjects"),
    ):
        assert said in write_compare(compare(*pair, rounds=99), tmp_path / "out").read_text()


def test_rounds_are_checked(folders):
    with pytest.raises(InputError, match="rounds: expected 1"):
        compare(*folders[:2], rounds=0)


@pytest.mark.parametrize(
    ("name", "value"), [("metrical", True), ("benchmark", "stirling"), ("dataset", "other"), ("radius", 1.2)]
)
def test_other_settings_are_refused(folders, tmp_path, name, value):
    other = write_folder(tmp_path / "c", folders[3], **{name: value})
    with pytest.raises(InputError, match=f"{name}: expected the same in both reports"):
        compare(folders[0], other)


def test_no_common_image_is_refused(folders, tmp_path):
    other = write_folder(tmp_path / "c", {"S9/selfie/IMG_0": np.ones(3)})
    with pytest.raises(InputError, match="images that both scored, got none"):
        compare(folders[0], other)


def test_other_scan_vertices_are_refused(folders, tmp_path):
    image, values = next(iter(folders[3].items()))
    other = write_folder(tmp_path / "c", {image: values}, kept=np.arange(1, 1 + len(values), dtype=np.int32))
    with pytest.raises(InputError, match="the same scan vertices"):
        compare(folders[0], other)


def test_what_is_no_report_is_refused(folders, tmp_path):
    with pytest.raises(AssetError, match=r"settings\.json cannot be read"):
        compare(folders[0], tmp_path / "nothing")
