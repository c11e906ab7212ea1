"""From moments to maps in closed form: PCA of the teacher, ridge regression on the student, canonical directions.

PCA bases are nested and the regression of each of their directions is its own, so one solve at the largest rank holds that
of every smaller one in its first rows.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.bridge.features import Features
from oprd.bridge.moments import Moments
from oprd.errors import DataError

ROWS_PER_RANK = 2
"""Fewer rows than this for each direction cannot tell a map from chance [ours]."""
SLACK = 0.03
"""Of the ridges that predict the student's states about as well, the largest is taken: on the miniature the greatest that costs
3% gave a third fewer wrong next tokens than the best, which fits rows of one completion as if they were independent [ours]."""
_RIDGES = torch.logspace(-10, 1, 45, dtype=torch.float64)
"""Ridge strengths that are tried, in units of the mean eigenvalue."""
_CONSTANT = 1e-12
"""Variance over mean square below which a column is constant: its sums have no digits left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Directions:
    """Canonical directions: what the two models' states have in common, the most first. Coordinates have variance 1."""

    student: Float[Tensor, "R S"]
    """The student's coordinates are student (h_S - mean)."""
    teacher: Float[Tensor, "R F"]
    """The teacher's are teacher (features(h_T) - teacher_mean)."""
    teacher_mean: Float[Tensor, " F"]
    features: Features
    pattern: Float[Tensor, "R S"]
    """How the student's states move with each of its coordinates: C_SS student'. A direction reads a coordinate off and
    is no way to change it (Haufe et al. 2014): along it, states leave those that the student has."""

    def first(self, rank: int) -> "Directions":
        return replace(self, student=self.student[:rank], teacher=self.teacher[:rank], pattern=self.pattern[:rank])


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The bridge of one pair of blocks. u = student_projection (h_S - student_mean) is to be near
    v = teacher_projection (h_T - teacher_mean)."""

    student_projection: Float[Tensor, "R S"]
    teacher_projection: Float[Tensor, "R T"]
    """Principal directions of the teacher's states, the largest variance first."""
    student_mean: Float[Tensor, " S"]
    teacher_mean: Float[Tensor, " T"]
    directions: Directions
    canonical: Float[Tensor, " M"]
    """Held-out squared correlation of each canonical pair of directions, in the order of the fit; M the smaller width."""
    explained: Float[Tensor, " R"]
    """Held-out share of the variance of each principal direction that the student predicts; negative where it misleads."""


def solve(fit: Moments, held_out: Moments, features: Features, *, max_rank: int, name: str) -> Solution:
    """The bridge from the moments of the fitted rows, the teacher's with their features; the others only measure. `name`
    says which blocks in errors.

    Raises DataError for too few rows, states that are not finite, and states that do not vary.
    """
    check_moments(fit, held_out, max_rank=max_rank, name=name)
    directions = canonical_directions(fit, features)
    canonical = squared_correlations(directions, held_out)
    width = len(features.mean)
    fit, held_out = fit.of_first(width), held_out.of_first(width)
    teacher_projection = torch.linalg.eigh(fit.c_tt).eigenvectors.flip(-1).T[:max_rank]
    n = float(fit.count)
    c_sy = fit.c_st @ teacher_projection.T
    ridge = ridge_strength(fit.c_ss, c_sy, float((teacher_projection @ fit.c_tt).mul(teacher_projection).sum()), n)
    student_projection = torch.linalg.solve(_with_ridge(fit.c_ss, ridge), c_sy).T
    return Solution(
        student_projection=student_projection,
        teacher_projection=teacher_projection,
        student_mean=fit.student_mean,
        teacher_mean=fit.teacher_mean,
        directions=directions.first(max_rank),
        canonical=canonical,
        explained=explained_variance(
            held_out, student_projection, teacher_projection, fit.student_mean, fit.teacher_mean
        ),
    )


def ridge_strength(
    c_xx: Float[Tensor, "X X"], c_xy: Float[Tensor, "X Y"], variance: float, n: float, *, slack: float = 0.0
) -> float:
    """The ridge that minimises generalised cross-validation (Golub, Heath, Wahba 1979) of y on x; with `slack` the largest
    whose score is within that share of the least.

    GCV = RSS / (1 - df/n)^2 estimates the error on unseen rows from second moments alone, so nothing has to be guessed or
    held out. `variance` is y's total; n rows.
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


def canonical_directions(fit: Moments, features: Features) -> Directions:
    """All canonical pairs of directions of the fitted rows, each side whitened with the ridge of its own regression.

    The teacher's columns are brought to one variance first: states and features have no common unit.
    """
    n, c_ss = float(fit.count), fit.c_ss
    variance, square = fit.c_tt.diagonal(), fit.teacher_teacher.diagonal() / fit.count
    # 0 for a feature that never fires
    unit = torch.where(variance > _CONSTANT * square, variance.clamp(min=0).rsqrt(), 0.0)
    c_st, c_tt = fit.c_st * unit, fit.c_tt * torch.outer(unit, unit)
    student_root = _inverse_root(c_ss, ridge_strength(c_ss, c_st, float(c_tt.trace()), n))
    teacher_root = _inverse_root(c_tt, ridge_strength(c_tt, c_st.T, float(c_ss.trace()), n, slack=SLACK))
    u, _, vh = torch.linalg.svd(student_root @ c_st @ teacher_root, full_matrices=False)
    a, b = _to_unit_variance(student_root @ u, c_ss), _to_unit_variance(teacher_root @ vh.T, c_tt)
    return Directions(
        student=a.T,
        teacher=(b * unit[:, None]).T,
        teacher_mean=fit.teacher_mean,
        features=features,
        pattern=(c_ss @ a).T,
    )


def squared_correlations(directions: Directions, held_out: Moments) -> Float[Tensor, " M"]:
    """Squared correlation on the held-out rows of each canonical pair. A pair whose sign turns has none."""
    a, b = directions.student.T, directions.teacher.T
    shared = _along(a, held_out.c_st, b).clamp(min=0)
    return _ratio(shared.square(), _along(a, held_out.c_ss, a) * _along(b, held_out.c_tt, b)).clamp(max=1)


def explained_variance(
    held_out: Moments,
    student: Float[Tensor, "R S"],
    teacher: Float[Tensor, "R T"],
    student_mean: Float[Tensor, " S"],
    teacher_mean: Float[Tensor, " T"],
) -> Float[Tensor, " R"]:
    """1 - E(u - v)^2 / Var(v) of each direction on the held-out rows, u and v about the given means."""
    shift = student @ (held_out.student_mean - student_mean) - teacher @ (held_out.teacher_mean - teacher_mean)
    spread = _along(teacher.T, held_out.c_tt, teacher.T)
    error = (
        spread
        + _along(student.T, held_out.c_ss, student.T)
        - 2 * _along(student.T, held_out.c_st, teacher.T)
        + shift.square()
    )
    return 1 - _ratio(error, spread)


def auto_rank(canonical: Float[Tensor, " M"]) -> int:
    """The largest r whose r-th held-out squared canonical correlation is at least 1/2; 0 if none is."""
    at_least_half = (canonical >= 0.5).nonzero()
    return int(at_least_half.max()) + 1 if len(at_least_half) else 0


def cosine_sums(u: Float[Tensor, "N R"], v: Float[Tensor, "N R"]) -> Float[Tensor, " R"]:
    """Sum over rows of the cosine between the first r entries of u and v, for every r up to R. Not a function of second
    moments: it has to see the rows."""
    dot, uu, vv = (x.double().cumsum(-1) for x in (u * v, u * u, v * v))
    return _ratio(dot, (uu * vv).sqrt()).sum(0)


def check_moments(fit: Moments, held_out: Moments, *, max_rank: int, name: str) -> None:
    """Raise DataError for states that no bridge can be fitted to."""
    for side, mean, second in (
        ("student", fit.student_mean, fit.student_student),
        ("teacher", fit.teacher_mean, fit.teacher_teacher),
    ):
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


def _with_ridge(c: Float[Tensor, "X X"], ridge: float) -> Float[Tensor, "X X"]:
    return c + ridge * torch.eye(len(c), dtype=c.dtype, device=c.device)


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
    """a / b, 0 where b is 0: a direction that does not vary has no correlation."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)
