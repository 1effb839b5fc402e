"""CUDA source to a running kernel at first use: NVRTC, which torch's CUDA builds bring, or nvcc; then the driver."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from chebface.cache import cache_dir
from chebface.errors import MissingDependencyError

MAX_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def why_missing() -> str | None:
    """Why nothing can be compiled for a GPU here, or None."""
    if _nvrtc() is None and shutil.which("nvcc") is None:
        return "no CUDA compiler: neither NVRTC (part of torch's CUDA builds) nor nvcc was found"
    return None if _driver() is not None else "no CUDA driver (libcuda.so.1)"


def compile_cubin(source: Path, options: Sequence[str]) -> bytes:
    """Machine code of a CUDA file; kept in the user's cache by source, options and compiler.

    Args:
        source: self-contained: no header is looked for.
        options: of NVRTC and nvcc alike, the architecture among them: --gpu-architecture=sm_90.

    Raises:
        MissingDependencyError: there is no compiler, or it refuses.
    """
    text, compiler = source.read_text(), _compiler()
    key = hashlib.sha256("\0".join([text, *options, compiler]).encode()).hexdigest()[:16]
    path = cache_dir() / "native" / f"{source.stem}-{key}.cubin"
    if path.exists():
        return path.read_bytes()
    binary = _compile_with_nvcc(source, options) if compiler.startswith("nvcc") else _compile(source, text, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        built.write_bytes(binary)
        os.replace(built, path)
    return binary


class Module:
    """Kernels loaded into the CUDA context that is current now; they start in it whichever is current then."""

    def __init__(self, cubin: bytes) -> None:
        self._driver = _need_driver()
        self._handle, self._context = ctypes.c_void_p(), ctypes.c_void_p()
        _check(self._driver.cuCtxGetCurrent(ctypes.byref(self._context)), "find its context")
        _check(self._driver.cuModuleLoadData(ctypes.byref(self._handle), cubin), "load the kernels")

    def find(self, name: str, shared_bytes: int) -> ctypes.c_void_p:
        """A kernel, allowed so much dynamic shared memory."""
        function = ctypes.c_void_p()
        code = self._driver.cuModuleGetFunction(ctypes.byref(function), self._handle, name.encode())
        _check(code, f"find {name}")
        code = self._driver.cuFuncSetAttribute(function, MAX_SHARED_MEMORY, shared_bytes)
        _check(code, f"give {name} {shared_bytes} bytes of shared memory")
        return function

    def launch(
        self,
        function: ctypes.c_void_p,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        argument: ctypes.Structure,
    ) -> None:
        """Start a kernel that takes one structure by value. Neither waits nor allocates: a CUDA graph may record it."""
        words = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        _check(self._driver.cuCtxPushCurrent_v2(self._context), "enter its context")
        try:
            code = self._driver.cuLaunchKernel(function, *grid, 1, threads, 1, 1, shared_bytes, stream, words, None)
        finally:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        _check(code, "launch")


def _compile(source: Path, text: str, options: Sequence[str]) -> bytes:
    library = _nvrtc()
    if library is None:
        raise MissingDependencyError(str(why_missing()))
    program = ctypes.c_void_p()
    code = library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), source.name.encode(), 0, None, None)
    if code:
        raise MissingDependencyError(f"NVRTC cannot start on {source.name} (error {code})")
    try:
        words = [option.encode() for option in options]
        if library.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words)):
            log = _read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise MissingDependencyError(f"NVRTC refuses {source.name}: {log.decode(errors='replace')[-2000:]}")
        return _read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(get_size: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    get_size(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


def _compile_with_nvcc(source: Path, options: Sequence[str]) -> bytes:
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise MissingDependencyError(str(why_missing()))
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "kernels.cubin"
        command = [compiler, "-cubin", *options, str(source), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MissingDependencyError(f"nvcc refuses {source.name}: {done.stderr.strip()[-2000:]}")
        return built.read_bytes()


def _compiler() -> str:
    library = _nvrtc()
    if library is not None:
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"nvrtc {major.value}.{minor.value}"
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise MissingDependencyError(str(why_missing()))
    return "nvcc " + subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


@cache
def _nvrtc() -> ctypes.CDLL | None:
    import torch

    major = (torch.version.cuda or "").partition(".")[0]
    names = [f"libnvrtc.so.{major}"] if major else []
    for folder in sys.path:
        names += sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib", f"libnvrtc.so.{major or '*'}")))
    for name in [*names, "libnvrtc.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@cache
def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    unsigned, pointer = ctypes.c_uint, ctypes.c_void_p
    driver.cuLaunchKernel.argtypes = [pointer, *(unsigned,) * 7, pointer, pointer, pointer]
    return driver


def _need_driver() -> ctypes.CDLL:
    driver = _driver()
    if driver is None:
        raise MissingDependencyError(str(why_missing()))
    return driver


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _need_driver().cuGetErrorString(code, ctypes.byref(text))
        raise MissingDependencyError(f"CUDA cannot {what}: {(text.value or b'unknown').decode()} (error {code})")
