"""From a recipe to teachers that talk: clients, writers, and the teachers that wrap them."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedTokenizerBase

from oprd.config.models import (
    LocalTeacherConfig,
    OneTeacherConfig,
    RewritingTeacherConfig,
    SelfTeacherConfig,
    SequenceTeacherConfig,
    ServerTeacherConfig,
    SeveralTeachersConfig,
    TeacherConfig,
)
from oprd.config.objectives import OmniOPDConfig, OutputKLConfig, SingleObjective, objective_terms
from oprd.config.recipe import Recipe
from oprd.data.chat import end_of_turn, stop_ids
from oprd.errors import ConfigError
from oprd.evaluate.verify import Verdict, Verifier
from oprd.models import LanguageModel, load_tokenizer
from oprd.rollout.hf import HFEngine
from oprd.teacher.audit import AuditTeacher
from oprd.teacher.base import Teacher
from oprd.teacher.client import Client
from oprd.teacher.local import LocalTeacher
from oprd.teacher.rewrite import RewritingTeacher, SequenceTeacher
from oprd.teacher.server import ServerTeacher, ServerWriter
from oprd.teacher.similarity import edit_similarity, embedding_similarity
from oprd.teacher.writer import LocalWriter, Writer
from oprd.train.run_folder import RunFolder
from oprd.types import ChunkTargets, HiddenTargets, Prompt, TextTargets

Leaf = LocalTeacherConfig | SelfTeacherConfig | ServerTeacherConfig


def members(config: TeacherConfig) -> Mapping[str, OneTeacherConfig]:
    """The teachers by name; a single one has none."""
    return config.teachers if isinstance(config, SeveralTeachersConfig) else {"": config}


def leaf(config: OneTeacherConfig) -> Leaf:
    """The model that talks, whatever is made of its words."""
    return config.teacher if isinstance(config, RewritingTeacherConfig | SequenceTeacherConfig) else config


def provided_by(config: OneTeacherConfig) -> frozenset[type]:
    """Target types that a teacher of this config can give."""
    talks = leaf(config)
    shown = ServerTeacher.provides if isinstance(talks, ServerTeacherConfig) else LocalTeacher.provides
    if config is not talks:
        return frozenset({TextTargets}) | (shown & {HiddenTargets})
    return shown | {ChunkTargets}


def omni_term(recipe: Recipe) -> OmniOPDConfig | None:
    """The recipe's OmniOPD objective, alone or in a mixture."""
    return next((term for term in _terms(recipe) if isinstance(term, OmniOPDConfig)), None)


def has_other_terms(recipe: Recipe) -> bool:
    """Whether a teacher is asked for more than continuations."""
    return any(not isinstance(term, OmniOPDConfig) for term in _terms(recipe))


def _terms(recipe: Recipe) -> list[SingleObjective]:
    return [term for stage in recipe.schedule() for term in objective_terms(stage.objective)]


def served_top_k(recipe: Recipe) -> int | None:
    """How many log-probabilities a server is asked for at each token; None when no objective wants any."""
    terms = [term for term in _terms(recipe) if isinstance(term, OutputKLConfig)]
    return max((term.top_k or 16 if term.estimator == "top_k" else 0 for term in terms), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server that has answered a first request."""

    writer: ServerWriter | None
    """None when only log-probabilities are asked for."""
    scorer: ServerTeacher | None
    """None when only text is asked for."""


def connect(
    recipe: Recipe,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    prompts: Sequence[Prompt],
    accelerator: Accelerator,
) -> dict[str, Served]:
    """Every server of the recipe by its teacher's name, asked a little before anything is loaded. Raises ServerError."""
    folder = RunFolder(recipe.output_dir)
    found = {}
    for name, member in members(recipe.teacher).items():
        config = leaf(member)
        if not isinstance(config, ServerTeacherConfig):
            continue
        rank, processes = accelerator.process_index, accelerator.num_processes
        client = Client(
            config,
            cache=folder.teacher_cache if config.cache is None else Path(config.cache),
            # the file in the run folder is this run's alone, wherever the folder is moved
            run="" if config.cache is None else str(folder.path.resolve()),
            name=name,
            rank=rank,
            processes=processes,
            seed=recipe.seed,
        )
        tokenizer = tokenizers.get(name)
        top_k = served_top_k(recipe) if member is config else None
        scorer = writer = None
        if top_k is not None:
            assert tokenizer is not None
            scorer = ServerTeacher(config, client, tokenizer, top_k=top_k, device=accelerator.device)
            scorer.check()
        if member is not config or omni_term(recipe) is not None:
            writer = ServerWriter(config, client, tokenizer)
            asked = next((prompt for prompt in prompts if name in {"", prompt.teacher}), prompts[0])
            writer.check(asked, continues=member is config)
        found[name] = Served(writer=writer, scorer=scorer)
    return found


def served_tokenizer(config: ServerTeacherConfig, name: str, *, scores: bool) -> PreTrainedTokenizerBase | None:
    """The server's tokenizer as the recipe names it. Raises ConfigError when log-probabilities are asked for without one."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    if scores:
        raise ConfigError(
            f"teacher{f' {name}' if name else ''}: log-probabilities are asked for by token id; give `tokenizer`, the folder "
            "or Hub name of the server's tokenizer"
        )
    return None


def local_writer(
    recipe: Recipe,
    lm: LanguageModel,
    config: LocalTeacherConfig | SelfTeacherConfig,
    context: int,
    *,
    generate: Callable[..., Any] | None = None,
    without_adapter: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> LocalWriter:
    """A model in this process as a writer; `generate` is given when it is the student itself."""
    stops = stop_ids(lm.tokenizer, lm.core.generation_config)
    return LocalWriter(
        lm,
        HFEngine(lm, stops, max_sequences=recipe.rollout.max_sequences, generate=generate),
        context=context,
        system_prompt=config.system_prompt,
        prompt_template=config.prompt_template,
        seed=recipe.seed,
        without_adapter=without_adapter,
    )


def refuse_sharded_self(accelerator: Accelerator) -> None:
    """The student's own sharded weights cannot generate another number of times on every process."""
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ConfigError(
            "a self teacher that writes needs whole weights on every process; use DDP, or a local teacher with the "
            "student's weights"
        )


def wrap_writer(
    recipe: Recipe,
    config: RewritingTeacherConfig | SequenceTeacherConfig,
    writer: Writer,
    local: LocalTeacher | None,
    tokenizer: PreTrainedTokenizerBase,
    stops: tuple[int, ...],
) -> Teacher:
    """The teacher that puts another trajectory in place of the student's."""
    stop = end_of_turn(tokenizer, stops)
    room = recipe.rollout.max_completion_length
    if isinstance(config, SequenceTeacherConfig):
        return SequenceTeacher(
            config=config, writer=writer, tokenizer=tokenizer, stop=stop, local=local, max_tokens=room
        )
    judge = LazyJudge(timeout_s=recipe.evaluation.verify_timeout_s)
    return RewritingTeacher(
        config=config, judge=judge, writer=writer, tokenizer=tokenizer, stop=stop, local=local, max_tokens=room
    )


def audit(
    recipe: Recipe,
    config: OmniOPDConfig,
    writers: Mapping[str, Writer],
    *,
    lm: LanguageModel,
    read: Callable[..., Any],
    start: Teacher | None,
    under: Teacher | None,
    accelerator: Accelerator,
) -> AuditTeacher:
    """OmniOPD's teacher around the writers."""

    def gather(values: Sequence[float]) -> torch.Tensor:
        row = torch.tensor([list(values)], dtype=torch.float64, device=accelerator.device)
        return accelerator.gather(row).cpu()  # type: ignore[union-attr]

    return AuditTeacher(
        config,
        writers,
        edit_similarity
        if config.embedding_model is None
        else embedding_similarity(config.embedding_model, accelerator.device),
        lm=lm,
        read=read,
        start=start,
        under=under,
        answers_too=has_other_terms(recipe),
        micro_batch_tokens=recipe.micro_batch_tokens,
        agree=lambda values: gather(values).sum(0).tolist(),
        most=lambda count: int(gather([count]).max()),
    )


class LazyJudge:
    """A Verifier whose processes start when they are first needed and end with `close`."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._stack = contextlib.ExitStack()
        self._verifier: Verifier | None = None

    def verify(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        if self._verifier is None:
            self._verifier = self._stack.enter_context(Verifier(timeout_s=self._timeout_s))
        return self._verifier.verify(completions, answers)

    def close(self) -> None:
        self._stack.close()
        self._verifier = None
