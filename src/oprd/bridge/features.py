"""Features of the teacher's states beside the states themselves: what no linear map can say of them [ours].

A next token is a class, and least squares from one model's code for classes to another's is known to hide classes behind
each other. Random ReLU features of the standardised state (an extreme learning machine) take the fit from linear to
piecewise linear and leave it in closed form: second moments of longer rows are all that it needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(kw_only=True)
class Features:
    """h -> [h, relu(W (h - mean) / scale + b)]. Of K = 0 features only h is left."""

    mean: Float[Tensor, " T"]
    scale: Float[Tensor, " T"]
    weight: Float[Tensor, "K T"]
    bias: Float[Tensor, " K"]

    @classmethod
    def random(cls, width: int, count: int, *, seed: int, device: torch.device | str = "cpu") -> Self:
        """W and b drawn by `seed`; mean and scale are for `standardise` to set."""
        generator = torch.Generator().manual_seed(seed)
        return cls(
            mean=torch.zeros(width, device=device),
            scale=torch.ones(width, device=device),
            weight=(torch.randn(count, width, generator=generator) * width**-0.5).to(device),
            bias=(torch.randn(count, generator=generator) / 2).to(device),
        )

    def standardise(self, states: Float[Tensor, "N T"]) -> None:
        """Take mean and scale from some of the teacher's states. A dimension that does not vary keeps its scale."""
        deviation, self.mean = torch.std_mean(states.float(), 0)
        self.scale = torch.where(deviation > 1e-6, deviation, 1.0)

    def __call__(self, states: Float[Tensor, "N T"]) -> Float[Tensor, "N F"]:
        """The states with their features behind them, in float32."""
        states = states.float()
        return torch.cat([states, torch.relu((states - self.mean) / self.scale @ self.weight.T + self.bias)], dim=-1)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((field.name, getattr(self, field.name)) for field in fields(self))
