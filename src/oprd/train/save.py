"""The trained student as a folder that `AutoModelForCausalLM.from_pretrained` loads, with a card that says how it came to be."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from oprd.bridge.file import weights_fingerprint
from oprd.config.reading import recipe_to_yaml
from oprd.evaluate.run import Evaluation
from oprd.models import is_peft
from oprd.objectives.bridge import Bridge
from oprd.train.build import Run

_STUDENT = "student."


def save_student(run: Run, evaluations: Sequence[Evaluation]) -> None:
    """Write weights (an adapter for a LoRA student), tokenizer, generation config and card. Called on every process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=is_peft(run.lm.model))
    gathered = get_model_state_dict(run.stage.model, options=options)
    if not run.accelerator.is_main_process:
        return
    tensors = {name: cast(torch.Tensor, value) for name, value in gathered.items()}
    weights = {name.removeprefix(_STUDENT): x for name, x in tensors.items() if name.startswith(_STUDENT)}
    dtype = torch.bfloat16 if run.recipe.bf16 else torch.float32
    run.lm.model.save_pretrained(
        run.folder.student, state_dict={name: value.to(dtype) for name, value in weights.items()}
    )
    for bridge in (objective for objective in run.stage.objectives if isinstance(objective, Bridge)):
        if bridge.config.trainable or bridge.config.refit_every is not None:
            _bridge_beside(run, bridge, tensors)
    run.lm.tokenizer.save_pretrained(run.folder.student)
    run.lm.core.generation_config.save_pretrained(run.folder.student)
    (run.folder.student / "README.md").write_text(model_card(run, evaluations), encoding="utf-8")


def _bridge_beside(run: Run, bridge: Bridge, tensors: Mapping[str, torch.Tensor]) -> None:
    """Projections that moved during training, as a file for the student as it is now."""
    number = [id(objective) for objective in run.stage.objectives if isinstance(objective, nn.Module)].index(id(bridge))
    prefix = f"modules_of_objectives.{number}."
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    trained = {
        name: tensors[_STUDENT + name] for name, _ in run.lm.model.named_parameters() if _STUDENT + name in tensors
    }
    fingerprint = weights_fingerprint(run.lm, trained)
    bridge.as_trained(own, fingerprint).save(run.folder.path / "bridge.safetensors")


def model_card(run: Run, evaluations: Sequence[Evaluation]) -> str:
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
        f"---\nlibrary_name: {'peft' if is_peft(run.lm.model) else 'transformers'}\nbase_model: {run.lm.name}\n"
        "tags: [distillation, on-policy-distillation, oprd]\n---\n\n"
        f"# {run.folder.path.name}\n\n`{run.lm.name}` distilled on its own completions with oprd.\n\n"
        f"## Measured\n\n{measured}\n\n## Recipe\n\n```yaml\n{recipe_to_yaml(run.recipe)}```\n"
    )
