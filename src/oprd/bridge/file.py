"""A fitted bridge on disk: one safetensors file that knows for which two models, blocks and positions it was fitted."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from oprd.bridge.features import Features
from oprd.bridge.solve import Directions, Solution, auto_rank
from oprd.data.chat import encode
from oprd.errors import DataError, TeacherMismatch
from oprd.models import PROBE_TEXTS, LanguageModel

_MAPS = ("student_projection", "teacher_projection", "student_mean", "teacher_mean")
_DIRECTIONS = ("student", "teacher", "teacher_mean", "pattern")
_LORA = ("lora_", "base_model.model.", ".base_layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two models, by content and not by name."""

    name: str
    width: int
    blocks: int
    tokenizer: str
    """Hash of vocabulary, splitting and chat template."""
    weights: str
    """Hash of the architecture and the weights in bfloat16: how a model is loaded does not change it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the projections were fitted for, beside the models."""

    blocks: tuple[tuple[int, int], ...]
    """(student's block, teacher's block) of each pair."""
    tokens: str
    k: int
    normalization: str
    alignment: str
    method: Literal["closed_form", "gradient"]
    features: int
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the held-out completions say about the pair of one block."""

    cosine: Float[Tensor, " R"]
    """Mean cosine of the two projections at every rank from 1."""
    rows: int
    held_out_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeFile:
    """Everything in the file; `solutions` and `measured` by the student's block."""

    student: Side
    teacher: Side
    setting: Setting
    solutions: Mapping[int, Solution]
    measured: Mapping[int, Measured]

    def save(self, path: Path) -> None:
        """Write the file. Curves and ranks are in the header too, for readers without torch."""
        tensors: dict[str, Tensor] = {}
        for block, _ in self.setting.blocks:
            solution = self.solutions[block]
            parts = {name: getattr(solution, name) for name in _MAPS}
            parts |= {f"directions.{name}": getattr(solution.directions, name) for name in _DIRECTIONS}
            parts |= {f"features.{name}": tensor for name, tensor in solution.directions.features.tensors()}
            for name, tensor in parts.items():
                tensors[f"block_{block:02d}.{name}"] = tensor.float().cpu().contiguous()
        header = {
            "student": asdict(self.student),
            "teacher": asdict(self.teacher),
            "setting": asdict(self.setting),
            "measured": self.curves(),
        }
        save_synced(tensors, path, {"oprd_bridge": json.dumps(header)})

    def curves(self) -> dict[str, dict[str, Any]]:
        """The held-out numbers by the student's block, as JSON has them."""
        return {
            str(block): {
                "teacher_block": teacher_block,
                "cosine": [round(x, 5) for x in self.measured[block].cosine.tolist()],
                "canonical": [round(x, 5) for x in self.solutions[block].canonical.tolist()],
                "explained": [round(x, 5) for x in self.solutions[block].explained.tolist()],
                "rows": self.measured[block].rows,
                "held_out_rows": self.measured[block].held_out_rows,
                "auto_rank": auto_rank(self.solutions[block].canonical),
            }
            for block, teacher_block in self.setting.blocks
        }

    @property
    def rank(self) -> int:
        """The largest rank in the file."""
        return min(len(solution.student_projection) for solution in self.solutions.values())


def save_synced(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str]) -> None:
    """A safetensors file, written aside, synced, renamed: a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), aside, metadata=dict(header))
    with aside.open("rb") as handle:
        os.fsync(handle.fileno())
    aside.replace(path)


def load_bridge(path: Path) -> BridgeFile:
    """Raises DataError for a file that is not there or is not a bridge."""
    if not path.is_file():
        raise DataError(f"objective.bridge: {path} is not there; `oprd fit-bridge RECIPE` writes it")
    try:
        with safe_open(path, framework="pt") as stored:
            header = json.loads((stored.metadata() or {})["oprd_bridge"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return _from_parts(header, tensors)
    except (SafetensorError, KeyError, TypeError) as error:
        raise DataError(
            f"objective.bridge: {path} was not written by `oprd fit-bridge`, or by another version of it: {error}"
        ) from error


def _from_parts(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BridgeFile:
    setting = header["setting"]
    solutions, measured = {}, {}
    for block, _ in setting["blocks"]:
        curves = header["measured"][str(block)]
        told = {name: torch.tensor(curves[name]) for name in ("canonical", "explained")}
        measured[block] = Measured(
            cosine=torch.tensor(curves["cosine"]), rows=curves["rows"], held_out_rows=curves["held_out_rows"]
        )
        parts = {name: tensors[f"block_{block:02d}.{name}"] for name in _MAPS}
        features = Features(**{f.name: tensors[f"block_{block:02d}.features.{f.name}"] for f in fields(Features)})
        own = {name: tensors[f"block_{block:02d}.directions.{name}"] for name in _DIRECTIONS}
        directions = Directions(features=features, **own)
        solutions[block] = Solution(**parts, directions=directions, **told)
    return BridgeFile(
        student=Side(**header["student"]),
        teacher=Side(**header["teacher"]),
        setting=Setting(**(setting | {"blocks": tuple(map(tuple, setting["blocks"]))})),
        solutions=solutions,
        measured=measured,
    )


def check_setting(path: str, stored: Setting, asked: Setting) -> None:
    """Raise TeacherMismatch where the file was fitted for other blocks, positions, normalisation or alignment than asked.

    The file may hold more pairs of blocks than are asked for.
    """
    if not set(asked.blocks) <= set(stored.blocks):
        raise TeacherMismatch(
            f"{path} was fitted for the blocks (student, teacher) {_pairs(stored.blocks)}, the objective asks for "
            f"{_pairs(asked.blocks)}. Fit again, or change objective.layers"
        )
    for key in ("tokens", "k", "normalization", "alignment", "method", "features", "confidence"):
        then, now = getattr(stored, key), getattr(asked, key)
        if then != now:
            raise TeacherMismatch(
                f"{path} was fitted with {key} {then!r}, the recipe has {now!r}. Fit again to another file, or set it back"
            )


def check_side(path: str, which: str, stored: Side, *, width: int, blocks: int, tokenizer: str) -> None:
    """Raise TeacherMismatch unless the file was fitted for a model of that shape and tokenizer."""
    if (stored.width, stored.blocks) != (width, blocks):
        raise TeacherMismatch(
            f"{path} was fitted for a {which} of {stored.blocks} blocks of width {stored.width} ({stored.name}); this one "
            f"has {blocks} of width {width}. Fit a bridge for it"
        )
    if stored.tokenizer != tokenizer:
        raise TeacherMismatch(
            f"{path} was fitted for another tokenizer or chat template of the {which} ({stored.name}). Fit again"
        )


def check_weights(path: str, which: str, stored: Side, weights: str) -> None:
    """Raise TeacherMismatch unless the file was fitted for exactly these weights."""
    if stored.weights != weights:
        raise TeacherMismatch(
            f"{path} was fitted for other weights of the {which} ({stored.name}); its projections mean nothing to these. "
            "Fit again, or give the models it was fitted for"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides how a conversation becomes ids: vocabulary, splitting of the probe texts, chat template."""
    probes = [encode(tokenizer, text) for text in PROBE_TEXTS]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), probes, tokenizer.chat_template])
    return hashlib.sha256(content.encode()).hexdigest()


def weights_fingerprint(lm: LanguageModel, gathered: Mapping[str, Tensor] | None = None) -> str:
    """Hash of the architecture and every weight before the LM head, which no hidden state depends on; without an adapter's,
    which has not been trained yet when it counts.

    `gathered`: the weights by name where those in the model are shards.
    """
    digest = hashlib.sha256(lm.core.config.model_type.encode())
    weights = gathered if gathered is not None else dict(lm.model.named_parameters())
    prefix = f"{lm.core.base_model_prefix}."
    plain = {_plain(name): weight for name, weight in weights.items() if _LORA[0] not in name}
    for name, weight in sorted(item for item in plain.items() if item[0].startswith(prefix)):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        values = weight.detach().to(torch.bfloat16) if weight.is_floating_point() else weight.detach()
        digest.update(values.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def side_of(lm: LanguageModel, width: int) -> Side:
    """The model as it is now."""
    return Side(
        name=lm.name,
        width=width,
        blocks=lm.num_blocks,
        tokenizer=tokenizer_fingerprint(lm.tokenizer),
        weights=weights_fingerprint(lm),
    )


def _plain(name: str) -> str:
    """A parameter's name without what an adapter around it adds."""
    for part in _LORA[1:]:
        name = name.replace(part, "")
    return name


def _pairs(blocks: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"({s}, {t})" for s, t in blocks)
