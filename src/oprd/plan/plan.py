"""`oprd plan`: whether a recipe fits a device, what would help, and the least time that its steps take."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from oprd.distributed import Ranks
from oprd.errors import ConfigError, OprdError
from oprd.plan.simulate import GRADIENTS, OPTIMIZER, WEIGHTS, Simulated, alone, simulate
from oprd.recipe import Recipe, apply_override, parse_recipe, recipe_to_dict
from oprd.student import InitialStudent
from oprd.train.pair import Given
from oprd.train.setup import Checked, check

ENGINE, GATHERED = "rollout engine", "gathered weights"
GB = 1e9
CHANGES = (
    ("micro_batch_tokens={longest}", "one completion per micro-batch"),
    ("student.gradient_checkpointing=true", "about a third more compute"),
    ("rollout.engine.cache_tokens={longest}", "completions are written one at a time"),
    ("teacher.dtype=bfloat16", "the teacher in bfloat16"),
    ("bf16=true", "the student computes in bfloat16"),
    ("student.lora={r: 16}", "adapters alone are trained"),
)
"""What may make a run smaller, the cheapest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A row of devices.yaml."""

    name: str
    memory_gb: float
    bfloat16: float = math.nan
    """TFLOP/s, dense."""
    float32: float = math.nan
    bandwidth: float = math.nan
    """GB/s."""
    reserved_gb: float = 1.5
    """For its context, the libraries' workspaces and gaps between tensors."""


def find_device(name: str) -> Device:
    """A device of the table, or one of so many GB. Raises ConfigError naming the table's."""
    table = yaml.safe_load((Path(__file__).parent / "devices.yaml").read_text("utf-8"))
    if name.lower() in table:
        return Device(name=name.lower(), **table[name.lower()])
    try:
        return Device(name=f"{float(name):g} GB", memory_gb=float(name))
    except ValueError:
        raise ConfigError(f"no device {name!r}; known are {', '.join(table)}, or give its memory in GB") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a run is to go: one of so many processes, each on such a device, weights sharded over them or not."""

    device: Device
    processes: int = 1
    sharded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one process holds and computes in a step whose completions are all as long as allowed."""

    place: Place
    parts: dict[str, Counter[str]]
    """Bytes by part when `rollout` and `update` hold most."""
    seconds: dict[str, float]
    """The least that rollout, teacher and update take."""
    simulated: Simulated

    @property
    def peak_gb(self) -> float:
        return max(parts.total() for parts in self.parts.values()) / GB

    @property
    def fits(self) -> bool:
        return self.peak_gb + self.place.device.reserved_gb <= self.place.device.memory_gb


def plan_recipe(recipe: Recipe, place: Place, given: Given | None = None) -> Plan:
    """Reads configs, tokenizers and prompts, no weights. Raises an OprdError for what training refuses before it loads."""
    # every device of the table computes in bfloat16
    recipe = recipe.model_copy(update={"bf16": recipe.bf16 is not False})
    with alone(bf16=recipe.bf16 is True) as accelerator:
        ranks = Ranks(accelerator)
        ranks.device, ranks.sharded = torch.device("cuda"), place.sharded
        checked = check(recipe, given or Given(), ranks, InitialStudent())
    return plan_checked(recipe, checked, place)


def plan_checked(recipe: Recipe, checked: Checked, place: Place) -> Plan:
    """The plan of a recipe whose `bf16` is true or false."""
    # what compiled code and 8-bit optimizers do needs tensors with content
    student = recipe.student.model_copy(update={"torch_compile": False})
    plain = recipe.model_copy(update={"optim": "adamw_torch", "student": student})
    simulated = simulate(plain, checked, place.processes, buckets=place.processes > 1 and not place.sharded)
    parts = {"rollout": Counter(simulated.rollout), "update": Counter(simulated.update)}
    for held in parts.values() if recipe.optim == "adamw_8bit" else ():
        held[OPTIMIZER] //= 4
    for held in parts.values() if place.sharded else ():
        for name in (WEIGHTS, GRADIENTS, OPTIMIZER):
            held[name] //= place.processes
        held[GATHERED] = 2 * simulated.gathered  # the next block is fetched while one computes
    parts["rollout"][ENGINE] = round(recipe.rollout.engine.device_share * place.device.memory_gb * GB)
    return Plan(place=place, parts=parts, seconds=_least_seconds(recipe, simulated, place.device), simulated=simulated)


def _least_seconds(recipe: Recipe, simulated: Simulated, device: Device) -> dict[str, float]:
    """At the device's peak rates, which no program reaches. To write a token, all weights and the cache are read."""
    rate = 1e12 * (device.bfloat16 if recipe.bf16 else device.float32)
    token = max(simulated.flops["token"] / rate, simulated.read / (device.bandwidth * GB))
    rounds = math.ceil(simulated.completions / max(1, simulated.at_once))
    written = 0 if recipe.rollout.source.writes_by_teacher else rounds * recipe.rollout.max_completion_length
    return {"rollout": written * token} | {name: simulated.flops[name] / rate for name in ("teacher", "update")}


def explain(recipe: Recipe, plan: Plan, given: Given | None = None) -> str:
    """The parts of both peaks, whether they fit, and, if not, what would help."""
    shown = Console(width=80)
    with shown.capture() as text:
        shown.print(_table(plan))
    memory = f"{plan.peak_gb:.1f} of {plan.place.device.memory_gb:.4g} GB on {plan.place.device.name}"
    lines = [f"{text.get()}{memory}: {'fits' if plan.fits else 'does not fit'}"]
    return "\n".join(lines if plan.fits else [*lines, *_what_helps(recipe, plan, given)])


def _what_helps(recipe: Recipe, plan: Plan, given: Given | None) -> Iterator[str]:
    """Changes, one on top of the other until the run fits, with the peak that each leaves."""
    for template, what in CHANGES:
        override, tree = template.replace("{longest}", str(plan.simulated.longest)), recipe_to_dict(recipe)
        try:
            apply_override(tree, override)
            changed = parse_recipe(tree)
            found = plan_recipe(changed, plan.place, given)
        except OprdError:  # this recipe cannot have it
            continue
        if found.peak_gb < 0.98 * plan.peak_gb:
            recipe, plan = changed, found
            yield f"{override} ({what}): {plan.peak_gb:.1f} GB"
        if plan.fits:
            return
    yield "weights sharded over several devices (--processes 8 --sharded), or a smaller model"


def largest_budget(recipe: Recipe, plan: Plan) -> int:
    """The largest micro_batch_tokens whose update fits, 0 if none does: each completion more takes as much again."""
    longest, rows, device = plan.simulated.longest, plan.simulated.rows, plan.place.device
    other = plan_recipe(recipe.model_copy(update={"micro_batch_tokens": longest * (1 if rows > 1 else 2)}), plan.place)
    held = {one.simulated.rows: one.parts["update"].total() / GB for one in (plan, other)}
    first, last = min(held), max(held)
    room = device.memory_gb - device.reserved_gb - held[first]
    if room < 0 or first == last:  # the step has one completion
        return longest * (room >= 0)
    return longest * (first + int(room * (last - first) / max(held[last] - held[first], 1e-9)))


def _table(plan: Plan) -> Table:
    """The parts of both peaks, in GB."""
    shown = Table("GB", *plan.parts)
    names = dict.fromkeys(name for parts in plan.parts.values() for name in parts)
    for name in names:
        row = [parts[name] / GB for parts in plan.parts.values()]
        if max(row) >= 0.005:
            shown.add_row(name, *(f"{x:.2f}" if x >= 0.005 else "" for x in row))
    shown.add_section()
    shown.add_row("at once", *(f"{parts.total() / GB:.2f}" for parts in plan.parts.values()))
    return shown
