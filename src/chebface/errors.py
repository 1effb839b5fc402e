"""What can go wrong, as one tree. Every message names the thing, what was wanted, what came, and the fix."""

from __future__ import annotations


class ChebfaceError(Exception):
    """The root of every error that this package raises on purpose."""

    exit_code = 1  # what a command that ends with this error gives to the shell


class InputError(ChebfaceError, ValueError):
    """An argument has the wrong shape, type or value."""

    exit_code = 2


class ConfigError(InputError):
    """A setting is unknown or has a value it cannot take."""


class AssetError(ChebfaceError):
    """A head, checkpoint or model file is missing, damaged, or made for something else."""


class DamagedError(AssetError):
    """A file's contents are not those that its digest was made of."""

    exit_code = 3


class UnsafeFileError(AssetError):
    """A file asks for code to be run in order to be read; it was refused."""


class MissingDependencyError(ChebfaceError, ImportError):
    """An optional package, compiler or program is needed and not there."""

    exit_code = 4


class DivergedError(ChebfaceError):
    """A loss term stopped being a number; what was saved last is intact."""


class PhotoError(ChebfaceError, ValueError):
    """A photograph cannot be read or is outside the limits."""


class NoFaceError(PhotoError):
    """No face was found in a photograph."""


class ServerError(ChebfaceError):
    """The inference server answered with a failure."""

    exit_code = 6


class ServerUnavailableError(ServerError):
    """The inference server cannot be reached, is not ready, or died."""


class ServerBusyError(ServerError):
    """The inference server refused because its queue is full or the deadline passed in the queue."""
