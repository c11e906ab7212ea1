"""Health numbers of a run, after arXiv 2604.13016: does the student come nearer to the teacher, and how?

Taken without gradient on a few tokens, so that they can be on at every step whatever the objective.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity

from oprd.kernels.chunked import logits
from oprd.kernels.reference import shared, token_logprobs
from oprd.types import HiddenTargets, Reading, Rollouts, States, TokenSelection

OVERLAP_K = 16
"""Size of the top-k sets that are compared [paper: arXiv 2604.13016]."""
MIN_COMPLETIONS = 4
_ALL = TokenSelection(keep="all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Means over `tokens` sampled tokens."""

    tokens: int
    cosine: tuple[float, ...]
    """Cosine of student and teacher state for each block, at the sampled tokens; empty for another width or depth."""
    overlap: float
    """Share of the student's top 16 tokens that are also in the teacher's."""
    student_entropy: float
    """In nats, as are the following."""
    teacher_entropy: float
    sampled_reverse_kl: float
    """log p - log q of the sampled tokens."""

    def metrics(self) -> dict[str, float]:
        named = {f"health/cosine_block_{i:02d}/mean": value for i, value in enumerate(self.cosine, start=1)}
        return named | {
            f"health/top_{OVERLAP_K}_overlap/mean": self.overlap,
            "health/student_entropy/mean": self.student_entropy,
            "health/teacher_entropy/mean": self.teacher_entropy,
            "health/entropy_gap/mean": self.teacher_entropy - self.student_entropy,
            "health/sampled_reverse_kl/mean": self.sampled_reverse_kl,
        }


def health_readings(blocks: int) -> tuple[Reading, ...]:
    """Every block at the sampled tokens, and the last where they are predicted."""
    at_tokens = tuple(Reading(block=b, at="completion", tokens=_ALL) for b in range(1, blocks + 1))
    return (*at_tokens, Reading(block=blocks, at="prediction", tokens=_ALL))


def health_sample(rollouts: Rollouts, tokens: int) -> Rollouts:
    """A few completions of one teacher, cut so that they have at most `tokens` tokens together."""
    rows = [i for i, p in enumerate(rollouts.prompts) if p.teacher == rollouts.prompts[0].teacher]
    mean_length = max(1, sum(rollouts.lengths[i] for i in rows) // len(rows))
    wanted = max(MIN_COMPLETIONS, tokens // mean_length)
    some = rollouts.take(rows[:: max(1, len(rows) // wanted)][:wanted])
    room = max(1, tokens // len(some))
    return Rollouts(
        prompts=some.prompts,
        completion_ids=tuple(ids[:room] for ids in some.completion_ids),
        finished=some.finished,
    )


def measure(student: States, teacher: HiddenTargets) -> torch.Tensor:
    """[blocks + 5] sums over the tokens: cosine of each block, overlap, both entropies, log p - log q, tokens."""
    predicted = next(reading for reading in student.hidden if reading.at == "prediction")
    cosines = [
        cosine_similarity(student.hidden[r].float(), teacher.hidden[r].to(student.hidden[r]).float(), dim=-1).sum()
        for r in student.hidden
        if r.at == "completion" and student.hidden[r].shape == teacher.hidden[r].shape
    ]
    assert student.head is not None
    assert teacher.head is not None
    ids = student.batch.sampled_ids(_ALL)
    vocabulary = min(len(student.head.weight), len(teacher.head.weight))
    p = logits(student.hidden[predicted], student.head.cut(vocabulary))
    q = logits(teacher.hidden[predicted].to(p.device), teacher.head.cut(vocabulary))
    k = min(OVERLAP_K, vocabulary)
    overlap = shared(p.topk(k).indices, q.topk(k).indices).float().mean(-1)
    ratio = token_logprobs(p, ids) - token_logprobs(q, ids)
    sums = [overlap.sum(), _entropy(p).sum(), _entropy(q).sum(), ratio.sum(), torch.tensor(float(len(ids)))]
    return torch.stack([value.double().cpu() for value in [*cosines, *sums]])


def health_from_sums(sums: torch.Tensor) -> Health | None:
    """Means from `measure`'s sums, added up over processes; None without a token."""
    *cosine, overlap, student, teacher, ratio, tokens = sums.tolist()
    if not tokens:
        return None
    return Health(
        tokens=int(tokens),
        cosine=tuple(value / tokens for value in cosine),
        overlap=overlap / tokens,
        student_entropy=student / tokens,
        teacher_entropy=teacher / tokens,
        sampled_reverse_kl=ratio / tokens,
    )


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
