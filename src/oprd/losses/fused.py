# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportUnknownParameterType=false, reportMissingParameterType=false, reportIncompatibleMethodOverride=false, reportUntypedFunctionDecorator=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
"""The exact divergences of `divergences.py` as one Triton kernel: values and gradients of rows of logits in two or three reads.

Triton comes with torch's CUDA builds. Equal to the definitions in Triton's interpreter; not yet run on a GPU.
"""

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from jaxtyping import Float
from torch import Tensor

BLOCK = 4096
"""Logits of a row that are read at once."""


def divergence(
    student: Float[Tensor, "C V"], teacher: Float[Tensor, "C V"], teacher_share: float
) -> Float[Tensor, " C"]:
    """b KL(q || m) + (1-b) KL(p || m) of each row, m = b q + (1-b) p, b = `teacher_share` strictly between 0 and 1: `jsd`.
    b = 0 is forward KL, KL(q || p), and b = 1 reverse KL, KL(p || q). Gradient flows to the student."""
    return _Divergence.apply(student, teacher.detach(), teacher_share)  # type: ignore[no-any-return]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, teacher_share: float) -> Tensor:
        student, teacher = student.contiguous(), teacher.contiguous()
        values, gradient = student.new_empty(len(student)), torch.empty_like(student)
        if len(student):
            _rows[(len(student),)](
                student, teacher, values, gradient, student.shape[1], SHARE=teacher_share, BLOCK=BLOCK
            )
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None], None, None


@triton.jit
def _rows(student, teacher, values, gradient, size, SHARE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row: first both normalisers, then the divergence, then its gradient."""
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row, g_row = student + row * size, teacher + row * size, gradient + row * size
    # running maximum, sum of exponentials, and means of student - teacher under both distributions
    s_max, t_max = -float("inf"), -float("inf")
    s_sum, t_sum, s_gap, t_gap = 0.0, 0.0, 0.0, 0.0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = tl.load(s_row + at, mask=at < size, other=-1e30)
        t = tl.load(t_row + at, mask=at < size, other=-1e30)
        s_new, t_new = tl.maximum(s_max, tl.max(s, 0)), tl.maximum(t_max, tl.max(t, 0))
        s_old, t_old = tl.exp(s_max - s_new), tl.exp(t_max - t_new)
        s_exp, t_exp = tl.exp(s - s_new), tl.exp(t - t_new)
        s_sum, t_sum = s_sum * s_old + tl.sum(s_exp, 0), t_sum * t_old + tl.sum(t_exp, 0)
        s_gap, t_gap = s_gap * s_old + tl.sum(s_exp * (s - t), 0), t_gap * t_old + tl.sum(t_exp * (s - t), 0)
        s_max, t_max = s_new, t_new
    s_norm, t_norm = s_max + tl.log(s_sum), t_max + tl.log(t_sum)
    own = s_gap / s_sum - s_norm + t_norm  # KL(p || q), or KL(p || m) below
    value = own
    if SHARE == 0.0:
        value = s_norm - t_norm - t_gap / t_sum  # KL(q || p)
    elif SHARE < 1.0:
        own, other = 0.0, 0.0
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            log_p = tl.load(s_row + at, mask=at < size, other=0.0) - s_norm
            log_q = tl.load(t_row + at, mask=at < size, other=0.0) - t_norm
            p, q = tl.exp(log_p), tl.exp(log_q)
            most = tl.maximum(log_p, log_q)
            log_m = most + tl.log(SHARE * tl.exp(log_q - most) + (1 - SHARE) * tl.exp(log_p - most))
            own += tl.sum(tl.where(at < size, p * (log_p - log_m), 0.0), 0)
            other += tl.sum(tl.where(at < size, q * (log_q - log_m), 0.0), 0)
        value = SHARE * other + (1 - SHARE) * own
    tl.store(values + row, value)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        log_p = tl.load(s_row + at, mask=at < size, other=0.0) - s_norm
        log_q = tl.load(t_row + at, mask=at < size, other=0.0) - t_norm
        p = tl.exp(log_p)
        if SHARE == 0.0:
            slope = p - tl.exp(log_q)
        elif SHARE == 1.0:
            slope = p * (log_p - log_q - own)
        else:
            most = tl.maximum(log_p, log_q)
            log_m = most + tl.log(SHARE * tl.exp(log_q - most) + (1 - SHARE) * tl.exp(log_p - most))
            slope = (1 - SHARE) * p * (log_p - log_m - own)
        tl.store(g_row + at, slope, mask=at < size)
