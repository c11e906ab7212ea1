"""Teachers in this process: a frozen model, or the initial student under another prompt. Tapped before the LM head."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Literal, final

import torch

from oprd.data.alignment import Aligner
from oprd.data.batching import student_batch, teacher_batch
from oprd.data.chat import decode_written, encode_written, end_of_turn, render
from oprd.errors import ConfigError
from oprd.losses.chunked import logprobs_of
from oprd.models.generate import Sampling, generate
from oprd.models.language_model import Model
from oprd.models.loading import ModelFacts, load_frozen, missing_in_common
from oprd.models.probe import Use, packing
from oprd.models.quantization import require_bitsandbytes
from oprd.progress import console
from oprd.seeds import derive_seed
from oprd.teacher.base import (
    Chains,
    Generation,
    Generations,
    Teacher,
    TeacherConfig,
    TeacherContext,
    TeacherFacts,
)
from oprd.types import (
    ALL_TOKENS,
    Capability,
    HiddenSpec,
    HiddenStates,
    LogprobTargets,
    Metric,
    Rollouts,
    Taps,
    Targets,
    TokenAlignment,
)

LOCAL = frozenset(Capability) - {Capability.ON_POLICY, Capability.TEACHER_TEXT}
"""All but what sources provide."""
FEW_ALIGNED = 0.2
"""Share of aligned tokens below which the user is warned, once."""


@final
@dataclass(eq=False)
class LocalTeacher(Teacher):
    """Runs a model's blocks on the teacher's prompt and the student's completion.

    With another tokenizer it reads its own tokens of the completion, aligned with the student's.
    """

    model: Model
    _: KW_ONLY
    context: int
    """Most tokens of prompt and generation."""
    same_shape: bool = True
    aligner: Aligner | None = None
    cache_tokens: int = 131_072
    seed: int = 0
    template: Mapping[str, Any] | None = None
    """Variables of its chat template."""
    _aligned: int = field(default=0, init=False)
    _of: int = field(default=0, init=False)
    _beyond: int = field(default=0, init=False)
    _warned: set[str] = field(default_factory=set, init=False)

    def annotate(self, rollouts: Rollouts) -> Rollouts:
        if self.aligner is None:
            return rollouts
        together = zip(rollouts.completion_ids, rollouts.finished, strict=True)
        whole = [self.aligner.align(ids, finished=finished) for ids, finished in together]
        rooms = [self.context - len(prompt.teacher_token_ids) for prompt in rollouts.prompts]
        alignments = tuple(map(_within, whole, rooms))
        self._aligned, self._of = sum(len(one.student_index) for one in alignments), sum(rollouts.lengths)
        self._beyond = sum(len(one.teacher_ids) > room for one, room in zip(whole, rooms, strict=True))
        if self._beyond:
            self._warn(
                "beyond",
                f"{self._beyond} of {len(whole)} completions are longer in the tokens of teacher {self.model.lm.name} than its "
                f"context of {self.context} holds behind the prompt; what is beyond it is not supervised "
                "(teacher/beyond_context/sum). Lower max_completion_length.",
            )
        if self._aligned < FEW_ALIGNED * self._of:
            self._warn(
                "few",
                f"Only {self._aligned / self._of:.0%} of the tokens end where one of teacher {self.model.lm.name} "
                "ends; the others are not supervised. A teacher with a closer tokenizer would say more.",
            )
        return replace(rollouts, alignments=alignments)

    def targets(self, rollouts: Rollouts, taps: Taps) -> Targets:
        if not taps.hidden:
            return Targets()
        batch = teacher_batch(rollouts, pad_id=self.model.lm.pad_id, device=self.model.lm.device)
        if rollouts.alignments is None:
            return Targets(teacher=self.model.hidden(batch, taps))
        # where a token is predicted, tokens of two tokenizers do not correspond; their sums over spans do
        states = tuple(spec for spec in taps.hidden if spec.at == "token")
        logprobs = self._span_logprobs(rollouts) if len(states) < len(taps.hidden) else None
        hidden = self.model.hidden(batch, Taps(hidden=states, head=taps.head)) if states else None
        return Targets(teacher=hidden, logprobs=logprobs)

    def generate(self, chains: Chains) -> Generations:
        """A request that leaves no room for its answer in the context is not answered."""
        tokenizer, requests = self.model.lm.tokenizer, [request for chain in chains for request in chain]
        ids = [(*render(tokenizer, r.messages, self.template), *encode_written(tokenizer, r.prefix)) for r in requests]
        together: dict[Sampling, list[int]] = defaultdict(list)
        for i, r in enumerate(requests):
            if len(ids[i]) + r.max_new_tokens <= self.context:
                sampling = Sampling(temperature=r.temperature, max_new_tokens=r.max_new_tokens, samples=r.samples)
                together[sampling].append(i)
        done: dict[int, Generation] = {}
        for sampling, rows in together.items():
            n, prompts = sampling.samples, [ids[i] for i in rows]
            seeds = [derive_seed(seed, number) for seed in self._seeds(prompts) for number in range(n)]
            completions = generate(self.model, prompts, sampling, seeds=seeds, cache_tokens=self.cache_tokens)
            done |= {i: self._generation(completions[n * at : n * at + n]) for at, i in enumerate(rows)}
        answers = iter(done.get(i) for i in range(len(requests)))
        return [[next(answers) for _ in chain] for chain in chains]

    def _seeds(self, prompts: Sequence[tuple[int, ...]]) -> list[int]:
        """A seed for each, from its text alone: the same request is answered alike after a resume and on any process.
        Equal ones of one call are different draws."""
        seen: Counter[tuple[int, ...]] = Counter()
        seeds = []
        for ids in prompts:
            seeds.append(derive_seed(self.seed, "teacher", *ids, seen[ids]))
            seen[ids] += 1
        return seeds

    def comparable(self, rollouts: Rollouts, specs: Sequence[HiddenSpec]) -> tuple[HiddenSpec, ...]:
        if self.aligner is not None:
            return ()
        return tuple(spec for spec in specs if self.same_shape or spec.block == "last")

    def metrics(self) -> tuple[Metric, ...]:
        if self.aligner is None:
            return ()
        return (
            Metric(name="teacher/aligned/share", sum=float(self._aligned), count=float(self._of)),
            Metric(name="teacher/beyond_context/sum", sum=float(self._beyond)),
        )

    def _warn(self, kind: str, text: str) -> None:
        """Print the first warning of each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            console.print(text, style="yellow")

    def _span_logprobs(self, rollouts: Rollouts) -> LogprobTargets:
        """At each aligned token of the student, the teacher's log-probability of the text since the last one."""
        assert rollouts.alignments is not None
        # without alignments the batch taps every token
        ids = tuple(alignment.teacher_ids for alignment in rollouts.alignments)
        own = Rollouts(prompts=rollouts.prompts, completion_ids=ids, finished=rollouts.finished)
        batch = teacher_batch(own, pad_id=self.model.lm.pad_id, device=self.model.lm.device)
        spec = HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS)
        states = self.model.hidden(batch, Taps(hidden=(spec,), head=True))
        assert states.head is not None
        logprobs = logprobs_of(states.hidden[spec], states.head, batch.sampled_ids(ALL_TOKENS))
        sampled, first = logprobs.new_zeros(sum(rollouts.lengths)), 0
        for row, alignment in zip(logprobs.split(own.lengths), rollouts.alignments, strict=True):
            start = 0
            for at, end in zip(alignment.student_index, alignment.teacher_index, strict=True):
                sampled[first + at] = row[start : end + 1].sum()
                start = end + 1
            first += alignment.student_length
        none = sampled.new_zeros(len(sampled), 0)
        return LogprobTargets(sampled=sampled, top_ids=none.long(), top_logprobs=none)

    def _generation(self, completions: Sequence[tuple[int, ...]]) -> Generation:
        lm = self.model.lm
        return Generation(
            texts=tuple(decode_written(lm.tokenizer, ids) for ids in completions),
            finished=tuple(bool(ids) and ids[-1] in lm.stop_ids for ids in completions),
            tokens=sum(map(len, completions)),
        )


def _within(alignment: TokenAlignment, room: int) -> TokenAlignment:
    """The alignment with the first `room` tokens of the teacher."""
    pairs = bisect_left(alignment.teacher_index, room)
    return replace(
        alignment,
        teacher_ids=alignment.teacher_ids[:room],
        student_index=alignment.student_index[:pairs],
        teacher_index=alignment.teacher_index[:pairs],
    )


@final
@dataclass(frozen=True, slots=True)
class Reference:
    """The model that hidden states before training are tapped from; it reads the student's prompt and tokens."""

    model: Model

    def states(self, rollouts: Rollouts, taps: Taps) -> HiddenStates | None:
        """Hidden states at the student's tokens; None if nothing is tapped."""
        if not taps.hidden:
            return None
        batch = student_batch(rollouts, pad_id=self.model.lm.pad_id, device=self.model.lm.device)
        return self.model.hidden(batch, taps)


class LocalTeacherConfig(TeacherConfig):
    """A frozen model in this process."""

    type: Literal["local"] = "local"
    model: str
    """Folder or Hub name."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of its weights and computation."""
    device: str | None = None
    """`cuda:1`; None: the student's."""
    quantization: Literal["8bit", "4bit"] | None = None
    """bitsandbytes, through transformers; 4bit is NF4."""
    offload: bool = False
    """Its weights wait in CPU memory and are copied to the GPU for every pass: seconds for memory. Not if quantized."""

    def facts(self, context: TeacherContext) -> TeacherFacts:
        if self.quantization is not None:
            require_bitsandbytes("teacher.quantization")
        device, given = torch.device(self.device or context.device), context.given.get("model")
        if self.offload and (self.quantization is not None or device.type == "cpu" or given is not None):
            raise ConfigError(
                "teacher.offload copies the weights of a teacher loaded by name from CPU memory to a GPU, and not quantized ones "
                f"(here: on {device.type}, quantization {self.quantization}); drop it"
            )
        tokenizer = context.given.get("tokenizer") or (context.student.tokenizer if given is not None else None)
        model = ModelFacts.read(given if given is not None else self.model, tokenizer)
        why_not = missing_in_common(context.student, model)
        if Capability.SAME_TOKENIZER in why_not:
            _aligner(context.student, model)
        return TeacherFacts(provides=LOCAL.difference(why_not), why_not=why_not, model=model)

    def build(self, facts: TeacherFacts, context: TeacherContext, name: str = "") -> Teacher:
        assert facts.model is not None
        needs, aligned = context.needs, Capability.SAME_TOKENIZER not in facts.provides
        device = torch.device(self.device) if self.device else context.device
        model = load_frozen(
            context.given.get("model", self.model), facts.model.tokenizer, device, dtype=getattr(torch, self.dtype),
            held="in CPU memory" if self.offload else self.quantization, use=Use(taps=needs.taps | Taps(head=needs.diagnostics), text=needs.text),
            pair_stops=() if aligned else context.pair_stops,
        )  # fmt: skip
        with model.in_place():
            model.lm = packing(model.lm, context.packing)
        return make_local(model, facts, context, self.chat_template_kwargs)


def make_local(
    model: Model, facts: TeacherFacts, context: TeacherContext, template: Mapping[str, Any] | None
) -> LocalTeacher:
    """The teacher that reads through this model, with an aligner where its tokenizer is another."""
    assert facts.model is not None
    aligned = Capability.SAME_TOKENIZER not in facts.provides
    return LocalTeacher(
        model, context=facts.model.context, same_shape=Capability.SAME_SHAPE in facts.provides,
        aligner=_aligner(context.student, facts.model) if aligned else None,
        cache_tokens=context.cache_tokens, seed=context.seed, template=template,
    )  # fmt: skip


class SelfTeacherConfig(TeacherConfig):
    """The initial student under another prompt: the first weights of its adapter, or a frozen copy."""

    type: Literal["self"] = "self"

    uses_initial_student: ClassVar[bool] = True

    def facts(self, context: TeacherContext) -> TeacherFacts:
        if (self.system_prompt, self.prompt_template, self.chat_template_kwargs) == (None, None, None):
            raise ConfigError(
                "a self teacher with the student's own prompt agrees with the student everywhere; "
                "give system_prompt or prompt_template, or chat_template_kwargs of its own"
            )
        return TeacherFacts(provides=LOCAL, why_not={}, model=context.student)

    def build(self, facts: TeacherFacts, context: TeacherContext, name: str = "") -> Teacher:
        if context.sharded and context.needs.text:
            raise ConfigError(
                "a self teacher that writes needs whole weights on every rank; use DDP, or a local teacher with the "
                "student's weights"
            )
        return LocalTeacher(
            context.initial_student, context=context.student.context, cache_tokens=context.cache_tokens,
            seed=context.seed, template=self.chat_template_kwargs,
        )  # fmt: skip


def _aligner(student: ModelFacts, teacher: ModelFacts) -> Aligner:
    """Raises TeacherMismatch for a kind of tokenizer whose bytes are not known."""
    end = end_of_turn(teacher.tokenizer, teacher.stop_ids)
    return Aligner(
        student.tokenizer, teacher.tokenizer, student_stops=student.stop_ids, teacher_end=end, teacher_name=teacher.name,
        teacher_rows=teacher.vocabulary,
    )  # fmt: skip
