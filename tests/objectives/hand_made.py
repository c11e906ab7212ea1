"""Hidden states and rollouts of two short completions, without a model: what the losses' tests share."""

from typing import Any

import torch
from torch import Tensor

from conftest import MODELS
from oprd.data.batching import collate
from oprd.models.loading import ModelFacts
from oprd.types import ALL_TOKENS, HiddenSpec, HiddenStates, LMHead, Prompt, Rollouts, TokenSelection

V, D = 20, 5
IDS = ((3, 1, 4), (1, 5))
SAMPLED = torch.tensor([3, 1, 4, 1, 5])
N = len(SAMPLED)
ROWS = {
    ALL_TOKENS: [0, 1, 2, 3, 4],
    TokenSelection(keep="last", k=2): [1, 2, 3, 4],
    TokenSelection(keep="first", k=1): [0, 3],
}
"""Which of the five tokens each selection keeps."""


def facts() -> ModelFacts:
    """A student to bind objectives to; its sizes are not looked at."""
    return ModelFacts.read(str(MODELS / "base"))


def rollouts(**annotations: Any) -> Rollouts:
    prompts = (Prompt(row=0, messages=(), token_ids=(0,)), Prompt(row=1, messages=(), token_ids=(0, 2)))
    return Rollouts(prompts=prompts, completion_ids=IDS, finished=(True, True), **annotations)


def states(seed: int, tokens: TokenSelection = ALL_TOKENS, **annotations: Any) -> HiddenStates:
    """Random states where the selected tokens are predicted, and a random LM head, both leaves with gradient."""
    draw = torch.Generator().manual_seed(seed)
    spec = HiddenSpec(block="last", at="predicting", tokens=tokens)
    head = LMHead(weight=torch.randn(V, D, generator=draw).requires_grad_())
    hidden = torch.randn(N, D, generator=draw)[ROWS[tokens]].requires_grad_()
    batch = collate([[0], [0, 2]], IDS, pad_id=0, device=torch.device("cpu"), **annotations)
    return HiddenStates(hidden={spec: hidden}, head=head, batch=batch)


def hidden_of(of: HiddenStates) -> Tensor:
    (hidden,) = of.hidden.values()
    return hidden


def logits_of(of: HiddenStates) -> Tensor:
    assert of.head is not None
    return hidden_of(of) @ of.head.weight.T


def log_softmax_of(of: HiddenStates) -> Tensor:
    return logits_of(of).log_softmax(-1)


def at_ids(log_p: Tensor, ids: Tensor = SAMPLED) -> Tensor:
    return log_p.gather(-1, ids[:, None])[:, 0]


def gradients(value: Tensor, of: HiddenStates) -> tuple[Tensor, ...]:
    """Of the sum over tokens, with respect to the hidden states and the LM head."""
    assert of.head is not None
    return torch.autograd.grad(value.sum(), (hidden_of(of), of.head.weight))
