"""Benchmarks by name, Hub name or path: problems with known answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from transformers import PreTrainedTokenizerBase

from oprd.data.prompts import DataConfig, RowsSection, load_prompts
from oprd.errors import ConfigError, DataError
from oprd.models.generate import SamplingSection
from oprd.section import Field, Listed, OwnPrompt, PositiveInt, Seed
from oprd.types import Prompt

HUB_NAMES = {
    "aime24": ("math-ai/aime24", "test", "solution"),  # it holds the boxed answer, and there is no column `answer`
    "aime25": ("math-ai/aime25", "test", "answer"),
    "aimo": ("AI-MO/aimo-validation-aime", "train", "answer"),
    "amc23": ("math-ai/amc23", "test", "answer"),
    "hmmt25": ("MathArena/hmmt_feb_2025", "train", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", "test", "answer"),
}
"""(dataset, split, column of the answer) of the named benchmarks."""


class EvaluationConfig(RowsSection, SamplingSection):
    """Benchmarks and how they are sampled."""

    benchmarks: Listed[str] = ()
    """Names (aime24, aime25, aimo, amc23, hmmt25, math500), Hub names, or paths with columns problem, answer."""
    samples: PositiveInt = 16
    """Completions per problem: the k of avg@k."""
    sampling_temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    """0 is greedy."""
    seed: Seed = 0
    """Seed of sampling and of the bootstrap intervals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Problems to solve; every prompt has an answer."""

    name: str
    prompts: tuple[Prompt, ...]


def load_benchmarks(
    config: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    vocabulary: int = 2**31,
    trained_on: OwnPrompt | None = None,
) -> tuple[Benchmark, ...]:
    """Every benchmark of the config, rendered for the model, with the template variables that it was trained with unless the
    config has its own. Raises DataError for one without answers."""
    if config.chat_template_kwargs is None and trained_on is not None:
        config = config.model_copy(update={"chat_template_kwargs": trained_on.chat_template_kwargs})
    names = [Path(name).stem for name in config.benchmarks]
    if len(set(names)) < len(names):  # their scores would stand under one name
        names = [name.strip("/").replace("/", "_") for name in config.benchmarks]
    if len(set(names)) < len(names):
        raise ConfigError(f"evaluation.benchmarks names one twice: {', '.join(config.benchmarks)}; drop one")
    prompts = (_load(name, config, tokenizer, context=context, vocabulary=vocabulary) for name in config.benchmarks)
    return tuple(Benchmark(name=name, prompts=each) for name, each in zip(names, prompts, strict=True))


def _load(
    name: str, config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, *, context: int, vocabulary: int
) -> tuple[Prompt, ...]:
    source, split, answer = HUB_NAMES.get(name, (name, "test", config.answer))
    data = DataConfig(
        prompts=source, split=split, limit=config.limit, answer=answer,
        system_prompt=config.system_prompt, prompt_template=config.prompt_template,
        chat_template_kwargs=config.chat_template_kwargs,
    )  # fmt: skip
    room = config.max_completion_length
    prompts = load_prompts(data, tokenizer, context=context, room=room, vocabulary=vocabulary)
    for prompt in prompts:
        if prompt.answer is None:
            raise DataError(f"benchmark {name!r}: row {prompt.row} has no column {answer!r}")
    return prompts
