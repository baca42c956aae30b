"""Native kernels for the sparse step on a CPU: never needed, built when asked for.

``native.cpp`` is compiled once for this machine into the user's cache (``SAETRACK_CACHE``, else ``~/.cache/saetrack``).
It has only plain C symbols, so it needs no header of PyTorch, and a build takes seconds. Sums over latents and over
activations are not in it: PyTorch's own embedding_bag was faster (26 against 34 ms at 16,384 latents).
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

Kernels = Literal["pytorch", "native"]

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared"]
_in_use: ctypes.CDLL | None = None


def use_kernels(kernels: Kernels) -> None:
    """Choose the kernels of this process.

    Args:
        kernels: ``pytorch``, or ``native``, which are compiled on first use.

    Raises:
        ValueError: If the choice is neither of the two.
        RuntimeError: If there is no C++ compiler, or it fails.
    """
    if kernels not in get_args(Kernels):
        raise ValueError(f"model.kernels is {kernels!r}; it must be one of {', '.join(get_args(Kernels))}.")
    global _in_use
    _in_use = _library() if kernels == "native" else None


def in_use(*tensors: Tensor) -> bool:
    """Whether the native kernels are chosen and can work on these: all float32 on the CPU."""
    fitting = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return _in_use is not None and fitting


def largest(pre: Tensor, k: int) -> Tensor | None:
    """Where the k largest of each row are, int64 ``[rows, k]``; None where the kernel cannot say.

    Args:
        pre: Contiguous, bfloat16 on the CPU, ``[rows, d]``; a value below zero counts as any other below zero.
        k: 1 to d.
    """
    if _in_use is None or pre.dtype != torch.bfloat16 or pre.device.type != "cpu":
        return None
    rows, d = pre.shape
    out = torch.empty(rows, k, dtype=torch.int64)
    _in_use.saetrack_largest(*_pointers(pre), _c(rows), _c(d), _c(k), *_pointers(out), torch.get_num_threads())
    return out


def row_dots(left: Tensor, right: Tensor, rows: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """``left[row] . right[latent]`` for the entries of each latent, put back where ``order`` says, ``[nnz]``."""
    assert _in_use is not None
    dots = torch.empty(len(rows))
    sizes = (_c(len(right)), _c(right.shape[1]))
    _in_use.saetrack_row_dots(
        *_pointers(left, right, rows, order, offsets), *sizes, *_pointers(dots), torch.get_num_threads()
    )
    return dots


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _c(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


@cache
def _library() -> ctypes.CDLL:
    """The compiled kernels, from the cache or built now."""
    folder = Path(os.environ.get("SAETRACK_CACHE", Path.home() / ".cache" / "saetrack"))
    # -march=native makes a build for one kind of CPU, and a cache may be shared by machines of several
    made_of = [_SOURCE.read_text(), *_FLAGS, _cpu_flags()]
    path = folder / f"native-{hashlib.sha256(''.join(made_of).encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        _build(path)
    return ctypes.CDLL(str(path))


def _build(path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or shutil.which(compiler) is None:
        raise RuntimeError(
            "model.kernels is native, but there is no C++ compiler to build them (tried $CXX, c++ and g++); install "
            "one, or set `model.kernels: pytorch`."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    done = subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise RuntimeError(f"{compiler} could not build the native kernels: {said} Set `model.kernels: pytorch`.")
    unfinished.replace(path)  # several processes may build at once; the files are equal


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
