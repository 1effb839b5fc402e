"""The NoW benchmark, and Stirling by the same engine: any method's meshes against scans, in mm.

`open_dataset` reads a benchmark in its official layout, `landmark_source` says where a method keeps its landmarks,
`score` writes a report folder and `predict` the predictions of a model of ours. The protocol itself, for one scan and
one mesh, is in `metric`.
"""

from __future__ import annotations

from chebface.now.dataset import Dataset, landmark_source, open_dataset
from chebface.now.metric import Fit, fit, summarize
from chebface.now.run import score

__all__ = ["Dataset", "Fit", "fit", "landmark_source", "open_dataset", "score", "summarize"]
