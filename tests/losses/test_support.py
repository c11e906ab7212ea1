"""Logits at some tokens equal those of whole rows, in value and every gradient, and touch nothing else of the head."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from oprd.losses import support as module
from oprd.losses.chunked import logits
from oprd.losses.support import logits_at, top_ids
from oprd.types import LMHead

N, D, V, K = 23, 8, 50, 5


def rows(dtype=torch.float64):
    """Hidden states, weight and bias of a head, and tokens of each row: some twice, some that end the turn."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((N, D), (V, D), (V,)))
    ids = torch.randint(0, V, (N, K), generator=g)
    ids[0] = torch.tensor([3, 7, 7, 1, 2])
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), ids


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(module, "GATHERED_ELEMENTS", 4 * K * D)


@pytest.mark.parametrize("stops", [(), (3, 7, 20)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
def test_values_and_every_gradient_are_those_of_whole_rows(scale, softcap, stops):
    *parameters, ids = rows()
    hidden, weight, bias = parameters
    head = LMHead(weight=weight, bias=bias, scale=scale, softcap=softcap, stops=stops)
    upstream = torch.rand(N, K, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    wanted, got = logits(hidden, head).gather(-1, ids), logits_at(hidden, head, ids)
    assert_close(got, wanted)
    for ours, theirs in zip(
        torch.autograd.grad((got * upstream).sum(), parameters),
        torch.autograd.grad((wanted * upstream).sum(), parameters),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_the_heads_gradient_is_summed_in_float32():
    """Summed up in bfloat16, 2000 equal terms stop growing at 256."""
    hidden, weight = torch.ones(2000, 1, dtype=torch.bfloat16), torch.ones(3, 1, dtype=torch.bfloat16)
    head = LMHead(weight=weight.requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = logits_at(hidden, head, torch.full((2000, 1), 1))
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert weight.grad.flatten().tolist() == [0, 2000, 0]


def test_nothing_of_the_whole_vocabulary_is_computed_but_the_gradient():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and V in out.shape:
                sizes.append((str(function), tuple(out.shape)))
            return out

    hidden, weight, _, ids = rows()
    with Sizes():
        logits_at(hidden, LMHead(weight=weight), ids).sum().backward()
    assert ("aten.zeros_like.default", (V, D)) in sizes
    assert {shape for _, shape in sizes} == {(V, D)}


def test_the_most_probable_tokens_are_those_of_whole_rows():
    hidden, weight, bias, _ = rows()
    head = LMHead(weight=weight, bias=bias)
    wanted = logits(hidden, head).topk(4).indices
    assert torch.equal(top_ids(hidden, head, 4), wanted)
    assert torch.equal(
        top_ids(hidden, replace(head, scale=-1.0), 4), logits(hidden, head).topk(4, largest=False).indices
    )


def test_no_row_gives_no_logits_and_zero_gradient():
    hidden, weight, _, ids = rows()
    scores = logits_at(hidden[:0], LMHead(weight=weight), ids[:0])
    scores.sum().backward()
    assert scores.shape == (0, K)
    assert_close(weight.grad, torch.zeros_like(weight))
