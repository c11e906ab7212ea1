"""Every estimator of a divergence as a function of rows: (student logits [C, V], teacher logits [C, V], ids [C]) -> [C]."""

from collections.abc import Callable

from torch import Tensor

from oprd.losses.divergences import (
    forward_kl,
    jsd,
    on_top_k,
    reverse_kl,
    sampled_forward_kl,
    sampled_jsd,
    sampled_reverse_kl,
    token_logprobs,
)

Rows = Callable[[Tensor, Tensor, Tensor], Tensor]

EXACT = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": lambda p, q: jsd(p, q, 0.3)}
SAMPLED = {
    "reverse_kl": sampled_reverse_kl,
    "forward_kl": sampled_forward_kl,
    "jsd": lambda log_p, log_q: sampled_jsd(log_p, log_q, 0.3),
}


def exact(name: str, temperature: float = 1.0) -> Rows:
    return lambda p, q, ids: EXACT[name](p / temperature, q / temperature)


def top_k(name: str, support: str, k: int = 4) -> Rows:
    return lambda p, q, ids: EXACT[name](*on_top_k(p, q, k, support))


def sampled(name: str) -> Rows:
    return lambda p, q, ids: SAMPLED[name](token_logprobs(p, ids), token_logprobs(q, ids))


ESTIMATORS: dict[str, Rows] = {
    f"{name}-{kind}": make(name)
    for name in EXACT
    for kind, make in {
        "exact": exact,
        "exact_hot": lambda name: exact(name, 2.0),
        "top_k_student": lambda name: top_k(name, "student"),
        "top_k_teacher": lambda name: top_k(name, "teacher"),
        "top_k_overlap": lambda name: top_k(name, "overlap"),
        "sampled": sampled,
    }.items()
}
