"""How straight the plain runs of effopd.py were, and how early they knew where to go: `python benchmarks/updates.py ARM ...`.

Each arm must have been trained on this machine by effopd.py, whose run folder keeps a checkpoint every 8 steps. What
`oprd diagnose updates` finds goes, as means over weight matrices, to benchmarks/results/updates.json; the figure has the
accuracy along the early direction as well.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from chart import COLOURS, Chart, write_charts
from effopd import RUNS
from oprd.diagnose.updates import diagnose_updates
from oprd.train.run_folder import describe_machine, write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "updates.json"
FIGURE = ROOT / "docs" / "updates.svg"
SHARES = (0.2, 0.4, 0.6, 0.8)
MEASURES = {
    "cosine": "cosine with the final update",
    "subspace_cosine": "cosine of the top 4 directions",
    "top_energy": "energy in the top 4 directions",
}


def measure(folder: Path) -> dict[str, Any]:
    """By checkpoint, the mean over matrices of every measure; and "go far early"."""
    table = json.loads(diagnose_updates(folder, SHARES).read_text(encoding="utf-8"))
    steps = sorted({row["step"] for row in table["matrices"]})
    at = {step: [row for row in table["matrices"] if row["step"] == step] for step in steps}
    return {
        "step": steps,
        **{key: [round(sum(row[key] for row in at[s]) / len(at[s]), 4) for s in steps] for key in MEASURES},
        "norm": [round(sum(row["norm"] ** 2 for row in at[s]) ** 0.5, 4) for s in steps],
        "far_early": table["far_early"][0],
    }


def draw(arms: dict[str, dict[str, Any]]) -> None:
    """Each measure against the step, mean over seeds: a line for each objective and rate."""
    settings = sorted({name.rsplit("-", 3)[0] for name in arms})
    row = [along(arms, settings)]
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


def along(arms: dict[str, dict[str, Any]], settings: list[str]) -> Chart:
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
