import base64
import gzip
import json

import numpy as np
import pytest

from saetrack.report.pack import pack, smallest_unsigned


def unpack(text: str) -> tuple[dict, dict[str, np.ndarray]]:
    """As the format's description says, without a line of the writer's."""
    whole = gzip.decompress(base64.b64decode(text))
    length = int.from_bytes(whole[:4], "little")
    header = json.loads(whole[4 : 4 + length])
    arrays = {
        name: np.frombuffer(
            whole, dtype=f"<{np.dtype(kind).str[1:]}", count=int(np.prod(shape)), offset=4 + length + at
        )
        for name, (kind, shape, at) in header["arrays"].items()
    }
    assert all((4 + length + at) % 8 == 0 for _, _, at in header["arrays"].values())  # JavaScript's arrays insist
    return header["facts"], {name: a.reshape(header["arrays"][name][1]) for name, a in arrays.items()}


def test_what_is_packed_comes_back() -> None:
    arrays = {
        "bytes": np.arange(5, dtype=np.uint8),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "none": np.zeros((0, 4), dtype=np.int32),
    }
    facts, found = unpack(pack({"token": "</script>é"}, arrays))
    assert facts == {"token": "</script>é"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_equal_data_give_equal_text() -> None:
    assert pack({}, {"x": np.ones(3, np.float32)}) == pack({}, {"x": np.ones(3, np.float32)})


def test_a_type_that_the_page_cannot_read_is_refused() -> None:
    with pytest.raises(ValueError, match="'x' is float64; expected one of float32"):
        pack({}, {"x": np.ones(3)})


@pytest.mark.parametrize(("largest", "kind"), [(255, "uint8"), (256, "uint16"), (65536, "uint32")])
def test_integers_take_the_smallest_type_that_holds_them(largest: int, kind: str) -> None:
    array = smallest_unsigned(np.array([0, largest]))
    assert array.dtype.name == kind
    assert array.max() == largest
