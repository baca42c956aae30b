"""Token ids as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def token_strings(tokenizer: Any, ids: NDArray[np.integer]) -> NDArray[np.object_]:
    """Text of the token ids in ``ids``, at their own index; spaces as spaces, broken UTF-8 as the raw token.

    Args:
        tokenizer: Of transformers.
        ids: Distinct token ids.

    Returns:
        ``[max(ids) + 1]``, empty where an id was not asked for.
    """
    strings = np.full(int(ids.max()) + 1, "", dtype=object)
    raws = tokenizer.convert_ids_to_tokens([int(i) for i in ids])
    for i, raw in zip(ids, raws, strict=True):
        text = tokenizer.decode([int(i)], clean_up_tokenization_spaces=False)
        # SentencePiece marks a space with U+2581 and drops it when it decodes a single token
        text = f" {text}" if str(raw).startswith("\u2581") and not text.startswith(" ") else text
        strings[i] = str(raw) if raw is not None and (not text or "\ufffd" in text) else text
    return strings
