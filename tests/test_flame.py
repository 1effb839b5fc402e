"""The head layer against smplx, against closed forms, and under its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from heads_for_tests import make_head, write_flame

from chebface import params
from chebface.errors import InputError
from chebface.flame import Flame, rotations

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # m
DTYPES = tuple(TOLERANCE)


@pytest.fixture(scope="module")
def small():
    return make_head(8)


@pytest.fixture(scope="module")
def medium():
    return make_head(12, seed=3)


def draw(batch, dtype=torch.float32, seed=0, angle=0.4):
    """Plausible parameters; slices of a larger tensor, as a network's output would be."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(batch, 500, generator=generator, dtype=torch.float64).to(dtype)
    return wide[:, 7:307], wide[:, 307:407], wide[:, 407:413] * angle


# oracle


@pytest.fixture(scope="module")
def rival(medium, tmp_path_factory):
    """smplx's FLAME on FLAME's own files, by dtype."""
    smplx = pytest.importorskip("smplx")
    folder = tmp_path_factory.mktemp("flame")
    write_flame(medium, folder)

    def build(dtype):
        return smplx.FLAME(
            str(folder),
            num_betas=300,
            num_expression_coeffs=100,
            use_face_contour=True,
            create_transl=False,
            batch_size=3,
            dtype=dtype,
        )

    return build


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angle", [0.0, 0.02, 0.4])
def test_vertices_landmarks_and_gradients_are_smplx(medium, rival, dtype, angle):
    from smplx.lbs import find_dynamic_lmk_idx_and_bcoords, vertices2landmarks

    parts = [part.clone().requires_grad_() for part in draw(3, dtype, angle=angle)]
    shape, expression, pose = parts
    model = rival(dtype)
    theirs = model(betas=shape, expression=expression, global_orient=pose[:, :3], jaw_pose=pose[:, 3:])
    # smplx reads the contour table with the yaw of a camera that looks along +z with y down; ours, like DECA's, has
    # the face look at the camera along +z with y up: the same table for the mirrored turn.
    mirrored = torch.nn.functional.pad(pose[:, :3] * torch.tensor([1, -1, -1]), (0, 12))
    contour = find_dynamic_lmk_idx_and_bcoords(
        theirs.vertices,
        mirrored,
        model.dynamic_lmk_faces_idx,
        model.dynamic_lmk_bary_coords,
        model.neck_kin_chain,
    )
    jaw_line = vertices2landmarks(theirs.vertices, model.faces_tensor, *contour)
    wanted = torch.cat([jaw_line, theirs.joints[:, 5:56]], dim=1)

    vertices, landmarks = Flame(medium, dtype)(shape, expression, pose)
    # smplx divides by |r + 1e-8|, which at rest costs it a few 1e-9 m in any dtype
    torch.testing.assert_close(vertices, theirs.vertices, rtol=0, atol=1e-6)
    torch.testing.assert_close(landmarks, wanted, rtol=0, atol=1e-6)

    weights = torch.randn(vertices.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    ours = torch.autograd.grad((vertices * weights).sum() + landmarks.square().sum(), parts)
    gradients = torch.autograd.grad((theirs.vertices * weights).sum() + wanted.square().sum(), parts)
    for part, got, want in zip(("shape", "expression", "pose"), ours, gradients, strict=True):
        if angle > 0 or part != "pose":  # at rest smplx's pose gradient is what it divides by
            assert (got - want).abs().max() <= 1e-4 * want.abs().max(), part


def test_rotations_are_the_matrix_exponential():
    generator = torch.Generator().manual_seed(0)
    axis = torch.nn.functional.normalize(torch.randn(40, 3, generator=generator, dtype=torch.float64), dim=1)
    angles = torch.tensor([0, 1e-12, 1e-6, 0.01, 0.0999999, 0.1, 0.1000001, 1, np.pi, 5], dtype=torch.float64)
    vectors = axis * angles.repeat(4)[:, None]
    x, y, z = vectors.unbind(1)
    o = torch.zeros_like(x)
    cross = torch.stack([o, -z, y, z, o, -x, -y, x, o], dim=1).reshape(-1, 3, 3)
    torch.testing.assert_close(rotations(vectors), torch.matrix_exp(cross), rtol=0, atol=1e-13)
    torch.testing.assert_close(rotations(vectors.float()), torch.matrix_exp(cross).float(), rtol=0, atol=1e-6)


def test_neutral_is_the_sum_of_its_directions(medium):
    shape, _, _ = draw(2, torch.float64)
    wanted = medium.template + np.einsum("bk,knc->bnc", shape.numpy(), medium.shape_dirs.astype(np.float64))
    np.testing.assert_allclose(Flame(medium, torch.float64).neutral(shape).numpy(), wanted, atol=1e-12)


# law


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_parameters_give_the_template(medium, dtype):
    vertices, landmarks = Flame(medium, dtype).decode(torch.zeros(2, 486, dtype=dtype))
    wanted = torch.tensor(medium.template, dtype=dtype).expand(2, -1, -1)
    torch.testing.assert_close(vertices, wanted, rtol=0, atol=TOLERANCE[dtype])
    corners = medium.template[medium.faces[medium.contour_triangles[0]]]
    jaw_line = (medium.contour_barycentric[0][..., None] * corners).sum(1)
    np.testing.assert_allclose(landmarks[1, :17].numpy(), jaw_line, atol=1e-6)


def test_the_head_turns_rigidly_about_the_root_joint(medium):
    layer = Flame(medium, torch.float64)
    shape, expression, pose = draw(3, torch.float64)
    turned, _ = layer(shape, expression, pose)
    still, _ = layer(shape, expression, pose * torch.tensor([0, 0, 0, 1, 1, 1]))
    dirs = np.concatenate([medium.shape_dirs, medium.expression_dirs]).astype(np.float64)
    blended = medium.template + np.einsum("bk,knc->bnc", torch.cat([shape, expression], 1).numpy(), dirs)
    root = torch.from_numpy(medium.joint_regressor[0].astype(np.float64) @ blended)[:, None]
    wanted = (still - root) @ rotations(pose[:, :3]).mT + root
    torch.testing.assert_close(turned, wanted, rtol=0, atol=1e-12)


def test_the_jaw_moves_its_own_vertices_rigidly_and_no_others(medium):
    from dataclasses import replace

    weights = np.eye(5, dtype=np.float32)[np.where(medium.skin_weights[:, 2] > 0.5, 2, 1)]
    head = replace(medium, skin_weights=weights, pose_dirs=np.zeros_like(medium.pose_dirs))
    layer = Flame(head, torch.float64)
    shape, expression, pose = draw(2, torch.float64)
    opened, _ = layer(shape, expression, pose * torch.tensor([0, 0, 0, 1, 1, 1]))
    still, _ = layer(shape, expression, torch.zeros_like(pose))
    jaw = weights[:, 2] == 1
    assert 0 < jaw.sum() < len(jaw)
    torch.testing.assert_close(opened[:, ~jaw], still[:, ~jaw], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.cdist(opened[:, jaw], opened[:, jaw]), torch.cdist(still[:, jaw], still[:, jaw]), rtol=0, atol=1e-7
    )
    assert (opened[:, jaw] - still[:, jaw]).abs().max() > 0.01


def test_jaw_correctives_are_added(medium):
    """At one entry of R_jaw - I each, the corrective rows 9..17 of the file, and no others, are used."""
    from dataclasses import replace

    _, _, pose = draw(1, torch.float64)
    zeros = torch.zeros(1, 300, dtype=torch.float64), torch.zeros(1, 100, dtype=torch.float64)
    pose = pose * torch.tensor([0, 0, 0, 1, 1, 1])
    rigid = np.tile(np.float32([0, 1, 0, 0, 0]), (len(medium.template), 1))  # nothing follows the jaw
    vertices, _ = Flame(replace(medium, skin_weights=rigid), torch.float64)(*zeros, pose)
    entries = (rotations(pose[:, 3:]) - torch.eye(3)).reshape(9).numpy()
    wanted = medium.template + np.einsum("k,knc->nc", entries, medium.pose_dirs[9:18].astype(np.float64))
    np.testing.assert_allclose(vertices[0].numpy(), wanted, atol=1e-12)


def test_items_of_a_batch_are_independent(medium):
    layer = Flame(medium, torch.float64)
    parts = draw(5, torch.float64)
    together = layer(*parts)
    for item in range(5):
        alone = layer(*(part[item : item + 1] for part in parts))
        for got, want in zip(alone, together, strict=True):
            torch.testing.assert_close(got, want[item : item + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("yaw_deg", "row"),
    [(0, 0), (0.4, 0), (0.6, 1), (-0.4, 0), (-0.6, 40), (20, 20), (-20, 59), (39, 39), (-39, 78), (95, 39), (-120, 78)],
)
def test_the_contour_row_is_the_yaw_in_degrees(medium, yaw_deg, row):
    layer = Flame(medium, torch.float64)
    pose = torch.zeros(1, 6, dtype=torch.float64)
    pose[0, 1] = np.radians(yaw_deg)
    zeros = torch.zeros(1, 300, dtype=torch.float64), torch.zeros(1, 100, dtype=torch.float64)
    vertices, landmarks = layer(*zeros, pose)
    for points, triangles, weights in (
        (landmarks[0, :17], medium.contour_triangles[row], medium.contour_barycentric[row]),
        (landmarks[0, 17:], medium.landmark_triangles[17:], medium.landmark_barycentric[17:]),
    ):
        corners = vertices[0].numpy()[medium.faces[triangles]]
        np.testing.assert_allclose(points.numpy(), (weights[..., None] * corners).sum(1), atol=1e-9)


@pytest.mark.parametrize("yaw_deg", [-35, -20, 20, 35])
def test_the_jaw_line_is_where_a_turned_head_ends(assets, yaw_deg):
    """On FLAME's own mesh and tables: the row that the test above wants is the one that the viewer at +z can see."""
    topology = assets / "flame_topology"
    template = np.load(assets / "flame_open" / "flame2023_open_id60.npz")["v_template"].astype(np.float64)
    faces = np.load(assets / "flame_open" / "flame2023_open_id60.npz")["faces"]
    tables = np.load(topology / "flame_dynamic_embedding.npz")
    yaw = np.radians(yaw_deg)
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    vertices = template @ turn.T

    def far_side(row):
        corners = vertices[faces[tables["lmk_face_idx"][row].astype(int)]]
        points = (corners * tables["lmk_b_coords"][row][..., None]).sum(1)
        return points[2:6] if yaw_deg < 0 else points[11:15]  # cheek to jaw, the subject's right or left

    row = yaw_deg if yaw_deg > 0 else 39 - yaw_deg
    mirror = 39 + yaw_deg if yaw_deg > 0 else -yaw_deg
    assert far_side(row)[:, 2].min() > far_side(mirror)[:, 2].max()  # nearer to the viewer than the hidden jaw


def test_decode_uses_the_named_parts(medium):
    layer = Flame(medium)
    shape, expression, pose = draw(2)
    parameters = torch.full((2, params.TOTAL), 9.0)
    parameters[:, params.SLICES["shape"]] = shape
    parameters[:, params.SLICES["expression"]] = expression
    parameters[:, params.SLICES["pose"]] = pose
    for got, want in zip(layer.decode(parameters), layer(shape, expression, pose), strict=True):
        assert torch.equal(got, want)


def test_an_empty_batch_stays_empty(small):
    vertices, landmarks = Flame(small).decode(torch.zeros(0, 486))
    assert vertices.shape == (0, len(small.template), 3)
    assert landmarks.shape == (0, 68, 3)


def test_a_nan_stays_in_its_own_item(small):
    parameters = torch.zeros(2, 486)
    parameters[0] = torch.nan
    vertices, landmarks = Flame(small).decode(parameters)
    assert vertices[0].isnan().all()
    assert landmarks[0].isnan().all()
    assert vertices[1].isfinite().all()
    assert landmarks[1].isfinite().all()


# gradient


@pytest.mark.parametrize("angle", [0.0, 1e-5, 0.5])
def test_gradients_are_right_at_every_angle(small, angle):
    layer = Flame(small, torch.float64)
    shape, expression, pose = draw(1, torch.float64, angle=angle)
    some = torch.arange(0, len(small.template), 31)

    def short(first, second, third):  # a few coefficients of each, so that the numerical Jacobian stays small
        full = torch.cat([first, shape[:, 4:]], 1), torch.cat([second, expression[:, 4:]], 1), third
        vertices, landmarks = layer(*full)
        return vertices[:, some], landmarks[:, ::9]

    inputs = [part.clone().requires_grad_() for part in (shape[:, :4], expression[:, :4], pose)]
    assert torch.autograd.gradcheck(short, inputs, eps=1e-6, atol=1e-8)


def test_rotations_have_second_derivatives_at_zero():
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotations, zero)
    assert torch.autograd.gradgradcheck(rotations, zero)


def test_float32_gradients_are_finite_at_rest(small):
    parameters = torch.zeros(2, 486, requires_grad=True)
    vertices, landmarks = Flame(small).decode(parameters)
    (vertices.square().sum() + landmarks.sum()).backward()
    assert torch.isfinite(parameters.grad).all()
    assert parameters.grad[:, params.SLICES["pose"]].abs().min() > 0


# contract


def test_buffers_belong_to_the_head_not_to_checkpoints(small):
    layer = Flame(small)
    assert layer.state_dict() == {}
    assert not list(layer.parameters())
    assert layer.basis.is_contiguous()
    assert layer.to(torch.float64).basis.dtype == torch.float64
    assert layer.faces.dtype == torch.int64


def test_a_traced_layer_takes_any_batch(small):
    class Decode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flame = Flame(small)

        def forward(self, parameters):
            return self.flame.decode(parameters)

    shapes = {"parameters": {0: torch.export.Dim("B", min=1, max=512)}}
    program = torch.export.export(Decode(), (torch.zeros(2, 486),), dynamic_shapes=shapes).module()
    products = [node for node in program.graph.nodes if node.target is torch.ops.aten.addmm.default]
    assert len(products) == 2  # the joints' and the one large product
    parameters = torch.randn(5, 486, generator=torch.Generator().manual_seed(0)) * 0.3
    for got, want in zip(program(parameters), Flame(small).decode(parameters), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


# error


@pytest.mark.parametrize(
    ("sizes", "name"),
    [((299, 100, 6), "shape"), ((300, 50, 6), "expression"), ((300, 100, 3), "pose")],
)
def test_a_part_of_the_wrong_size_is_named(small, sizes, name):
    with pytest.raises(InputError, match=rf"{name}: expected \(B, "):
        Flame(small)(*(torch.zeros(2, size) for size in sizes))


def test_parts_of_different_batches_are_refused(small):
    with pytest.raises(InputError, match="pose: expected"):
        Flame(small)(torch.zeros(2, 300), torch.zeros(2, 100), torch.zeros(1, 6))


def test_decode_and_neutral_name_what_they_want(small):
    with pytest.raises(InputError, match="486"):
        Flame(small).decode(torch.zeros(2, 485))
    for wrong in (torch.zeros(300), torch.zeros(2, 100)):
        with pytest.raises(InputError, match=r"shape: expected \(B, 300\)"):
            Flame(small).neutral(wrong)
