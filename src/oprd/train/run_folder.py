"""The folder of a run: what was asked, on what machine, what happened.

recipe.yaml     the resolved recipe, to be used  metrics.jsonl     one line a step
run.json        recipe, versions, machine        samples.jsonl     some completions
checkpoints/    to resume from                   evaluations.jsonl one line per evaluation and benchmark
student/        the trained student              evaluations/      every completion with its verdict
                                                 searches.jsonl    one line per search of the extrapolation
teacher_cache.sqlite  what a server answered, and what it cost
engine/         weights on their way to vLLM, and its log

Every line of a log and every JSON file ends with a checksum of itself.
"""

import fcntl
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from oprd.errors import RunFolderError
from oprd.files import parse_json, read_json, sync_folder, write_atomically, write_json, writing
from oprd.progress import console
from oprd.recipe import Recipe, parse_recipe, recipe_to_dict, recipe_to_yaml

MAY_CHANGE = (
    "output_dir", "resume_from_checkpoint", "logging_steps", "health_tokens", "save_steps", "save_total_limit", "eval_steps",
    "evaluation", "report_to", "max_skipped_steps", "micro_batch_tokens", "rollout.engine",
)  # fmt: skip
"""Recipe keys that may differ on resume. None changes the method; the last two change the order of sums and of draws."""
BEYOND = {"step": math.inf}
"""In place of a torn line."""
LOCK = ".lock"
"""Held while a run goes; says by whom."""
PACKAGES = ("oprd", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "math-verify")


class RunFolder:
    """Paths and appended files of one run. Only the main rank writes."""

    def __init__(self, path: str | Path) -> None:
        """Raises RunFolderError for a path that cannot be."""
        self.path = Path(path)
        try:
            self.path.exists()
        except OSError as error:
            raise RunFolderError(f"{path}: {error.strerror}; choose another output_dir") from error
        self.checkpoints = self.path / "checkpoints"
        self.student = self.path / "student"
        self.record = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.searches = self.path / "searches.jsonl"
        self.teacher_cache = self.path / "teacher_cache.sqlite"
        self.engine = self.path / "engine"
        self._lock: IO[str] | None = None

    def check(self, recipe: Recipe, *, needed_gib: float) -> None:
        """Raise RunFolderError unless this run may be written here, before anything is loaded.

        `needed_gib`: disk space that the checkpoints and the final student take.
        """
        if (self.path / LOCK).is_file():
            self._locked(fcntl.LOCK_SH).close()  # shared, because every rank looks
        resuming = recipe.resume_from_checkpoint is not None
        if (self.path / "recipe.yaml").is_file():  # written after run.json
            if not resuming:
                raise RunFolderError(
                    f"{self.path} holds another run; choose another output_dir, delete it, "
                    "or continue it with resume_from_checkpoint=latest"
                )
            self._check_same(recipe, parse_recipe(read_json(self.record)["recipe"]))
        elif self.path.exists() and (not self.path.is_dir() or self._holds_other_things()):
            raise RunFolderError(f"{self.path} exists and is not a run folder; choose another output_dir")
        self._check_writable(needed_gib)

    def check_prompts(self, digest: str) -> None:
        """Raise RunFolderError if this run began with other prompts."""
        if self.record.is_file() and read_json(self.record)["prompts"] != digest:
            raise RunFolderError(
                f"{self.path} began with other prompts: the dataset or the chat template has changed since. Bring them back, "
                "or choose another output_dir"
            )

    def create(self, recipe: Recipe, facts: Mapping[str, Any], summaries: Mapping[str, Any]) -> None:
        """Write down what was asked, where it runs, some `facts`, and what objectives say of themselves; keep the record of
        an earlier start."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.hold()
        if not self.record.exists():
            write_json(self.record, {**describe_machine(), **facts, "recipe": recipe_to_dict(recipe)})
        if not (self.path / "recipe.yaml").exists():
            write_atomically(self.path / "recipe.yaml", recipe_to_yaml(recipe))
        if kept := {name: summary for name, summary in summaries.items() if summary}:
            write_json(self.path / "objectives.json", kept)

    def sync_logs(self) -> dict[str, int]:
        """Make the logs durable before a checkpoint refers to them; the bytes of each by name."""
        with writing(self.path):
            sync_folder(self.path)
        return {file.name: file.stat().st_size for file in self._logs if file.is_file()}

    def logs_until(self, step: int, synced: Mapping[str, int]) -> dict[Path, int]:
        """The bytes of each log that are whole lines of steps up to `step`.

        Raises RunFolderError if a line is lost or damaged that was there when the checkpoint was written: `synced` is what
        `sync_logs` said then. A log that was deleted is given up, with a warning.
        """
        ends = dict[Path, int]()
        for file in self._logs:
            least = synced.get(file.name, 0)
            if file.exists():
                with writing(file), file.open("rb") as lines:
                    ends[file] = sum(
                        map(len, takewhile(lambda line: (parse_json(line) or BEYOND)["step"] <= step, lines))
                    )
                if ends[file] < least:
                    raise RunFolderError(
                        f"{file} is damaged: the line behind byte {ends[file]} is torn, changed or missing, and the checkpoint "
                        f"of step {step} was written after it. Restore the file, or delete it to go on without its lines"
                    )
            elif least:
                console.print(f"{file} is gone; it starts anew after step {step}.", style="yellow")
        return ends

    @property
    def _logs(self) -> tuple[Path, ...]:
        return self.metrics, self.samples, self.evaluations, self.searches

    def _check_same(self, recipe: Recipe, earlier: Recipe) -> None:
        free = _may_change(recipe) & _may_change(earlier)
        now, then = (dict(_leaves(recipe_to_dict(one))) for one in (recipe, earlier))
        changed = [key for key in {**then, **now} if now.get(key) != then.get(key) and not free & set(_above(key))]
        if changed:
            detail = "; ".join(f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in changed)
            if "max_steps" in changed:
                detail += "; the learning rate of every step depends on max_steps unless lr_scheduler_type is constant"
            raise RunFolderError(
                f"{self.path} holds a run of another recipe ({detail}). Resume it with its own "
                f"{self.path / 'recipe.yaml'}, or choose another output_dir"
            )

    def hold(self) -> None:
        """Take the folder for this process until `release`. Raises RunFolderError if another run has it."""
        self.release()
        self._lock = self._locked(fcntl.LOCK_EX)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}")
        self._lock.flush()

    def release(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _locked(self, kind: int) -> IO[str]:
        lock = (self.path / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            with lock:
                lock.seek(0)
                raise RunFolderError(f"{self.path} is in use by {lock.read()}; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        return lock

    def _holds_other_things(self) -> bool:
        """Besides what a start leaves that came no further than its teacher's server, its engine or its own record."""
        own = (self.teacher_cache.name, self.engine.name, LOCK, "run.json", ".run.json.tmp", ".recipe.yaml.tmp")
        return any(not file.name.startswith(own) for file in self.path.iterdir())

    def _check_writable(self, needed_gib: float) -> None:
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        try:
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            raise RunFolderError(f"cannot write to {parent}: {error.strerror}; choose another output_dir") from error
        free_gib = shutil.disk_usage(parent).free / 2**30
        if free_gib < needed_gib:
            raise RunFolderError(
                f"{parent} has {free_gib:.1f} GiB free; checkpoints, the student and the teacher's cache need about "
                f"{needed_gib:.1f} GiB: free some, choose another output_dir, or lower save_total_limit"
            )


def describe_machine() -> dict[str, Any]:
    """Versions, git commit of the working folder, and machine, for run.json and benchmark results."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "git_commit": _git_commit(),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "system": platform.platform(),
        },
    }


def _may_change(recipe: Recipe) -> set[str]:
    """Dotted keys, those of its teachers included."""
    members, steps = recipe.teacher.members, ["max_steps"] if recipe.lr_scheduler_type == "constant" else []
    return {*MAY_CHANGE, *steps}.union(
        f"teacher.teachers.{name}.{key}" if name else f"teacher.{key}"
        for name, config in members.items()
        for key in config.MAY_CHANGE
    )


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a section."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _above(key: str) -> Iterator[str]:
    """The dotted key and every section it is in."""
    parts = key.split(".")
    return (".".join(parts[: n + 1]) for n in range(len(parts)))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
