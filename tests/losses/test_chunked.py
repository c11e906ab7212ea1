"""Chunked losses equal their definitions, in value and every gradient, and never hold [N, V]."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from estimators import ESTIMATORS, exact
from oprd.losses import chunked as module
from oprd.losses.chunked import chunked, logprobs_of, statistics
from oprd.losses.divergences import entropy, token_logprobs
from oprd.types import LMHead

N, D, V = 37, 8, 50
original_chunk_rows = module.chunk_rows


def rows(dtype=torch.float64, vocabulary=V, seed=0):
    """Student hidden states, LM head and bias; the teacher's hidden states and head; sampled ids."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
        torch.randn(vocabulary, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
        torch.randn(vocabulary, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
        torch.randn(N, D + 3, generator=g, dtype=torch.float64).to(dtype),
        torch.randn(vocabulary, D + 3, generator=g, dtype=torch.float64).to(dtype),
        torch.randint(0, vocabulary, (N,), generator=g),
    )


def plain(hidden, head):
    """All logits at once, from the head's definition."""
    out = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    return out * head.scale if head.softcap is None else head.softcap * torch.tanh(out * head.scale / head.softcap)


def distance(hidden, head, teacher_hidden, teacher_weight, ids, row_function=None):
    """`chunked` of the exact reverse KL, or another row function."""
    return chunked(
        row_function or exact("reverse_kl"),
        hidden,
        head,
        ids,
        teacher_hidden=teacher_hidden,
        teacher_head=LMHead(weight=teacher_weight),
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda vocabulary, device: 16)
    monkeypatch.setattr(module, "slice_rows", lambda vocabulary, device: 11)


@pytest.mark.parametrize("weights", ["equal", "different"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_values_and_every_gradient_agree_with_the_definition(name, scale, softcap, weights):
    hidden, weight, bias, teacher_hidden, teacher_weight, ids = rows()
    head = LMHead(weight=weight, bias=bias, scale=scale, softcap=softcap)
    upstream = torch.full((N,), 0.3, dtype=torch.float64)
    if weights == "different":
        upstream = torch.rand(N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    expected = ESTIMATORS[name](plain(hidden, head), teacher_hidden @ teacher_weight.T, ids)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), (hidden, weight, bias))

    values = distance(hidden, head, teacher_hidden, teacher_weight, ids, ESTIMATORS[name])
    grads = torch.autograd.grad((values * upstream).sum(), (hidden, weight, bias))
    assert_close(values, expected)
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_stop_ids_are_one_action(name):
    """The divergence is that of distributions in which one outcome holds the probability of all stop ids."""
    stops = (3, 7, 20)
    hidden, weight, bias, teacher_hidden, teacher_weight, ids = rows()
    head, teacher_head = LMHead(weight=weight, bias=bias, scale=0.5, softcap=3.0), LMHead(weight=teacher_weight)
    others = [i for i in range(V) if i not in stops]

    def merged(logits):
        return torch.cat([logits[:, others], logits[:, stops].logsumexp(-1, keepdim=True)], dim=1)

    wanted = exact(name)(merged(plain(hidden, head)), merged(plain(teacher_hidden, teacher_head)), ids)
    parameters = (hidden, weight, bias)
    wanted_grads = torch.autograd.grad(wanted.sum(), parameters)
    got = chunked(
        exact(name), hidden, replace(head, stops=stops), ids,
        teacher_hidden=teacher_hidden, teacher_head=replace(teacher_head, stops=stops),
    )  # fmt: skip
    assert_close(got, wanted)
    for ours, theirs in zip(torch.autograd.grad(got.sum(), parameters), wanted_grads, strict=True):
        assert_close(ours, theirs)


def test_any_stop_id_that_was_sampled_has_the_ratio_of_the_whole_action():
    stops = (3, 7)
    hidden, weight, _, teacher_hidden, teacher_weight, _ = rows()
    heads = [LMHead(weight=w, stops=stops) for w in (weight.detach(), teacher_weight)]
    p, q = (plain(h, head).log_softmax(-1) for h, head in zip((hidden.detach(), teacher_hidden), heads, strict=True))
    wanted = p[:, stops].logsumexp(-1) - q[:, stops].logsumexp(-1)
    for stop in stops:
        ids = torch.full((N,), stop)
        ours = logprobs_of(hidden.detach(), heads[0], ids) - logprobs_of(teacher_hidden, heads[1], ids)
        assert_close(ours, wanted)


def test_without_gradient_the_values_are_the_same():
    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows()
    values = distance(hidden, LMHead(weight=weight), teacher_hidden, teacher_weight, ids)
    with torch.no_grad():
        same = distance(hidden, LMHead(weight=weight), teacher_hidden, teacher_weight, ids)
    assert torch.equal(values, same)
    assert not same.requires_grad


def test_statistics_are_those_of_the_whole_logits_and_of_none():
    hidden, weight, bias, _, _, ids = rows()
    head = LMHead(weight=weight, bias=bias)

    def both(p, _, ids):
        return torch.stack([entropy(p), token_logprobs(p, ids)], -1)

    assert_close(statistics(both, hidden, head, ids), both(plain(hidden, head), None, ids).detach())
    assert statistics(both, hidden[:0], head, ids[:0]).shape == (0, 2)


def test_heads_of_padded_vocabularies_share_their_first_rows():
    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows()
    padded = torch.cat([teacher_weight, torch.full((6, D + 3), 5.0, dtype=torch.float64)])
    same = distance(hidden, LMHead(weight=weight), teacher_hidden, padded, ids)
    assert_close(same, distance(hidden, LMHead(weight=weight), teacher_hidden, teacher_weight, ids))


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows()
    distance(hidden, LMHead(weight=weight.detach()), teacher_hidden, teacher_weight, ids).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_a_trained_bias_under_a_frozen_weight_gets_the_gradient_of_unequal_weights():
    hidden, weight, bias, teacher_hidden, teacher_weight, ids = rows()
    upstream = torch.rand(N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    head = LMHead(weight=weight.detach(), bias=bias)
    expected = exact("reverse_kl")(plain(hidden, head), teacher_hidden @ teacher_weight.T, ids)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), bias)
    values = distance(hidden, head, teacher_hidden, teacher_weight, ids)
    assert_close(torch.autograd.grad((values * upstream).sum(), bias)[0], wanted)


def test_a_second_backward_pass_gives_the_same_gradients():
    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows()
    value = distance(hidden, LMHead(weight=weight), teacher_hidden, teacher_weight, ids).mean()
    first, second = (torch.autograd.grad(value, (hidden, weight), retain_graph=True) for _ in range(2))
    assert_close(first, second)


def test_no_supervised_token_gives_no_value_and_zero_gradient():
    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows()
    values = distance(hidden[:0], LMHead(weight=weight), teacher_hidden[:0], teacher_weight, ids[:0])
    values.sum().backward()
    assert values.shape == (0,)
    assert_close(weight.grad, torch.zeros_like(weight))


def test_gradients_in_bfloat16_are_those_of_float32_logits():
    """Logits rounded to bfloat16 before the softmax would be wrong by several per cent (Liger 1432)."""
    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows(torch.bfloat16)
    values = distance(hidden, LMHead(weight=weight), teacher_hidden, teacher_weight, ids)
    (got,) = torch.autograd.grad(values.sum(), hidden)
    precise = hidden.detach().double().requires_grad_()
    teacher_logits = teacher_hidden.double() @ teacher_weight.double().T
    expected = exact("reverse_kl")(precise @ weight.detach().double().T, teacher_logits, ids)
    (wanted,) = torch.autograd.grad(expected.sum(), precise)
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


def test_the_heads_gradient_is_summed_in_float32_whatever_computes_around_it(monkeypatch):
    """300 chunks added up in bfloat16 are wrong by 2%, and a product under autocast by 0.25%."""
    monkeypatch.setattr(module, "slice_rows", lambda vocabulary, device: 16)
    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows(torch.float32)
    many = [x.repeat(300, *[1] * (x.dim() - 1)) for x in (hidden.detach(), teacher_hidden, ids)]
    wanted = [torch.zeros_like(weight, dtype=torch.float64), None]
    for cast in (torch.float64, torch.bfloat16):
        states, head = many[0].to(torch.bfloat16).to(cast), weight.detach().to(torch.bfloat16).to(cast)
        states.requires_grad_(), head.requires_grad_()
        theirs = (x.to(torch.bfloat16).to(cast) for x in (many[1], teacher_weight))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast is torch.bfloat16):
            value = distance(states, LMHead(weight=head), *theirs, many[2]).mean()
        grads = torch.autograd.grad(value, (states, head))
        if cast is torch.float64:
            wanted = grads
    for got, right in zip(grads, wanted, strict=True):
        # rounding the result to bfloat16 costs 0.17% of each entry; the teacher's states and head were rounded as well
        assert float((got.double() - right).norm() / right.norm()) < 4e-3


def test_a_head_is_cast_once_for_all_chunks():
    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            Casts.count += "_to_copy" in str(function) and tuple(out.shape) in {(V, D), (V, D + 3)}
            return out

    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows(torch.bfloat16)
    with Casts():
        distance(hidden, LMHead(weight=weight), teacher_hidden, teacher_weight, ids).sum()
    assert Casts.count == 2


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_tensor_of_n_by_v_is_ever_allocated(name, monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda vocabulary, device: 4)
    vocabulary = 600
    hidden, weight, bias, teacher_hidden, teacher_weight, ids = rows(torch.float32, vocabulary)
    with LargestAllocation() as largest:
        head = LMHead(weight=weight, bias=bias)
        values = distance(hidden, head, teacher_hidden, teacher_weight, ids, ESTIMATORS[name])
        (values * torch.rand(N)).sum().backward()
    assert largest.elements <= vocabulary * (D + 3), largest.elements  # the heads themselves
    assert vocabulary * (D + 3) < N * vocabulary


def test_the_heads_gradient_takes_the_memory_of_one_head():
    made = []

    class Heads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if (
                isinstance(out, torch.Tensor)
                and out.shape == (V, D)
                and out.data_ptr() not in {weight.data_ptr(), *made}
            ):
                made.append(out.data_ptr())
            return out

    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows()
    with Heads():
        distance(hidden, LMHead(weight=weight), teacher_hidden, teacher_weight, ids).mean().backward()
    assert made == [weight.grad.data_ptr()]


@pytest.mark.parametrize(("vocabulary", "rows"), [(151_936, 256), (49_152, 256), (262, 32_017)])
def test_a_chunk_on_a_cpu_has_rows_enough_for_the_products(vocabulary, rows):
    assert original_chunk_rows(vocabulary, torch.device("cpu")) == rows


@pytest.mark.parametrize(("free_gib", "rows"), [(60, 2048), (6, 512), (0.1, 64)])
def test_a_chunk_on_a_gpu_takes_an_eighth_of_the_free_memory(free_gib, rows, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * 2**30) - 2**20, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    assert original_chunk_rows(151_936, torch.device("cuda")) == rows


def test_a_gpu_multiplies_16_bit_factors_as_they_are_and_adds_up_in_float32():
    """Without a GPU: on tensors that have a device and no data."""
    names = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), torch.no_grad():
        states, head = (torch.empty(n, D, dtype=torch.bfloat16, device="cuda") for n in (N, V))
        with Products():
            scores = module.product(states, head.T)
    assert scores.dtype == torch.float32
    assert scores.shape == (N, V)
    assert "aten.mm.dtype" in names
    assert not [name for name in names if "_to_copy" in name]


def test_tf32_is_for_these_products_alone():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    seen = []

    def fails(p, q, ids):
        seen.append(matmul.fp32_precision)
        raise ZeroDivisionError

    hidden, weight, _, teacher_hidden, teacher_weight, ids = rows()
    with pytest.raises(ZeroDivisionError):
        distance(hidden, LMHead(weight=weight), teacher_hidden, teacher_weight, ids, fails)
    assert seen == ["tf32"]
    assert matmul.fp32_precision == before != "tf32"


def test_counting_allocations_notices_a_plain_softmax():
    hidden, weight, _, _, _, _ = rows(torch.float32, 600)
    with LargestAllocation() as largest:
        (hidden @ weight.T).log_softmax(-1)
    assert largest.elements == N * 600
