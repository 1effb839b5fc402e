"""A photograph of a face in, a metric 3D head out."""

__version__ = "0.1.0"
