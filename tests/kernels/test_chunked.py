"""The chunked losses are the reference's, in value and every gradient, and never hold [N, V]."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from oprd.config.objectives import OutputKLConfig
from oprd.kernels import chunked
from oprd.objectives.kl import divergence
from oprd.types import LMHead

CONFIGS = [
    OutputKLConfig(divergence=d, estimator=e, kl_temperature=t)
    for d in ("reverse_kl", "forward_kl", "jsd")
    for e, t in (("full", 1.0), ("full", 2.0), ("top_k", 1.0), ("sampled", 1.0))
]
N, D, V = 37, 8, 50


def name(config: OutputKLConfig) -> str:
    return f"{config.divergence}-{config.estimator}-{config.kl_temperature}"


def rows(dtype=torch.float64, vocabulary=V, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
        torch.randn(vocabulary, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
        torch.randn(vocabulary, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
        torch.randn(N, D + 3, generator=g, dtype=torch.float64).to(dtype),
        torch.randn(vocabulary, D + 3, generator=g, dtype=torch.float64).to(dtype),
        torch.randint(0, vocabulary, (N,), generator=g),
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "chunk_rows", lambda vocabulary: 16)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (2.0, 30.0)])
def test_sharpened_states_are_sure_enough_and_moved_no_further_and_only_along_the_patterns(scale, softcap):
    hidden, weight, bias, *_ = (x.detach().float() for x in rows())
    head = LMHead(weight=weight, bias=bias, scale=scale, softcap=softcap)
    patterns = torch.randn(D - 2, D, generator=torch.Generator().manual_seed(1))
    least = torch.linspace(0.1, 0.9, N)
    moved = chunked.sharpen(hidden, head, least, patterns)
    before, after = (chunked.logits(h, head).softmax(-1).max(-1) for h in (hidden, moved))
    unsure = before.values < least
    assert 0 < int(unsure.sum()) < N
    assert torch.equal(moved[~unsure], hidden[~unsure])
    length = (moved - hidden).norm(dim=-1) / hidden.norm(dim=-1)
    assert float(length.max()) <= chunked.REACH * 1.001
    reached = unsure & (length < chunked.REACH * 0.999)
    assert int(reached.sum()) > 3
    assert torch.equal(before.indices[reached], after.indices[reached])
    assert_close(after.values[reached], least[reached], atol=2e-3, rtol=0)
    assert float((after.values - before.values)[unsure].min()) > 0
    inside = (moved - hidden) @ torch.linalg.pinv(patterns) @ patterns
    assert_close(inside, moved - hidden, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", ["equal", "different"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_values_and_every_gradient_agree_with_the_reference(config, scale, softcap, weights):
    hidden, weight, bias, teacher_hidden, teacher_weight, ids = rows()
    loss = divergence(config, V)
    upstream = torch.full((N,), 0.3, dtype=torch.float64)
    if weights == "different":
        upstream = torch.rand(N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    plain = (hidden @ weight.T + bias) * scale
    plain_teacher = teacher_hidden @ teacher_weight.T
    plain = plain if softcap is None else softcap * torch.tanh(plain / softcap)
    expected = loss(plain, plain_teacher, ids)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), (hidden, weight, bias))

    head = LMHead(weight=weight, bias=bias, scale=scale, softcap=softcap)
    values = chunked.head_divergence(hidden, head, teacher_hidden, LMHead(weight=teacher_weight), ids, loss)
    grads = torch.autograd.grad((values * upstream).sum(), (hidden, weight, bias))
    assert_close(values, expected)
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert_close(got, wanted)


def test_heads_of_padded_vocabularies_share_their_first_rows():
    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows()
    loss = divergence(OutputKLConfig(), V)
    padded = torch.cat([teacher_weight, torch.full((6, D + 3), 5.0, dtype=torch.float64)])
    same = chunked.head_divergence(hidden, LMHead(weight=weight), teacher_hidden, LMHead(weight=padded), ids, loss)
    wanted = chunked.head_divergence(
        hidden, LMHead(weight=weight), teacher_hidden, LMHead(weight=teacher_weight), ids, loss
    )
    assert_close(same, wanted)


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows()
    frozen = LMHead(weight=weight.detach())
    values = chunked.head_divergence(
        hidden, frozen, teacher_hidden, LMHead(weight=teacher_weight), ids, divergence(OutputKLConfig(), V)
    )
    values.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_supervised_token_gives_no_value_and_zero_gradient():
    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows()
    values = chunked.head_divergence(
        hidden[:0], LMHead(weight=weight), teacher_hidden[:0], LMHead(weight=teacher_weight), ids[:0],
        divergence(OutputKLConfig(), V),
    )  # fmt: skip
    values.sum().backward()
    assert values.shape == (0,)
    assert_close(weight.grad, torch.zeros_like(weight))


def test_gradients_in_bfloat16_are_those_of_float32_logits():
    """Logits rounded to bfloat16 before the softmax would be wrong by several per cent (Liger 1432)."""
    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows(torch.bfloat16)
    loss = divergence(OutputKLConfig(), V)
    values = chunked.head_divergence(
        hidden, LMHead(weight=weight), teacher_hidden, LMHead(weight=teacher_weight), ids, loss
    )
    (got,) = torch.autograd.grad(values.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = loss(exact @ weight.detach().double().T, teacher_hidden.double() @ teacher_weight.double().T, ids)
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    error = (got.double() - wanted).norm() / wanted.norm()
    assert float(error) < 0.004, float(error)  # the one rounding of the result itself: 2^-9 relative


class LargestAllocation(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_no_tensor_of_n_by_v_is_ever_allocated(config, monkeypatch):
    monkeypatch.setattr(chunked, "chunk_rows", lambda vocabulary: 4)
    vocabulary = 600
    hidden, weight, bias, teacher_hidden, teacher_weight, ids = rows(torch.float32, vocabulary)
    head, teacher_head = LMHead(weight=weight, bias=bias), LMHead(weight=teacher_weight)
    with LargestAllocation() as largest:
        values = chunked.head_divergence(
            hidden, head, teacher_hidden, teacher_head, ids, divergence(config, vocabulary)
        )
        (values * torch.rand(N)).sum().backward()
    assert largest.elements <= vocabulary * (D + 3), largest.elements  # the heads themselves
    assert vocabulary * (D + 3) < N * vocabulary


def test_counting_allocations_notices_a_plain_softmax():
    hidden, weight, _, _, _, _ = rows(torch.float32, 600)
    with LargestAllocation() as largest:
        (hidden @ weight.T).log_softmax(-1)
    assert largest.elements == N * 600
