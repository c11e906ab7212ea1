"""`oprd plan`: whether a recipe fits a device, what would help, and the least time that its steps take."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.table import Table

from oprd.distributed import Ranks
from oprd.errors import ConfigError, OprdError
from oprd.plan.simulate import GRADIENTS, OPTIMIZER, WEIGHTS, Simulated, simulate
from oprd.recipe import Recipe
from oprd.student import InitialStudent
from oprd.train.accelerator import open_accelerator
from oprd.train.pair import Given
from oprd.train.setup import check

RESERVED_GB = 1.5
"""Of a device, for its context, the libraries' workspaces and gaps between tensors."""
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
Load = Callable[[list[str]], Recipe]
"""The recipe with these overrides."""


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
        return self.peak_gb + RESERVED_GB <= self.place.device.memory_gb


def plan_recipe(recipe: Recipe, place: Place) -> Plan:
    """Reads configs, tokenizers and prompts, no weights. Raises an OprdError for what training refuses before it loads."""
    eighth = recipe.optim == "adamw_8bit"
    recipe = _countable(recipe)
    accelerator = open_accelerator(recipe)
    checked = check(recipe, Given(), Ranks(accelerator), InitialStudent())
    simulated = simulate(recipe, checked, accelerator, place.processes)
    parts = {"rollout": Counter(simulated.rollout), "update": Counter(simulated.update)}
    for held in parts.values() if eighth else ():
        held[OPTIMIZER] //= 4
    for held in parts.values() if place.sharded else ():
        for name in (WEIGHTS, GRADIENTS, OPTIMIZER):
            held[name] //= place.processes
        held[GATHERED] = 2 * simulated.gathered  # the next block is fetched while one computes
    parts["rollout"][ENGINE] = round(recipe.rollout.engine.device_share * place.device.memory_gb * GB)
    return Plan(place=place, parts=parts, seconds=_least_seconds(recipe, simulated, place.device), simulated=simulated)


def _countable(recipe: Recipe) -> Recipe:
    """The recipe by what runs without content: quantized moments are counted after it. Raises ConfigError for the rest."""
    student = recipe.student
    if (
        student.weights == "4bit"
        or student.gradient_checkpointing == "offload"
        or getattr(recipe.teacher, "offload", False)
    ):
        raise ConfigError(
            "oprd plan does not count 4-bit weights or what is offloaded to CPU memory; plan student.weights=bfloat16, "
            "gradient_checkpointing=true and a teacher on the device, which need more"
        )
    # every device of the table computes in bfloat16
    plain = {"bf16": True if recipe.bf16 == "auto" else recipe.bf16, "optim": "adamw_torch"}
    return recipe.model_copy(update=plain | {"student": student.model_copy(update={"torch_compile": False})})


def _least_seconds(recipe: Recipe, simulated: Simulated, device: Device) -> dict[str, float]:
    """At the device's peak rates, which no program reaches. To write a token, all weights and the cache are read."""
    rate = 1e12 * (device.bfloat16 if recipe.bf16 else device.float32)
    token = max(simulated.flops["token"] / rate, simulated.read / (device.bandwidth * GB))
    rounds = math.ceil(simulated.completions / max(1, simulated.at_once))
    written = 0 if recipe.rollout.source.writes_by_teacher else rounds * recipe.rollout.max_completion_length
    return {"rollout": written * token} | {name: simulated.flops[name] / rate for name in ("teacher", "update")}


def what_helps(load: Load, plan: Plan) -> Iterator[str]:
    """Changes, one on top of the other until the run fits, with the peak that each leaves."""
    made: list[str] = []
    for template, what in CHANGES:
        override = template.replace("{longest}", str(plan.simulated.longest))
        try:
            changed = plan_recipe(load([*made, override]), plan.place)
        except OprdError:  # this recipe cannot have it
            continue
        if changed.peak_gb < 0.98 * plan.peak_gb:
            made, plan = [*made, override], changed
            yield f"{override} ({what}): {plan.peak_gb:.1f} GB"
        if plan.fits:
            return
    yield "weights sharded over several devices (--processes 8 --sharded), or a smaller model"


def largest_budget(load: Load, plan: Plan) -> int:
    """The largest micro_batch_tokens whose update fits, 0 if none does: each completion more takes as much again."""
    longest, device = plan.simulated.longest, plan.place.device
    one, two = (
        plan_recipe(load([f"micro_batch_tokens={rows * longest}"]), plan.place).parts["update"].total() / GB
        for rows in (1, 2)
    )
    room = device.memory_gb - RESERVED_GB - one
    return longest * (1 + int(room / (two - one))) if room >= 0 and two > one else longest * (room >= 0)


def table(plan: Plan) -> Table:
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
