"""Arrays out of pickles without running what a pickle asks for.

FLAME and its companions are published as pickles of numpy arrays, some of them wrapped in chumpy, scipy or torch
objects. None of those is imported here: every class that a pickle may name has an inert stand-in that keeps its
state, arrays are made from the states afterwards, and any other name ends the reading.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np

from chebface.errors import AssetError, UnsafeFileError

_BROKEN = (  # whatever damaged bytes can lead to
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_named(path: Path) -> dict[str, Any]:
    """The named values of a pickle, an npz, or an npy that holds a dictionary; arrays as numpy arrays, dense.

    Raises:
        AssetError: the file is missing, damaged, or has no names.
        UnsafeFileError: a pickle names a class that arrays do not need.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AssetError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        if data[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                record = {name.removesuffix(".npy"): _read_npy(archive.read(name)) for name in archive.namelist()}
        else:
            record = _read_npy(data) if data[:6] == b"\x93NUMPY" else _plain(_Unpickler(io.BytesIO(data)).load())
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path}: {error}") from error
    except _BROKEN as error:
        raise AssetError(f"{path}: damaged, or not a file of arrays ({error})") from error
    if not isinstance(record, dict):
        raise AssetError(f"{path}: expected named arrays, got {type(record).__name__}")
    return record


def _read_npy(data: bytes) -> Any:
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) == (1, 0):
        _, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        _, _, dtype = np.lib.format.read_array_header_2_0(file)
    if not dtype.hasobject:
        return np.load(io.BytesIO(data), allow_pickle=False)
    value = _plain(_Unpickler(file).load())
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


# What may stand in a pickle. All are classes with __setstate__, so that no instruction of a pickle can change them;
# values are made after reading, by _plain.


class _Dtype:
    """numpy.dtype(code, align, copy), then its state, whose second entry is the byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufSU]\d{1,4}|O8?", code):
            raise UnsafeFileError(f"arrays of dtype {code!r} are not read")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    def plain(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """numpy's _reconstruct(...), then (version, shape, dtype, column order, bytes or list)."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def plain(self) -> Any:
        _, shape, kind, by_column, data = self.state
        dtype = kind.plain()
        if dtype.hasobject:
            array = np.empty(len(data), object)
            array[:] = [_plain(item) for item in data]
        else:
            array = np.frombuffer(_bytes(data), dtype)
        return array.reshape(shape, order="F" if by_column else "C")


class _Buffer(_Array):
    """numpy's _frombuffer(bytes, dtype, shape, order), of the newest pickles."""

    def __init__(self, data: Any, kind: _Dtype, shape: Any, order: str) -> None:
        self.state = (1, shape, kind, order == "F", data)


class _Scalar:
    """numpy's scalar(dtype, bytes)."""

    def __init__(self, kind: _Dtype, data: Any) -> None:
        self.kind, self.data = kind, data

    def __setstate__(self, state: Any) -> NoReturn:
        raise UnsafeFileError("a number with a state is not read")

    def plain(self) -> Any:
        return np.frombuffer(_bytes(self.data), self.kind.plain())[0]


class _Encoded(bytes):
    """_codecs.encode(text, "latin1"), or bytes() when empty: how Python 3 writes bytes for Python 2."""

    def __new__(cls, text: str = "", encoding: str = "latin1") -> _Encoded:
        return super().__new__(cls, text.encode("latin1"))

    def __setstate__(self, state: Any) -> NoReturn:
        raise UnsafeFileError("bytes with a state are not read")


class _Record:
    """Any other allowed object: its state, untouched."""

    def __init__(self, *_: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


class _Chumpy(_Record):
    """chumpy.ch.Ch: an array named x."""

    def plain(self) -> Any:
        return _plain(self.state["x"])


class _Rows(_Record):
    """scipy.sparse.csr_matrix, as a dense array."""

    def plain(self) -> np.ndarray:
        state = _plain(self.state)
        rows, columns = state["_shape"]
        dense = np.zeros((rows, columns))
        major = np.repeat(np.arange(rows), np.diff(state["indptr"]))
        np.add.at(dense, (major, state["indices"]), state["data"])
        return dense


class _Columns(_Rows):
    """scipy.sparse.csc_matrix, as a dense array."""

    def plain(self) -> np.ndarray:
        rows, columns = self.state["_shape"]
        turned = _Rows()
        turned.state = self.state | {"_shape": (columns, rows)}
        return turned.plain().T


class _Storage:
    """torch.storage._load_from_bytes(bytes): three pickles of no interest, one that names the type, one of keys,
    the number of elements, the elements.
    """

    def __init__(self, data: Any) -> None:
        file = io.BytesIO(_bytes(data))
        kind = [_Unpickler(file).load() for _ in range(5)][3]
        (count,) = struct.unpack("<q", file.read(8))
        self.values = np.frombuffer(file.read(), kind.dtype, count)

    def __setstate__(self, state: Any) -> NoReturn:
        raise UnsafeFileError("a storage with a state is not read")


class _Tensor(_Record):
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, ...)."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any):
        if list(strides) != [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]:
            raise ValueError("a tensor that is not contiguous")
        self.array = storage.values[offset : offset + math.prod(shape)].reshape(shape)

    def plain(self) -> np.ndarray:
        return self.array


class _Floats(_Record):
    dtype = "<f4"


class _Doubles(_Record):
    dtype = "<f8"


class _Longs(_Record):
    dtype = "<i8"


class _Reconstructed:
    """copy_reg._reconstructor(kind, object, None): how protocol 1 makes an object."""

    def __new__(cls, kind: type, *_: Any) -> Any:
        if not issubclass(kind, _Record):
            raise UnsafeFileError(f"{kind.__name__} is not made this way")
        return kind()

    def __setstate__(self, state: Any) -> NoReturn:
        raise UnsafeFileError("a class with a state is not read")


_ALLOWED: dict[str, type] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _Encoded,
    "builtins.bytes": _Encoded,
    "__builtin__.bytes": _Encoded,
    "chumpy.ch.Ch": _Chumpy,
    "chumpy.Ch": _Chumpy,
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch.storage._load_from_bytes": _Storage,
    "torch.FloatStorage": _Floats,
    "torch.DoubleStorage": _Doubles,
    "torch.LongStorage": _Longs,
    "collections.OrderedDict": _Record,
    "builtins.set": set,
    "__builtin__.set": set,
    "builtins.object": _Record,
    "__builtin__.object": _Record,
    "copy_reg._reconstructor": _Reconstructed,
    "copyreg._reconstructor": _Reconstructed,
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _Scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _Buffer for core in ("core", "_core")},
    **{f"scipy.sparse.{module}.csr_matrix": _Rows for module in ("csr", "_csr")},
    **{f"scipy.sparse.{module}.csc_matrix": _Columns for module in ("csc", "_csc")},
}


_PythonUnpickler: Any = pickle._Unpickler  # private, and unknown to type checkers


class _Unpickler(_PythonUnpickler):
    """The pure Python unpickler: the C one takes lengths and memo places at their word and fills all memory."""

    dispatch: ClassVar = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")

    def persistent_load(self, pid: Any) -> Any:
        """The type of a torch storage, from ("storage", type, key, device, count, None)."""
        match pid:
            case ("storage", kind, *_):
                return kind
        raise pickle.UnpicklingError(f"a reference to {pid!r}, which is not in the file")

    def find_class(self, module: str, name: str) -> type:
        """The inert stand-in for an allowed class."""
        try:
            return _ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise UnsafeFileError(f"the pickle asks for {module}.{name}, which arrays do not need; refused") from None

    def load_bytearray8(self) -> None:
        """A byte array, no longer than the file."""
        self.load_binbytes8()
        self.stack[-1] = bytearray(self.stack[-1])

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _bytes(data: Any) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _plain(value: Any) -> Any:
    """Stand-ins to values, through containers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value.plain() if isinstance(value, (_Array, _Dtype, _Scalar, _Chumpy, _Rows, _Tensor)) else value
