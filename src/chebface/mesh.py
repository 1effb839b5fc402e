"""Triangle meshes as arrays: normals; OBJ, PLY and GLB files out, OBJ and PLY in. Files appear whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chebface.errors import AssetError, InputError
from chebface.files import write_whole


@dataclass(frozen=True, eq=False)
class Mesh:
    """What a mesh file holds. Polygons are fans of triangles; units are the file's own."""

    vertices: np.ndarray  # (N, 3) float64
    faces: np.ndarray  # (M, 3) int32
    colors: np.ndarray | None = None  # (N, 3) float64 sRGB in [0, 1]
    uv: np.ndarray | None = None  # (T, 2) float64
    uv_faces: np.ndarray | None = None  # (M, 3) int32 into uv


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals at vertices: the sum of the normals of the faces around, weighted by area.

    Args:
        vertices: (N, 3) float.
        faces: (M, 3) int, counter-clockwise seen from outside.

    Returns:
        (N, 3), the dtype of vertices; (0, 0, 1) where there is no face around.

    Raises:
        InputError: wrong shapes, or an index out of range.
    """
    vertices, faces = _check(vertices, faces)
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    normals = np.cross(b - a, c - a)
    sums = np.stack(
        [
            np.bincount(faces.ravel(), np.repeat(normals[:, axis], 3), minlength=len(vertices))[: len(vertices)]
            for axis in range(3)
        ],
        1,
    )
    length = np.linalg.norm(sums, axis=1, keepdims=True)
    unit = np.where(length > 1e-20, sums / np.maximum(length, 1e-20), (0.0, 0.0, 1.0))
    return unit.astype(vertices.dtype)


def write_obj(
    path: str | os.PathLike[str],
    vertices: np.ndarray,
    faces: np.ndarray,
    colors: np.ndarray | None = None,
    *,
    uv: np.ndarray | None = None,
    uv_faces: np.ndarray | None = None,
    comment: str = "",
) -> Path:
    """Write a Wavefront OBJ.

    Args:
        path: the file; its folder is made.
        vertices: (N, 3) m.
        faces: (M, 3) int.
        colors: (N, 3) sRGB in [0, 1], written after each vertex as most programs read it.
        uv, uv_faces: (T, 2) with v up, (M, 3) into uv; both or neither.
        comment: lines for the top of the file.

    Returns:
        The path.

    Raises:
        InputError: wrong shapes, values that are not finite, or an index out of range.
        OSError: the disk refuses.
    """
    vertices, faces = _check(vertices, faces)
    colors = _check_colors(colors, len(vertices))
    if (uv is None) != (uv_faces is None):
        raise InputError("uv and uv_faces: expected both or neither")
    lines = [f"# {line}" for line in comment.splitlines()]
    rows = vertices if colors is None else np.concatenate([vertices, colors], 1)
    form = "v " + " ".join(["%.7g"] * 3 + ["%.4f"] * (rows.shape[1] - 3))
    lines += [form % tuple(row) for row in rows.tolist()]
    if uv is not None and uv_faces is not None:
        uv, uv_faces = np.asarray(uv), np.asarray(uv_faces)
        if uv.ndim != 2 or uv.shape[1] != 2 or uv_faces.shape != faces.shape:
            raise InputError(f"uv, uv_faces: expected (T, 2) and {faces.shape}, got {uv.shape} and {uv_faces.shape}")
        if uv_faces.size and (uv_faces.min() < 0 or uv_faces.max() >= len(uv)):
            raise InputError(f"uv_faces: expected indices in 0..{len(uv) - 1}, got {uv_faces.min()}..{uv_faces.max()}")
        lines += [f"vt {u:.6f} {v:.6f}" for u, v in uv.tolist()]
        both = np.concatenate([faces, uv_faces], 1) + 1
        lines += [f"f {a}/{d} {b}/{e} {c}/{f}" for a, b, c, d, e, f in both.tolist()]
    else:
        lines += [f"f {a} {b} {c}" for a, b, c in (faces + 1).tolist()]
    return write_whole(path, ("\n".join(lines) + "\n").encode())


def write_ply(
    path: str | os.PathLike[str],
    vertices: np.ndarray,
    faces: np.ndarray,
    colors: np.ndarray | None = None,
    *,
    comment: str = "",
) -> Path:
    """Write a binary (little-endian) PLY with normals; colours as 8 bits.

    Args, Returns, Raises: as write_obj.
    """
    vertices, faces = _check(vertices, faces)
    colors = _check_colors(colors, len(vertices))
    columns = [(name, "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")]
    if colors is not None:
        columns += [(name, "u1") for name in ("red", "green", "blue")]
    points = np.zeros(len(vertices), columns)
    values = np.concatenate([vertices, vertex_normals(vertices, faces)], 1)
    for k, (name, _) in enumerate(columns):
        points[name] = values[:, k] if k < 6 or colors is None else np.round(colors[:, k - 6] * 255)
    triangles = np.zeros(len(faces), [("count", "u1"), ("index", "<i4", 3)])
    triangles["count"], triangles["index"] = 3, faces
    header = ["ply", "format binary_little_endian 1.0", *(f"comment {line}" for line in comment.splitlines())]
    header += [f"element vertex {len(vertices)}"]
    header += [f"property {'uchar' if kind == 'u1' else 'float'} {name}" for name, kind in columns]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    content = ("\n".join(header) + "\n").encode() + points.tobytes() + triangles.tobytes()
    return write_whole(path, content)


def write_glb(
    path: str | os.PathLike[str],
    vertices: np.ndarray,
    faces: np.ndarray,
    colors: np.ndarray | None = None,
    *,
    comment: str = "",
) -> Path:
    """Write a binary glTF 2.0 with normals; colours become linear light, as COLOR_0 is.

    Args, Returns, Raises: as write_obj.

    Source: Khronos glTF 2.0 specification, sections 3.7 (meshes) and 4 (GLB).
    """
    vertices, faces = _check(vertices, faces)
    colors = _check_colors(colors, len(vertices))
    positions = vertices.astype("<f4")
    floats = {"POSITION": positions, "NORMAL": vertex_normals(vertices, faces).astype("<f4")}
    if colors is not None:
        floats["COLOR_0"] = _to_linear(colors).astype("<f4")
    blobs = [(values.tobytes(), 34962) for values in floats.values()]
    blobs.append((faces.astype("<u4").tobytes(), 34963))
    accessors: list[dict[str, Any]] = [
        {"bufferView": k, "componentType": 5126, "count": len(vertices), "type": "VEC3"} for k in range(len(floats))
    ]
    accessors[0] |= {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
    accessors.append({"bufferView": len(floats), "componentType": 5125, "count": faces.size, "type": "SCALAR"})
    starts = [0, *itertools.accumulate(len(blob) for blob, _ in blobs)]
    attributes = {name: k for k, name in enumerate(floats)}
    document = {
        "asset": {"version": "2.0", "generator": "chebface"} | ({"copyright": comment} if comment else {}),
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": "head"}],
        "meshes": [{"primitives": [{"attributes": attributes, "indices": len(floats), "material": 0}]}],
        # Left out, metallicFactor would be 1, and skin would look like steel.
        "materials": [{"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 0.8}, "doubleSided": True}],
        "accessors": accessors,
        "bufferViews": [
            {"buffer": 0, "byteOffset": start, "byteLength": len(blob), "target": target}
            for start, (blob, target) in zip(starts, blobs, strict=False)
        ],
        "buffers": [{"byteLength": starts[-1]}],
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    binary = b"".join(blob for blob, _ in blobs)
    content = struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(binary))
    content += struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return write_whole(path, content)


def read_obj(path: str | os.PathLike[str]) -> Mesh:
    """Read a Wavefront OBJ: v (with or without colours), vt, f in every form; all else is passed over.

    Raises:
        AssetError: missing, or not a whole OBJ.
    """
    path = Path(path)
    content = _content(path)
    mesh = _regular_obj(content) or _any_obj(path, content)
    return _checked(mesh, path)


def _regular_obj(content: bytes) -> Mesh | None:
    """An OBJ whose lines of a kind are all alike, in bulk. None: it is not so, or something is wrong with it."""
    content = content.replace(b"\r\n", b"\n").replace(b" \n", b"\n").rstrip().replace(b"  ", b" ")
    if content.translate(None, _ODD) != content or b"\n " in content or content[:1] == b" ":
        return None
    points, textures, polygons = (_lines_of(content + b"\n", word) for word in (b"v ", b"vt ", b"f "))
    vertices, uv = _alike(points, b"v", _REAL, np.float64), _alike(textures, b"vt", _REAL, np.float64)
    corners = _alike_corners(polygons)
    faces = [] if corners is None else [_fans(part) for part in np.moveaxis(corners, 2, 0)]
    if (
        (vertices is None or vertices.shape[1] not in (3, 4, 6))
        or (textures and (uv is None or uv.shape[1] not in (2, 3)))
        or (polygons and (corners is None or corners.min() < 1 or corners.max() >= 2**31))
        or (len(faces) == 2 and uv is None)
    ):
        return None
    return Mesh(
        vertices[:, :3].copy(),
        faces[0] if faces else np.zeros((0, 3), np.int32),
        vertices[:, 3:].copy() if vertices.shape[1] == 6 else None,
        uv[:, :2].copy() if uv is not None and len(faces) == 2 else None,
        faces[1] if len(faces) == 2 else None,
    )


def _fans(polygons: np.ndarray) -> np.ndarray:
    """Triangles (R * (C - 2), 3) of one-based polygons (R, C)."""
    corners = range(1, polygons.shape[1] - 1)
    return np.stack([polygons[:, [0, k, k + 1]] for k in corners], 1).reshape(-1, 3).astype(np.int32) - 1


# What ends a line or parts words besides a line feed and a space, and what joins lines.
_ODD = bytes([*range(9, 10), *range(11, 14), *range(28, 32), 0x85, 0xA0]) + b"\\"
_WHOLE, _REAL = b"0123456789", b"0123456789.+-eE"


def _lines_of(content: bytes, word: bytes) -> bytes:
    """All lines that begin with a word and a space, or are the word alone."""
    letters = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(letters == ord("\n")) + 1
    starts = np.concatenate([[0], ends[:-1]])
    ours = np.ones(len(starts), bool)
    for k, letter in enumerate(word):
        place = letters[np.minimum(starts + k, len(letters) - 1)]
        ours &= (place == letter) | ((place == ord("\n")) & (k == len(word) - 1))
    first, last = np.flatnonzero(np.diff(ours, prepend=False, append=False)).reshape(-1, 2).T
    return b"".join([content[a:b] for a, b in zip(starts[first].tolist(), ends[last - 1].tolist(), strict=True)])


def _alike(lines: bytes, word: bytes, marks: bytes, kind: type, between: bytes = b"") -> np.ndarray | None:
    """Numbers (R, C) of lines that have one form: the word and, each after one space, what `marks` makes up."""
    form = lines[: lines.find(b"\n") + 1].translate(None, marks)
    columns, count = form.count(b" "), lines.count(b"\n")
    words = count * columns
    if not words or form != word + columns * (b" " + between) + b"\n" or lines.translate(None, marks) != form * count:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # how numpy says that there is what is no number
            numbers: np.ndarray = np.fromstring(lines.translate(bytes.maketrans(b"vtf/", b"    ")), kind, sep=" ")
    except (ValueError, DeprecationWarning):
        return None
    # No word is empty, so as many numbers as words are one each; in "1.5-2", for one, numpy finds two.
    fits = numbers.size % words == 0 and 0 < numbers.size <= words * (1 + len(between))
    return numbers.reshape(count, -1) if fits else None


def _alike_corners(lines: bytes) -> np.ndarray | None:
    """The corners (R, C, 1 or 2) of faces in one form: the vertex and, where there is one, the texture point."""
    form = lines[: lines.find(b"\n")].translate(None, _WHOLE)
    count = form.count(b" ")
    between = form[2 : form.find(b" ", 2)] if count > 1 else b""
    table = _alike(lines, b"f", _WHOLE, np.int64, between)
    if table is None or count < 3 or between not in (b"", b"/", b"//"):
        return None
    each = table.shape[1] // count
    if each == len(between) + 1:  # every place is filled
        return table.reshape(-1, count, each)[:, :, :2]
    hollow = between == b"//" and each == 2 and lines.count(b"//") == table.size // 2
    return table.reshape(-1, count, 2)[:, :, :1] if hollow else None


def _any_obj(path: Path, content: bytes) -> Mesh:
    vertices: list[list[float]] = []
    uv: list[list[float]] = []
    faces: list[tuple[int, int, int]] = []
    uv_faces: list[tuple[int, int, int]] = []
    for number, line in enumerate(_lines(content), 1):
        words = line.split()
        if not words or words[0] not in ("v", "vt", "f"):
            continue
        try:
            if words[0] == "v":
                vertices.append([float(word) for word in words[1:7]])
            elif words[0] == "vt":
                uv.append([float(word) for word in words[1:3]])
            else:
                corners = [word.split("/") for word in words[1:]]
                faces += _fan([_index(corner[0], len(vertices)) for corner in corners])
                if all(len(corner) > 1 and corner[1] for corner in corners):
                    uv_faces += _fan([_index(corner[1], len(uv)) for corner in corners])
        except (ValueError, IndexError, OverflowError) as error:
            raise AssetError(f"mesh {path}: line {number} cannot be read ({error}): {line.strip()[:60]!r}") from error
    if not vertices or any(len(row) not in (3, 4, 6) for row in vertices):
        raise AssetError(f"mesh {path}: expected vertices with 3 coordinates (and 3 colours or none); export it again")
    width = min(len(row) for row in vertices)
    table = np.array([row[:width] for row in vertices], np.float64)
    whole = bool(uv_faces) and len(uv_faces) == len(faces)
    if whole and any(len(row) != 2 for row in uv):
        raise AssetError(f"mesh {path}: expected texture points with 2 coordinates; export it again")
    return Mesh(
        table[:, :3],
        np.array(faces, np.int32).reshape(-1, 3),
        table[:, 3:6] if width == 6 else None,
        np.array(uv, np.float64) if whole else None,
        np.array(uv_faces, np.int32) if whole else None,
    )


_PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"}
_PLY_TYPES |= {"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"}
_PLY_TYPES |= {"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"}


@dataclass
class _Element:
    name: str
    count: int
    properties: list[tuple[str, str, str]]  # name, type, type of the count of a list or ""


def read_ply(path: str | os.PathLike[str]) -> Mesh:
    """Read a PLY, text or binary of either byte order: x, y, z, red, green, blue and faces; all else is passed over.

    Raises:
        AssetError: missing, or not a whole PLY.
    """
    path = Path(path)
    content = _content(path)
    end = content.find(b"end_header")
    if not content.startswith(b"ply") or end < 0:
        raise AssetError(f"mesh {path}: not a PLY (no header); check that it is the right file")
    start = content.find(b"\n", end) + 1 or len(content)
    form, elements = _ply_header(path, content[:end].decode("latin-1"))
    try:
        tables = (
            _ply_text(content[start:], elements) if form == "ascii" else _ply_binary(content, start, form, elements)
        )
        faces = _triangles(tables.get("face", {}))
    except (ValueError, IndexError, OverflowError) as error:
        raise AssetError(f"mesh {path}: is cut short or damaged ({error}); copy or export it again") from error
    vertex = tables.get("vertex", {})
    if not all(axis in vertex for axis in "xyz"):
        raise AssetError(f"mesh {path}: has no vertices with x, y, z; export it again")
    colors = None
    if all(name in vertex for name in ("red", "green", "blue")):
        colors = np.stack([np.asarray(vertex[name], np.float64) for name in ("red", "green", "blue")], 1)
        kinds = {name: kind for element in elements if element.name == "vertex" for name, kind, _ in element.properties}
        colors = colors if kinds["red"].startswith("f") else colors / np.iinfo(kinds["red"]).max
    vertices = np.stack([np.asarray(vertex[axis], np.float64) for axis in "xyz"], 1)
    return _checked(Mesh(vertices, faces, colors), path)


def _triangles(table: dict[str, Any]) -> np.ndarray:
    polygons = table.get("vertex_indices", table.get("vertex_index", []))
    fans = (_fan([int(index) for index in polygon]) for polygon in polygons)
    return np.array(list(itertools.chain.from_iterable(fans)), np.int32).reshape(-1, 3)


def _ply_header(path: Path, text: str) -> tuple[str, list[_Element]]:
    form, elements = "", []
    for line in text.splitlines()[1:]:
        match line.split():
            case ["format", kind, *_]:
                form = kind
            case ["element", name, count] if count.isdigit():
                elements.append(_Element(name, int(count), []))
            case ["property", "list", count, kind, name] if elements and {count, kind} <= _PLY_TYPES.keys():
                elements[-1].properties.append((name, _PLY_TYPES[kind], _PLY_TYPES[count]))
            case ["property", kind, name] if elements and kind in _PLY_TYPES:
                elements[-1].properties.append((name, _PLY_TYPES[kind], ""))
            case [] | ["comment", *_] | ["obj_info", *_]:
                continue
            case _:
                raise AssetError(f"mesh {path}: header line cannot be read: {line.strip()[:60]!r}")
    if form not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise AssetError(f"mesh {path}: expected format ascii or binary, got {form!r}")
    return form, elements


def _ply_text(body: bytes, elements: list[_Element]) -> dict[str, dict[str, Any]]:
    lines = iter([line for line in body.decode("latin-1").splitlines() if line.strip()])
    tables = {}
    for element in elements:
        rows = [line.split() for line in itertools.islice(lines, element.count)]
        if len(rows) < element.count:
            raise ValueError(f"{len(rows)} of {element.count} {element.name} lines")
        table: dict[str, Any] = {name: [] for name, _, _ in element.properties}
        for row in rows:
            at = 0
            for name, _, counted in element.properties:
                if counted:
                    size = int(row[at])
                    values = row[at + 1 : at + 1 + size]
                    if len(values) < size:
                        raise ValueError(f"{len(values)} of {size} entries in a list")
                    table[name].append([float(value) for value in values])
                    at += 1 + size
                else:
                    table[name].append(float(row[at]))
                    at += 1
        tables[element.name] = table
    return tables


def _ply_binary(content: bytes, at: int, form: str, elements: list[_Element]) -> dict[str, dict[str, Any]]:
    order = "<" if form == "binary_little_endian" else ">"
    tables = {}
    for element in elements:
        if not any(counted for _, _, counted in element.properties):
            kind = np.dtype([(name, order + number) for name, number, _ in element.properties])
            values = np.frombuffer(content, kind, element.count, at)
            at += kind.itemsize * element.count
            tables[element.name] = {name: values[name] for name in kind.names or ()}
            continue
        table: dict[str, Any] = {name: [] for name, _, _ in element.properties}
        for _ in range(element.count):
            for name, number, counted in element.properties:
                size = 1
                if counted:
                    size = int(np.frombuffer(content, order + counted, 1, at)[0])
                    at += np.dtype(counted).itemsize
                values = np.frombuffer(content, order + number, size, at)
                at += values.nbytes
                table[name].append(values if counted else values[0])
        tables[element.name] = table
    return tables


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AssetError(f"mesh {path}: cannot be read ({error.strerror}); check the path") from error


def _lines(content: bytes) -> list[str]:
    text = content.decode("latin-1")  # only names and comments can be other than ASCII
    return text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines()


def _index(word: str, count: int) -> int:
    """An OBJ index, one-based or counted back from the end, as zero-based."""
    index = int(word)
    if index == 0 or index < -count:
        raise ValueError(f"index {index} with {count} so far")
    return index - 1 if index > 0 else count + index


def _fan(polygon: list[int]) -> list[tuple[int, int, int]]:
    if len(polygon) < 3:
        raise ValueError(f"a face with {len(polygon)} corners")
    if max(polygon) >= 2**31:
        raise ValueError(f"a face with the index {max(polygon)}")
    return [(polygon[0], b, c) for b, c in itertools.pairwise(polygon[1:])]


def _checked(mesh: Mesh, path: Path) -> Mesh:
    for name, index, points in (
        ("faces", mesh.faces, mesh.vertices),
        ("texture faces", mesh.uv_faces, mesh.uv),
    ):
        if index is None or points is None or not index.size:
            continue
        if index.min() < 0 or index.max() >= len(points):
            raise AssetError(f"mesh {path}: {name} point outside 0..{len(points) - 1}; export it again")
    if not np.isfinite(mesh.vertices).all():
        raise AssetError(f"mesh {path}: has coordinates that are not finite; export it again")
    return mesh


def _check(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    vertices, faces = np.asarray(vertices), np.asarray(faces)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or len(vertices) == 0 or vertices.dtype.kind != "f":
        raise InputError(f"vertices: expected (N, 3) floats, got {vertices.shape} {vertices.dtype}")
    if not np.isfinite(vertices).all():
        raise InputError("vertices: expected finite numbers")
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "iu":
        raise InputError(f"faces: expected (M, 3) integers, got {faces.shape} {faces.dtype}")
    if faces.size and (faces.min() < 0 or faces.max() >= len(vertices)):
        raise InputError(f"faces: expected indices in 0..{len(vertices) - 1}, got {faces.min()}..{faces.max()}")
    return vertices, faces


def _check_colors(colors: np.ndarray | None, count: int) -> np.ndarray | None:
    if colors is None:
        return None
    colors = np.asarray(colors, np.float64)
    if colors.shape != (count, 3) or not (np.isfinite(colors).all() and colors.min() >= 0 and colors.max() <= 1):
        raise InputError(f"colors: expected ({count}, 3) in [0, 1], got {colors.shape}")
    return colors


def _to_linear(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
