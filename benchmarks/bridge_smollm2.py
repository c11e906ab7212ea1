"""The bridge's fit on real text: the miniature answers real problems, SmolLM2-135M-Instruct reads its completions.

    python scripts/export_smollm2.py runs/smollm2
    python benchmarks/bridge_smollm2.py PROBLEMS.jsonl

PROBLEMS.jsonl has a column `problem` or `prompt`; problems that fit the miniature's context are used. Writes the held-out
curves to benchmarks/results/bridge_smollm2.json and draws them in docs/bridge_smollm2.svg; without PROBLEMS.jsonl it draws
the results that are there.
"""

import json
import sys
import time
from pathlib import Path

import torch

from chart import COLOURS, Chart, write_charts
from oprd.recipe import load_recipe
from oprd.train.fit_bridge import fit_bridge
from oprd.train.run_folder import describe_machine

ROOT = Path(__file__).parents[1]
OUT = ROOT / "runs" / "bridge_smollm2"
RESULT = ROOT / "benchmarks" / "results" / "bridge_smollm2.json"
FIGURE = ROOT / "docs" / "bridge_smollm2.svg"
LONGEST, COUNT = 160, 400


def main(problems: Path) -> None:
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in problems.read_text(encoding="utf-8").splitlines()]
    texts = [str(row.get("problem") or row.get("prompt")) for row in rows]
    short = [text for text in texts if len(text.encode()) <= LONGEST][:COUNT]
    (OUT / "prompts.jsonl").write_text(
        "".join(json.dumps({"problem": text}) + "\n" for text in short), encoding="utf-8"
    )
    recipe = load_recipe(ROOT / "recipes" / "bridge_smollm2.yaml")
    start = time.perf_counter()
    _, curves = fit_bridge(recipe)
    seconds = round(time.perf_counter() - start, 1)
    RESULT.parent.mkdir(exist_ok=True)
    result = {"prompts": len(short), "seconds": seconds, "blocks": curves}
    RESULT.write_text(json.dumps({"result": result, **describe_machine()}) + "\n")
    ranks = {block: curve["auto_rank"] for block, curve in curves.items()}
    print(f"{len(short)} prompts, {seconds} s; automatic ranks by block {ranks}")


def draw() -> None:
    """Held-out mean cosine and squared canonical correlation against rank."""
    blocks = json.loads(RESULT.read_text(encoding="utf-8"))["result"]["blocks"]
    named = {f"block {block} to {curve['teacher_block']}": curve for block, curve in blocks.items()}
    colours = dict(zip(named, COLOURS, strict=False))
    charts = [
        Chart(
            title=title,
            x_label="rank",
            lines={name: (range(1, len(curve[key]) + 1), curve[key]) for name, curve in named.items()},
            colours=colours,
            low=0.0,
            high=1.0,
            names_at=names_at,
        )
        for title, key, names_at in (
            ("held-out mean cosine", "cosine", "bottom"),
            ("held-out squared correlation", "canonical", "top"),
        )
    ]
    write_charts([charts], FIGURE)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    draw()
