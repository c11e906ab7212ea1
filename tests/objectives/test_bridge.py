"""OPRD-Bridge end to end: fit, refuse, train, resume."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import MODELS, load_miniature, miniature_recipe
from oprd.bridge.file import load_bridge
from oprd.bridge.solve import BlockMap
from oprd.cli import app
from oprd.clock import Clock
from oprd.data.batching import split_by_tokens, student_batch
from oprd.data.chat import render
from oprd.demo.task import sums, write_jsonl
from oprd.errors import ConfigError, DataError, TeacherMismatch, TrainingStopped
from oprd.files import read_json
from oprd.models.loading import ModelFacts
from oprd.objectives import oprd_bridge
from oprd.objectives.oprd_bridge import REACH, SURE, edit
from oprd.objectives.oprd_bridge_published import OPRDBridgePublished
from oprd.recipe import parse_recipe
from oprd.train.fit_bridge import fit_bridge, prepare_fit
from oprd.train.pair import Given
from oprd.train.run import run_recipe
from oprd.train.setup import setup
from oprd.types import HiddenSpec, HiddenStates, Message, Prompt, Rollouts, Taps, Targets

pytestmark = pytest.mark.slow

WIDE = {"type": "local", "model": str(MODELS / "wide_teacher"), "dtype": "float32"}
SAMPLED = {"type": "opd_sampled"}
NO_TRUST = 1e-30
"""A threshold below every probability."""


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


@pytest.fixture(scope="module")
def published(tmp_path_factory, prompts) -> Path:
    path = tmp_path_factory.mktemp("fit") / "published.safetensors"
    fit_bridge(parse_recipe(bridge_recipe(path.parent / "run", prompts, path, {"type": "oprd_bridge_published"})))
    return path


def ready(bridge, prompts, folder, objective=None):
    """The parts of a run, and its bound objective."""
    parts = setup(parse_recipe(bridge_recipe(folder, prompts, bridge, objective)))
    return parts, parts.method.student.objectives[0]


def rollouts_of(texts, problem="1+2"):
    """Completions of one prompt in the student's tokens."""
    tokenizer, wide = (load_miniature(name).tokenizer for name in ("base", "wide_teacher"))
    messages = (Message(role="user", content=problem),)
    prompt = Prompt(
        row=0, messages=messages, token_ids=render(tokenizer, messages), teacher_token_ids=render(wide, messages)
    )
    ids = tuple(tuple(tokenizer(text)["input_ids"]) for text in texts)
    return Rollouts(prompts=(prompt,) * len(texts), completion_ids=ids, finished=(True,) * len(texts))


def compared(parts, rollouts):
    """(student's states, targets) on annotated rollouts."""
    lm, batch = parts.method.student.lm, parts.method.batch(rollouts)
    return lm.tap(batch, parts.method.student.taps), parts.method.targets(rollouts)


def spec(block, tokens):
    return HiddenSpec(block=block, at="token", tokens=tokens)


def test_the_file_holds_every_rank_and_its_held_out_numbers(bridge):
    file = load_bridge(bridge)
    assert file.setting.blocks == ((1, 1), (2, 3), (3, 4), (4, 6))
    assert (file.student.width, file.teacher.width) == (128, 192)
    for block, _ in file.setting.blocks:
        solution = file.solutions[block]
        assert solution.projections.student.shape == solution.directions.student.shape == (128, 128)
        assert solution.projections.teacher.shape == (128, 192)
        eye = solution.projections.teacher @ solution.projections.teacher.T
        assert_close(eye, torch.eye(128), atol=1e-5, rtol=0)
        assert len(solution.cosine) == 128
        assert solution.cosine[7] > 0.5
        assert solution.held_out_rows < 0.2 * solution.rows


def test_a_bridge_file_that_was_damaged_is_refused(bridge, tmp_path):
    whole, damaged, rng = bridge.read_bytes(), tmp_path / "b.safetensors", random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [rng.randrange(header, len(whole)) for _ in range(12)] + [rng.randrange(header) for _ in range(12)]
    flipped = [whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :] for at in places]
    cut = [whole[: rng.randrange(len(whole))] for _ in range(12)]
    for content in [*flipped, *cut, b""]:
        damaged.write_bytes(content)
        with pytest.raises(DataError, match=r"b\.safetensors"):
            load_bridge(damaged)


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
    assert "Held-out cosine of the projections" in page
    assert "Held-out canonical correlations" in page
    assert "block 4 to 6, rank 8" in page
    assert str(round(float(file.solutions[4].canonical[0]), 5)) in page


def test_a_fit_never_writes_over_a_file(bridge, prompts, tmp_path):
    before = bridge.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        fit_bridge(parse_recipe(bridge_recipe(tmp_path, prompts, bridge)))
    assert bridge.read_bytes() == before


def test_a_fit_of_the_same_recipe_gives_the_same_file(bridge, prompts, tmp_path):
    again = tmp_path / "again.safetensors"
    fit_bridge(parse_recipe(bridge_recipe(tmp_path / "run", prompts, again)))
    assert again.read_bytes() == bridge.read_bytes()


@pytest.mark.parametrize(
    ("objective", "error", "reason"),
    [
        ({"rank": 129}, ConfigError, "rank is 129; the student's states have 128 dimensions, the teacher's 192, so it is 128"),
        ({"layers": [5]}, ConfigError, "block 5; the student has blocks 1 to 4"),
        ({"tokens": {"last": 5}}, TeacherMismatch, "fitted with tokens all, the recipe's objective has {'last': 5}"),
        ({"type": "oprd_bridge_published"}, TeacherMismatch, "fitted with features 512, the recipe's objective has 0"),
        ({"bridge": "none.safetensors"}, DataError, "none.safetensors is not there; `oprd fit-bridge RECIPE` writes it"),
        ({"bridge": str(MODELS / "base/model.safetensors")}, DataError, "was not written by `oprd fit-bridge`"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_the_recipe_is_refused_before_loading(
    objective, error, reason, bridge, prompts, tmp_path, monkeypatch
):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(error, match=reason.replace("(", r"\(")):
        ready(bridge, prompts, tmp_path / "run", objective)
    assert not (tmp_path / "run").exists()


def test_another_model_and_another_block_map_are_refused(bridge, prompts, tmp_path):
    tree = bridge_recipe(tmp_path / "run", prompts, bridge)
    with pytest.raises(TeacherMismatch, match="fitted for a teacher of 6 blocks of width 192"):
        setup(parse_recipe(tree | {"teacher": WIDE | {"model": str(MODELS / "teacher")}}))
    file = load_bridge(bridge)
    blocks = ((1, 1), (2, 2), (3, 4), (4, 6))
    moved = tmp_path / "moved.safetensors"
    replace(file, setting=file.setting.model_copy(update={"blocks": blocks})).save(moved)
    with pytest.raises(TeacherMismatch, match=r"fitted for the blocks \(student, teacher\) \(1, 1\), \(2, 2\)"):
        ready(moved, prompts, tmp_path / "run")


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
        setup(parse_recipe(tree))
    lm.tokenizer.chat_template += " "
    lm.tokenizer.save_pretrained(folder)
    with pytest.raises(TeacherMismatch, match=f"another tokenizer or chat template of the {which}"):
        setup(parse_recipe(tree))


def test_fit_prompts_that_are_empty_or_too_few_are_refused(prompts, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "two.jsonl").write_text('{"problem": "1+2+3"}\n{"problem": "4+2+3"}\n')
    (tmp_path / "ten.jsonl").write_text('{"problem": "1+2+3"}\n' * 10)
    for name, reason in (
        ("empty", "the dataset is empty"),
        ("two", "has 2 prompts, of which held_out=0.1 leaves none"),
        ("ten", r"block 1 of the student and 1 of the teacher: \d+ rows to fit and"),
    ):
        tree = bridge_recipe(tmp_path, tmp_path / f"{name}.jsonl", tmp_path / "b")
        tree["rollout"] |= {"max_completion_length": 6}
        with pytest.raises(DataError, match=reason):
            fit_bridge(parse_recipe(tree))
    assert not (tmp_path / "b").exists()


def test_the_loss_between_projections_by_hand(published):
    """Two tokens whose projections are chosen: parallel gives 0, opposite (1/r) |2|^2."""
    config = OPRDBridgePublished(bridge=str(published), tokens="all", rank=2, layers="last")
    objective = config.bind(ModelFacts.read(str(MODELS / "base")))
    objective._maps[4] = BlockMap(
        student=torch.eye(128)[:2], student_mean=torch.zeros(128), teacher=torch.eye(192)[:2], teacher_mean=torch.zeros(192)
    )  # fmt: skip
    student = torch.zeros(2, 128)
    student[:, 0] = 3.0
    student.requires_grad_()
    teacher = torch.zeros(2, 192)
    teacher[0, 0], teacher[1, 0] = 5.0, -1.0
    rollouts = rollouts_of(["12"])
    batch = student_batch(rollouts, pad_id=0, device=torch.device("cpu"))
    theirs = HiddenStates(hidden={spec(6, config.tokens): teacher}, head=None, batch=batch)
    values = objective.per_token(
        HiddenStates(hidden={spec(4, config.tokens): student}, head=None, batch=batch), Targets(teacher=theirs)
    )
    assert_close(values, torch.tensor([0.0, 2.0]))
    values.sum().backward()
    assert student.grad is not None


def test_published_tokens_without_an_aligned_one_have_no_weight_and_no_gradient(published, prompts, tmp_path):
    parts, found = ready(published, prompts, tmp_path, {"type": "oprd_bridge_published"})
    assert found.metric == "oprd_bridge_published"
    rollouts = parts.method.annotate(rollouts_of(["12+34=46", "9"]))
    assert found.weights(rollouts).tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1]  # 34 is one piece of the teacher
    assert found.total_weight(rollouts) == 8
    states, targets = compared(parts, rollouts)
    values = found.per_token(states, targets)
    assert values.isfinite().all()
    last = states.hidden[spec(4, found.tokens)]
    (gradient,) = torch.autograd.grad((values * found.weights(rollouts)).sum(), last)
    assert (gradient.norm(dim=-1) > 0).tolist() == [True, True, True, False, True, True, True, True, True]


def test_the_target_is_the_students_own_state_moved_to_the_teachers_coordinates(bridge, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(oprd_bridge, "TRUST", NO_TRUST)
    monkeypatch.setattr(oprd_bridge, "SURE", 0.0)
    parts, found = ready(bridge, prompts, tmp_path, {"layers": "last", "rank": 5})
    rollouts = parts.method.annotate(rollouts_of(["12+34=46", "9"]))
    assert found.weights(rollouts).tolist() == [1.0] * 9
    assert found.total_weight(rollouts) == 9
    states, targets = compared(parts, rollouts)
    theirs, before = targets.teacher.hidden[spec(6, found.tokens)], targets.reference.hidden[spec(4, found.tokens)]
    aligned, trusted = found.edited_tokens(states.batch, targets.reference)
    assert aligned.tolist() == [True, True, True, False, True, True, True, True, True]
    assert trusted.all()
    (edited,), maps = found.target_states(states.batch, targets), found._map(4, before.device)
    assert torch.equal(edited, edit(before, aligned, theirs, maps))
    assert_close(edited[3], before[3])
    own, wanted = maps.of_student(before)[aligned], maps.of_teacher(theirs)
    correlation = load_bridge(bridge).solutions[4].canonical[:5].sqrt()
    assert_close(maps.of_student(edited)[aligned] - own, correlation * (wanted - own), atol=0.05, rtol=0.05)
    # what of the state is no canonical coordinate is left as it was
    assert float((edited - before)[aligned].norm()) < float(before[aligned].norm())
    values = found.per_token(states, targets)
    assert float(values[3].detach()) == pytest.approx(0.0, abs=1e-8)  # nothing learned yet, nothing to keep
    assert float(values[aligned].detach().min()) > 1e-6
    # ||a/|a| - b/|b|||^2 = 2 - 2 cos
    cosine = torch.nn.functional.cosine_similarity(states.hidden[spec(4, found.tokens)], edited, dim=-1)
    assert_close(values, (2 - 2 * cosine) / 128, atol=1e-6, rtol=1e-4)
    values.sum().backward()
    assert theirs.grad_fn is None
    assert before.grad_fn is None
    assert parts.method.student.lm.model.model.layers[3].mlp.up_proj.weight.grad is not None


def test_the_target_is_made_as_sure_as_the_teacher_is(bridge, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(oprd_bridge, "TRUST", NO_TRUST)
    parts, found = ready(bridge, prompts, tmp_path, {"rank": "full"})
    lm, tokens = parts.method.student.lm, found.tokens
    rollouts = parts.method.annotate(rollouts_of(["12+34=46\n46-5=42\n\\boxed{43}", "9"]))
    weight = lm.core.lm_head.weight.detach().clone()
    with torch.no_grad():
        lm.core.lm_head.weight.mul_(2.0)  # the head at start is what counts, not the one that has moved
    assert found.teacher_taps.head
    assert found.reference_taps.head
    assert not found.student_taps.head
    states, targets = compared(parts, rollouts)
    aligned, _ = found.edited_tokens(states.batch, targets.reference)
    theirs, ours = targets.teacher.hidden[spec(6, tokens)], targets.reference.hidden[spec(4, tokens)]
    assert_close(targets.reference.head.weight, weight)
    head = load_miniature("wide_teacher").core.lm_head.weight.detach()
    sure = (theirs @ head.T).softmax(-1).amax(-1)
    plain = edit(ours, aligned, theirs, found._map(4, ours.device))
    *_, below, sharp = found.target_states(states.batch, targets)
    assert_close(sharp[~aligned], plain[~aligned])
    before, after = ((h[aligned] @ weight.T).softmax(-1).max(-1) for h in (plain, sharp))
    assert torch.equal(before.indices, after.indices)
    least = sure.clamp(max=SURE)
    unsure = before.values < least
    assert 0 < int(unsure.sum()) < len(unsure)
    assert float((after.values - before.values)[unsure].min()) > 0.001
    far = (sharp - plain)[aligned].norm(dim=-1) >= 0.999 * REACH * plain[aligned].norm(dim=-1)
    assert float((least - after.values)[unsure & ~far].max()) < 0.001
    assert int((unsure & ~far).sum()) > 0
    assert torch.equal(sharp[aligned][~unsure], plain[aligned][~unsure])
    # lower blocks have no head to be sure by
    lower = targets.reference.hidden[spec(3, tokens)], aligned, targets.teacher.hidden[spec(4, tokens)]
    assert_close(below, edit(*lower, found._map(3, ours.device)))


def test_through_the_head_the_loss_is_the_reverse_kl_to_what_the_initial_head_says(bridge, prompts, tmp_path):
    objective = {"layers": "last", "loss": "reverse_kl", "weight": 1.0}
    parts, found = ready(bridge, prompts, tmp_path, objective)
    lm = parts.method.student.lm
    assert found.student_taps.head
    assert found.metric == "bridge_reverse_kl"
    before = lm.core.lm_head.weight.detach().clone()
    rollouts = parts.method.annotate(rollouts_of(["12+34=46\n46-5=42", "9"]))
    with torch.no_grad():
        lm.core.lm_head.weight.add_(torch.randn_like(before), alpha=0.01)
    states, targets = compared(parts, rollouts)
    values = found.per_token(states, targets)
    (wanted,) = found.target_states(states.batch, targets)
    log_p = (states.hidden[spec(4, found.tokens)] @ lm.core.lm_head.weight.T).log_softmax(-1)
    log_q = (wanted @ before.T).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert_close(values, expected, atol=1e-5, rtol=1e-4)
    weights = [lm.core.lm_head.weight, lm.model.model.layers[3].mlp.up_proj.weight]
    ours, by_autograd = (torch.autograd.grad(x.sum(), weights, retain_graph=True) for x in (values, expected))
    for gradient, reference in zip(ours, by_autograd, strict=True):
        assert_close(gradient, reference, atol=1e-4, rtol=1e-3)
    # nothing learned yet, nothing to keep: unaligned tokens start at zero
    with torch.no_grad():
        lm.core.lm_head.weight.copy_(before)
    states, targets = compared(parts, rollouts)
    edited, _ = found.edited_tokens(states.batch, targets.reference)
    values = found.per_token(states, targets)
    assert_close(values[~edited], torch.zeros_like(values[~edited]), atol=1e-6, rtol=0)
    assert float(values[edited].detach().max()) > 0.01


def test_through_the_head_a_run_learns_and_off_policy_rollouts_need_no_weights(bridge, prompts, tmp_path):
    objective = {"layers": "last", "loss": "reverse_kl", "weight": 1.0}
    tree = bridge_recipe(tmp_path, prompts, bridge, objective, max_steps=2, lr_scheduler_type="constant")
    done = run_recipe(parse_recipe(tree | {"rollout": tree["rollout"] | {"updates_per_rollout": 3}}))
    rows = [json.loads(line) for line in (done.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["train/bridge_reverse_kl/mean"] > 0 for row in rows)
    assert rows[0]["bridge/trusted/share"] > 0.9


def test_an_alignment_that_only_an_unlikely_token_made_is_dropped(bridge, prompts, tmp_path, monkeypatch):
    """12+3=: after 12+ the problem goes on with 34. The teacher's piece 3 ends because the student wrote = too early."""
    parts, found = ready(bridge, prompts, tmp_path, {"layers": [2]})
    rollouts = parts.method.annotate(rollouts_of(["12+34=46", "12+3=15"], problem="12+34-5"))
    assert rollouts.alignments[0].student_index == (0, 1, 2, 4, 5, 6, 7)  # 34 is one piece of the teacher
    assert rollouts.alignments[1].student_index == tuple(range(7))
    states, targets = compared(parts, rollouts)
    assert not found.teacher_taps.head
    edited, trusted = found.edited_tokens(states.batch, targets.reference)
    assert edited[:8].tolist() == [True, True, True, False, True, True, True, True]
    early = edited[8:]
    assert not early[3]
    assert early[[0, 1, 2, 4]].all()
    assert (len(trusted), int(trusted.sum())) == (14, int(edited.sum()))
    (share,) = found.take_metrics()
    assert (share.name, share.sum, share.count) == ("bridge/trusted/share", float(edited.sum()), 14.0)
    (wanted,) = found.target_states(states.batch, targets)
    found.target_states(states.batch, targets)
    (share,) = found.take_metrics()  # one number, however many micro-batches
    assert (share.sum, share.count) == (2 * float(edited.sum()), 28.0)
    before = targets.reference.hidden[spec(2, found.tokens)]
    assert_close(wanted[~edited], before[~edited])
    assert float((wanted - before)[edited].norm(dim=-1).min()) > 0
    # the last token of a completion has none behind it, and one that is all there is of it is trusted
    following, exists = states.batch.next_ids(found.tokens)
    assert exists.tolist() == [True] * 7 + [False] + [True] * 6 + [False]
    assert following[:7].tolist() == list(rollouts.completion_ids[0][1:])
    monkeypatch.setattr(oprd_bridge, "TRUST", NO_TRUST)
    assert int(found.edited_tokens(states.batch, targets.reference)[0].sum()) == 14


@pytest.mark.parametrize("form", ["oprd_bridge", "oprd_bridge_published"])
def test_a_truncated_completion_counts_as_the_first_part_of_the_whole(
    form, bridge, published, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr(oprd_bridge, "TRUST", NO_TRUST)
    file = bridge if form == "oprd_bridge" else published
    parts, found = ready(file, prompts, tmp_path, {"type": form})
    whole = rollouts_of(["12+34=46\n46-5=41"])
    cut = replace(whole, completion_ids=(whole.completion_ids[0][:8],), finished=(False,))
    values = []
    for rollouts in map(parts.method.annotate, (whole, cut)):
        states, targets = compared(parts, rollouts)
        values.append(found.per_token(states, targets).detach()[found.weights(rollouts) > 0])
    # 34 is one piece of the teacher; and what it reads as its last piece might have gone on behind the cut
    assert [len(v) for v in values] == ([16, 8] if form == "oprd_bridge" else [15, 6])
    same = 7 if form == "oprd_bridge" else 6
    assert_close(values[1][:same], values[0][:same], atol=1e-4, rtol=1e-4)
    if form == "oprd_bridge":
        assert float(values[1][7]) == pytest.approx(0.0, abs=1e-8)  # it keeps the state it had


def test_the_initial_student_stays_when_the_student_moves(bridge, prompts, tmp_path):
    parts, _ = ready(bridge, prompts, tmp_path)
    rollouts = parts.method.annotate(rollouts_of(["12+34=46"]))
    before = parts.method.targets(rollouts)
    with torch.no_grad():
        for weight in parts.method.student.lm.model.model.layers.parameters():
            weight.add_(0.1)
    after = parts.method.targets(rollouts)
    for then, now in ((before.teacher, after.teacher), (before.reference, after.reference)):
        for one in then.hidden:
            assert_close(now.hidden[one], then.hidden[one])


def test_aligned_tokens_are_tapped_behind_the_same_text_on_both_sides(published, prompts, tmp_path):
    """The state after 34 is read where either model has read exactly that."""
    parts, found = ready(published, prompts, tmp_path, {"type": "oprd_bridge_published"})
    rollouts = parts.method.annotate(rollouts_of(["12+34=46", "9"]))
    got = parts.method.targets(rollouts).teacher.hidden[spec(6, found.tokens)]
    assert len(got) == 8
    lm = load_miniature("wide_teacher")
    prompt = lm.tokenizer("<|user|>1+2<|end|><|assistant|>")["input_ids"]
    alone = lm.model(
        input_ids=torch.tensor([[*prompt, *lm.tokenizer("12+34")["input_ids"]]]), output_hidden_states=True
    )
    assert_close(got[3], alone.hidden_states[-1][0, -1], atol=1e-4, rtol=1e-4)
    share = parts.method.teacher.metrics()[0]
    assert (share.name, share.sum, share.count) == ("teacher/aligned/share", 8.0, 9.0)


@pytest.mark.parametrize("form", ["oprd_bridge", "oprd_bridge_published"])
def test_without_an_aligned_token_the_run_stops_with_the_reason(form, bridge, published, prompts, tmp_path):
    parts, _ = ready(bridge if form == "oprd_bridge" else published, prompts, tmp_path, {"type": form})
    stray = parts.method.student.lm.tokenizer("é")["input_ids"][1]  # a byte that begins no character
    bad = replace(rollouts_of(["1", "2"]), completion_ids=((stray,), (stray, stray)))
    with pytest.raises(TrainingStopped, match="no token of this step ends where one of the teacher's ends"):
        parts.method.update(parts.method.annotate(bad), 1, Clock(torch.device("cpu")))


def test_the_published_form_trains_and_leaves_nothing_of_the_bridge_in_the_student(published, prompts, tmp_path):
    tree = bridge_recipe(tmp_path, prompts, published, {"type": "oprd_bridge_published"}, max_steps=1)
    run_recipe(parse_recipe(tree))
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert stored.config.hidden_size == 128
    (told,) = read_json(tmp_path / "objectives.json").values()
    assert [told[block]["rank"] for block in "1234"] == [8, 8, 8, 8]


def test_the_kl_family_across_tokenizers_is_refused_but_for_sampled_reverse_kl(prompts, tmp_path):
    for objective in ({"type": "opd"}, SAMPLED | {"divergence": "forward_kl"}):
        with pytest.raises(TeacherMismatch, match="has another vocabulary"):
            setup(parse_recipe(miniature_recipe(tmp_path, prompts, teacher=WIDE, objective=objective)))
    setup(parse_recipe(miniature_recipe(tmp_path, prompts, teacher=WIDE, objective=SAMPLED)))
    stale = miniature_recipe(tmp_path, prompts, teacher=WIDE, objective=SAMPLED)
    stale["rollout"] = stale["rollout"] | {"updates_per_rollout": 2}
    with pytest.raises(ConfigError, match="importance weights are taken by token"):
        setup(parse_recipe(stale))


def test_several_teachers_have_the_students_tokenizer(prompts, tmp_path):
    several = {"type": "several", "teachers": {"near": WIDE | {"model": str(MODELS / "teacher")}, "far": WIDE}}
    with pytest.raises(TeacherMismatch, match="teacher 'far' of several has another tokenizer"):
        setup(parse_recipe(miniature_recipe(tmp_path, prompts, teacher=several, objective=SAMPLED)))


def test_spans_have_each_models_own_log_probability(prompts, tmp_path):
    """12+34: the span `34` is two tokens of the student and one of the teacher."""
    parts = setup(parse_recipe(miniature_recipe(tmp_path, prompts, teacher=WIDE, objective=SAMPLED)))
    (objective,), lm = parts.method.student.objectives, parts.method.student.lm
    rollouts = parts.method.annotate(rollouts_of(["12+34", "5"]))
    states, targets = compared(parts, rollouts)
    values = objective.per_token(states, targets)
    assert objective.weights(rollouts).tolist() == [1, 1, 1, 0, 1, 1]

    def logprob(lm, prompt, text, piece) -> float:
        before, own = (lm.tokenizer(x)["input_ids"] for x in (text, text + piece))
        logits = lm.model(input_ids=torch.tensor([[*prompt, *own]])).logits.log_softmax(-1)[0].detach()
        return sum(float(logits[len(prompt) + i - 1, own[i]]) for i in range(len(before), len(own)))

    wide, ours = load_miniature("wide_teacher"), rollouts.prompts[0].token_ids
    theirs = wide.tokenizer("<|user|>1+2<|end|><|assistant|>")["input_ids"]
    expected = [
        logprob(lm, ours, text, piece) - logprob(wide, theirs, text, piece)
        for text, piece in (("", "1"), ("1", "2"), ("12", "+"), ("12+", "34"), ("", "5"))
    ]
    assert_close(values.detach()[objective.weights(rollouts) > 0], torch.tensor(expected), atol=1e-3, rtol=1e-3)


def test_a_bridge_with_another_objective_resumes_to_the_same_student(bridge, prompts, tmp_path):
    fading = bridge_recipe(tmp_path, prompts, bridge)["objective"] | {"weight": {"from": 10.0, "to": 0.0, "steps": 3}}
    tree = miniature_recipe(tmp_path / "whole", prompts, teacher=WIDE, objective=[fading, SAMPLED], max_steps=3)
    tree |= {"save_steps": 1, "save_total_limit": 4}
    run_recipe(parse_recipe(tree))
    folder = tmp_path / "whole"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all("train/oprd_bridge/mean" in row and row["teacher/aligned/share"] > 0.5 for row in rows)
    assert all("health/student_entropy/mean" in row and "health/top_16_overlap/mean" not in row for row in rows)
    final = (folder / "student" / "model.safetensors").read_bytes()
    for step in (1, 2):
        (folder / "result.json").unlink()
        checkpoint = str(folder / "checkpoints" / f"step-{step:06d}")
        run_recipe(parse_recipe(tree | {"resume_from_checkpoint": checkpoint}))
        assert (folder / "student" / "model.safetensors").read_bytes() == final, step


def test_few_aligned_tokens_warn_once(bridge, prompts, tmp_path, capfd):
    parts, _ = ready(bridge, prompts, tmp_path)
    tokenizer = parts.method.student.lm.tokenizer
    stray, one = tokenizer("é")["input_ids"][1], tokenizer("1")["input_ids"]
    bad = replace(rollouts_of(["1"]), completion_ids=((*one, *[stray] * 9),))
    parts.method.annotate(bad)
    parts.method.annotate(bad)
    assert capfd.readouterr().err.count("Only 10% of the tokens end where one of teacher") == 1


def test_a_fit_takes_rows_at_which_the_student_is_sure(prompts, tmp_path):
    recipe = parse_recipe(bridge_recipe(tmp_path / "run", prompts, tmp_path / "b"))
    job = prepare_fit(recipe, recipe.objective[0], Given())
    rollouts = job.teacher.annotate(job.write(job.prompts[:16], 0))
    tokens, lm = job.setting.tokens, job.student.lm
    confident = total = 0
    for micro in split_by_tokens(rollouts, 4096):
        batch = student_batch(micro, pad_id=0, device=lm.device)
        states = job.student.hidden(batch, Taps(hidden=(spec("last", tokens),), head=True))
        aligned = states.hidden[spec("last", tokens)][batch.aligned(tokens)]
        likeliest = (aligned @ states.head.weight.T).softmax(-1).amax(-1)
        confident, total = confident + int((likeliest >= 0.9).sum()), total + len(likeliest)
    taken = sum(len(rows[1][0]) for rows in job.rows(rollouts))
    all_rows = replace(job, setting=job.setting.model_copy(update={"confidence": 0.0}))
    everything = sum(len(rows[1][0]) for rows in all_rows.rows(rollouts))
    assert (taken, everything) == (confident, total)
    assert 0.5 * total < taken < total
