"""The recipe itself, and its sections on data, rollouts, extrapolation and evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Literal

from pydantic import Discriminator, Field

from oprd.config.common import PYDANTIC, NotNegative, Positive
from oprd.config.models import (
    OneTeacherConfig,
    RewritingTeacherConfig,
    SequenceTeacherConfig,
    SeveralTeachersConfig,
    StudentConfig,
    TeacherConfig,
)
from oprd.config.objectives import (
    HiddenMSEConfig,
    ObjectiveConfig,
    OmniOPDConfig,
    OutputKLConfig,
    RewrittenConfig,
    SingleObjective,
    objective_terms,
)
from oprd.errors import ConfigError

PAIRED_LEVEL = 0.05
SIGN_FLIPS = 9999
"""Random sign changes of extrapolation's paired test; its smallest p is one in 10,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Prompts: JSONL, Parquet or CSV by path, or a Hub dataset by name.

    Columns: one of `prompt`, `problem`, `question` (text) or `messages`; optionally `answer`, `teacher`, `completion`.
    """

    __pydantic_config__ = PYDANTIC
    prompts: str
    split: str = "train"
    """Of a Hub dataset."""
    limit: Positive | None = None
    """Use only the first rows."""
    system_prompt: str | None = None
    """Put before every prompt of the student."""
    prompt_template: str | None = None
    """The user message; `{column}` is filled from the dataset."""
    answer: str = "answer"
    """Column of the reference answer; `a.b` is field b of the nested column a."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLengthConfig:
    """Completions that grow from `start` tokens at step 1 to max_completion_length at step `steps`, and stay there."""

    __pydantic_config__ = PYDANTIC
    type: Literal["linear"] = "linear"
    start: Positive
    steps: Annotated[int, Field(gt=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepwiseLengthConfig:
    """Completions of at most lengths[i] tokens before step at[i], and of max_completion_length from the last on."""

    __pydantic_config__ = PYDANTIC
    type: Literal["stepwise"] = "stepwise"
    at: tuple[Positive, ...]
    lengths: tuple[Positive, ...]

    def __post_init__(self) -> None:
        if not self.at or len(self.at) != len(self.lengths) or list(self.at) != sorted(set(self.at)):
            raise ConfigError(
                f"a stepwise schedule needs one length for each of its steps, the steps rising; got at {list(self.at)}, "
                f"lengths {list(self.lengths)}"
            )


LengthScheduleConfig = Annotated[LinearLengthConfig | StepwiseLengthConfig, Discriminator("type")]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How the student writes."""

    __pydantic_config__ = PYDANTIC
    group_size: Positive = 2
    """Completions per prompt; 2 [paper]."""
    sampling_temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_completion_length: Positive = 1024
    """In tokens; 16,384 [paper]."""
    length_schedule: LengthScheduleConfig | None = None
    """Shorter completions in the first steps; None: max_completion_length throughout."""
    max_sequences: Positive = 64
    """Sequences generated at once; bounds the key-value cache."""
    lambda_on_policy: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of steps on the student's completions; the rest on the dataset's `completion` column (GKD)."""
    updates_per_rollout: Positive = 1
    """Optimizer updates on the completions of a step; all but the first are on stale ones."""

    def __post_init__(self) -> None:
        schedule = self.length_schedule
        if schedule is None:
            return
        longest = schedule.start if isinstance(schedule, LinearLengthConfig) else max(schedule.lengths)
        if longest > self.max_completion_length:
            raise ConfigError(
                f"length_schedule asks for {longest} tokens, max_completion_length is {self.max_completion_length}; "
                "raise it, or shorten the schedule"
            )

    def shortest(self, first: int, last: int) -> int:
        """The smallest limit of these steps, counted from 1, in tokens."""
        schedule = self.length_schedule
        changes = schedule.at if isinstance(schedule, StepwiseLengthConfig) else ()
        return min(self.length_at(step) for step in (first, *changes) if first <= step <= last)

    def length_at(self, step: int) -> int:
        """Most tokens of a completion at a step, counted from 1."""
        schedule, longest = self.length_schedule, self.max_completion_length
        if isinstance(schedule, LinearLengthConfig):
            share = min(1.0, (step - 1) / (schedule.steps - 1))
            return round(schedule.start + share * (longest - schedule.start))
        if isinstance(schedule, StepwiseLengthConfig):
            return next((n for at, n in zip(schedule.at, schedule.lengths, strict=True) if step < at), longest)
        return longest


@dataclass(frozen=True, slots=True, kw_only=True)
class EffOPDConfig:
    """EffOPD, arXiv 2605.11739: try to go further in the direction of the last updates. Defaults are the paper's setting."""

    __pydantic_config__ = PYDANTIC
    type: Literal["effopd"] = "effopd"
    triggers: Literal["powers_of_two", "every_n", "settled"] = "powers_of_two"
    """Steps followed by a search. `settled`: every n steps, if the movement of these n points where that of the n
    before did [ours]."""
    every: Positive | None = None
    """n, with every_n and settled."""
    settled_cosine: Annotated[float, Field(gt=-1, lt=1)] | None = None
    """Least cosine of two successive movements, with settled; 0.5 unless given [ours]."""
    factors: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = (2.0, 4.0, 6.0, 8.0, 10.0)
    """Candidates W + factor * delta, rising."""
    score: Literal["accuracy", "objective"] = "accuracy"
    """`accuracy` of the validation completions by the dataset's answers, or minus the `objective` on them [ours]."""
    validation_prompts: Positive = 50
    """Training prompts drawn once for all searches."""
    validation_samples: Positive = 1
    """Completions of each."""
    accept: Literal["mean", "paired"] = "mean"
    """`mean`: a candidate stays if its mean score is better than the best's. `paired`: if it is better by a sign-flip test on
    the prompts' differences at `level` [ours]."""
    accept_ties: bool = True
    """With accept mean: an equal score is enough. True [paper], false [code]."""
    level: Annotated[float, Field(gt=0, lt=1)] | None = None
    """With accept paired: largest one-sided p; 0.05 unless given."""

    def __post_init__(self) -> None:
        if self.triggers == "powers_of_two" and self.every is not None:
            raise ConfigError(f"extrapolation.every={self.every} has no meaning with triggers='powers_of_two'; drop it")
        if self.triggers != "powers_of_two" and self.every is None:
            raise ConfigError(f"triggers={self.triggers!r} needs extrapolation.every: a search after so many steps")
        if self.settled_cosine is not None and self.triggers != "settled":
            raise ConfigError(f"settled_cosine has no meaning with triggers={self.triggers!r}; drop it")
        if self.level is not None and self.accept != "paired":
            raise ConfigError(f"level has no meaning with accept={self.accept!r}; drop it")
        if not self.accept_ties and self.accept != "mean":
            raise ConfigError("accept_ties has no meaning with accept='paired', which wants more than a tie; drop it")
        level, least = self.level or PAIRED_LEVEL, max(0.5**self.validation_prompts, 1 / (1 + SIGN_FLIPS))
        if self.accept == "paired" and level < least:
            raise ConfigError(
                f"with validation_prompts={self.validation_prompts} the paired test gives no p below {least:.2g}, so that "
                f"nothing is ever accepted at level {level:g}; raise either"
            )
        if not self.factors or list(self.factors) != sorted(set(self.factors)):
            raise ConfigError(f"extrapolation.factors must rise and be at least one, got {list(self.factors)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Benchmarks and how they are sampled."""

    __pydantic_config__ = PYDANTIC
    benchmarks: tuple[str, ...] = ()
    """Names (aime24, aime25, aimo, amc23, hmmt25, math500), Hub names, or paths with columns problem, answer."""
    data_dir: str | None = None
    """Folder searched first for NAME.jsonl."""
    samples: Positive = 16
    """Completions per problem: the k of avg@k."""
    sampling_temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    """0.7 [paper]; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_completion_length: Positive = 1024
    max_sequences: Positive = 64
    limit: Positive | None = None
    """Use only the first problems."""
    system_prompt: str | None = None
    prompt_template: str | None = None
    verify_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """Some steps with an objective of their own; optimizer and schedule start afresh."""

    __pydantic_config__ = PYDANTIC
    objective: ObjectiveConfig
    max_steps: Positive
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The recipe's unless given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run. Names follow transformers.TrainingArguments where the thing is the same."""

    __pydantic_config__ = PYDANTIC
    student: StudentConfig
    teacher: TeacherConfig
    data: DataConfig
    output_dir: str
    objective: ObjectiveConfig = field(default_factory=HiddenMSEConfig)
    stages: tuple[StageConfig, ...] = ()
    """In place of `objective` and `max_steps`: objectives that follow each other in one run."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    extrapolation: EffOPDConfig | None = None
    """Searches further along the direction of the updates; None: none."""

    max_steps: Positive = 500
    prompts_per_step: Positive = 8
    """Over all processes."""
    micro_batch_tokens: Positive = 16_384
    """Padded positions of one forward and backward on one process; a longer completion goes alone."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    bf16: bool = False
    """Compute in bfloat16 over float32 weights."""
    seed: int = 0
    max_skipped_steps: Positive = 5
    """Stop after this many steps in a row with a non-finite loss or gradient."""

    logging_steps: Positive = 1
    health_tokens: NotNegative = 256
    """Sampled tokens on which the health numbers are taken at every logged step; 0 switches them off."""
    save_steps: Positive = 100
    save_total_limit: Positive = 2
    eval_steps: Positive | None = None
    """Evaluate every so many steps, before the first and after the last; None: only at the end."""
    report_to: tuple[Literal["trackio", "wandb", "tensorboard"], ...] = ()
    resume_from_checkpoint: str | None = None
    """`latest`, or a checkpoint folder of this run."""

    def __post_init__(self) -> None:
        if self.stages and (self.objective != HiddenMSEConfig() or self.max_steps != 500):
            raise ConfigError("stages have their own objective and max_steps; drop those of the recipe")
        _check_audits([objective_terms(stage.objective) for stage in self.schedule()])
        for stage, last in zip(self.schedule(), self.last_steps(), strict=True):
            shortest = self.rollout.shortest(last - stage.max_steps + 1, last)
            _check_lengths(self.rollout, shortest, self.teacher, objective_terms(stage.objective))
        for stage in self.schedule():
            for term in objective_terms(stage.objective):
                if isinstance(term, OutputKLConfig) and term.estimator == "sampled" and not term.redraw:
                    _check_sampled(self.rollout)
                    _check_student_writes(self.teacher)
                    if term.importance_clip is not None and self.rollout.updates_per_rollout == 1:
                        raise ConfigError(
                            "importance_clip has no meaning with rollout.updates_per_rollout=1: no rollout is stale; drop it"
                        )

    def schedule(self) -> tuple[StageConfig, ...]:
        """The stages; a recipe without any is one stage."""
        return self.stages or (StageConfig(objective=self.objective, max_steps=self.max_steps),)

    def last_steps(self) -> tuple[int, ...]:
        """The step that ends each stage, counted from the beginning of the run."""
        return tuple(accumulate(stage.max_steps for stage in self.schedule()))


def _check_sampled(rollout: RolloutConfig) -> None:
    given = {
        "sampling_temperature": rollout.sampling_temperature,
        "top_p": rollout.top_p,
        "lambda_on_policy": rollout.lambda_on_policy,
    }
    for name, value in given.items():
        if value != 1.0:
            raise ConfigError(
                f"estimator 'sampled' needs tokens sampled from the student's own distribution; rollout.{name} is "
                f"{value}. Set it to 1, or use estimator 'full' or 'top_k'"
            )


def _check_audits(stages: Sequence[Sequence[SingleObjective]]) -> None:
    """A completion is audited once, by one teacher for the whole run."""
    audits = [[term for term in terms if isinstance(term, OmniOPDConfig)] for terms in stages]
    if any(len(terms) > 1 for terms in audits) or any(terms != audits[0] for terms in audits):
        raise ConfigError(
            "a mixture can have one term 'omni_opd', and of several stages all must have the same or none; run the stages "
            "one after the other"
        )


def _check_lengths(
    rollout: RolloutConfig, shortest: int, teacher: TeacherConfig, terms: Sequence[SingleObjective]
) -> None:
    """Completions of a stage must be long enough for what is learned on them."""
    audit = next((term for term in terms if isinstance(term, OmniOPDConfig)), None)
    if audit is not None and shortest < audit.chunk_tokens:
        raise ConfigError(
            f"omni_opd audits chunks of {audit.chunk_tokens} tokens, and completions of {shortest} have room for "
            "none; lower chunk_tokens, or let length_schedule or max_completion_length begin there"
        )
    rewritten = any(isinstance(member, RewritingTeacherConfig) for member in _members(teacher))
    only_text = all(isinstance(term, RewrittenConfig) for term in terms)
    if rewritten and only_text and shortest < rollout.max_completion_length:
        raise ConfigError(
            "a completion that length_schedule cuts before its answer is not rewritten, and the objective 'nll' learns on "
            "rewritten ones alone; drop length_schedule, or add a term that learns on the student's completion as well"
        )


def _members(teacher: TeacherConfig) -> tuple[OneTeacherConfig, ...]:
    return tuple(teacher.teachers.values()) if isinstance(teacher, SeveralTeachersConfig) else (teacher,)


def _check_student_writes(teacher: TeacherConfig) -> None:
    other = next((m for m in _members(teacher) if isinstance(m, RewritingTeacherConfig | SequenceTeacherConfig)), None)
    if other is not None:
        raise ConfigError(
            f"estimator 'sampled' needs tokens sampled from the student, and under teacher {other.type!r} the teacher "
            "writes them: the gradient would be biased. Set redraw: true, or use estimator 'full' or 'top_k'"
        )
