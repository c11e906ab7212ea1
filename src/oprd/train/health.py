"""Health numbers of a run, after arXiv 2604.13016: does the student come nearer to the teacher, and how?

Taken without gradient on a few tokens, so that they can be on at every step whatever the objective.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity

from oprd.kernels.chunked import logits
from oprd.kernels.reference import entropy, shared, token_logprobs
from oprd.types import HiddenTargets, Reading, Rollouts, States, TokenSelection

OVERLAP_K = 16
"""Size of the top-k sets that are compared [paper: arXiv 2604.13016]."""
MIN_COMPLETIONS = 4
_ALL = TokenSelection(keep="all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Means over `tokens` sampled tokens. A teacher says only what compares: states of the same blocks and width,
    distributions over the same vocabulary."""

    tokens: int
    cosine: tuple[float, ...]
    """Cosine of student and teacher state for each block, at the sampled tokens; empty for another width or depth."""
    student_entropy: float
    """In nats, as are those of `Agreement`."""
    agreement: "Agreement | None"
    """None for a teacher with another tokenizer."""

    def metrics(self) -> dict[str, float]:
        named = {f"health/cosine_block_{i:02d}/mean": value for i, value in enumerate(self.cosine, start=1)}
        named["health/student_entropy/mean"] = self.student_entropy
        return named | (self.agreement.metrics(self.student_entropy) if self.agreement is not None else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How two distributions over the same vocabulary compare."""

    overlap: float
    """Share of the student's top 16 tokens that are also in the teacher's."""
    teacher_entropy: float
    sampled_reverse_kl: float
    """log p - log q of the sampled tokens."""

    def metrics(self, student_entropy: float) -> dict[str, float]:
        return {
            f"health/top_{OVERLAP_K}_overlap/mean": self.overlap,
            "health/teacher_entropy/mean": self.teacher_entropy,
            "health/entropy_gap/mean": self.teacher_entropy - student_entropy,
            "health/sampled_reverse_kl/mean": self.sampled_reverse_kl,
        }


def health_readings(blocks: int) -> tuple[Reading, ...]:
    """Every block at the sampled tokens, and the last where they are predicted."""
    at_tokens = tuple(Reading(block=b, at="completion", tokens=_ALL) for b in range(1, blocks + 1))
    return (*at_tokens, Reading(block="last", at="prediction", tokens=_ALL))


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


def measure(student: States, teacher: HiddenTargets | None) -> torch.Tensor:
    """[blocks + 7] sums over the tokens: cosine of each block, tokens with cosines, overlap, the teacher's entropy,
    log p - log q, tokens with these, the student's entropy, tokens. As many whatever the teacher compares, so that the
    sums of processes with different teachers add up."""
    predicted = next(reading for reading in student.hidden if reading.at == "prediction")
    at_tokens = [reading for reading in student.hidden if reading.at == "completion"]
    assert student.head is not None
    ids = student.batch.sampled_ids(_ALL)
    count = float(len(ids))
    own = logits(student.hidden[predicted], student.head)
    cosines = [0.0] * (len(at_tokens) + 1)
    if teacher is not None and at_tokens[0] in teacher.hidden:
        pairs = [(student.hidden[r].float(), teacher.hidden[r].to(student.hidden[r]).float()) for r in at_tokens]
        cosines = [*(float(cosine_similarity(ours, theirs, dim=-1).sum()) for ours, theirs in pairs), count]
    agreement = [0.0] * 4
    if teacher is not None:
        assert teacher.head is not None
        vocabulary = min(len(student.head.weight), len(teacher.head.weight))
        p = own[:, :vocabulary]
        q = logits(teacher.hidden[predicted].to(p.device), teacher.head.cut(vocabulary))
        k = min(OVERLAP_K, vocabulary)
        overlap = shared(p.topk(k).indices, q.topk(k).indices).float().mean(-1)
        ratio = token_logprobs(p, ids) - token_logprobs(q, ids)
        agreement = [float(overlap.sum()), float(entropy(q).sum()), float(ratio.sum()), count]
    return torch.tensor([*cosines, *agreement, float(entropy(own).sum()), count], dtype=torch.float64)


def health_from_sums(sums: torch.Tensor) -> Health | None:
    """Means from `measure`'s sums, added up over processes; None without a token."""
    *cosine, with_cosine, overlap, teacher, ratio, compared, student, tokens = sums.tolist()
    if not tokens:
        return None
    agreement = None
    if compared:
        agreement = Agreement(
            overlap=overlap / compared, teacher_entropy=teacher / compared, sampled_reverse_kl=ratio / compared
        )
    return Health(
        tokens=int(tokens),
        cosine=tuple(value / with_cosine for value in cosine) if with_cosine else (),
        student_entropy=student / tokens,
        agreement=agreement,
    )
