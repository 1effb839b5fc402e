"""The benchmark's report: its numbers, pictures and pages; the grid of faces; the curves that it draws."""

from __future__ import annotations

import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from heads_for_tests import make_head
from now_for_tests import make_now_dataset, random_rotation
from PIL import Image
from scipy.spatial.transform import Rotation

from chebface import crop, params
from chebface.detect import Detection
from chebface.errors import AssetError, InputError, NoFaceError, ServerUnavailableError
from chebface.face import Face, project_to_photo
from chebface.now import grid as grids
from chebface.now.dataset import Dataset, Scan
from chebface.now.grid import grid, unposed
from chebface.now.metric import crop_scan
from chebface.now.report import CURVE_MM, HEAT_MM, HEAT_PX, TABLE_1, draw_errors, open_report, write_report
from chebface.now.run import ERRORS, read_pair
from chebface.photo import read
from chebface.render import chart

CHALLENGES = ("multiview_neutral", "selfie")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("now")
    made = make_now_dataset(
        folder, make_head(10), subjects=4, challenges=CHALLENGES, rounds=0, holes=1, hairs=2, noise_mm=0.0
    )
    return Dataset(made.folder, "now", (), CHALLENGES), made.lines


@pytest.fixture
def folder(tmp_path, dataset):
    """A report in which the error of the image of subject k is k + 1 mm everywhere, on a scan as `run` leaves it."""
    data, lines = dataset
    for line in lines:
        subject, challenge, name = line.split("/")
        scan = data.scan(subject)
        kept = crop_scan(scan.vertices, scan.landmarks)
        path = tmp_path / "pairs" / subject / challenge / f"{Path(name).stem}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        error = int(subject.split("_")[1]) + 1.0
        np.savez(
            path,
            distances_mm=np.full(len(kept), error, np.float32),
            kept=kept.astype(np.int32),
            scale=1000 + error,
            rotation=np.diag([1.0, 1, -1 if error == 2 else 1]),
            translation_mm=np.zeros(3),
            cost=error**2 * len(kept),
            start_cost=4 * error**2 * len(kept),
        )
    numbers = {"median_mm": 2.51234, "mean_mm": 2.49, "std_mm": 1.1, "vertices": 123456}
    rows = {name: numbers | {"images": 8 if name == "all" else 4} for name in ("all", *CHALLENGES)}
    write_json(
        tmp_path / "summary.json", challenges=rows, missing=[], extra=[], unreadable=[], warnings=[], commit="c0"
    )
    write_json(
        tmp_path / "settings.json",
        benchmark="now",
        method="ours <b>",
        dataset="made here",
        dataset_folder=str(data.folder),
        challenges=CHALLENGES,
        metrical=False,
        radius=1.4,
        unit=None,
    )
    return tmp_path


def write_json(path, **content):
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | content))


class Page(HTMLParser):
    """Tags, sources and text of a page whose tags all end."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.sources, self.text = [], [], [], ""
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "wbr"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_everything_itself(folder):
    path = write_report(folder)
    page = Page(path.read_text())
    assert path == folder / "report.html" and not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.sources) == 2 + 2 * 3 and all(source.startswith("data:image/") for source in page.sources)
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    assert "ours <b>" in page.text  # escaped, so it is text
    assert "2.512" in page.text and "123,456" in page.text and "commit c0" in page.text


def test_markdown_links_to_files_that_are_there(folder):
    write_report(folder)
    text = (folder / "report.md").read_text()
    links = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(links) == 8 and all((folder / link).stat().st_size for link in links)
    for link in links:
        if link.endswith(".png"):
            Image.open(folder / link).load()
    assert "| **all** | **2.512** | **2.490** | **1.100** | **8** | **123,456** |" in text and "ours &lt;b>" in text


@pytest.mark.parametrize("metrical", [False, True])
def test_the_paper_stands_beside_the_run(folder, metrical):
    write_json(folder / "settings.json", metrical=metrical)
    write_report(folder)
    text = (folder / "report.md").read_text()
    for name, row in TABLE_1.items():
        numbers = row[metrical]
        shown = "" if numbers is None else f"| {name} | {' | '.join(f'{n:.2f}' for n in numbers)} |"
        assert (shown in text) if shown else (f"| {name} |" not in text)
    assert "| **ours &lt;b>, this run** | **2.51** | **2.49** | **1.10** |" in text
    assert "NoW test set" in text and "'made here'" in text and "only within one set" in text


def test_stirling_has_no_such_table(folder):
    write_json(folder / "settings.json", benchmark="stirling")
    write_report(folder)
    assert "MICA" not in (folder / "report.md").read_text()


def test_curves_count_the_points_below_an_error(folder):
    write_report(folder)
    ends = chart.LEFT, chart.CURVES_PX[0] - chart.RIGHT
    top, bottom = chart.TOP, chart.CURVES_PX[1] - chart.BOTTOM - 16
    lines = [
        np.array([pair.split(",") for pair in line.get("points").split()], np.float64)
        for line in ElementTree.parse(folder / "curve.svg").getroot().iter("{http://www.w3.org/2000/svg}polyline")
    ]
    assert len(lines) == 3
    for x, y in (line.T for line in lines):
        error, percent = (x - ends[0]) / (ends[1] - ends[0]) * CURVE_MM, (bottom - y) / (bottom - top) * 100
        sizes = [np.load(path)["kept"].size for path in sorted(folder.glob("pairs/*/selfie/*.npz"))]
        for k in range(5):
            between = (error > k + 0.02) & (error < k + 0.98 if k < 4 else error <= CURVE_MM)
            assert between.any()
            np.testing.assert_allclose(percent[between], 100 * sum(sizes[:k]) / sum(sizes), atol=0.05)


def test_best_median_and_worst_are_told(folder):
    write_report(folder)
    text = (folder / "report.md").read_text()
    for rank, number in (("best", 0), ("median", 1), ("worst", 3)):
        assert re.search(rf"\n{rank}: FaMoS_00000{number}_TA/selfie/IMG_\d+, median {number + 1}\.00 mm", text)


def test_an_image_alone_is_drawn_once(folder):
    for path in sorted(folder.glob("pairs/*/*/*.npz"))[1:]:
        path.unlink()
    summary = json.loads((folder / "summary.json").read_text())
    summary["challenges"]["all"]["images"] = 1
    write_json(folder / "summary.json", **summary)
    write_report(folder)
    assert [path.name for path in sorted((folder / "heat").glob("*.png"))] == [f"{CHALLENGES[0]}_only.png", "scale.png"]


def test_refinement_is_told(folder):
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert "| root mean square after refinement, mm | 2.5 | 1 | 4 |" in text
    assert "| after, as a share of the start | 0.5 | 0.5 | 0.5 |" in text
    assert "| scale, mm per unit of the prediction | 1002 | 1001 | 1004 |" in text
    assert "above its start in 0 of 8 images" in text and "mirrored 2 of" in text


def test_what_went_wrong_is_told(folder):
    gone = sorted(folder.glob("pairs/*/selfie/*.npz"))[0]  # of an earlier run: it no longer counts
    missing = "/".join(gone.with_suffix(".jpg").parts[-3:])
    summary = json.loads((folder / "summary.json").read_text())
    summary["challenges"]["all"]["images"] = 7
    summary |= {"missing": [missing], "extra": ["a|b.obj"], "warnings": ["unit: not declared"]}
    summary["unreadable"] = [{"file": "S/selfie/x.jpg", "error": "prediction <x>: has no faces"}]
    write_json(folder / "summary.json", **summary)
    page = Page(write_report(folder).read_text())
    for said in (
        f"1 missing{missing}",
        "1 extraa|b.obj",
        "S/selfie/x.jpg: prediction <x>: has no faces",
        "not declared",
    ):
        assert said in page.text
    assert "Incomplete: of the predictions, 1 missing and 1 unreadable" in page.text
    assert "FaMoS_000000_TA/selfie" not in (folder / "curve.svg").read_text()
    text = (folder / "report.md").read_text()
    assert "| predictions | 7 | 1 | 1 | 1 | 1 |" in text and "- a\\|b.obj" in text


def test_a_scan_that_is_gone_is_said(folder):
    write_json(folder / "settings.json", dataset_folder=str(folder / "moved"))
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert "No pictures: a scan cannot be read again." in text and "moved" in text and "heat/" not in text


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("settings.json", remove, r"settings\.json cannot be read"),
        ("summary.json", lambda path: path.write_text("{"), r"summary\.json is damaged"),
        ("settings.json", lambda path: path.write_text("[]"), "no JSON object"),
        ("summary.json", lambda path: path.write_text("{}"), "has no challenges"),
        ("summary.json", lambda path: path.write_text('{"challenges": {}}'), "one image at least"),
        ("pairs/FaMoS_000000_TA/selfie", shutil.rmtree, "the 8 of summary"),
    ],
)
def test_what_is_no_report_is_refused(folder, file, damage, said):
    damage(folder / file)
    with pytest.raises(AssetError, match=said):
        open_report(folder)


def test_damaged_pairs_are_refused(folder):
    path = next(folder.glob("pairs/*/*/*.npz"))
    content = path.read_bytes()
    for damaged in (content[:100], b"", content.replace(b"start_cost", b"other_cost")):
        path.write_bytes(damaged)
        with pytest.raises(AssetError, match="cannot be read"):
            write_report(folder)
    np.savez(path, distances_mm=np.ones(3), kept=np.arange(4))
    with pytest.raises(AssetError, match="not one each"):
        read_pair(path, *ERRORS)


def test_heat_lies_where_the_error_is_however_the_scan_is_turned(dataset):
    data, lines = dataset
    scan = data.scan(lines[0].split("/")[0])
    kept = crop_scan(scan.vertices, scan.landmarks)
    left = scan.landmarks[3] - scan.landmarks[0]  # towards the subject's left, the right of the picture
    errors = np.where((scan.vertices[kept] - scan.landmarks[4]) @ left > 0, HEAT_MM, 0.0)
    picture = draw_errors(scan, kept, errors).astype(int)
    assert picture.shape == (HEAT_PX, HEAT_PX, 3)
    middle = slice(HEAT_PX // 2 - 20, HEAT_PX // 2 + 20)
    blue, yellow = (picture[middle, x - 10 : x + 10].mean((0, 1)) for x in (HEAT_PX // 4, 3 * HEAT_PX // 4))
    assert yellow[0] - yellow[2] > 100 and blue[2] - blue[0] > 40
    half = draw_errors(scan, kept[errors > 0], errors[errors > 0]).astype(int)[middle, 10:30]
    assert np.ptp(half, axis=2).max() < 10 and half.max() < 240  # what is not kept is grey
    turn = random_rotation(np.random.default_rng(7))
    turned = Scan(scan.vertices @ turn.T + 50, scan.faces, scan.landmarks @ turn.T + 50)
    away = np.abs(draw_errors(turned, kept, errors).astype(int) - picture).max(2)
    assert (away > 8).mean() < 0.01


def test_heat_of_another_scan_is_refused(dataset):
    scan = dataset[0].scan(dataset[1][0].split("/")[0])
    for kept, errors in ((np.array([10**6]), np.ones(1)), (np.arange(3), np.ones(4)), (np.arange(0), np.ones(0))):
        with pytest.raises(InputError, match="kept: expected vertices"):
            draw_errors(scan, kept, errors)


def test_curves_go_where_their_numbers_are():
    picture = ElementTree.fromstring(chart.curves({"a<b": np.array([0.0, 50, 200])}, (0.0, 2.0), "x & y", "%"))
    points = picture.find("{http://www.w3.org/2000/svg}polyline").get("points").split()
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points)
    assert x2 - x1 == x1 - x0 and y1 - y0 == y2 - y1 and (x0, y2) == (chart.LEFT, chart.TOP)  # 200 is cut at 100
    words = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a<b", "x & y", "0", "2", "100"} <= set(words)


@pytest.mark.parametrize("values", [np.zeros(1), np.array([1.0, np.nan]), np.zeros((2, 2))])
def test_curves_refuse_what_they_cannot_draw(values):
    with pytest.raises(InputError, match="x: expected two or more"):
        chart.curves({"x": values}, (0.0, 1.0), "", "")
    with pytest.raises(InputError, match="series: expected one"):
        chart.curves({}, (0.0, 1.0), "", "")


# The grid

TURN = np.array([0.1, 0.6, -0.05])  # axis-angle of the head, rad


def make_face(image_u8, turn=TURN):
    head = make_head(10)
    parameters = np.zeros(params.TOTAL, np.float32)
    parameters[params.SLICES["camera"]] = (7.0, 0, 0)
    parameters[:][params.SLICES["pose"]][params.HEAD_POSE] = turn
    vertices = (head.template @ Rotation.from_rotvec(turn).as_matrix().T).astype(np.float32)
    height, width = image_u8.shape[:2]
    zoom = 112 / height
    cut = crop.Crop(np.zeros((112, 112, 3), np.uint8), np.array([[zoom, 0, 56 - zoom * width / 2], [0, zoom, 0]]))
    landmarks = vertices[:68]
    return Face(
        parameters=parameters,
        vertices=vertices,
        landmarks=landmarks,
        landmarks_px=project_to_photo(landmarks, parameters[params.SLICES["camera"]], cut)[:, :2],
        faces=head.faces,
        crop=cut,
        detection=Detection(np.array([10.0, 10, 60, 60]), 0.9, np.zeros((5, 2))),
        photo_size=(height, width),
    )


class FakePipeline:
    """Two faces in every photo that can be read, unless it is dark."""

    def reconstruct_all(self, photo):
        image_u8 = read(photo)
        if image_u8.mean() < 20:
            raise NoFaceError(f"photo {photo}: no face found")
        return [make_face(image_u8), make_face(image_u8, -TURN)]

    def reconstruct(self, photo):
        return self.reconstruct_all(photo)[0]


@pytest.fixture
def photos(tmp_path):
    for name, color in (("red.png", (200, 40, 40)), ("dark.png", (9, 9, 9))):
        Image.new("RGB", (150, 120), color).save(tmp_path / name)
    (tmp_path / "empty.jpg").write_bytes(b"")
    return [tmp_path / name for name in ("red.png", "dark.png", "empty.jpg")]


def rows_of(path):
    """The grid's cells: rows of four pictures."""
    sheet = np.asarray(Image.open(path)).astype(int)
    head, high, wide = grids.LABEL_PX + 2 * grids.GAP_PX, grids.CELL_PX + grids.LABEL_PX + grids.GAP_PX, grids.CELL_PX
    count = (len(sheet) - head) // high
    return [
        [
            sheet[head + r * high :][: grids.CELL_PX, grids.GAP_PX + c * (wide + grids.GAP_PX) :][:, :wide]
            for c in range(len(grids.COLUMNS))
        ]
        for r in range(count)
    ]


@pytest.mark.parametrize("most", [1, 2, None])
def test_a_row_for_each_face_and_each_failure(photos, tmp_path, most):
    found = grid(photos, tmp_path / "grid.png", FakePipeline(), most=most)
    faces = most or 2
    assert [row["faces"] for row in found] == [faces, 0, 0] and [row["photo"] for row in found] == list(
        map(str, photos)
    )
    assert found[0]["error"] is None and "no face" in found[1]["error"] and "is empty" in found[2]["error"]
    rows = rows_of(tmp_path / "grid.png")
    assert len(rows) == faces + 2
    middle = slice(grids.CELL_PX // 2 - 8, grids.CELL_PX // 2 + 8)
    photo, overlay, front, side = (cell[middle, middle].mean((0, 1)) for cell in rows[0])
    np.testing.assert_allclose(photo, (200, 40, 40), atol=1)
    assert np.abs(overlay - photo).max() > 20  # the mesh is over it
    assert np.ptp(front) < 15 and np.ptp(side) < 15 and front.max() < 240  # clay
    for cells, color in ((rows[-2], 9), (rows[-1], 240)):
        assert np.abs(cells[0][middle, middle] - color).max() <= 1
        words = np.concatenate(cells[1:], 1)
        assert ((words[..., 0] > words[..., 1] + 80).sum() > 50) and (words > 250).mean() > 0.8  # red on white


def test_shapes_look_ahead_however_the_head_is_turned(photos):
    image_u8 = read(photos[0])
    turned, straight = unposed(make_face(image_u8)), make_head(10).template.astype(np.float64)
    np.testing.assert_allclose(turned - turned.mean(0), straight - straight.mean(0), atol=1e-6)
    still = unposed(make_face(image_u8, np.zeros(3)))
    np.testing.assert_allclose(still - still.mean(0), straight - straight.mean(0), atol=1e-6)


def test_a_failure_that_is_not_the_photos_ends_the_grid(photos, tmp_path):
    class Gone:
        def reconstruct(self, photo):
            raise ServerUnavailableError("no server")

    with pytest.raises(ServerUnavailableError):
        grid(photos, tmp_path / "grid.png", Gone())
    assert not (tmp_path / "grid.png").exists()


def test_grids_that_cannot_be_are_refused(photos, tmp_path):
    with pytest.raises(InputError, match="photos: expected one"):
        grid([], tmp_path / "grid.png", FakePipeline())
    with pytest.raises(InputError, match="most: expected 1"):
        grid(photos, tmp_path / "grid.png", FakePipeline(), most=0)
    with pytest.raises(InputError, match=r"expected a \.png"):
        grid(photos, tmp_path / "grid.jpg", FakePipeline())


def test_the_grid_of_a_real_photo(assets, tmp_path):
    from chebface.reconstruct import Reconstructor

    found = grid([assets / "photos" / "astronaut_nasa.png"], tmp_path / "grid.png", Reconstructor())
    assert found[0]["error"] is None
    with Image.open(io.BytesIO((tmp_path / "grid.png").read_bytes())) as picture:
        assert picture.size[0] == len(grids.COLUMNS) * (grids.CELL_PX + grids.GAP_PX) + grids.GAP_PX
