"""The built-in rasteriser: native code against its numpy definition, forward; against torch autograd, both ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.record import check, make_record, race
from chebface import camera
from chebface.errors import MissingDependencyError
from chebface.heads import open_head
from chebface.render import raster
from chebface.render.cpu import CpuRenderer, _interpolate_reference

SIZE = 224


def measure(seconds: float) -> list[dict[str, Any]]:
    """Rows for one FLAME-sized mesh at 224 x 224, one thread.

    Raises:
        MissingDependencyError: there is no native code to measure.
        DisagreesError: native code and definition differ.
    """
    if raster.implementation() != "native":
        raise MissingDependencyError(f"rendering: {raster.implementation()}")
    torch.set_num_threads(1)
    head = open_head()
    ndc = camera.project(head.template.astype(np.float64), np.array([6.7, 0.0, 0.0]))
    points, faces = camera.ndc_to_px(ndc, SIZE, SIZE).astype(np.float32), head.faces
    common = {"bench": "rendering", "batch": 1, "threads": 1}

    got, want = (f(points, faces, SIZE, SIZE) for f in (raster.rasterize, raster.rasterize_reference))
    row = make_record(
        case="rasterize",
        implementation="native",
        rival="numpy definition",
        times=race(
            lambda: raster.rasterize(points, faces, SIZE, SIZE),
            lambda: raster.rasterize_reference(points, faces, SIZE, SIZE),
            seconds=seconds,
        ),
        **common,
        **{"pass": "forward", "check": check("rasterize", float((got[0] != want[0]).mean()), 1e-3)},
    )
    rows = [row]

    colours = torch.from_numpy(head.texture_mean)
    renderer = CpuRenderer(faces)

    def ours() -> torch.Tensor:
        p = torch.from_numpy(points).requires_grad_()
        renderer.render(p[None], colours[None], SIZE, SIZE)[0].sum().backward()
        return p.grad

    def autograd() -> torch.Tensor:
        p = torch.from_numpy(points).requires_grad_()
        hits = raster.rasterize(points, faces, SIZE, SIZE)
        _interpolate_reference(p, colours, faces, *hits).sum().backward()
        return p.grad

    scale = autograd().abs().max()
    error = float((ours() - autograd()).abs().max() / scale)
    row = make_record(
        case="render",
        implementation="native",
        rival="torch autograd over the same rasterisation",
        times=race(ours, autograd, seconds=seconds),
        **common,
        **{"pass": "both", "check": check("render", error, 1e-3)},
    )
    return [*rows, row]
