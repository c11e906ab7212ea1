"""Numbers of all processes on every process."""

from collections.abc import Sequence

import torch

from oprd.train.build import Run


def gather(run: Run, row: Sequence[float]) -> torch.Tensor:
    """[processes, len(row)] in float64."""
    mine = torch.tensor([row], dtype=torch.float64, device=run.accelerator.device)
    return run.accelerator.gather(mine).cpu()  # type: ignore[union-attr]


def anywhere(run: Run, flag: bool) -> bool:
    """True on every process when it is true on one."""
    return bool(gather(run, [float(flag)]).any())
