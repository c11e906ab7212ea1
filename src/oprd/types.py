# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""The data of one step, one frozen class per arrow:

    Prompt --source--> Rollouts --teacher--> Targets --objective--> loss [N]

Letters in shapes: B completions of a micro-batch, T positions after padding, N supervised tokens, M all completion
tokens, P aligned tokens, V vocabulary, D width, L blocks, K entries of a support, C chunk, R bridge rank, G group size.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Ragged = tuple[tuple[float, ...], ...]
"""One number per token, one row per completion."""
Author = Literal["student", "teacher", "dataset"]


class Capability(StrEnum):
    """What an objective may require of teacher and source. The values are the words of the error message."""

    HIDDEN = "hidden states"
    DISTRIBUTIONS = "next-token distributions over the whole vocabulary"
    LOGPROBS = "log-probabilities of given tokens"
    TOP_K = "its most probable tokens"
    TEXT = "text"
    SAME_SHAPE = "the student's number of blocks and width"
    SAME_TOKENIZER = "the student's tokenizer"
    ONE_MODEL = "a single model in this process"
    ON_POLICY = "tokens sampled from the student's own distribution"
    TEACHER_TEXT = "completions written by the teacher or the dataset"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A row of the dataset, rendered once for the student and once for its teacher."""

    row: int
    """Position in the dataset, from 0."""
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    """The student's prompt, chat template applied."""
    teacher_messages: tuple[Message, ...] = ()
    """The conversation the teacher sees: another system prompt or user message where the recipe asks for it."""
    teacher_token_ids: tuple[int, ...] = ()
    """`teacher_messages` in the teacher's template and tokens; empty for a server without a tokenizer."""
    answer: str | None = None
    teacher: str | None = None
    """Name of this prompt's teacher; None if there is only one."""
    completion: str | None = None
    """The dataset's completion, for off-policy steps."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Text columns of the row, for templates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSelection:
    """Which tokens of a completion are supervised, counted in the student's tokens. k is cut to the length."""

    keep: Literal["all", "first", "last"] = "all"
    k: int = 0

    def span(self, length: int) -> tuple[int, int]:
        """Half-open range of supervised tokens in a completion of `length` tokens."""
        if self.keep == "all":
            return 0, length
        return (0, min(self.k, length)) if self.keep == "first" else (length - min(self.k, length), length)

    def count(self, length: int) -> int:
        start, stop = self.span(length)
        return stop - start


ALL_TOKENS = TokenSelection()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAlignment:
    """One completion in two tokenizations. Aligned tokens end at the same byte."""

    teacher_ids: tuple[int, ...]
    student_length: int
    student_index: tuple[int, ...]
    """Aligned positions in the student's completion, strictly increasing."""
    teacher_index: tuple[int, ...]
    """Their positions in `teacher_ids`, strictly increasing."""

    def __post_init__(self) -> None:
        assert len(self.student_index) == len(self.teacher_index), (len(self.student_index), len(self.teacher_index))

    def within(self, tokens: TokenSelection) -> range:
        """Indices of the aligned pairs inside the selection."""
        start, stop = tokens.span(self.student_length)
        return range(bisect_left(self.student_index, start), bisect_left(self.student_index, stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobTargets:
    """A server's log-probabilities, in nats at temperature 1, over all M tokens (T of one completion). No gradient."""

    sampled: Float[Tensor, " M"]
    top_ids: Int[Tensor, "M K"]
    top_logprobs: Float[Tensor, "M K"]
    """The K most probable tokens of each position; K may be 0."""

    def __post_init__(self) -> None:
        assert len(self.sampled) == len(self.top_ids) == len(self.top_logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """Completions and the prompts they answer, ragged, one entry per completion, with what was annotated on them."""

    prompts: tuple[Prompt, ...]
    completion_ids: tuple[tuple[int, ...], ...]
    """Token ids, the stop token included. May be empty."""
    finished: tuple[bool, ...]
    """False: cut at the length limit; no end of text is invented."""
    written_by: Author = "student"
    rewritten: tuple[bool, ...] | None = None
    """True where the teacher's rewrite replaced the student's completion; None if nothing was to be rewritten."""
    token_weights: Ragged | None = None
    """Share of each token in the loss; 0: nothing is learned from it. None: all 1."""
    token_scores: Ragged | None = None
    """Score by which a token is reinforced; NaN where it has none (OmniOPD)."""
    sampling_logprobs: Ragged | None = None
    """Log-probability of each token under the weights that sampled it, in nats, for importance weights."""
    alignments: tuple[TokenAlignment, ...] | None = None
    """None: the teacher shares the student's tokenizer."""
    logprobs: tuple[LogprobTargets | None, ...] | None = None
    """A server's log-probabilities of each completion; None for those of a local teacher among several."""
    max_new_tokens: int | None = None
    """Length limit they were written under, where known."""
    staleness: int = 0  # steps learned since the weights that wrote them

    def __post_init__(self) -> None:
        sizes = {len(self.prompts), len(self.completion_ids), len(self.finished)}
        assert len(sizes) == 1, sizes
        for ragged in (self.token_weights, self.token_scores, self.sampling_logprobs):
            assert ragged is None or tuple(map(len, ragged)) == self.lengths, "one number per token"

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each completion."""
        return tuple(map(len, self.completion_ids))

    @property
    def positions(self) -> tuple[int, ...]:
        """Tokens of each prompt and its completion together, in the student's tokens."""
        return tuple(len(prompt.token_ids) + n for prompt, n in zip(self.prompts, self.lengths, strict=True))

    def take(self, rows: Sequence[int]) -> "Rollouts":
        """The rollouts at `rows`, in that order."""
        return replace(self, **{name: _take(getattr(self, name), rows) for name in PER_COMPLETION})


PER_COMPLETION = tuple(f.name for f in fields(Rollouts) if f.name not in {"written_by", "max_new_tokens", "staleness"})


def _take(values: tuple[Any, ...] | None, rows: Sequence[int]) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values[i] for i in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenSpec:
    """One hidden state to tap: which block, at which position, for which tokens."""

    block: int | Literal["last"]
    """1..L, or the model's last. Block L is tapped after the final norm, the others before it."""
    at: Literal["token", "predicting"]
    """`token`: at the sampled token. `predicting`: one position to the left, where it is predicted."""
    tokens: TokenSelection


@dataclass(frozen=True, slots=True, kw_only=True)
class Taps:
    """Hidden states to tap off one model, and whether its LM head takes part."""

    hidden: tuple[HiddenSpec, ...] = ()
    head: bool = False

    def __or__(self, other: "Taps") -> "Taps":
        return Taps(hidden=tuple(dict.fromkeys(self.hidden + other.hidden)), head=self.head or other.head)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rollouts as one model reads them, right-padded. The only class that knows positions, padding and masks."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[int, ...]
    """In this model's tokens."""
    alignments: tuple[TokenAlignment, ...] | None = None
    reads: Literal["student", "teacher"] = "student"
    """Whose tokens these are; a teacher with its own tokenizer is tapped at its aligned tokens only."""
    token_scores: Ragged | None = None
    sampling_logprobs: Ragged | None = None

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.attention_mask.shape, (self.input_ids.shape, self.attention_mask.shape)
        assert len(self.input_ids) == len(self.prompt_lengths) == len(self.completion_lengths)
        assert min(self.prompt_lengths) >= 1, "the first sampled token needs a position that predicts it"

    @cached_property
    def _positions(self) -> dict[tuple[TokenSelection, int], Tensor]:
        return {}

    def gather(self, x: Tensor, spec: HiddenSpec) -> Tensor:
        """Entries of `x`, [B, T, ...] or packed [1, X, ...], at the spec's positions, as [N, ...]: completion by completion,
        left to right."""
        at = self.positions(spec.tokens, shift=int(spec.at == "predicting"))
        return x.flatten(0, 1)[at if x.shape[:2] == self.input_ids.shape else self._packed_at[at]]

    def packed(self) -> tuple[Int[Tensor, "1 X"], Int[Tensor, "1 X"]]:
        """All rows behind each other without padding: their X ids, and positions that start anew with each row."""
        kept = self.attention_mask.bool()
        return self.input_ids[kept][None], (self.attention_mask.cumsum(1) - 1)[kept][None]

    @cached_property
    def _packed_at(self) -> Tensor:
        """Where each flat position is when packed."""
        return self.attention_mask.flatten().cumsum(0) - 1

    def positions(self, tokens: TokenSelection, *, shift: int = 0) -> Int[Tensor, " N"]:
        """Flat positions b * T + t of the selected tokens, `shift` to the left."""
        if (tokens, shift) not in self._positions:  # every tapped block asks
            starts = [row * self.input_ids.shape[1] + n - shift for row, n in enumerate(self.prompt_lengths)]
            flat = [start + at for row, start in enumerate(starts) for at in self._selected(row, tokens)]
            self._positions[tokens, shift] = self._tensor(flat)
        return self._positions[tokens, shift]

    def sampled_ids(self, tokens: TokenSelection) -> Int[Tensor, " N"]:
        """Ids of the selected tokens."""
        return self.input_ids.flatten()[self.positions(tokens)]

    def next_ids(self, tokens: TokenSelection) -> tuple[Int[Tensor, " N"], Bool[Tensor, " N"]]:
        """Id of the token after each selected one, and whether there is one."""
        exists = [at + 1 < n for row, n in enumerate(self.completion_lengths) for at in self._selected(row, tokens)]
        return self.input_ids.roll(-1, 1).flatten()[self.positions(tokens)], self._tensor(exists, torch.bool)

    def selected(self, tokens: TokenSelection) -> Bool[Tensor, " M"]:
        """Of all completion tokens, as a server numbers them: True for the selected ones."""
        spans = [(n, *tokens.span(n)) for n in self.completion_lengths]
        return self._tensor([start <= at < stop for n, start, stop in spans for at in range(n)], torch.bool)

    def ragged(self, values: Ragged, tokens: TokenSelection) -> Float[Tensor, " N"]:
        """Numbers of the selected tokens, on the batch's device."""
        return self._tensor([x for row in values for x in row[slice(*tokens.span(len(row)))]], torch.float32)

    def aligned(self, tokens: TokenSelection) -> Bool[Tensor, " N"]:
        """Of the student's selected tokens: True where the teacher has a token that ends at the same byte."""
        ends = [range(n) for n in self.completion_lengths]
        ends = ends if self.alignments is None else [set(alignment.student_index) for alignment in self.alignments]
        spans = [tokens.span(n) for n in self.completion_lengths]
        return self._tensor(
            [at in own for own, span in zip(ends, spans, strict=True) for at in range(*span)], torch.bool
        )

    def spans(self, tokens: TokenSelection) -> Int[Tensor, " N"]:
        """Number, of P, of the aligned token that ends each selected token's span; -1 behind a completion's last."""
        aligned = self.aligned(tokens).tolist()
        numbers, row_start, done = [-1] * len(aligned), 0, 0
        for count in map(tokens.count, self.completion_lengths):
            start = row_start
            for at in range(row_start, row_start + count):
                if aligned[at]:
                    numbers[start : at + 1] = [done] * (at + 1 - start)
                    start, done = at + 1, done + 1
            row_start += count
        return self._tensor(numbers)

    def _selected(self, row: int, tokens: TokenSelection) -> Sequence[int]:
        if self.reads == "student" or self.alignments is None:
            return range(*tokens.span(self.completion_lengths[row]))
        alignment = self.alignments[row]
        return [alignment.teacher_index[pair] for pair in alignment.within(tokens)]

    def _tensor(self, values: Sequence[float], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.input_ids.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class LMHead:
    """The map from final hidden states to logits, as plain tensors."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    """Factor on the logits."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap)."""
    stops: tuple[int, ...] = ()
    """Token ids that are one action: each gets an equal share of their probability, so that divergences see the sum alone."""

    def first_rows(self, vocabulary: int) -> "LMHead":
        """The first `vocabulary` rows: padded vocabularies of equal content share them."""
        bias = None if self.bias is None else self.bias[:vocabulary]
        return replace(self, weight=self.weight[:vocabulary], bias=bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenStates:
    """What was tapped off one model on one micro-batch."""

    hidden: Mapping[HiddenSpec, Float[Tensor, "_ _"]]
    """[N, D] each; [P, D] for a teacher with another tokenizer."""
    head: LMHead | None
    batch: Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What student states are compared with on one micro-batch. No gradient."""

    teacher: HiddenStates | None = None
    """A teacher in reach; its LM head is applied chunk by chunk and never kept as logits."""
    logprobs: LogprobTargets | None = None
    """A server's, over all M completion tokens."""
    reference: HiddenStates | None = None
    """The initial student, or the model the teacher was trained from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number of one step that adds up over ranks: `sum`, or `sum / count` where a count is given."""

    name: str
    """Ends in its reduction: `teacher/aligned/share`."""
    sum: float
    count: float | None = None
