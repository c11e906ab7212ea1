# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""Losses over the vocabulary without ever holding a [N, V] tensor: LM heads are applied chunk by chunk."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.losses.divergences import token_logprobs
from oprd.types import LMHead

RowFunction = Callable[..., Tensor]
"""(student logits [C, V], teacher logits [C, V] or None, *row arguments [C]) -> one value per row [C]."""

CHUNK_ELEMENTS = 2**23
"""Logits held at once per model: 32 MiB in float32; the loss's own temporaries are a handful of that."""


def chunk_rows(vocabulary: int) -> int:
    """Rows whose logits are held at once."""
    return max(16, CHUNK_ELEMENTS // vocabulary)


def logits(hidden: Float[Tensor, "C D"], head: LMHead) -> Float[Tensor, "C V"]:
    """Logits in float32 (float64 for float64 input), whatever precision the model computes in: logits rounded to bfloat16
    change gradients by several per cent."""
    return one_stop(finish(raw_scores(hidden, head), head), head)


def raw_scores(hidden: Float[Tensor, "C D"], head: LMHead) -> Float[Tensor, "C V"]:
    """Output of the LM head before scale and softcap."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        out = hidden.to(dtype) @ head.weight.to(hidden.device, dtype).T
        return out if head.bias is None else out + head.bias.to(out)


def _beside(head: LMHead, hidden: Tensor) -> LMHead:
    """The head where the states are, in the precision of logits, detached: cast and moved once, not for every chunk."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weight, bias = (None if x is None else x.detach().to(hidden.device, dtype) for x in (head.weight, head.bias))
    assert weight is not None
    return replace(head, weight=weight, bias=bias)


def finish(scores: Float[Tensor, "C V"], head: LMHead) -> Float[Tensor, "C V"]:
    """Scale and softcap."""
    scores = scores * head.scale if head.scale != 1.0 else scores
    return scores if head.softcap is None else head.softcap * torch.tanh(scores / head.softcap)


def one_stop(logits: Float[Tensor, "C V"], head: LMHead) -> Float[Tensor, "C V"]:
    """Logits in which every one of the head's stop ids has the mean of their probabilities."""
    if not head.stops:
        return logits
    stops = torch.tensor(head.stops, device=logits.device)
    share = logits[:, stops].logsumexp(-1, keepdim=True) - math.log(len(head.stops))
    return logits.index_copy(1, stops, share.expand(-1, len(head.stops)))


def chunked(
    row_function: RowFunction,
    hidden: Float[Tensor, "N D"],
    head: LMHead,
    *row_arguments: Tensor,
    teacher_hidden: Float[Tensor, "N D2"] | None = None,
    teacher_head: LMHead | None = None,
) -> Float[Tensor, " N"]:
    """`row_function` of each row's logits; each row argument [N, ...] is handed on in the same chunks.

    Heads of different sizes share their first rows (padded vocabularies of equal content). Gradient flows to `hidden`
    and to the student head's weight and bias where they require it.
    """
    if teacher_hidden is not None and teacher_head is not None:
        size = min(len(head.weight), len(teacher_head.weight))
        head, teacher_head = (h if len(h.weight) == size else h.first_rows(size) for h in (head, teacher_head))
        teacher_hidden, teacher_head = teacher_hidden.detach().to(hidden.device), _beside(teacher_head, hidden)
    call = _Call(row_function, _beside(head, hidden), teacher_hidden, teacher_head, row_arguments)
    if not torch.is_grad_enabled():
        return call.sweep(hidden, None, (False, False, False))[0]
    return _Chunked.apply(hidden, head.weight, head.bias, call)  # type: ignore[no-any-return]


@torch.no_grad()
def logprobs_of(hidden: Float[Tensor, "N D"], head: LMHead, ids: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Log-probability of the given token at each position, in nats. No gradient."""
    return chunked(lambda p, _, ids: token_logprobs(p, ids), hidden, head, ids)


@torch.no_grad()
def statistics(row_function: RowFunction, hidden: Float[Tensor, "N D"], head: LMHead, *row_arguments: Tensor) -> Tensor:
    """`row_function` of the logits where it gives several numbers per row [C, K]: [N, K]. No gradient."""
    size, head = chunk_rows(len(head.weight)), _beside(head, hidden)
    chunks = zip(*(rows.split(size) for rows in (hidden, *row_arguments)), strict=True)
    return torch.cat([row_function(logits(h, head), None, *arguments) for h, *arguments in chunks])


@dataclass(frozen=True, slots=True)
class _Call:
    """One sweep's arguments that never get gradient."""

    row_function: RowFunction
    head: LMHead
    """In the precision of logits, in which its gradients are summed over chunks as well."""
    teacher_hidden: Tensor | None
    teacher_head: LMHead | None
    row_arguments: tuple[Tensor, ...]

    def sweep(
        self, hidden: Tensor, upstream: Tensor | None, wanted: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Values, and the wanted gradients of (hidden, weight, bias) given `upstream` [N], ones if None."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self._sweep(hidden, upstream, wanted)

    def _sweep(
        self, hidden: Tensor, upstream: Tensor | None, wanted: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        head = self.head
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        values = hidden.new_empty(len(hidden), dtype=dtype)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if wanted[0] else None
        grad_weight = torch.zeros_like(head.weight) if wanted[1] else None
        grad_bias = torch.zeros_like(head.bias) if wanted[2] and head.bias is not None else None
        step = chunk_rows(len(head.weight))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            h = hidden[rows].detach().to(dtype)
            value, student_logits = self.values(h, rows, any(wanted))
            values[rows] = value.detach()
            if not any(wanted):
                continue
            weights = torch.ones_like(value) if upstream is None else upstream[rows].to(dtype)
            (grad,) = torch.autograd.grad(value, student_logits, weights)
            if head.softcap is not None:
                grad = grad * (1 - (student_logits.detach() / head.softcap).square())
            grad = grad * head.scale if head.scale != 1.0 else grad  # of the raw scores, before scale and softcap
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ head.weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, h)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return values, grad_hidden, grad_weight, grad_bias

    def values(self, h: Tensor, rows: slice, with_grad: bool) -> tuple[Tensor, Tensor]:
        """(values [C], student logits [C, V], a leaf with gradient if asked for)."""
        teacher_logits = None
        if self.teacher_hidden is not None and self.teacher_head is not None:
            teacher_logits = logits(self.teacher_hidden[rows], self.teacher_head)
        student_logits = finish(raw_scores(h, self.head), self.head).detach()
        with torch.set_grad_enabled(with_grad):
            student_logits.requires_grad_(with_grad)
            arguments = [argument[rows] for argument in self.row_arguments]
            return self.row_function(one_stop(student_logits, self.head), teacher_logits, *arguments), student_logits


class _Chunked(torch.autograd.Function):
    """The gradient is taken chunk by chunk during the forward pass, for an incoming gradient of one per row.

    Values are per row, so backward only has to scale: row by row for the hidden states, and as a whole for the head, if
    every row has the same weight in the total (the token mean). Otherwise it sweeps once more.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        ctx.call, ctx.wanted = call, ctx.needs_input_grad[:3]
        with torch.no_grad():
            values, *grads = call.sweep(hidden, None, ctx.wanted)
        ctx.save_for_backward(hidden, weight, bias, *grads)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, _, _, grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = upstream[0] if len(upstream) else upstream.sum()
        if grad_weight is not None and not torch.all(upstream == scale):
            with torch.no_grad():
                _, grad_hidden, grad_weight, grad_bias = ctx.call.sweep(hidden, upstream, ctx.wanted)
            return grad_hidden, grad_weight, grad_bias, None
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * upstream[:, None]).to(hidden.dtype)
        grad_weight = None if grad_weight is None else grad_weight * scale
        grad_bias = None if grad_bias is None else grad_bias * scale
        return grad_hidden, grad_weight, grad_bias, None
