"""The NoW protocol: nearest points, crop, alignment, refinement; and its laws."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import least_squares

from bench import now as bench_now
from bench.record import DisagreesError
from chebface import native
from chebface.errors import AssetError, InputError, MissingDependencyError
from chebface.mesh import read_obj
from chebface.now import metric
from chebface.now import surface as now_surface
from chebface.now.surface import Cloud, Pose, Surface, rotation_about

TURNED = np.linalg.qr(np.random.default_rng(5).standard_normal((3, 3)))[0]
TURNED = TURNED * np.sign(np.linalg.det(TURNED))


def make_face(side=25):
    """A bent sheet with a nose, 200 mm wide, in mm: no two of its directions are alike. Vertices, faces, landmarks."""
    x, y = (grid.ravel() for grid in np.meshgrid(np.linspace(-100, 100, side), np.linspace(-90, 110, side)))
    z = -0.004 * x**2 - 0.003 * y**2 + 30 * np.exp(-((x - 3) ** 2 + (y + 15) ** 2) / 300) + 4 * np.sin(x / 19 + y / 31)
    corner = (np.arange(side - 1)[:, None] * side + np.arange(side - 1)).ravel()
    faces = [corner, corner + 1, corner + side], [corner + 1, corner + side + 1, corner + side]
    vertices = np.stack([x, y, z], 1)
    places = [(-45, 30), (-18, 30), (18, 30), (45, 30), (0, -15), (-24, -40), (24, -40)]
    marks = [vertices[np.hypot(x - a, y - b).argmin()] for a, b in places]
    return vertices, np.concatenate([np.stack(three, 1) for three in faces]), np.array(marks)


def make_scan(seed=0, count=900, noise=0.5):
    """Points near a face that is another one, its landmarks with an error; mm, far from the origin and turned."""
    dice = np.random.default_rng(seed)
    vertices, _, marks = make_face(31)
    other = vertices * [1.05, 0.97, 1.1]
    points = other[dice.integers(0, len(other), count)] + noise * dice.standard_normal((count, 3))
    points, marks = (rows @ TURNED.T + [40, -70, 300] for rows in (points, marks * [1.05, 0.97, 1.1]))
    return points, marks + dice.standard_normal(marks.shape)


def nearest_of_all(points, vertices, faces):
    """By the definition: of every triangle, its interior, three edges and three corners."""
    best = np.full(len(points), np.inf)
    for a, b, c in vertices[faces]:
        for p, q in ((a, b), (b, c), (c, a)):
            along = np.clip((points - p) @ (q - p) / ((q - p) @ (q - p)), 0, 1)
            best = np.minimum(best, np.linalg.norm(points - p - along[:, None] * (q - p), axis=1))
        normal = np.cross(b - a, c - a)
        bary = np.linalg.solve(np.stack([b - a, c - a, normal], 1), (points - a).T)
        inside = (bary[:2] >= 0).all(0) & (bary[:2].sum(0) <= 1)
        best = np.where(inside, np.minimum(best, np.abs(bary[2]) * np.linalg.norm(normal)), best)
    return best


# --- oracle ---

WHICH = ("native", "libigl")


def use(which, monkeypatch):
    """Choose the implementation; both have to be there, or a test of one would be a test of the other."""
    monkeypatch.setattr(now_surface, "_open", OPEN if which == "native" else lambda: None)
    if which == "native" and OPEN() is None:
        pytest.skip(now_surface.implementation())


OPEN = now_surface._open


@pytest.mark.parametrize("which", WHICH)
def test_now_nearest_points_are_those_of_brute_force(which, monkeypatch):
    use(which, monkeypatch)
    dice = np.random.default_rng(0)
    vertices, faces = dice.standard_normal((40, 3)), np.array([dice.choice(40, 3, replace=False) for _ in range(60)])
    points = 1.5 * dice.standard_normal((500, 3))
    closest, triangle, distance = Surface(vertices, faces).nearest(points)
    assert np.allclose(distance, nearest_of_all(points, vertices, faces), rtol=0, atol=1e-12)
    assert np.allclose(np.linalg.norm(points - closest, axis=1), distance, rtol=0, atol=1e-15)
    for point, face in zip(closest[:50], triangle[:50], strict=True):
        assert nearest_of_all(point[None], vertices, faces[face][None])[0] < 1e-12


@pytest.mark.parametrize("which", WHICH)
def test_now_nearest_passes_over_triangles_without_area(which, monkeypatch):
    use(which, monkeypatch)
    vertices, faces, _ = make_face(9)
    flat = np.concatenate([faces, [[0, 0, 1], [7, 7, 7]]])
    points = vertices.mean(0) + 40 * np.random.default_rng(1).standard_normal((200, 3))
    found = Surface(vertices, flat).nearest(points)[2]
    assert np.allclose(found, Surface(vertices, faces).nearest(points)[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("metrical", [False, True])
def test_now_refinement_is_as_low_as_scipy_gets(metrical, which, monkeypatch):
    use(which, monkeypatch)
    points, marks = make_scan()
    vertices, faces, seven = make_face()
    fit = metric.fit(points, marks, vertices, faces, seven, metrical=metrical)
    surface, kept = Surface(vertices, faces), points[fit.kept]

    def distances(x):
        rotation = rotation_about(x[:3]) @ fit.rotation
        scale = fit.scale if metrical else np.exp(x[6])
        return scale * surface.nearest((kept - x[3:6]) @ rotation / scale)[2]

    for off in (0, 0.01):
        start = np.array([*np.zeros(3), *fit.translation_mm, *([] if metrical else [np.log(fit.scale)])]) + off
        found = least_squares(distances, start, x_scale=[0.01] * 3 + [1] * 3 + [0.01] * (not metrical), xtol=1e-10)
        assert fit.cost <= 2 * found.cost * (1 + 1e-6)
    assert fit.cost < 0.8 * fit.start_cost
    assert np.allclose(distances(start - off), fit.distances_mm, rtol=0, atol=1e-9)


@pytest.mark.parametrize("which", WHICH)
def test_now_normal_equations_are_those_of_finite_differences(which, monkeypatch):
    use(which, monkeypatch)
    points, _ = make_scan(count=20, noise=3)
    vertices, faces, _ = make_face()
    surface, pose = Surface(vertices, faces), Pose(1.04, TURNED, np.array([40.0, -70, 300]))
    centre, arm, eps = points.mean(0) + 5, 60.0, 1e-6
    cloud = Cloud(surface, points, centre, arm)
    found = cloud.linearize(pose)
    jacobian = np.empty((len(points), 7))
    for k in range(7):
        step = np.zeros(7)
        step[k] = eps
        ahead, behind = (cloud.linearize(pose.move(sign * step, centre, arm)).distances for sign in (1, -1))
        jacobian[:, k] = (ahead - behind) / (2 * eps)
    assert found.distances.min() > 10 * eps  # none changes sides within a step
    assert np.allclose(found.normal, jacobian.T @ jacobian, rtol=0, atol=1e-4 * np.abs(found.normal).max())
    assert np.allclose(found.gradient, jacobian.T @ found.distances, rtol=0, atol=1e-4 * np.abs(found.gradient).max())


@pytest.mark.parametrize("off", [0.0, 1e-3, 0.3, 20])
def test_now_native_code_computes_the_definition_from_any_guess(off, monkeypatch):
    points, _ = make_scan(count=5000, noise=1)
    points = np.concatenate([points, make_face(31)[0] @ TURNED.T + [40, -70, 300]])
    vertices, faces, _ = make_face(31)  # some points are on the surface, at its vertices
    pose, centre, arm = Pose(1.0, TURNED, np.array([40.0, -70, 300])), points.mean(0), 60.0
    use("libigl", monkeypatch)
    steps = [np.full(7, off), np.array([0, 2 * off, 0, -off, off, 0, off / 2]), np.zeros(7)]
    definition = Cloud(Surface(vertices, faces), points, centre, arm)
    wanted = [definition.linearize(pose.move(step, centre, arm)) for step in steps]
    use("native", monkeypatch)
    for threads in (1, 3):
        cloud = Cloud(Surface(vertices, faces, threads), points, centre, arm)
        for step, right in zip(steps, wanted, strict=True):
            found = cloud.linearize(pose.move(step, centre, arm))
            assert np.allclose(found.distances, right.distances, rtol=0, atol=1e-11)
            assert found.cost == pytest.approx(right.cost, rel=1e-12, abs=1e-20)
            # At a vertex on the surface any triangle around it may be the one whose normal counts.
            apart = right.distances > 1e-9
            if apart.all():
                assert np.allclose(found.gradient, right.gradient, rtol=1e-6, atol=1e-6 * np.abs(right.gradient).max())
                assert np.allclose(found.normal, right.normal, rtol=1e-6, atol=1e-6 * np.abs(right.normal).max())


def wander(points, seed, far):
    """Poses for points of make_scan, each nearer to the one before than the last two were."""
    dice, pose = np.random.default_rng(seed), Pose(1.0, TURNED, np.array([40.0, -70, 300]))
    for size in far * 0.4 ** np.arange(6):
        pose = pose.move(size * dice.standard_normal(7), points.mean(0), 60.0)
        yield pose


@pytest.mark.parametrize("far", [0.02, 1, 30])
def test_now_what_a_cloud_remembers_never_hides_the_nearest_point(far, monkeypatch):
    use("native", monkeypatch)
    points, _ = make_scan(count=1201, noise=2)
    points[::50] += 25 * np.random.default_rng(2).standard_normal((len(points[::50]), 3))
    vertices, faces, _ = make_face()
    surface = Surface(vertices, faces)
    cloud = Cloud(surface, points, points.mean(0), 60.0)
    for pose in wander(points, 4, far):
        wanted = pose.scale * surface.nearest(pose.undo(points))[2]
        assert np.allclose(cloud.linearize(pose).distances, wanted, rtol=0, atol=1e-11)
    assert np.allclose(wanted, pose.scale * nearest_of_all(pose.undo(points), vertices, faces), rtol=0, atol=1e-10)


def test_now_threads_change_not_one_bit():
    points, marks = make_scan(count=4003)
    vertices, faces, seven = make_face()
    one, three = (metric.fit(points, marks, vertices, faces, seven, threads=threads) for threads in (1, 3))
    assert np.array_equal(one.distances_mm, three.distances_mm) and one.cost == three.cost
    assert one.start_cost == three.start_cost and np.array_equal(one.rotation, three.rotation)


@pytest.mark.parametrize("which", WHICH)
def test_now_a_thinned_cloud_is_some_of_the_points_from_everywhere(which, monkeypatch):
    use(which, monkeypatch)
    points, _ = make_scan(count=1000)
    vertices, faces, _ = make_face()
    cloud = Cloud(Surface(vertices, faces), points, points.mean(0), 60.0)
    some = cloud.thin(7)
    assert len(some.points) == len(np.unique(some.points, axis=0)) == 143
    assert all((points == point).all(1).any() for point in some.points)
    assert np.abs(some.points.mean(0) - points.mean(0)).max() < 0.15 * points.std(0).max()
    pose = next(wander(points, 1, 1))
    whole = {tuple(p): d for p, d in zip(points, cloud.linearize(pose).distances, strict=True)}
    wanted = [whole[tuple(point)] for point in some.points]
    assert np.allclose(some.linearize(pose).distances, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("axis", [[0, 0, 0], [1e-9, 0, 0], [0.3, -0.2, 0.5], [0, np.pi, 0], [2, 2, -3]])
def test_now_rotations_are_the_matrix_exponential(axis):
    from scipy.linalg import expm

    x, y, z = axis
    assert np.allclose(rotation_about(np.array(axis, float)), expm([[0, -z, y], [z, 0, -x], [-y, x, 0]]), atol=1e-14)


def test_now_crop_is_the_sphere_of_the_protocol():
    marks = np.array([[-40, 20, 0], [-15, 20, 0], [15, 20, 0], [40, 20, 0], [0, -20, 0], [-20, -40, 0], [20, -40, 0.0]])
    centre, radius = np.array([0, -20 + 0.3 * 40, 0]), (80 + 40) / 2  # by hand
    points = np.random.default_rng(0).uniform(-100, 100, (5000, 3))
    away = np.linalg.norm(points - centre, axis=1)
    assert np.array_equal(metric.crop_scan(points, marks), np.flatnonzero(away <= 1.4 * radius))
    assert np.array_equal(metric.crop_scan(points, marks, metric.STIRLING_RADIUS), np.flatnonzero(away <= 1.2 * radius))


# --- law ---


def test_now_a_scan_predicted_as_itself_has_no_error():
    vertices, faces, seven = make_face()
    place = vertices @ TURNED.T * 1e-3 + [0.3, -2, 1]
    fit = metric.fit(vertices, seven, place, faces, seven @ TURNED.T * 1e-3 + [0.3, -2, 1])
    assert fit.distances_mm.max() < 1e-7 and fit.scale == pytest.approx(1000)
    back = fit.scale * place @ fit.rotation.T + fit.translation_mm
    assert np.allclose(back, vertices, rtol=0, atol=1e-7)
    same = metric.fit(vertices, seven, place, faces, seven @ TURNED.T * 1e-3 + [0.3, -2, 1], metrical=True, unit_mm=1e3)
    assert same.distances_mm.max() < 1e-7 and same.scale == 1000 and not same.mirrored


def test_now_scale_and_place_of_a_prediction_do_not_matter_unless_metrical():
    points, marks = make_scan()
    vertices, faces, seven = make_face()
    first = metric.fit(points, marks, vertices, faces, seven)
    moved = [rows @ TURNED * 0.013 + [3, 1, -2] for rows in (vertices, seven)]
    again = metric.fit(points, marks, moved[0], faces, moved[1])
    assert np.allclose(again.distances_mm, first.distances_mm, rtol=0, atol=1e-6)
    metrical = metric.fit(points, marks, vertices, faces, seven, metrical=True)
    wrong = metric.fit(points, marks, moved[0], faces, moved[1], metrical=True)
    assert metrical.cost < 3 * first.cost and wrong.cost > 1000 * first.cost
    right = metric.fit(points, marks, moved[0], faces, moved[1], metrical=True, unit_mm=1 / 0.013, start="rigid")
    assert right.cost == pytest.approx(metrical.cost, rel=1e-5)


def test_now_layout_of_the_arrays_does_not_matter():
    points, marks = make_scan()
    vertices, faces, seven = make_face()
    first = metric.fit(points, marks, vertices, faces, seven)
    wide = np.zeros((len(points), 7))
    wide[:, 1:6:2] = points
    given = wide[:, 1:6:2], np.asfortranarray(marks), np.asfortranarray(vertices), np.asfortranarray(faces), seven
    assert np.array_equal(metric.fit(*given).distances_mm, first.distances_mm)
    assert np.array_equal(metric.fit(np.asfortranarray(points), *given[1:]).distances_mm, first.distances_mm)


def test_now_order_of_the_scan_vertices_does_not_matter():
    points, marks = make_scan()
    vertices, faces, seven = make_face()
    order = np.random.default_rng(3).permutation(len(points))
    first, other = (metric.fit(rows, marks, vertices, faces, seven) for rows in (points, points[order]))
    assert np.array_equal(np.sort(order[other.kept]), first.kept)
    whole = np.full((2, len(points)), np.nan)
    whole[0, first.kept], whole[1, order[other.kept]] = first.distances_mm, other.distances_mm
    assert np.allclose(*whole, rtol=0, atol=1e-6, equal_nan=True)


def test_now_a_first_refinement_with_some_of_the_points_changes_nothing(monkeypatch):
    points, marks = make_scan(count=3000)
    vertices, faces, seven = make_face()
    fits = []
    for coarse in (10**9, 300):
        monkeypatch.setattr(metric, "_COARSE", coarse)
        fits.append(metric.fit(points, marks, vertices, faces, seven))
    assert fits[0].start_cost == fits[1].start_cost
    assert fits[1].cost == pytest.approx(fits[0].cost, rel=1e-7)


def test_now_a_first_refinement_that_leads_astray_is_not_followed(monkeypatch):
    points, marks = make_scan()
    vertices, faces, seven = make_face()
    wanted = metric.fit(points, marks, vertices, faces, seven)
    descend = metric._descend

    def astray(cloud, pose, state, bend, **rest):
        if len(cloud.points) == len(wanted.kept):
            return descend(cloud, pose, state, bend, **rest)
        return pose.move(np.array([500.0, 0, 0, 0, 0, 0, 0]), cloud.centre, cloud.arm), state, bend

    monkeypatch.setattr(metric, "_COARSE", 100)
    monkeypatch.setattr(metric, "_descend", astray)
    assert metric.fit(points, marks, vertices, faces, seven).cost == pytest.approx(wanted.cost, rel=1e-7)


def test_now_metrical_start_is_the_official_one_unless_told():
    points, marks = make_scan(noise=0)
    vertices, faces, seven = make_face()
    far = np.array([0, 0, 400.0])
    fits = {
        start: metric.fit(points, marks, vertices * 0.9 + far, faces, seven * 0.9 + far, metrical=True, start=start)
        for start in ("official", "rigid")
    }
    procrustes = metric._procrustes(marks, seven * 0.9 + far)
    beside = procrustes.rotation @ (seven * 0.9 + far).T + procrustes.translation[:, None]
    gap = np.linalg.norm(beside.mean(1) - marks.mean(0))
    assert gap == pytest.approx(abs(procrustes.scale - 1) * np.linalg.norm((seven * 0.9 + far).mean(0)))
    assert fits["official"].start_cost > 10 * fits["rigid"].start_cost and fits["rigid"].scale == 1
    assert fits["official"].cost == pytest.approx(fits["rigid"].cost, rel=1e-5)


def test_now_landmarks_that_fit_better_mirrored_are_told():
    vertices, faces, seven = make_face()
    fit = metric.fit(vertices, seven, vertices * [-1, 1, 1], faces, seven * [-1, 1, 1])
    assert fit.mirrored and fit.distances_mm.max() < 1e-7


def test_now_summary_is_of_the_pooled_distances():
    distances = np.array([0.5, 1, 1.5, 3])
    wanted = {"median_mm": 1.25, "mean_mm": 1.5, "std_mm": np.sqrt(3.5 / 4), "vertices": 4}
    assert metric.summarize(distances) == pytest.approx(wanted)


def test_now_real_scan_and_a_template_registered_to_it(assets):
    folder = Path(assets) / "scans/meshmonk"
    scan, mask = (read_obj(folder / f"{name}.obj") for name in ("target", "floating"))
    places = [(-58, 45), (-30, 45), (10, 45), (36, 45), (-12, -8), (-33, -33), (13, -33)]  # by eye, mm
    marks = np.array([mask.vertices[np.hypot(*(mask.vertices[:, :2] - place).T).argmin()] for place in places])
    inside = 0.7  # the template ends before the protocol's crop does
    fit = metric.fit(scan.vertices, marks, mask.vertices / 1e3, mask.faces, marks / 1e3, radius=inside)
    assert 950 < fit.scale < 1050 and len(fit.kept) > 5_000
    assert metric.summarize(fit.distances_mm)["median_mm"] < 1.6  # what its makers reached is 1.56
    assert fit.cost < fit.start_cost


# --- error ---


def arguments(**changed):
    points, marks = make_scan(count=300)
    vertices, faces, seven = make_face(9)
    given = {"scan_vertices_mm": points, "scan_landmarks_mm": marks, "vertices": vertices, "faces": faces}
    return given | {"landmarks": seven} | changed


def with_nan(rows):
    rows = rows.copy()
    rows[3, 1] = np.nan
    return rows


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start": "scaled"}, "start: expected 'official' or 'rigid'"),
        ({"unit_mm": 0.0}, "unit_mm: expected a positive number"),
        ({"unit_mm": np.nan}, "unit_mm: expected a positive number"),
        ({"radius": -1.0}, "radius: expected a positive number"),
        ({"scan_vertices_mm": np.zeros((5, 2))}, "scan_vertices_mm: expected"),
        ({"scan_vertices_mm": np.zeros((0, 3))}, "scan_vertices_mm: expected"),
        ({"scan_vertices_mm": with_nan(make_scan()[0])}, "scan_vertices_mm: expected finite numbers.* at 3, 1 such"),
        ({"scan_landmarks_mm": np.zeros((6, 3))}, r"scan_landmarks_mm: expected \(7, 3\)"),
        ({"landmarks": np.zeros((68, 3))}, r"landmarks: expected \(7, 3\)"),
        ({"landmarks": with_nan(np.ones((7, 3)))}, "landmarks: expected finite"),
        ({"landmarks": np.arange(7)[:, None] * np.ones(3)}, "landmarks: .* on one line"),
        ({"landmarks": np.zeros((7, 3))}, "landmarks: .* on one line"),
        ({"landmarks": make_face()[2] / 1000}, "landmarks: expected points on the mesh.*check their order, unit"),
        ({"vertices": make_face(9)[0] / 1000}, "landmarks: expected points on the mesh"),
        ({"vertices": with_nan(make_face(9)[0])}, "vertices: expected finite"),
        ({"vertices": np.full((81, 3), "x")}, "vertices: expected"),
        ({"faces": np.zeros((0, 3), int)}, "faces: .*a cloud of points has none"),
        ({"faces": np.zeros((4, 3))}, "faces: expected"),
        ({"faces": np.array([[0, 1, 81]])}, r"faces: expected indices in 0\.\.80, got 0\.\.81"),
        ({"scan_landmarks_mm": make_scan()[1] + 1000}, "landmarks_mm: no scan vertex within"),
        ({"scan_landmarks_mm": make_scan()[1] + [60, 0, 0]}, "scan_landmarks_mm: expected points on the scan"),
    ],
)
def test_now_fit_names_what_is_wrong(changed, message):
    with pytest.raises(InputError, match=message):
        metric.fit(**arguments(**changed))


@pytest.mark.parametrize("distances", [[], [1.0, np.nan]])
def test_now_nothing_to_summarize(distances):
    with pytest.raises(InputError, match="distances_mm: expected finite numbers"):
        metric.summarize(np.array(distances))


def test_now_without_compiler_and_libigl_says_what_to_install(monkeypatch):
    monkeypatch.setattr(now_surface, "_open", lambda: None)
    monkeypatch.setitem(sys.modules, "igl", None)
    with pytest.raises(MissingDependencyError, match=r'no libigl.*pip install "chebface\[now\]"'):
        Surface(*make_face(9)[:2])


def test_now_says_which_code_runs(monkeypatch):
    monkeypatch.setattr(native, "why_missing", lambda source: None)
    assert now_surface.implementation() == "native"
    monkeypatch.setattr(native, "why_missing", lambda source: "no compiler")
    assert now_surface.implementation() == "libigl (no compiler)"


# --- bench ---


def stand_in(folder, lines):
    """What the bench takes for the official code: its two modules, written by this test."""
    for name, unit in (("scan2mesh_computations", ""), ("scan2mesh_computations_metrical", ", unit")):
        source = f"def compute_errors(scan, scan_faces, marks, vertices, faces, landmarks{unit}):\n    {lines}\n"
        (folder / f"{name}.py").write_text(source)
    vertices, faces, seven = make_face(31)
    return bench_now.Pair("a face", *make_face(15)[:2], make_face(15)[2], vertices / 1e3, faces, seven / 1e3)


def test_now_bench_compares_the_same_distances(tmp_path):
    pair = stand_in(tmp_path, "return answer()")
    fit = metric.fit(pair.scan_vertices, pair.scan_landmarks, pair.vertices, pair.faces, pair.landmarks)
    np.save(tmp_path / "answer.npy", fit.distances_mm)
    for module in tmp_path.glob("*.py"):
        place = str(tmp_path / "answer.npy")
        module.write_text(f"import numpy\nanswer = lambda: numpy.load({place!r})\n" + module.read_text())
    row = bench_now._measure_one(pair, False, tmp_path, sys.executable)
    assert row["check"]["passed"] and row["check"]["error"] == 0 and row["vertices"] == len(fit.kept)
    assert row["case"] == "a face, non-metrical" and row["cost"] == row["rival_cost"]
    np.save(tmp_path / "answer.npy", 0.9 * fit.distances_mm)
    with pytest.raises(DisagreesError, match="cost above the official one"):
        bench_now._measure_one(pair, False, tmp_path, sys.executable)
    np.save(tmp_path / "answer.npy", 1.1 * fit.distances_mm)
    with pytest.raises(DisagreesError, match="a face, non-metrical: error"):
        bench_now._measure_one(pair, False, tmp_path, sys.executable)


def test_now_bench_names_what_is_missing(tmp_path):
    with pytest.raises(AssetError, match=r"no scan2mesh_computations\.py in"):
        bench_now.measure(tmp_path, sys.executable)
    with pytest.raises(AssetError, match="name a folder with flame_open"):
        next(bench_now.pairs(tmp_path))
    pair = stand_in(tmp_path, "raise ValueError('it is broken')")
    with pytest.raises(AssetError, match=r"(?s)failed on a face.*it is broken"):
        bench_now._run_official(pair, True, tmp_path, sys.executable)
    with pytest.raises(MissingDependencyError, match="name the official code's Python"):
        bench_now._run_official(pair, True, tmp_path, str(tmp_path / "no-python"))


def test_now_bench_makes_pairs_of_the_built_in_head(head):
    made = list(bench_now.pairs(None))
    assert [pair.name for pair in made][-2:] == ["holes and outliers", "another topology"] and len(made) == 5
    assert len(made[0].scan_vertices) > 70_000 and len(made[4].faces) == 4 * len(head.faces)
    for pair in made:
        assert pair.scan_faces.max() < len(pair.scan_vertices)
        assert np.linalg.norm(pair.scan_vertices - pair.scan_landmarks[4], axis=1).min() < 13  # the radius of a hole
