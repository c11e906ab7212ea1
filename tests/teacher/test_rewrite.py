"""Teachers that give the student another trajectory: which rewritings are learned on, and what is learned on otherwise."""

import json
from dataclasses import dataclass, field, replace

import pytest

from conftest import MODELS, load_miniature, miniature_recipe
from oprd.config.models import RewritingTeacherConfig, SequenceTeacherConfig
from oprd.config.objectives import OutputKLConfig, RewrittenConfig
from oprd.config.reading import parse_recipe
from oprd.data.chat import decode
from oprd.errors import ConfigError, DataError
from oprd.objectives import build_objectives
from oprd.teacher.rewrite import RewritingTeacher, SequenceTeacher
from oprd.teacher.writer import Writer, Written
from oprd.train.run import run_recipe
from oprd.train.talking import LazyJudge
from oprd.types import Lost, Message, Prompt, Rollouts

LOCAL = {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"}


@dataclass
class Scripted(Writer):
    """Says what it is told to; what a teacher makes of that is the thing under test."""

    says: list[Written | None]
    asked: list = field(default_factory=list)
    system_prompt: str | None = None
    prompt_template: str | None = None

    def write(self, chains):
        self.asked = [ask for chain in chains for ask in chain]
        return [[answer] for answer in self.says]

    def tallies(self):
        return ()


def said(text: str, finished: bool = True) -> Written:
    return Written(texts=(text,), finished=(finished,), tokens=len(text))


@pytest.fixture(scope="module")
def judge():
    judge = LazyJudge(timeout_s=5.0)
    yield judge
    judge.close()


def rollouts(tokenizer, texts: list[str]) -> Rollouts:
    prompts = tuple(
        Prompt(row=i, messages=(Message(role="user", content="12+34-5"),), token_ids=(1,), answer="41")
        for i in range(len(texts))
    )
    ids = tuple((*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts)
    return Rollouts(prompts=prompts, completion_ids=ids, finished=(True,) * len(texts))


def rewriting(writer: Scripted, judge, tokenizer, **config) -> RewritingTeacher:
    """A teacher that gives text only."""
    return RewritingTeacher(
        config=RewritingTeacherConfig(teacher=None, **config),
        writer=writer,
        judge=judge,
        tokenizer=tokenizer,
        stop=tokenizer.eos_token_id,
        local=None,
        max_tokens=80,
    )


def told(teacher) -> dict[str, float]:
    return {t.name: t.total if t.of is None else t.total / max(t.of, 1) for t in teacher.tallies()}


def test_a_rewriting_is_learned_on_only_if_it_is_whole_no_longer_and_ends_in_the_same_answer(judge):
    tokenizer = load_miniature("teacher").tokenizer
    long = "12+34=46, again 46\n46-5=41\n\\boxed{41}"
    wrong = "12+34=46, again 46\n46-5=40\n\\boxed{40}"
    before = rollouts(tokenizer, [long, long, long, long, long, long, "no answer here, only talk", wrong, long])
    writer = Scripted(
        [
            said(" 46-5=41\n\\boxed{41.0} "),  # kept: 41.0 is 41
            None,
            said("  "),
            said("\\boxed{41}", finished=False),
            said(long + "\n\\boxed{41}"),
            said("\\boxed{42}"),
            said("\\boxed{40}"),  # kept: the answer of the student, though it is wrong
            said(long),  # kept: nothing was left to leave out
        ]
    )
    teacher = rewriting(writer, judge, tokenizer)
    after = teacher.prepare(before)
    assert len(writer.asked) == 8  # not about the one that has no answer to end in
    reasons = [answer.reason if answer is not None else None for answer in after.answers]
    assert reasons == [None, "no_reply", "empty", "unfinished", "longer", "other_answer", "no_answer", None, None]
    texts = [decode(tokenizer, ids, special=True) for ids in after.completion_ids]
    assert texts[0] == "46-5=41\n\\boxed{41.0}<|end|>"
    assert texts[7] == "\\boxed{40}<|end|>"
    assert after.completion_ids[1:7] == before.completion_ids[1:7]
    numbers = told(teacher)
    assert numbers["rewrite/kept/share"] == 3 / 9
    assert numbers["rollout/accuracy/share"] == 7 / 9
    assert all(numbers[f"rewrite/{reason}/sum"] == 1 for reason in reasons if reason is not None)
    assert numbers["rewrite/length/mean"] < numbers["rewrite/replaced_length/mean"]
    (objective,) = build_objectives(RewrittenConfig(), blocks=4, vocabulary=262)
    assert objective.divisor(after) == sum(len(after.completion_ids[i]) for i in (0, 7, 8))


def test_with_only_correct_a_rewriting_of_a_wrong_completion_is_not_learned_on(judge):
    tokenizer = load_miniature("teacher").tokenizer
    before = rollouts(tokenizer, ["12+34=46\n46-5=41\n\\boxed{41}", "12+34=46\n46-5=40\n\\boxed{40}"])
    writer = Scripted([said("\\boxed{41}")])
    teacher = rewriting(writer, judge, tokenizer, only_correct=True)
    after = teacher.prepare(before)
    assert len(writer.asked) == 1
    assert [answer and answer.reason for answer in after.answers] == [None, "wrong_answer"]
    assert after.completion_ids[1] == before.completion_ids[1]
    assert told(teacher)["rewrite/wrong_answer/sum"] == 1
    with pytest.raises(DataError, match=r"row 3 has no answer, which teacher\.only_correct needs"):
        teacher.check_prompt(replace(before.prompts[0], row=3, answer=None))


def test_the_rewriting_teacher_sees_the_problem_and_the_completion(judge):
    tokenizer = load_miniature("teacher").tokenizer
    writer = Scripted([said("\\boxed{41}")])
    teacher = rewriting(writer, judge, tokenizer, rewrite_prompt="{prompt} | {completion}", sampling_temperature=0.3)
    teacher.prepare(rollouts(tokenizer, ["46, \\boxed{41}"]))
    (ask,) = writer.asked
    assert ask.messages == (Message(role="user", content="12+34-5 | 46, \\boxed{41}"),)
    assert (ask.prefix, ask.samples, ask.temperature) == ("", 1, 0.3)


def test_a_placeholder_that_is_no_column_is_reported_under_its_own_key(judge):
    tokenizer = load_miniature("teacher").tokenizer
    teacher = rewriting(Scripted([]), judge, tokenizer, rewrite_prompt="{prompt} {completion} {solution}")
    (prompt,) = rollouts(tokenizer, ["1"]).prompts
    with pytest.raises(DataError, match=r"rewrite_prompt asks for \{solution\}, the dataset has completion, prompt"):
        teacher.check_prompts([prompt])
    teacher = rewriting(Scripted([], system_prompt="{style}"), judge, tokenizer)
    with pytest.raises(DataError, match=r"system_prompt asks for \{style\}"):
        teacher.writer.conversation(prompt)


def test_a_cut_completion_keeps_its_cut_unless_the_teacher_ends_it(judge):
    """What is learned on is what was sampled, without an end that nobody wrote, or a rewriting with the teacher's end."""
    tokenizer = load_miniature("teacher").tokenizer
    texts = ["first I think about it, then", "12+34=46, again 46\n46-5=41\n\\boxed{41} and then"]
    whole = rollouts(tokenizer, texts)
    cut = replace(whole, completion_ids=tuple(ids[:-1] for ids in whole.completion_ids), finished=(False, False))
    writer = Scripted([said("46-5=41\n\\boxed{41}")])
    teacher = rewriting(writer, judge, tokenizer)
    after = teacher.prepare(cut)
    assert [decode(tokenizer, ids, special=True) for ids in after.completion_ids] == [
        texts[0],
        "46-5=41\n\\boxed{41}<|end|>",
    ]
    assert after.finished == (False, True)
    (plain,) = build_objectives(OutputKLConfig(), blocks=4, vocabulary=262)
    (text_only,) = build_objectives(RewrittenConfig(), blocks=4, vocabulary=262)
    lengths = [len(ids) for ids in after.completion_ids]
    assert (plain.divisor(after), text_only.divisor(after)) == (sum(lengths), lengths[1])


def test_a_sequence_teacher_puts_its_own_completions_in_place_of_the_students():
    tokenizer = load_miniature("teacher").tokenizer
    writer = Scripted([said("46"), said("123456", finished=False), None, said(" \n")])
    teacher = SequenceTeacher(
        config=SequenceTeacherConfig(teacher=None),
        writer=writer,
        tokenizer=tokenizer,
        stop=tokenizer.eos_token_id,
        local=None,
        max_tokens=4,
    )
    after = teacher.prepare(rollouts(tokenizer, ["1", "2", "3", "4"]))
    assert [decode(tokenizer, ids, special=True) for ids in after.completion_ids] == ["46<|end|>", "1234", "", ""]
    assert after.finished == (True, False, False, False)
    assert after.answers == (None, None, Lost(reason="no_reply"), Lost(reason="empty"))
    assert told(teacher)["sequence/lost/sum"] == 2


def test_a_sequence_teacher_writes_no_longer_than_the_student_may_at_this_step():
    tokenizer = load_miniature("teacher").tokenizer
    writer = Scripted([said("123", finished=False)])
    teacher = SequenceTeacher(
        config=SequenceTeacherConfig(teacher=None), writer=writer, tokenizer=tokenizer, stop=tokenizer.eos_token_id,
        local=None, max_tokens=80,
    )  # fmt: skip
    after = teacher.prepare(replace(rollouts(tokenizer, ["1"]), max_tokens=2))
    assert writer.asked[0].max_tokens == 2
    assert after.lengths == (2,)


def steps(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "opd"},
        {"type": "opd", "divergence": "forward_kl"},
        {"type": "opd", "estimator": "top_k", "top_k": 4},
        {"type": "opd", "estimator": "sampled", "redraw": True},
        {"type": "mixture", "terms": [{"type": "opd"}, {"type": "nll"}]},
    ],
    ids=["reverse", "forward", "top_k", "sampled", "mixture"],
)
def test_a_white_box_rewriter_gives_every_estimator_of_the_kl_family(objective, tmp_path, train_file):
    tree = miniature_recipe(
        tmp_path / "run", train_file, teacher={"type": "rewrite", "teacher": LOCAL}, objective=objective, max_steps=1
    )
    run_recipe(parse_recipe(tree))
    (row,) = steps(tmp_path / "run")
    assert 0 <= row["rollout/accuracy/share"] <= 1
    reasons = ("no_reply", "empty", "unfinished", "longer", "no_answer", "other_answer", "wrong_answer")
    rejected = sum(row[f"rewrite/{reason}/sum"] for reason in reasons)
    assert rejected + row["rewrite/kept/share"] * 8 == 8
    assert row["health/top_16_overlap/mean"] > 0


def test_sequence_distillation_from_a_local_teacher_by_likelihood_and_by_kl(tmp_path, train_file):
    for name, objective in (("nll", {"type": "nll"}), ("kl", {"type": "opd"})):
        tree = miniature_recipe(
            tmp_path / name,
            train_file,
            teacher={"type": "sequence", "teacher": LOCAL},
            objective=objective,
            max_steps=1,
        )
        run_recipe(parse_recipe(tree))
        (row,) = steps(tmp_path / name)
        assert row["sequence/length/mean"] > 20
        assert row["train/loss/mean"] > 0


def test_under_a_length_schedule_cut_completions_are_learned_on_as_they_are(tmp_path, train_file):
    schedule = {"type": "stepwise", "at": [2], "lengths": [6]}
    rollout = {"group_size": 2, "max_completion_length": 64, "length_schedule": schedule}
    for name, teacher in (("rewrite", "rewrite"), ("sequence", "sequence")):
        tree = miniature_recipe(
            tmp_path / name, train_file, teacher={"type": teacher, "teacher": LOCAL}, rollout=rollout,
            objective={"type": "opd"}, max_steps=2,
        )  # fmt: skip
        run_recipe(parse_recipe(tree))
    short, whole = steps(tmp_path / "rewrite")
    assert short["rewrite/no_answer/sum"] == 8
    assert short["tokens/supervised/sum"] == short["tokens/generated/sum"] == 8 * 6
    assert whole["rewrite/no_answer/sum"] < 8
    short, whole = steps(tmp_path / "sequence")
    assert short["sequence/length/mean"] == 6
    assert short["tokens/supervised/sum"] == 8 * 6
    assert whole["sequence/length/mean"] > 12


def test_a_schedule_that_leaves_nothing_to_learn_on_is_refused(tmp_path, train_file):
    rollout = {"max_completion_length": 64, "length_schedule": {"type": "linear", "start": 8, "steps": 9}}
    tree = miniature_recipe(
        tmp_path, train_file, teacher={"type": "rewrite", "teacher": LOCAL}, objective={"type": "nll"}, rollout=rollout
    )
    with pytest.raises(ConfigError, match="the objective 'nll' learns on rewritten ones alone; drop length_schedule"):
        parse_recipe(tree)
    parse_recipe(tree | {"objective": {"type": "mixture", "terms": [{"type": "opd"}, {"type": "nll"}]}})


def test_a_step_on_which_nothing_could_be_used_changes_no_weight_and_is_counted(tmp_path, train_file):
    """Four tokens are no whole answer, neither of the student nor of the teacher."""
    tree = miniature_recipe(
        tmp_path / "run",
        train_file,
        teacher={"type": "rewrite", "teacher": LOCAL},
        rollout={"group_size": 2, "max_completion_length": 4},
        objective={"type": "nll"},
        max_steps=1,
    )
    run_recipe(parse_recipe(tree))
    (row,) = steps(tmp_path / "run")
    assert row["rewrite/kept/share"] == 0
    assert row["train/skipped_steps/total"] == 1
