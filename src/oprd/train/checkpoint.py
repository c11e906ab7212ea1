"""Checkpoints: written aside, synced, renamed. An incomplete one has another name and is never picked up.

Only trained tensors are stored (torch.distributed.checkpoint in safetensors, every rank its shard), so a LoRA checkpoint is
small and a run may resume on another number of ranks. Nothing is pickled. SHA256SUMS holds a checksum of every file, for
`sha256sum -c` too; a checkpoint that differs from it is never loaded.
"""

import contextlib
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from oprd.distributed import Ranks
from oprd.errors import DiskError, RunFolderError
from oprd.files import SUMS, checksums, delete, sync_folder, write_atomically, writing
from oprd.progress import console
from oprd.student import Student

_NAME = re.compile(r"step-(\d{6,})")
_STUDENT = "student."
"""Prefix of a student's weight in a checkpoint."""
_MOMENT = "optimizer."
"""Prefix of what the optimizer keeps of a weight, followed by its name there and the weight's."""
_FILE_BYTES = 2**31
"""Of tensors in one file, which is put together in memory."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds: copies in CPU memory, of sharded tensors this rank's shard."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    """On the main rank."""


def snapshot(
    step: int, student: Student, ranks: Ranks, state: Callable[[], dict[str, Any]], tensors: dict[str, Tensor]
) -> Snapshot:
    """Copy trained weights, optimizer, `tensors` and what `state` gives on the main rank. Where nothing is sharded, the main
    rank alone copies: it alone writes."""
    kept: dict[str, Any] = {}
    ranks.on_main(lambda: kept.update(step=step, scheduler=student.scheduler.state_dict(), **state()))
    held = _in_use(student) | tensors if ranks.sharded or ranks.is_main else {}
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in held.items()}
    return Snapshot(step=step, tensors=copies, state=kept)


def write_checkpoint(folder: Path, taken: Snapshot, ranks: Ranks, keep: int) -> None:
    """Store a snapshot; delete all but the newest `keep` checkpoints. Those of `ranks` are called that hold a part of it."""
    aside, final = folder / f".step-{taken.step:06d}.tmp", folder / f"step-{taken.step:06d}"
    ends = accumulate(value.nbytes for value in taken.tensors.values())
    files = {name: 1 + end // _FILE_BYTES for name, end in zip(taken.tensors, ends, strict=True)}

    def begin() -> None:
        delete(aside)
        aside.mkdir(parents=True)

    def end() -> None:
        write_atomically(aside / SUMS, sums)
        sync_folder(aside)
        aside.rename(final)
        sync_folder(folder)
        _remove([*folder.glob(".step-*.tmp"), *checkpoints(folder)[:-keep]])

    try:
        with writing(final):
            ranks.on_main(begin)
            with _plain_errors():
                writer = HuggingFaceStorageWriter(str(aside), files, save_distributed=True)
                save(taken.tensors, storage_writer=writer, no_dist=ranks.size == 1, process_group=ranks.group)
            ranks.on_main(lambda: write_atomically(aside / "state.json", json.dumps(taken.state, indent=2)))
            sums = _sums(aside, ranks)
            ranks.on_main(end)
    except DiskError:
        delete(aside)
        raise


def stored(folder: Path, step: int) -> bool:
    """Whether there is a checkpoint of this step."""
    return (folder / f"step-{step:06d}" / SUMS).is_file()


def load_checkpoint(path: Path, student: Student, ranks: Ranks, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put weights, optimizer and schedule back in place and write into `tensors`; returns the `state` stored with them."""
    reader = HuggingFaceStorageReader(str(path))
    moments = defaultdict[str, dict[str, Any]](dict)  # before the first update there are none
    for place, entry in reader.read_metadata().state_dict_metadata.items():
        if place.startswith(_MOMENT):
            _, key, name = place.split(".", 2)
            moments[name][key] = entry
    for name, parameter in _trained(student).items():
        kept = {key: _room(parameter, entry) for key, entry in moments[name].items()}
        student.optimizer.state[parameter] = kept
    with _plain_errors():
        load(_in_use(student) | tensors, storage_reader=reader, no_dist=ranks.size == 1)
    student.reshard()
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    student.scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(student.optimizer.param_groups, student.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    return state


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint by their names in the student, whole, however many ranks wrote it."""
    reader = HuggingFaceStorageReader(str(path))
    found: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(_STUDENT)
    }
    with _plain_errors():
        load(found, storage_reader=reader, no_dist=True)
    return {name.removeprefix(_STUDENT): value for name, value in found.items()}


def checkpoints(folder: Path) -> list[Path]:
    """What is there of steps, oldest first, but for empty folders."""
    return [path for path in _steps(folder) if not path.is_dir() or any(path.iterdir())]


def forget_after(folder: Path, step: int) -> None:
    """Delete what is there of later steps, and what a killed save left."""
    _remove([*folder.glob(".step-*.tmp"), *(path for path in _steps(folder) if _step_of(path) > step)])


def _steps(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _remove(paths: list[Path]) -> None:
    """Renamed first: half of a deleted checkpoint is not taken for a damaged one."""
    for path in paths:
        aside = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.tmp"))
        delete(aside)


def find_checkpoint(folder: Path, asked: str) -> Path | None:
    """The checkpoint to resume from: `latest` (None if there is none yet: the run starts at step 0), or a path."""
    found = checkpoints(folder)
    if asked == "latest":
        return found[-1] if found else None
    path = Path(asked)
    if not (path / "state.json").is_file():
        known = ", ".join(p.name for p in found) or "none"
        raise RunFolderError(f"resume_from_checkpoint: {path} is not a complete checkpoint; this run has: {known}")
    if path.resolve().parent != folder.resolve():
        raise RunFolderError(
            f"resume_from_checkpoint: {path} belongs to another run; this one keeps its own in {folder}"
        )
    return path


def whole_checkpoint(folder: Path, asked: str, ranks: Ranks) -> Path | None:
    """`find_checkpoint` with every file checked. In place of a damaged `latest` the newest whole one, with a warning.

    Raises RunFolderError where there is none, or where the one that was asked for is damaged.
    """
    found = checkpoints(folder) if asked == "latest" else [path for path in [find_checkpoint(folder, asked)] if path]
    faults = []
    for path in reversed(found):
        fault = _fault(path, ranks)
        if fault is None:
            if faults and ranks.is_main:
                told = f"{'; '.join(faults)}. Going on from {path} instead."
                console.print(told, style="yellow", markup=False, highlight=False)
            return path
        faults.append(f"{path}: {fault}")
    if faults:
        raise RunFolderError(
            f"{'; '.join(faults)}. Restore a checkpoint, or delete them all to start at the first step"
        )
    return None


def _fault(path: Path, ranks: Ranks) -> str | None:
    """What differs from a checkpoint's checksums, on every rank; None if nothing does."""
    try:
        listed = (path / SUMS).read_text(encoding="ascii", errors="replace")
    except OSError:
        return f"{SUMS} is missing"
    found = _sums(path, ranks)
    if listed != found or "  state.json\n" not in found:
        wrong = {line[66:] for line in set(listed.split("\n")) ^ set(found.split("\n"))} - {""}
        return f"missing or damaged: {', '.join(sorted(wrong)) or SUMS}"
    if json.loads((path / "state.json").read_bytes())["step"] != _step_of(path):
        return "it is the checkpoint of another step"
    return None


def _sums(path: Path, ranks: Ranks) -> str:
    """A line with the SHA-256 of every file of a checkpoint, on every rank; each reads its share."""
    names = sorted(file.name for file in path.iterdir() if file.name != SUMS)
    lines = ranks.gather_objects(checksums(path, names[ranks.rank :: ranks.size]))
    return "".join(sorted(lines, key=lambda line: line[66:]))


def _trained(student: Student) -> dict[str, Tensor]:
    """Trained parameters by name, with or without a wrapper."""
    named = student.wrapper.named_parameters()
    return {name.removeprefix("module."): parameter for name, parameter in named if parameter.requires_grad}


def _in_use(student: Student) -> dict[str, Tensor]:
    """Trained weights and the optimizer's moments of them: the tensors in use, so that loading writes into them."""
    trained, moments = _trained(student), student.optimizer.state
    return trained | {
        f"{_MOMENT}{key}.{name}": torch.as_tensor(value)  # bitsandbytes counts steps in an integer
        for name, parameter in trained.items()
        for key, value in moments.get(parameter, {}).items()
    }


def _room(parameter: Tensor, entry: Any) -> Tensor:
    """Room for a stored tensor that the optimizer keeps of a parameter: sharded alike where it is of one shape."""
    dtype = entry.properties.dtype
    if entry.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype)
    return torch.zeros(entry.size, dtype=dtype, device=parameter.device if entry.size else "cpu")


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """The error of the first rank that failed, on every rank, and no warning that a single process needs no group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
