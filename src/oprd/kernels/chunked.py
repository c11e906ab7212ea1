"""Losses over the vocabulary without ever holding a [N, V] tensor: both LM heads are applied chunk by chunk."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.kernels.reference import token_logprobs
from oprd.types import LMHead

Divergence = Callable[[Float[Tensor, "C V"], Any, Int[Tensor, " C"]], Float[Tensor, " C"]]
"""(student logits, teacher logits or None, sampled ids) -> one value per row."""

CHUNK_ELEMENTS = 2**23
"""Logits held at once per model: 32 MiB in float32; the loss's own temporaries are a handful of that."""


REACH, HALVINGS = 0.25, 12
"""How far `sharpen` goes at most, as a share of the state's norm, and how finely it looks [ours]."""


def chunk_rows(vocabulary: int) -> int:
    """Rows whose logits are held at once."""
    return max(16, CHUNK_ELEMENTS // vocabulary)


def logits(hidden: Float[Tensor, "C D"], head: LMHead) -> Float[Tensor, "C V"]:
    """Logits in float32 (float64 for float64 input), however the model computes: rounding them to bfloat16 first
    changes gradients by several per cent (LESSONS: Liger 1432)."""
    return _finish(_scores(hidden, head), head)


def head_divergence(
    student_hidden: Float[Tensor, "N D"],
    student_head: LMHead,
    teacher_hidden: Float[Tensor, "N D2"] | None,
    teacher_head: LMHead | None,
    sampled_ids: Int[Tensor, " N"],
    divergence: Divergence,
) -> Float[Tensor, " N"]:
    """`divergence` of each token between the two models' next-token distributions.

    Without a teacher's states it gets None for the teacher's logits. `sampled_ids` is handed on row by row: a divergence
    that needs more of each token than its id takes the tokens' numbers 0..N-1 there, and looks the rest up.
    Heads of different sizes share their first rows (padded vocabularies of equal content).
    Gradient flows to `student_hidden` and to the student head's weight and bias where they require it.
    """
    if teacher_hidden is not None and teacher_head is not None:
        vocabulary = min(len(student_head.weight), len(teacher_head.weight))
        student_head, teacher_head = student_head.cut(vocabulary), teacher_head.cut(vocabulary)
        teacher_hidden = teacher_hidden.detach()
    return _HeadDivergence.apply(  # type: ignore[no-any-return]
        student_hidden, student_head.weight, student_head.bias,
        student_head, teacher_hidden, teacher_head, sampled_ids, divergence,
    )  # fmt: skip


@torch.no_grad()
def sampled_logprobs(hidden: Float[Tensor, "N D"], head: LMHead, sampled_ids: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Log-probability of each sampled token, in nats. No gradient."""
    step = chunk_rows(len(head.weight))
    parts = [
        token_logprobs(logits(hidden[at : at + step], head), sampled_ids[at : at + step])
        for at in range(0, len(hidden), step)
    ]
    return torch.cat(parts) if parts else hidden.new_empty(0)


@torch.no_grad()
def confidence(hidden: Float[Tensor, "N D"], head: LMHead) -> Float[Tensor, " N"]:
    """Probability of the likeliest token at each position. No gradient."""
    return torch.cat([logits(rows, head).softmax(-1).amax(-1) for rows in hidden.split(chunk_rows(len(head.weight)))])


@torch.no_grad()
def sharpen(
    hidden: Float[Tensor, "N D"], head: LMHead, least: Float[Tensor, " N"], patterns: Float[Tensor, "R D"]
) -> Float[Tensor, "N D"]:
    """The states moved on until `head` gives its likeliest token at least the probability `least`, at most by REACH of
    their norm. No gradient.

    Each moves on a line: along the gradient of that log-probability as far as it lies in `patterns`, the ways in which
    such states move. Where a state is sure enough it stays.
    """
    moved = hidden.float().clone()
    for rows in torch.arange(len(hidden), device=hidden.device).split(chunk_rows(len(head.weight))):
        scores = _scores(moved[rows], head)
        p = _finish(scores, head).softmax(-1)
        unsure = p.amax(-1) < least[rows]
        rows, scores, p = rows[unsure], scores[unsure], p[unsure]
        h, weight, likeliest = moved[rows], head.weight.to(moved), p.argmax(-1, keepdim=True)
        direction = (weight[likeliest[:, 0]] - p @ weight) @ patterns.T @ patterns
        direction *= h.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        slope = _scores(direction, replace(head, bias=None))
        near, far = h.new_zeros(len(h), 1), h.new_full((len(h), 1), REACH)
        for _ in range(HALVINGS):
            middle = (near + far) / 2
            sure = _finish(scores + middle * slope, head).softmax(-1).gather(-1, likeliest) >= least[rows, None]
            near, far = torch.where(sure, near, middle), torch.where(sure, middle, far)
        moved[rows] = h + far * direction
    return moved


def head_logprobs(hidden: Float[Tensor, "N D"], head: LMHead, ids: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Log-probability of the given token at each position, in nats. Gradient as in `head_divergence`."""
    nobody = LMHead(weight=hidden.new_zeros(len(head.weight), 1))

    def of_student(logits: Tensor, _: Tensor, ids: Tensor) -> Tensor:
        return token_logprobs(logits, ids)

    return head_divergence(hidden, head, hidden.new_zeros(len(hidden), 1), nobody, ids, of_student)


class _HeadDivergence(torch.autograd.Function):
    """The gradient is taken chunk by chunk during the forward pass, for an incoming gradient of one per token.

    Values are per token, so that gradient only has to be scaled afterwards: row by row for the hidden states, and as a
    whole for the head, when every token has the same weight in the total (the token mean). Otherwise one more pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, teacher_hidden, teacher_head, ids, divergence):
        ctx.head, ctx.teacher_head, ctx.divergence = head, teacher_head, divergence
        ctx.wanted = ctx.needs_input_grad[:3]
        values, *grads = _sweep(hidden, head, teacher_hidden, teacher_head, ids, divergence, None, ctx.wanted)
        ctx.save_for_backward(hidden, teacher_hidden, ids, weight, bias, *grads)
        return values

    @staticmethod
    def backward(ctx, upstream):
        hidden, teacher_hidden, ids, _, _, grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = upstream[0] if len(upstream) else upstream.sum()
        if grad_weight is not None and not torch.all(upstream == scale):
            _, grad_hidden, grad_weight, grad_bias = _sweep(
                hidden, ctx.head, teacher_hidden, ctx.teacher_head, ids, ctx.divergence, upstream, ctx.wanted
            )
            return grad_hidden, grad_weight, grad_bias, *[None] * 5
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * upstream[:, None]).to(hidden.dtype)
        grad_weight = None if grad_weight is None else grad_weight * scale
        grad_bias = None if grad_bias is None else grad_bias * scale
        return grad_hidden, grad_weight, grad_bias, *[None] * 5


def _sweep(
    hidden: Float[Tensor, "N D"],
    head: LMHead,
    teacher_hidden: Float[Tensor, "N D2"] | None,
    teacher_head: LMHead | None,
    ids: Int[Tensor, " N"],
    divergence: Divergence,
    upstream: Float[Tensor, " N"] | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Values, and the gradients asked for of (hidden, weight, bias) given `upstream` (one per token if None)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    values = hidden.new_empty(len(hidden), dtype=dtype)
    grad_hidden = torch.empty_like(hidden, dtype=dtype) if wanted[0] else None
    grad_weight = torch.zeros_like(head.weight) if wanted[1] else None
    grad_bias = torch.zeros_like(head.bias) if wanted[2] and head.bias is not None else None
    step = chunk_rows(len(head.weight))
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        h = hidden[rows].to(dtype)
        teacher_logits = None
        if teacher_hidden is not None and teacher_head is not None:
            teacher_logits = logits(teacher_hidden[rows].to(h.device), teacher_head)
        with torch.enable_grad():
            student_logits = logits(h.detach(), head).detach().requires_grad_(any(wanted))
            value = divergence(student_logits, teacher_logits, ids[rows])
        values[rows] = value.detach()
        if not any(wanted):
            continue
        weights = torch.ones_like(value) if upstream is None else upstream[rows].to(dtype)
        (grad,) = torch.autograd.grad(value, student_logits, weights)
        grad = _through_logits(grad, student_logits, head)
        if grad_hidden is not None:
            grad_hidden[rows] = grad @ head.weight.to(dtype)
        if grad_weight is not None:
            grad_weight.addmm_(grad.T.to(grad_weight.dtype), h.to(grad_weight.dtype))
        if grad_bias is not None:
            grad_bias += grad.sum(0)
    return values, grad_hidden, grad_weight, grad_bias


def _scores(hidden: Float[Tensor, "C D"], head: LMHead) -> Float[Tensor, "C V"]:
    """What the head makes of the states before scale and softcap."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        out = hidden.to(dtype) @ head.weight.to(hidden.device, dtype).T
        return out if head.bias is None else out + head.bias.to(out)


def _finish(scores: Float[Tensor, "C V"], head: LMHead) -> Float[Tensor, "C V"]:
    scores = scores * head.scale if head.scale != 1.0 else scores
    return scores if head.softcap is None else head.softcap * torch.tanh(scores / head.softcap)


def _through_logits(grad: Tensor, student_logits: Tensor, head: LMHead) -> Tensor:
    """From d/d logits to d/d (weight @ hidden + bias): undo softcap and scale."""
    if head.softcap is not None:
        grad = grad * (1 - (student_logits.detach() / head.softcap).square())
    return grad * head.scale if head.scale != 1.0 else grad
