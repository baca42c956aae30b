import pytest
import torch

from saetrack.sae import precision, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("has", [True, False], ids=["bf16", "no bf16"])
def test_auto_follows_the_hardware(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert precision.has_bfloat16(CPU) == has
    assert resolve_precision("auto", CPU) == (torch.bfloat16 if has else torch.float32)
    assert resolve_precision("float32", CPU) == torch.float32


def test_a_pytorch_that_cannot_tell_means_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not precision.has_bfloat16(CPU)


def test_bfloat16_is_refused_where_the_hardware_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match=r"^model.precision is bfloat16, but this machine's cpu has no .*; set `model"):
        resolve_precision("bfloat16", CPU)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.precision is 'fp8'; it must be one of auto, float32, bfloat16"):
        resolve_precision("fp8", CPU)  # type: ignore[arg-type]
