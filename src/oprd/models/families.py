"""What differs between model families, as data. A new family is a row here and in the family test."""

from typing import Any, Literal

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from oprd.errors import ModelError

LOGIT_RULES: tuple[tuple[str, Literal["multiply", "divide", "cap"]], ...] = (
    ("logits_scaling", "divide"),  # Granite
    ("logit_scale", "multiply"),  # Cohere
    ("lm_head_multiplier", "multiply"),  # Falcon-H1
    ("output_multiplier", "multiply"),  # Muse
    ("logits_mup_width_multiplier", "divide"),  # Inkling, before the head
    ("final_logit_softcapping", "cap"),  # Gemma 2
    ("logits_soft_cap", "cap"),  # RecurrentGemma
    ("output_logit_soft_cap", "cap"),  # xLSTM
)
"""Config field of the text model -> what the family's forward does with it around the LM head."""

OWN_LOGIT_RULES: dict[str, tuple[tuple[str, Literal["multiply", "divide", "cap"]], ...]] = {
    "mpt": (),  # has a logit_scale that its forward never reads
    "hyperclovax": (("logits_scaling", "multiply"),),
}
"""Model types that mean something else by these fields."""

BODIES = {"llama4_text": "model"}
"""Model types whose `base_model` is the whole causal LM: where everything before the LM head stands."""

STATES_FROM_BLOCK_1 = {"mamba", "mamba2", "falcon_mamba", "rwkv"}
"""Model types whose `hidden_states` start with block 1, not with the embedding."""

_STREAMS = "its blocks hold several residual streams at once, so there is no one hidden state to tap"
_WRITES_WRONG = "transformers 5.23 writes other text from padded prompts than the model's own forward pass would"
NOT_SUPPORTED = {
    "gemma3n": _STREAMS, "deepseek_v4": _STREAMS,
    "minimax": _WRITES_WRONG, "recurrent_gemma": _WRITES_WRONG, "rwkv": _WRITES_WRONG,
}  # fmt: skip
"""Model type -> why it is refused before it is loaded."""

KERNEL_READS_OUT_PROJ = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""Model types whose Mamba kernel reads the weight of `out_proj` past its module, which an adapter would not change."""


def refuse_family(config: Any, name: str) -> None:
    """Raise ModelError if models of this config cannot be used."""
    why = NOT_SUPPORTED.get(config.model_type.removesuffix("_text"))
    if config.is_encoder_decoder:
        why = "it is an encoder-decoder; give a decoder-only model"
    if why is not None:
        raise ModelError(f"{name} ({config.model_type}): {why}; this family is not supported")


def auto_class(config: Any) -> Any:
    """The class that loads models of this config: some multimodal models are no causal LM to transformers."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def without_router_losses(model: Any) -> None:
    """Nothing here learns from the routers' own losses, and computing them fails on padded rows in transformers 5.23."""
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        text.output_router_logits = False


def logit_rule(config: Any) -> tuple[float, float | None]:
    """Scale and softcap of this model's logits: softcap * tanh(scale * x / softcap), or scale * x without a softcap, of the
    LM head's output x."""
    text = config.get_text_config()
    scale, softcap = 1.0, None
    for name, kind in OWN_LOGIT_RULES.get(text.model_type, LOGIT_RULES):
        value = getattr(text, name, None)  # MiniCPM3's is a property, which to_dict leaves out
        if value is None:
            continue
        if kind == "cap":
            softcap = float(value)
        else:
            scale = scale * value if kind == "multiply" else scale / value
    return scale, softcap


def find_body(model: PreTrainedModel) -> nn.Module:
    """Everything before the LM head; of a multimodal model also the vision tower."""
    body = BODIES.get(model.config.model_type)
    return model.base_model if body is None else model.get_submodule(body)


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """The part of the body that reads text: of a multimodal model its language model, else all or nearly all of it."""
    decoder, body = model.get_decoder(), find_body(model)
    # some call a linear map of their LM head `decoder`
    return decoder if isinstance(decoder, PreTrainedModel) and decoder is not model else body


def find_blocks(backbone: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Path and list of the transformer blocks: the first non-empty ModuleList, whatever the family calls it."""
    found = ((path, m) for path, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m))
    return next(found, None)


def context_of(config: Any) -> tuple[int, str]:
    """Most tokens of a row, and the reason where it is not the length of pretraining alone. Beyond it, dynamic and longrope
    read every row of a batch by the longest one's frequencies: the split into micro-batches would change the update."""
    text = config.get_text_config()
    most, reason = getattr(text, "max_position_embeddings", None) or 2**31, ""
    rope = getattr(text, "rope_parameters", None) or {}
    for one in (rope, *rope.values()):
        kind = one.get("rope_type") if isinstance(one, dict) else None
        if kind == "longrope":
            most = min(most, one["original_max_position_embeddings"])
        if kind in ("dynamic", "longrope"):
            reason = f"beyond {most} tokens its {kind} rope would read every row by the longest one beside it"
    return most, reason


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the text decoder's linear layers that can be adapted: a `...Router` gives more than one tensor."""
    inside = {id(module) for module in find_decoder(model).modules()}
    fixed = "out_proj" if model.config.model_type in KERNEL_READS_OUT_PROJ else None
    return [
        name
        for name, module in model.named_modules()
        if id(module) in inside
        and isinstance(module, nn.Linear | Conv1D)
        and "Router" not in type(module).__name__
        and name.rpartition(".")[2] != fixed
    ]


def stacked_weights(model: PreTrainedModel) -> list[str]:
    """Names of the text decoder's 3-dimensional weights, one matrix per expert or head, which are no linear layers."""
    inside = {id(p) for m in find_decoder(model).modules() if not isinstance(m, nn.Conv1d) for p in m.parameters(False)}
    return [name for name, p in model.named_parameters() if id(p) in inside and p.dim() == 3 and min(p.shape) > 1]


def continues_from_cache(model: nn.Module) -> bool:
    """Whether all that the family keeps of earlier tokens is in its cache: Qwen's VL models keep positions beside it."""
    return not any(hasattr(module, "rope_deltas") for module in model.modules())


def starts_with_block_1(config: Any) -> bool:
    """Whether the model's own `hidden_states` leave the embedding out and start with block 1."""
    return config.get_text_config().model_type in STATES_FROM_BLOCK_1


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalisation layer, by its class name: RMSNorm, LayerNorm1P, RMSNormGated."""
    return "Norm" in type(module).__name__
