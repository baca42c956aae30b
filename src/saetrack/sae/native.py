"""Native kernels for the sparse step: never needed, built when asked for.

On a CPU they are ``native.cpp``, compiled once for this machine into the user's cache (``SAETRACK_CACHE``, else
``~/.cache/saetrack``). It has only plain C symbols, so it needs no header of PyTorch, and a build takes seconds.
On a GPU they are those of `gpu`; the functions here pass on to them what lies there. They import it where they call it,
for elsewhere there is no Triton.

Where the CPU has VNNI and no AMX, products of 8-bit numbers name candidates for the k largest (`select`).
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from saetrack.pickles import reason

from .int8 import smoothing
from .workspace import Workspace

if TYPE_CHECKING:
    from .sparse import Selection

Kernels = Literal["pytorch", "native"]

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")
_on_cpu: ctypes.CDLL | None = None
_on_gpu = False


def use_kernels(kernels: Kernels, device: str = "cpu") -> None:
    """Choose the kernels of this process.

    Args:
        kernels: ``pytorch``, or ``native``, which are compiled on first use.
        device: Type of the device that they are for, ``cpu`` or ``cuda``; others have none but PyTorch's.

    Raises:
        ValueError: If the choice is neither of the two.
        RuntimeError: If there is no C++ compiler, or it fails; on a GPU, if there is no Triton.
    """
    if kernels not in get_args(Kernels):
        raise ValueError(f"model.kernels is {kernels!r}; it must be one of {', '.join(get_args(Kernels))}.")
    global _on_cpu, _on_gpu
    _on_cpu = _library() if kernels == "native" and device == "cpu" else None
    _on_gpu = kernels == "native" and device == "cuda" and _builds_on_gpu()


def in_use(*tensors: Tensor) -> bool:
    """Whether the native kernels are chosen and can work on these: all float32 on the device they were chosen for."""
    device = "cpu" if _on_cpu is not None else "cuda" if _on_gpu else None
    return device is not None and all(t.device.type == device and t.dtype == torch.float32 for t in tensors)


def largest(pre: Tensor, k: int) -> Tensor | None:
    """Where the k largest of each row are, int64 ``[rows, k]``; None where the kernel cannot say.

    Args:
        pre: Contiguous, bfloat16, ``[rows, d]``; a value below zero counts as any other below zero.
        k: 1 to d.
    """
    if _on_gpu and pre.is_cuda and pre.dtype == torch.bfloat16:
        from . import gpu

        return gpu.largest(pre, k)
    if _on_cpu is None or pre.dtype != torch.bfloat16 or pre.device.type != "cpu":
        return None
    rows, d = pre.shape
    out = torch.empty(rows, k, dtype=torch.int64)
    _on_cpu.saetrack_largest(*_pointers(pre), _c(rows), _c(d), _c(k), *_pointers(out), torch.get_num_threads())
    return out


def row_dots(left: Tensor, right: Tensor, selection: "Selection") -> Tensor:
    """``left[row] . right[latent]`` at the selection's entries, in their order, ``[nnz]``."""
    if left.is_cuda:
        from . import gpu

        return gpu.row_dots(left, right, selection)
    assert _on_cpu is not None
    dots = torch.empty(len(selection.columns))
    _on_cpu.saetrack_row_dots(
        *_pointers(left, right, selection.rows_by_latent, selection.order, selection.latent_offsets),
        *(_c(n) for n in right.shape),
        *_pointers(dots),
        torch.get_num_threads(),
    )
    return dots


def candidates(centred: Tensor, weights: Tensor, bias: Tensor, width: int, workspace: Workspace) -> Tensor | None:
    """The latents with the largest pre-activations by products of 8-bit numbers, int64 ``[batch, width]``.

    Args:
        centred: x - b_dec, ``[batch, d_in]``.
        weights: W_enc^T, ``[d_sae, d_in]``.
        bias: ``[d_sae]``.
        width: How many for each activation, 1 to d_sae.
        workspace: Holds the 8-bit weights.

    Returns:
        In no particular order; None where there is no such kernel.
    """
    if _on_cpu is None or not in_use(centred, weights, bias) or not _on_cpu.saetrack_has_int8():
        return None
    (batch, d_in), d_sae = centred.shape, len(bias)
    centred, weights, smooth = centred.contiguous(), weights.contiguous(), smoothing(centred)
    packed = workspace.buffer("int8", (-(-d_sae // 32) * 32, -(-d_in // 4) * 4), torch.uint8, centred.device)
    found = torch.empty(batch, width, dtype=torch.int64)
    _on_cpu.saetrack_candidates(
        *_pointers(centred, weights, bias, smooth),
        *(_c(n) for n in (batch, d_sae, d_in, width)),
        *_pointers(packed, found),
        torch.get_num_threads(),
    )
    return found


def sorts(columns: Tensor) -> bool:
    """Whether `sort` is there for these; a GPU's own is fast."""
    return _on_cpu is not None and columns.device.type == "cpu"


def sort(columns: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """The entries in order of their latents, ``[nnz]``, and where each latent's part begins, ``[d_sae + 1]``."""
    assert _on_cpu is not None
    order, offsets = torch.empty_like(columns), columns.new_empty(d_sae + 1)
    _on_cpu.saetrack_sort(*_pointers(columns), _c(len(columns)), _c(d_sae), *_pointers(order, offsets))
    return order, offsets


def decode(values: Tensor, table: Tensor, bias: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """``bias`` and, for each activation, the sum of its latents' rows of ``table``, ``[batch, d_in]``."""
    if table.is_cuda:
        from . import gpu

        return gpu.decode(values, table, bias, columns, offsets)
    assert _on_cpu is not None
    out = torch.empty(len(offsets) - 1, table.shape[1])
    _on_cpu.saetrack_decode(
        *_pointers(values, table, bias, columns, offsets),
        *(_c(n) for n in out.shape),
        *_pointers(out),
        torch.get_num_threads(),
    )
    return out


def backward(
    centred: Tensor,
    grad: Tensor,
    W_dec: Tensor,
    values: Tensor,
    into_values: Tensor | None,
    selection: "Selection",
    workspace: Workspace,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of W_enc^T ``[d_sae, d_in]``, b_enc ``[d_sae]`` and W_dec ``[d_sae, d_in]`` in one pass.

    Args:
        centred: x - b_dec, ``[batch, d_in]``.
        grad: Gradient of the reconstruction, ``[batch, d_in]``.
        W_dec: Decoder, ``[d_sae, d_in]``.
        values: Latents at the selection's entries, ``[nnz]``.
        into_values: Their own gradient beside that through the reconstruction, or None.
        selection: Which latents.
        workspace: Lends memory to both matrices' gradients.
    """
    if W_dec.is_cuda:
        from . import gpu

        return gpu.backward(centred, grad, W_dec, values, into_values, selection)
    assert _on_cpu is not None
    into_W_enc, into_W_dec = (workspace.lend_like(name, W_dec) for name in ("into_W_enc", "into_W_dec"))
    into_b_enc = torch.empty(len(W_dec))
    own = [ctypes.c_void_p()] if into_values is None else _pointers(into_values.contiguous())
    _on_cpu.saetrack_backward(
        *_pointers(centred, grad, W_dec, values),
        *own,
        *_pointers(selection.rows_by_latent, selection.order, selection.latent_offsets),
        *(_c(n) for n in W_dec.shape),
        *_pointers(into_W_enc, into_b_enc, into_W_dec),
        torch.get_num_threads(),
    )
    return into_W_enc, into_b_enc, into_W_dec


def remove_parallel_(table: Tensor, grad: Tensor) -> None:
    """Take out of each row of ``grad`` ``[n, d]`` what lies along that of ``table``, in place."""
    if table.is_cuda:
        from . import gpu

        gpu.remove_parallel_(table, grad)
        return
    assert _on_cpu is not None
    sizes = (_c(n) for n in table.shape)
    _on_cpu.saetrack_remove_parallel(*_pointers(table, grad), *sizes, torch.get_num_threads())


def normalise_(table: Tensor) -> None:
    """Bring each row of ``table`` ``[n, d]`` to unit norm, in place."""
    if table.is_cuda:
        from . import gpu

        gpu.normalise_(table)
        return
    assert _on_cpu is not None
    _on_cpu.saetrack_normalise(*_pointers(table), *(_c(n) for n in table.shape), torch.get_num_threads())


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _c(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


@cache
def _builds_on_gpu() -> bool:
    """Compile one of the kernels of a GPU, which needs Triton, a C compiler and Python's headers; else raise."""
    try:
        from . import gpu

        gpu.normalise_(torch.ones(1, 1, device="cuda"))
    except Exception as error:  # Triton and the compiler it calls fail in ways of their own
        raise RuntimeError(
            f"model.kernels is native, but Triton cannot build kernels for this GPU ({reason(error)}); install Triton, "
            "a C compiler and Python's headers, or set `model.kernels: pytorch`."
        ) from error
    return True


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
