# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""Every loss as its formula: the definition that faster code is tested against.

Rows in, one value per row out, in nats. Gradient flows to the student only. p = student, q = teacher.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize


def hidden_mse(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """(1/D) ||h_student - h_teacher||^2 of each token, in squared units of the hidden state. OPRD, arXiv 2606.06021."""
    return (student.float() - teacher.detach().float()).square().mean(-1)


def normalized_hidden_mse(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """`hidden_mse` after each state is divided by its Euclidean norm; at most 4/D. OPRD's `l2` [code]."""
    return (normalize(student.float(), dim=-1) - normalize(teacher.detach().float(), dim=-1)).square().mean(-1)


def reverse_kl(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(p || q) of each token from logits, exact over the last dimension. GKD, arXiv 2306.13649."""
    log_p, log_q = _log_softmax(student), _log_softmax(teacher.detach())
    return _expect(log_p.exp(), log_p - log_q)


def forward_kl(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(q || p) of each token from logits, exact over the last dimension. GKD, arXiv 2306.13649."""
    log_p, log_q = _log_softmax(student), _log_softmax(teacher.detach())
    return _expect(log_q.exp(), log_q - log_p)


def jsd(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], weight: float) -> Float[Tensor, " N"]:
    """b KL(q || m) + (1-b) KL(p || m) with m = b q + (1-b) p and b = `weight`. GKD, arXiv 2306.13649, Eq. 1."""
    log_p, log_q = _log_softmax(student), _log_softmax(teacher.detach())
    log_m = _log_mixture(log_p, log_q, weight)
    return weight * _expect(log_q.exp(), log_q - log_m) + (1 - weight) * _expect(log_p.exp(), log_p - log_m)


def sampled_reverse_kl(log_p: Float[Tensor, " N"], log_q: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Unbiased estimate of KL(p || q) from one token sampled from p, given its two log-probabilities.

    Its gradient, -(log q - log p) grad log p, is an unbiased estimate of the gradient of KL(p || q) [second-hand].
    """
    log_q = log_q.detach()
    ratio = (log_p - log_q).detach()
    return _with_score(value=ratio, slope=ratio, log_p=log_p)


def sampled_forward_kl(log_p: Float[Tensor, " N"], log_q: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Unbiased estimate of KL(q || p), and of its gradient, from one token sampled from p [ours].

    The token is weighted by q/p, so the variance grows where the student rarely writes what the teacher likes.
    """
    ratio = (log_q.detach() - log_p).detach()
    return _with_score(value=ratio.exp() * ratio, slope=-ratio.exp(), log_p=log_p)


def sampled_jsd(log_p: Float[Tensor, " N"], log_q: Float[Tensor, " N"], weight: float) -> Float[Tensor, " N"]:
    """Unbiased estimate of `jsd`, and of its gradient, from one token sampled from p [ours].

    d jsd / d p(y) = (1-b) log(p/m): the derivative of m cancels against the first term.
    """
    p, q = log_p.detach(), log_q.detach()
    m = _log_mixture(p, q, weight)
    slope = (1 - weight) * (p - m)
    return _with_score(value=weight * (q - p).exp() * (q - m) + slope, slope=slope, log_p=log_p)


def importance_weights(log_p: Float[Tensor, " N"], log_p_then: Float[Tensor, " N"], clip: float) -> Float[Tensor, " N"]:
    """min(p / p_then, clip) of tokens sampled from p_then; no gradient.

    Unclipped, they turn a mean over tokens of p_then into an unbiased one over tokens of p at the same prefix. The clip
    keeps a few tokens from dominating the step, at the price of a bias towards p_then [ours].
    """
    return (log_p.detach() - log_p_then).exp().clamp(max=clip)


def token_logprobs(logits: Float[Tensor, "N V"], ids: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Log-probability of the given token in each row, in nats."""
    return _log_softmax(logits).gather(-1, ids[:, None]).squeeze(-1)


def entropy(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Entropy of each row's distribution, in nats."""
    log_p = _log_softmax(logits)
    return -_expect(log_p.exp(), log_p)


def draw(logits: Float[Tensor, "N V"], uniform: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """One token of each row's distribution: the first whose cumulative probability exceeds `uniform`, from [0, 1)."""
    below = _log_softmax(logits.detach()).exp().cumsum(-1)
    drawn = torch.searchsorted(below, uniform[:, None] * below[:, -1:], right=True).squeeze(-1)
    return drawn.clamp(max=logits.shape[-1] - 1)


def on_top_k(
    student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], k: int, support: str
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Both models' logits on a support of k tokens, so that a softmax over them renormalises both on it.

    `student`, `teacher`: that model's k largest logits. `overlap`: the student's k that are also among the teacher's;
    a row without any has no distribution and becomes all zeros for both, which is no loss.
    """
    ids = (teacher if support == "teacher" else student).detach().topk(k, dim=-1).indices
    on_support = student.gather(-1, ids), teacher.gather(-1, ids)
    return on_support if support != "overlap" else where_shared(*on_support, shared(ids, teacher.topk(k).indices))


def where_shared(
    student: Float[Tensor, "N K"], teacher: Float[Tensor, "N K"], both: Bool[Tensor, "N K"]
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Both models' logits, without a probability where not `both`; all zeros in a row that has no such place."""
    # finite, because minus infinity gives NaN gradients where both models have it
    fill = torch.where(both.any(-1, keepdim=True), -1e30, 0.0)
    return torch.where(both, student, fill), torch.where(both, teacher, fill)


def shared(ids: Int[Tensor, "N K"], others: Int[Tensor, "N K"]) -> Bool[Tensor, "N K"]:
    """True at each of `ids` that is also in the same row of `others`."""
    return (ids[:, :, None] == others[:, None, :]).any(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    # float64 stays float64, so that the reference can be checked by finite differences
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _expect(probability: Tensor, value: Tensor) -> Tensor:
    return (probability * value).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    log_b, log_1_b = log_p.new_tensor([weight, 1 - weight]).log()
    return torch.logaddexp(log_q + log_b, log_p + log_1_b)


def _with_score(*, value: Tensor, slope: Tensor, log_p: Tensor) -> Tensor:
    """`value`, with the gradient slope * grad log p. slope = d divergence / d p(y), up to a constant."""
    return value + slope * (log_p - log_p.detach())
