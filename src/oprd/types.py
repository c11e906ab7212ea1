"""The data of one step, one frozen class per arrow:

    PromptBatch --generate--> Rollouts --targets--> TeacherTargets --objective--> loss [N]

Letters in shapes: B completions in a micro-batch, T positions after padding, N supervised tokens,
V vocabulary, D hidden width, L transformer blocks, K entries of a support, C chunk, R bridge rank, G group size.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the student is asked, and what else the dataset says about it."""

    row: int
    """Position in the dataset, from 0."""
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    """The prompt as the student reads it, its chat template applied."""
    answer: str | None = None
    teacher: str | None = None
    """Which of several teachers answers; None when there is only one."""
    completion: str | None = None
    """A given completion, for the off-policy share of the steps."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Every text column of the row, for templates of a privileged teacher prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """The prompts of one step on one process."""

    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """One completion in two tokenizations: tokens of the student's and the teacher's that end at the same byte."""

    teacher_ids: tuple[int, ...]
    """The completion as the teacher reads it."""
    student: tuple[int, ...]
    """Positions in the student's completion, strictly increasing."""
    teacher: tuple[int, ...]
    """Their partners in `teacher_ids`, strictly increasing."""

    def __post_init__(self) -> None:
        assert len(self.student) == len(self.teacher), (len(self.student), len(self.teacher))

    def own(self, length: int) -> "Places":
        """Where the student's completion of `length` tokens is paired."""
        return Places(selected=self.student, at=self.student, selected_length=length)

    def of_teacher(self, length: int) -> "Places":
        """Where the teacher's tokens are paired, `length` being the student's completion."""
        return Places(selected=self.student, at=self.teacher, selected_length=length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The positions of a completion that may be supervised where two tokenizations are paired, as one model has them.

    Which of them are is decided in the student's tokens, so that both models supervise the same ones.
    """

    selected: tuple[int, ...]
    """Position in the student's completion, strictly increasing."""
    at: tuple[int, ...]
    """The same place in this model's completion, strictly increasing."""
    selected_length: int
    """Tokens of the student's completion."""

    def within(self, tokens: "TokenSelection") -> range:
        """Indices of the selected pairs; a selection is one span, so they are in one piece."""
        start, stop = tokens.span(self.selected_length)
        return range(bisect_left(self.selected, start), bisect_left(self.selected, stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedLogprobs:
    """A server's log-probabilities on one completion of T tokens."""

    sampled: Float[Tensor, " T"]
    """Of the tokens themselves, in nats, at temperature 1."""
    top_ids: Int[Tensor, "T K"]
    top_logprobs: Float[Tensor, "T K"]
    """The K most probable tokens of each position; K may be 0."""

    def __post_init__(self) -> None:
        assert len(self.sampled) == len(self.top_ids) == len(self.top_logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkScores:
    """OmniOPD's audit of one completion: its chunks and how much each is to be reinforced."""

    starts: tuple[int, ...]
    """First token of each chunk, increasing; chunks do not overlap."""
    length: int
    """Tokens of every chunk."""
    scores: tuple[float, ...]
    """Target of each chunk less the baseline."""
    under: "Answer | None" = None
    """What the audited teacher attached itself, for the other terms of a mixture."""

    def __post_init__(self) -> None:
        assert len(self.starts) == len(self.scores), (len(self.starts), len(self.scores))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The teacher has no answer on this completion; nothing is learned on it."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRewritten:
    """The teacher's text could not be used, and the student's own completion stands in its place."""

    reason: str


Answer = Pairing | ServedLogprobs | ChunkScores | Lost | NotRewritten
"""Closed union of what a teacher attaches to a completion in `prepare`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """Completions and the prompts they answer, ragged, one entry per completion."""

    prompts: tuple[Prompt, ...]
    completion_ids: tuple[tuple[int, ...], ...]
    """Sampled token ids, the stop token included. May be empty for a completion."""
    finished: tuple[bool, ...]
    """False: cut at the length limit; no end-of-text is invented."""
    answers: tuple[Answer | None, ...] | None = None
    """What the teacher attached to each completion in `prepare`; None where it needs nothing there."""
    logprobs: tuple[tuple[float, ...], ...] | None = None
    """Of each sampled token under the student that wrote it, in nats; given when several updates use these rollouts."""
    sampled: bool = True
    """False: the dataset's own completions."""
    max_tokens: int | None = None
    """The length limit they were written under, where it is known."""

    def __post_init__(self) -> None:
        sizes = (len(self.prompts), len(self.completion_ids), len(self.finished))
        assert len(set(sizes)) == 1, sizes
        assert self.answers is None or len(self.answers) == len(self.prompts), len(self.answers)
        assert self.logprobs is None or tuple(map(len, self.logprobs)) == self.lengths, "one log-probability a token"

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each completion."""
        return tuple(len(ids) for ids in self.completion_ids)

    def take(self, rows: Sequence[int]) -> "Rollouts":
        """The rollouts at `rows`, in that order."""
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in rows),
            completion_ids=tuple(self.completion_ids[i] for i in rows),
            finished=tuple(self.finished[i] for i in rows),
            answers=None if self.answers is None else tuple(self.answers[i] for i in rows),
            logprobs=None if self.logprobs is None else tuple(self.logprobs[i] for i in rows),
        )

    def supervised(self, tokens: "TokenSelection") -> tuple[int, ...]:
        """Supervised tokens of each completion: the selected ones, and of these the paired ones where there are pairs."""
        return tuple(
            len(answer.own(length).within(tokens)) if isinstance(answer, Pairing) else tokens.count(length)
            for answer, length in zip(self.answers or (None,) * len(self), self.lengths, strict=True)
        )

    @property
    def pairings(self) -> tuple[Pairing, ...] | None:
        """The answers when they are pairings, as a local teacher with another tokenizer attaches them."""
        found = tuple(answer for answer in self.answers or () if isinstance(answer, Pairing))
        return found if found and len(found) == len(self) else None

    @property
    def answered(self) -> tuple[bool, ...]:
        """False for a completion on which the teacher's answer was lost: it has no weight."""
        under = [answer.under if isinstance(answer, ChunkScores) else answer for answer in self.answers or ()]
        return tuple(not isinstance(answer, Lost) for answer in under) or (True,) * len(self)


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """The rollouts of all parts behind each other."""
    answered = any(part.answers is not None for part in parts)
    with_logprobs = bool(parts) and all(part.logprobs is not None for part in parts)
    return Rollouts(
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        completion_ids=tuple(ids for part in parts for ids in part.completion_ids),
        finished=tuple(done for part in parts for done in part.finished),
        answers=tuple(a for part in parts for a in part.answers or [None] * len(part)) if answered else None,
        logprobs=tuple(row for part in parts for row in part.logprobs or ()) if with_logprobs else None,
        sampled=all(part.sampled for part in parts),
        max_tokens=parts[0].max_tokens if parts else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """A number of one step that adds up over processes: `total`, or `total / of` where `of` is given."""

    name: str
    """The metric's name, its reduction at the end: `teacher/paired/share`."""
    total: float
    of: float | None = None


LAST_K = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSelection:
    """Which sampled tokens of a completion are supervised. k is cut to the completion's length."""

    keep: Literal["all", "first_k", "last_k", "last"]
    k: int = 0

    @classmethod
    def of(cls, tokens: Literal["all", "first_k", "last_k", "last"], k: int | None) -> "TokenSelection":
        """The selection a config asks for; k is 2000 unless given [paper]."""
        return cls(keep=tokens, k=(k or LAST_K) if tokens.endswith("_k") else 0)

    def span(self, length: int) -> tuple[int, int]:
        """Half-open range of supervised tokens in a completion of `length` tokens."""
        if self.keep == "all":
            return 0, length
        if self.keep == "first_k":
            return 0, min(self.k, length)
        k = 1 if self.keep == "last" else self.k
        return length - min(k, length), length

    def count(self, length: int) -> int:
        start, stop = self.span(length)
        return stop - start


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One hidden state to read off a model: which block, and where."""

    block: int | Literal["last"]
    """1..L, or the model's last, however many it has. L is the state after the final norm, the others are before it
    (Hugging Face's convention)."""
    at: Literal["completion", "prediction", "spans", "written"]
    """`completion`: at the sampled tokens. `prediction`: one to the left, where they are predicted from.
    `spans`: where every token since the last pair is predicted from, up to and with each supervised pair.
    `written`: at the sampled tokens, paired or not; of a teacher, the student as it was before training."""
    tokens: TokenSelection


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Some rollouts as one model reads them, right-padded. The only place that knows about padding and masks."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[int, ...]
    logprobs: tuple[tuple[float, ...], ...] | None = None
    """`Rollouts.logprobs` of these completions."""
    places: tuple[Places, ...] | None = None
    """Of each completion, where two tokenizations are paired; None where every position may be supervised."""

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.attention_mask.shape, (self.input_ids.shape, self.attention_mask.shape)
        assert self.places is None or len(self.places) == len(self.input_ids), len(self.places)
        assert len(self.input_ids) == len(self.prompt_lengths) == len(self.completion_lengths)
        assert min(self.prompt_lengths) >= 1, "the first sampled token needs a position that predicts it"

    @cached_property
    def _masks(self) -> dict[tuple[str, TokenSelection, int], Bool[Tensor, "B T"]]:
        return {}

    def completion_mask(self, tokens: TokenSelection) -> Bool[Tensor, "B T"]:
        """True where a selected sampled token stands (OPRD's positions [code])."""
        return self._mask("completion", tokens, shift=0)

    def prediction_mask(self, tokens: TokenSelection) -> Bool[Tensor, "B T"]:
        """True where a selected sampled token is predicted from: one to the left (the KL family's positions)."""
        return self._mask("prediction", tokens, shift=1)

    def written_mask(self, tokens: TokenSelection) -> Bool[Tensor, "B T"]:
        """True where a selected sampled token stands, whether it is paired or not."""
        return self._mask("written", tokens, shift=0)

    def mask(self, reading: Reading) -> Bool[Tensor, "B T"]:
        return self._mask(reading.at, reading.tokens, shift=0 if reading.at in ("completion", "written") else 1)

    def sampled_ids(self, tokens: TokenSelection) -> Int[Tensor, " N"]:
        """The selected sampled tokens' ids."""
        return pack(self.input_ids, self.completion_mask(tokens))

    def selected(self, tokens: TokenSelection) -> Bool[Tensor, " N"]:
        """Of all sampled tokens, as a server or an audit numbers them, which are selected."""
        return pack(self.completion_mask(tokens), self.completion_mask(TokenSelection(keep="all")))

    def following(self, tokens: TokenSelection) -> tuple[Int[Tensor, " N"], Bool[Tensor, " N"]]:
        """Of each selected token, paired or not, the id of the one written next, and whether there is one."""
        written = self.written_mask(TokenSelection(keep="all"))
        here = self.written_mask(tokens)
        return pack(self.input_ids.roll(-1, 1), here), pack(written.roll(-1, 1), here)

    def rollout_logprobs(self, tokens: TokenSelection) -> Float[Tensor, " N"] | None:
        """The selected sampled tokens' log-probabilities when they were written, in nats; None where none were kept."""
        if self.logprobs is None:
            return None
        selected = [x for row in self.logprobs for x in row[slice(*tokens.span(len(row)))]]
        return torch.tensor(selected, dtype=torch.float32, device=self.input_ids.device)

    def span_ids(self, tokens: TokenSelection) -> Int[Tensor, " M"]:
        """This model's tokens of every supervised span: those since the last pair, up to and with each supervised one.
        Where nothing is paired, every sampled token is a span of its own."""
        return pack(self.input_ids, self._mask("spans", tokens, shift=0))

    def span_numbers(self, tokens: TokenSelection) -> Int[Tensor, " M"]:
        """To which supervised position, of N, each of `span_ids` belongs; rising."""
        if self.places is None:
            count = sum(map(tokens.count, self.completion_lengths))
            return torch.arange(count, device=self.input_ids.device)
        sizes = [
            place.at[pair] - (place.at[pair - 1] if pair else -1)
            for place in self.places
            for pair in place.within(tokens)
        ]
        return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(self.input_ids.device)

    def _mask(self, at: str, tokens: TokenSelection, shift: int) -> Bool[Tensor, "B T"]:
        if (at, tokens, shift) not in self._masks:
            mask = torch.zeros(self.input_ids.shape, dtype=torch.bool)
            for row, (prompt, length) in enumerate(zip(self.prompt_lengths, self.completion_lengths, strict=True)):
                if self.places is None or at == "written":
                    start, stop = tokens.span(length)
                    mask[row, prompt - shift + start : prompt - shift + stop] = True
                    continue
                place = self.places[row]
                pairs = place.within(tokens)
                if at != "spans":
                    mask[row, [prompt - shift + place.at[pair] for pair in pairs]] = True
                elif pairs:
                    first = place.at[pairs[0] - 1] + 1 if pairs[0] else 0
                    mask[row, prompt - shift + first : prompt - shift + place.at[pairs[-1]] + 1] = True
            self._masks[at, tokens, shift] = mask.to(self.input_ids.device)
        return self._masks[at, tokens, shift]


def pack(x: Tensor, mask: Bool[Tensor, "B T"]) -> Tensor:
    """Entries of `x` [B, T, ...] where `mask` holds, as [N, ...]: completion by completion, left to right.

    Two models that read the same completions behind different prompts therefore pack them in the same order.
    """
    return x[mask]


@dataclass(frozen=True, slots=True, kw_only=True)
class LMHead:
    """The map from final hidden states to logits, as plain tensors."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    """Factor on the logits (Granite, Cohere)."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap) (Gemma 2)."""

    def cut(self, vocabulary: int) -> "LMHead":
        """The first `vocabulary` rows: padded vocabularies of equal content share them."""
        if len(self.weight) == vocabulary:
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return LMHead(weight=self.weight[:vocabulary], bias=bias, scale=self.scale, softcap=self.softcap)


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """What was read off one model on one micro-batch."""

    hidden: Mapping[Reading, Float[Tensor, "N D"]]
    head: LMHead | None
    batch: MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTargets:
    """A teacher's hidden states at the supervised tokens, before its LM head. No gradient."""

    hidden: Mapping[Reading, Float[Tensor, "N D"]]
    head: LMHead | None
    """The teacher's head, for objectives that look at distributions; applied chunk by chunk, never kept."""
    batch: MicroBatch | None = None
    """The tokens as the teacher read them, which may be other ones than the student's."""
    start_head: LMHead | None = None
    """The student's head before training, beside its states of then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTargets:
    """What a teacher says about the tokens of the completions. N counts all of them, whatever an objective selects."""

    logprobs: Float[Tensor, " N"]
    """Teacher log-probability of each token, in nats, at temperature 1; 0 where the answer was lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKTargets:
    """A teacher's most probable tokens at every position of the completions, N as in SampledTargets."""

    ids: Int[Tensor, "N K"]
    logprobs: Float[Tensor, "N K"]
    """In nats, at temperature 1, over the whole vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTargets:
    """OmniOPD: how much each token is to be reinforced, N as in SampledTargets, and the student as it was."""

    audited: Bool[Tensor, " N"]
    scores: Float[Tensor, " N"]
    """0 outside the audited chunks."""
    start: HiddenTargets | None
    """States of the student before training, for the anchor; None when its coefficient is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTargets:
    """The teacher said everything by writing the completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JointTargets:
    """Answers of several kinds, for the terms of a mixture."""

    parts: "tuple[TeacherTargets, ...]"


TeacherTargets = HiddenTargets | SampledTargets | TopKTargets | ChunkTargets | TextTargets | JointTargets
"""Closed union of what teachers answer."""


def targets_for(needs: Any, targets: TeacherTargets) -> TeacherTargets:
    """The part of the answer that an objective needs: `needs` is a target type or a union of them."""
    if not isinstance(targets, JointTargets):
        return targets
    return next(part for part in targets.parts if isinstance(part, needs))
