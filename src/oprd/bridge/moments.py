"""Second moments of aligned hidden states, and random features of the teacher's: all that the closed-form fit needs."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Features:
    """h -> [h, relu(W (h - mean) / scale + b)]: random ReLU features of the teacher's states beside the states.

    They make the fitted map piecewise linear and leave the fit in closed form. With K = 0 features the map is linear.
    """

    mean: Float[Tensor, " T"]
    scale: Float[Tensor, " T"]
    weight: Float[Tensor, "K T"]
    bias: Float[Tensor, " K"]

    @classmethod
    def random(cls, states: Float[Tensor, "N T"], count: int, *, seed: int) -> Self:
        """`count` features, W and b drawn by `seed`; mean and scale are of `states`, scale 1 where they do not vary."""
        generator, width = torch.Generator().manual_seed(seed), states.shape[1]
        weight = torch.randn(count, width, generator=generator) * width**-0.5
        bias = torch.randn(count, generator=generator) / 2
        deviation, mean = torch.std_mean(states.float(), 0)
        scale = torch.where(deviation > 1e-6, deviation, 1.0)
        return cls(mean=mean, scale=scale, weight=weight.to(mean), bias=bias.to(mean))

    def __call__(self, states: Float[Tensor, "N T"]) -> Float[Tensor, "N F"]:
        """States and features side by side, F = T + K, in float32."""
        states = states.float()
        return torch.cat([states, torch.relu((states - self.mean) / self.scale @ self.weight.T + self.bias)], dim=-1)


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, sums and sums of outer products of aligned rows, in float64.

    Their cancellation costs log10(mean^2 / variance) of float64's 16 digits: ten are left even for states whose mean is a
    thousand times their spread.
    """

    count: Float[Tensor, ""]
    student: Float[Tensor, " S"]
    teacher: Float[Tensor, " T"]
    student_student: Float[Tensor, "S S"]
    student_teacher: Float[Tensor, "S T"]
    teacher_teacher: Float[Tensor, "T T"]

    @classmethod
    def zeros(cls, s: int, t: int, device: torch.device | str = "cpu") -> Self:
        """Moments of no rows of widths `s` (student) and `t` (teacher). Apple's GPUs have no float64: theirs are on the CPU."""
        device = "cpu" if torch.device(device).type == "mps" else device
        shapes = ((), (s,), (t,), (s, s), (s, t), (t, t))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @torch.no_grad()
    def add(self, student: Float[Tensor, "N S"], teacher: Float[Tensor, "N T"]) -> None:
        """Add rows in place."""
        s, t = (rows.to(self.count.device).to(self.count.dtype) for rows in (student, teacher))
        self.count.add_(len(s))
        self.student.add_(s.sum(0))
        self.teacher.add_(t.sum(0))
        self.student_student.addmm_(s.T, s)
        self.student_teacher.addmm_(s.T, t)
        self.teacher_teacher.addmm_(t.T, t)

    @property
    def student_mean(self) -> Float[Tensor, " S"]:
        return self.student / self.count

    @property
    def teacher_mean(self) -> Float[Tensor, " T"]:
        return self.teacher / self.count

    @property
    def covariances(self) -> tuple[Float[Tensor, "S S"], Float[Tensor, "S T"], Float[Tensor, "T T"]]:
        """C_SS, C_ST and C_TT, divided by the count."""
        s, t = self.student_mean, self.teacher_mean
        pairs = (self.student_student, s, s), (self.student_teacher, s, t), (self.teacher_teacher, t, t)
        c_ss, c_st, c_tt = (products / self.count - torch.outer(a, b) for products, a, b in pairs)
        return c_ss, c_st, c_tt
