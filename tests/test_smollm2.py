"""Real weights, real problems: SmolLM2-135M-Instruct learns with every objective."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from conftest import MODELS, ROOT
from oprd.clock import Clock
from oprd.objectives.oprd import OPRD
from oprd.recipe import load_recipe, parse_recipe
from oprd.train.run import run_recipe
from oprd.train.setup import Parts, setup
from oprd.types import HiddenSpec, Rollouts, Taps

TEACHER = {"type": "self", "system_prompt": "You are a pirate. Answer in pirate speech, in one short sentence."}
OBJECTIVES: dict[str, Any] = {
    "oprd": {"type": "oprd"},
    "oprd-l2": {"type": "oprd", "normalization": "l2", "weight": 300.0, "layers": "even"},
    "reverse-exact": {"type": "opd"},
    "forward-exact": {"type": "opd", "divergence": "forward_kl"},
    "jsd-exact": {"type": "opd", "divergence": "jsd"},
    "reverse-top-k": {"type": "opd_top_k"},
    "reverse-sampled": {"type": "opd_sampled"},
    "sum": [{"type": "opd_top_k"}, {"type": "oprd", "weight": 0.1}],
}


def tree(smollm2: Path, problems: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "student": {"model": str(smollm2), "lora": {"r": 8, "alpha": 16}},
        "teacher": TEACHER,
        "data": {"prompts": str(problems)},
        "rollout": {"group_size": 1, "max_completion_length": 24},
        "prompts_per_step": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.0,
        "health_tokens": 32,
        "output_dir": str(out),
    } | changes


def clock() -> Clock:
    return Clock(torch.device("cpu"))


@pytest.fixture(scope="module")
def problems(dapo, tmp_path_factory) -> Path:
    """The eight shortest problems of the DAPO set: a step takes a few seconds."""
    rows = sorted(dapo.read_text(encoding="utf-8").splitlines(), key=lambda row: len(json.loads(row)["problem"]))
    path = tmp_path_factory.mktemp("problems") / "short.jsonl"
    path.write_text("".join(row + "\n" for row in rows[:8]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def fixed(smollm2) -> tuple[tuple[int, ...], ...]:
    """A fixed batch of completions, as a student might write them."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = ("To solve this problem, we first find the sum of all terms.", "The answer is 42 because of symmetry.")
    return tuple(tuple(tokenizer(text)["input_ids"]) for text in texts)


def loss(parts: Parts, rollouts: Rollouts) -> float:
    """The weighted loss on these rollouts. For the sampled estimator, whose value is a signed difference of
    log-probabilities, half its square: on given tokens that is what its gradient descends."""
    method = parts.method
    values = method.student.evaluate(method.batch(rollouts), method.targets(rollouts))
    together = zip(method.student.objectives, values, strict=True)
    terms = [(o, value.square() / 2 if o.type == "opd_sampled" else value) for o, value in together]
    return sum(o.weight_at(1) * float(term.mean()) for o, term in terms)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_on_a_fixed_batch_falls(name, smollm2, problems, fixed, tmp_path):
    parts = setup(parse_recipe(tree(smollm2, problems, tmp_path / "run", objective=OBJECTIVES[name], max_steps=4)))
    rollouts = Rollouts(prompts=parts.prompts[:2], completion_ids=fixed, finished=(False, False))
    first = loss(parts, rollouts)
    for step in (1, 2):
        assert parts.method.update(rollouts, step, clock()).finite
    last = loss(parts, rollouts)
    assert last < 0.9 * first, (first, last)


@pytest.mark.slow
def test_a_run_on_real_problems_writes_what_it_promises(smollm2, problems, tmp_path):
    done = run_recipe(parse_recipe(tree(smollm2, problems, tmp_path / "run", bf16=True)))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["health/top_16_overlap/mean"] <= 1
        assert row["tokens/generated/sum"] > 0
        assert sum(1 for key in row if key.startswith("health/cosine_block_")) == 30
        parts = ("rollout", "teacher", "update", "other")
        assert all(row[f"time/{part}_s/sum"] >= 0 for part in parts)
    student = tmp_path / "run" / "student"
    model = AutoModelForCausalLM.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert model.generation_config.eos_token_id is not None or tokenizer.eos_token_id is not None
    ids = tokenizer("2+2=", return_tensors="pt")
    ours = done.model.eval()(**ids).logits
    assert torch.allclose(model.eval()(**ids).logits, ours, atol=0.2)  # the adapter was saved in bfloat16
    assert "max_steps: 2" in (student / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "layer", "least"), [("8bit", "Linear8bitLt", 0.9), ("4bit", "Linear4bit", 0.6)]
)
def test_a_quantized_teacher_has_nearly_the_hidden_states_of_the_whole_one(
    quantization, layer, least, smollm2, problems, fixed, tmp_path
):
    teacher = {"type": "local", "model": str(smollm2), "dtype": "float32", "quantization": quantization}
    parts = setup(parse_recipe(tree(smollm2, problems, tmp_path / "run", teacher=teacher)))
    method = parts.method
    rollouts = Rollouts(prompts=parts.prompts[:2], completion_ids=fixed, finished=(False, False))
    assert layer in {type(module).__name__ for module in method.teacher.model.lm.model.modules()}
    spec: HiddenSpec = method.student.taps.hidden[-1]
    taps = Taps(hidden=(spec,))
    quantized = method.teacher.targets(rollouts, taps).teacher.hidden[spec].float()
    whole = method.student.hidden(method.batch(rollouts), taps).hidden[spec]  # the student is the same model
    cosine = float(torch.cosine_similarity(whole, quantized, dim=-1).mean())
    assert least < cosine < 1 - 1e-6, cosine
    assert method.update(rollouts, 1, clock()).finite


def test_every_recipe_loads_and_is_what_its_first_line_says():
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    assert files
    for file in files:
        assert file.read_text().startswith("# "), file
        load_recipe(file)


@pytest.mark.slow
def test_the_papers_recipe_holds_the_papers_values_and_runs_at_a_shrunken_shape(tmp_path, dapo):
    """Same code, same config; only the two models are small ones of the same architecture."""
    file = ROOT / "recipes" / "oprd_vanilla.yaml"
    recipe = load_recipe(file)
    assert recipe.objective == (OPRD(layers="all", tokens={"last": 2000}, weight=1.0),)
    assert (recipe.rollout.group_size, recipe.rollout.sampling_temperature) == (2, 1.0)
    assert (recipe.rollout.max_completion_length, recipe.prompts_per_step, recipe.max_steps) == (16_384, 8, 500)
    assert (recipe.learning_rate, recipe.warmup_ratio) == (1e-5, 0.03)
    assert (recipe.lr_scheduler_type, recipe.bf16) == ("cosine", True)
    assert (recipe.evaluation.samples, recipe.evaluation.sampling_temperature) == (16, 0.7)
    assert recipe.teacher.model == "hbx/JustRL-DeepSeek-1.5B"

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    shape = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=28, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131_072, tie_word_embeddings=False,
    )  # fmt: skip
    for role in ("student", "teacher"):
        Qwen2ForCausalLM(shape).save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
    overrides = [
        f"student.model={tmp_path / 'student'}",
        f"teacher.model={tmp_path / 'teacher'}",
        f"data.prompts={dapo}",
        "data.limit=4",
        f"output_dir={tmp_path / 'run'}",
        "evaluation.benchmarks=[]",
    ]
    parts = setup(load_recipe(file, overrides))
    ids = tuple(tuple(range(5, 5 + n)) for n in (40, 7))
    rollouts = Rollouts(prompts=parts.prompts[:2], completion_ids=ids, finished=(False, True))
    update = parts.method.update(rollouts, 1, clock())
    assert update.supervised == (47,)
    assert update.finite
