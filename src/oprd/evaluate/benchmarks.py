"""Benchmarks by name, Hub name or path: problems with known answers."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from oprd.config.recipe import DataConfig, EvaluationConfig
from oprd.data.prompts import load_prompts
from oprd.errors import DataError
from oprd.types import Prompt

HUB_NAMES = {
    "aime24": ("math-ai/aime24", "test"),
    "aime25": ("math-ai/aime25", "test"),
    "aimo": ("AI-MO/aimo-validation-aime", "train"),
    "amc23": ("math-ai/amc23", "test"),
    "hmmt25": ("MathArena/hmmt_feb_2025", "train"),
    "math500": ("HuggingFaceH4/MATH-500", "test"),
}
"""Where the named benchmarks are when `data_dir` does not hold them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Problems to be solved; every prompt has an answer."""

    name: str
    prompts: tuple[Prompt, ...]


def load_benchmarks(
    config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, *, context: int
) -> tuple[Benchmark, ...]:
    """Every benchmark of the config, rendered for the model. Raises DataError for one without answers."""
    return tuple(_load(name, config, tokenizer, context) for name in config.benchmarks)


def _load(name: str, config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, context: int) -> Benchmark:
    source, split = _locate(name, config.data_dir)
    data = DataConfig(
        prompts=source,
        split=split,
        limit=config.limit,
        system_prompt=config.system_prompt,
        prompt_template=config.prompt_template,
    )
    prompts = load_prompts(data, tokenizer, context=context, room=config.max_completion_length)
    missing = next((prompt for prompt in prompts if prompt.answer is None), None)
    if missing is not None:
        raise DataError(f"benchmark {name!r}: row {missing.row} has no column 'answer'")
    return Benchmark(name=Path(name).stem, prompts=prompts)


def _locate(name: str, data_dir: str | None) -> tuple[str, str]:
    """(source, split): a file of `data_dir`, a path, or a Hub dataset."""
    if data_dir is not None and (Path(data_dir) / f"{name}.jsonl").is_file():
        return str(Path(data_dir) / f"{name}.jsonl"), "train"
    return HUB_NAMES.get(name, (name, "test"))
