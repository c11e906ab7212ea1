"""Sums over paired hidden states: all that a closed-form fit needs of the rows, however many there were."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(kw_only=True)
class Moments:
    """Count, sums and sums of outer products of paired rows, in float64.

    Plain sums, so that those of processes and of interrupted fits add up. Their cancellation costs log10(mean^2 / variance)
    of float64's 16 digits, which leaves ten even for states whose mean is a thousand times their spread.
    """

    count: Float[Tensor, ""]
    student: Float[Tensor, " S"]
    teacher: Float[Tensor, " T"]
    student_student: Float[Tensor, "S S"]
    student_teacher: Float[Tensor, "S T"]
    teacher_teacher: Float[Tensor, "T T"]

    @classmethod
    def zeros(cls, student_width: int, teacher_width: int, device: torch.device | str = "cpu") -> Self:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            count=zeros(),
            student=zeros(student_width),
            teacher=zeros(teacher_width),
            student_student=zeros(student_width, student_width),
            student_teacher=zeros(student_width, teacher_width),
            teacher_teacher=zeros(teacher_width, teacher_width),
        )

    @torch.no_grad()
    def add(self, student: Float[Tensor, "N S"], teacher: Float[Tensor, "N T"]) -> None:
        """Count the rows in and forget them."""
        s, t = student.to(self.student), teacher.to(self.teacher)
        self.count += len(s)
        self.student += s.sum(0)
        self.teacher += t.sum(0)
        self.student_student.addmm_(s.T, s)
        self.student_teacher.addmm_(s.T, t)
        self.teacher_teacher.addmm_(t.T, t)

    def of_first(self, width: int) -> Self:
        """Those of the first `width` columns of the teacher's rows."""
        return replace(
            self,
            teacher=self.teacher[:width],
            student_teacher=self.student_teacher[:, :width],
            teacher_teacher=self.teacher_teacher[:width, :width],
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every sum by its name: what is saved, and what is added up over processes."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))

    @property
    def student_mean(self) -> Float[Tensor, " S"]:
        return self.student / self.count

    @property
    def teacher_mean(self) -> Float[Tensor, " T"]:
        return self.teacher / self.count

    @property
    def c_ss(self) -> Float[Tensor, "S S"]:
        """Covariance of the student's rows, divided by the count."""
        return self.student_student / self.count - torch.outer(self.student_mean, self.student_mean)

    @property
    def c_st(self) -> Float[Tensor, "S T"]:
        return self.student_teacher / self.count - torch.outer(self.student_mean, self.teacher_mean)

    @property
    def c_tt(self) -> Float[Tensor, "T T"]:
        return self.teacher_teacher / self.count - torch.outer(self.teacher_mean, self.teacher_mean)
