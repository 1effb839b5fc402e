"""The head layer: identity, expression and pose in, vertices and landmarks out, in metres.

Blend shapes, pose correctives and linear blend skinning as in FLAME (Li et al. 2017, equations 1-5), with the pose
that DECA and this project predict: the head turns about the root joint, the jaw about its own, and neck and eyes
rest. Joints at rest move with the joint above them, so only two rotations and the jaw's corrective rows remain.
Everything that is linear is one product.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from chebface import params
from chebface.errors import InputError
from chebface.heads.asset import CONTOUR_STEPS, JOINTS, Head

ROOT, JAW = JOINTS.index("root"), JOINTS.index("jaw")
_MOST_YAW_DEG = CONTOUR_STEPS // 2  # the contour table ends here, to either side


class Flame(nn.Module):
    """A morphable head as a differentiable layer.

    Its buffers come from the head file and are left out of state_dict. Keep it outside of autocast: half precision
    is worth half a millimetre here.

    Args:
        head: the head file's contents.
        dtype: of the buffers, and of every input and output.
    """

    template: Tensor  # (3N,) m: all x, all y, all z, for then the small rotations are wide products
    basis: Tensor  # (409, 3N) m: shape, expression, (R - I) of the jaw
    joints: Tensor  # (6,) m: root and jaw of the template
    joint_dirs: Tensor  # (400, 6) m: how shape and expression move them
    jaw_weights: Tensor  # (N,)
    faces: Tensor  # (M, 3)
    landmark_vertices: Tensor  # (79, 68, 3): the corners of each landmark's triangle, by row of the contour table
    landmark_weights: Tensor  # (79, 68, 3)

    def __init__(self, head: Head, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        blend_dirs = np.concatenate([head.shape_dirs, head.expression_dirs])  # (400, N, 3)
        jaw_dirs = head.pose_dirs[9 * (JAW - 1) : 9 * JAW]  # (9, N, 3); the root has no correctives
        regressor = head.joint_regressor[[ROOT, JAW]].astype(np.float64)  # (2, N)
        inner = len(head.landmark_triangles) - head.contour_triangles.shape[1]  # (79, 17) of 68 vary with yaw
        triangles = np.tile(head.landmark_triangles[-inner:], (CONTOUR_STEPS, 1))  # (79, 51)
        weights = np.tile(head.landmark_barycentric[-inner:], (CONTOUR_STEPS, 1, 1))  # (79, 51, 3)
        arrays = {
            "template": head.template.T.reshape(-1),
            "basis": np.concatenate([blend_dirs, jaw_dirs]).transpose(0, 2, 1).reshape(-1, head.template.size),
            "joints": (regressor @ head.template).reshape(-1),
            "joint_dirs": (regressor @ blend_dirs).reshape(len(blend_dirs), -1),
            "jaw_weights": head.skin_weights[:, JAW],
            "faces": head.faces,
            "landmark_vertices": head.faces[np.concatenate([head.contour_triangles, triangles], axis=1)],
            "landmark_weights": np.concatenate([head.contour_barycentric, weights], axis=1),
        }
        for name, array in arrays.items():
            kind = torch.int64 if array.dtype == np.int32 else dtype
            self.register_buffer(name, torch.tensor(array, dtype=kind), persistent=False)

    def forward(self, shape: Tensor, expression: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
        """Shape, express, pose: v = R_head (u + w_jaw (R_jaw - I)(u - j_jaw) - j_root) + j_root, u the blended head.

        Args:
            shape: (B, 300) identity coefficients.
            expression: (B, 100).
            pose: (B, 6) axis-angle in radians: head, jaw.

        Returns:
            vertices (B, N, 3) and the 68 landmarks (B, 68, 3), in metres. Landmarks 0..16, the jaw line, are those
            seen at the head's yaw, to the degree and up to 39; their choice carries no gradient.

        Raises:
            InputError: a part has the wrong shape.
        """
        for name, part in (("shape", shape), ("expression", expression), ("pose", pose)):
            if part.shape != (shape.shape[0], params.PARTS[name]):
                raise InputError(f"{name}: expected (B, {params.PARTS[name]}), got {tuple(part.shape)}")
        head = rotations(pose[:, params.HEAD_POSE])  # (B, 3, 3)
        jaw = rotations(pose[:, params.JAW_POSE]) - torch.eye(3, dtype=pose.dtype, device=pose.device)

        blend = torch.cat([shape, expression], dim=1)  # (B, 400)
        joints = torch.addmm(self.joints, blend, self.joint_dirs)
        root_at, jaw_at = joints.unflatten(1, (2, 3, 1)).unbind(1)  # (B, 3, 1)
        blended = torch.addmm(self.template, torch.cat([blend, jaw.flatten(1)], dim=1), self.basis)
        opened = head @ jaw
        turns = torch.cat([head, opened], dim=1)  # (B, 6, 3)
        shifts = torch.cat([root_at - head @ root_at, -opened @ jaw_at], dim=1)  # (B, 6, 1)
        turned, opening = torch.baddbmm(shifts, turns, blended.unflatten(1, (3, -1))).chunk(2, dim=1)  # (B, 3, N)
        vertices = (turned + self.jaw_weights * opening).mT.contiguous()
        return vertices, self._landmarks(vertices, head)

    def decode(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Vertices (B, N, 3) and landmarks (B, 68, 3) in metres from all 486 parameters (B, 486).

        Raises:
            InputError: the last dimension is not 486.
        """
        parts = params.split(parameters)
        return self(parts["shape"], parts["expression"], parts["pose"])

    def neutral(self, shape: Tensor) -> Tensor:
        """Vertices (B, N, 3) in metres of identities (B, 300), unposed and without expression.

        Raises:
            InputError: shape is not (B, 300).
        """
        size = params.PARTS["shape"]
        if shape.ndim != 2 or shape.shape[1] != size:
            raise InputError(f"shape: expected (B, {size}), got {tuple(shape.shape)}")
        return torch.addmm(self.template, shape, self.basis[:size]).unflatten(1, (3, -1)).mT.contiguous()

    def _landmarks(self, vertices: Tensor, head: Tensor) -> Tensor:
        most = math.sin(math.radians(_MOST_YAW_DEG))
        yaw = torch.asin(-head[:, 2, 0].detach().clamp(-most, most))  # (B,) rad, to the subject's left
        degree = torch.round(torch.rad2deg(yaw)).long().clamp(-_MOST_YAW_DEG, _MOST_YAW_DEG)  # a NaN is no index
        row = torch.where(degree < 0, _MOST_YAW_DEG - degree, degree)  # 0..39 left, 40..78 right
        corners = self.landmark_vertices.index_select(0, row).flatten(1)  # (B, 204)
        found = vertices.gather(1, corners.unsqueeze(-1).expand(-1, -1, 3)).unflatten(1, (-1, 3))  # (B, 68, 3, 3)
        return (self.landmark_weights.index_select(0, row).unsqueeze(-1) * found).sum(2)


def rotations(axis_angle: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of axis-angle vectors (..., 3) in radians, smooth at zero.

    R = cos(t) I + sin(t)/t K + (1 - cos(t))/t^2 r r^T, t = |r|, K the cross product with r (Rodrigues).
    Near zero the factors are their series in t^2, so that neither value nor gradient divides by t.
    """
    square = (axis_angle * axis_angle).sum(-1)[..., None, None]  # t^2
    small = square < 1e-2
    angle = torch.where(small, 1.0, square).sqrt()
    sine = torch.where(small, 1 - square / 6 * (1 - square / 20 * (1 - square / 42)), torch.sin(angle) / angle)
    versine = torch.where(
        small,
        0.5 - square / 24 * (1 - square / 30 * (1 - square / 56)),
        2 * (torch.sin(angle / 2) / angle) ** 2,
    )
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    outer = axis_angle.unsqueeze(-1) * axis_angle.unsqueeze(-2)
    identity = torch.eye(3, dtype=axis_angle.dtype, device=axis_angle.device)
    return (1 - square * versine) * identity + sine * cross + versine * outer
