# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""Logits of a few tokens per row: the products with all other rows of an LM head fall away, forward and backward."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.losses.chunked import finish, statistics
from oprd.types import LMHead

GATHERED_ELEMENTS = 2**22
"""Entries of the head's rows that are gathered at once: 16 MiB in float32."""


def top_ids(hidden: Float[Tensor, "N D"], head: LMHead, k: int) -> Int[Tensor, "N K"]:
    """The k most probable tokens of each row."""
    return statistics(lambda p, _: p.topk(k, dim=-1).indices, hidden, head)


def logits_at(hidden: Float[Tensor, "N D"], head: LMHead, ids: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Logits of the given tokens, in float32 (float64 for float64 input). Gradient flows to the states and the head."""
    stops = torch.tensor(head.stops, dtype=ids.dtype, device=ids.device)
    every = torch.cat([ids, stops.expand(len(ids), -1)], dim=1)
    scores = finish(_ScoresAt.apply(hidden, head.weight, head.bias, every), head)
    if not head.stops:
        return scores
    scores, of_stops = scores.tensor_split([ids.shape[1]], dim=1)
    share = of_stops.logsumexp(-1, keepdim=True) - math.log(len(stops))
    return torch.where(torch.isin(ids, stops), share, scores)


class _ScoresAt(torch.autograd.Function):
    """Output of the head at some tokens. The head's gradient is summed in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, ids)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        scores = hidden.new_empty(ids.shape, dtype=dtype)
        for rows, h, gathered in _gathered(hidden, weight, ids):
            scores[rows] = (gathered @ h[:, :, None])[:, :, 0]
        return scores if bias is None else scores.add_(bias.to(scores)[ids])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids = ctx.saved_tensors
        wanted, dtype = ctx.needs_input_grad, upstream.dtype
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        grad_bias = None
        for rows, h, gathered in _gathered(hidden, weight, ids):
            if grad_hidden is not None:
                grad_hidden[rows] = (upstream[rows, None] @ gathered)[:, 0]
            if grad_weight is not None:
                torch.mul(upstream[rows, :, None], h[:, None], out=gathered)
                grad_weight.index_add_(0, ids[rows].flatten(), gathered.flatten(0, 1))
        if wanted[2] and bias is not None:
            grad_bias = torch.zeros_like(bias, dtype=dtype).index_add_(0, ids.flatten(), upstream.flatten())
        return grad_hidden, grad_weight, grad_bias, None


def _gathered(hidden: Tensor, weight: Tensor, ids: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their states [C, D], the head's rows at their ids [C, K, D]), a chunk at a time, outside autocast."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    step = max(1, GATHERED_ELEMENTS // (ids.shape[1] * hidden.shape[1]))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            gathered = weight[ids[rows].to(weight.device)].to(hidden.device, dtype)
            yield rows, hidden[rows].to(dtype), gathered
