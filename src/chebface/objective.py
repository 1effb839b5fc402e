"""What the reconstructor is trained for: the paper's losses on one batch, each weighed and reported on its own.

    L = lambda_2d (landmarks, eyes, lips, photometric, identity, regularizers)
      + lambda_3d (lambda_vertices vertices + lambda_descriptor 3D-ID)
      + what known parameters of synthetic pairs can add

A term with weight zero is not computed. With several photos of a person, all terms run a second time on shapes swapped
among them (shape consistency). Sources: the paper, equations 1 to 6; DECA's code for what the paper takes from it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chebface import camera, losses, params
from chebface.config import TrainReconstructor
from chebface.data.batches import Batch
from chebface.encoder import MeshEncoder
from chebface.errors import ConfigError
from chebface.flame import Flame
from chebface.heads import Head
from chebface.regressor import normalize_crop
from chebface.render import Renderer
from chebface.render.shade import Shader, hold_skin, wide_to_aligned

POSED = {"landmarks", "eyes", "lips", "photometric", "identity", "reprojection"}  # terms that want the posed head
PICTURED = {"photometric", "identity"}  # and those that want the photo


class Objective(nn.Module):
    """The loss of a batch, part by part.

    Args:
        head: what the parameters mean.
        config: weights and switches.
        renderer: of the head's faces; None where no term draws.
        encoder: of meshes of this head, for the 3D-ID loss; it is frozen.
        recognition: aligned crops (B, 3, 112, 112) in [-1, 1] to embeddings, for the identity loss; it is frozen.

    Raises:
        ConfigError: no term is left, or a term lacks what it needs.
    """

    regions: Tensor  # (N,)
    points: Tensor  # (68,)
    seen: Tensor  # (N,)
    reach: Tensor  # (300,) how far each coefficient moves the vertices, squared; mean 1

    def __init__(
        self,
        head: Head,
        config: TrainReconstructor,
        *,
        renderer: Renderer | None = None,
        encoder: MeshEncoder | None = None,
        recognition: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.weights = {name: weight for name, weight in weights_of(config).items() if weight}
        for name, needed in (("photometric", renderer), ("identity", renderer), ("descriptor", encoder)):
            if name in self.weights and needed is None:
                raise ConfigError(f"{name}: has weight {self.weights[name]} and lacks its network or renderer")
        if "identity" in self.weights and recognition is None:
            raise ConfigError("identity: has a weight and no network; set recognition, or weight_identity to 0")
        if not self.weights:
            raise ConfigError("every loss has weight 0")
        self.flame = Flame(head)
        self.shader = Shader(head, renderer) if renderer is not None and PICTURED & self.weights.keys() else None
        self.encoder = None if encoder is None else encoder.requires_grad_(False).eval()
        self.recognition = None if recognition is None else recognition.requires_grad_(False).eval()
        reach = torch.from_numpy((head.shape_dirs.astype("float64") ** 2).sum((1, 2)))
        for name, tensor in {
            "regions": losses.region_weights(head),
            "points": losses.landmark_weights(),
            "seen": losses.region_weights(head, face=4.0),
            "reach": (reach / reach.mean()).float(),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def train(self, mode: bool = True) -> Objective:
        """Nothing here learns: frozen networks stay in eval mode."""
        return super().train(False)

    @property
    def wants_pictures(self) -> bool:
        """Whether batches need their wide frames."""
        return bool(PICTURED & self.weights.keys())

    def forward(self, predicted: Tensor, batch: Batch, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of predicted parameters (B, 486).

        Args:
            predicted: float32.
            batch: what is known.
            step: chooses how shapes are swapped.

        Returns:
            the weighed sum, and every part before its weight.
        """
        copies = 1
        if self.config.shape_consistency:
            dice = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
            swapped = losses.swap_shapes(predicted, batch.actors, dice)
            if swapped is not predicted:
                copies = 2
                predicted, batch = torch.cat([predicted, swapped]), batch.repeat(copies)
        parts: dict[str, Tensor] = {}
        if POSED & self.weights.keys():
            parts |= self._seen_parts(predicted, batch, copies)
        parts |= self._shape_parts(predicted, batch)
        parts |= self._known_parts(predicted, batch)
        regular = losses.regularizers(predicted)
        parts |= {f"regular_{name}": value for name, value in regular.items()}
        return losses.total({name: part for name, part in parts.items() if name in self.weights}, self.weights)

    def _seen_parts(self, predicted: Tensor, batch: Batch, copies: int) -> dict[str, Tensor]:
        """Terms of the picture: where landmarks and vertices fall, and what colours. The batch stands there `copies`
        times over."""
        view = params.split(predicted)["camera"]
        vertices, points = self.flame.decode(predicted)
        seen = camera.project(points, view)[..., :2]
        known = batch.knows_landmarks
        parts = {
            "landmarks": losses.landmarks(seen, batch.landmarks, self.points, known),
            "eyes": losses.eye_distances(seen, batch.landmarks, known),
            "lips": losses.lip_distances(seen, batch.landmarks, known),
        }
        if "reprojection" in self.weights:
            with torch.no_grad():
                truth, _ = self.flame.decode(batch.parameters)
                target = camera.project(truth, params.split(batch.parameters)["camera"])[..., :2]
            placed = camera.project(vertices, view)[..., :2]
            parts["reprojection"] = losses.landmarks(placed, target, self.seen, batch.knows_parameters)
        if self.shader is None or batch.wide is None:
            return parts
        photo = batch.wide.permute(0, 3, 1, 2).float() / 255
        if "photometric" in self.weights:
            drawn, mask = self.shader.draw(vertices, predicted, lit=not self.config.deca_compat)
            parts["photometric"] = losses.photometric(drawn, photo, mask)
        if "identity" in self.weights and self.recognition is not None:
            drawn, mask = self.shader.draw(vertices, hold_skin(predicted))
            over = wide_to_aligned(torch.where(mask[:, None], drawn, photo)).clamp(0, 1)
            with torch.no_grad():
                once = normalize_crop(batch.crop[: len(batch) // copies])
                known_face = self.recognition(once.contiguous(memory_format=torch.channels_last)).repeat(copies, 1)
            seen_face = self.recognition((2 * over - 1).contiguous(memory_format=torch.channels_last))
            parts["identity"] = losses.identity(seen_face, known_face)
        return parts

    def _shape_parts(self, predicted: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Terms of the head itself: neutral, as a scan gives one head for all photos of a person; or posed."""
        if not {"vertices", "descriptor"} & self.weights.keys():
            return {}
        if self.config.truth_mesh == "posed":
            vertices, _ = self.flame.decode(predicted)
            with torch.no_grad():
                truth, _ = self.flame.decode(batch.parameters)
            known = batch.knows_parameters
        else:
            vertices = self.flame.neutral(params.split(predicted)["shape"])
            with torch.no_grad():
                truth = self.flame.neutral(batch.shape)
            known = torch.ones_like(batch.knows_parameters)
        parts = {"vertices": losses.vertices(vertices, truth, self.regions, known)}
        if self.encoder is not None and "descriptor" in self.weights:
            with torch.no_grad():
                code = self.encoder(truth)
            parts["descriptor"] = losses.descriptors(self.encoder(vertices), code, known)
        return parts

    def _known_parts(self, predicted: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Terms of the parameters themselves, which synthetic pairs know."""
        guess, truth, known = params.split(predicted), params.split(batch.parameters), batch.knows_parameters
        return {
            "pose": losses.rotations(guess["pose"], truth["pose"], known),
            "shape": losses.coefficients(guess["shape"], batch.shape, self.reach),
            "texture": losses.coefficients(guess["texture"], truth["texture"], known=known),
            "camera": losses.coefficients(guess["camera"], truth["camera"], known=known),
            "light": losses.coefficients(guess["light"], truth["light"], known=known),
        }


def weights_of(config: TrainReconstructor) -> dict[str, float]:
    """The weight of every term, zero where it is off."""
    c = config
    plane = {
        "landmarks": c.weight_landmarks,
        "eyes": c.weight_eyes,
        "lips": c.weight_lips,
        "photometric": c.weight_photometric,
        "identity": c.weight_identity,
        "regular_light": c.weight_light_color,
    } | {f"regular_{name}": c.weight_regularizer for name in ("shape", "texture", "pose", "expression", "camera")}
    solid = {"vertices": c.lambda_vertices, "descriptor": c.lambda_descriptor}
    extra = {
        "reprojection": c.weight_reprojection,
        "pose": c.weight_pose,
        "shape": c.weight_shape,
        "texture": c.weight_texture,
        "camera": c.weight_camera,
        "light": c.weight_light,
    }
    return (
        {name: c.lambda_2d * weight for name, weight in plane.items()}
        | {name: c.lambda_3d * weight for name, weight in solid.items()}
        | extra
    )
