"""The trained student as a folder that `AutoModelForCausalLM.from_pretrained` loads, with a card that says how it was made."""

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import GenerationConfig

from oprd.evaluate.evaluate import Evaluation
from oprd.files import write_atomically
from oprd.models.language_model import LanguageModel, is_peft
from oprd.recipe import Recipe, recipe_to_yaml
from oprd.train.setup import Parts

_STUDENT = "student."


def save_student(parts: Parts) -> None:
    """Write weights (an adapter for a LoRA student), tokenizer, generation config and a card. Called on every rank."""
    student, folder = parts.method.student, parts.folder.student
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=is_peft(student.lm.model))
    gathered = get_model_state_dict(student.wrapper, options=options)
    if not parts.ranks.is_main:
        return
    dtype = torch.bfloat16 if parts.recipe.bf16 else torch.float32
    weights = {
        name.removeprefix(_STUDENT): cast(torch.Tensor, value).to(dtype)
        for name, value in gathered.items()
        if name.startswith(_STUDENT)
    }
    student.lm.model.save_pretrained(str(folder), state_dict=weights)
    student.lm.tokenizer.save_pretrained(folder)
    # what ended the completions it learned on ends those it writes from here on
    generation = copy.deepcopy(student.lm.core.generation_config) or GenerationConfig()
    generation.eos_token_id = list(student.lm.stop_ids)
    generation.save_pretrained(folder)
    write_card(parts, ())


def write_card(parts: Parts, evaluations: Sequence[Evaluation]) -> None:
    """Write the student's README.md, with what was measured."""
    card = model_card(parts.method.student.lm, parts.folder.path.name, parts.recipe, evaluations)
    write_atomically(parts.folder.student / "README.md", card)


def model_card(lm: LanguageModel, name: str, recipe: Recipe, evaluations: Sequence[Evaluation]) -> str:
    """What the student is, its measured numbers, and the recipe that made it."""
    rows = [
        f"| {e.benchmark} | {e.avg_at_k:.3f} [{e.avg_at_k_low:.3f}, {e.avg_at_k_high:.3f}] | {e.samples} | {e.problems} "
        f"| {e.mean_length:.0f} |"
        for e in evaluations
    ]
    table = "\n".join(
        ["| benchmark | avg@k (95% interval) | k | problems | mean length, tokens |", "|---|---|---|---|---|", *rows]
    )
    measured = table if rows else "No benchmark was run."
    return (
        f"---\nlibrary_name: {'peft' if is_peft(lm.model) else 'transformers'}\nbase_model: {lm.name}\n"
        "tags: [distillation, on-policy-distillation, oprd]\n---\n\n"
        f"# {name}\n\n`{lm.name}` distilled on its own completions with oprd.\n\n"
        f"## Measured\n\n{measured}\n\n## Recipe\n\n```yaml\n{recipe_to_yaml(recipe)}```\n"
    )
