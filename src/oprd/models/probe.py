"""Whether a loaded model is what we take it for: its own forward pass against what we tap off it."""

from dataclasses import replace

import torch

from oprd.errors import ModelError
from oprd.losses.chunked import logits
from oprd.models.families import SEVERAL_STREAMS, starts_with_block_1
from oprd.models.language_model import LanguageModel, evaluating
from oprd.types import Batch, HiddenSpec, Taps, TokenSelection

TOKENS = 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative to the largest entry."""


@torch.no_grad()
def check_family(lm: LanguageModel) -> None:
    """Raise ModelError naming the model type unless the states we tap are the model's own, and our head on the last ones
    gives its logits. A head that was dropped is not looked at, nor anything under quantization or flash attention."""
    core, kind = lm.core, lm.core.config.model_type
    if kind in SEVERAL_STREAMS:
        raise ModelError(f"{lm.name} ({kind}): its blocks hold several residual streams; this family is not supported")
    if getattr(core, "hf_quantizer", None) is not None or "flash" in str(core.config._attn_implementation):
        return
    ids = torch.arange(10, 10 + TOKENS, device=lm.device)[None] % core.config.get_text_config().vocab_size
    batch = Batch(
        input_ids=ids, attention_mask=torch.ones_like(ids), prompt_lengths=(1,), completion_lengths=(TOKENS - 1,)
    )
    specs = [HiddenSpec(block=b, at="token", tokens=TokenSelection()) for b in range(1, lm.num_blocks + 1)]
    with evaluating(lm.model):
        own = core(input_ids=ids, attention_mask=batch.attention_mask, use_cache=False, output_hidden_states=True)
        tapped = lm.tap(batch, Taps(hidden=tuple(specs)))
        first = 0 if starts_with_block_1(core.config) else 1
        for spec, theirs in zip(specs[:-1], own.hidden_states[first:], strict=False):
            _compare(tapped.hidden[spec], theirs[0, 1:], f"{lm.name} ({kind})", f"the states of block {spec.block}")
        if type(core.get_output_embeddings()) is torch.nn.Linear:
            ours = logits(tapped.hidden[specs[-1]], replace(lm.head(), stops=()))
            _compare(ours, own.logits[0, 1:], f"{lm.name} ({kind})", "the logits")


def _compare(ours: torch.Tensor, theirs: torch.Tensor, name: str, what: str) -> None:
    allowed = TOLERANCE.get(theirs.dtype, 1e-3) * float(theirs.abs().max())
    if ours.shape != theirs.shape or not float((ours.float() - theirs.float()).abs().max()) <= allowed:
        raise ModelError(f"{name}: {what} that we compute are not the model's own; this family is not supported")
