"""Checkpoints: written aside, synced, renamed. One that is not complete has another name and is never picked up.

Only what was trained so far is stored (torch.distributed.checkpoint: every process its shard), so a LoRA checkpoint is
small and a run may resume on another number of processes.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from oprd.errors import RunFolderError
from oprd.train.run_folder import write_atomically

_COMPLETE = re.compile(r"step-(\d{6,})")
_STUDENT = "model.student."
"""In front of a student's weight in a checkpoint."""
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    accelerator: Accelerator,
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    keep: int,
) -> Path:
    """Store the trained weights, the optimizer, `tensors` (DTensors by shards) and `state` after `step` steps; delete all
    but the newest `keep`. `trained`: what an earlier stage trained as well, and this one may not."""
    aside, final = folder / f".step-{step:06d}.tmp", folder / f"step-{step:06d}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _counted_as_trained(trained):
        weights, moments = get_state_dict(model, optimizer, options=_OPTIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        save(
            {"model": weights, "optimizer": moments, "tensors": tensors},
            checkpoint_id=aside,
            no_dist=accelerator.num_processes == 1,
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_atomically(aside / "state.json", json.dumps({"step": step} | state, indent=2))
        _sync_folder(aside)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _sync_folder(folder)
        for old in complete_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    path: Path,
    *,
    accelerator: Accelerator,
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Put weights and optimizer back in place, write into `tensors`; the `state` that was stored with them."""
    with _counted_as_trained(trained):
        weights, moments = get_state_dict(model, optimizer, options=_OPTIONS)
        stored = {"model": weights, "optimizer": moments, "tensors": tensors}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            load(stored, checkpoint_id=path, no_dist=accelerator.num_processes == 1)
        set_state_dict(
            model, optimizer, model_state_dict=stored["model"], optim_state_dict=stored["optimizer"], options=_OPTIONS
        )
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def _counted_as_trained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, they have gradient, by which what belongs into a checkpoint is told."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint by their names in the student, whole, whatever number of processes wrote it."""
    reader = FileSystemReader(path)
    stored: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(_STUDENT) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
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


def _sync_folder(folder: Path) -> None:
    """Make the folder's entries durable, and the content of its files."""
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
