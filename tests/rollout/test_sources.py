"""Sources: who writes the completions, which rewrites are learned on, and what is learned on otherwise."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from conftest import MODELS, load_miniature, miniature_recipe
from oprd.data.chat import decode, render, texts_to_judge
from oprd.demo.task import completion, sums
from oprd.distributed import Ranks
from oprd.errors import DataError
from oprd.models.generate import Sampling
from oprd.models.language_model import FrozenModel
from oprd.models.loading import ModelFacts
from oprd.objectives import NLL, OPD
from oprd.recipe import parse_recipe
from oprd.rollout.base import RolloutEngine
from oprd.rollout.sources import (
    REASONS,
    DatasetSource,
    RewriteSource,
    Source,
    SourceContext,
    StudentSource,
    TeacherSource,
)
from oprd.teacher import LocalTeacherConfig
from oprd.teacher.base import Generation, GenerationRequest, Generations, Teacher, TeacherFacts
from oprd.teacher.local import LOCAL, LocalTeacher
from oprd.train.run import run_recipe
from oprd.types import Message, Prompt, Rollouts, Targets
from oprd.verify.pool import VerifierPool

LONG = "12+34=46, again 46\n46-5=41\n\\boxed{41}"
ONE = Sampling(temperature=1.0, max_new_tokens=80)
REWRITE, SEQUENCE = {"source": {"type": "rewrite"}}, {"source": {"type": "teacher"}}
SHORT = {"group_size": 2, "max_completion_length": 48}


@dataclass
class Scripted(Teacher):
    """Answers as the test says; what a source makes of that is tested."""

    answers: list[Generation | None]
    requests: list[GenerationRequest] = field(default_factory=list)

    def targets(self, rollouts, taps) -> Targets:
        raise AssertionError("a source asks for text only")

    def generate(self, chains) -> Generations:
        self.requests = [request for chain in chains for request in chain]
        return [[answer] for answer in self.answers]


@dataclass
class Written(RolloutEngine):
    """Returns given rollouts; `seeds` are those it was called with."""

    rollouts: Rollouts | None = None
    seeds: list[tuple[int, range | None]] = field(default_factory=list)

    def sync_weights(self) -> None:
        """There are none."""

    def at_once(self, tokens: int) -> int:
        return 8

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, places: range | None = None
    ) -> Rollouts:
        assert self.rollouts is not None, "the student was not to write"
        self.seeds.append((seed, places))
        return self.rollouts


@pytest.fixture(scope="module")
def tokenizer():
    return load_miniature("teacher").tokenizer


@pytest.fixture(scope="module")
def verifier() -> Iterator[VerifierPool]:
    with VerifierPool(timeout_s=120.0, workers=1) as pool:
        yield pool


def answer(text: str, finished: bool = True) -> Generation:
    return Generation(texts=(text,), finished=(finished,), tokens=len(text))


def bound(source: Source, tokenizer, **context) -> Source:
    given = {"engine": Written(), "teacher": Scripted([]), "verifier": VerifierPool(), "seed": 0} | context
    ranks = Ranks(Accelerator(cpu=True))
    ranks.rank, ranks.size = given.pop("process", (0, 1))
    end = tokenizer.eos_token_id
    stops = frozenset({end})
    return source.bind(
        SourceContext(tokenizer=tokenizer, end_of_turn=end, stop_ids=stops, max_new_tokens=80, ranks=ranks, **given)
    )


def prompt(row: int = 0, **columns) -> Prompt:
    turns = (Message(role="user", content="12+34-5"),)
    return Prompt(row=row, messages=turns, token_ids=(1,), teacher_messages=turns, answer="41", **columns)


def rollouts(tokenizer, texts: list[str], **prompts) -> Rollouts:
    ids = tuple((*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts)
    made = tuple(prompt(i, **prompts) for i in range(len(texts)))
    return Rollouts(prompts=made, completion_ids=ids, finished=(True,) * len(texts))


def rewritten(before: Rollouts, teacher: Scripted, tokenizer, verifier, **options) -> tuple[Rollouts, dict[str, float]]:
    """(what is learned on, the metrics) of the student's completions after a rewrite."""
    engine = Written(before)
    source = bound(RewriteSource(**options), tokenizer, engine=engine, teacher=teacher, verifier=verifier)
    written, learned = source.rollouts(before.prompts, ONE, 1)
    assert written is before
    return learned, numbers(source)


def numbers(source: Source) -> dict[str, float]:
    return {m.name: m.sum if m.count is None else m.sum / max(m.count, 1) for m in source.metrics()}


def texts(tokenizer, given: Rollouts) -> list[str]:
    return [decode(tokenizer, ids, special=True) for ids in given.completion_ids]


def steps(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_rewrite_is_learned_on_only_if_it_is_whole_no_longer_and_ends_in_the_same_answer(tokenizer, verifier):
    wrong = "12+34=46, again 46\n46-5=40\n\\boxed{40}"
    before = rollouts(tokenizer, [LONG, LONG, LONG, LONG, LONG, LONG, "no answer here, only talk", wrong, LONG])
    teacher = Scripted(
        [
            answer(" 46-5=41\n\\boxed{41.0} "),  # kept: 41.0 is 41
            None,
            answer("  "),
            answer("\\boxed{41}", finished=False),
            answer(LONG + "\n\\boxed{41}"),
            answer("\\boxed{42}"),
            answer("\\boxed{40}"),  # kept: the answer of the student, though it is wrong
            answer(LONG),  # kept: nothing was left to leave out
        ]
    )
    after, metrics = rewritten(before, teacher, tokenizer, verifier)
    assert len(teacher.requests) == 8  # not about the one that has no answer to end in
    assert after.rewritten == (True, False, False, False, False, False, False, True, True)
    assert texts(tokenizer, after)[0] == "46-5=41\n\\boxed{41.0}<|end|>"
    assert texts(tokenizer, after)[7] == "\\boxed{40}<|end|>"
    assert after.completion_ids[1:7] == before.completion_ids[1:7]
    assert metrics["rewrite/kept/share"] == 3 / 9
    assert metrics["rollout/accuracy/share"] == 7 / 9
    once = ("no_reply", "empty", "unfinished", "longer", "other_answer", "no_answer")
    assert {reason: metrics[f"rewrite/{reason}/sum"] for reason in REASONS} == dict.fromkeys(once, 1) | {
        "wrong_answer": 0
    }
    assert metrics["rewrite/length/mean"] < metrics["rewrite/replaced_length/mean"]
    assert NLL().total_weight(after) == sum(len(after.completion_ids[i]) for i in (0, 7, 8))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "no_reply"),
        (answer(" "), "empty"),
        (answer("\\boxed{41}", finished=False), "unfinished"),
        (answer(LONG + LONG), "longer"),
        (answer("\\boxed{42}"), "other_answer"),
    ],
    ids=["no_reply", "empty", "unfinished", "longer", "other_answer"],
)
def test_the_reason_for_keeping_the_students_text_is_counted(given, reason, tokenizer, verifier):
    _, metrics = rewritten(rollouts(tokenizer, [LONG]), Scripted([given]), tokenizer, verifier)
    assert [name for name in REASONS if metrics[f"rewrite/{name}/sum"]] == [reason]


def reasoning_teacher(prompt: str, text: str) -> LocalTeacher:
    """A teacher whose marks of reasoning are special tokens, trained for a moment to answer `prompt` with `text`."""
    lm = load_miniature("teacher")
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    lm.core.resize_token_embeddings(len(lm.tokenizer))
    asked = render(lm.tokenizer, (Message(role="user", content=prompt),))
    ids = torch.tensor([[*asked, *lm.tokenizer(text)["input_ids"], lm.tokenizer.eos_token_id]])
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(asked), -100)
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=2e-3)
    for _ in range(40):
        lm.model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return LocalTeacher(FrozenModel(lm), context=256)


def test_a_rewrite_is_judged_and_learned_without_what_the_teacher_reasoned(verifier):
    teacher = reasoning_teacher(LONG, "<think>12+34=46 \\boxed{7}</think>\n46-5=41\n\\boxed{41}")
    tokenizer = teacher.model.lm.tokenizer
    whole, unclosed = teacher.generate(
        [
            [GenerationRequest(messages=(Message(role="user", content=LONG),), max_new_tokens=n, temperature=0.0)]
            for n in (80, 9)
        ]
    )
    assert whole[0].texts == ("<think>12+34=46 \\boxed{7}</think>\n46-5=41\n\\boxed{41}",)
    assert unclosed[0].texts == ("<think>12+34=46",)
    before = rollouts(tokenizer, [LONG])
    options = {"prompt": "{completion}", "sampling_temperature": 0.0}
    after, metrics = rewritten(before, teacher, tokenizer, verifier, **options)
    assert metrics["rewrite/kept/share"] == 1
    assert texts(tokenizer, after) == ["46-5=41\n\\boxed{41}<|end|>"]
    # the teacher's own answer keeps its reasoning, in tokens
    asked = replace(before.prompts[0], teacher_messages=(Message(role="user", content=LONG),))
    source = bound(TeacherSource(sampling_temperature=0.0), tokenizer, teacher=teacher)
    (ids,) = source.rollouts((asked,), ONE, 1)[1].completion_ids
    assert decode(tokenizer, ids, special=True) == f"{whole[0].texts[0]}<|end|>"
    assert sum(i in tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) for i in ids) == 2
    # a prompt that opens the student's reasoning: the rewrite begins behind it
    opened = replace(
        before.prompts[0], token_ids=tuple(tokenizer("<|user|>a<|end|><|assistant|><think>\n")["input_ids"])
    )
    begun = rollouts(tokenizer, [LONG.replace("\\boxed", "</think>\\boxed")])
    begun = replace(begun, prompts=(opened,))
    after, _ = rewritten(begun, Scripted([answer("\\boxed{41}")]), tokenizer, verifier)
    assert texts(tokenizer, after) == ["</think>\n\n\\boxed{41}<|end|>"]
    assert texts_to_judge(tokenizer, after) == ["<think>\n</think>\n\n\\boxed{41}"]


def test_with_only_correct_a_rewrite_of_a_wrong_completion_is_not_asked_for(tokenizer, verifier):
    before = rollouts(tokenizer, ["12+34=46\n46-5=41\n\\boxed{41}", "12+34=46\n46-5=40\n\\boxed{40}"])
    teacher = Scripted([answer("\\boxed{41}")])
    after, metrics = rewritten(before, teacher, tokenizer, verifier, only_correct=True)
    assert len(teacher.requests) == 1
    assert after.rewritten == (True, False)
    assert after.completion_ids[1] == before.completion_ids[1]
    assert metrics["rewrite/wrong_answer/sum"] == 1
    with pytest.raises(DataError, match=r"row 3 has no answer, which rollout\.source\.only_correct needs"):
        RewriteSource(only_correct=True).check_prompts([replace(prompt(3), answer=None)])


def test_the_teacher_that_rewrites_sees_the_problem_and_the_completion_behind_its_own_system_message(
    tokenizer, verifier
):
    system = Message(role="system", content="Be brief.")
    before = rollouts(tokenizer, ["46, \\boxed{41}"])
    given = tuple(replace(p, teacher_messages=(system, *p.messages), teacher="good") for p in before.prompts)
    teacher = Scripted([answer("\\boxed{41}")])
    options = {"prompt": "{prompt} | {completion}", "sampling_temperature": 0.3}
    rewritten(replace(before, prompts=given), teacher, tokenizer, verifier, **options)
    (request,) = teacher.requests
    assert request.messages == (system, Message(role="user", content="12+34-5 | 46, \\boxed{41}"))
    assert (request.prefix, request.samples, request.temperature, request.teacher) == ("", 1, 0.3, "good")


def test_a_placeholder_that_is_no_column_is_reported_under_its_own_key():
    with pytest.raises(
        DataError, match=r"rollout\.source\.prompt asks for \{solution\}, the dataset has completion, prompt"
    ):
        RewriteSource(prompt="{prompt} {completion} {solution}").check_prompts([prompt()])
    facts = TeacherFacts(provides=LOCAL, why_not={}, model=ModelFacts.read(str(MODELS / "teacher")))
    with pytest.raises(DataError, match=r"system_prompt asks for \{style\}"):
        LocalTeacherConfig(model="m", system_prompt="{style}").render([prompt()], facts, 0)


def test_a_cut_completion_keeps_its_cut_unless_the_teacher_ends_it(tokenizer, verifier):
    """What is learned on is what was sampled, without an end that nobody wrote, or a rewrite with the teacher's end."""
    given = ["first I think about it, then", "12+34=46, again 46\n46-5=41\n\\boxed{41} and then"]
    whole = rollouts(tokenizer, given)
    cut = replace(whole, completion_ids=tuple(ids[:-1] for ids in whole.completion_ids), finished=(False, False))
    after, _ = rewritten(cut, Scripted([answer("46-5=41\n\\boxed{41}")]), tokenizer, verifier)
    assert texts(tokenizer, after) == [given[0], "46-5=41\n\\boxed{41}<|end|>"]
    assert after.finished == (False, True)
    assert (OPD().total_weight(after), NLL().total_weight(after)) == (sum(after.lengths), after.lengths[1])


def test_the_teacher_answers_the_prompts_in_place_of_the_student(tokenizer):
    teacher = Scripted([answer("46"), answer("123456", finished=False), None, answer(" \n")])
    source = bound(TeacherSource(sampling_temperature=0.5), tokenizer, teacher=teacher)
    written, learned = source.rollouts([prompt(0), prompt(1)], replace(ONE, max_new_tokens=4, samples=2), 1)
    assert written is learned
    assert [p.row for p in learned.prompts] == [0, 0, 1, 1]
    assert texts(tokenizer, learned) == ["46<|end|>", "1234", "", ""]
    assert learned.finished == (True, False, False, False)
    assert learned.written_by == "teacher"
    assert numbers(source) == {"sequence/length/mean": (3 + 4) / 2, "sequence/lost/sum": 2}
    assert NLL().total_weight(learned) == 3 + 4
    # no longer than the student may write at this step
    assert [(r.max_new_tokens, r.temperature, r.samples) for r in teacher.requests] == [(4, 0.5, 1)] * 4


def test_the_datasets_completions_end_with_the_stop_token_unless_they_are_cut(tokenizer):
    source = bound(DatasetSource(), tokenizer)
    given = [prompt(0, completion="12+34=46"), prompt(1, completion="1")]
    _, learned = source.rollouts(given, replace(ONE, max_new_tokens=4, samples=2), 1)
    assert texts(tokenizer, learned) == ["12+3", "1<|end|>"]  # one a prompt, whatever group_size is
    assert learned.finished == (False, True)
    assert learned.written_by == "dataset"
    assert NLL().total_weight(learned) == 4 + 2


def test_the_students_completions_are_drawn_by_seed_step_and_place(tokenizer):
    before = rollouts(tokenizer, ["1"])
    seeds = []
    for context in ({"seed": 0}, {"seed": 0, "process": (1, 2)}, {"seed": 1}):
        engine = Written(before)
        source = bound(StudentSource(), tokenizer, engine=engine, **context)
        for step in (1, 2, 1):
            written, learned = source.rollouts(before.prompts, ONE, step)
            assert written is learned is before
        seeds.append(engine.seeds)
    assert all(first == again for first, _, again in seeds)
    assert len({drawn for one in seeds for drawn in one}) == 6
    assert [places for _, places in seeds[0]] == [range(1)] * 3
    assert [places for _, places in seeds[1]] == [range(1, 2, 2)] * 3  # the second of the step's prompts
    assert [seed for seed, _ in seeds[0]] == [seed for seed, _ in seeds[1]]
    assert NLL().total_weight(before) == 0  # the student's own text teaches it nothing


def test_lambda_on_policy_is_the_share_of_steps_on_the_students_completions(tokenizer):
    before = rollouts(tokenizer, ["1"], completion="12")

    def authors(share: float, **context) -> list[str]:
        source = bound(StudentSource(lambda_on_policy=share), tokenizer, engine=Written(before), **context)
        return [source.rollouts(before.prompts, ONE, step)[1].written_by for step in range(1, 401)]

    third = authors(0.3)
    assert set(third) == {"student", "dataset"}
    assert 0.2 < third.count("student") / 400 < 0.4
    assert authors(0.3, process=(1, 2)) == third  # all ranks take the same, or their updates would wait for each other
    assert authors(0.3, seed=1) != third
    assert set(authors(0.0)) == {"dataset"}


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param({"type": "opd"}, id="reverse", marks=pytest.mark.slow),
        pytest.param({"type": "opd", "divergence": "forward_kl"}, id="forward", marks=pytest.mark.slow),
        pytest.param({"type": "opd_top_k", "k": 4}, id="top_k", marks=pytest.mark.slow),
        pytest.param({"type": "opd_sampled", "redraw": True}, id="sampled", marks=pytest.mark.slow),
        pytest.param([{"type": "opd"}, {"type": "nll"}], id="with_nll"),
    ],
)
def test_a_local_teacher_that_rewrites_serves_every_estimator_of_the_kl_family(objective, tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, rollout=SHORT | REWRITE, objective=objective, max_steps=1)
    run_recipe(parse_recipe(tree))
    (row,) = steps(tmp_path / "run")
    assert 0 <= row["rollout/accuracy/share"] <= 1
    rejected = sum(row[f"rewrite/{reason}/sum"] for reason in REASONS)
    assert rejected + row["rewrite/kept/share"] * 8 == 8
    assert row["health/top_16_overlap/mean"] > 0
    assert row["train/skipped_steps/total"] == 0


@pytest.mark.parametrize("objective", ["nll", "opd"])
def test_sequence_distillation_from_a_local_teacher_by_likelihood_and_by_kl(objective, tmp_path, train_file):
    tree = miniature_recipe(
        tmp_path / "run", train_file, rollout=SHORT | SEQUENCE, objective={"type": objective}, max_steps=1
    )
    run_recipe(parse_recipe(tree))
    (row,) = steps(tmp_path / "run")
    assert row["sequence/length/mean"] > 20
    assert row[f"train/{'nll' if objective == 'nll' else 'reverse_kl'}/mean"] > 0


def test_the_dataset_serves_fine_tuning_and_off_policy_distillation(tmp_path):
    rows = [{"problem": one.problem, "completion": completion(one)} for one in sums(8, seed=1, held_out=False)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = miniature_recipe(
        tmp_path / "run", tmp_path / "d.jsonl", rollout=SHORT | {"max_completion_length": 80, "source": {"type": "dataset"}},
        objective=[{"type": "nll"}, {"type": "opd"}], max_steps=1,
    )  # fmt: skip
    run_recipe(parse_recipe(tree))
    (row,) = steps(tmp_path / "run")
    assert row["train/nll/mean"] > 0
    assert row["train/reverse_kl/mean"] > 0
    assert row["rollout/truncated/share"] == 0


@pytest.mark.slow
def test_under_a_length_schedule_cut_completions_are_learned_on_as_they_are(tmp_path, train_file):
    rollout = {"group_size": 2, "max_completion_length": 64, "length_schedule": {"from": 6, "steps": 2}}
    for name, source in (("rewrite", REWRITE), ("sequence", SEQUENCE)):
        tree = miniature_recipe(
            tmp_path / name, train_file, rollout=rollout | source, objective={"type": "opd"}, max_steps=2
        )
        run_recipe(parse_recipe(tree))
    short, whole = steps(tmp_path / "rewrite")
    assert short["rewrite/no_answer/sum"] == 8
    assert short["tokens/supervised/sum"] == short["tokens/generated/sum"] == 8 * 6
    assert whole["rewrite/no_answer/sum"] < 8
    short, whole = steps(tmp_path / "sequence")
    assert short["sequence/length/mean"] == 6
    assert short["tokens/supervised/sum"] == 8 * 6
    assert whole["sequence/length/mean"] > 12


def test_a_step_on_which_nothing_could_be_used_changes_no_weight_and_is_counted(tmp_path, train_file):
    """Four tokens are no whole answer, neither of the student nor of the teacher."""
    tree = miniature_recipe(
        tmp_path / "run", train_file, rollout={"group_size": 2, "max_completion_length": 4} | REWRITE,
        objective={"type": "nll"}, max_steps=1,
    )  # fmt: skip
    done = run_recipe(parse_recipe(tree))
    (row,) = steps(tmp_path / "run")
    assert row["rewrite/kept/share"] == 0
    assert row["train/skipped_steps/total"] == 1
    before = load_miniature("base").model.state_dict()
    assert all(bool((value == before[name]).all()) for name, value in done.model.state_dict().items())


def test_a_completion_of_the_dataset_ends_once(tokenizer):
    end = tokenizer.eos_token_id
    source = bound(DatasetSource(), tokenizer)
    given = [
        prompt(i, completion=text)
        for i, text in enumerate(("7", f"7{tokenizer.eos_token}", f"7{tokenizer.eos_token}8"))
    ]
    written, _ = source.rollouts(given, ONE, 1)
    assert written.completion_ids == ((*tokenizer("7")["input_ids"], end),) * 3
    assert written.finished == (True,) * 3
