"""Student and teacher of a recipe as a pair: what the teacher is asked for, whether the two provide what the objectives
require, and which tokens end a text of either."""

from dataclasses import dataclass
from functools import reduce
from operator import or_

import datasets
from transformers import PreTrainedTokenizerBase

from oprd.data.chat import decode
from oprd.distributed import Ranks
from oprd.errors import ConfigError, TeacherMismatch
from oprd.models.language_model import CausalLM
from oprd.models.loading import ModelFacts
from oprd.objectives.base import Objective, check_pair
from oprd.progress import console
from oprd.recipe import Recipe
from oprd.student import InitialStudent
from oprd.teacher.base import Needs, TeacherContext, TeacherFacts
from oprd.train.run_folder import RunFolder
from oprd.types import Capability, Taps


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Objects handed over from Python in place of names in the recipe."""

    student: CausalLM | None = None
    teacher: CausalLM | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    prompts: datasets.Dataset | None = None

    def __post_init__(self) -> None:
        student, teacher = (
            {*map(id, m.parameters())} if m is not None else set[int]() for m in (self.student, self.teacher)
        )
        if student & teacher:
            raise TeacherMismatch(
                "student and teacher share weights, and a teacher is frozen; give a teacher of its own (copy.deepcopy), or "
                "`teacher: {type: self}` for the student before training"
            )


def check_pairs(recipe: Recipe, objectives: tuple[Objective, ...], teacher: TeacherFacts) -> None:
    """Raise TeacherMismatch unless teacher and source provide what every objective and the source require."""
    rollout, source = recipe.rollout, recipe.rollout.source
    provided, why_not = source.provides, dict(teacher.why_not)
    if (rollout.sampling_temperature, rollout.top_p) != (1.0, 1.0):
        provided -= {Capability.ON_POLICY}
        why_not[Capability.ON_POLICY] = (
            f"sampling_temperature is {rollout.sampling_temperature}, top_p is {rollout.top_p}"
        )
    kind = recipe.teacher.type
    for objective in objectives:
        check_pair(objective, teacher.provides | provided, why_not, kind)
        if (
            rollout.off_policy
            and objective.importance_weighted
            and Capability.LOGPROBS in objective.requires
            and Capability.SAME_TOKENIZER not in teacher.provides
        ):
            raise ConfigError(
                f"rollout.updates_per_rollout is {rollout.updates_per_rollout} and rollouts_ahead {rollout.rollouts_ahead}, but "
                "the teacher has another tokenizer: importance weights are taken by token, not by the span between two aligned "
                "tokens. Set them to 1 and 0"
            )


def teacher_context(
    recipe: Recipe,
    given: Given,
    student: ModelFacts,
    objectives: tuple[Objective, ...],
    ranks: Ranks,
    initial: InitialStudent,
) -> TeacherContext:
    """What teachers are built from, before the student is loaded."""
    required = frozenset[Capability]().union(*(objective.requires for objective in objectives))
    continues = Capability.TEXT in required
    handed = {"model": given.teacher, "tokenizer": given.teacher_tokenizer} if "" in recipe.teacher.members else {}
    return TeacherContext(
        student=student,
        initial_student=initial,
        needs=Needs(
            taps=reduce(or_, (objective.teacher_taps for objective in objectives), Taps()),
            text=continues or recipe.rollout.source.writes_by_teacher,
            continues=continues,
            logprobs=bool(required & {Capability.LOGPROBS, Capability.TOP_K}),
            top_k=max((objective.top_k_of_teacher for objective in objectives), default=0),
            diagnostics=recipe.health_tokens > 0,
        ),
        device=ranks.device,
        sharded=ranks.sharded,
        rank=ranks.rank,
        world_size=ranks.size,
        seed=recipe.seed,
        packing=recipe.packing,
        cache_tokens=recipe.rollout.engine.cache_tokens,
        cache=RunFolder(recipe.output_dir).teacher_cache,
        given={key: value for key, value in handed.items() if value is not None},
    )


def pair_stops(student: ModelFacts, teacher: TeacherFacts) -> tuple[int, ...]:
    """All stop ids of the student and of the local teachers with its tokenizer; none where all stop by the same."""
    stops = {frozenset(model.stop_ids) for model in _of_one_tokenizer(student, teacher)}
    return tuple(sorted(frozenset[int]().union(*stops))) if len(stops) > 1 else ()


def check_stops(recipe: Recipe, objectives: tuple[Objective, ...], stops: tuple[int, ...]) -> None:
    """Raise ConfigError for importance weights that nobody could tell: an engine does not count several stop ids as one."""
    if stops and recipe.rollout.rollouts_ahead and any(objective.importance_weighted for objective in objectives):
        raise ConfigError(
            f"rollout.rollouts_ahead is 1, and student and teacher end their texts with different tokens ({list(stops)}), which "
            "count as one: the engine's log-probabilities of them give no importance weights. Set rollouts_ahead=0"
        )


def tell_of_stops(student: ModelFacts, stops: tuple[int, ...]) -> None:
    """Tell the user which ids end a turn, where student and teacher differ."""
    if stops:
        ends = decode(student.tokenizer, stops, special=True)
        console.print(
            f"Student and teacher end their texts with different tokens ({ends}): each of them ends a completion, and "
            "objectives on next tokens count them as one.",
            markup=False,
            highlight=False,
        )


def pair_rows(student: ModelFacts, teacher: TeacherFacts) -> int:
    """Ids that the embeddings of the student and of the local teachers with its tokenizer all have a row for."""
    return min(model.vocabulary for model in _of_one_tokenizer(student, teacher))


def _of_one_tokenizer(student: ModelFacts, teacher: TeacherFacts) -> list[ModelFacts]:
    shared = {Capability.HIDDEN, Capability.SAME_TOKENIZER}
    teachers = (teacher.members or {"": teacher}).values()
    return [student, *(one.model for one in teachers if shared <= one.provides and one.model)]
