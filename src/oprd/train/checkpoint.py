"""Checkpoints: written aside, synced, renamed. An incomplete one has another name and is never picked up.

Only trained tensors are stored (torch.distributed.checkpoint: every rank its shard), so a LoRA checkpoint is small and a run
may resume on another number of ranks.
"""

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from oprd.distributed import Ranks
from oprd.errors import RunFolderError
from oprd.files import sync_folder, write_atomically
from oprd.student import Student

_COMPLETE = re.compile(r"step-(\d{6,})")
_STUDENT = "model.student."
"""Prefix of a student's weight in a checkpoint."""
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(
    folder: Path,
    step: int,
    student: Student,
    ranks: Ranks,
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    keep: int,
) -> Path:
    """Store trained weights, optimizer, `tensors` (DTensors by shards) and `state` after `step` steps; delete all but the
    newest `keep` checkpoints."""
    aside, final = folder / f".step-{step:06d}.tmp", folder / f"step-{step:06d}"
    if ranks.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    ranks.wait()
    weights, moments = get_state_dict(student.wrapper, student.optimizer, options=_OPTIONS)
    with _quiet():
        stored = {"model": weights, "optimizer": moments, "tensors": tensors}
        save(stored, checkpoint_id=aside, no_dist=ranks.size == 1)
    ranks.wait()
    if ranks.is_main:
        state = {"step": step, "scheduler": student.scheduler.state_dict()} | state
        write_atomically(aside / "state.json", json.dumps(state, indent=2))
        sync_folder(aside)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        sync_folder(folder)
        for old in complete_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    ranks.wait()
    return final


def load_checkpoint(path: Path, student: Student, ranks: Ranks, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put weights, optimizer and schedule back in place and write into `tensors`; returns the `state` stored with them."""
    weights, moments = get_state_dict(student.wrapper, student.optimizer, options=_OPTIONS)
    stored = {"model": weights, "optimizer": moments, "tensors": tensors}
    with _quiet():
        load(stored, checkpoint_id=path, no_dist=ranks.size == 1)
    set_state_dict(
        student.wrapper,
        student.optimizer,
        model_state_dict=stored["model"],
        optim_state_dict=stored["optimizer"],
        options=_OPTIONS,
    )
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    student.scheduler.load_state_dict(state["scheduler"])
    return state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a single process needs no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint by their names in the student, whole, however many ranks wrote it."""
    reader = FileSystemReader(path)
    stored: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(_STUDENT) and isinstance(entry, TensorStorageMetadata)
    }
    with _quiet():
        load(stored, storage_reader=reader, no_dist=True)
    return {name.removeprefix(_STUDENT): value for name, value in stored.items()}


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _COMPLETE.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def find_checkpoint(folder: Path, asked: str) -> Path | None:
    """The checkpoint to resume from: `latest` (None if there is none yet: the run starts at step 0), or a path."""
    if asked == "latest":
        found = complete_checkpoints(folder)
        return found[-1] if found else None
    path = Path(asked)
    if not (path / "state.json").is_file():
        known = ", ".join(p.name for p in complete_checkpoints(folder)) or "none"
        raise RunFolderError(f"resume_from_checkpoint: {path} is not a complete checkpoint; this run has: {known}")
    if path.resolve().parent != folder.resolve():
        raise RunFolderError(
            f"resume_from_checkpoint: {path} belongs to another run; this one keeps its own in {folder}"
        )
    return path
