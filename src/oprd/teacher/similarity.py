"""How alike two texts are, in [0, 1]: OmniOPD's phi."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from rapidfuzz.distance import Levenshtein
from transformers import AutoModel, AutoTokenizer

from oprd.errors import ModelError

Similarity = Callable[[str, Sequence[str]], list[float]]
"""(a text, others) -> how alike it is to each."""


def edit_similarity(text: str, others: Sequence[str]) -> list[float]:
    """1 - Levenshtein distance / longer length, over characters; 1 for two empty texts [second-hand]."""
    return [Levenshtein.normalized_similarity(text, other) for other in others]


def embedding_similarity(model: str, device: torch.device) -> Similarity:
    """Cosine of mean-pooled sentence embeddings, cut to [0, 1]. The paper's abstract says "continuous semantic similarity".

    Raises ModelError when `model`, a folder or Hub name, cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoder = cast(Any, AutoModel.from_pretrained(model)).to(device).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the sentence-embedding model {model!r}: {str(error).splitlines()[0]}") from error

    @torch.no_grad()
    def similarity(text: str, others: Sequence[str]) -> list[float]:
        batch = tokenizer([text, *others], padding=True, truncation=True, return_tensors="pt").to(device)
        mask = batch["attention_mask"][:, :, None]
        states = encoder(**batch).last_hidden_state
        pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return (pooled[1:] @ pooled[0]).clamp(0, 1).tolist()

    return similarity
