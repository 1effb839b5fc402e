"""Plausible adults: a seeded sampling of MakeHuman's controls, and the principal components of it.

Everything here gives the same bits on every machine. Random numbers are sums of twelve raw PCG64 uniforms (a normal
to within a percent whose tails end at six), so no library's normal generator matters. Targets, covariances and
mixing weights are whole numbers small enough that float64 adds and multiplies them exactly, in any order, so no BLAS
matters. The one step that is not exact, the eigenvectors, is a Jacobi iteration written in elementwise operations.

Controls of one person, n standing for a standard normal:
- gender: half the people near male (0), half near female (1), each a fold of 0.2 |n|, at most 0.5;
- age: young (25 years in MakeHuman) to old (90): t = u^2, u uniform in [0, 0.95];
- muscle, weight, proportions: 0.5 + 0.18 n in [0.05, 0.95]; height: 0.5 + 0.18 n; all clamped;
- origin: the three MakeHuman macros mixed by the cubes of three uniforms, so that mostly one leads;
- each pair of opposite face targets: sd n from AMPLITUDE, clamped at 2.5 sd; left and right share a symmetric n and
  differ by ASYMMETRY of it; one-sided head shapes (oval, square, ...) use the positive half;
- each asymmetry target, and each target that shifts a part sideways: ASYMMETRY_SD n;
- overall size: 1 + 0.028 n, 2 % more for men, 2 % less for women; the macros' own effect on size is taken out
  (a MakeHuman body's height scales its head far more than people's does). In all an sd of 3 to 4 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PEOPLE = 8192
SEED = 20240501
GRID = 2.0**22  # targets are whole multiples of 1 / GRID metres
MIX = 2.0**14  # sampled weights are whole multiples of 1 / MIX

SIZE_SD = 0.028
SIZE_SEX = 0.02
ASYMMETRY = 0.12
ASYMMETRY_SD = 0.12
AMPLITUDE = {  # standard deviation of a pair of opposite targets, full target = 1
    "cheek": 0.32,
    "chin": 0.27,
    "ears": 0.20,
    "eyebrows": 0.25,
    "eyes": 0.24,
    "forehead": 0.22,
    "head": 0.17,
    "mouth": 0.20,
    "neck": 0.15,
    "nose": 0.22,
    "l-eye-bag": 0.12,  # these three bring the socket through the lower lid
    "l-eye-bag-height": 0.15,
    "l-eye-bag-out": 0.12,
    "forehead-nubian": 0.06,  # these two move the crown by 4 cm
    "forehead-scale-vert": 0.10,
}


class Dice:
    """Normals and uniforms from raw PCG64 words, the same for every numpy that has PCG64."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def uniform(self, *shape: int) -> np.ndarray:
        """Uniforms in [0, 1), multiples of 2^-32."""
        count = int(np.prod(shape))
        words = np.asarray(self._bits.random_raw((count + 1) // 2), dtype=np.uint64)
        halves = np.stack([words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)], 1).ravel()[:count]
        return halves.astype(np.float64).reshape(shape) / 2.0**32

    def normal(self, *shape: int) -> np.ndarray:
        """Sums of twelve uniforms minus six: mean 0, sd 1, never beyond 6."""
        return self.uniform(12, *shape).sum(0) - 6


@dataclass(frozen=True)
class Controls:
    """Targets and how a population uses them. K targets, P people, N vertices.

    even, odd: (K, N, 3) m, the mirror symmetric and antisymmetric halves; weights: (P, K) for either.
    """

    even: np.ndarray
    even_weights: np.ndarray
    odd: np.ndarray
    odd_weights: np.ndarray


def ramp(values: np.ndarray, ends: int) -> np.ndarray:
    """Linear interpolation weights (P, ends) of values in [0, 1] between evenly spaced anchors, as MakeHuman does."""
    place = np.clip(values, 0, 1) * (ends - 1)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(ends)), 0)


def sample_macros(dice: Dice, people: int) -> dict[str, np.ndarray]:
    """Draw the phenotypes: name -> (P, anchors) weights, plus "sex" (P,), -1 for a man to +1 for a woman."""
    fold = np.minimum(np.abs(dice.normal(people)) * 0.2, 0.5)
    gender = np.where(np.arange(people) % 2 == 0, fold, 1 - fold)
    age = dice.uniform(people) * 0.95
    normal = dice.normal(4, people) * 0.18 + 0.5
    bounded = np.clip(normal, 0.05, 0.95)
    origin = dice.uniform(people, 3)
    origin = origin * origin * origin + 1e-3
    return {
        "gender": ramp(gender, 2),
        "age": ramp(age * age, 2),
        "muscle": ramp(bounded[0], 3),
        "weight": ramp(bounded[1], 3),
        "height": ramp(bounded[2], 2),
        "proportions": ramp(bounded[3], 2),
        "race": origin / (origin[:, :1] + origin[:, 1:2] + origin[:, 2:]),
        "sex": 2 * gender - 1,
    }


def to_grid(values: np.ndarray, grid: float) -> np.ndarray:
    """Round to whole multiples of 1 / grid, returned as whole float64 numbers."""
    return np.rint(values * grid)


def principal_components(
    targets: np.ndarray, weights: np.ndarray, count: int, points: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the main directions of sum_k weights[p, k] targets[k] over people, each times its standard deviation.

    Args:
        targets: (K, N, 3) whole numbers in units of 1 / GRID.
        weights: (P, K) whole numbers in units of 1 / MIX.
        count: how many at most.
        points: variance is that of the first so many points; the others follow along.

    Returns:
        (C, N, 3) directions in units of 1 / GRID per standard deviation, falling in size, signs as they come, and
        their variances (C,).
    """
    people = len(weights)
    flat = targets.reshape(len(targets), -1)
    centred = weights * people - weights.sum(0)  # whole numbers: P times the difference from the mean
    scale = 2.0 ** np.ceil(np.log2(max(np.abs(centred).max(), 1) / 2.0**19))
    centred = np.rint(centred / scale)
    covariance = (centred.T @ centred) * (scale / (people * MIX)) ** 2 / people
    counted = flat[:, : 3 * points]
    gram = counted @ counted.T
    root = _pivoted_root(covariance)
    half = np.zeros((root.shape[1], len(gram)))
    for k in range(len(gram)):
        half += root[k][:, None] * gram[k]
    inner = np.zeros((root.shape[1], root.shape[1]))
    for k in range(len(gram)):
        inner += half[:, k][:, None] * root[k]
    values, vectors = jacobi_eigen((inner + inner.T) / 2)
    kept = values > values[0] * 1e-10
    values, vectors = values[kept][:count], vectors[:, kept][:, :count]
    mixing = np.zeros((len(root), vectors.shape[1]))
    for k in range(root.shape[1]):
        mixing += root[:, k][:, None] * vectors[k]
    # Whole mixing weights of at most 2^22, targets of at most 2^18 and 2^9 of them: sums below 2^53 are exact.
    units = 2.0 ** (22 - np.ceil(np.log2(np.abs(mixing).max(0))))
    directions = (np.rint(mixing * units).T @ flat) / units[:, None]
    return directions.reshape(-1, *targets.shape[1:]), values


def jacobi_eigen(matrix: np.ndarray, sweeps: int = 30, tolerance: float = 1e-13) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (falling) and eigenvectors (columns) of a symmetric matrix, by rotations in round-robin order.

    Only elementwise operations are used: a LAPACK answer depends on the machine in its last bits, this one does not.
    """
    size = len(matrix)
    even = size + size % 2
    work = np.zeros((even, even))
    work[:size, :size] = matrix
    turned = np.eye(even)  # rows are eigenvectors
    order = np.arange(even)
    scale = np.abs(matrix).max() * tolerance
    for _ in range(sweeps):
        for _ in range(even - 1):
            p, q = order[: even // 2], order[even // 2 :][::-1]
            cosine, sine = _rotation(work[p, p], work[q, q], work[p, q])
            rows_p, rows_q = work[p], work[q]
            work[p] = cosine[:, None] * rows_p - sine[:, None] * rows_q
            work[q] = sine[:, None] * rows_p + cosine[:, None] * rows_q
            columns_p, columns_q = work[:, p], work[:, q]
            work[:, p] = columns_p * cosine - columns_q * sine
            work[:, q] = columns_p * sine + columns_q * cosine
            turned_p, turned_q = turned[p], turned[q]
            turned[p] = cosine[:, None] * turned_p - sine[:, None] * turned_q
            turned[q] = sine[:, None] * turned_p + cosine[:, None] * turned_q
            order = np.concatenate([order[:1], order[-1:], order[1:-1]])
        diagonal = np.diag(work)
        if np.abs(work - np.diag(diagonal)).max() <= scale:
            break
    values, vectors = np.diag(work)[:size], turned[:size, :size]
    if even != size:
        values, vectors = np.diag(work), turned[:, :size]
        real = np.abs(turned[:, size]) < 0.5
        values, vectors = values[real], vectors[real]
    falling = np.argsort(-values, kind="stable")
    return values[falling], np.ascontiguousarray(vectors[falling].T)


def _rotation(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine that clear c in [[a, c], [c, b]]."""
    still = c == 0
    theta = (b - a) / np.where(still, 1, 2 * c)
    sign = np.where(theta < 0, -1.0, 1.0)
    tangent = np.where(still, 0, sign / (np.abs(theta) + np.sqrt(theta * theta + 1)))
    cosine = 1 / np.sqrt(tangent * tangent + 1)
    return cosine, tangent * cosine


def _pivoted_root(matrix: np.ndarray) -> np.ndarray:
    """A (K, R) root of a symmetric positive semidefinite (K, K) matrix: root @ root.T is it. Cholesky, pivoted."""
    left = matrix.copy()
    columns = []
    limit = np.diag(matrix).max() * 1e-12
    for _ in range(len(matrix)):
        diagonal = np.diag(left)
        pivot = int(np.argmax(diagonal))
        if diagonal[pivot] <= limit:
            break
        column = left[:, pivot] / np.sqrt(diagonal[pivot])
        columns.append(column)
        left = left - column[:, None] * column
    return np.stack(columns, 1)
