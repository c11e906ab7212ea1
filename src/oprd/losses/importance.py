# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""Importance weights of tokens that were sampled under earlier weights."""

from jaxtyping import Float
from torch import Tensor

from oprd.losses.chunked import logprobs_of
from oprd.losses.divergences import importance_weights
from oprd.types import HiddenSpec, HiddenStates

IMPORTANCE_CLIP = 2.0
"""Largest weight. Ours."""


def off_policy_weights(student: HiddenStates, spec: HiddenSpec) -> Float[Tensor, " N"] | None:
    """p / p_sampling of each token that `spec` predicts, cut at IMPORTANCE_CLIP; no gradient. None for on-policy rollouts."""
    if student.batch.sampling_logprobs is None:
        return None
    assert student.head is not None
    then = student.batch.ragged(student.batch.sampling_logprobs, spec.tokens)
    now = logprobs_of(student.hidden[spec], student.head, student.batch.sampled_ids(spec.tokens))
    return importance_weights(now, then, IMPORTANCE_CLIP)
