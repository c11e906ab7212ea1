"""Baseline of `bridge_fit.py`: the authors' fit, PCA of the teacher and Adam on the student's projection (arXiv:2606.06021).

Adam and the squared error both treat every row of the projection on its own, so a fit at the largest rank contains that of
every smaller rank.
"""

import torch
from jaxtyping import Float
from torch import Tensor

PCA_ROWS, LEARNING_RATE, EPOCHS = 16_384, 1e-3, 20
"""As in the authors' code."""
BATCH_ROWS = 1024
"""Ours; theirs is not known."""


def fit_by_gradient(
    student: Float[Tensor, "N S"], teacher: Float[Tensor, "N T"], *, max_rank: int, seed: int
) -> tuple[Float[Tensor, "R S"], Float[Tensor, "R T"], Float[Tensor, " T"]]:
    """(student projection, teacher projection, teacher mean): P_S h_S, without a bias, near P_T (h_T - mean_T)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = student.float(), teacher.float()
    some = torch.randperm(len(teacher), generator=generator)[:PCA_ROWS]
    mean = teacher[some].mean(0)
    _, _, directions = torch.linalg.svd(teacher[some] - mean, full_matrices=False)
    projection = directions[:max_rank]
    target = (teacher - mean) @ projection.T
    map_ = torch.nn.Linear(student.shape[1], len(projection), bias=False)
    bound = student.shape[1] ** -0.5
    with torch.no_grad():
        map_.weight.uniform_(-bound, bound, generator=generator)
    optimizer = torch.optim.Adam(map_.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(student), generator=generator).split(BATCH_ROWS):
            optimizer.zero_grad()
            (map_(student[rows]) - target[rows]).square().mean().backward()
            optimizer.step()
    return map_.weight.detach(), projection, mean
