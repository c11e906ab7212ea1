"""Why the bridge compares in the student's space: `python benchmarks/bridge_why.py`, ten minutes of a core.

What benchmarks/results/bridge_why.json has already is not measured again.

On the miniature at the start of training, on its completions of held-out problems, and with the bridges of `bridge.py`:

- `gradient_cosine`: of each objective's gradient on the blocks' weights with that of the exact reverse KL to `teacher`, the
  student's twin with its tokenizer. A bridge to the wide teacher never sees that one.
- `target`: what the student's LM head says at the target states. Of the tokens behind right prefixes, where there is one right
  next token, the share that the head would get wrong: greedily, and sampled.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge import ARMS, AS_PUBLISHED, FIT_PROMPTS, NOT_SHARPENED, OUT, PUBLISHED, recipe_tree
from oprd.config.reading import parse_recipe
from oprd.data.collate import split_by_tokens
from oprd.demo.run import HELD_OUT_PROBLEMS, MODELS, TRAINING_PROBLEMS
from oprd.demo.task import completion, sums, write_jsonl
from oprd.models import read_states
from oprd.objectives.bridge import Bridge
from oprd.rollout.base import Sampling
from oprd.train.build import Run, build
from oprd.train.fit_bridge import fit_bridge
from oprd.train.run_folder import describe_machine
from oprd.train.update import student_batch, teacher_targets
from oprd.types import HiddenTargets, PromptBatch, Rollouts

RESULT = Path(__file__).parent / "results" / "bridge_why.json"
TWIN = {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"}


def ready(objective: dict[str, Any] | None, teacher: dict[str, Any] | None = None, **bridge: Any) -> Run:
    """A run at step 0: `objective` of the twin, or a bridge to the wide teacher, fitted if it is not there yet."""
    tree = recipe_tree("why", {"bridge": bridge} if objective is None else {}, 0)
    if objective is None and not Path(tree["objective"]["bridge"]).exists():
        fit_bridge(parse_recipe(tree))
    tree |= {"data": {"prompts": str(OUT / "held_out.jsonl")}, "output_dir": str(OUT / "why")}
    if objective is not None:
        tree |= {"objective": objective, "teacher": teacher or TWIN}
    return build(parse_recipe(tree))


def completions(run: Run) -> Rollouts:
    """The same ones for every run: same weights, same seed."""
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=80, samples=2)
    return run.teacher.prepare(run.engine.generate(PromptBatch(prompts=run.prompts), sampling, seed=0))


def gradient(run: Run) -> Tensor:
    rollouts, (objective,) = completions(run), run.stage.objectives
    for micro in split_by_tokens(rollouts, run.recipe.micro_batch_tokens):
        targets = teacher_targets(run, micro)
        (values,) = run.stage.model(student_batch(run, micro), targets)
        (values.sum() / objective.divisor(rollouts)).backward()
    found = torch.cat([weight.grad.flatten() for weight in run.lm.core.model.layers.parameters()])
    return found / found.norm()


@torch.no_grad()
def wrong_next_tokens(run: Run) -> dict[str, float]:
    (objective,) = run.stage.objectives
    assert isinstance(objective, Bridge)
    right = {p.problem: completion(p) for p in sums(HELD_OUT_PROBLEMS, seed=2, held_out=True)}
    counts = torch.zeros(5, dtype=torch.float64)
    for micro in split_by_tokens(completions(run), run.recipe.micro_batch_tokens):
        targets = teacher_targets(run, micro)
        assert isinstance(targets, HiddenTargets)
        batch = student_batch(run, micro)
        states = read_states(run.lm, batch, objective.readings, head=True)
        (ours,), (edited,) = objective.readings, objective.wanted(batch, targets)
        wanted = torch.tensor([t for i in range(len(micro)) for t in next_tokens(run, micro, i, right)])
        known = wanted >= 0
        assert states.head is not None
        logprobs = [(h[known] @ states.head.weight.T).log_softmax(-1) for h in (targets.hidden[ours], edited)]
        counts[0] += int(known.sum())
        for i, rows in enumerate(logprobs):
            counts[1 + 2 * i] += int((rows.argmax(-1) != wanted[known]).sum())
            counts[2 + 2 * i] += float((1 - rows.gather(1, wanted[known][:, None]).exp()).sum())
    names = ("student_greedy", "student_sampled", "target_greedy", "target_sampled")
    return {name: round(float(count / counts[0]), 5) for name, count in zip(names, counts[1:], strict=True)}


def next_tokens(run: Run, micro: Rollouts, row: int, right: dict[str, str]) -> list[int]:
    """The right token after each of the completion's, -1 after its first mistake and at its end."""
    tokenizer = run.lm.tokenizer
    wanted = [*tokenizer(right[micro.prompts[row].messages[-1].content])["input_ids"], tokenizer.eos_token_id, -1]
    ids = micro.completion_ids[row]
    same = next(
        (i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), min(len(ids), len(wanted) - 1)
    )
    return [*wanted[1 : same + 1], *[-1] * (len(ids) - same)]


def main() -> None:
    write_jsonl(OUT / "train.jsonl", sums(TRAINING_PROBLEMS, seed=1, held_out=False))
    write_jsonl(OUT / "held_out.jsonl", sums(HELD_OUT_PROBLEMS, seed=2, held_out=True))
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {"gradient_cosine": {}, "target": {}}
    cosine, target = known["gradient_cosine"], known["target"]
    everywhere = {"rank": "full", "layers": "all", "fit": AS_PUBLISHED} | NOT_SHARPENED
    bridges = {
        "projections, all blocks [paper]": PUBLISHED,
        "projections, last block": PUBLISHED | {"layers": "last"},
        "student's space, all blocks, linear, all rows": everywhere,
        "student's space, last block, linear, all rows": everywhere | {"layers": "last"},
        "student's space, last block, not sharpened": ARMS["full_not_sharpened"]["bridge"],
        "student's space, last block": ARMS["full"]["bridge"],
        "student's space, last block, rank auto": ARMS["auto"]["bridge"],
        "student's space, last block, through the head": ARMS["full_reverse_kl"]["bridge"],
        "student's space, last block, through the head, rank auto": ARMS["auto_reverse_kl"]["bridge"],
    }
    oprd = {"type": "oprd", "tokens": "all"}
    twins = {"oprd to the twin, all blocks": oprd, "oprd to the twin, last block": oprd | {"layers": "last"}}
    missing = [name for name in (*twins, *bridges) if name not in cosine]
    reference = gradient(ready({"type": "opd"})) if missing else None
    for name in missing:
        run = ready(twins[name]) if name in twins else ready(None, **bridges[name])
        cosine[name] = round(float(gradient(run) @ reference), 4)
    fits = {
        "linear, all rows": AS_PUBLISHED,
        "512 features, all rows": {"limit": FIT_PROMPTS, "confidence": 0.0},
        "linear, sure rows": {"limit": FIT_PROMPTS, "features": 0},
        "512 features, sure rows": {"limit": FIT_PROMPTS},
    }
    targets = {
        f"{name}, rank {rank}": {"rank": rank, "fit": fit} | NOT_SHARPENED
        for name, fit in fits.items()
        for rank in ("full", 8, 32)
    }
    targets |= {
        f"512 features, sure rows, sharpened, rank {rank}": {"rank": rank} for rank in ("full", "auto", 2, 8, 32)
    }
    for name, bridge in targets.items():
        if name not in target:
            target[name] = wrong_next_tokens(ready(None, **bridge))
    result = {"gradient_cosine": cosine, "target": target, **describe_machine()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("gradient_cosine", "target")}, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
