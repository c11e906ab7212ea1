"""EffOPD: what moves, by how much, when it stays, and that nothing is lost or decided twice."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import MODELS, miniature_recipe
from oprd.config.models import LoraConfig
from oprd.config.reading import parse_recipe
from oprd.config.recipe import EffOPDConfig
from oprd.errors import ConfigError, DataError, Interrupted, TrainingStopped
from oprd.evaluate.verify import Verifier
from oprd.models import LanguageModel, _add_lora
from oprd.rollout.base import Sampling
from oprd.train.build import build
from oprd.train.extrapolation import (
    Extrapolation,
    Scores,
    is_trigger,
    movable_weights,
    paired_p_value,
    search,
    validation_prompts,
)
from oprd.train.log import Clock
from oprd.train.run import run_recipe
from oprd.train.update import update_step
from oprd.train.validation import validate
from oprd.types import PromptBatch
from train.test_resume import MACHINE, assert_equal_runs, weights
from train.test_update import SHARDED, rollouts_of

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=48, samples=1)
ALWAYS = EffOPDConfig(validation_prompts=1)


@pytest.fixture
def by_hand() -> LanguageModel:
    """One block whose every weight is 1."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, head_dim=4
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    return LanguageModel(model=model, tokenizer=None, name="by hand")  # type: ignore[arg-type]


def extrapolation(config: EffOPDConfig, lm: LanguageModel) -> Extrapolation:
    return Extrapolation(config, lm, add_shards=list, everywhere=lambda value: [value])


def add(lm: LanguageModel, amount: float) -> None:
    """An optimizer update, as far as the weights can tell."""
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(amount)


def scripted(*means: float):
    """Scores that fall from the sky: the plain weights' first, then each candidate's."""
    left = list(means)
    return lambda *_: Scores(values=(left.pop(0),), tokens=10)


# The arithmetic


def test_candidates_by_hand(by_hand):
    effopd = extrapolation(ALWAYS, by_hand)
    add(by_hand, 0.5)  # 1 to 1.5: delta = 0.5
    seen = []

    def score() -> Scores:
        seen.append(by_hand.blocks[0].mlp.up_proj.weight[0, 0].item())
        return Scores(values=(0.0,), tokens=1)

    effopd.after_update(1, score)
    assert seen == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]  # 1.5 + 2k * 0.5, k = 0..5
    assert by_hand.blocks[0].mlp.up_proj.weight[0, 0].item() == 6.5
    add(by_hand, 0.25)
    seen.clear()
    effopd.after_update(2, score)
    assert seen[:2] == [6.75, 7.25]  # delta is counted from the accepted weights, not from before them


def test_only_attention_and_mlp_weights_move(by_hand):
    effopd = extrapolation(ALWAYS, by_hand)
    add(by_hand, 0.5)
    effopd.after_update(1, scripted(0, 1, 0))
    values = {name: value.flatten()[0].item() for name, value in by_hand.model.named_parameters()}
    moved = {name for name, value in values.items() if value == 2.5}
    assert moved == {n for n in values if ".self_attn." in n or ".mlp." in n}
    assert {n for n in values if n not in moved} == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
    }  # fmt: skip
    assert all(values[n] == 1.5 for n in values if n not in moved)


def test_norms_inside_the_attention_stay_and_frozen_weights_stay(base):
    names = set(movable_weights(base))
    assert "1.self_attn.q_proj.weight" in names
    assert not any("norm" in name for name in names)
    for parameter in base.blocks[3].parameters():
        parameter.requires_grad_(False)
    assert {name.partition(".")[0] for name in movable_weights(base)} == {"1", "2", "3"}


def test_of_a_lora_student_the_adapter_moves(base):
    lm = LanguageModel(model=_add_lora(base.model, LoraConfig(r=2)), tokenizer=base.tokenizer, name="lora")
    names = movable_weights(lm)
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    before = {name: value.clone() for name, value in lm.model.named_parameters()}
    effopd = extrapolation(ALWAYS, lm)
    with torch.no_grad():
        for value in names.values():
            value.add_(0.5)
    effopd.after_update(1, scripted(0, 1, 0))
    for name, value in lm.model.named_parameters():
        assert_close(value, before[name] + (1.5 if value.requires_grad else 0.0), msg=name)


def test_when_no_candidate_is_accepted_the_step_is_a_plain_one_bit_for_bit(tmp_path, train_file):
    run = build(parse_recipe(miniature_recipe(tmp_path, train_file)))
    effopd = extrapolation(ALWAYS, run.lm)
    update_step(run, rollouts_of(run), Clock(torch.device("cpu")))
    plain = {name: value.clone() for name, value in run.lm.model.state_dict().items()}
    moments = {id(p): [v.clone() for v in state.values()] for p, state in run.stage.optimizer.state.items()}
    found = effopd.after_update(1, scripted(1.0, 0.5))
    assert found is not None
    assert found["accepted"] == 0.0
    assert all(torch.equal(value, plain[name]) for name, value in run.lm.model.state_dict().items())
    for parameter, state in run.stage.optimizer.state.items():
        assert all(torch.equal(a, b) for a, b in zip(state.values(), moments[id(parameter)], strict=True))


def test_without_movement_there_is_no_search(by_hand):
    effopd = extrapolation(ALWAYS, by_hand)
    assert effopd.after_update(1, lambda: pytest.fail("scored")) is None  # a warm-up that starts at zero


# The decisions


@pytest.mark.parametrize(
    ("scores", "accepted", "tried"),
    [
        ((0.4, 0.3), 0, 1),
        ((0.4, 0.4, 0.3), 2, 2),  # a tie is enough
        ((0.4, 0.5, 0.45), 2, 2),  # the first that is not stops the search, however good it is against the start
        ((0.4, 0.5, 0.6, 0.7, 0.8, 0.9), 10, 5),
        ((0.4, 0.5, 0.6, 0.5), 4, 3),
        ((0.4, float("nan")), 0, 1),
        ((-math.inf, -math.inf), 0, 1),
        ((0.4, math.inf), 0, 1),
    ],
)
def test_the_search_goes_on_while_the_score_does_not_fall(scores, accepted, tried):
    found = search(EffOPDConfig(), scripted(*scores))
    assert found.accepted == accepted
    assert [c.factor for c in found.candidates] == [2, 4, 6, 8, 10][:tried]
    assert found.tokens == 10 * (tried + 1)
    assert found.score == scores[0]


def test_without_accept_ties_an_equal_score_is_not_enough():
    assert search(EffOPDConfig(accept_ties=False), scripted(0.4, 0.4)).accepted == 0
    assert search(EffOPDConfig(accept_ties=False), scripted(0.4, 0.41, 0.41)).accepted == 2


@pytest.mark.parametrize("samples", [3, 5, 10])
def test_as_many_right_answers_on_other_prompts_are_a_tie(samples):
    draw = torch.Generator().manual_seed(samples)
    right = torch.randint(0, samples + 1, (50,), generator=draw)
    for _ in range(50):
        again = right[torch.randperm(50, generator=draw)]
        both = [tuple((x / samples).tolist()) for x in (right.double(), again.double())]
        for config, accepted in ((ALWAYS, 2.0), (EffOPDConfig(accept_ties=False), 0.0)):
            left = [*both, (0.0,) * 50]
            found = search(config, lambda _, left=left: Scores(values=left.pop(0), tokens=0))
            assert found.accepted == accepted


def test_the_paired_test_by_hand():
    # four prompts each better by 1: of the 16 choices of signs one is as good, p = 1/16
    assert paired_p_value((0,) * 4, (1,) * 4) == pytest.approx(1 / 16, abs=0.01)
    # +1, +1, -1: sums of 3 signs are at least 1 in half of the cases
    assert paired_p_value((0, 0, 1), (1, 1, 0)) == pytest.approx(1 / 2, abs=0.02)
    assert paired_p_value((0.1, 0.2), (0.1, 0.2)) == 1.0
    assert paired_p_value((0.0,), (float("nan"),)) == 1.0


def test_under_chance_the_paired_test_accepts_at_its_level():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand((400, 2, 50), generator=generator).round()
    p = torch.tensor([paired_p_value(a.tolist(), b.tolist()) for a, b in scores])
    # 5% of 400, standard deviation 1.1%; discrete differences make it conservative
    assert 0.01 < float((p <= 0.05).float().mean()) < 0.085


def test_paired_acceptance_wants_more_than_a_better_mean():
    def search_with(gains: list[int]) -> float:
        left = [(0.0,) * 20, tuple(map(float, gains)), (0.0,) * 20]
        return search(EffOPDConfig(accept="paired"), lambda _: Scores(values=left.pop(0), tokens=0)).accepted

    assert search_with([1] + [0] * 19) == 0.0  # p = 1/2
    assert search_with([1] * 4 + [0] * 16) == 0.0  # p = 1/16
    assert search_with([1] * 6 + [0] * 14) == 2.0  # p = 1/64


def test_triggers():
    assert [t for t in range(1, 20) if is_trigger(EffOPDConfig(), t)] == [1, 2, 4, 8, 16]
    every = EffOPDConfig(triggers="every_n", every=5)
    assert [t for t in range(1, 20) if is_trigger(every, t)] == [5, 10, 15]


def test_settled_searches_only_when_the_last_movement_points_where_the_one_before_did(by_hand):
    effopd = extrapolation(EffOPDConfig(triggers="settled", every=1, settled_cosine=0.9), by_hand)
    found = []
    for step, amount in enumerate((0.5, 0.5, -0.5, -0.25), start=1):
        add(by_hand, amount)
        found.append(effopd.after_update(step, scripted(1.0, 0.0)))
    assert [f is not None for f in found] == [False, True, False, True]  # nothing before the first; then it turned
    assert found[1]["cosine"] == pytest.approx(1.0)


def test_processes_that_decide_differently_stop_the_run_before_one_of_them_goes_on(by_hand):
    effopd = Extrapolation(ALWAYS, by_hand, add_shards=list, everywhere=lambda value: [value, 0.0])
    add(by_hand, 0.5)
    with pytest.raises(TrainingStopped, match="processes accepted different candidates"):
        effopd.after_update(1, scripted(0, 1))  # the plain update's and the first candidate's; a third would raise


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"triggers": "every_n"}, r"triggers='every_n' needs extrapolation\.every"),
        ({"every": 3}, r"extrapolation\.every=3 has no meaning"),
        ({"settled_cosine": 0.5}, "settled_cosine has no meaning"),
        ({"level": 0.1}, "level has no meaning"),
        ({"accept": "paired", "accept_ties": False}, "accept_ties has no meaning"),
        ({"factors": [4.0, 2.0]}, "factors must rise"),
        ({"accept": "paired", "validation_prompts": 4}, r"gives no p below 0\.062, so that nothing is ever accepted"),
        ({"accept": "paired", "level": 1e-5}, r"gives no p below 0\.0001"),
    ],
)
def test_a_senseless_combination_is_refused(options, told, tmp_path, train_file):
    with pytest.raises(ConfigError, match=told):
        parse_recipe(miniature_recipe(tmp_path, train_file, extrapolation=options))


def test_missing_prompts_or_answers_are_told_before_anything_is_loaded(tmp_path, train_file):
    with pytest.raises(ConfigError, match="validation_prompts is 99, the dataset has 64"):
        build(parse_recipe(miniature_recipe(tmp_path, train_file, extrapolation={"validation_prompts": 99})))
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"problem": f"{i}+1"}) + "\n" for i in range(60)))
    with pytest.raises(DataError, match=r"has no 'answer' \(data\.answer\); set extrapolation\.score=objective"):
        build(parse_recipe(miniature_recipe(tmp_path / "run", bare, extrapolation={})))


# The scores


def run_of(tmp_path, train_file, **effopd):
    tree = miniature_recipe(tmp_path, train_file, extrapolation={"validation_prompts": 16} | effopd)
    return build(parse_recipe(tree))


def test_accuracy_is_that_of_the_verifier(tmp_path, train_file):
    tree = miniature_recipe(tmp_path, train_file, extrapolation={"validation_prompts": 24, "validation_samples": 2})
    run = build(parse_recipe(tree | {"student": {"model": str(MODELS / "teacher")}}))
    config = run.recipe.extrapolation
    with Verifier() as verifier:
        scores = validate(run, config, verifier, Sampling(**{**vars_of(SAMPLING), "samples": 2}), step=1)
    assert len(scores.values) == 24
    assert set(scores.values) <= {0.0, 0.5, 1.0}
    assert scores.mean > 0.8  # the embedded teacher: 0.93
    assert scores.tokens > 24 * 2 * 10


def vars_of(sampling: Sampling) -> dict[str, object]:
    return {name: getattr(sampling, name) for name in sampling.__slots__}


def test_the_objectives_score_is_minus_its_mean_and_zero_at_the_teacher(tmp_path, train_file):
    run = run_of(tmp_path / "a", train_file, score="objective")
    scores = validate(run, run.recipe.extrapolation, None, SAMPLING, step=1)
    prompts = validation_prompts(run.recipe.extrapolation, run.prompts, run.recipe.seed)
    assert len({prompt.row for prompt in prompts}) == 16
    again = validate(run, run.recipe.extrapolation, None, SAMPLING, step=1)
    assert again == scores
    assert all(value < 0 for value in scores.values)
    tree = miniature_recipe(tmp_path / "b", train_file, extrapolation={"validation_prompts": 16, "score": "objective"})
    same = build(parse_recipe(tree | {"student": {"model": str(MODELS / "teacher")}}))
    assert_close(validate(same, same.recipe.extrapolation, None, SAMPLING, step=1).mean, 0.0, atol=1e-6, rtol=0)


def test_a_completion_without_a_supervised_token_is_no_perfect_one(tmp_path, train_file, monkeypatch):
    from oprd.train import validation

    run = run_of(tmp_path, train_file, score="objective")
    real = validation._minus_objective
    config = run.recipe.extrapolation
    plain = validate(run, config, None, SAMPLING, step=1)
    first = validation_prompts(config, run.prompts, run.recipe.seed)[0].row
    monkeypatch.setattr(
        validation, "_minus_objective", lambda *x: [(row, None if row == first else v) for row, v in real(*x)]
    )
    assert validate(run, config, None, SAMPLING, step=1).values == (min(plain.values[1:]), *plain.values[1:])
    monkeypatch.setattr(validation, "_minus_objective", lambda *x: [(row, None) for row, _ in real(*x)])
    assert validate(run, config, None, SAMPLING, step=1).mean == -math.inf
    # a loss that is not a number is another thing, and is never accepted
    monkeypatch.setattr(validation, "_minus_objective", lambda *x: [(row, math.nan) for row, _ in real(*x)])
    assert math.isnan(validate(run, config, None, SAMPLING, step=1).mean)


def test_norms_of_every_name_stay():
    class GatedRMSNormOfAKind(torch.nn.LayerNorm):
        pass

    block = torch.nn.ModuleDict({"norm_1": GatedRMSNormOfAKind(4), "mlp": torch.nn.Linear(4, 4, bias=False)})
    assert list(movable_weights(SimpleNamespace(blocks=[block]))) == ["1.mlp.weight"]


def test_the_engine_writes_with_the_accepted_weights(tmp_path, train_file):
    run = run_of(tmp_path, train_file)
    prompts = PromptBatch(prompts=run.prompts[:4])
    update_step(run, rollouts_of(run), Clock(torch.device("cpu")))
    written = []

    def score() -> Scores:
        written.append(run.engine.generate(prompts, SAMPLING, seed=3).completion_ids)
        return Scores(values=(float(len(written) <= 3),), tokens=0)

    assert run.stage.extrapolation.after_update(1, score)["accepted"] == 4.0
    assert run.engine.generate(prompts, SAMPLING, seed=3).completion_ids == written[2]
    assert written[2] != written[0]


def test_scoring_leaves_no_count_behind_and_draws_alike_for_every_candidate(tmp_path, train_file):
    objective = {"type": "opd", "estimator": "sampled", "redraw": True}
    effopd = {"validation_prompts": 8, "score": "objective"}
    run = build(parse_recipe(miniature_recipe(tmp_path, train_file, objective=objective, extrapolation=effopd)))
    config = run.stage.extrapolation.config
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one, two = (validate(run, config, None, SAMPLING, 1) for _ in range(2))
    assert one == two
    assert torch.equal(torch.random.get_rng_state(), state)
    counting = run.stage.objectives[0]
    counting.tallies = lambda: drained.append(1) or ()
    drained: list[int] = []
    validate(run, config, None, SAMPLING, 1)
    assert drained == [1]


def test_accuracy_is_scored_on_whole_completions_whatever_the_schedule_allows_yet(tmp_path, train_file):
    rollout = {
        "group_size": 1,
        "max_completion_length": 48,
        "length_schedule": {"type": "linear", "start": 4, "steps": 9},
    }
    tokens = {}
    for score in ("accuracy", "objective"):
        effopd = {"validation_prompts": 8, "score": score, "factors": [2.0]}
        run_recipe(parse_recipe(miniature_recipe(
            tmp_path / score, train_file, rollout=rollout, extrapolation=effopd, max_steps=1, learning_rate=1e-5
        )))  # fmt: skip
        (found,) = searches(tmp_path / score)
        tokens[score] = found["tokens"] / 2 / 8
    assert tokens["accuracy"] > 20
    assert tokens["objective"] == 4  # where it is trained: the cut prefixes


# Runs


def small_run(folder: Path, train_file: Path, **changes: object) -> dict[str, object]:
    effopd = {"validation_prompts": 4, "score": "objective", "factors": [2.0, 4.0]}
    return miniature_recipe(
        folder, train_file, max_steps=5, save_steps=3, learning_rate=1e-4, extrapolation=effopd, **changes
    )


def searches(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "searches.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_run_resumed_across_a_trigger_equals_the_uninterrupted_run(tmp_path, train_file, monkeypatch):
    from oprd.train import loop

    run_recipe(parse_recipe(small_run(tmp_path / "whole", train_file)))
    real = loop._save

    def save_and_die(run, progress):
        real(run, progress)
        raise Interrupted

    monkeypatch.setattr(loop, "_save", save_and_die)
    with pytest.raises(Interrupted):
        run_recipe(parse_recipe(small_run(tmp_path / "run", train_file)))
    monkeypatch.setattr(loop, "_save", real)
    # a search that a lost step has logged is forgotten
    with (tmp_path / "run" / "searches.jsonl").open("a") as lines:
        lines.write('{"step": 4, "accepted": 99}\n')
    run_recipe(parse_recipe(small_run(tmp_path / "run", train_file, resume_from_checkpoint="latest")))
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    assert searches(tmp_path / "whole") == searches(tmp_path / "run")
    assert [row["step"] for row in searches(tmp_path / "run")] == [1, 2, 4]
    assert any(row["accepted"] for row in searches(tmp_path / "run"))
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row.get("time/extrapolation_s", 0) > 0.01] == [1, 2, 4]
    assert [row.get("tokens/extrapolation/sum") for row in steps if row["step"] in (1, 2, 4)] == [
        row["tokens"] for row in searches(tmp_path / "run")
    ]


@pytest.mark.parametrize(
    ("effopd", "changes"),
    [
        ({"triggers": "settled", "every": 1, "settled_cosine": 0.1}, {}),
        ({"score": "accuracy", "validation_samples": 2}, {}),
        ({}, {"student": {"model": str(MODELS / "base"), "lora": {"r": 4, "alpha": 8}}, "logging_steps": 3}),
    ],
    ids=["settled", "accuracy", "lora"],
)
def test_every_kind_of_search_resumes_exactly(effopd, changes, tmp_path, train_file, monkeypatch):
    from oprd.train import loop

    tree = {name: small_run(tmp_path / name, train_file) | changes | {"save_steps": 1} for name in ("whole", "run")}
    for one in tree.values():
        one["extrapolation"] |= effopd
    run_recipe(parse_recipe(tree["whole"]))
    real = loop._save

    def save_and_die(run, progress):
        real(run, progress)
        if progress.step == 3:
            raise Interrupted

    monkeypatch.setattr(loop, "_save", save_and_die)
    with pytest.raises(Interrupted):
        run_recipe(parse_recipe(tree["run"]))
    monkeypatch.setattr(loop, "_save", real)
    run_recipe(parse_recipe(tree["run"] | {"resume_from_checkpoint": "latest"}))
    found = searches(tmp_path / "whole")
    assert found == searches(tmp_path / "run")
    assert found[-1]["step"] > 3
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "run")
    # every search is in the metrics, whatever is logged beside it, and so is what all cost together
    logged = steps_of(tmp_path / "whole")
    assert [row["tokens/extrapolation/sum"] for row in logged if "extrapolation/factor" in row] == [
        row["tokens"] for row in found
    ]
    if "logging_steps" not in changes:
        assert logged[-1]["tokens/generated/total"] == sum(
            row["tokens/generated/sum"] + row.get("tokens/extrapolation/sum", 0) for row in logged
        )
    snapshots = 3 if "triggers" in effopd else 2
    moved = sum(
        v.numel()
        for v in build(
            parse_recipe(tree["whole"] | {"output_dir": str(tmp_path / "c")})
        ).stage.extrapolation._weights.values()
    )
    assert found[0]["snapshot_mib"] == pytest.approx(snapshots * moved * 4 / 2**20, abs=1e-3)


def steps_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MACHINE)} for row in rows]


WITNESS = """
# each process writes down what it holds after training
import hashlib, json, sys
from pathlib import Path
import torch
from oprd.config.reading import load_recipe
from oprd.train.build import build
from oprd.train.loop import train
torch.set_num_threads(1)
run = build(load_recipe(sys.argv[1]))
train(run)
held = {n: (w.full_tensor() if hasattr(w, "full_tensor") else w).detach() for n, w in run.stage.extrapolation._weights.items()}
local = sum(t.to_local().numel() if hasattr(t, "to_local") else t.numel() for t in run.stage.extrapolation.state().values())
digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in held.values())).hexdigest()
out = {"weights": digest, "snapshot": local, "trained": sum(v.numel() for v in held.values())}
Path(sys.argv[1]).with_name(f"rank-{run.accelerator.process_index}.json").write_text(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "fsdp2 in one piece"])
def test_two_processes_take_the_same_decision(how, tmp_path, train_file):
    given = tmp_path / "given.jsonl"
    rows = [json.loads(line) for line in train_file.read_text().splitlines()]
    given.write_text("".join(json.dumps(row | {"completion": "1+2=3\n\\boxed{3}"}) + "\n" for row in rows))
    rollout = {"lambda_on_policy": 0.0, "max_completion_length": 48}
    tree = small_run(tmp_path / "run", given, rollout=rollout) | {"max_steps": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    # as in test_update: FSDP2's state where accelerate would put it on a GPU
    preamble = SHARDED.partition("from oprd.cli")[0] if how != "ddp" else ""
    if how == "fsdp2 in one piece":  # weights stay gathered after a forward pass
        preamble = preamble.replace("transformer_based_wrap", "no_wrap")
    (tmp_path / "witness.py").write_text(preamble + WITNESS)
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port=0"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "witness.py"), str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert one["weights"] == two["weights"]
    found = searches(tmp_path / "run")
    assert any(row["accepted"] for row in found)
    if how != "ddp":  # only shards are held; and every process scores all prompts, as one process alone does
        assert one["snapshot"] + two["snapshot"] == one["trained"]
        run_recipe(parse_recipe(tree | {"output_dir": str(tmp_path / "alone")}))
        for ours, theirs in zip(found, searches(tmp_path / "alone"), strict=True):
            assert ours["accepted"] == theirs["accepted"]
            assert ours["score"] == pytest.approx(theirs["score"], rel=1e-3)
        ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "alone")
        for name, value in theirs.items():  # a multiple of delta is a multiple of its rounding
            assert_close(ours[name], value, atol=1e-5, rtol=0, msg=name)
    else:
        assert one["snapshot"] == one["trained"]
