"""Real weights, real problems: SmolLM2-135M-Instruct learns with every objective."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from conftest import ROOT
from oprd.config.objectives import HiddenMSEConfig, OutputKLConfig
from oprd.config.reading import load_recipe, parse_recipe
from oprd.data.collate import collate
from oprd.train.build import Run, build
from oprd.train.check import Given
from oprd.train.log import Clock
from oprd.train.run import run_recipe
from oprd.train.update import update_step
from oprd.types import Rollouts

TEACHER = {"type": "self", "system_prompt": "You are a pirate. Answer in pirate speech, in one short sentence."}
OBJECTIVES = {
    "oprd": {"type": "oprd"},
    "oprd-l2": {"type": "oprd", "normalization": "l2", "coefficient": 300.0, "layers": "even"},
    "reverse-full": {"type": "opd"},
    "forward-full": {"type": "opd", "divergence": "forward_kl"},
    "jsd-full": {"type": "opd", "divergence": "jsd"},
    "reverse-top-k": {"type": "opd", "estimator": "top_k"},
    "reverse-sampled": {"type": "opd", "estimator": "sampled"},
    "mixture": {
        "type": "mixture",
        "terms": [{"type": "opd", "estimator": "top_k"}, {"type": "oprd", "coefficient": 0.1}],
    },
}


def tree(smollm2, dapo, out, **changes):
    return {
        "student": {"model": str(smollm2), "lora": {"r": 8, "alpha": 16}},
        "teacher": TEACHER,
        "data": {"prompts": str(dapo), "limit": 8},
        "rollout": {"group_size": 1, "max_completion_length": 24},
        "prompts_per_step": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.0,
        "health_tokens": 32,
        "output_dir": str(out),
    } | changes


@pytest.fixture(scope="module")
def fixed(smollm2) -> tuple[tuple[int, ...], ...]:
    """A fixed batch of completions, as a student might write them."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = ("To solve this problem, we first find the sum of all terms.", "The answer is 42 because of symmetry.")
    return tuple(tuple(tokenizer(text)["input_ids"]) for text in texts)


@torch.no_grad()
def loss(run: Run, rollouts: Rollouts) -> float:
    """The weighted loss on these rollouts. For the sampled estimator, whose value is a signed difference of
    log-probabilities, half its square: on given tokens that is what its gradient descends."""
    targets = run.teacher.targets(rollouts, run.stage.distill.readings, head=run.stage.distill.teacher_head)
    prompts = [prompt.token_ids for prompt in rollouts.prompts]
    batch = collate(prompts, rollouts.completion_ids, pad_id=0, device=torch.device("cpu"))
    values = run.stage.model.eval()(batch, targets)
    sampled = isinstance(run.recipe.objective, OutputKLConfig) and run.recipe.objective.estimator == "sampled"
    terms = [value.square() / 2 if sampled else value for value in values]
    return sum(o.coefficient * float(term.mean()) for o, term in zip(run.stage.objectives, terms, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_on_a_fixed_batch_falls(name, smollm2, dapo, fixed, tmp_path):
    run = build(parse_recipe(tree(smollm2, dapo, tmp_path / "run", objective=OBJECTIVES[name])))
    rollouts = Rollouts(prompts=run.prompts[:2], completion_ids=fixed, finished=(False, False))
    first = loss(run, rollouts)
    for _ in range(4):
        assert update_step(run, rollouts, Clock(torch.device("cpu"))).finite
    last = loss(run, rollouts)
    assert last < 0.9 * first, (first, last)


@pytest.mark.slow
def test_a_run_on_real_problems_writes_what_it_promises(smollm2, dapo, tmp_path):
    done = run_recipe(parse_recipe(tree(smollm2, dapo, tmp_path / "run", bf16=True)))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["health/top_16_overlap/mean"] <= 1
        assert row["tokens/generated/sum"] > 0
        assert sum(1 for key in row if key.startswith("health/cosine_block_")) == 30
        parts = ("rollout", "teacher", "update", "other")
        assert all(row[f"time/{part}_s"] >= 0 for part in parts)
    student = tmp_path / "run" / "student"
    model = AutoModelForCausalLM.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert model.generation_config.eos_token_id is not None or tokenizer.eos_token_id is not None
    ids = tokenizer("2+2=", return_tensors="pt")
    ours = done.model.eval()(**ids).logits
    assert torch.allclose(model.eval()(**ids).logits, ours, atol=0.2)  # the adapter was saved in bfloat16
    assert "max_steps: 2" in (student / "README.md").read_text()


@pytest.mark.parametrize(
    ("quantization", "layer", "nearness"), [("8bit", "Linear8bitLt", 0.9), ("4bit", "Linear4bit", 0.6)]
)
def test_a_quantized_teacher_answers_nearly_as_the_whole_one(
    quantization, layer, nearness, smollm2, dapo, fixed, tmp_path
):
    teacher = {"type": "local", "model": str(smollm2), "dtype": "float32", "quantization": quantization}
    run = build(parse_recipe(tree(smollm2, dapo, tmp_path / "run", teacher=teacher)))
    rollouts = Rollouts(prompts=run.prompts[:2], completion_ids=fixed, finished=(False, False))
    *_, reading = run.stage.distill.readings
    assert layer in {type(module).__name__ for module in run.teacher.lm.model.modules()}
    answer = run.teacher.targets(rollouts, [reading], head=False).hidden[reading].float()
    whole = run.read(
        collate([p.token_ids for p in rollouts.prompts], fixed, pad_id=0, device=answer.device), [reading], False
    )
    cosine = float(torch.cosine_similarity(whole.hidden[reading], answer, dim=-1).mean())
    assert nearness < cosine < 1 - 1e-6, cosine  # the student is the same model, whole
    assert update_step(run, rollouts, Clock(torch.device("cpu"))).finite


def test_every_recipe_loads_and_is_what_its_first_line_says():
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    assert files
    for file in files:
        assert file.read_text().startswith("# "), file
        load_recipe(file)


def test_the_papers_recipe_holds_the_papers_values_and_runs_at_a_shrunken_shape(tmp_path, dapo, smollm2):
    """Same code, same config; only the two models are small ones of the same architecture."""
    recipe = load_recipe(ROOT / "recipes" / "oprd_vanilla.yaml")
    assert recipe.objective == HiddenMSEConfig(layers="all", tokens="last_k", k=2000)
    assert (recipe.rollout.group_size, recipe.rollout.sampling_temperature) == (2, 1.0)
    assert (recipe.rollout.max_completion_length, recipe.prompts_per_step, recipe.max_steps) == (16_384, 8, 500)
    assert (recipe.learning_rate, recipe.warmup_ratio, recipe.lr_scheduler_type, recipe.bf16) == (
        1e-5,
        0.03,
        "cosine",
        True,
    )
    assert (recipe.evaluation.samples, recipe.evaluation.sampling_temperature) == (16, 0.7)

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
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
    run = build(load_recipe(ROOT / "recipes" / "oprd_vanilla.yaml", overrides), Given())
    ids = tuple(tuple(range(5, 5 + n)) for n in (40, 7))
    rollouts = Rollouts(prompts=run.prompts[:2], completion_ids=ids, finished=(False, True))
    update = update_step(run, rollouts, Clock(torch.device("cpu")))
    assert update.supervised == (47,)
    assert update.finite
    assert (
        yaml.safe_load((ROOT / "recipes" / "oprd_vanilla.yaml").read_text())["teacher"]["model"]
        == "hbx/JustRL-DeepSeek-1.5B"
    )
