"""Sharpened targets of OPRD-Bridge."""

import pytest
import torch
from torch.testing import assert_close

from oprd.losses.chunked import logits
from oprd.objectives.oprd_bridge import REACH, sharpen
from oprd.types import LMHead

N, D, V = 37, 8, 50


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (2.0, 30.0)])
def test_sharpened_states_are_sure_enough_and_moved_no_further_and_only_along_the_patterns(scale, softcap):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=draw), torch.randn(V, D, generator=draw)
    head = LMHead(weight=weight, bias=torch.randn(V, generator=draw), scale=scale, softcap=softcap)
    patterns = torch.randn(D - 2, D, generator=torch.Generator().manual_seed(1))
    least = torch.linspace(0.1, 0.9, N)
    moved = sharpen(hidden, head, least, patterns)
    before, after = (logits(h, head).softmax(-1).max(-1) for h in (hidden, moved))
    unsure = before.values < least
    assert 0 < int(unsure.sum()) < N
    assert torch.equal(moved[~unsure], hidden[~unsure])
    length = (moved - hidden).norm(dim=-1) / hidden.norm(dim=-1)
    assert float(length.max()) <= REACH * 1.001
    reached = unsure & (length < REACH * 0.999)
    assert int(reached.sum()) > 3
    assert torch.equal(before.indices[reached], after.indices[reached])
    assert_close(after.values[reached], least[reached], atol=2e-3, rtol=0)
    assert float((after.values - before.values)[unsure].min()) > 0
    inside = (moved - hidden) @ torch.linalg.pinv(patterns) @ patterns
    assert_close(inside, moved - hidden, atol=1e-4, rtol=0)
