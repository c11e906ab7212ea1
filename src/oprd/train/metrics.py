"""What a step leaves behind: its line in metrics.jsonl, sample completions, the note on the bar.

The diagnostics are those of arXiv:2604.13016: does the student come nearer to the teacher, and how? They are taken without
gradient on a few tokens, so that they can be on at every step whatever the objective.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from oprd.algorithm import Distillation, Update, term_names
from oprd.data.batching import split_by_tokens
from oprd.data.chat import decode
from oprd.distributed import Ranks
from oprd.losses.chunked import logits, logprobs_of, statistics
from oprd.losses.divergences import entropy, shared, token_logprobs
from oprd.models.language_model import LanguageModel
from oprd.types import ALL_TOKENS, HiddenSpec, HiddenStates, Metric, Rollouts, Taps, TokenSelection

OVERLAP_K = 16
"""Size of the top-k sets that are compared, as in arXiv:2604.13016."""
MIN_COMPLETIONS = 4
SAMPLES_PER_STEP = 2
COMPARED_TOKENS = 1024
"""Sampled tokens whose log-probabilities by the engine and by the student are compared, on every rank."""


def step_metrics(method: Distillation, update: Update, written: Rollouts, step: int) -> dict[str, float]:
    """The step's line but for what depends on the machine: equal bit for bit when a run is repeated on one rank."""
    lengths = written.lengths
    empty = sum(length == 0 or (length == 1 and done) for length, done in zip(lengths, written.finished, strict=True))
    mine = [len(written), sum(lengths), sum(not done for done in written.finished), empty]
    completions, tokens, truncated, empties = method.ranks.sum([float(x) for x in mine])
    objectives = method.student.objectives
    metrics = (
        *method.source.metrics(),
        *method.teacher.metrics(),
        *(metric for objective in objectives for metric in objective.take_metrics()),
    )
    weighted = sum(o.weight_at(step) * loss for o, loss in zip(objectives, update.losses, strict=True))
    return {
        "train/loss/mean": weighted,
        **{f"train/{name}/mean": x for name, x in zip(term_names(objectives), update.losses, strict=True)},
        "train/grad_norm/mean": update.grad_norm,
        "tokens/generated/sum": int(tokens) if written.written_by == "student" else 0,
        "tokens/supervised/sum": max(update.supervised),
        "rollout/length/mean": tokens / completions,
        "rollout/truncated/share": truncated / completions,
        "rollout/empty/share": empties / completions,
        **add_up(metrics, method.ranks),
    }


def add_up(metrics: Sequence[Metric], ranks: Ranks) -> dict[str, float]:
    """The metrics over all ranks by name, equal names (of several teachers) added up; a share of nothing is left out."""
    values = ranks.sum([x for metric in metrics for x in (metric.sum, metric.count or 0.0)]) if metrics else []
    sums: dict[str, tuple[float, float]] = {}
    for metric, total, count in zip(metrics, values[::2], values[1::2], strict=True):
        before = sums.get(metric.name, (0.0, 0.0))
        sums[metric.name] = before[0] + total, before[1] + count
    plain = {metric.name for metric in metrics if metric.count is None}
    return {name: s if name in plain else s / n for name, (s, n) in sums.items() if name in plain or n}


def diagnostics(method: Distillation, rollouts: Rollouts, tokens: int) -> dict[str, float]:
    """Means over a few tokens of these rollouts, over all ranks; empty without a token.

    A teacher counts in what compares: states of the same blocks and width, distributions over the same vocabulary.
    """
    sample, student = _sample(rollouts, tokens), method.student
    blocks = range(1, student.lm.num_blocks + 1)
    at_tokens = tuple(HiddenSpec(block=b, at="token", tokens=ALL_TOKENS) for b in blocks)
    specs = (*at_tokens, HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS))
    comparable = method.teacher.comparable(sample, specs)
    teacher = method.teacher.targets(sample, Taps(hidden=comparable, head=True)).teacher if comparable else None
    sums = _measure(student.hidden(method.batch(sample), Taps(hidden=specs, head=True)), teacher)
    *cosine, with_cosine, overlap, teacher_entropy, ratio, compared, own_entropy, count = method.ranks.sum(sums)
    if not count:
        return {}
    found = {f"health/cosine_block_{i:02d}/mean": x / with_cosine for i, x in enumerate(cosine, 1) if with_cosine}
    found["health/student_entropy/mean"] = own_entropy / count
    if compared:
        found |= {
            f"health/top_{OVERLAP_K}_overlap/mean": overlap / compared,
            "health/teacher_entropy/mean": teacher_entropy / compared,
            "health/entropy_gap/mean": teacher_entropy / compared - own_entropy / count,
            "health/sampled_reverse_kl/mean": ratio / compared,
        }
    return found


def mass_on_stops(method: Distillation, written: Rollouts) -> str:
    """Mean probability of each stop id where the step's finished completions end, by the student and by its local teachers,
    as text; empty if none ended or no teacher is local."""
    lm, ranks, ends = method.student.lm, method.ranks, TokenSelection(keep="last", k=1)
    spec = HiddenSpec(block="last", at="predicting", tokens=ends)
    done = [i for i, finished in enumerate(written.finished) if finished]
    stops, taps = list(lm.stop_ids), Taps(hidden=(spec,), head=True)
    sums = torch.zeros(2, len(stops) + 1, dtype=torch.float64)
    for micro, own in ranks.in_step(split_by_tokens(written.take(done or [0]), method.micro_batch_tokens)):
        models: list[HiddenStates | None] = [method.student.hidden(method.batch(micro), taps)]
        if method.teacher.comparable(micro, (spec,)):
            models.append(method.teacher.targets(micro, taps).teacher)
        if not done or not own:
            continue
        for total, states in zip(sums, models, strict=False):
            assert states is not None
            assert states.head is not None
            head = replace(states.head, stops=())
            mass = statistics(lambda p, *_: p.softmax(-1)[:, stops], states.hidden[spec], head)
            total += torch.cat([mass.sum(0), mass.new_tensor([len(mass)])]).cpu()
    sums = torch.tensor(ranks.sum(sums.flatten().tolist())).view_as(sums)
    if not bool((sums[:, -1] > 0).all()):
        return ""
    student, teacher = (
        ", ".join(f"{decode(lm.tokenizer, [i], special=True)} {x / n:.3f}" for i, x in zip(stops, row, strict=True))
        for *row, n in sums.tolist()
    )
    return f"Mean probability where this step's completions end: student {student}; teacher {teacher}."


def advice_on_cuts(lm: LanguageModel, longest: int) -> str:
    """The limit that completions were cut at, and what may be wrong: the limit, or the tokens that end a completion."""
    ends = ", ".join(decode(lm.tokenizer, [i], special=True) for i in lm.stop_ids)
    whose = "either the student's or the teacher's" if lm.pair_stops else "the student's"
    return (
        f"max_completion_length={longest}. Look into samples.jsonl. Texts that are not done: raise it, or "
        "the student never sees its own endings. Texts that go on behind their answer: they end it with a token that is not "
        f"among {ends}, {whose} stop tokens; add it to eos_token_id in the student's generation_config.json."
    )


def logprob_difference(method: Distillation, rollouts: Rollouts) -> dict[str, float]:
    """Mean absolute difference, in nats, of the engine's log-probabilities of some sampled tokens to the student's own, over
    all ranks; empty for an engine that gives none."""
    if rollouts.sampling_logprobs is None:
        return {}
    sample, spec = _sample(rollouts, COMPARED_TOKENS), HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS)
    batch = method.batch(sample)
    states = method.student.hidden(batch, Taps(hidden=(spec,), head=True))
    assert states.head is not None
    assert batch.sampling_logprobs is not None
    head = replace(states.head, stops=())  # the engine knows each id that ends a turn by itself
    own = logprobs_of(states.hidden[spec], head, batch.sampled_ids(ALL_TOKENS))
    apart = (own - batch.ragged(batch.sampling_logprobs, ALL_TOKENS)).abs().nan_to_num(math.inf)
    total, count = method.ranks.sum([float(apart.sum()), float(len(apart))])
    return {"rollout/logprob_difference/mean": total / count} if count else {}


def some_samples(method: Distillation, rollouts: Rollouts) -> list[dict[str, Any]]:
    """The first completion of the first prompts of the step, as text."""
    size = len(rollouts) // len({prompt.row for prompt in rollouts.prompts})
    return [
        {
            "row": rollouts.prompts[i].row,
            "prompt": rollouts.prompts[i].messages[-1].content,
            "completion": decode(method.student.lm.tokenizer, rollouts.completion_ids[i], special=True),
            "finished": rollouts.finished[i],
            "length": len(rollouts.completion_ids[i]),
        }
        for i in range(0, len(rollouts), size)[:SAMPLES_PER_STEP]
    ]


def progress_note(method: Distillation, update: Update, metrics: dict[str, float]) -> str:
    """The text beside the bar."""
    names = term_names(method.student.objectives)
    losses = " ".join(f"{name} {x:.4f}" for name, x in zip(names, update.losses, strict=True))
    overlap = metrics.get(f"health/top_{OVERLAP_K}_overlap/mean")
    return losses + ("" if overlap is None else f" overlap {overlap:.2f}") + ("" if update.finite else " SKIPPED")


def _sample(rollouts: Rollouts, tokens: int) -> Rollouts:
    """A few completions of one teacher, cut so that they have at most `tokens` tokens together."""
    rows = [i for i, p in enumerate(rollouts.prompts) if p.teacher == rollouts.prompts[0].teacher]
    mean_length = max(1, sum(rollouts.lengths[i] for i in rows) // len(rows))
    wanted = max(MIN_COMPLETIONS, tokens // mean_length)
    some = rollouts.take(rows[:: max(1, len(rows) // wanted)][:wanted])
    room = max(1, tokens // len(some))
    logprobs = None if some.sampling_logprobs is None else tuple(row[:room] for row in some.sampling_logprobs)
    ids = tuple(ids[:room] for ids in some.completion_ids)
    return Rollouts(prompts=some.prompts, completion_ids=ids, finished=some.finished, sampling_logprobs=logprobs)


def _measure(student: HiddenStates, teacher: HiddenStates | None) -> list[float]:
    """blocks + 7 sums over tokens: cosine of each block, tokens with cosines, overlap, the teacher's entropy, log p - log q,
    tokens with these, the student's entropy, tokens. As many whatever compares, so that the sums of ranks add up."""
    predicting = next(spec for spec in student.hidden if spec.at == "predicting")
    at_tokens = sorted((spec for spec in student.hidden if spec.at == "token"), key=lambda spec: int(spec.block))
    assert student.head is not None
    ids = student.batch.sampled_ids(ALL_TOKENS)
    count = float(len(ids))
    own = logits(student.hidden[predicting], student.head)
    cosines, agreement = [0.0] * (len(at_tokens) + 1), [0.0] * 4
    if teacher is not None and at_tokens[0] in teacher.hidden:
        pairs = [(student.hidden[s].float(), teacher.hidden[s].to(student.hidden[s]).float()) for s in at_tokens]
        cosines = [*(float(cosine_similarity(ours, theirs, dim=-1).sum()) for ours, theirs in pairs), count]
    if teacher is not None:
        assert teacher.head is not None
        vocabulary = min(len(student.head.weight), len(teacher.head.weight))
        p = own[:, :vocabulary]
        q = logits(teacher.hidden[predicting].to(p.device), teacher.head.first_rows(vocabulary))
        k = min(OVERLAP_K, vocabulary)
        overlap = shared(p.topk(k).indices, q.topk(k).indices).float().mean(-1)
        ratio = token_logprobs(p, ids) - token_logprobs(q, ids)
        agreement = [float(overlap.sum()), float(entropy(q).sum()), float(ratio.sum()), count]
    return [*cosines, *agreement, float(entropy(own).sum()), count]
