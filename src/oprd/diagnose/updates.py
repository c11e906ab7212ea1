"""Where a run was going, and how early it knew: its update W_t - W_0 from the kept checkpoints. After arXiv 2605.11739.

By weight matrix: norm, cosine with the last checkpoint's, share of energy in the top singular directions, cosine of the
dominant subspace with the last checkpoint's. And "go far early": an early checkpoint whose update is rescaled, matrix by matrix, to the final norm.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from oprd.config.reading import parse_recipe
from oprd.config.recipe import Recipe
from oprd.data.chat import stop_ids
from oprd.errors import ConfigError, RunFolderError
from oprd.evaluate.benchmarks import load_benchmarks
from oprd.evaluate.run import evaluate
from oprd.evaluate.verify import Verifier
from oprd.models import LanguageModel, load_student, load_tokenizer, read_shape
from oprd.progress import console, progress_bar
from oprd.rollout.hf import HFEngine
from oprd.train.checkpoint import complete_checkpoints, load_weights
from oprd.train.run_folder import write_atomically

RANK = 4
"""Singular directions that make the dominant subspace, fewer where a matrix has fewer [ours]."""
EARLY = 0.1
"""Share of the run after which the early checkpoint is taken [paper]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixUpdate:
    """The update of one weight matrix up to one checkpoint."""

    step: int
    block: int
    """From 1."""
    kind: str
    """`self_attn.q_proj`, `mlp.up_proj`, ..."""
    norm: float
    """Frobenius norm of W_t - W_0."""
    relative_norm: float
    """Divided by that of W_0."""
    cosine: float
    """With the last checkpoint's update, entry by entry: 1 throughout on a straight path."""
    top_energy: float
    """Share of the squared singular values in the RANK largest."""
    subspace_cosine: float
    """Mean cosine of the principal angles between its top RANK left singular vectors and the last checkpoint's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FarEarly:
    """Accuracies of "go far early" on one benchmark."""

    benchmark: str
    early_step: int
    final_step: int
    before: float
    early: float
    rescaled: float
    """Of the early checkpoint with its update rescaled per matrix to the final norm."""
    final: float
    along: tuple[tuple[float, float], ...]
    """(share of the final norm, accuracy) at other lengths of the early direction, where they were asked for [ours]."""

    @property
    def recovered(self) -> float | None:
        """Share of the final gain; None where there is none."""
        gain = self.final - self.before
        return (self.rescaled - self.before) / gain if gain > 0 else None


def diagnose_updates(run: Path, shares: Sequence[float] = ()) -> Path:
    """Write RUN/updates.json and return its path.

    The early update is scored at the final norm, and at these `shares` of it.
    Raises RunFolderError unless RUN is a run folder with at least two checkpoints, ConfigError for a share that is not
    positive.
    """
    if not all(share > 0 for share in shares):
        raise ConfigError(f"shares of the final norm must be positive, got {list(shares)}")
    recipe, found = _read_run(run)
    student = load_student(dataclasses.replace(recipe.student, lora=None))
    lm = LanguageModel(model=student, tokenizer=load_tokenizer(recipe.student.model, recipe.student.gguf_file), name="")
    start = {name: value.clone() for name, value in student.state_dict().items()}
    scale = recipe.student.lora.alpha / recipe.student.lora.r if recipe.student.lora is not None else None
    steps = [int(path.name.partition("-")[2]) for path in found]
    early = _early(steps)
    updates: dict[int, dict[str, Tensor]] = {}
    rows: list[MatrixUpdate] = []
    blocks = _block_matrices(lm)
    with progress_bar("singular values", len(found)) as bar:
        last = _update(found[-1], start, scale)
        bases = {name: _left(last[name]) for name in blocks if name in last}
        for step, path in zip(steps, found, strict=True):
            update = last if path == found[-1] else _update(path, start, scale)
            for name, (block, kind) in blocks.items():
                if name in update:
                    rows.append(_measure(step, block, kind, update[name], start[name], last[name], bases[name]))
            updates[step] = update if step in (early, steps[-1]) else {}
            bar.advance(1)
    scores = _far_early(recipe, lm, start, updates[early], updates[steps[-1]], (early, steps[-1]), shares)
    out = run / "updates.json"
    table = {
        "rank": RANK,
        "matrices": [dataclasses.asdict(row) for row in rows],
        "far_early": [dataclasses.asdict(score) | {"recovered": score.recovered} for score in scores],
    }
    write_atomically(out, json.dumps(table, indent=2) + "\n")
    return out


def _read_run(run: Path) -> tuple[Recipe, list[Path]]:
    if not (run / "recipe.yaml").is_file():
        raise RunFolderError(f"{run} is not a run folder: it has no recipe.yaml. Give the output_dir of a run")
    recipe = parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")))
    found = complete_checkpoints(run / "checkpoints")
    if len(found) < 2:
        raise RunFolderError(
            f"{run} keeps {len(found)} checkpoint(s); the path of a run needs several. Train with a larger "
            f"save_total_limit ({recipe.save_total_limit}) and smaller save_steps ({recipe.save_steps})"
        )
    return recipe, found


def _early(steps: Sequence[int]) -> int:
    """Of the checkpoints before the last the one nearest to EARLY of the way there."""
    early = min(steps[:-1], key=lambda step: abs(step - EARLY * steps[-1]))
    if early > 2 * EARLY * steps[-1]:
        console.print(
            f"[yellow]The checkpoint nearest to {EARLY:.0%} of the run is that of step {early} of {steps[-1]}, which is not "
            "early; keep more of them with a larger save_total_limit and smaller save_steps.[/]"
        )
    return early


def _update(checkpoint: Path, start: Mapping[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    """W_t - W_0 of every trained weight by its name in the student; of a LoRA student scale * B A, whose W_0 is none."""
    trained = load_weights(checkpoint)
    if scale is None:
        return {name: value.float() - start[name].float() for name, value in trained.items()}
    pairs = {name: value for name, value in trained.items() if ".lora_A." in name}
    return {
        _without_peft(name): scale * trained[name.replace(".lora_A.", ".lora_B.")].float() @ a.float()
        for name, a in pairs.items()
    }


def _without_peft(name: str) -> str:
    """`base_model.model.NAME.lora_A.default.weight` is the adapter of NAME.weight."""
    return name.removeprefix("base_model.model.").partition(".lora_A.")[0] + ".weight"


def _block_matrices(lm: LanguageModel) -> dict[str, tuple[int, str]]:
    """(block from 1, kind) of every matrix in the blocks, by its name in the model."""
    names = {id(parameter): name for name, parameter in lm.model.named_parameters()}
    return {
        names[id(parameter)]: (block, name.removesuffix(".weight"))
        for block, module in enumerate(lm.blocks, start=1)
        for name, parameter in module.named_parameters()
        if parameter.ndim == 2
    }


def _left(update: Tensor) -> Tensor:
    """Its top RANK left singular vectors [rows, RANK]."""
    return torch.linalg.svd(update, full_matrices=False).U[:, :RANK]


def _measure(
    step: int, block: int, kind: str, update: Tensor, start: Tensor, last: Tensor, base: Tensor
) -> MatrixUpdate:
    """`last` is the last checkpoint's update, `base` its top left singular vectors."""
    svd = torch.linalg.svd(update, full_matrices=False)
    energy = svd.S.double().square()
    norm = float(energy.sum().sqrt())
    return MatrixUpdate(
        step=step,
        block=block,
        kind=kind,
        norm=norm,
        relative_norm=norm / float(start.double().norm()),
        cosine=float(cosine_similarity(update.flatten().double(), last.flatten().double(), dim=0)),
        top_energy=float(energy[:RANK].sum() / energy.sum()) if norm > 0 else 0.0,
        subspace_cosine=float(torch.linalg.svdvals(svd.U[:, :RANK].T @ base).clamp(max=1).mean()),
    )


def rescaled(early: Mapping[str, Tensor], final: Mapping[str, Tensor], share: float = 1.0) -> dict[str, Tensor]:
    """The early update, each tensor with that share of the norm of the final one."""
    return {
        name: value * (share * final[name].norm() / value.norm()) if float(value.norm()) > 0 else value
        for name, value in early.items()
    }


def _far_early(
    recipe: Recipe,
    lm: LanguageModel,
    start: Mapping[str, Tensor],
    early: Mapping[str, Tensor],
    final: Mapping[str, Tensor],
    steps: tuple[int, int],
    shares: Sequence[float],
) -> list[FarEarly]:
    """Accuracies on the recipe's benchmarks; none if it has none."""
    config = recipe.evaluation
    if not config.benchmarks:
        console.print("The recipe has no benchmarks; go-far-early is not evaluated.")
        return []
    context = read_shape(recipe.student.model, recipe.student.gguf_file).context
    benchmarks = load_benchmarks(config, lm.tokenizer, context=context)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nn.Module.to(lm.model, device).eval()
    # the run's own batches: on one process the scores of start and end are those of its evaluations
    batches = recipe.rollout.max_sequences
    engine = HFEngine(lm, stop_ids(lm.tokenizer, lm.core.generation_config), max_sequences=batches)
    variants = {"before": {}, "early": early, "rescaled": rescaled(early, final), "final": final}
    shares = sorted(set(shares))
    along = {f"share {share}": rescaled(early, final, share) for share in shares}
    scores: dict[str, dict[str, float]] = {}
    with Verifier(timeout_s=config.verify_timeout_s) as verifier:
        for variant, update in (variants | along).items():
            # names that share a tensor (tied embeddings) get it twice, equal
            _put(lm, {name: value + update[name] if name in update else value for name, value in start.items()})
            for benchmark in benchmarks:
                with progress_bar(f"{variant} on {benchmark.name}", len(benchmark.prompts)) as bar:
                    result = evaluate(
                        engine, lm.tokenizer, benchmark, config, verifier, save_to=None, on_progress=bar.advance
                    )
                scores.setdefault(benchmark.name, {})[variant] = result.avg_at_k
    return [
        FarEarly(
            benchmark=name,
            early_step=steps[0],
            final_step=steps[1],
            **{variant: values[variant] for variant in variants},
            along=tuple(zip(shares, (values[variant] for variant in along), strict=True)),
        )
        for name, values in scores.items()
    ]


def _put(lm: LanguageModel, weights: dict[str, Any]) -> None:
    lm.model.load_state_dict(weights)
