"""What differs between model families, as data. A new family is a row here and in the family test."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

LOGIT_RULES: tuple[tuple[str, Literal["multiply", "divide", "cap"]], ...] = (
    ("logits_scaling", "divide"),  # Granite
    ("logit_scale", "multiply"),  # Cohere
    ("final_logit_softcapping", "cap"),  # Gemma 2
)
"""Config field of the text model -> what the family's forward does with it after the LM head."""

NORM_MARK = "Norm"
"""Part of every normalisation layer's class name: RMSNorm, LayerNorm1P, RMSNormGated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRule:
    """Logits become softcap * tanh(scale * x / softcap), or scale * x without a softcap."""

    scale: float
    softcap: float | None


def logit_rule(config: Any) -> LogitRule:
    """What this model does to the output of its LM head."""
    values = config.get_text_config().to_dict()
    scale, softcap = 1.0, None
    for name, kind in LOGIT_RULES:
        value = values.get(name)
        if value is None:
            continue
        if kind == "cap":
            softcap = float(value)
        else:
            scale = scale * value if kind == "multiply" else scale / value
    return LogitRule(scale=scale, softcap=softcap)


def find_blocks(backbone: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Path and list of the transformer blocks: the first non-empty ModuleList, whatever the family calls it."""
    found = ((path, m) for path, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m))
    return next(found, None)


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalisation layer."""
    return NORM_MARK in type(module).__name__
