"""A recipe: every choice of a run as plain frozen dataclasses, mirrored by the YAML file key by key.

Pure data: importing this module loads no model library, so a bad recipe fails in a fraction of a second.
"""

import dataclasses
import difflib
import json
import re
import typing
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import Discriminator, Field, TypeAdapter, ValidationError

from oprd.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
DType = Literal["float32", "bfloat16", "float16"]
_PYDANTIC = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Train low-rank adapters instead of the full weights (PEFT)."""

    __pydantic_config__ = _PYDANTIC
    r: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    """The model that is trained. Its weights are held in float32; `bf16: true` computes in bfloat16."""

    __pydantic_config__ = _PYDANTIC
    model: str
    """Folder or Hub name."""
    gguf_file: str | None = None
    """A GGUF file inside `model`, dequantised on load (needs the package gguf)."""
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTeacherConfig:
    """A frozen model in this process."""

    __pydantic_config__ = _PYDANTIC
    type: Literal["local"] = "local"
    model: str
    gguf_file: str | None = None
    dtype: DType = "bfloat16"
    device: str | None = None
    """None: the student's."""
    quantization: Literal["8bit", "4bit"] | None = None
    """bitsandbytes, through transformers."""
    system_prompt: str | None = None
    """Replaces the prompt's system message for the teacher."""
    prompt_template: str | None = None
    """Replaces the last user message for the teacher; `{column}` is filled from the dataset."""
    alignment: Literal["bytes", "shared_ids"] = "bytes"
    """For a teacher with another tokenizer. `bytes`: it reads its own tokens of the same text, positions are paired where
    both end at the same byte. `shared_ids`: it is fed the student's ids, prompt included, whatever they mean to it [code]."""

    def __post_init__(self) -> None:
        own_prompt = self.system_prompt is not None or self.prompt_template is not None
        if self.alignment == "shared_ids" and own_prompt:
            raise ConfigError(
                "alignment 'shared_ids' feeds the teacher the student's prompt as it is; "
                "drop system_prompt and prompt_template, or use alignment 'bytes'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTeacherConfig:
    """The student's own weights before training, under another prompt: its adapter off, or a frozen copy."""

    __pydantic_config__ = _PYDANTIC
    type: Literal["self"] = "self"
    system_prompt: str | None = None
    prompt_template: str | None = None

    def __post_init__(self) -> None:
        if self.system_prompt is None and self.prompt_template is None:
            raise ConfigError(
                "a self teacher with the student's own prompt agrees with the student everywhere; "
                "give system_prompt or prompt_template"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTeacherConfig:
    """A model behind an OpenAI-compatible endpoint. It gives text, and where the server can, log-probabilities."""

    __pydantic_config__ = _PYDANTIC
    type: Literal["server"] = "server"
    base_url: str
    """`http://localhost:8000/v1`."""
    model: str
    """The name the server knows it by."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is written nowhere."""
    tokenizer: str | None = None
    """Folder or Hub name of the server's tokenizer: for `continuation: completions`, and for log-probabilities."""
    system_prompt: str | None = None
    prompt_template: str | None = None
    continuation: Literal["completions", "continue_final_message", "prefill"] = "completions"
    """How an answer that was begun is continued: the rendered prompt on the raw endpoint, vLLM's flag on the chat
    endpoint, or a last assistant message that the provider takes as the beginning."""
    many_samples: bool = True
    """Whether one request can ask for several samples (`n`); false sends one request per sample."""
    logprobs: Literal["prompt_logprobs", "echo"] = "prompt_logprobs"
    """How log-probabilities of given tokens are asked for: vLLM's option, or `echo` with `logprobs`."""
    concurrency: Positive = 32
    """Requests under way at once, on one process."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    step_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    max_retries: NotNegative = 6
    """Of one request, with pauses of 0.5 s that double, or as long as the server's Retry-After says."""
    max_lost_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Above this share of lost requests in a step the run stops instead of going on without them."""
    price_per_million_prompt_tokens: Price = 0.0
    price_per_million_completion_tokens: Price = 0.0
    max_requests: Positive | None = None
    """Budgets of the run over all its starts and processes; it stops with a checkpoint before passing one."""
    max_tokens: Positive | None = None
    """Prompt and completion tokens."""
    max_cost: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """In the currency of the prices."""
    cache: str | None = None
    """SQLite file of all answers, so that none is paid twice; `teacher_cache.sqlite` in the run folder unless given."""

    def __post_init__(self) -> None:
        address = urllib.parse.urlsplit(self.base_url)
        if address.scheme not in {"http", "https"} or not address.hostname or "@" in address.netloc:
            raise ConfigError("base_url must look like http://host:port/v1, without a password in it")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            # the value is not repeated: it may be the key itself
            raise ConfigError("api_key_env must be the name of an environment variable, such as OPENAI_API_KEY")
        if self.continuation == "completions" and self.tokenizer is None:
            raise ConfigError(
                "continuation 'completions' renders the prompt here: give `tokenizer`, the folder or Hub name of the "
                "server's tokenizer, or use 'continue_final_message' or 'prefill'"
            )
        prices = self.price_per_million_prompt_tokens + self.price_per_million_completion_tokens
        if self.max_cost is not None and not prices:
            raise ConfigError("max_cost needs price_per_million_prompt_tokens and price_per_million_completion_tokens")


SERVER_MAY_CHANGE = (
    "base_url", "api_key_env", "concurrency", "request_timeout_s", "step_timeout_s", "max_retries", "max_lost_share",
    "price_per_million_prompt_tokens", "price_per_million_completion_tokens", "max_requests", "max_tokens", "max_cost",
    "cache",
)  # fmt: skip
"""Keys of a server teacher that may differ on resume: none of them changes an answer."""

WritingTeacherConfig = Annotated[LocalTeacherConfig | SelfTeacherConfig | ServerTeacherConfig, Discriminator("type")]

REWRITE_PROMPT = (
    "Problem:\n{prompt}\n\nA solution by a student:\n{completion}\n\nRewrite this solution concisely. Keep the student's "
    "approach and final answer, even if it is wrong, and keep the form in which the answer is given. Leave out "
    "repetitions, detours and checks. Write only the rewritten solution."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewritingTeacherConfig:
    """MPD: the teacher rewrites the student's completion, and the student learns on the rewritten one.

    A rewriting is kept if it is not empty, finished, shorter and ends in the same final answer. Otherwise the student
    learns on its own completion if the teacher is local, and not at all on this one if the teacher gives text only.
    """

    __pydantic_config__ = _PYDANTIC
    type: Literal["rewrite"] = "rewrite"
    teacher: WritingTeacherConfig
    rewrite_prompt: str = REWRITE_PROMPT
    """The user message; `{prompt}`, `{completion}` and the dataset's columns are filled in. Ours: none was published."""
    sampling_temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    """0 is greedy. Ours."""

    def __post_init__(self) -> None:
        if "{completion}" not in self.rewrite_prompt:
            raise ConfigError("rewrite_prompt must contain {completion}, the text to rewrite")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTeacherConfig:
    """Sequence distillation: the student learns on the teacher's own completions, the off-policy baseline."""

    __pydantic_config__ = _PYDANTIC
    type: Literal["sequence"] = "sequence"
    teacher: WritingTeacherConfig
    sampling_temperature: Annotated[float, Field(ge=0, le=10)] = 1.0


OneTeacherConfig = Annotated[
    LocalTeacherConfig | SelfTeacherConfig | ServerTeacherConfig | RewritingTeacherConfig | SequenceTeacherConfig,
    Discriminator("type"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralTeachersConfig:
    """Several teachers; the dataset's `teacher` column names one for each prompt."""

    __pydantic_config__ = _PYDANTIC
    type: Literal["several"] = "several"
    teachers: dict[str, OneTeacherConfig]

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ConfigError("teachers is empty; give at least one `name: {type: ...}`")


TeacherConfig = Annotated[
    LocalTeacherConfig
    | SelfTeacherConfig
    | ServerTeacherConfig
    | RewritingTeacherConfig
    | SequenceTeacherConfig
    | SeveralTeachersConfig,
    Discriminator("type"),
]

Tokens = Literal["all", "first_k", "last_k", "last"]
Layers = Literal["all", "last", "even", "odd"] | tuple[Positive, ...]
Reduction = Literal["token_mean", "sequence_mean"]
Coefficient = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _check_layers(layers: str | tuple[int, ...]) -> None:
    if isinstance(layers, tuple) and (not layers or len(set(layers)) < len(layers)):
        raise ConfigError(f"layers must name each block once and at least one, got {list(layers)}")


def _check_k(tokens: Tokens, k: int | None) -> None:
    if k is not None and not tokens.endswith("_k"):
        raise ConfigError(f"k={k} has no meaning with tokens={tokens!r}; drop k or use first_k or last_k")


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenMSEConfig:
    """OPRD: match the student's hidden states to the teacher's. Defaults are the paper's setting."""

    __pydantic_config__ = _PYDANTIC
    type: Literal["oprd"] = "oprd"
    layers: Layers = "all"
    """Which transformer blocks are matched, counted from 1."""
    tokens: Tokens = "last_k"
    k: Positive | None = None
    """With first_k or last_k: how many sampled tokens of each completion; 2000 unless given [paper]."""
    normalization: Literal["none", "l2"] = "none"
    """`l2` divides each state by its norm first, and then needs a coefficient of 100 to 1000 [code]."""
    reduction: Reduction = "token_mean"
    """`token_mean` [code], or the paper's Eq. 6 that divides per completion: `sequence_mean`."""
    coefficient: Coefficient = 1.0

    def __post_init__(self) -> None:
        _check_k(self.tokens, self.k)
        _check_layers(self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputKLConfig:
    """OPD: match the student's next-token distribution to the teacher's. p = student, q = teacher."""

    __pydantic_config__ = _PYDANTIC
    type: Literal["opd"] = "opd"
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """reverse_kl = KL(p||q), forward_kl = KL(q||p), jsd = b KL(q||m) + (1-b) KL(p||m), m = b q + (1-b) p."""
    jsd_weight: Annotated[float, Field(gt=0, lt=1)] | None = None
    """b; 0.5 unless given."""
    estimator: Literal["full", "top_k", "sampled"] = "full"
    top_k: Positive | None = None
    """Size of the support of estimator top_k; 16 unless given."""
    support: Literal["student", "teacher", "overlap"] | None = None
    """Whose top k; `student` unless given."""
    kl_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Divides both models' logits in the loss. Not the sampling temperature; no factor is put back."""
    importance_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """With estimator sampled and rollout.updates_per_rollout above 1: largest importance weight; 2 unless given [ours]."""
    redraw: bool = False
    """With estimator sampled: draw the token anew from the student at every position instead of taking the trajectory's.
    Unbiased given the prefix on any trajectory, such as one that a teacher wrote [ours]."""
    tokens: Tokens = "all"
    k: Positive | None = None
    reduction: Reduction = "token_mean"
    coefficient: Coefficient = 1.0

    def __post_init__(self) -> None:
        _check_k(self.tokens, self.k)
        if self.jsd_weight is not None and self.divergence != "jsd":
            raise ConfigError(f"jsd_weight has no meaning with divergence={self.divergence!r}; drop it")
        if self.estimator != "top_k" and (self.top_k is not None or self.support is not None):
            raise ConfigError(f"top_k and support have no meaning with estimator={self.estimator!r}; drop them")
        if self.estimator != "sampled" and self.importance_clip is not None:
            raise ConfigError(
                f"importance_clip has no meaning with estimator={self.estimator!r}: it needs no importance weights; drop it"
            )
        if self.redraw and self.estimator != "sampled":
            raise ConfigError(f"redraw has no meaning with estimator={self.estimator!r}; drop it")
        if self.estimator == "sampled" and self.kl_temperature != 1.0:
            raise ConfigError(
                "estimator 'sampled' is unbiased only at kl_temperature 1, where the tokens were sampled; "
                f"got {self.kl_temperature}. Use estimator 'full' or 'top_k', or drop kl_temperature"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeFitConfig:
    """How `oprd fit-bridge` fits the projections, from the student's completions of the fit prompts."""

    __pydantic_config__ = _PYDANTIC
    method: Literal["closed_form", "gradient"] = "closed_form"
    """`closed_form` [ours]: from second moments. `gradient`: PCA and Adam on kept rows, the authors' recipe [code]."""
    prompts: str | None = None
    """A dataset of its own, of the same columns; the recipe's prompts unless given."""
    limit: Positive = 2000
    """Use at most so many prompts; 2000 [paper]."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts that only measure; 0.1 [paper]."""
    max_rank: Positive = 4096
    """Largest rank kept in the file, cut to the smaller width; every smaller one is in it."""
    confidence: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Fit only to rows at which the student gives its likeliest next token at least this probability; 0 takes all. A state in
    which the student hesitates says how it hesitates, and targets made of such states are not sharp [ours]."""
    features: Annotated[int, Field(ge=0, le=16384)] = 512
    """Random ReLU features of the teacher's states beside these, for the canonical directions; 0 leaves the fit linear
    [ours]. The fit's sums grow with the square of width and features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeConfig:
    """OPRD-Bridge: match the states of two models of any width, depth and tokenizer, in a space that they share."""

    __pydantic_config__ = _PYDANTIC
    type: Literal["oprd_bridge"] = "oprd_bridge"
    bridge: str
    """The file that `oprd fit-bridge` writes and training reads."""
    space: Literal["student", "projections"] = "student"
    """Where states are compared. `projections`: P_S h_S with P_T h_T, as published. `student`: h_S with the state that the
    student had there before training, its coordinates along the canonical directions moved to the teacher's [ours];
    without LoRA a frozen copy of the student is kept for it."""
    rank: Literal["auto", "auto_shared", "full"] | Positive | tuple[Positive, ...] = "full"
    """`full`: all directions; best in the student's space [ours], where those left out keep the student's own mistakes.
    `auto`: for each block pair the largest r whose r-th held-out squared canonical correlation is at least 1/2;
    `auto_shared`: the same of their mean over the pairs, one rank for all. A list has one for each matched block."""
    layers: Layers = "last"
    """Which of the student's blocks are matched, counted from 1; each has its partner by relative depth. `all` [paper]; the
    last alone taught more here [ours]."""
    tokens: Tokens = "last_k"
    k: Positive | None = None
    normalization: Literal["none", "l2"] = "l2"
    """`l2` divides each side by its norm first [code]."""
    trust: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """With space `student` and another tokenizer: a pair whose next token the student before training gave less than this
    probability is dropped. Whether a teacher's piece ends there hangs on what follows, and a digit that is written in place
    of the rest of a number would otherwise find a partner that agrees [ours]."""
    sharpen: bool = True
    """With space `student`: move each target of the last block on until the student's LM head is as sure of its likeliest
    next token as the teacher is of its own, up to 0.99. A map that minimises squared errors says less than the teacher [ours]."""
    trainable: bool = False
    """Train the student's projections along; the teacher's stay as fitted."""
    refit_every: Positive | None = None
    """Fit again in closed form after so many steps, on those steps' rollouts: the student moves away from the fit."""
    fit: BridgeFitConfig = field(default_factory=BridgeFitConfig)
    reduction: Reduction = "token_mean"
    coefficient: Coefficient = 10.0
    """10 [code]."""

    def __post_init__(self) -> None:
        _check_k(self.tokens, self.k)
        _check_layers(self.layers)
        if self.space == "student" and (self.trainable or self.refit_every is not None):
            raise ConfigError(
                "trainable and refit_every move the projections; with space 'student' nothing is projected. Drop them, or "
                "set space=projections"
            )
        if self.trainable and self.refit_every is not None:
            raise ConfigError("trainable and refit_every both move the projections; drop one of them")
        if isinstance(self.rank, tuple) and isinstance(self.layers, tuple) and len(self.rank) != len(self.layers):
            raise ConfigError(f"rank lists {len(self.rank)} ranks for {len(self.layers)} layers; give one for each")


@dataclass(frozen=True, slots=True, kw_only=True)
class OmniOPDConfig:
    """OmniOPD: the teacher continues what the student wrote, and chunks it would have written too are reinforced."""

    __pydantic_config__ = _PYDANTIC
    type: Literal["omni_opd"] = "omni_opd"
    audit: Literal["entropy", "random"] = "entropy"
    """Where chunks begin: at the student's tokens of highest entropy [second-hand], or anywhere."""
    chunks: Positive = 10
    """At most so many in a completion: M."""
    chunk_tokens: Positive = 50
    """C."""
    continuations: Positive = 10
    """The teacher's, of each audited prefix: N."""
    teacher_temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Ours: not published. Greedy continuations would all be the same."""
    similarity: Literal["edit", "embedding"] = "edit"
    """1 - Levenshtein / longer length, over characters, or the cosine of sentence embeddings cut to [0, 1]."""
    embedding_model: str | None = None
    """Folder or Hub name of the sentence-embedding model."""
    prior: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the student's own probability in the target, in continuations: alpha."""
    anchor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Coefficient of KL(student at start || student) outside the audited chunks: beta."""
    baseline: Literal["none", "batch_mean", "leave_one_out"] = "batch_mean"
    """Subtracted from the targets: nothing (as published), their mean over the step, or their mean over the prompt's
    other completions [ours]. Without one the loss only ever reinforces, and the miniature lost accuracy."""
    coefficient: Coefficient = 1.0

    def __post_init__(self) -> None:
        if (self.embedding_model is None) != (self.similarity == "edit"):
            raise ConfigError("give embedding_model with similarity 'embedding', and only then")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewrittenConfig:
    """Negative log-likelihood of the teacher's text, for a teacher that rewrites or writes the completions itself."""

    __pydantic_config__ = _PYDANTIC
    type: Literal["nll"] = "nll"
    reduction: Reduction = "token_mean"
    coefficient: Coefficient = 1.0


SingleObjective = HiddenMSEConfig | OutputKLConfig | BridgeConfig | OmniOPDConfig | RewrittenConfig
OneObjectiveConfig = Annotated[SingleObjective, Discriminator("type")]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """A weighted sum of objectives, each with its own coefficient: the paper's `opd + mu * oprd`."""

    __pydantic_config__ = _PYDANTIC
    type: Literal["mixture"] = "mixture"
    terms: tuple[OneObjectiveConfig, ...]

    def __post_init__(self) -> None:
        if len(self.terms) < 2:
            raise ConfigError(f"a mixture needs at least two terms, got {len(self.terms)}; use the term itself")


ObjectiveConfig = Annotated[SingleObjective | MixtureConfig, Discriminator("type")]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Prompts: JSONL, Parquet or CSV by path, or a Hub dataset by name.

    Columns: one of `prompt`, `problem`, `question` (text) or `messages`; optionally `answer`, `teacher`, `completion`.
    """

    __pydantic_config__ = _PYDANTIC
    prompts: str
    split: str = "train"
    """Of a Hub dataset."""
    limit: Positive | None = None
    """Use only the first rows."""
    system_prompt: str | None = None
    """Put before every prompt of the student."""
    prompt_template: str | None = None
    """The user message; `{column}` is filled from the dataset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLengthConfig:
    """Completions that grow from `start` tokens at step 1 to max_completion_length at step `steps`, and stay there."""

    __pydantic_config__ = _PYDANTIC
    type: Literal["linear"] = "linear"
    start: Positive
    steps: Annotated[int, Field(gt=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepwiseLengthConfig:
    """Completions of at most lengths[i] tokens before step at[i], and of max_completion_length from the last on."""

    __pydantic_config__ = _PYDANTIC
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

    __pydantic_config__ = _PYDANTIC
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

    __pydantic_config__ = _PYDANTIC
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
        if (self.every is not None) != (self.triggers != "powers_of_two"):
            raise ConfigError(
                f"extrapolation.every is {self.every}; it is needed with triggers every_n and settled, and has no meaning "
                f"with {self.triggers!r}"
            )
        if self.settled_cosine is not None and self.triggers != "settled":
            raise ConfigError(f"settled_cosine has no meaning with triggers={self.triggers!r}; drop it")
        if self.level is not None and self.accept != "paired":
            raise ConfigError(f"level has no meaning with accept={self.accept!r}; drop it")
        if not self.accept_ties and self.accept != "mean":
            raise ConfigError("accept_ties has no meaning with accept='paired', which wants more than a tie; drop it")
        if not self.factors or list(self.factors) != sorted(set(self.factors)):
            raise ConfigError(f"extrapolation.factors must rise and be at least one, got {list(self.factors)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Benchmarks and how they are sampled."""

    __pydantic_config__ = _PYDANTIC
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

    __pydantic_config__ = _PYDANTIC
    objective: ObjectiveConfig
    max_steps: Positive
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The recipe's unless given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run. Names follow transformers.TrainingArguments where the thing is the same."""

    __pydantic_config__ = _PYDANTIC
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


def objective_terms(objective: ObjectiveConfig) -> tuple[SingleObjective, ...]:
    """The objectives that are summed: a mixture's terms, or the objective itself."""
    return objective.terms if isinstance(objective, MixtureConfig) else (objective,)


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


def _check_student_writes(teacher: TeacherConfig) -> None:
    members = teacher.teachers.values() if isinstance(teacher, SeveralTeachersConfig) else (teacher,)
    other = next((m for m in members if isinstance(m, RewritingTeacherConfig | SequenceTeacherConfig)), None)
    if other is not None:
        raise ConfigError(
            f"estimator 'sampled' needs tokens sampled from the student, and under teacher {other.type!r} the teacher "
            "writes them: the gradient would be biased. Set redraw: true, or use estimator 'full' or 'top_k'"
        )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.path=value` overrides, whose values are YAML.

    Raises ConfigError for a missing file, bad YAML, an unknown key (with the nearest name) or a wrong type.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path} must be a mapping of keys to values, got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree)


def parse_recipe(tree: Mapping[str, Any]) -> Recipe:
    """A recipe from nested mappings, as YAML gives them. Raises ConfigError naming key, value and what is allowed."""
    try:
        # Through JSON because pydantic's strict mode then takes mappings for classes and lists for tuples, yet no "3" for 3.
        return TypeAdapter(Recipe).validate_json(json.dumps(_floats(tree)))
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(line, tree) for line in error.errors()))) from None


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested mappings that `parse_recipe` reads back to an equal recipe."""
    return part_to_dict(recipe)


def part_to_dict(part: Any) -> Any:
    """A recipe, one of its sections, or a plain value, as YAML has it."""
    return TypeAdapter(type(part)).dump_python(part, mode="json") if dataclasses.is_dataclass(part) else part


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, every default spelled out."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must look like key=value or section.key=value")
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def _floats(tree: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text; a recipe means the number."""
    if isinstance(tree, Mapping):
        return {key: _floats(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_floats(value) for value in tree]
    if isinstance(tree, str) and tree[:1] in "0123456789.+-" and "e" in tree.lower():
        try:
            return float(tree)
        except ValueError:
            return tree
    return tree


def _explain(line: Any, tree: Mapping[str, Any]) -> str:
    """One pydantic error as: where, what was given, what is allowed."""
    where, kind, given = _path(line["loc"], tree), line["type"], line["input"]
    if kind == "value_error":
        return f"{where}: {line['ctx']['error']}" if where else str(line["ctx"]["error"])
    if kind == "missing":
        return f"{where}: this key is required"
    if kind == "union_tag_not_found":
        return f"{where}: key 'type' is required and says which variant is meant, got {given!r}"
    if kind == "union_tag_invalid":
        tags = line["ctx"]["expected_tags"]
        return f"{where}.type: unknown type {line['ctx']['tag']!r}{_nearest(line['ctx']['tag'], tags)}; allowed: {tags}"
    if kind == "unexpected_keyword_argument":
        allowed = ", ".join(_fields_at(line["loc"][:-1]))
        return f"{where}: unknown key{_nearest(str(line['loc'][-1]), allowed)}; allowed: {allowed}"
    return f"{where}: {line['msg'].replace('Input should', 'should').replace('valid array', 'list')}, got {given!r}"


def _nearest(given: str, allowed: str) -> str:
    names = [name.strip(" '") for name in allowed.split(",")]
    close = difflib.get_close_matches(given, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _path(loc: Sequence[str | int], tree: Any) -> str:
    """pydantic's location without what is not in the recipe, such as the names of union variants: `objective.terms.1.k`."""
    parts = []
    for depth, key in enumerate(loc):
        if (isinstance(tree, Mapping) and key in tree) or (isinstance(key, int) and isinstance(tree, list)):
            tree = cast(Any, tree)[key]
        elif isinstance(tree, Mapping) and depth == len(loc) - 1 and key in _fields_at(loc[:-1]):
            pass  # a missing key
        else:
            continue
        parts.append(str(key))
    return ".".join(parts)


def _fields_at(loc: Sequence[str | int]) -> list[str]:
    """Names of the keys allowed at a location of the recipe."""
    found: list[type] = [Recipe]
    for key in loc:
        tagged = [cls for cls in found if _tag(cls) == key]
        if tagged:
            found = tagged
            continue
        hints = [typing.get_type_hints(cls, include_extras=True) for cls in found]
        inner = [cls for hint in hints if key in hint for cls in _dataclasses_in(hint[key])]
        found = inner or found
    return [f.name for f in dataclasses.fields(found[0])]


def _tag(cls: type) -> object:
    return next((f.default for f in dataclasses.fields(cls) if f.name == "type"), None)


def _dataclasses_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    return [cls for argument in typing.get_args(annotation) for cls in _dataclasses_in(argument)]
