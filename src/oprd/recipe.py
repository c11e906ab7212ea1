# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""A recipe: every choice of a run, mirrored by the YAML file key by key. Reading, overriding, writing."""

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast

import yaml
from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from oprd.data.prompts import DataConfig
from oprd.effopd import EffOPDConfig
from oprd.errors import ConfigError
from oprd.evaluate.benchmarks import EvaluationConfig
from oprd.files import read_yaml
from oprd.models.generate import SamplingSection
from oprd.models.loading import StudentConfig
from oprd.objectives import AnyObjective
from oprd.rollout.hf import HFEngineConfig
from oprd.rollout.sources import SourceConfig, StudentSource
from oprd.rollout.vllm import VLLMEngineConfig
from oprd.section import Listed, Minutes, NonNegativeInt, PositiveInt, Ramp, Section, Seed
from oprd.student import OptimizerSection
from oprd.teacher import AnyTeacher

S = TypeVar("S", bound=Section)
MOST_MESSAGES, MOST_SHOWN = 20, 200
"""Of the errors that are listed; of the letters of a value in an error."""


class RolloutConfig(SamplingSection):
    """Who writes the completions, by which engine, and how."""

    source: SourceConfig = StudentSource()
    """Who writes: `{type: student}`, `dataset`, `teacher` or `rewrite`."""
    engine: Annotated[HFEngineConfig | VLLMEngineConfig, Field(discriminator="type")] = HFEngineConfig()
    """What generates the student's completions: `{type: hf}` or `vllm`."""
    group_size: PositiveInt = 2
    """Completions per prompt."""
    sampling_temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Divides the student's logits when it writes."""
    length_schedule: Ramp | None = None
    """`{from: 64, steps: 200}`: completions grow from so many tokens to max_completion_length. None: no schedule."""
    updates_per_rollout: PositiveInt = 1
    """Optimizer updates on the completions of a step; all but the first are off-policy."""
    rollouts_ahead: Literal[0, 1] = 0
    """1: the next step's completions are written during this one's updates, by an engine on devices of its own."""

    @property
    def off_policy(self) -> bool:
        return self.updates_per_rollout > 1 or self.rollouts_ahead > 0

    def length_at(self, step: int) -> int:
        """Most tokens of a completion at a step, counted from 1."""
        longest = self.max_completion_length
        return longest if self.length_schedule is None else round(self.length_schedule.between(longest, step))

    @model_validator(mode="after")
    def _check_ahead(self) -> Self:
        if self.rollouts_ahead and not (self.engine.writes_ahead and self.source.writes_by_student):
            raise ValueError(
                "rollouts_ahead is 1, which is for completions that the student writes on devices of their own; set engine.urls "
                f"(engine is {self.engine.type!r}, source {self.source.type!r}), or rollouts_ahead=0"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if not 1 <= self.length_at(1) <= self.max_completion_length:
            raise ValueError(
                f"length_schedule asks for {self.length_at(1)} tokens, max_completion_length is "
                f"{self.max_completion_length}; start between 1 and that, or raise it"
            )
        return self


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _one_or_list(values: tuple[Any, ...]) -> Any:
    dumped = [{"type": value.type} | value.model_dump(mode="json", by_alias=True) for value in values]
    return dumped[0] if len(dumped) == 1 else dumped


Objectives = Annotated[
    tuple[AnyObjective, ...], BeforeValidator(_listed), PlainSerializer(_one_or_list), Field(min_length=1)
]


class Recipe(OptimizerSection):
    """One run. Names follow transformers.TrainingArguments where the thing is the same."""

    student: StudentConfig
    """The model that is trained."""
    teacher: AnyTeacher
    """Who judges: `{type: local, model: NAME}`, `self`, `server` or `several`."""
    data: DataConfig
    """The prompts."""
    output_dir: str
    """The run folder."""
    objective: Objectives = Field(default_factory=lambda: _listed({"type": "oprd"}), validate_default=True)
    """What is minimised: one objective, or a list that is summed with its weights."""
    rollout: RolloutConfig = RolloutConfig()
    """Who writes the completions, and how."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Benchmarks and how they are sampled."""
    extrapolation: EffOPDConfig | None = None
    """Searches further along the direction of the updates; None: none."""

    max_steps: PositiveInt = 500
    """Steps of rollout and update."""
    prompts_per_step: PositiveInt = 8
    """Over all ranks."""
    micro_batch_tokens: PositiveInt = 16_384
    """Padded positions of one forward and backward pass on one rank; a longer completion goes alone."""
    packing: bool = False
    """Read the completions of a micro-batch behind each other instead of padding them. Pays with flash attention."""
    bf16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16. auto: on a GPU that has it, not on a CPU or Apple's GPU; the run folder's recipe says which."""
    seed: Seed = 0
    """Every random number of the run follows from it."""
    max_skipped_steps: PositiveInt = 5
    """Stop after this many steps in a row with a non-finite loss or gradient, or nothing to learn on."""
    logging_steps: PositiveInt = 1
    """A line in metrics.jsonl every so many steps."""
    health_tokens: NonNegativeInt = 256
    """Sampled tokens that the diagnostics are taken on at every logged step; 0 switches them off."""
    save_steps: PositiveInt | Minutes = 100
    """A checkpoint every so many steps, or every `30 min`, and after the last."""
    save_total_limit: PositiveInt = 2
    """Checkpoints that are kept, the newest."""
    eval_steps: PositiveInt | None = None
    """Evaluate every so many steps, before the first and after the last; None: only at the end."""
    report_to: Listed[Literal["trackio", "wandb", "tensorboard"]] = ()
    """Trackers that get the metrics as well (extra `tracking`)."""
    resume_from_checkpoint: str | None = None
    """`latest`, or a checkpoint folder of this run."""

    @model_validator(mode="after")
    def _check_parts_together(self) -> Self:
        shortest, longest = self.rollout.length_at(1), self.rollout.max_completion_length
        for objective in self.objective:
            objective.check_lengths(shortest)
        if sum(objective.writes_scores for objective in self.objective) > 1:
            raise ValueError("a completion is audited once: use one objective 'omni_opd' in a recipe")
        if self.bf16 is False and self.student.weights != "float32":
            given = (
                f"bf16 is false, but a model whose student.weights are {self.student.weights!r} computes in bfloat16"
            )
            raise ValueError(f"{given}; drop bf16, or use float32")
        if self.student.weights == "4bit" and not self.rollout.engine.runs_student:
            raise ValueError(
                f"student.weights is '4bit', but rollout.engine {self.rollout.engine.type!r} loads the whole base model; use bfloat16, "
                "or another engine"
            )
        only_text = all(o.requires <= self.rollout.source.provides for o in self.objective)
        hottest = max(self.rollout.sampling_temperature, self.evaluation.sampling_temperature)
        if hottest > self.rollout.engine.max_temperature:
            raise ValueError(
                f"sampling_temperature is {hottest}, rollout.engine {self.rollout.engine.type!r} takes up to "
                f"{self.rollout.engine.max_temperature}"
            )
        self.rollout.source.check_lengths(shortest, longest, only_teacher_text=only_text)
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.path=value` overrides, whose values are YAML.

    Raises ConfigError for a missing file, bad YAML, an unknown key (with the nearest name) or a wrong type, with the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 text: {error.reason}") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise ConfigError(f"cannot read recipe {path}: {error}") from error
    tree, lines = read_yaml(text, f"recipe {path}")
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path} must be a mapping of keys to values, got {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
        lines.pop(override.partition("=")[0], None)
    return parse_recipe(tree, {where: f"{path}:{line}: " for where, line in lines.items()})


def parse_recipe(tree: Mapping[Any, Any], lines: Mapping[str, str] | None = None) -> Recipe:
    """A recipe from nested mappings, as YAML gives them. Raises ConfigError naming key, value and what is allowed. `lines`: what
    to put before the error of a key, such as `recipe.yaml:7: `."""
    return _validate(Recipe, tree, lines or {})


def parse_evaluation(benchmarks: Sequence[str], overrides: Sequence[str]) -> EvaluationConfig:
    """A recipe's `evaluation` by itself, from `key=value` overrides. Raises ConfigError as for a recipe."""
    tree: dict[str, Any] = {"benchmarks": list(benchmarks)}
    for override in overrides:
        apply_override(tree, override)
    return _validate(EvaluationConfig, tree, {})


def _validate(section: type[S], tree: Mapping[Any, Any], lines: Mapping[str, str]) -> S:
    try:
        return section.model_validate(dict(tree))
    except ValidationError as error:
        explained = [_explain(section, line, tree) for line in error.errors()]
        messages = [*dict.fromkeys(lines.get(where, "") + message for where, message in explained)]
        more = [f"and {len(messages) - MOST_MESSAGES} more"] if len(messages) > MOST_MESSAGES else []
        raise ConfigError("\n".join(messages[:MOST_MESSAGES] + more)) from None


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested mappings that `parse_recipe` reads back to an equal recipe."""
    return recipe.model_dump(mode="json", by_alias=True)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, every default spelled out."""
    tree = recipe_to_dict(recipe)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    # PyYAML writes these as they are, and YAML reads them as ends of lines
    return yaml.safe_dump(tree, sort_keys=False) if re.search("[\x85\u2028\u2029]", text) else text


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Change a value of nested mappings by `key.path=value`. Raises ConfigError."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must look like key=value or section.key=value")
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        inner: Any = {} if tree.get(parent) is None else tree[parent]
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        tree[parent] = tree = dict(inner)  # a copy: the section may stand in other places too, by an alias
    tree[leaf], _ = read_yaml(value, f"override {override!r}: the value")


GONE = {
    "stages": "run a second recipe whose student.model is the first run's `student` folder",
    "mixture": "make `objective` a list of its terms",
    "coefficient": "use `weight`",
    "estimator": "the estimators are types of their own: opd, opd_top_k, opd_sampled",
    "jsd_weight": "use divergence: {type: jsd, weight: b}",
    "top_k": "use type opd_top_k with `k`",
    "space": "use type oprd_bridge_published for the form in projections",
    "trainable": "projections stay as fitted",
    "refit_every": "run `oprd fit-bridge` again and go on with a second recipe",
    "alignment": "two tokenizers are always aligned by bytes",
    "method": "the fit is in closed form; the published fit is in benchmarks/bridge_gradient_fit.py",
    "audit": "chunks start at the tokens of highest entropy; the random baseline is in benchmarks/talk.py",
    "similarity": "texts are compared by edit distance",
    "embedding_model": "texts are compared by edit distance",
    "fit": "use fit_prompts; the other settings of the fit are constants of objectives/oprd_bridge.py",
    "trust": "it is a constant of objectives/oprd_bridge.py",
    "sharpen": "targets of the last block are always sharpened",
    "at": "length_schedule is linear: {from: 64, steps: 200}",
    "lengths": "length_schedule is linear: {from: 64, steps: 200}",
    "start": "use `from`",
    "settled_cosine": "give `every: n`",
    "level": "accept: paired takes p <= 0.05",
    "max_lost_share": "a step that loses more than a tenth of its requests stops the run",
    "logprobs": "log-probabilities are requested as vLLM's prompt_logprobs",
    "verify_timeout_s": "an answer is checked within 5 s of processor time, a constant of verify/pool.py",
    "adam_beta1": "AdamW's betas are torch's defaults",
    "adam_beta2": "AdamW's betas are torch's defaults",
    "importance_clip": "it is a constant of losses/importance.py",
    "triggers": "give `every: n`, or nothing for the powers of two",
    "settled": "give `every: n`",
    "accept_ties": "use accept: not_worse, better or paired",
    "lambda_on_policy": "it belongs to rollout.source: {type: student, lambda_on_policy: 0.5}",
    "max_sequences": "rollout.engine: {type: hf, cache_tokens: 131072} bounds the key-value cache",
    "rewrite": "put the model under `teacher` and set rollout.source: {type: rewrite}",
    "sequence": "put the model under `teacher` and set rollout.source: {type: teacher}",
    "rewrite_prompt": "use rollout.source.prompt",
    "gguf_file": "convert the file once: scripts/export_smollm2.py shows how",
    "request_timeout_s": "use `timeout_s`",
    "price_per_million_prompt_tokens": "use price_per_million: [prompt, completion]",
    "price_per_million_completion_tokens": "use price_per_million: [prompt, completion]",
}
"""Keys and types of earlier versions, and what replaces them."""


def _explain(section: type[Section], line: Any, tree: Mapping[Any, Any]) -> tuple[str, str]:
    """(where, message) of one pydantic error: where, what was given, what is allowed."""
    where, kind, given = _path(section, line["loc"], tree), line["type"], line["input"]
    if kind == "value_error":
        return where, f"{where}: {line['ctx']['error']}".removeprefix(": ")
    if kind == "missing":
        return where, f"{where}: this key is required"
    if kind == "union_tag_not_found":
        return where, f"{where}: key 'type' is required and says which variant is meant, got {shown(given)}"
    if kind == "union_tag_invalid":
        tag, tags = line["ctx"]["tag"], line["ctx"]["expected_tags"]
        return where, f"{where}.type: unknown type {tag!r}{_nearest(tag, tags.split(', '))}; allowed: {tags}"
    if kind == "extra_forbidden":
        allowed = _fields_at(section, line["loc"][:-1])
        return where, f"{where}: unknown key{_nearest(str(line['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
    message = line["msg"].replace("Input should", "should").replace("valid tuple", "list")
    return where, f"{where}: {message}, got {shown(given)}"


def shown(value: Any) -> str:
    """A value in an error, cut to a readable length."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({len(text)} characters)"


def _nearest(given: str, names: Sequence[str]) -> str:
    if given in GONE:
        return f" of an earlier version: {GONE[given]}"
    close = difflib.get_close_matches(given, [name.strip(" '") for name in names], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _path(section: type[Section], loc: Sequence[str | int], tree: Any) -> str:
    """pydantic's location without what is not in the recipe, such as the names of union variants: `objective.1.k`."""
    parts = []
    for depth, key in enumerate(loc):
        if (isinstance(tree, Mapping) and key in tree) or (isinstance(key, int) and isinstance(tree, list)):
            tree = cast(Any, tree)[key]
        elif not (isinstance(tree, Mapping) and depth == len(loc) - 1 and key in _fields_at(section, loc[:-1])):
            continue  # not a missing key either
        parts.append(str(key))
    return ".".join(parts)


def _fields_at(section: type[Section], loc: Sequence[str | int]) -> list[str]:
    """Names of the keys allowed at a location of the recipe, or of the section that is parsed by itself."""
    found: list[type[Section]] = [section]
    for key in loc:
        tagged = [s for s in found if "type" in s.model_fields and s.model_fields["type"].default == key]
        inner = [
            part for s in found if key in s.model_fields for part in _sections_in(s.model_fields[str(key)].annotation)
        ]
        found = tagged or inner or found
    return [field.alias or name for name, field in found[0].model_fields.items()]


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in _sections_in(argument)]
