"""Tokens that were sampled by the student of some updates ago, and what that changes for a loss that samples."""

from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from oprd.kernels.chunked import sampled_logprobs
from oprd.kernels.reference import importance_weights
from oprd.types import Reading, States, Tally

IMPORTANCE_CLIP = 2.0


@final
class ImportanceWeights:
    """p / p_then of each token that was sampled, cut at `clip`; counts how many were cut for `train/NAME/clipped/share`."""

    def __init__(self, name: str, clip: float | None = None) -> None:
        self._name = name
        self._clip = clip or IMPORTANCE_CLIP
        self._seen: list[Tensor] = []

    def of(
        self, student: States, reading: Reading, *, used: Bool[Tensor, " N"] | None = None
    ) -> Float[Tensor, " N"] | None:
        """Without gradient; None where the rollouts are fresh. `reading` predicts the supervised tokens; those that the
        weights are `used` for are counted, all unless given."""
        then = student.batch.rollout_logprobs(reading.tokens)
        if then is None:
            return None
        assert student.head is not None
        now = sampled_logprobs(student.hidden[reading], student.head, student.batch.sampled_ids(reading.tokens))
        weights = importance_weights(now, then, self._clip)
        self._seen.append(weights if used is None else weights[used])
        return weights

    def tallies(self) -> tuple[Tally, ...]:
        """Of all weights since it was last asked; none with fresh rollouts."""
        if not self._seen:
            return ()
        weights, self._seen = torch.cat(self._seen), []
        cut = int((weights >= self._clip).sum())
        return (Tally(name=f"train/{self._name}/clipped/share", total=float(cut), of=float(len(weights))),)
