"""The trained student as a folder that `AutoModelForCausalLM.from_pretrained` loads, with a card that says how it was made."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from oprd.evaluate.evaluate import Evaluation
from oprd.files import SUMS, checksums, replacing, write_atomically
from oprd.models.language_model import LanguageModel, is_peft
from oprd.models.pretrained import held_as
from oprd.recipe import Recipe, recipe_to_yaml
from oprd.train.setup import Parts

CARD = "README.md"


def save_student(parts: Parts) -> None:
    """Write weights (an adapter for a LoRA student), tokenizer, generation config, their checksums and a card. Called on every rank."""
    student = parts.method.student
    named = student.weights()
    if not parts.ranks.is_main:
        return
    lm = student.lm
    dtype = torch.bfloat16 if parts.recipe.bf16 and not is_peft(lm.model) else torch.float32
    lm.core.generation_config = generation_config(lm)
    with replacing(parts.folder.student) as folder:
        lm.model.save_pretrained(str(folder), state_dict=saved_weights(lm.core, named, dtype))
        lm.tokenizer.save_pretrained(folder)
        lm.core.generation_config.save_pretrained(folder)
        if not is_peft(lm.model):  # save_pretrained wrote the dtype of the weights in training
            config = copy.deepcopy(lm.core.config)
            config.dtype = dtype
            config.save_pretrained(folder)
        names = sorted(path.name for path in folder.iterdir() if path.name != CARD)
        (folder / SUMS).write_text("".join(checksums(folder, names)))
    write_card(parts, ())


def saved_weights(model: PreTrainedModel, named: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Each parameter as transformers holds it in a model of `dtype`, some of them in float32 always; buffers as they are.
    Tied weights stay one."""
    weights = dict[str, Tensor](named)
    for name, held in held_as(model, dtype).items():
        if name in weights:
            weights[name] = weights[name].to(held)
    for tied, source in model.all_tied_weights_keys.items():
        if tied in weights and source in weights:
            weights[tied] = weights[source]
    return weights


def generation_config(lm: LanguageModel) -> GenerationConfig:
    """The model's own, with the stop tokens of the run: what ended the completions it learned on ends those it writes from
    here on. Of one that contradicts itself, which transformers refuses to save, only the tokens are kept."""
    own = copy.deepcopy(lm.core.generation_config) or GenerationConfig()
    own.eos_token_id = list(lm.stop_ids)
    try:
        own.validate(strict=True)
    except ValueError:
        return GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=lm.pad_id)
    return own


def write_card(parts: Parts, evaluations: Sequence[Evaluation]) -> None:
    """Write the student's README.md, with what was measured."""
    card = model_card(parts.method.student.lm, parts.folder.path.name, parts.recipe, evaluations)
    write_atomically(parts.folder.student / CARD, card)


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
