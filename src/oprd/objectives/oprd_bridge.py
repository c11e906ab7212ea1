# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""OPRD-Bridge in the student's space: a teacher of any shape and tokenizer gives targets for the student's states.

    h* = h_0 + A R (B (f(h_T) - mean_f) - C (h_0 - mean_S))
    loss_t = mean over block pairs of (1/D_S) ||h_S/|h_S| - h*/|h*|||^2,  or KL(head(h_S) || head_0(h*)) of the last block

h_0 and head_0 are the initial student's, f(h_T) is the teacher's state with its features. `oprd fit-bridge` gives C and B, the
canonical directions of the two models; A, how the student's states move with their coordinates along C; R, the held-out
correlations. A token without an aligned teacher token keeps h_0. In the last block h* moves on along A until head_0 is as
confident as the teacher. Why: docs/adr/0006.
"""

import math
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from jaxtyping import Bool, Float
from pydantic import PrivateAttr, model_validator
from torch import Tensor

from oprd.bridge.file import BridgeFile, Setting, check_setting, check_side, check_weights, load_bridge
from oprd.bridge.fit import confidence
from oprd.bridge.solve import BlockMap, Solution, auto_rank, partner
from oprd.errors import ConfigError
from oprd.losses.chunked import chunk_rows, chunked, finish, logprobs_of, raw_scores
from oprd.losses.divergences import normalized_hidden_mse, reverse_kl
from oprd.models.language_model import LanguageModel
from oprd.models.loading import ModelFacts
from oprd.objectives.oprd import StateObjective, select_blocks
from oprd.section import Layers, PositiveInt, Weight
from oprd.types import Batch, Capability, HiddenSpec, HiddenStates, LMHead, Taps, Targets

TRUST = 0.01
"""An aligned token whose next token is less probable than this to the initial student keeps h_0: whether a teacher's token
ends there depends on what follows, and a digit in place of the rest of a number would find a teacher that agrees."""
SURE = 0.99
"""Confidence above which targets are not sharpened: no teacher's distribution needs to be met beyond it."""
REACH, HALVINGS = 0.25, 12
"""Longest step of `sharpen`, as a share of the state's norm, and how often its interval is halved."""


class BridgeObjective(StateObjective):
    """What both forms share: the bridge file and its checks, the pairs of blocks and their ranks."""

    bridge: str
    """File that `oprd fit-bridge` writes and training reads."""
    rank: Literal["full", "auto"] | PositiveInt = "full"
    """Directions in use. `auto`: in each pair of blocks the largest r whose r-th held-out squared canonical correlation is at
    least 1/2."""
    layers: Layers = "last"
    """The student's blocks to match, each with the teacher's block at its relative depth: `all`, `last`, `even`, `odd` or a
    list."""
    weight: Weight = 10.0
    fit_prompts: PositiveInt = 2000
    """`oprd fit-bridge` uses so many of the recipe's prompts, the first."""

    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.HIDDEN, Capability.ONE_MODEL})
    features: ClassVar[int]
    """Random features of the teacher's states in the fit."""
    confidence: ClassVar[float]
    """Least probability of the student's most probable next token at a fitted position."""

    _file: BridgeFile = PrivateAttr()
    _pairs: tuple[tuple[int, int], ...] = PrivateAttr()
    _maps: dict[int, BlockMap] = PrivateAttr()

    @abstractmethod
    def block_map(self, solution: Solution, rank: int) -> BlockMap:
        """The maps that training uses."""

    def setting(self, student_blocks: int, teacher_blocks: int) -> Setting:
        """What a file for this objective is fitted for. Raises ConfigError for a block the student does not have."""
        blocks = select_blocks(self.layers, student_blocks)
        pairs = tuple((block, partner(block, student_blocks, teacher_blocks)) for block in blocks)
        return Setting(blocks=pairs, tokens=self.tokens, features=self.features, confidence=self.confidence)

    def bind(self, student: ModelFacts) -> Self:
        """Reads the file. Raises DataError without one, TeacherMismatch for one of another setting, ConfigError for a rank
        that it does not hold."""
        bound, file = super().bind(student), load_bridge(Path(self.bridge))
        setting = self.setting(student.blocks, file.teacher.blocks)
        check_setting(self.bridge, file.setting, setting)
        bound._file, bound._pairs = file, setting.blocks
        solutions = {block: file.solutions[block] for block, _ in setting.blocks}
        bound._maps = {block: self.block_map(s, self._rank(file, block, s)) for block, s in solutions.items()}
        return bound

    def check_pair_facts(self, student: ModelFacts, teacher: ModelFacts) -> None:
        check_side(self.bridge, "student", self._file.student, student)
        check_side(self.bridge, "teacher", self._file.teacher, teacher)

    def check_models(self, student: LanguageModel, teacher: LanguageModel | None) -> None:
        check_weights(self.bridge, "student", self._file.student, student)
        if teacher is not None:
            check_weights(self.bridge, "teacher", self._file.teacher, teacher)

    def summary(self) -> dict[str, Any]:
        """Held-out numbers of the fit and the rank in use, by the student's block."""
        curves = self._file.curves()
        return {str(block): curves[str(block)] | {"rank": len(maps.student)} for block, maps in self._maps.items()}

    @property
    def teacher_taps(self) -> Taps:
        return Taps() | Taps(hidden=tuple(self._spec(block) for _, block in self._pairs))  # each block once

    def _spec(self, block: int) -> HiddenSpec:
        return HiddenSpec(block=block, at="token", tokens=self.tokens)

    def _map(self, block: int, device: torch.device) -> BlockMap:
        self._maps[block] = self._maps[block].to(device)
        return self._maps[block]

    def _rank(self, file: BridgeFile, block: int, solution: Solution) -> int:
        student, teacher = file.student.width, file.teacher.width
        full, held = min(student, teacher), len(solution.projections.student)
        names = {"full": full, "auto": auto_rank(solution.canonical)}
        rank = names[self.rank] if isinstance(self.rank, str) else self.rank
        if rank > full:
            raise ConfigError(
                f"objective.rank is {rank}; the student's states have {student} dimensions, the teacher's {teacher}, so it is "
                f"{full} at most"
            )
        if rank == 0:
            raise ConfigError(
                f"objective.rank: no direction of the student's block {block} has a held-out squared canonical correlation "
                "of 1/2, so 'auto' leaves nothing of it. Give a rank, or leave the block out with objective.layers"
            )
        if rank > held:
            raise ConfigError(
                f"objective.rank: block {block} is to have rank {rank}; {self.bridge} holds ranks up to {held}. Give a smaller "
                "rank"
            )
        return rank


class OPRDBridge(BridgeObjective):
    """OPRD-Bridge: match the student's hidden states to targets in its own space, from a teacher of any shape and tokenizer.

    Needs `oprd fit-bridge` first. Without LoRA a frozen copy of the student is kept.
    """

    type: Literal["oprd_bridge"] = "oprd_bridge"
    loss: Literal["hidden", "reverse_kl"] = "hidden"
    """`hidden`: squared distance of normalised states. `reverse_kl`, for `layers: last`: KL(student || target) of what the
    student's LM head says of its state and the initial head of the target, in nats over the student's vocabulary; use weight
    1."""

    name: ClassVar[str] = "oprd_bridge"
    features: ClassVar[int] = 512
    """A linear map confuses tokens that a piecewise linear one tells apart."""
    confidence: ClassVar[float] = 0.9
    """Where the student hesitates its state says how it hesitates, and targets made of such states are not sharp."""

    @model_validator(mode="after")
    def _one_block_has_a_head(self) -> Self:
        if self.loss == "reverse_kl" and self.layers != "last":
            raise ValueError(
                "loss 'reverse_kl' looks at targets of the last block through the student's LM head; got layers "
                f"{self.layers!r}. Set layers=last, or loss=hidden"
            )
        return self

    @property
    def metric(self) -> str:
        return "bridge_reverse_kl" if self.loss == "reverse_kl" else self.name

    @property
    def student_taps(self) -> Taps:
        return super().student_taps | Taps(head=self.loss == "reverse_kl")

    @property
    def teacher_taps(self) -> Taps:
        return super().teacher_taps | Taps(head=self._student.blocks in self._maps)

    @property
    def reference_taps(self) -> Taps:
        return super().student_taps | Taps(hidden=(self._spec(self._student.blocks),), head=True)

    def block_map(self, solution: Solution, rank: int) -> BlockMap:
        """Canonical directions, whose patterns are scaled by the held-out correlations: A R."""
        directions = solution.directions.first(rank)
        return replace(directions, pattern=cast(Tensor, directions.pattern) * solution.canonical[:rank, None].sqrt())

    def per_token(self, student: HiddenStates, targets: Targets) -> Float[Tensor, " N"]:
        """Distance of each state, or of its next-token distribution, to its target."""
        ours = [student.hidden[self._spec(block)] for block, _ in self._pairs]
        wanted = self.target_states(student.batch, targets)
        if self.loss == "hidden":
            return torch.stack(list(map(normalized_hidden_mse, ours, wanted))).mean(0)
        head, initial = cast(LMHead, student.head), cast(HiddenStates, targets.reference).head
        return chunked(reverse_kl, ours[0], head, teacher_hidden=wanted[0], teacher_head=initial)

    @torch.no_grad()
    def target_states(self, batch: Batch, targets: Targets) -> list[Float[Tensor, "N S"]]:
        """h* of every matched block. No gradient."""
        teacher, reference = cast(HiddenStates, targets.teacher), cast(HiddenStates, targets.reference)
        edited, trusted = self.edited_tokens(batch, reference)
        found: list[Tensor] = []
        for block, other in self._pairs:
            maps = self._map(block, edited.device)
            h_t = teacher.hidden[self._spec(other)].to(edited.device)[trusted]
            target = edit(reference.hidden[self._spec(block)].to(edited.device), edited, h_t, maps)
            if block == self._student.blocks:
                head, pattern = cast(LMHead, reference.head), cast(Tensor, maps.pattern)
                least = confidence(h_t, cast(LMHead, teacher.head)).clamp(max=SURE)
                target[edited] = sharpen(target[edited], head, least, pattern)
            found.append(target)
        return found

    def edited_tokens(self, batch: Batch, reference: HiddenStates) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " P"]]:
        """Of the N selected tokens those whose state is edited, and which of the P aligned ones they are: with another
        tokenizer those whose next token has at least probability TRUST under the initial student."""
        aligned = batch.aligned(self.tokens)
        if batch.alignments is None:
            return aligned, aligned
        following, exists = (x[aligned] for x in batch.next_ids(self.tokens))
        states = reference.hidden[self._spec(self._student.blocks)].to(aligned.device)[aligned]
        trusted = ~exists | (logprobs_of(states, cast(LMHead, reference.head), following) >= math.log(TRUST))
        self._count("bridge/trusted/share", float(trusted.sum()), len(trusted))
        return aligned.masked_scatter(aligned, trusted), trusted


def edit(
    h_0: Float[Tensor, "N S"], edited: Bool[Tensor, " N"], h_t: Float[Tensor, "E T"], maps: BlockMap
) -> Float[Tensor, "N S"]:
    """The initial student's states, the E edited ones with their coordinates moved towards the teacher's."""
    target = h_0.float().clone()
    with torch.autocast(h_0.device.type, enabled=False):
        target[edited] += (maps.of_teacher(h_t) - maps.of_student(target[edited])) @ cast(Tensor, maps.pattern)
    return target


@torch.no_grad()
def sharpen(
    hidden: Float[Tensor, "N D"], head: LMHead, least: Float[Tensor, " N"], patterns: Float[Tensor, "R D"]
) -> Float[Tensor, "N D"]:
    """The states moved until `head` gives its most probable token at least probability `least`, by at most REACH of their
    norm: a regression predicts means, which are less confident than the teacher. Each moves on a line, along the gradient of
    that log-probability projected on `patterns`; a confident one stays. No gradient."""
    moved = hidden.float().clone()
    for rows in torch.split(
        torch.arange(len(hidden), device=hidden.device), chunk_rows(len(head.weight), hidden.device)
    ):
        scores = raw_scores(moved[rows], head)
        p = finish(scores, head).softmax(-1)
        unsure = p.amax(-1) < least[rows]
        rows, scores, p = rows[unsure], scores[unsure], p[unsure]
        h, weight, top = moved[rows], head.weight.to(moved), p.argmax(-1, keepdim=True)
        direction = (weight[top[:, 0]] - p @ weight) @ patterns.T @ patterns
        direction *= h.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        slope = raw_scores(direction, replace(head, bias=None))
        near, far = h.new_zeros(len(h), 1), h.new_full((len(h), 1), REACH)
        for _ in range(HALVINGS):
            middle = (near + far) / 2
            sure = finish(scores + middle * slope, head).softmax(-1).gather(-1, top) >= least[rows, None]
            near, far = torch.where(sure, near, middle), torch.where(sure, middle, far)
        moved[rows] = h + far * direction
    return moved
