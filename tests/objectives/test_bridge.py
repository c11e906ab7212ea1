"""OPRD-Bridge end to end: fit, refuse, train, resume, two stages."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close
from typer.testing import CliRunner

from conftest import MODELS, load_miniature, miniature_recipe
from oprd import models
from oprd.bridge.file import load_bridge
from oprd.cli import app
from oprd.config.objectives import BridgeConfig
from oprd.config.reading import parse_recipe
from oprd.data.chat import render
from oprd.data.collate import collate_student, split_by_tokens
from oprd.demo.task import sums, write_jsonl
from oprd.errors import ConfigError, DataError, TeacherMismatch
from oprd.kernels.chunked import REACH
from oprd.models import read_states
from oprd.objectives.bridge import SURE, Bridge
from oprd.train import fit_bridge as fitting
from oprd.train.build import build
from oprd.train.check import Given
from oprd.train.fit_bridge import fit_bridge, prepare_fit
from oprd.train.run import run_recipe
from oprd.types import HiddenTargets, Message, Prompt, Rollouts, States

WIDE = {"type": "local", "model": str(MODELS / "wide_teacher"), "dtype": "float32"}
OPD = {"type": "opd", "estimator": "sampled"}


def bridge_recipe(folder: Path, prompts: Path, bridge: Path, objective: dict | None = None, **changes) -> dict:
    config = {"type": "oprd_bridge", "bridge": str(bridge), "tokens": "all", "rank": 8, "layers": "all"} | (
        objective or {}
    )
    return miniature_recipe(folder, prompts, teacher=WIDE, objective=config, **changes)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fit") / "prompts.jsonl"
    write_jsonl(path, sums(40, seed=5, held_out=False))
    return path


@pytest.fixture(scope="module")
def bridge(tmp_path_factory, prompts) -> Path:
    path = tmp_path_factory.mktemp("fit") / "bridge.safetensors"
    fit_bridge(parse_recipe(bridge_recipe(path.parent / "run", prompts, path)))
    return path


def test_the_file_holds_every_rank_and_its_held_out_numbers(bridge):
    file = load_bridge(bridge)
    assert file.setting.blocks == ((1, 1), (2, 3), (3, 4), (4, 6))
    assert (file.student.width, file.teacher.width, file.rank) == (128, 192, 128)
    for block, _ in file.setting.blocks:
        solution, measured = file.solutions[block], file.measured[block]
        assert solution.student_projection.shape == (128, 128)
        assert solution.teacher_projection.shape == (128, 192)
        eye = solution.teacher_projection @ solution.teacher_projection.T
        assert_close(eye, torch.eye(128), atol=1e-5, rtol=0)
        assert len(measured.cosine) == 128
        assert measured.cosine[7] > 0.5
        assert measured.held_out_rows < 0.2 * measured.rows


@pytest.mark.parametrize("method", ["closed_form", "gradient"])
def test_an_interrupted_fit_goes_on_and_gives_the_same_file(method, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "SAVE_EVERY", 1)
    path = tmp_path / "b.safetensors"
    recipe = bridge_recipe(tmp_path / "run", prompts, path, {"fit": {"method": method}})
    recipe["rollout"] |= {"max_sequences": 32}  # three batches
    whole = tmp_path / "whole.safetensors"
    fit_bridge(parse_recipe(recipe | {"objective": recipe["objective"] | {"bridge": str(whole)}}))
    real, calls = fitting.Sums.save, []

    def save_and_stop(self, path, key):
        real(self, path, key)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(fitting.Sums, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        fit_bridge(parse_recipe(recipe))
    assert not path.exists()
    with pytest.raises(DataError, match=r"b.safetensors.partial is an interrupted fit of other"):
        fit_bridge(parse_recipe(recipe | {"seed": 1}))
    monkeypatch.setattr(fitting.Sums, "save", real)
    fit_bridge(parse_recipe(recipe))
    assert path.read_bytes() == whole.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_from_the_command_line_fit_train_and_the_figures_of_the_report(prompts, tmp_path):
    tree = bridge_recipe(tmp_path / "run", prompts, tmp_path / "b.safetensors", {"layers": "last"}, max_steps=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))

    def oprd(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    told = oprd("fit-bridge", str(recipe))
    assert "block 4 to 6: automatic rank" in told
    assert str(tmp_path / "b.safetensors") in told
    oprd("train", str(recipe))
    oprd("report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    file = load_bridge(tmp_path / "b.safetensors")
    assert "Bridge: held-out cosine of the projections" in page
    assert "Bridge: held-out canonical correlations" in page
    assert "block 4 to 6, rank 8" in page
    assert str(round(float(file.solutions[4].canonical[0]), 5)) in page


def test_a_fit_never_writes_over_a_file(bridge, prompts, tmp_path):
    before = bridge.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        fit_bridge(parse_recipe(bridge_recipe(tmp_path, prompts, bridge)))
    assert bridge.read_bytes() == before


@pytest.mark.parametrize(
    ("objective", "error", "reason"),
    [
        ({"rank": 129}, ConfigError, "rank is 129; the student's states have 128 dimensions, the teacher's 192, so it is 128"),
        ({"rank": [8, 8]}, ConfigError, "lists 2 ranks; 4 blocks are matched"),
        ({"layers": [5]}, ConfigError, "block 5; the student has blocks 1 to 4"),
        ({"normalization": "none"}, TeacherMismatch, "fitted with normalization 'l2', the recipe has 'none'"),
        ({"tokens": "last_k", "k": 5}, TeacherMismatch, "fitted with tokens 'all', the recipe has 'last_k'"),
        ({"fit": {"method": "gradient"}}, TeacherMismatch, "fitted with method 'closed_form', the recipe has 'gradient'"),
        ({"bridge": "none.safetensors"}, DataError, "none.safetensors is not there; `oprd fit-bridge RECIPE` writes it"),
        ({"bridge": str(MODELS / "base/model.safetensors")}, DataError, "was not written by `oprd fit-bridge`"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_the_recipe_is_refused_before_loading(
    objective, error, reason, bridge, prompts, tmp_path, monkeypatch
):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(error, match=reason.replace("(", r"\(")):
        build(parse_recipe(bridge_recipe(tmp_path / "run", prompts, bridge, objective)))
    assert not (tmp_path / "run").exists()


def test_another_alignment_another_model_and_another_block_map_are_refused(bridge, prompts, tmp_path):
    tree = bridge_recipe(tmp_path / "run", prompts, bridge)
    with pytest.raises(TeacherMismatch, match="fitted with alignment 'bytes', the recipe has 'shared_ids'"):
        build(parse_recipe(tree | {"teacher": WIDE | {"alignment": "shared_ids"}}))
    with pytest.raises(TeacherMismatch, match="fitted for a teacher of 6 blocks of width 192"):
        build(parse_recipe(tree | {"teacher": WIDE | {"model": str(MODELS / "teacher")}}))
    file = load_bridge(bridge)
    moved = tmp_path / "moved.safetensors"
    replace(file, setting=replace(file.setting, blocks=((1, 1), (2, 2), (3, 4), (4, 6)))).save(moved)
    with pytest.raises(TeacherMismatch, match=r"fitted for the blocks \(student, teacher\) \(1, 1\), \(2, 2\)"):
        build(parse_recipe(bridge_recipe(tmp_path / "run", prompts, moved)))


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_file_for_other_weights_or_another_tokenizer_is_refused(which, bridge, prompts, tmp_path):
    lm = load_miniature("base" if which == "student" else "wide_teacher")
    folder = tmp_path / "other"
    with torch.no_grad():
        lm.model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    tree = bridge_recipe(tmp_path / "run", prompts, bridge)
    tree[which] = tree[which] | {"model": str(folder)}
    with pytest.raises(TeacherMismatch, match=f"fitted for other weights of the {which}"):
        build(parse_recipe(tree))
    lm.tokenizer.chat_template += " "
    lm.tokenizer.save_pretrained(folder)
    with pytest.raises(TeacherMismatch, match=f"another tokenizer or chat template of the {which}"):
        build(parse_recipe(tree))


def test_fit_prompts_that_are_empty_or_too_few_are_refused(prompts, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "two.jsonl").write_text('{"problem": "1+2+3"}\n{"problem": "4+2+3"}\n')
    for name, reason in (
        ("empty", "the dataset is empty"),
        ("two", "has 2 prompts, of which held_out=0.1 leaves none"),
    ):
        tree = bridge_recipe(tmp_path, prompts, tmp_path / "b", {"fit": {"prompts": str(tmp_path / f"{name}.jsonl")}})
        with pytest.raises(DataError, match=reason):
            fit_bridge(parse_recipe(tree))
    tree["objective"]["fit"] |= {"held_out": 0.5}
    with pytest.raises(DataError, match=r"block 1 of the student and 1 of the teacher: \d+ rows to fit and"):
        fit_bridge(parse_recipe(tree))
    assert not (tmp_path / "b").exists()


def test_the_loss_between_projections_by_hand(bridge):
    """Two tokens whose projections are chosen: parallel gives 0, opposite (1/r) |2|^2."""
    config = BridgeConfig(bridge=str(bridge), tokens="all", rank=2, layers="last", space="projections")
    objective = Bridge(config, blocks=4, vocabulary=262)
    with torch.no_grad():
        for name, buffer in objective.named_buffers():
            buffer.zero_()
            if "mean" not in name:
                buffer[0, 0] = buffer[1, 1] = 1.0
    student = torch.zeros(2, 128, requires_grad=True)
    with torch.no_grad():
        student[:, 0] = 3.0
    teacher = torch.zeros(2, 192)
    teacher[0, 0], teacher[1, 0] = 5.0, -1.0
    batch = collate_student(rollouts_of(load_miniature("base"), ["1"]), pad_id=0, device=torch.device("cpu"))
    values = objective.per_token(
        States(hidden={objective.readings[0]: student}, head=None, batch=batch),
        HiddenTargets(hidden={objective.teacher_readings[0]: teacher}, head=None),
    )
    assert_close(values, torch.tensor([0.0, 2.0]))
    values.sum().backward()
    assert student.grad is not None


def test_the_target_in_the_students_space_is_its_own_state_moved_to_the_teachers_coordinates(bridge, prompts, tmp_path):
    objective = {"layers": "last", "rank": 5, "trust": 0.0, "sharpen": False}
    run = build(parse_recipe(bridge_recipe(tmp_path, prompts, bridge, objective)))
    found = run.stage.objectives[0]
    rollouts = run.teacher.prepare(as_rendered(run.lm, rollouts_of(run.lm, ["12+34=46", "9"])))
    assert (found.supervised(rollouts), rollouts.supervised(found.tokens)) == ((8, 1), (7, 1))
    assert found.weights(rollouts) == (1.0, 1.0)
    assert found.divisor(rollouts) == 9
    targets = run.teacher.targets(rollouts, run.stage.distill.teacher_readings, head=run.stage.distill.teacher_head)
    batch = collate_student(rollouts, pad_id=0, device=run.lm.device)
    theirs, before = (targets.hidden[reading] for reading in found.teacher_readings)
    paired, _ = found.moved(batch, targets)
    assert paired.tolist() == [True, True, True, False, True, True, True, True, True]
    edited = found.edit(4, before, theirs, paired)
    assert_close(edited[3], before[3])
    own, wanted = found.project("student", 4, before)[paired], found.project("teacher", 4, theirs)
    correlation = load_bridge(bridge).solutions[4].canonical[:5].sqrt()
    assert_close(found.project("student", 4, edited)[paired] - own, correlation * (wanted - own), atol=0.05, rtol=0.05)
    # what of the state is no canonical coordinate is left as it was
    assert float((edited - before)[paired].norm()) < float(before[paired].norm())
    states = read_states(run.lm, batch, found.readings, head=False)
    values = found.per_token(states, targets)
    assert float(values[3].detach()) == pytest.approx(0.0, abs=1e-8)  # nothing learned yet, nothing to keep
    assert float(values[paired].detach().min()) > 1e-6
    # ||a/|a| - b/|b|||^2 = 2 - 2 cos
    cosine = torch.nn.functional.cosine_similarity(states.hidden[found.readings[0]], edited, dim=-1)
    assert_close(values, (2 - 2 * cosine) / 128, atol=1e-6, rtol=1e-4)
    values.sum().backward()
    assert theirs.grad_fn is None
    assert before.grad_fn is None
    assert run.lm.model.model.layers[3].mlp.up_proj.weight.grad is not None


def test_the_target_is_made_as_sure_as_the_teacher_is(bridge, prompts, tmp_path):
    run = build(parse_recipe(bridge_recipe(tmp_path, prompts, bridge, {"rank": "full", "trust": 0.0})))
    found = run.stage.objectives[0]
    rollouts = run.teacher.prepare(as_rendered(run.lm, rollouts_of(run.lm, ["12+34=46\n46-5=42\n\\boxed{43}", "9"])))
    weight = run.lm.core.lm_head.weight.detach().clone()
    with torch.no_grad():
        run.lm.core.lm_head.weight.mul_(2.0)  # the head at start is what counts, not the one that has moved
    assert run.stage.distill.teacher_head
    assert not run.stage.distill.uses_head
    targets = run.teacher.targets(rollouts, run.stage.distill.teacher_readings, head=run.stage.distill.teacher_head)
    batch = collate_student(rollouts, pad_id=0, device=run.lm.device)
    paired, _ = found.moved(batch, targets)
    theirs, ours = found._of_teacher[3], found.readings[3]
    assert_close(targets.start_head.weight, weight)
    lm = load_miniature("wide_teacher")
    sure = (targets.hidden[theirs] @ lm.core.lm_head.weight.detach().T).softmax(-1).amax(-1)
    plain = found.edit(4, targets.hidden[ours], targets.hidden[theirs], paired)
    *_, below, sharp = found.wanted(batch, targets)
    assert_close(sharp[~paired], plain[~paired])
    before, after = ((h[paired] @ weight.T).softmax(-1).max(-1) for h in (plain, sharp))
    assert torch.equal(before.indices, after.indices)
    least = sure.clamp(max=SURE)
    unsure = before.values < least
    assert 0 < int(unsure.sum()) < len(unsure)
    assert float((after.values - before.values)[unsure].min()) > 0.01
    far = (sharp - plain)[paired].norm(dim=-1) >= 0.999 * REACH * plain[paired].norm(dim=-1)
    assert float((least - after.values)[unsure & ~far].max()) < 0.001
    assert int((unsure & ~far).sum()) > 0
    assert torch.equal(sharp[paired][~unsure], plain[paired][~unsure])
    # lower blocks have no head to be sure by
    assert_close(below, found.edit(3, *(targets.hidden[r] for r in (found.readings[2], found._of_teacher[2])), paired))


def test_through_the_head_the_loss_is_the_reverse_kl_to_what_the_head_said_before_training(bridge, prompts, tmp_path):
    objective = {"layers": "last", "loss": "reverse_kl", "coefficient": 1.0}
    run = build(parse_recipe(bridge_recipe(tmp_path, prompts, bridge, objective)))
    assert run.stage.distill.uses_head
    (found,) = run.stage.objectives
    before = run.lm.core.lm_head.weight.detach().clone()
    rollouts = run.teacher.prepare(as_rendered(run.lm, rollouts_of(run.lm, ["12+34=46\n46-5=42", "9"])))
    batch = collate_student(rollouts, pad_id=0, device=run.lm.device)
    with torch.no_grad():
        run.lm.core.lm_head.weight.add_(torch.randn_like(before), alpha=0.01)
    targets = run.teacher.targets(rollouts, run.stage.distill.teacher_readings, head=run.stage.distill.teacher_head)
    states = read_states(run.lm, batch, found.readings, head=True)
    values = found.per_token(states, targets)
    (wanted,) = found.wanted(batch, targets)
    log_p = (states.hidden[found.readings[0]] @ run.lm.core.lm_head.weight.T).log_softmax(-1)
    log_q = (wanted @ before.T).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert_close(values, expected, atol=1e-5, rtol=1e-4)
    weights = [run.lm.core.lm_head.weight, run.lm.model.model.layers[3].mlp.up_proj.weight]
    ours, by_autograd = (torch.autograd.grad(x.sum(), weights, retain_graph=True) for x in (values, expected))
    for gradient, reference in zip(ours, by_autograd, strict=True):
        assert_close(gradient, reference, atol=1e-4, rtol=1e-3)
    # nothing learned yet, nothing to keep: unpaired tokens start at zero
    with torch.no_grad():
        run.lm.core.lm_head.weight.copy_(before)
    targets = run.teacher.targets(rollouts, run.stage.distill.teacher_readings, head=run.stage.distill.teacher_head)
    states = read_states(run.lm, batch, found.readings, head=True)
    moved, _ = found.moved(batch, targets)
    values = found.per_token(states, targets)
    assert_close(values[~moved], torch.zeros_like(values[~moved]), atol=1e-6, rtol=0)
    assert float(values[moved].detach().max()) > 0.01


def test_through_the_head_a_run_learns_and_stale_rollouts_need_no_weights(bridge, prompts, tmp_path):
    objective = {"layers": "last", "loss": "reverse_kl", "coefficient": 1.0}
    tree = bridge_recipe(tmp_path, prompts, bridge, objective, max_steps=2, lr_scheduler_type="constant")
    done = run_recipe(parse_recipe(tree | {"rollout": tree["rollout"] | {"updates_per_rollout": 3}}))
    rows = [json.loads(line) for line in (done.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["train/reverse_kl/mean"] > 0 for row in rows)
    assert rows[0]["bridge/trusted/share"] > 0.9


def test_a_pair_that_only_an_unlikely_token_made_is_dropped(bridge, prompts, tmp_path):
    """12+3=: after 12+ the problem goes on with 34. The teacher's piece 3 ends because the student wrote = too early."""
    run = build(parse_recipe(bridge_recipe(tmp_path, prompts, bridge, {"layers": [2]})))
    problem = Prompt(row=0, messages=(Message(role="user", content="12+34-5"),), token_ids=())
    good, early = (run.lm.tokenizer(text)["input_ids"] for text in ("12+34=46", "12+3=15"))
    rollouts = Rollouts(prompts=(problem,) * 2, completion_ids=(tuple(good), tuple(early)), finished=(True, True))
    rollouts = run.teacher.prepare(as_rendered(run.lm, rollouts))
    assert rollouts.answers[0].student == (0, 1, 2, 4, 5, 6, 7)  # 34 is one piece of the teacher
    assert rollouts.answers[1].student == tuple(range(7))
    batch = collate_student(rollouts, pad_id=0, device=run.lm.device)
    targets = run.teacher.targets(rollouts, run.stage.distill.teacher_readings, head=run.stage.distill.teacher_head)
    found = run.stage.objectives[0]
    moved, trusted = found.moved(batch, targets)
    assert moved[:8].tolist() == [True, True, True, False, True, True, True, True]
    early = moved[8:]
    assert not early[3]
    assert early[[0, 1, 2, 4]].all()
    assert (len(trusted), int(trusted.sum())) == (14, int(moved.sum()))
    (share,) = found.tallies()
    assert (share.name, share.total, share.of) == ("bridge/trusted/share", float(moved.sum()), 14.0)
    (wanted,) = found.wanted(batch, targets)
    before = targets.hidden[found.readings[0]]
    assert_close(wanted[~moved], before[~moved])
    assert float((wanted - before)[moved].norm(dim=-1).min()) > 0
    # the last token of a completion has none behind it, and one that is all there is of it is trusted
    following, exists = batch.following(found.tokens)
    assert exists.tolist() == [True] * 7 + [False] + [True] * 6 + [False]
    assert following[:7].tolist() == good[1:]
    everything = build(parse_recipe(bridge_recipe(tmp_path, prompts, bridge, {"layers": [2], "trust": 0.0})))
    targets = everything.teacher.targets(
        rollouts, everything.stage.distill.teacher_readings, head=everything.stage.distill.teacher_head
    )
    assert int(everything.stage.objectives[0].moved(batch, targets)[0].sum()) == 14


def as_rendered(lm, rollouts):
    """Behind the prompt's own tokens."""
    prompts = (replace(prompt, token_ids=render(lm.tokenizer, prompt.messages)) for prompt in rollouts.prompts)
    return replace(rollouts, prompts=tuple(prompts))


@pytest.mark.parametrize("space", ["student", "projections"])
def test_a_truncated_completion_counts_as_the_first_part_of_the_whole(space, bridge, prompts, tmp_path):
    run = build(parse_recipe(bridge_recipe(tmp_path, prompts, bridge, {"space": space, "trust": 0.0})))
    whole = as_rendered(run.lm, rollouts_of(run.lm, ["12+34=46\n46-5=41"]))
    cut = replace(whole, completion_ids=(whole.completion_ids[0][:8],), finished=(False,))
    values = []
    for rollouts in map(run.teacher.prepare, (whole, cut)):
        targets = run.teacher.targets(rollouts, run.stage.distill.teacher_readings, head=run.stage.distill.teacher_head)
        batch = collate_student(rollouts, pad_id=0, device=run.lm.device)
        values.append(run.stage.model(batch, targets)[0].detach())
    # 34 is one piece of the teacher; and what it reads as its last piece might have gone on behind the cut
    assert [len(v) for v in values] == ([16, 8] if space == "student" else [15, 6])
    same = 7 if space == "student" else 6
    assert_close(values[1][:same], values[0][:same], atol=1e-4, rtol=1e-4)
    if space == "student":
        assert float(values[1][7]) == pytest.approx(0.0, abs=1e-8)  # it keeps the state it had


def test_the_student_at_start_stays_when_the_student_moves(bridge, prompts, tmp_path):
    run = build(parse_recipe(bridge_recipe(tmp_path, prompts, bridge, {"trust": 0.0})))
    rollouts = run.teacher.prepare(rollouts_of(run.lm, ["12+34=46"]))
    before = run.teacher.targets(
        rollouts, run.stage.distill.teacher_readings, head=run.stage.distill.teacher_head
    ).hidden
    with torch.no_grad():
        for weight in run.lm.model.model.layers.parameters():
            weight.add_(0.1)
    after = run.teacher.targets(
        rollouts, run.stage.distill.teacher_readings, head=run.stage.distill.teacher_head
    ).hidden
    for reading in run.stage.distill.teacher_readings:
        assert_close(after[reading], before[reading])


def rollouts_of(lm, texts):
    prompt = Prompt(row=0, messages=(Message(role="user", content="1+2"),), token_ids=(1, 2))
    ids = tuple(tuple(lm.tokenizer(text)["input_ids"]) for text in texts)
    return Rollouts(prompts=(prompt,) * len(texts), completion_ids=ids, finished=(True,) * len(texts))


def test_paired_positions_pack_the_same_text_on_both_sides(bridge, prompts, tmp_path):
    """The state after 34 is read where either model has read exactly that."""
    run = build(parse_recipe(bridge_recipe(tmp_path, prompts, bridge, {"trust": 0.0})))
    rollouts = run.teacher.prepare(rollouts_of(run.lm, ["12+34=46", "9"]))
    assert rollouts.supervised(run.stage.objectives[0].tokens) == (7, 1)
    reading = run.stage.objectives[0].teacher_readings[3]
    got = run.teacher.targets(rollouts, [reading], head=False).hidden[reading]
    lm = load_miniature("wide_teacher")
    prompt = lm.tokenizer("<|user|>1+2<|end|><|assistant|>")["input_ids"]
    alone = lm.model(
        input_ids=torch.tensor([[*prompt, *lm.tokenizer("12+34")["input_ids"]]]), output_hidden_states=True
    )
    assert_close(got[3], alone.hidden_states[-1][0, -1], atol=1e-4, rtol=1e-4)
    share = run.teacher.tallies()[0]
    assert (share.name, share.total, share.of) == ("teacher/paired/share", 8.0, 9.0)


def test_without_a_pair_the_run_stops_with_the_reason(bridge, prompts, tmp_path):
    from oprd.errors import TrainingStopped
    from oprd.train.log import Clock
    from oprd.train.update import update_step

    run = build(parse_recipe(bridge_recipe(tmp_path, prompts, bridge)))
    stray = run.lm.tokenizer("é")["input_ids"][1]  # a byte that begins no character
    bad = replace(rollouts_of(run.lm, ["1", "2"]), completion_ids=((stray,), (stray, stray)))
    with pytest.raises(TrainingStopped, match="no token of this step ends where one of the teacher's ends"):
        update_step(run, run.teacher.prepare(bad), Clock(torch.device("cpu")))


def test_frozen_projections_stay_trained_ones_move_and_are_written_beside_the_student(bridge, prompts, tmp_path):
    for name, moving in (("frozen", {}), ("trainable", {"trainable": True}), ("refit", {"refit_every": 1})):
        objective = moving | {"space": "projections"}
        tree = bridge_recipe(tmp_path / name, prompts, bridge, objective, max_steps=2, lr_scheduler_type="constant")
        run_recipe(parse_recipe(tree))
        beside = tmp_path / name / "bridge.safetensors"
        assert beside.exists() == (name != "frozen")
        stored = models.AutoModelForCausalLM.from_pretrained(tmp_path / name / "student")  # nothing of the bridge in it
        assert stored.config.hidden_size == 128
        if name != "frozen":
            before, after = load_bridge(bridge), load_bridge(beside)
            moved = after.solutions[1].student_projection - before.solutions[1].student_projection[:8]
            assert float(moved.abs().max()) > 1e-4
            assert after.student.weights != before.student.weights
            again = {"rank": 8, "bridge": str(beside), "space": "projections"}
            tree = bridge_recipe(tmp_path / f"{name}2", prompts, beside, again)
            build(parse_recipe(tree | {"student": {"model": str(tmp_path / name / "student")}}))


def test_the_kl_family_across_tokenizers_is_refused_but_for_sampled_reverse_kl(prompts, tmp_path):
    for objective in ({"type": "opd"}, {"type": "opd", "divergence": "forward_kl", "estimator": "sampled"}):
        with pytest.raises(TeacherMismatch, match="has another vocabulary"):
            build(parse_recipe(miniature_recipe(tmp_path, prompts, teacher=WIDE, objective=objective)))
    build(parse_recipe(miniature_recipe(tmp_path, prompts, teacher=WIDE, objective=OPD)))
    stale = miniature_recipe(tmp_path, prompts, teacher=WIDE, objective=OPD)
    stale["rollout"] = stale["rollout"] | {"updates_per_rollout": 2}
    with pytest.raises(ConfigError, match="importance weights are taken by token"):
        build(parse_recipe(stale))
    shared = WIDE | {"alignment": "shared_ids"}
    with pytest.raises(TeacherMismatch, match="mean nothing for the student's"):
        build(parse_recipe(miniature_recipe(tmp_path, prompts, teacher=shared, objective=OPD)))


def test_several_teachers_have_the_students_tokenizer(prompts, tmp_path):
    several = {"type": "several", "teachers": {"near": WIDE | {"model": str(MODELS / "teacher")}, "far": WIDE}}
    with pytest.raises(TeacherMismatch, match="teacher 'far' of several has another tokenizer"):
        build(parse_recipe(miniature_recipe(tmp_path, prompts, teacher=several, objective=OPD)))


def test_spans_have_each_models_own_log_probability(prompts, tmp_path):
    """12+34: the span `34` is two tokens of the student and one of the teacher."""
    run = build(parse_recipe(miniature_recipe(tmp_path, prompts, teacher=WIDE, objective=OPD)))
    rollouts = run.teacher.prepare(rollouts_of(run.lm, ["12+34", "5"]))
    objective = run.stage.objectives[0]
    targets = run.teacher.targets(rollouts, objective.teacher_readings, head=True)
    batch = collate_student(rollouts, pad_id=0, device=run.lm.device)
    states = read_states(run.lm, batch, objective.readings, head=True)
    values = objective.per_token(states, targets)

    def logprob(lm, prompt, text, piece) -> float:
        before, own = (lm.tokenizer(x)["input_ids"] for x in (text, text + piece))
        logits = lm.model(input_ids=torch.tensor([[*prompt, *own]])).logits.log_softmax(-1)[0].detach()
        return sum(float(logits[len(prompt) + i - 1, own[i]]) for i in range(len(before), len(own)))

    wide = load_miniature("wide_teacher")
    prompt = wide.tokenizer("<|user|>1+2<|end|><|assistant|>")["input_ids"]
    expected = [
        logprob(run.lm, [1, 2], text, piece) - logprob(wide, prompt, text, piece)
        for text, piece in (("", "1"), ("1", "2"), ("12", "+"), ("12+", "34"), ("", "5"))
    ]
    assert_close(values.detach(), torch.tensor(expected), atol=1e-3, rtol=1e-3)


def test_two_stages_in_one_folder_resume_across_the_boundary(bridge, prompts, tmp_path):
    objective = bridge_recipe(tmp_path, prompts, bridge)["objective"]
    stages = [
        {"objective": objective, "max_steps": 2},
        {"objective": OPD, "max_steps": 2, "learning_rate": 1e-4},
    ]
    tree = miniature_recipe(tmp_path / "whole", prompts, teacher=WIDE, stages=stages, lr_scheduler_type="constant")
    tree = {key: value for key, value in tree.items() if key not in ("objective", "max_steps")} | {"save_steps": 1}
    run_recipe(parse_recipe(tree | {"save_total_limit": 4}))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert ["train/oprd_bridge/mean" in row for row in rows] == [True, True, False, False]
    assert [row["train/learning_rate"] for row in rows] == [1e-3, 1e-3, 1e-4, 1e-4]
    assert all(row["teacher/paired/share"] > 0.5 for row in rows)
    assert all("health/student_entropy/mean" in row and "health/top_16_overlap/mean" not in row for row in rows)
    final = (tmp_path / "whole" / "student" / "model.safetensors").read_bytes()
    for step in (1, 2, 3):
        folder = tmp_path / "whole"
        (folder / "result.json").unlink()
        checkpoint = str(folder / "checkpoints" / f"step-{step:06d}")
        run_recipe(parse_recipe(tree | {"save_total_limit": 4, "resume_from_checkpoint": checkpoint}))
        assert (folder / "student" / "model.safetensors").read_bytes() == final, step


def test_stages_replace_objective_and_steps(bridge, prompts, tmp_path):
    tree = bridge_recipe(tmp_path, prompts, bridge, stages=[{"objective": OPD, "max_steps": 2}])
    with pytest.raises(ConfigError, match="stages have their own objective and max_steps"):
        parse_recipe(tree)


def test_ids_that_the_teacher_has_no_row_for_are_refused(prompts, tmp_path):
    """The wide teacher as the student of the base: its ids go beyond the base's 262 rows."""
    tree = bridge_recipe(tmp_path, prompts, tmp_path / "b")
    tree["student"] = {"model": str(MODELS / "wide_teacher")}
    tree["teacher"] = WIDE | {"model": str(MODELS / "base"), "alignment": "shared_ids"}
    with pytest.raises(TeacherMismatch, match=r"ids, which go up to \d+; its vocabulary has 262 rows"):
        fit_bridge(parse_recipe(tree))


def test_shared_ids_feed_the_teacher_the_students_tokens(prompts, tmp_path):
    path = tmp_path / "b.safetensors"
    tree = bridge_recipe(tmp_path / "run", prompts, path) | {"teacher": WIDE | {"alignment": "shared_ids"}}
    fit_bridge(parse_recipe(tree))
    run = build(parse_recipe(tree))
    rollouts = run.teacher.prepare(rollouts_of(run.lm, ["12+34"]))
    assert rollouts.answers is None
    targets = run.teacher.targets(rollouts, run.stage.distill.teacher_readings, head=run.stage.distill.teacher_head)
    assert targets.batch.input_ids.tolist() == [[1, 2, *rollouts.completion_ids[0]]]


def test_few_paired_positions_warn_once(bridge, prompts, tmp_path, capfd):
    run = build(parse_recipe(bridge_recipe(tmp_path, prompts, bridge)))
    stray = run.lm.tokenizer("é")["input_ids"][1]
    one = run.lm.tokenizer("1")["input_ids"]
    bad = replace(rollouts_of(run.lm, ["1"]), completion_ids=((*one, *[stray] * 9),))
    run.teacher.prepare(bad)
    run.teacher.prepare(bad)
    assert capfd.readouterr().err.count("Only 10% of the tokens end where one of teacher") == 1


def test_a_fit_takes_rows_at_which_the_student_is_sure(prompts, tmp_path):
    job = prepare_fit(parse_recipe(bridge_recipe(tmp_path / "run", prompts, tmp_path / "b")), Given())
    rollouts = job.both.teacher.prepare(job.write(0))
    last = replace(job.both.pairs[0].student, block="last")
    confident = total = 0
    for micro in split_by_tokens(rollouts, 4096):
        states = read_states(
            job.both.lm, collate_student(micro, pad_id=0, device=job.both.lm.device), (last,), head=True
        )
        likeliest = (states.hidden[last] @ states.head.weight.T).softmax(-1).amax(-1)
        confident, total = confident + int((likeliest >= 0.9).sum()), total + len(likeliest)
    taken = sum(len(rows[1][0]) for rows in job.both.rows(rollouts))
    everything = sum(len(rows[1][0]) for rows in replace(job.both, confidence=0.0).rows(rollouts))
    assert (taken, everything) == (confident, total)
    assert 0.5 * total < taken < total


def test_the_gradient_fit_writes_a_file_that_trains(prompts, tmp_path):
    path = tmp_path / "b.safetensors"
    tree = bridge_recipe(tmp_path / "run", prompts, path, {"fit": {"method": "gradient"}}, max_steps=1)
    fit_bridge(parse_recipe(tree))
    file = load_bridge(path)
    assert file.setting.method == "gradient"
    assert float(file.solutions[1].student_mean.abs().max()) == 0.0  # no bias [code]
    run_recipe(parse_recipe(tree))
    told = json.loads((tmp_path / "run" / "bridge.json").read_text())
    assert [told[block]["rank"] for block in "1234"] == [8, 8, 8, 8]
