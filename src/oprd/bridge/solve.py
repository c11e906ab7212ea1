"""Linear maps from second moments, in closed form: PCA, ridge regression, canonical directions.

PCA bases are nested and the regression of each direction is independent of the others, so the solution at the largest rank
contains that of every smaller rank in its first rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.bridge.moments import Features, Moments
from oprd.errors import DataError

ROWS_PER_RANK = 2
"""With fewer rows than this for each direction a map cannot be told from chance."""
SLACK = 0.03
"""Of the ridges whose score is within this share of the best, the largest is taken: GCV takes the rows of one completion as
independent and so picks too small a ridge (docs/bridge.md)."""
_RIDGES = torch.logspace(-10, 1, 45, dtype=torch.float64)
"""Ridge strengths to try, in units of the mean eigenvalue."""
_CONSTANT = 1e-12
"""A column whose variance over mean square is below this is constant: its sums have no digits left."""


@dataclass(frozen=True, kw_only=True)
class BlockMap:
    """Linear maps of one pair of blocks into coordinates that student and teacher share."""

    student: Float[Tensor, "R S"]
    student_mean: Float[Tensor, " S"]
    teacher: Float[Tensor, "R F"]
    teacher_mean: Float[Tensor, " F"]
    features: Features | None = None
    """None: of the teacher's states alone."""
    pattern: Float[Tensor, "R S"] | None = None
    """How the student's states move with each coordinate. To edit a coordinate, add its pattern and not its row of `student`,
    which is a filter (Haufe et al. 2014). None: coordinates are only compared."""

    def of_student(self, states: Float[Tensor, "N S"]) -> Float[Tensor, "N R"]:
        """Coordinates of the student's states, in float32 or the maps' precision."""
        with torch.autocast(states.device.type, enabled=False):
            return (states.float() - self.student_mean) @ self.student.T

    def of_teacher(self, states: Float[Tensor, "N T"]) -> Float[Tensor, "N R"]:
        """Coordinates of the teacher's states, in float32 or the maps' precision."""
        with torch.autocast(states.device.type, enabled=False):
            rows = states.float() if self.features is None else self.features(states)
            return (rows - self.teacher_mean) @ self.teacher.T

    def first(self, rank: int) -> Self:
        """The first `rank` coordinates."""
        pattern = None if self.pattern is None else self.pattern[:rank]
        return replace(self, student=self.student[:rank], teacher=self.teacher[:rank], pattern=pattern)

    def to(self, device: torch.device) -> Self:
        """The same maps on another device."""
        return self.from_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name, those of the features as `features.NAME`."""
        features = {} if self.features is None else vars(self.features)
        own = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return own | {f"features.{name}": tensor for name, tensor in features.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("features.")}
        features = {name.removeprefix("features."): tensors[name] for name in tensors.keys() - own}
        return cls(**own, features=Features(**features) if features else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Maps of one pair of blocks, with what the held-out rows say of them."""

    projections: BlockMap
    """The teacher's principal directions, the largest variance first, and the student's regression on them."""
    directions: BlockMap
    """Canonical directions, the most correlated first; coordinates have variance 1."""
    canonical: Float[Tensor, " M"]
    """Held-out squared correlation of each canonical pair of directions, in the order of the fit; M the smaller width."""
    cosine: Float[Tensor, " K"]
    """Held-out mean cosine of the two projections at every rank from 1; empty until it is measured."""
    rows: int
    held_out_rows: int


def solve(fit: Moments, held_out: Moments, features: Features, *, max_rank: int, name: str) -> Solution:
    """Maps from the moments of the fitted rows, the teacher's with its features; `held_out` only measures, `name` is the
    blocks' in errors. Raises DataError for too few rows, states that are not finite, and states that do not vary."""
    check_moments(fit, held_out, max_rank=max_rank, name=name)
    directions, width, (c_ss, c_st, c_tt) = canonical_directions(fit, features), len(features.mean), fit.covariances
    c_st, c_tt = c_st[:, :width], c_tt[:width, :width]
    teacher = torch.linalg.eigh(c_tt).eigenvectors.flip(-1).T[:max_rank]
    c_sy = c_st @ teacher.T
    ridge = ridge_strength(c_ss, c_sy, float((teacher @ c_tt).mul(teacher).sum()), float(fit.count))
    student = torch.linalg.solve(c_ss + ridge * torch.eye(len(c_ss)).to(c_ss), c_sy).T
    projections = BlockMap(
        student=student, student_mean=fit.student_mean, teacher=teacher, teacher_mean=fit.teacher_mean[:width]
    )
    return Solution(
        projections=projections,
        directions=directions.first(max_rank),
        canonical=squared_correlations(directions, held_out),
        cosine=torch.zeros(0),
        rows=int(fit.count),
        held_out_rows=int(held_out.count),
    )


def ridge_strength(
    c_xx: Float[Tensor, "X X"], c_xy: Float[Tensor, "X Y"], variance: float, n: float, *, slack: float = 0.0
) -> float:
    """The largest ridge whose generalised cross-validation (Golub, Heath, Wahba 1979) of y on x is within the share `slack`
    of the minimum. GCV = RSS / (1 - df/n)^2 estimates the error on unseen rows from second moments. `variance` is y's total.
    """
    eigenvalues, basis = torch.linalg.eigh(c_xx)
    s = eigenvalues.clamp(min=0)
    gain = (basis.T @ c_xy).square().sum(-1)
    ridges = (_RIDGES * s.mean().cpu()).to(s)[:, None]
    shrunk = 1 / (s + ridges)
    residual = variance - (gain * (2 * shrunk - s * shrunk.square())).sum(-1)
    freedom = (s * shrunk).sum(-1) + 1  # the mean
    score = residual.clamp(min=0) / (1 - freedom / n).square()
    score = torch.where(freedom < n, score, torch.inf)
    return float(ridges[(score <= (1 + slack) * score.min()).nonzero().max()])


def canonical_directions(fit: Moments, features: Features) -> BlockMap:
    """All canonical pairs of directions of the fitted rows, each side whitened with the ridge of its own regression. The
    teacher's columns are scaled to one variance first: states and features have no common unit."""
    n, (c_ss, c_st, c_tt) = float(fit.count), fit.covariances
    variance, square = c_tt.diagonal(), fit.teacher_teacher.diagonal() / fit.count
    unit = torch.where(
        variance > _CONSTANT * square, variance.clamp(min=0).rsqrt(), 0.0
    )  # 0: a feature that never fires
    c_st, c_tt = c_st * unit, c_tt * torch.outer(unit, unit)
    student_root = _inverse_root(c_ss, ridge_strength(c_ss, c_st, float(c_tt.trace()), n))
    teacher_root = _inverse_root(c_tt, ridge_strength(c_tt, c_st.T, float(c_ss.trace()), n, slack=SLACK))
    u, _, vh = torch.linalg.svd(student_root @ c_st @ teacher_root, full_matrices=False)
    a, b = _to_unit_variance(student_root @ u, c_ss), _to_unit_variance(teacher_root @ vh.T, c_tt)
    return BlockMap(
        student=a.T, student_mean=fit.student_mean, teacher=(b * unit[:, None]).T, teacher_mean=fit.teacher_mean,
        features=features, pattern=(c_ss @ a).T,
    )  # fmt: skip


def squared_correlations(directions: BlockMap, held_out: Moments) -> Float[Tensor, " M"]:
    """Squared correlation of each canonical pair on the held-out rows; 0 for a pair whose sign turns there."""
    a, b, (c_ss, c_st, c_tt) = directions.student.T, directions.teacher.T, held_out.covariances
    shared = _along(a, c_st, b).clamp(min=0)
    return _ratio(shared.square(), _along(a, c_ss, a) * _along(b, c_tt, b)).clamp(max=1)


def partner(block: int, student_blocks: int, teacher_blocks: int) -> int:
    """The teacher's block at the relative depth of the student's `block`, both counted from 1 (arXiv:2606.06021): round((l - 1)
    / (L_S - 1) * (L_T - 1)) + 1, halves up. The only block of a student goes with the teacher's last."""
    if student_blocks == 1:
        return teacher_blocks
    return math.floor((block - 1) * (teacher_blocks - 1) / (student_blocks - 1) + 0.5) + 1


def auto_rank(canonical: Float[Tensor, " M"]) -> int:
    """The largest r whose r-th held-out squared canonical correlation is at least 1/2; 0 if none is."""
    return max((rank for rank, squared in enumerate(canonical.tolist(), 1) if squared >= 0.5), default=0)


def cosine_sums(u: Float[Tensor, "N R"], v: Float[Tensor, "N R"]) -> Float[Tensor, " R"]:
    """Sum over rows of the cosine between the first r entries of u and v, for every r up to R."""
    dot, uu, vv = (x.cpu().double().cumsum(-1) for x in (u * v, u * u, v * v))
    return _ratio(dot, (uu * vv).sqrt()).sum(0)


def check_moments(fit: Moments, held_out: Moments, *, max_rank: int, name: str) -> None:
    """Raise DataError for states that no bridge can be fitted to."""
    student, teacher = (fit.student_mean, fit.student_student), (fit.teacher_mean, fit.teacher_teacher)
    for side, (mean, second) in {"student": student, "teacher": teacher}.items():
        if not bool(torch.isfinite(second).all()):
            raise DataError(f"{name}: the {side}'s hidden states hold NaN or infinite values; are its weights broken?")
        square = float(second.trace() / fit.count)
        if square - float(mean.square().sum()) <= _CONSTANT * square:
            raise DataError(
                f"{name}: the {side}'s hidden states are the same at every position, so nothing can be fitted to them; "
                "leave the block out with objective.layers, or check the model"
            )
    if float(fit.count) < ROWS_PER_RANK * max_rank or float(held_out.count) < 2:
        raise DataError(
            f"{name}: {int(fit.count)} rows to fit and {int(held_out.count)} held out are too few for rank {max_rank}; it "
            f"needs {ROWS_PER_RANK * max_rank} and 2. Give more prompts or longer completions, or lower fit.max_rank"
        )


def _inverse_root(c: Float[Tensor, "X X"], ridge: float) -> Float[Tensor, "X X"]:
    eigenvalues, basis = torch.linalg.eigh(c)
    return (basis * (eigenvalues.clamp(min=0) + ridge).rsqrt()) @ basis.T


def _along(a: Float[Tensor, "X K"], c: Float[Tensor, "X Y"], b: Float[Tensor, "Y K"]) -> Float[Tensor, " K"]:
    """a_k' c b_k for each column."""
    return (a * (c @ b)).sum(0)


def _to_unit_variance(a: Float[Tensor, "X K"], c: Float[Tensor, "X X"]) -> Float[Tensor, "X K"]:
    """Each direction scaled so that its coordinate has variance 1; one that does not vary becomes 0."""
    return _ratio(a, _along(a, c, a).clamp(min=0).sqrt())


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b; 0 where b is 0: a direction that does not vary has no correlation."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)
