"""Two methods on the same images: is the difference of their errors more than chance? A paired bootstrap over subjects.

The points of one scan, and the images of one subject, err together, so whole subjects are drawn, with all their
images and all distances of these, and the pooled median and mean of both methods are taken anew in every round.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chebface.errors import InputError
from chebface.files import write_whole
from chebface.now.page import Block, Items, Table, to_html, to_markdown
from chebface.now.report import Report, open_report
from chebface.now.run import ERRORS, read_pair

STEP_MM = 0.0005  # distances are rounded to this: medians are right to half of it
INTERVAL = (2.5, 97.5)  # percentiles
SAME = ("benchmark", "dataset", "metrical", "radius")  # settings that both reports must share


def compare(
    folder_a: str | os.PathLike[str], folder_b: str | os.PathLike[str], *, rounds: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Compare the reports of two methods by the images that both scored.

    In each round, as many subjects as there are are drawn with replacement. The interval holds the middle 95 % of the
    rounds' differences. p is twice the share of rounds, one added, on the rarer side of 0, but never below 2^(1 - S)
    of S subjects: when all S agree, chance does so as often, and few subjects scatter too little in a bootstrap.

    Args:
        folder_a, folder_b: report folders of `run`.
        rounds: of the bootstrap.
        seed: of its draws.

    Returns:
        {"benchmark", "metrical", "rounds", "seed", "a", "b": {"method", "commit", "only": [images that the other has
        not]}, "challenges": {"all" and each: {"images", "subjects", "vertices", "median", "mean": {"a_mm", "b_mm",
        "difference_mm" (a - b), "low_mm", "high_mm", "p"}}}}; the last three are None with fewer than two subjects.

    Raises:
        AssetError: a folder is no report of a finished run, or damaged.
        InputError: different settings, no common image, other scan vertices, or rounds below 1.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.
    """
    if rounds < 1:
        raise InputError(f"rounds: expected 1 or above, got {rounds}")
    a, b = open_report(folder_a), open_report(folder_b)
    for name in SAME:
        if a.settings.get(name) != b.settings.get(name):
            raise InputError(
                f"{name}: expected the same in both reports, got {a.settings.get(name)!r} and "
                f"{b.settings.get(name)!r}; evaluate both methods with the same settings"
            )
    images = [image for image in a.pairs if image in b.pairs]
    if not images:
        raise InputError(
            f"reports: expected images that both scored, got none ({len(a.pairs)} in {folder_a}, {len(b.pairs)} in "
            f"{folder_b}); evaluate both methods on the same images"
        )
    rng = np.random.default_rng(seed)
    challenges = {}
    for challenge, subjects in _pool_all(a, b, images).items():
        sides = [[pair[side] for pair in subjects] for side in (0, 1)]
        draws = rng.multinomial(len(subjects), np.full(len(subjects), 1 / len(subjects)), rounds)
        challenges[challenge] = {
            "images": sum(challenge in ("all", image.split("/")[1]) for image in images),
            "subjects": len(subjects),
            "vertices": sum(int(one.counts.sum()) for one, _ in subjects),
            "median": _test([_medians(pools, draws) for pools in sides], len(subjects)),
            "mean": _test([_means(pools, draws) for pools in sides], len(subjects)),
        }
    return {
        "benchmark": a.settings.get("benchmark"),
        "metrical": a.settings.get("metrical"),
        "rounds": rounds,
        "seed": seed,
        **{key: _about(report, images) for key, report in (("a", a), ("b", b))},
        "challenges": challenges,
    }


def write_compare(result: dict[str, Any], output: str | os.PathLike[str]) -> Path:
    """Write compare.html, compare.md and compare.json.

    Args:
        result: what `compare` gave.
        output: the folder.

    Returns:
        The path of compare.html.

    Raises:
        OSError: the disk refuses.
    """
    output, a, b = Path(output), result["a"], result["b"]
    everything = result["challenges"]["all"]
    blocks: list[Block] = [
        f"A is {a['method']} (commit {a['commit']}), B is {b['method']} (commit {b['commit']}). "
        f"{'Metrical' if result['metrical'] else 'Non-metrical'} errors of the {everything['images']} images of "
        f"{everything['subjects']} subjects that both scored.",
        _verdict(result),
        "## Median error, mm",
        _table(result, "median"),
        "## Mean error, mm",
        _table(result, "mean"),
        f"Paired bootstrap over subjects, {result['rounds']} rounds, seed {result['seed']}: subjects are drawn with "
        "replacement, with all their images and distances. Difference is A - B, below 0 where A is better; its "
        "95 % interval is that of percentiles; p is two-sided, not below 2^(1 - subjects), "
        "and not corrected for the number of challenges.",
    ]
    blocks += [
        Items(f"Left out, since only {key} scored them: {len(side['only'])}", side["only"])
        for key, side in (("A", a), ("B", b))
        if side["only"]
    ]
    title = f"{a['method']} against {b['method']}"
    write_whole(output / "compare.json", json.dumps(result, indent=1).encode() + b"\n")
    write_whole(output / "compare.md", to_markdown(title, blocks).encode())
    return write_whole(output / "compare.html", to_html(title, blocks).encode())


@dataclass(frozen=True, eq=False)
class _Pool:
    """The distances of one subject, rounded and counted."""

    places: np.ndarray  # (K,) int64 ascending, in STEP_MM
    counts: np.ndarray  # (K,) int64, above 0
    sum_mm: float  # of the distances as they were


def _pool_all(a: Report, b: Report, images: list[str]) -> dict[str, list[tuple[_Pool, _Pool]]]:
    """Challenge, "all" first, to a pair of pools for each subject that has images in it."""
    found: dict[str, list[tuple[_Pool, _Pool]]] = {"all": []}
    for _, group in itertools.groupby(images, lambda image: image.split("/")[0]):
        parts: dict[str, tuple[list[_Pool], list[_Pool]]] = {}
        for image in group:
            one, other = (read_pair(report.pairs[image], *ERRORS) for report in (a, b))
            if not np.array_equal(one["kept"], other["kept"]):
                raise InputError(
                    f"{image}: expected the same scan vertices in both reports, got {len(one['kept'])} and "
                    f"{len(other['kept'])}, or others; evaluate both methods on the same scans and landmarks"
                )
            for name in ("all", image.split("/")[1]):
                for pools, pair in zip(parts.setdefault(name, ([], [])), (one, other), strict=True):
                    pools.append(_count(pair["distances_mm"]))
        for name, (ones, others) in parts.items():
            found.setdefault(name, []).append((_merge(ones), _merge(others)))
    return found


def _count(distances_mm: np.ndarray) -> _Pool:
    exact = distances_mm.astype(np.float64)
    places, counts = np.unique(np.rint(exact / STEP_MM).astype(np.int64), return_counts=True)
    return _Pool(places, counts, float(exact.sum()))


def _merge(pools: list[_Pool]) -> _Pool:
    places, back = np.unique(np.concatenate([pool.places for pool in pools]), return_inverse=True)
    counts = np.zeros(len(places), np.int64)
    np.add.at(counts, back, np.concatenate([pool.counts for pool in pools]))
    return _Pool(places, counts, sum(pool.sum_mm for pool in pools))


def _medians(pools: list[_Pool], draws: np.ndarray) -> np.ndarray:
    """Medians (1 + R,) in mm of all distances pooled: first of each subject once, then of each draw (R, S)."""
    draws = np.concatenate([np.ones((1, len(pools)), np.int64), draws])
    sizes = np.array([pool.counts.sum() for pool in pools])
    # A pooled median lies between the least and the greatest median of the parts, so no place beyond these is needed.
    ends = np.array([[_place(pool, rank) for rank in _middle(n)] for pool, n in zip(pools, sizes, strict=True)])
    low, high = ends[:, 0].min(), ends[:, 1].max()
    places = np.unique(np.concatenate([pool.places[(pool.places >= low) & (pool.places <= high)] for pool in pools]))
    below = np.stack(  # (S, K): how many distances of a subject lie at a place or below it
        [np.append(0, pool.counts.cumsum())[np.searchsorted(pool.places, places, side="right")] for pool in pools]
    )
    lower, upper = (places[_first(below, draws, rank)] for rank in _middle(draws @ sizes))
    return (lower + upper) / 2 * STEP_MM


def _middle(count: Any) -> tuple[Any, Any]:
    """The two ranks, from 1, whose mean is the median; one and the same where the count is odd."""
    return (count + 1) // 2, count // 2 + 1


def _place(pool: _Pool, rank: int) -> int:
    """The place of the rank-th smallest distance, from 1."""
    return int(pool.places[np.searchsorted(pool.counts.cumsum(), rank)])


def _first(below: np.ndarray, draws: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """For each draw (R, S), the first column of (S, K) in which the drawn subjects' counts reach rank (R,)."""
    low, high = np.zeros(len(draws), np.int64), np.full(len(draws), below.shape[1] - 1)
    while (low < high).any():
        middle = (low + high) // 2
        reached = np.einsum("sr,rs->r", below[:, middle], draws) >= rank
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    return low


def _means(pools: list[_Pool], draws: np.ndarray) -> np.ndarray:
    """Means (1 + R,) in mm, as `_medians`."""
    draws = np.concatenate([np.ones((1, len(pools)), np.int64), draws])
    return (draws @ [pool.sum_mm for pool in pools]) / (draws @ [int(pool.counts.sum()) for pool in pools])


def _test(values: list[np.ndarray], subjects: int) -> dict[str, float | None]:
    """From (1 + R,) of a and of b: the first is what was found, the rest how it scatters."""
    a, b = values
    row: dict[str, float | None] = {"a_mm": float(a[0]), "b_mm": float(b[0]), "difference_mm": float(a[0] - b[0])}
    if subjects < 2:
        return row | {"low_mm": None, "high_mm": None, "p": None}
    spread = a[1:] - b[1:]
    low, high = np.percentile(spread, INTERVAL)
    rarer = min(int((spread <= 0).sum()), int((spread >= 0).sum()))
    p = max(2 * (rarer + 1) / (len(spread) + 1), 2.0 ** (1 - subjects))
    return row | {"low_mm": float(low), "high_mm": float(high), "p": min(1.0, p)}


def _about(report: Report, images: list[str]) -> dict[str, Any]:
    common = set(images)
    return {
        "method": report.settings.get("method"),
        "commit": report.summary.get("commit") or "unknown",
        "only": [image for image in report.pairs if image not in common],
    }


def _verdict(result: dict[str, Any]) -> str:
    row = result["challenges"]["all"]["median"]
    if row["difference_mm"] == 0:
        return "Over all images the median errors of A and B are equal."
    if row["p"] is None:
        return "Fewer than two subjects: a difference, but no interval."
    better, than = ("A", "B") if row["difference_mm"] < 0 else ("B", "A")
    sure = (row["low_mm"] > 0 or row["high_mm"] < 0) and row["p"] < 0.05
    text = f"Over all images the median error of {better} is {abs(row['difference_mm']):.3f} mm below that of {than} "
    text += f"(95 % interval of A - B: {_signed(row['low_mm'])} to {_signed(row['high_mm'])} mm, p = {row['p']:.2g})"
    return text + (": more than chance." if sure else ": not more than chance may do.")


def _table(result: dict[str, Any], what: str) -> Table:
    rows = []
    for challenge, group in result["challenges"].items():
        row = group[what]
        interval = "-" if row["p"] is None else f"{_signed(row['low_mm'])} to {_signed(row['high_mm'])}"
        p = "-" if row["p"] is None else f"{row['p']:.2g}"
        numbers = (f"{row['a_mm']:.3f}", f"{row['b_mm']:.3f}", _signed(row["difference_mm"]), interval, p)
        rows.append((challenge, str(group["images"]), str(group["subjects"]), *numbers))
    head = ("challenge", "images", "subjects", "A", "B", "difference", "95 % interval", "p")
    return Table(head, rows, strong=0)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")
