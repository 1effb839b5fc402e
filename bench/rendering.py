"""The built-in rasteriser: native code against its numpy definition, forward; against torch autograd, both ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.record import check, make_record, one_thread, race
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
    with one_thread():
        return _measure(seconds)


def _measure(seconds: float) -> list[dict[str, Any]]:
    head = open_head()
    ndc = camera.project(head.template.astype(np.float64), np.array([6.7, 0.0, 0.0]))
    points, faces = camera.ndc_to_px(ndc, SIZE, SIZE).astype(np.float32), head.faces
    common: dict[str, Any] = {"batch": 1, "threads": 1}

    got, want = (f(points, faces, SIZE, SIZE) for f in (raster.rasterize, raster.rasterize_reference))
    rasterizing = make_record(
        bench="rendering",
        case="rasterize",
        implementation="native",
        rival="numpy definition",
        times=race(
            lambda: raster.rasterize(points, faces, SIZE, SIZE),
            lambda: raster.rasterize_reference(points, faces, SIZE, SIZE),
            seconds=seconds,
        ),
        **common | {"pass": "forward", "check": check("rasterize", float((got[0] != want[0]).mean()), 1e-3)},
    )

    colours = torch.from_numpy(head.texture_mean)
    renderer = CpuRenderer(faces)

    def ours() -> torch.Tensor:
        p = torch.from_numpy(points).requires_grad_()
        return torch.autograd.grad(renderer.render(p[None], colours[None], SIZE, SIZE)[0].sum(), p)[0]

    def autograd() -> torch.Tensor:
        p = torch.from_numpy(points).requires_grad_()
        hits = raster.rasterize(points, faces, SIZE, SIZE)
        return torch.autograd.grad(_interpolate_reference(p, colours, faces, *hits).sum(), p)[0]

    scale = autograd().abs().max()
    error = float((ours() - autograd()).abs().max() / scale)
    rendering = make_record(
        bench="rendering",
        case="render",
        implementation="native",
        rival="torch autograd over the same rasterisation",
        times=race(ours, autograd, seconds=seconds),
        **common | {"pass": "both", "check": check("render", error, 1e-3)},
    )
    return [rasterizing, rendering]
