"""Weights in 8 and 4 bits, by bitsandbytes: imported where a recipe asks for it, as that takes seconds."""

import logging
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.base import get_keys_to_not_convert

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


BYTES = {"4bit": 1 / 2 + 1 / 64 + 4 / 64 / 256, "8bit": 1.0}
"""Of a weight: NF4 with the scales of its blocks, themselves in 8 bits; LLM.int8."""


def hold_quantized(model: nn.Module, config: BitsAndBytesConfig) -> None:
    """Put layers of the library's size in place of linear ones, where tensors have no content to quantize."""
    kept = get_keys_to_not_convert(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not any(key in name for key in kept):
            model.set_submodule(name, _Quantized(layer, BYTES["4bit" if config.load_in_4bit else "8bit"]))


class _Quantized(nn.Linear):
    """Its weights are whole for the length of a product."""

    def __init__(self, layer: nn.Linear, size: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias, self._dtype = (
            *layer.weight.T.shape,
            layer.bias,
            layer.weight.dtype,
        )
        self.weight = nn.Parameter(torch.empty(round(layer.weight.numel() * size), dtype=torch.uint8), False)

    def forward(self, input: Tensor) -> Tensor:
        out = _Product.apply(input.to(self._dtype), self.weight, self.out_features)
        return (out if self.bias is None else out + self.bias).to(input.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.columns = x.shape[-1]
        return x @ x.new_empty(width, x.shape[-1]).T

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream @ upstream.new_empty(upstream.shape[-1], ctx.columns), None, None


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit weights out of the layout that bitsandbytes gives them on some CPUs, whose product has no gradient."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
