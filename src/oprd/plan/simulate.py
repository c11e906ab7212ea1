"""One step of a recipe on tensors without content: its own code and models, with memory and FLOPs by part."""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast, final
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import masking_utils

from oprd.algorithm import Distillation
from oprd.clock import Clock
from oprd.data.batching import rows_by_tokens
from oprd.distributed import Ranks
from oprd.models import language_model
from oprd.models.language_model import Model, evaluating
from oprd.plan.meter import ELSEWHERE, Meter, without_content
from oprd.recipe import Recipe
from oprd.rollout.sources import Source
from oprd.student import InitialStudent, Student
from oprd.teacher.base import Chains, Generations, Teacher, TeacherContext
from oprd.teacher.local import LocalTeacher
from oprd.train.pair import Given
from oprd.train.setup import Checked, build_reference, build_student
from oprd.types import Capability, HiddenStates, LogprobTargets, Prompt, Rollouts, Taps, Targets, TokenAlignment

WEIGHTS, GRADIENTS, OPTIMIZER, FROZEN = "student's weights", "gradients", "optimizer", "frozen models"
STATES, ACTIVATIONS, LOSS, BACKWARD = "teacher's states", "activations", "loss and LM heads", "backward pass"
CACHE, SAMPLING = "key-value cache", "sampling"
COPIES = 6
"""Of a token's logits, in float32, between the forward pass and the sampled token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A step of one process whose completions are all as long as allowed."""

    update: Counter[str]
    """Bytes by part where teacher and update hold most."""
    rollout: Counter[str]
    """Bytes by part where the student, or an evaluation of it, holds most while it writes."""
    flops: Counter[str]
    """`teacher` and `update` of the whole step; `token`: of one more token of every completion that is written at once."""
    rows: int
    """Completions of a micro-batch."""
    at_once: int
    """Completions that are written together in training."""
    completions: int
    longest: int
    """Tokens of the longest prompt and the longest completion of training together."""
    read: int
    """Bytes that are read to write one token: the writing model, and the cache when it is half full."""
    gathered: int
    """Bytes of weights that a sharded student holds whole at once: its largest block, and what stands outside the blocks."""


def simulate(recipe: Recipe, checked: Checked, processes: int, *, buckets: bool) -> Simulated:
    """Load, write a token and update once, as one of so many processes. `buckets`: DDP holds all gradients at any time."""
    meter = Meter()
    with alone(bf16=recipe.bf16 is True) as accelerator, without_content(), meter:
        with meter.part(FROZEN):
            method = load(recipe, checked, accelerator, meter)
        gc.collect()  # the checks at load leave circles
        student = method.student
        meter.move(_tensors(student), WEIGHTS)
        with meter.part(OPTIMIZER):
            fill_optimizer(student)
        with meter.part(GRADIENTS):
            reduced = [torch.zeros_like(x) for x in student.wrapper.parameters() if buckets and x.requires_grad]
        rollout, flops, at_once, read = _write(recipe, checked, student, meter, processes)
        step = longest_step(recipe, checked, student, processes)
        micros = rows_by_tokens(step, recipe.micro_batch_tokens, packed=student.lm.packs)
        clock = _Parts(meter, accelerator.device)
        with (
            _watched(meter, student, ELSEWHERE if reduced else GRADIENTS),
            _masks(packed=student.lm.packs),
            _inputs_in_cpu_memory(meter),
        ):
            meter.forget_peak()
            method.update(step.take([row for rows in micros[:2] for row in rows]), 1, clock)
    for name, count in clock.flops.items():
        flops[name] = round(count * len(micros) / min(2, len(micros)))
    return Simulated(
        update=meter.peak,
        rollout=rollout,
        flops=flops,
        rows=max(map(len, micros)),
        at_once=at_once,
        completions=len(step),
        longest=max(step.positions),
        read=read,
        gathered=_gathered(student),
    )


@contextmanager
def alone(*, bf16: bool) -> Iterator[Accelerator]:
    """One process on a CPU, whatever was launched; what accelerate knew of that comes back."""
    states = (PartialState, AcceleratorState)
    launched = [dict(state._shared_state) for state in states]
    one = {"num_processes": 1, "process_index": 0, "local_process_index": 0, "distributed_type": DistributedType.NO}
    AcceleratorState._shared_state.clear()
    PartialState._shared_state |= one | {"_cpu": True, "backend": None, "device": torch.device("cpu"), "debug": False}
    try:
        yield Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
    finally:
        for state, before in zip(states, launched, strict=True):
            state._shared_state.clear()
            state._shared_state.update(before)


def _tensors(model: Model) -> list[Tensor]:
    return [*model.lm.model.parameters(), *model.lm.model.buffers()]


def _inputs_in_cpu_memory(meter: Meter) -> AbstractContextManager[object]:
    """Where the blocks' inputs wait in CPU memory, they take none of the device."""

    def pack(x: Tensor) -> Tensor:
        with meter.part(ELSEWHERE):
            return x.clone()

    return patch.object(language_model, "save_on_cpu", lambda **_: saved_tensors_hooks(pack, Tensor.clone))


@contextmanager
def _masks(*, packed: bool) -> Iterator[None]:
    """transformers makes a mask for tensors without content; for real ones only where rows are packed."""
    with patch.object(masking_utils, "is_tracing", lambda *_: packed):
        yield


def load(recipe: Recipe, checked: Checked, accelerator: Accelerator, meter: Meter) -> Distillation:
    """The models of a step, as setup loads them; nobody writes."""
    initial, context = InitialStudent(), checked.context
    context = replace(context, initial_student=initial, device=accelerator.device, given={})
    teacher = _teacher(recipe, checked, context, meter)
    checked = replace(checked, context=context)
    student = build_student(recipe, Given(), checked, accelerator, initial)
    for one, _ in teacher.teachers:
        if isinstance(one, LocalTeacher) and one.model.lm.computes_on:
            meter.move(_tensors(one.model), ELSEWHERE)  # but for the length of a pass
    return Distillation(
        source=_Nobody(), teacher=teacher, student=student, ranks=Ranks(accelerator),
        reference=build_reference(checked, initial, teacher, accelerator.device),
        micro_batch_tokens=recipe.micro_batch_tokens,
    )  # fmt: skip


def fill_optimizer(student: Student) -> None:
    """The optimizer's state, as after the first step."""
    for parameter in student.wrapper.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    student.optimizer.step()
    student.optimizer.zero_grad()


def _teacher(recipe: Recipe, checked: Checked, context: TeacherContext, meter: Meter) -> "_Told":
    """The teacher, of several the first one in reach; all in reach are held, each on its own device or the student's."""
    built, mine = list[tuple[Teacher, str]](), checked.context.device
    for name, facts in (checked.teacher.members or {"": checked.teacher}).items():
        config, part = recipe.teacher.members[name], FROZEN
        own = torch.device(getattr(config, "device", None) or mine)
        if own != mine:
            config = config.model_copy(update={"device": None})
            part = FROZEN if (own.type, own.index or 0) == (mine.type, mine.index or 0) else ELSEWHERE
        if Capability.HIDDEN in facts.provides:
            with meter.part(part):
                built.append((config.build(facts, context, name), part))
    return _Told(built, meter)


@final
class _Told(Teacher):
    """The first of the teachers in reach; without one, what a server has said."""

    def __init__(self, teachers: Sequence[tuple[Teacher, str]], meter: Meter) -> None:
        self.teachers, self._meter = teachers, meter

    def targets(self, rollouts: Rollouts, taps: Taps) -> Targets:
        if self.teachers:
            teacher, part = self.teachers[0]
            if part != ELSEWHERE:
                return teacher.targets(rollouts, taps)
            with self._meter.part(ELSEWHERE):
                found = teacher.targets(rollouts, taps)
            return found if found.teacher is None else replace(found, teacher=_copied(found.teacher))
        given = rollouts.logprobs or ()
        names = ("sampled", "top_ids", "top_logprobs")
        joined = (
            {name: torch.cat([getattr(x, name) for x in given if x is not None]) for name in names} if given else {}
        )
        return Targets(logprobs=LogprobTargets(**joined) if joined else None)

    def generate(self, chains: Chains) -> Generations:
        return [[None] * len(chain) for chain in chains]


def _copied(states: HiddenStates) -> HiddenStates:
    """What another device hands over."""
    head = None if states.head is None else replace(states.head, weight=states.head.weight.clone())
    return replace(states, hidden={spec: x.clone() for spec, x in states.hidden.items()}, head=head)


@final
class _Nobody(Source):
    """Nothing is written: the step gets its completions."""

    def rollouts(self, prompts: Any, sampling: Any, step: int) -> tuple[Rollouts, Rollouts]:
        raise NotImplementedError


@final
class _Parts(Clock):
    """Parts and FLOPs of the sections of an update."""

    def __init__(self, meter: Meter, device: torch.device) -> None:
        super().__init__(device)
        self._meter = meter
        self.flops: Counter[str] = Counter()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        before = self._meter.flops
        with self._meter.part({"teacher": STATES}.get(name, BACKWARD)):
            yield
        self.flops[name] += self._meter.flops - before


@contextmanager
def _watched(meter: Meter, student: Student, gradients: str) -> Iterator[None]:
    """Tell the parts of the student's update apart."""
    body, wrapper, optimizer = student.lm.backbone, student.wrapper, student.optimizer
    trained = [parameter for parameter in wrapper.parameters() if parameter.requires_grad]
    handles = [
        wrapper.register_forward_pre_hook(lambda *_: meter.enter(LOSS)),
        body.register_forward_pre_hook(lambda *_: meter.enter(ACTIVATIONS)),
        body.register_forward_hook(lambda *_: meter.enter(LOSS)),
        wrapper.register_forward_hook(lambda *_: meter.enter(BACKWARD)),
        optimizer.register_step_pre_hook(lambda *_: meter.enter(OPTIMIZER)),
        *(p.register_post_accumulate_grad_hook(lambda p: meter.move([p.grad], gradients)) for p in trained),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def longest_step(recipe: Recipe, checked: Checked, student: Student, processes: int) -> Rollouts:
    """The step of one process: the longest prompt, and completions as long as allowed, with all that may be annotated."""
    prompt = _longest(checked.context.prompts)
    rows, n = recipe.prompts_per_step * recipe.rollout.group_size // processes, recipe.rollout.max_completion_length
    every = tuple(range(n))
    alignment = TokenAlignment(teacher_ids=(0,) * n, student_length=n, student_index=every, teacher_index=every)
    objectives, facts = student.objectives, next(iter((checked.teacher.members or {"": checked.teacher}).values()))
    local, k = Capability.HIDDEN in facts.provides, max(o.top_k_of_teacher for o in objectives)
    told = None if local else LogprobTargets(
        sampled=torch.zeros(n), top_ids=torch.zeros(n, k, dtype=torch.long), top_logprobs=torch.zeros(n, k)
    )  # fmt: skip
    apart = local and Capability.SAME_TOKENIZER not in facts.provides
    weighted = recipe.rollout.updates_per_rollout > 1 and any(o.importance_weighted for o in objectives)
    numbers = ((1.0,) * n,) * rows
    return Rollouts(
        prompts=(prompt,) * rows,
        completion_ids=((0,) * n,) * rows,
        finished=(False,) * rows,
        written_by="teacher" if recipe.rollout.source.writes_by_teacher else "student",
        token_scores=numbers if any(o.writes_scores for o in objectives) else None,
        sampling_logprobs=numbers if weighted else None,
        alignments=(alignment,) * rows if apart else None,
        logprobs=None if told is None else (told,) * rows,
    )


def _longest(prompts: Sequence[Prompt]) -> Prompt:
    return max(prompts, key=lambda prompt: max(len(prompt.token_ids), len(prompt.teacher_token_ids)))


@torch.no_grad()
def _write(
    recipe: Recipe, checked: Checked, student: Student, meter: Meter, processes: int
) -> tuple[Counter[str], Counter[str], int, int]:
    """(bytes by part, FLOPs of a token, completions at once, bytes read for a token): the last token of as many as are written
    together, in training or, if that holds more, in an evaluation. An engine with memory of its own holds none here."""
    rollout, config, engine = recipe.rollout, recipe.evaluation, recipe.rollout.engine
    asked = [(checked.context.prompts, rollout.max_completion_length, recipe.prompts_per_step * rollout.group_size)]
    asked += [(b.prompts, config.max_completion_length, len(b.prompts) * config.samples) for b in checked.benchmarks]
    writer = student.writer()
    weights = sum(x.numel() * x.element_size() for x in writer.lm.model.parameters())
    most, found = Counter[str](), []
    with evaluating(writer.lm.model):
        for prompts, new, count in asked:
            length = max(len(prompt.token_ids) for prompt in prompts) + new
            rows = min(max(1, count // processes), max(1, engine.cache_tokens // length))
            with meter.part(CACHE):
                before = meter.held[CACHE]
                cache = _body(writer, rows, length - 1, None).past_key_values
                cached = meter.held[CACHE] - before
                meter.forget_peak()
                flops = meter.flops
                states = _body(writer, rows, 1, cache).last_hidden_state
            with meter.part(SAMPLING):
                scores = cast(Any, writer.lm.core.get_output_embeddings())(states)
                found.append((Counter(token=meter.flops - flops), rows, weights + cached // 2))
                copies = torch.empty(COPIES, *scores.shape)
                del copies
            most = max(most, meter.peak, key=Counter.total)
            del cache, states, scores
    meter.forget_peak()
    return most if engine.device_share == 0 else meter.peak, *found[0]


def _body(writer: Model, rows: int, tokens: int, cache: Any) -> Any:
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=writer.lm.device)
    return writer.lm.backbone(input_ids=ids, past_key_values=cache, use_cache=True)


def _gathered(student: Student) -> int:
    def size(tensors: Iterator[Tensor]) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    blocks = [size(block.parameters()) for block in student.lm.blocks]
    return size(student.lm.model.parameters()) - sum(blocks) + max(blocks)
