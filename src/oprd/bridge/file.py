"""A fitted bridge on disk: one safetensors file that records the two models, blocks and tokens it was fitted for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BeforeValidator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oprd.bridge.solve import BlockMap, Solution, auto_rank
from oprd.errors import DataError, TeacherMismatch
from oprd.files import replacing
from oprd.models.fingerprint import tokenizer_fingerprint, weights_fingerprint
from oprd.models.language_model import LanguageModel
from oprd.models.loading import ModelFacts
from oprd.section import Listed, Section, Tokens


class Side(Section):
    """Identity of one of the two models, by content and not by name."""

    name: str
    width: int
    blocks: int
    tokenizer: str
    """Hash of vocabulary, splitting and chat template."""
    weights: str
    """Hash of the architecture and the weights in bfloat16, so that it does not depend on how a model is loaded."""

    @classmethod
    def of(cls, lm: LanguageModel) -> Self:
        """Identity of a model with its current weights."""
        tokenizer, weights = tokenizer_fingerprint(lm.tokenizer), weights_fingerprint(lm)
        width = lm.core.config.get_text_config().hidden_size
        return cls(name=lm.name, width=width, blocks=lm.num_blocks, tokenizer=tokenizer, weights=weights)


class Setting(Section):
    """What the maps were fitted for, beside the models."""

    blocks: Listed[Annotated[tuple[int, int], BeforeValidator(tuple)]]
    """(student's block, teacher's block) of each pair."""
    tokens: Tokens
    features: int
    """Random features of the teacher's states."""
    confidence: float
    """Least probability of the student's most probable next token at a fitted position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeFile:
    """Everything in the file; `solutions` by the student's block."""

    student: Side
    teacher: Side
    setting: Setting
    solutions: Mapping[int, Solution]

    def save(self, path: Path) -> None:
        """Write the file. Its header holds curves and ranks too, for readers without torch."""
        tensors = {
            f"{block}.{part}.{name}": tensor.float().cpu().contiguous()
            for block, solution in self.solutions.items()
            for part, maps in (("projections", solution.projections), ("directions", solution.directions))
            for name, tensor in maps.tensors().items()
        }
        header = {name: getattr(self, name).model_dump(mode="json") for name in ("student", "teacher", "setting")}
        header["curves"] = self.curves()
        header["sha256"] = _digest(header, tensors)
        with replacing(path) as aside:
            save_file(tensors, aside, metadata={"oprd_bridge": json.dumps(header)})

    def curves(self) -> dict[str, dict[str, Any]]:
        """Held-out numbers by the student's block, as JSON."""
        return {str(block): self._curve(other, self.solutions[block]) for block, other in self.setting.blocks}

    def _curve(self, teacher_block: int, solution: Solution) -> dict[str, Any]:
        return {
            "teacher_block": teacher_block,
            "cosine": [round(x, 5) for x in solution.cosine.tolist()],
            "canonical": [round(x, 5) for x in solution.canonical.tolist()],
            "rows": solution.rows,
            "held_out_rows": solution.held_out_rows,
            "auto_rank": auto_rank(solution.canonical),
        }


def load_bridge(path: Path) -> BridgeFile:
    """The file at `path`. Raises DataError if it is missing or is not a bridge."""
    if not path.is_file():
        raise DataError(f"objective.bridge: {path} is not there; `oprd fit-bridge RECIPE` writes it")
    try:
        with safe_open(path, framework="pt") as stored:
            header = json.loads((stored.metadata() or {})["oprd_bridge"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if header.pop("sha256") != _digest(header, tensors):
            raise ValueError("its checksum differs, so it was damaged since; fit again")
        student, teacher, setting = Side(**header["student"]), Side(**header["teacher"]), Setting(**header["setting"])
        solutions = {block: _solution(block, header["curves"][str(block)], tensors) for block, _ in setting.blocks}
        return BridgeFile(student=student, teacher=teacher, setting=setting, solutions=solutions)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"objective.bridge: {path} was not written by `oprd fit-bridge`, or by another version of it: {error}"
        ) from error


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _solution(block: int, curves: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Solution:
    def maps(prefix: str) -> BlockMap:
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return BlockMap.from_tensors(own)

    return Solution(
        projections=maps(f"{block}.projections."),
        directions=maps(f"{block}.directions."),
        canonical=torch.tensor(curves["canonical"]),
        cosine=torch.tensor(curves["cosine"]),
        rows=curves["rows"],
        held_out_rows=curves["held_out_rows"],
    )


def check_setting(path: str, stored: Setting, asked: Setting) -> None:
    """Raise TeacherMismatch if the file was fitted for other tokens or rows, or without a pair of blocks that is asked for."""
    if not set(asked.blocks) <= set(stored.blocks):
        fitted, wanted = (", ".join(map(str, setting.blocks)) for setting in (stored, asked))
        raise TeacherMismatch(
            f"{path} was fitted for the blocks (student, teacher) {fitted}, the objective asks for {wanted}. Fit again, or "
            "change objective.layers"
        )
    now = asked.model_dump(exclude={"blocks"})
    for key, then in stored.model_dump(exclude={"blocks"}).items():
        if then != now[key]:
            raise TeacherMismatch(
                f"{path} was fitted with {key} {then}, the recipe's objective has {now[key]}. Fit again to another file, or set "
                "it back"
            )


def check_side(path: str, which: str, stored: Side, model: ModelFacts) -> None:
    """Raise TeacherMismatch unless the file was fitted for a model of that shape and tokenizer."""
    if (stored.width, stored.blocks) != (model.width, model.blocks):
        raise TeacherMismatch(
            f"{path} was fitted for a {which} of {stored.blocks} blocks of width {stored.width} ({stored.name}); this one "
            f"has {model.blocks} of width {model.width}. Fit a bridge for it"
        )
    if stored.tokenizer != tokenizer_fingerprint(model.tokenizer):
        raise TeacherMismatch(
            f"{path} was fitted for another tokenizer or chat template of the {which} ({stored.name}). Fit again"
        )


def check_weights(path: str, which: str, stored: Side, lm: LanguageModel) -> None:
    """Raise TeacherMismatch unless the file was fitted for exactly these weights."""
    if stored.weights != weights_fingerprint(lm):
        raise TeacherMismatch(
            f"{path} was fitted for other weights of the {which} ({stored.name}); its projections mean nothing to these. "
            "Fit again, or give the models it was fitted for"
        )
