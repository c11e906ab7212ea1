"""The student, and the teachers."""

import re
import urllib.parse
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Discriminator, Field

from oprd.config.common import PYDANTIC, DType, NotNegative, Positive, Price
from oprd.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Train low-rank adapters instead of the full weights (PEFT)."""

    __pydantic_config__ = PYDANTIC
    r: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    """The model that is trained. Its weights are held in float32; `bf16: true` computes in bfloat16."""

    __pydantic_config__ = PYDANTIC
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

    __pydantic_config__ = PYDANTIC
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

    __pydantic_config__ = PYDANTIC
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

    __pydantic_config__ = PYDANTIC
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
    """Of one request, with pauses of 0.5 s that double, or longer if the server's Retry-After says so."""
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

    A rewriting is kept if it is not empty, finished, no longer and ends in the same final answer. Otherwise the student
    learns on its own completion if the teacher is local, and not at all on this one if the teacher gives text only.
    """

    __pydantic_config__ = PYDANTIC
    type: Literal["rewrite"] = "rewrite"
    teacher: WritingTeacherConfig
    rewrite_prompt: str = REWRITE_PROMPT
    """The user message; `{prompt}`, `{completion}` and the dataset's columns are filled in. Ours: none was published."""
    sampling_temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    """0 is greedy. Ours."""
    only_correct: bool = False
    """Keep rewritings of completions that end in the dataset's answer alone [ours]. A teacher that gives text only says nothing
    else about right and wrong: learning on rewritten mistakes, the student drifts ever further into its own."""

    def __post_init__(self) -> None:
        if "{completion}" not in self.rewrite_prompt:
            raise ConfigError("rewrite_prompt must contain {completion}, the text to rewrite")
        if isinstance(self.teacher, ServerTeacherConfig) and self.teacher.prompt_template is not None:
            raise ConfigError(
                "under 'rewrite' a server is asked by rewrite_prompt alone: drop its prompt_template, or put it into "
                "rewrite_prompt"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTeacherConfig:
    """Sequence distillation: the student learns on the teacher's own completions, the off-policy baseline."""

    __pydantic_config__ = PYDANTIC
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

    __pydantic_config__ = PYDANTIC
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
