"""Weights in 8 and 4 bits, by bitsandbytes: imported where a recipe asks for it, as that takes seconds."""

import logging
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from oprd.errors import ConfigError

Bits = Literal["8bit", "4bit"]


def require_bitsandbytes(option: str) -> None:
    """Raise ConfigError if the library that an option needs is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"{option} needs bitsandbytes, which is not installed: pip install 'oprd[quantization]'")


def quantized(bits: Bits | None, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is given; products are computed in `dtype`."""
    if bits is None:
        return {}
    # it says once per layer and forward pass that inputs are cast, which is what was asked for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if bits == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": nf4}


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit weights out of the layout that bitsandbytes gives them on some CPUs, whose product has no gradient."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
