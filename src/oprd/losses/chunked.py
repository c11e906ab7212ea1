# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""Losses over the vocabulary without ever holding a [N, V] tensor: LM heads are applied chunk by chunk."""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.losses.divergences import token_logprobs
from oprd.types import LMHead

RowFunction = Callable[..., Tensor]
"""(student logits [C, V], teacher logits [C, V] or None, *row arguments [C]) -> one value per row [C]."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of the hidden states, the head's weight and its bias; None where not wanted."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose logits are held at once: enough for the products with the head to take what they take on all rows."""
    if device.type != "cuda":
        return max(256, 2**23 // vocabulary)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    rows = free // 8 // (8 * vocabulary)  # float32, two models
    return 2 ** min(max(rows, 64).bit_length() - 1, 11)


def slice_rows(vocabulary: int, device: torch.device) -> int:
    """Rows a row function sees at once: on a CPU few enough for its temporaries to stay in the cache."""
    return max(1, (2**25 if device.type == "cuda" else 2**20) // vocabulary)


def logits(hidden: Float[Tensor, "C D"], head: LMHead) -> Float[Tensor, "C V"]:
    """Logits in float32 (float64 for float64 input), whatever precision the model computes in: logits rounded to bfloat16
    change gradients by several per cent."""
    return _finished(raw_scores(hidden, head), head)


def raw_scores(hidden: Float[Tensor, "C D"], head: LMHead, out: Tensor | None = None) -> Float[Tensor, "C V"]:
    """Output of the LM head before scale and softcap."""
    with torch.autocast(hidden.device.type, enabled=False):
        scores = product(hidden, head.weight.to(hidden.device).T, out)
        return scores if head.bias is None else scores.add_(head.bias.to(scores))


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


def _finished(scores: Float[Tensor, "C V"], head: LMHead) -> Float[Tensor, "C V"]:
    return one_stop(finish(scores, head), head)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, added up in float32 (float64 for float64 factors). A GPU multiplies 16-bit factors as they are, others are cast."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


@contextmanager
def tensor_cores(device: torch.device) -> Generator[None]:
    """Products of float32 factors in TF32 on a GPU, added up in float32; no autocast."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before


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
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        head, teacher_head = same_rows(head, teacher_head)
        teacher_hidden = teacher_hidden.detach().to(hidden.device)
        teacher = teacher_hidden, _beside(teacher_head, teacher_hidden)
    call = _Call(row_function, _beside(head, hidden), teacher, row_arguments)
    if not torch.is_grad_enabled():
        return call.sweep(hidden)[0]
    return _Chunked.apply(hidden, head.weight, head.bias, call)  # type: ignore[no-any-return]


@torch.no_grad()
def statistics(row_function: RowFunction, hidden: Float[Tensor, "N D"], head: LMHead, *row_arguments: Tensor) -> Tensor:
    """`row_function` of the logits, which may give several numbers per row [C, K]: [N, K]. No gradient."""
    return _Call(row_function, _beside(head, hidden), None, row_arguments).sweep(hidden)[0]


def logprobs_of(hidden: Float[Tensor, "N D"], head: LMHead, ids: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Log-probability of the given token at each position, in nats. No gradient."""
    return statistics(lambda p, _, ids: token_logprobs(p, ids), hidden, head, ids)


def same_rows(head: LMHead, other: LMHead) -> tuple[LMHead, LMHead]:
    """Both heads with the rows they share: the first ones, of padded vocabularies of equal content."""
    size = min(len(head.weight), len(other.weight))
    head, other = (h if len(h.weight) == size else h.first_rows(size) for h in (head, other))
    return head, other


def _beside(head: LMHead, hidden: Tensor) -> LMHead:
    """The head where the states are, as `product` takes it, detached: cast and moved once, not for every chunk."""
    as_it_is = hidden.is_cuda and head.weight.dtype == hidden.dtype
    dtype = hidden.dtype if as_it_is else torch.promote_types(hidden.dtype, torch.float32)
    weight, bias = (None if x is None else x.detach().to(hidden.device, dtype) for x in (head.weight, head.bias))
    assert weight is not None
    return replace(head, weight=weight, bias=bias)


def _spans(rows: int, step: int) -> Iterator[slice]:
    """At least one, so that no row at all still gives a result of the right shape."""
    for start in range(0, max(rows, 1), step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True, slots=True)
class _Call:
    """One sweep's arguments that never get gradient."""

    row_function: RowFunction
    head: LMHead
    teacher: tuple[Tensor, LMHead] | None
    row_arguments: tuple[Tensor, ...]

    @torch.no_grad()
    def sweep(
        self, hidden: Tensor, upstream: Tensor | None = None, wanted: Sequence[bool] = (False, False, False)
    ) -> tuple[Tensor, Gradients]:
        """Values, and the wanted gradients of (hidden, weight, bias) given `upstream` [N], ones if None."""
        hidden, weight, bias = hidden.detach(), self.head.weight, self.head.bias
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if wanted[2] and bias is not None else None
        step, values = chunk_rows(len(weight), hidden.device), list[Tensor]()
        models = 1 if self.teacher is None else 2
        buffers = hidden.new_empty(models, min(step, len(hidden)), len(weight), dtype=dtype)
        with tensor_cores(hidden.device):
            for rows in _spans(len(hidden), step):
                h, used = hidden[rows], buffers[:, : rows.stop - rows.start]
                values += self._values(h, used, rows, upstream, any(wanted))
                scores = used[0]
                if grad_hidden is not None:
                    grad_hidden[rows] = product(scores.to(weight.dtype), weight)
                if grad_weight is not None:
                    grad_weight.addmm_(scores.T, h.to(dtype))
                if grad_bias is not None:
                    grad_bias += scores.sum(0)
        return torch.cat(values), (grad_hidden, grad_weight, grad_bias)

    def _values(
        self, h: Tensor, buffers: Tensor, rows: slice, upstream: Tensor | None, with_grad: bool
    ) -> Iterator[Tensor]:
        """Values of a chunk's rows, some rows at a time. `buffers` take both models' raw scores; the student's are then
        overwritten with the gradient if asked for."""
        scores = raw_scores(h, self.head, buffers[0])
        if self.teacher is not None:
            teacher_hidden, teacher_head = self.teacher
            raw_scores(teacher_hidden[rows], teacher_head, buffers[1])
        for part in _spans(len(scores), slice_rows(scores.shape[1], scores.device)):
            teacher = None if self.teacher is None else _finished(buffers[1, part], self.teacher[1])
            student = scores[part].detach()
            arguments = [argument[rows][part] for argument in self.row_arguments]
            with torch.set_grad_enabled(with_grad):
                student.requires_grad_(with_grad)
                value = self.row_function(_finished(student, self.head), teacher, *arguments)
            if with_grad:
                weights = torch.ones_like(value) if upstream is None else upstream[rows][part].to(value)
                (scores[part],) = torch.autograd.grad(value, student, weights)
            yield value.detach()


class _Chunked(torch.autograd.Function):
    """The gradient is taken chunk by chunk during the forward pass, for an incoming gradient of one per row.

    Values are per row, so backward only has to scale: row by row for the hidden states, and as a whole for the head, if
    every row has the same weight in the total (the token mean). Otherwise it sweeps once more.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        ctx.call, ctx.wanted = call, ctx.needs_input_grad[:3]
        values, ctx.gradients = call.sweep(hidden, wanted=ctx.wanted)
        ctx.save_for_backward(hidden, weight, bias)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, _, _ = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: they serve one backward pass
        scale = upstream[0] if len(upstream) else upstream.sum()
        if gradients is None or (any(ctx.wanted[1:]) and not torch.all(upstream == scale)):
            _, gradients = ctx.call.sweep(hidden, upstream, ctx.wanted)
        else:
            for gradient, factor in zip(gradients, (upstream[:, None], scale, scale), strict=True):
                if gradient is not None:
                    gradient.mul_(factor)
        return *gradients, None
