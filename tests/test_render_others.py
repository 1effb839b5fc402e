"""nvdiffrast and pytorch3d behind the renderer protocol.

Where a package is not installed, its documented conventions are: an emulation of a few lines stands in for it, and the
picture has to be the built-in renderer's all the same. Where one is installed, the same is asked of the real package.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from heads_for_tests import make_head

from chebface import camera
from chebface.errors import ConfigError, InputError, MissingDependencyError
from chebface.render import NAMES, nvdiffrast, open_renderer, pytorch3d, raster

OTHERS = ("nvdiffrast", "pytorch3d")
SIZES = [(40, 56), (56, 40)]


def make_scene(height: int, width: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Faces, points (2, N, 3) in pixels, smooth colours (2, N, 2): a head in the picture, one that leaves it."""
    head = make_head(6)
    turns = torch.tensor([[[0.8, 0.0, 0.6], [0.0, 1.0, 0.0], [-0.6, 0.0, 0.8]], torch.eye(3).tolist()])
    vertices = torch.from_numpy(head.template) @ turns.mT
    cameras = torch.tensor([[6.1, 0.003, 0.01], [8.3, 0.05, -0.03]])
    points = camera.ndc_to_px(camera.project(vertices, cameras), height, width)
    colors = torch.stack([torch.sin(points[..., 0] / 9), torch.cos(points[..., 1] / 7) + 2], -1)
    return head.faces, points, colors


# What stands in for both packages: the nearest triangle at each point of a grid, and barycentrics with a gradient.


def cross(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def barycentric(corners: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Corners (..., 3, 2), points (..., 2) -> (..., 3)."""
    p0, p1, p2 = corners.unbind(-2)
    area = cross(p1 - p0, p2 - p0)
    b1, b2 = cross(at - p0, p2 - p0) / area, cross(p1 - p0, at - p0) / area
    return torch.stack([1 - b1 - b2, b1, b2], -1)


def find_nearest(
    xy: torch.Tensor, z: torch.Tensor, faces: torch.Tensor, grid: torch.Tensor, edge: float = 0.0
) -> torch.Tensor:
    """xy (B, N, 2), z (B, N), grid (H, W, 2) -> triangle (B, H, W), -1 for none; smaller z is nearer.

    Inside is where every barycentric coordinate is above `edge`.
    """
    with torch.no_grad():
        weights = barycentric(xy.double()[:, faces][:, :, None, None], grid.double())  # (B, M, H, W, 3)
        depth = (weights * z.double()[:, faces][:, :, None, None]).sum(-1)
        nearest, triangle = torch.where((weights > edge).all(-1), depth, torch.inf).min(1)
        return torch.where(nearest.isfinite(), triangle, -1)


def corners_of(values: torch.Tensor, faces: torch.Tensor, triangle: torch.Tensor) -> torch.Tensor:
    """Values (B, N, C) at the corners of each pixel's triangle: (B, H, W, 3, C)."""
    return values[torch.arange(len(values))[:, None, None, None], faces[triangle.clamp(min=0)]]


class FakeContext:
    """nvdiffrast's CUDA context."""

    def __init__(self, device: torch.device) -> None:
        self.device = device


def fake_rasterize(context, pos, tri, resolution, ranges=None, grad_db=True):
    """nvdiffrast.torch.rasterize: clip space, row 0 at y = -w, (u, v, z / w, triangle + 1).

    The CUDA rasteriser snaps vertices to 1/16 pixel for coverage, gives a centre on an edge to one of the two sides,
    and holds u and v in [0, 1]: so does this.
    """
    assert isinstance(context, FakeContext) and context.device == pos.device and grad_db is False
    assert (pos.dtype, tri.dtype) == (torch.float32, torch.int32) and pos.is_contiguous() and tri.is_contiguous()
    height, width = resolution
    size = torch.tensor([width, height])
    faces = tri.long()
    assert (pos[..., 2].abs() <= pos[..., 3]).all()  # nothing is clipped by depth
    xy = pos[..., :2] / pos[..., 3:]
    steps = [(2 * torch.arange(n) + 1) / n - 1 for n in (width, height)]
    grid = torch.stack(torch.meshgrid(*steps, indexing="xy"), -1)
    snapped = (xy.detach() * size * 8).round() / (size * 8)
    triangle = find_nearest(snapped, pos[..., 2] / pos[..., 3], faces, grid, edge=-1e-9)
    u, v, _ = barycentric(corners_of(xy, faces, triangle), grid).unbind(-1)
    u, v = (w + (w.clamp(0, 1) - w).detach() for w in (u, v))
    depth = torch.zeros_like(u)
    out = torch.stack([u, v, depth, (triangle + 1).float()], -1) * (triangle >= 0)[..., None]
    return out, torch.zeros_like(out)


def fake_interpolate(attr, rast, tri):
    """nvdiffrast.torch.interpolate."""
    assert attr.dtype == torch.float32 and attr.is_contiguous()
    triangle = rast[..., 3].long() - 1
    weights = torch.stack([rast[..., 0], rast[..., 1], 1 - rast[..., 0] - rast[..., 1]], -1)
    image = (weights[..., None] * corners_of(attr, tri.long(), triangle)).sum(-2)
    return image * (triangle >= 0)[..., None], torch.zeros(())


class FakeMeshes:
    """pytorch3d.structures.Meshes of padded tensors."""

    def __init__(self, verts: torch.Tensor, faces: torch.Tensor) -> None:
        assert faces.shape == (len(verts), faces.shape[1], 3) and faces.dtype == torch.int64
        self.verts, self.faces = verts, faces


def fake_rasterize_meshes(meshes, image_size, blur_radius, faces_per_pixel, perspective_correct):
    """pytorch3d's rasterize_meshes: x left, y up, [-1, 1] over the shorter side, row 0 on top, z from 1e-8 on."""
    assert (blur_radius, faces_per_pixel, perspective_correct) == (0.0, 1, False)
    (height, width), faces = image_size, meshes.faces[0]
    assert (meshes.verts[..., 2] >= 1e-8).all()
    half_x, half_y = width / min(height, width), height / min(height, width)
    x = half_x - (torch.arange(width) + 0.5) * 2 * half_x / width
    y = half_y - (torch.arange(height) + 0.5) * 2 * half_y / height
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    xy = meshes.verts[..., :2]
    triangle = find_nearest(xy, meshes.verts[..., 2], faces, grid)
    weights = barycentric(corners_of(xy, faces, triangle), grid)
    seen = triangle >= 0
    weights = torch.where(seen[..., None], weights, -1)
    packed = torch.where(seen, triangle + len(faces) * torch.arange(len(xy))[:, None, None], -1)
    nothing = torch.full(packed[..., None].shape, -1.0)
    return packed[..., None], nothing, weights[..., None, :], nothing


def fake_interpolate_face_attributes(pix_to_face, barycentric_coords, face_attributes):
    """pytorch3d.ops.interpolate_face_attributes: zero where no face is."""
    found = face_attributes[pix_to_face.clamp(min=0)]  # (B, H, W, 1, 3, C)
    image = (barycentric_coords[..., None] * found).sum(-2)
    return image * (pix_to_face >= 0)[..., None]


@pytest.fixture
def fakes(monkeypatch):
    """Puts the emulations where the packages would be."""
    modules: dict[str, types.ModuleType] = {}

    def add(name: str, **things: object) -> None:
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(things)

    add(
        "nvdiffrast.torch",
        RasterizeCudaContext=FakeContext,
        rasterize=fake_rasterize,
        interpolate=fake_interpolate,
    )
    add("nvdiffrast", torch=modules["nvdiffrast.torch"])
    add("pytorch3d.renderer.mesh.rasterize_meshes", rasterize_meshes=fake_rasterize_meshes)
    add("pytorch3d.structures", Meshes=FakeMeshes)
    add("pytorch3d.ops", interpolate_face_attributes=fake_interpolate_face_attributes)
    for name in ("pytorch3d", "pytorch3d.renderer", "pytorch3d.renderer.mesh"):
        add(name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(nvdiffrast, "DEVICE", "cpu")


def grow(mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.max_pool2d(mask.float()[:, None], 3, 1, 1)[:, 0] > 0


def far_from_edges(points_px: torch.Tensor, faces: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Pixels (B, H, W) whose centre is more than a tenth of a pixel inside its triangle, by the definition."""
    found = []
    for points in points_px.numpy():
        triangle, weights = raster.rasterize_reference(points, faces, height, width)
        corners = points[faces[np.maximum(triangle, 0)]][..., :2]  # (H, W, 3, 2)
        opposite = np.linalg.norm(np.roll(corners, -1, 2) - np.roll(corners, 1, 2), axis=-1)
        a, b = np.moveaxis(corners[..., 1:, :] - corners[..., :1, :], 2, 0)
        area = np.abs(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0])
        found.append((triangle >= 0) & ((weights * area[..., None] / opposite).min(-1) > 0.1))
    return torch.from_numpy(np.stack(found))


def agree(name: str, height: int, width: int, device: str = "cpu") -> None:
    """Same scene, same picture as the built-in renderer's.

    Silhouettes: but for pixels at their border. Colours, one to three in size: within 0.01 for 99 % of the pixels that
    both draw; and within 1e-4 for all whose centre is a tenth of a pixel from any edge. Gradients of those pixels:
    within 0.2 % in norm.
    """
    faces, points_px, colors = make_scene(height, width)
    pictures, leaves = [], []
    for member, where in ((name, device), ("cpu", "cpu")):
        inputs = [tensor.detach().to(where).requires_grad_() for tensor in (points_px, colors)]
        renderer = open_renderer(faces, member)
        assert renderer.name == member
        image, mask = renderer.render(*inputs, height, width)
        assert image.shape == (2, 2, height, width) and image.dtype == torch.float32
        assert mask.shape == (2, height, width) and mask.dtype == torch.bool
        assert (image.permute(0, 2, 3, 1)[~mask] == 0).all()
        pictures.append((image.cpu(), mask.cpu()))
        leaves.append(inputs)
    (image, mask), (want, want_mask) = pictures
    assert (want_mask.float().mean((1, 2)) > 0.2).all()
    assert not (mask & ~grow(want_mask)).any() and not (~mask & ~grow(~want_mask)).any()
    both = mask & want_mask
    difference = (image - want).abs().amax(1)
    assert (both & (difference < 0.01)).sum() > 0.99 * both.sum()
    clear = far_from_edges(points_px, faces, height, width)
    assert clear.sum() > 0.8 * want_mask.sum() and mask[clear].all()
    assert difference[clear].max() < 1e-4
    weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)) * clear[:, None]
    got, known = (
        torch.autograd.grad((picture * weights).sum(), inputs)
        for (picture, _), inputs in zip(pictures, leaves, strict=True)
    )
    for mine, theirs in zip(got, known, strict=True):
        assert (mine.cpu() - theirs).norm() < 0.002 * theirs.norm()
    assert (got[0][..., 2] == 0).all()  # depth decides what is seen, and nothing else


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OTHERS)
def test_emulated_package_draws_the_same_picture(fakes, name, size):
    agree(name, *size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OTHERS)
def test_real_package_draws_the_same_picture(name, size):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "nvdiffrast" and not torch.cuda.is_available():
        pytest.skip("nvdiffrast needs a CUDA device")
    agree(name, *size, device="cuda" if torch.cuda.is_available() else "cpu")


def test_clip_space_of_nvdiffrast():
    """Outer corners of the first and last pixel are the ends of the clip cube; row 0 is its y = -w; near is -z."""
    height, width = 40, 56
    points = torch.tensor([[[-0.5, -0.5, 3.0], [width - 0.5, height - 0.5, 7.0], [0.0, 0.0, 5.0]]])
    clip = nvdiffrast.to_clip(points, height, width)
    flat = clip[0, :, :3] / clip[0, :, 3:]
    torch.testing.assert_close(
        flat, torch.tensor([[-1, -1, -0.9], [1, 1, 0.9], [1 / width - 1, 1 / height - 1, 0.0]]), atol=1e-6, rtol=0
    )
    assert (clip[..., 3] == width / 2).all()
    level = nvdiffrast.to_clip(points * torch.tensor([1.0, 1.0, 0.0]), height, width)
    assert level.isfinite().all() and (level[..., 2].abs() < level[..., 3]).all()


@pytest.mark.parametrize("size", SIZES)
def test_ndc_of_pytorch3d(size):
    """Square pixels, the shorter side from 1 to -1 left to right and top to bottom; the nearest depth is 1."""
    height, width = size
    points = torch.tensor([[[-0.5, -0.5, 3.0], [width - 0.5, height - 0.5, 7.0]]])
    ndc = pytorch3d.to_ndc(points, height, width)
    x, y = width / min(size), height / min(size)
    torch.testing.assert_close(ndc, torch.tensor([[[x, y, 1.0], [-x, -y, 5.0]]]))


@pytest.mark.parametrize("name", OTHERS)
def test_missing_packages_say_how_to_get_them(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=rf"renderer {name}: cannot be imported .*pip install .*{name}"):
        open_renderer(np.array([[0, 1, 2]]), name)


@pytest.mark.parametrize("name", OTHERS)
def test_packages_built_for_something_else_count_as_missing(monkeypatch, name):
    class Broken:
        def find_spec(self, fullname, path=None, target=None):
            if fullname.split(".")[0] == name:
                raise OSError("undefined symbol")

    for known in [known for known in sys.modules if known.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(MissingDependencyError, match="undefined symbol"):
        open_renderer(np.array([[0, 1, 2]]), name)


def test_auto_takes_the_fastest_that_is_there(fakes, monkeypatch):
    faces = np.array([[0, 1, 2]])
    assert open_renderer(faces).name == open_renderer(faces, device="cpu").name == "cpu"
    assert open_renderer(faces, device=torch.device("cuda", 1)).name == "nvdiffrast"
    monkeypatch.setitem(sys.modules, "nvdiffrast", None)
    monkeypatch.delitem(sys.modules, "nvdiffrast.torch")
    assert open_renderer(faces, device="cuda").name == "pytorch3d"
    assert open_renderer(faces, device="cpu").name == "cpu"
    monkeypatch.setitem(sys.modules, "pytorch3d", None)
    monkeypatch.setitem(sys.modules, "pytorch3d.ops", None)
    assert open_renderer(faces, device="cuda").name == "cpu"
    with pytest.raises(ConfigError, match=f"expected auto or one of {', '.join(NAMES)}, got 'gl'"):
        open_renderer(faces, "gl", device="cuda")


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_fit_is_refused_by_name(fakes, monkeypatch, name):
    renderer = open_renderer(np.array([[0, 1, 2]]), name)
    with pytest.raises(InputError, match="points_px: expected"):
        renderer.render(torch.zeros(4, 3), torch.zeros(1, 4, 2), 5, 6)
    with pytest.raises(InputError, match="attributes: expected"):
        renderer.render(torch.zeros(1, 4, 3), torch.zeros(1, 5, 2), 5, 6)
    if name == "nvdiffrast":
        monkeypatch.setattr(nvdiffrast, "DEVICE", "cuda")
        with pytest.raises(InputError, match="nvdiffrast draws on cuda only, got cpu; use renderer cpu"):
            renderer.render(torch.zeros(1, 4, 3), torch.zeros(1, 4, 2), 5, 6)
