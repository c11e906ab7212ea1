"""Why the bridge compares in the student's space: `python benchmarks/bridge_why.py`, some minutes of a core.

On the miniature before training, on its completions of held-out problems, and with the bridges of `bridge.py`:

- `gradient_cosine`: of each objective's gradient on the blocks' weights with that of the exact reverse KL to `teacher`, the
  student's twin with its tokenizer. A bridge to the wide teacher never sees that one.
- `target`: what the student's LM head predicts at the target states. Of the tokens behind right prefixes, where there is one
  right next token, the share that the head would get wrong: greedily, and sampled.

What benchmarks/results/bridge_why.json has already is not measured again. Its entries with `linear`, `all rows`, `not
sharpened`, and those of 512 features without `sharpened`, are of options that are gone; they were made at 7ba54df.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge import ARMS, LAST_BLOCK, OUT, PUBLISHED, recipe_tree, write_problems
from oprd.data.batching import split_by_tokens
from oprd.demo.run import HELD_OUT_PROBLEMS, MODELS
from oprd.demo.task import completion, sums
from oprd.models.generate import Sampling
from oprd.objectives.oprd_bridge import OPRDBridge
from oprd.recipe import parse_recipe
from oprd.train.fit_bridge import fit_bridge
from oprd.train.run_folder import describe_machine
from oprd.train.setup import Parts, setup
from oprd.types import Rollouts

RESULT = Path(__file__).parent / "results" / "bridge_why.json"
OPRD = {"type": "oprd", "tokens": "all"}


def at_step_0(objective: dict[str, Any] | None = None, **bridge: Any) -> Parts:
    """A run before its first step: `objective` with the twin, or a bridge to the wide teacher, fitted if it is not there."""
    tree = recipe_tree("why", {"bridge": bridge}, 0)
    if objective is None and not Path(tree["objective"]["bridge"]).exists():
        fit_bridge(parse_recipe(tree))
    tree |= {"data": {"prompts": str(OUT / "held_out.jsonl")}, "output_dir": str(OUT / "why")}
    if objective is not None:
        tree |= {"objective": objective, "teacher": tree["teacher"] | {"model": str(MODELS / "teacher")}}
    return setup(parse_recipe(tree))


def completions(parts: Parts) -> list[Rollouts]:
    """Micro-batches; the same for every run: same weights, same seed."""
    sampling = Sampling(temperature=1.0, max_new_tokens=80, samples=2)
    with parts.engine.session():
        rollouts = parts.method.teacher.annotate(parts.engine.generate(parts.prompts, sampling, seed=0))
    return split_by_tokens(rollouts, parts.recipe.micro_batch_tokens)


def gradient(parts: Parts) -> Tensor:
    """The objective's gradient on the blocks' weights, of length 1."""
    student, (objective,) = parts.method.student, parts.method.student.objectives
    for micro in completions(parts):
        (values,) = student.losses(parts.method.batch(micro), parts.method.targets(micro))
        (values * objective.weights(micro)).sum().backward()
    found = torch.cat([weight.grad.flatten() for weight in student.lm.blocks.parameters()])
    return found / found.norm()


@torch.no_grad()
def wrong_next_tokens(parts: Parts) -> dict[str, float]:
    (objective,) = parts.method.student.objectives
    assert isinstance(objective, OPRDBridge)
    (spec,) = objective.student_taps.hidden
    right = {p.problem: completion(p) for p in sums(HELD_OUT_PROBLEMS, seed=2, held_out=True)}
    counts = torch.zeros(5, dtype=torch.float64)
    for micro in completions(parts):
        targets = parts.method.targets(micro)
        assert targets.reference is not None
        assert targets.reference.head is not None
        (edited,) = objective.target_states(parts.method.batch(micro), targets)
        wanted = torch.tensor([t for i in range(len(micro)) for t in next_tokens(parts, micro, i, right)])
        known = wanted >= 0
        counts[0] += int(known.sum())
        for i, states in enumerate((targets.reference.hidden[spec], edited)):
            logprobs = (states[known] @ targets.reference.head.weight.T).log_softmax(-1)
            counts[1 + 2 * i] += int((logprobs.argmax(-1) != wanted[known]).sum())
            counts[2 + 2 * i] += float((1 - logprobs.gather(1, wanted[known][:, None]).exp()).sum())
    names = ("student_greedy", "student_sampled", "target_greedy", "target_sampled")
    return {name: round(float(count / counts[0]), 5) for name, count in zip(names, counts[1:], strict=True)}


def next_tokens(parts: Parts, micro: Rollouts, row: int, right: dict[str, str]) -> list[int]:
    """The right token after each of the completion's, -1 after its first mistake and at its end."""
    lm = parts.method.student.lm
    wanted = [*lm.tokenizer(right[micro.prompts[row].messages[-1].content])["input_ids"], lm.tokenizer.eos_token_id, -1]
    ids = micro.completion_ids[row]
    same = next(
        (i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), min(len(ids), len(wanted) - 1)
    )
    return [*wanted[1 : same + 1], *[-1] * (len(ids) - same)]


def main() -> None:
    write_problems()
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {"gradient_cosine": {}, "target": {}}
    cosine, target = known["gradient_cosine"], known["target"]
    bridges = {
        "projections, all blocks [paper]": PUBLISHED,
        "projections, last block": LAST_BLOCK,
        "student's space, last block": ARMS["full"]["bridge"],
        "student's space, last block, rank auto": ARMS["auto"]["bridge"],
        "student's space, last block, through the head": ARMS["full_reverse_kl"]["bridge"],
        "student's space, last block, through the head, rank auto": ARMS["auto_reverse_kl"]["bridge"],
    }
    twins = {"oprd to the twin, all blocks": OPRD, "oprd to the twin, last block": OPRD | {"layers": "last"}}
    missing = [name for name in (*twins, *bridges) if name not in cosine]
    reference = gradient(at_step_0({"type": "opd"})) if missing else None
    for name in missing:
        parts = at_step_0(twins[name]) if name in twins else at_step_0(**bridges[name])
        cosine[name] = round(float(gradient(parts) @ reference), 4)
    for rank in ("full", "auto", 2, 8, 32):
        name = f"512 features, sure rows, sharpened, rank {rank}"
        if name not in target:
            target[name] = wrong_next_tokens(at_step_0(rank=rank))
    result = {"gradient_cosine": cosine, "target": target, **describe_machine()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("gradient_cosine", "target")}, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
