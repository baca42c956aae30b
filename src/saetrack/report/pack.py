"""The container in which data reach the page: a JSON header and typed arrays, compressed. ``data.js`` opens it.

    uint32 little-endian   length of the header
    header, UTF-8          {"facts": ..., "arrays": {name: [type, shape, offset]}}
    arrays                 each from a multiple of 8 bytes after the header, little-endian, in C order

Binary, since a million small integers as JSON text are three times the page that fits into a mail.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

TYPES = {"uint8", "int8", "uint16", "int32", "uint32", "float32"}
"""What both NumPy and JavaScript's typed arrays have, and the page uses."""


def pack(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Facts and arrays as one base64 text.

    Args:
        facts: Json-able, without NaN.
        arrays: By name, of a type in ``TYPES``.

    Returns:
        Base64 of the gzip of the container. The same content gives the same text.

    Raises:
        ValueError: If an array has another type, or facts hold NaN.
    """
    places: dict[str, Any] = {}
    body = bytearray()
    for name, array in arrays.items():
        if array.dtype.name not in TYPES:
            raise ValueError(f"Array {name!r} is {array.dtype.name}; expected one of {', '.join(sorted(TYPES))}.")
        places[name] = [array.dtype.name, list(array.shape), len(body)]
        body += np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        body += bytes(-len(body) % 8)
    header = json.dumps({"facts": facts, "arrays": places}, ensure_ascii=False, allow_nan=False).encode()
    header += b" " * (-(len(header) + 4) % 8)
    whole = len(header).to_bytes(4, "little") + header + body
    return base64.b64encode(gzip.compress(whole, compresslevel=6, mtime=0)).decode("ascii")


def smallest_unsigned(array: NDArray[Any]) -> NDArray[Any]:
    """Non-negative integers in the smallest type of the page that holds them."""
    largest = int(array.max()) if array.size else 0
    return array.astype("uint8" if largest < 2**8 else "uint16" if largest < 2**16 else "uint32")
