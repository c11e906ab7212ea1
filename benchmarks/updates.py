"""How straight the plain runs of effopd.py were, and how early they knew where to go: `python benchmarks/updates.py ARM ...`.

Each arm must have been trained on this machine by effopd.py, whose run folder keeps a checkpoint every 8 steps. Of every
checkpoint's update W_t - W_0, by weight matrix: norm, cosine with the last checkpoint's, share of energy in the top singular
directions, cosine of the dominant subspace with the last checkpoint's. And "go far early" (arXiv:2605.11739): the accuracy
of an early checkpoint whose update is rescaled, matrix by matrix, to the final norm. Means over matrices go to
benchmarks/results/updates.json; the figure is docs/updates.svg.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from chart import COLOURS, Chart, write_charts
from effopd import RUNS
from oprd.evaluate.benchmarks import load_benchmarks
from oprd.evaluate.evaluate import Evaluator
from oprd.files import write_atomically
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.models.loading import ModelFacts, load_student
from oprd.recipe import Recipe, load_recipe
from oprd.rollout.hf import HFEngine
from oprd.train.checkpoint import checkpoints, load_weights
from oprd.train.run_folder import describe_machine
from oprd.verify.pool import VerifierPool

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "updates.json"
FIGURE = ROOT / "docs" / "updates.svg"
RANK = 4
"""Singular directions that make the dominant subspace."""
EARLY = 0.1
"""Share of the run after which the early checkpoint is taken; the paper's."""
SHARES = (0.2, 0.4, 0.6, 0.8)
"""Of the final norm, at which the early update is scored too."""
MEASURES = {
    "cosine": "cosine with the final update",
    "subspace_cosine": f"cosine of the top {RANK} directions",
    "top_energy": f"energy in the top {RANK} directions",
}


def measure(folder: Path) -> dict[str, Any]:
    """By checkpoint, the mean over matrices of every measure; and "go far early"."""
    recipe, saved = load_recipe(folder / "recipe.yaml"), checkpoints(folder / "checkpoints")
    facts = ModelFacts.read(recipe.student.model)
    student = load_student(recipe.student.model_copy(update={"lora": None}))
    lm = LanguageModel(model=student, tokenizer=facts.tokenizer, name=recipe.student.model)
    start = {name: value.clone() for name, value in student.state_dict().items()}
    scale = recipe.student.lora.alpha / recipe.student.lora.r if recipe.student.lora is not None else None
    steps = [int(path.name.partition("-")[2]) for path in saved]
    early = min(steps[:-1], key=lambda step: abs(step - EARLY * steps[-1]))
    updates = {step: update_of(path, start, scale) for step, path in zip(steps, saved, strict=True)}
    final = updates[steps[-1]]
    matrices = [name for name in block_matrices(lm) if name in final]
    bases = {name: left_vectors(final[name]) for name in matrices}
    rows = [[compare(updates[step][name], final[name], bases[name]) for name in matrices] for step in steps]
    return {
        "step": steps,
        **{key: [round(sum(row[key] for row in at) / len(at), 4) for at in rows] for key in MEASURES},
        "norm": [round(sum(row["norm"] ** 2 for row in at) ** 0.5, 4) for at in rows],
        "far_early": far_early(recipe, facts, lm, start, updates[early], final) | {"early_step": early},
    }


def update_of(checkpoint: Path, start: Mapping[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    """W_t - W_0 of every trained weight by its name in the student; of a LoRA student, scale * B A."""
    trained = load_weights(checkpoint)
    if scale is None:
        return {name: value.float() - start[name].float() for name, value in trained.items()}
    return {
        # `base_model.model.NAME.lora_A.default.weight` is the adapter of NAME.weight
        name.removeprefix("base_model.model.").partition(".lora_A.")[0] + ".weight": scale
        * trained[name.replace(".lora_A.", ".lora_B.")].float()
        @ a.float()
        for name, a in trained.items()
        if ".lora_A." in name
    }


def block_matrices(lm: LanguageModel) -> list[str]:
    """Names of all matrices in the blocks."""
    names = {id(parameter): name for name, parameter in lm.model.named_parameters()}
    return [names[id(parameter)] for block in lm.blocks for parameter in block.parameters() if parameter.ndim == 2]


def left_vectors(update: Tensor) -> Tensor:
    """Its top RANK left singular vectors [rows, RANK]."""
    return torch.linalg.svd(update, full_matrices=False).U[:, :RANK]


def compare(update: Tensor, final: Tensor, base: Tensor) -> dict[str, float]:
    """One matrix of one checkpoint. `base`: the final update's top left singular vectors."""
    svd = torch.linalg.svd(update, full_matrices=False)
    energy = svd.S.double().square()
    total = float(energy.sum())
    return {
        "norm": total**0.5,
        "cosine": float(cosine_similarity(update.flatten().double(), final.flatten().double(), dim=0)),
        "top_energy": float(energy[:RANK].sum()) / total if total > 0 else 0.0,
        "subspace_cosine": float(torch.linalg.svdvals(svd.U[:, :RANK].T @ base).clamp(max=1).mean()),
    }


def rescaled(early: Mapping[str, Tensor], final: Mapping[str, Tensor], share: float = 1.0) -> dict[str, Tensor]:
    """The early update, each tensor with that share of the norm of the final one."""
    return {
        name: value * (share * final[name].norm() / value.norm()) if float(value.norm()) > 0 else value
        for name, value in early.items()
    }


def far_early(
    recipe: Recipe,
    facts: ModelFacts,
    lm: LanguageModel,
    start: Mapping[str, Tensor],
    early: Mapping[str, Tensor],
    final: Mapping[str, Tensor],
) -> dict[str, Any]:
    """avg@k before, at the early checkpoint, along its direction, at the final norm, and at the end."""
    variants = {"before": {}, "early": early, "rescaled": rescaled(early, final), "final": final}
    along = {share: rescaled(early, final, share) for share in SHARES}
    scores: dict[Any, float] = {}
    cache = recipe.rollout.engine.cache_tokens  # as in training: the scores of start and end are those of the run
    (benchmark,) = load_benchmarks(recipe.evaluation, facts.tokenizer, context=facts.context)
    with VerifierPool() as verifier:
        evaluator = Evaluator(
            config=recipe.evaluation,
            benchmarks=(benchmark,),
            engine=HFEngine(FrozenModel(lm), cache_tokens=cache),
            tokenizer=facts.tokenizer,
            verifier=verifier,
        )
        for name, update in (variants | along).items():
            # names that share a tensor (tied embeddings) get it twice, equal
            weights = {key: value + update[key] if key in update else value for key, value in start.items()}
            lm.model.load_state_dict(weights)
            scores[name] = evaluator.evaluate(benchmark).avg_at_k
    gain = scores["final"] - scores["before"]
    return {name: scores[name] for name in variants} | {
        "along": [(share, scores[share]) for share in SHARES],
        "recovered": (scores["rescaled"] - scores["before"]) / gain if gain > 0 else None,
    }


def draw(arms: dict[str, dict[str, Any]]) -> None:
    """Each measure against the step, mean over seeds: a line for each objective and rate."""
    settings = sorted({name.rsplit("-", 3)[0] for name in arms})
    row = [draw_along(arms, settings)]
    for key, title in MEASURES.items():
        lines = {}
        for setting in settings:
            found = [arm for name, arm in arms.items() if name.rsplit("-", 3)[0] == setting]
            steps = [step for step in found[0]["step"] if all(step in arm["step"] for arm in found)]
            at = [[arm[key][arm["step"].index(step)] for arm in found] for step in steps]
            lines[f"{setting} ({len(found)})"] = steps, [sum(values) / len(found) for values in at]
        colours = dict(zip(lines, COLOURS, strict=False))
        row.append(Chart(title=title, x_label="step", lines=lines, colours=colours, low=0.0, high=1.0))
    write_charts([row], FIGURE)


def draw_along(arms: dict[str, dict[str, Any]], settings: Sequence[str]) -> Chart:
    """Accuracy gained at each share of the final norm, of what the run gained at its end: mean over seeds of both."""
    lines = {}
    for setting in settings:
        found = [arm["far_early"] for name, arm in arms.items() if name.rsplit("-", 3)[0] == setting]
        gain = sum(score["final"] - score["before"] for score in found)
        at = [
            sum([*dict(score["along"]).values(), score["rescaled"]][i] - score["before"] for score in found)
            for i in range(len(SHARES) + 1)
        ]
        lines[f"{setting} ({len(found)})"] = (0.0, *SHARES, 1.0), [0.0, *(value / gain for value in at)]
    colours = dict(zip(lines, COLOURS, strict=False)) | {"paper: 0.8": "#999", "start: 0": "#ccc"}
    lines |= {"paper: 0.8": ((0.0, 1.0), (0.8, 0.8)), "start: 0": ((0.0, 1.0), (0.0, 0.0))}
    low = math.floor(min(min(y) for _, y in lines.values()))
    title = "share of the gain, from 10% of the run"
    return Chart(title=title, x_label="share of the final norm", lines=lines, colours=colours, low=low, high=1.0)


def main(names: list[str]) -> None:
    if not names:
        sys.exit("name at least one arm that effopd.py trained, such as oprd-2.5e-5-64-plain-0")
    torch.set_num_threads(1)
    arms = json.loads(RESULTS.read_text())["arms"] if RESULTS.is_file() else {}
    for name in names:
        arms[name] = measure(RUNS / name)
        write_atomically(RESULTS, json.dumps({"arms": arms, "machine": describe_machine()}) + "\n")
        draw(arms)
        print(name, arms[name]["far_early"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
