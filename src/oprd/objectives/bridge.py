"""OPRD-Bridge, arXiv 2606.06021: the OPRD loss between the states of two models of any kind, at the sampled tokens.

    projections [paper]:  u = P_S (h_S - mean_S),  v = P_T (h_T - mean_T)  in R^r
                          loss_t = mean over pairs of blocks of (1/r) ||u/|u| - sg(v/|v|)||^2
    student [ours]:       h* = h_0 + A R (B (f(h_T) - mean_f) - C (h_0 - mean_S)),  h_0 the student's state before training
                          loss_t = mean over pairs of blocks of (1/D_S) ||h_S/|h_S| - h*/|h*|||^2
                          or, in the last block, KL(head(h_S) || head_0(h*));  unpaired tokens keep h_0

with the maps of a file that `oprd fit-bridge` wrote: C and B are the canonical directions of the two models, f the
teacher's state with its features, A how the student's states move with its coordinates along C, R their
held-out correlations, head_0 the student's LM head before training. In the last block h* is moved on along A until
head_0 is as sure as the teacher's head.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from oprd.bridge.blocks import partner
from oprd.bridge.features import Features
from oprd.bridge.file import BridgeFile, Setting, check_setting, load_bridge
from oprd.bridge.solve import Solution, auto_rank
from oprd.config.objectives import BridgeConfig
from oprd.errors import ConfigError
from oprd.kernels.chunked import confidence, head_divergence, sampled_logprobs, sharpen
from oprd.kernels.reference import hidden_mse, normalized_hidden_mse, reverse_kl
from oprd.objectives.base import Objective
from oprd.objectives.hidden import select_blocks
from oprd.types import HiddenTargets, MicroBatch, Reading, Rollouts, States, Tally, TokenSelection

SURE = 0.99
"""A target is not made surer than this [ours]."""


@final
class Bridge(Objective, nn.Module):
    """Distance in the shared space, or of next-token distributions there. A module, so that its tensors move, train and are
    stored with the student; the maps are buffers, or with `trainable` the student's projections are parameters."""

    needs = HiddenTargets
    across_shapes = True
    across_tokenizers = True

    def __init__(self, config: BridgeConfig, *, blocks: int, vocabulary: int) -> None:
        """Reads the file. Raises DataError without one, TeacherMismatch for one of another setting, ConfigError for a rank
        that it does not hold."""
        super().__init__()
        self.config = config
        self.uses_head = config.loss == "reverse_kl"
        self.name = "reverse_kl" if self.uses_head else "oprd_bridge"
        self.file = load_bridge(Path(config.bridge))
        self.tokens = TokenSelection.of(config.tokens, config.k)
        self.reduction = config.reduction
        self.coefficient = config.coefficient
        self.pairs = bridge_pairs(config, blocks, self.file.teacher.blocks)
        # what the teacher's config says is compared when the pair is checked
        asked = bridge_setting(config, self.pairs, alignment=self.file.setting.alignment)
        check_setting(config.bridge, self.file.setting, asked)
        self.in_projections = config.space == "projections"
        self.readings, self._of_teacher = bridge_readings(config, self.pairs)
        if not self.in_projections:
            self.readings = tuple(replace(reading, at="written") for reading in self.readings)
        self.ranks = _ranks(config, self.file, [block for block, _ in self.pairs])
        self._last = Reading(block=blocks, at="written", tokens=self.tokens)
        self._trusted: list[Tensor] = []
        self._distance = normalized_hidden_mse if config.normalization == "l2" else hidden_mse
        for (block, _), rank in zip(self.pairs, self.ranks, strict=True):
            solution = self.file.solutions[block]
            self.register_buffer(f"student_mean_{block}", solution.student_mean.clone())
            if not self.in_projections:
                directions = solution.directions.first(rank)
                for name in ("student", "teacher", "teacher_mean"):
                    self.register_buffer(f"{name}_{block}", getattr(directions, name).clone())
                correlation = solution.canonical[:rank, None].sqrt()
                self.register_buffer(f"pattern_{block}", directions.pattern * correlation)
                for name, tensor in directions.features.tensors():
                    self.register_buffer(f"features_{name}_{block}", tensor.clone())
                continue
            self.register_buffer(f"teacher_mean_{block}", solution.teacher_mean.clone())
            projection = solution.student_projection[:rank].clone()
            if config.trainable:
                self.register_parameter(f"student_{block}", nn.Parameter(projection))
            else:
                self.register_buffer(f"student_{block}", projection)
            self.register_buffer(f"teacher_{block}", solution.teacher_projection[:rank].clone())

    @property
    def teacher_readings(self) -> tuple[Reading, ...]:
        """The partners' states; in the student's space also its own before training, the last for what it says next."""
        if self.in_projections:
            return self._of_teacher
        before = (*self.readings, self._last) if self.config.trust > 0 else self.readings
        return (*self._of_teacher, *dict.fromkeys(before))

    @property
    def teacher_head(self) -> bool:
        """And of the student before training: to sharpen by, to trust by, or to compare with."""
        return not self.in_projections and (self.uses_head or self.config.sharpen or self.config.trust > 0)

    def supervised(self, rollouts: Rollouts) -> tuple[int, ...]:
        """In the student's space every selected token: one without a partner keeps the state it had."""
        if self.in_projections:
            return super().supervised(rollouts)
        return tuple(map(self.tokens.count, rollouts.lengths))

    def per_token(self, student: States, teacher: HiddenTargets) -> Float[Tensor, " N"]:
        ours = [student.hidden[reading] for reading in self.readings]
        if self.in_projections:
            blocks = [block for block, _ in self.pairs]
            u = [self.project("student", block, h) for block, h in zip(blocks, ours, strict=True)]
            theirs = [teacher.hidden[reading].to(ours[0].device) for reading in self._of_teacher]
            v = [self.project("teacher", block, h) for block, h in zip(blocks, theirs, strict=True)]
        else:
            u, v = ours, self.wanted(student.batch, teacher)
        if self.uses_head:
            assert student.head is not None
            nobody = torch.zeros(len(u[0]), dtype=torch.long, device=u[0].device)  # no token is singled out
            return head_divergence(u[0], student.head, v[0], teacher.start_head, nobody, _of_distributions)
        return torch.stack(list(map(self._distance, u, v))).mean(0)

    def wanted(self, batch: MicroBatch, teacher: HiddenTargets) -> list[Float[Tensor, "N S"]]:
        """h* of every matched block of the student, in the last one made as sure of the next token as the teacher is."""
        moved, trusted = self.moved(batch, teacher)
        found = []
        for (block, _), ours, theirs in zip(self.pairs, self.readings, self._of_teacher, strict=True):
            h_0, h_t = (teacher.hidden[reading].to(moved.device) for reading in (ours, theirs))
            h_t = h_t[trusted]
            target = self.edit(block, h_0, h_t, moved)
            if self.config.sharpen and block == self._last.block:
                assert teacher.head is not None
                assert teacher.start_head is not None
                least = confidence(h_t, teacher.head).clamp(max=SURE)
                target[moved] = sharpen(target[moved], teacher.start_head, least, self.get_buffer(f"pattern_{block}"))
            found.append(target)
        return found

    def moved(self, batch: MicroBatch, teacher: HiddenTargets) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " P"]]:
        """Of the selected tokens those whose target is moved, and which of the P paired ones they are: with other
        tokenizers those behind which the student before training gave the next token at least `trust`."""
        moved = batch.completion_mask(self.tokens)[batch.written_mask(self.tokens)]
        trusted = torch.ones_like(moved[moved])
        if batch.places is None or self.config.trust == 0:
            return moved, trusted
        assert teacher.start_head is not None
        following, exists = (x[moved] for x in batch.following(self.tokens))
        states = teacher.hidden[self._last].to(moved.device)[moved]
        logprobs = sampled_logprobs(states, teacher.start_head, following)
        trusted = ~exists | (logprobs >= math.log(self.config.trust))
        self._trusted.append(trusted)
        return moved.masked_scatter(moved, trusted), trusted

    def tallies(self) -> tuple[Tally, ...]:
        """Across tokenizers: the share of pairs that are trusted."""
        if not self._trusted:
            return ()
        trusted, self._trusted = torch.cat(self._trusted), []
        return (Tally(name="bridge/trusted/share", total=float(trusted.sum()), of=float(len(trusted))),)

    def edit(
        self, block: int, h_0: Float[Tensor, "N S"], h_t: Float[Tensor, "P T"], moved: Bool[Tensor, " N"]
    ) -> Float[Tensor, "N S"]:
        """The student's states before training, those of the P given tokens moved towards the teacher's coordinates.

        Each coordinate goes as far as its held-out correlation: what hardly correlates would be replaced by noise.
        """
        with torch.autocast(h_0.device.type, enabled=False):
            edited = h_0.float().clone()
            wanted = self.project("teacher", block, h_t) - self.project("student", block, edited[moved])
            edited[moved] += wanted @ self.get_buffer(f"pattern_{block}")
        return edited

    def project(self, side: str, block: int, states: Float[Tensor, "N D"]) -> Float[Tensor, "N R"]:
        """Coordinates of the given states of the pair of the student's `block`, in float32: u or v, or the canonical ones."""
        with torch.autocast(states.device.type, enabled=False):
            states = states.float()
            if side == "teacher" and not self.in_projections:
                states = self._features(block)(states)
            centred = states - self.get_buffer(f"{side}_mean_{block}")
            return centred @ getattr(self, f"{side}_{block}").T

    def _features(self, block: int) -> Features:
        return Features(**{f.name: self.get_buffer(f"features_{f.name}_{block}") for f in fields(Features)})

    def told(self) -> dict[str, Any]:
        """For the run folder: the fit's held-out numbers by block, and the rank that is used."""
        curves = self.file.curves()
        return {
            str(block): curves[str(block)] | {"rank": rank}
            for (block, _), rank in zip(self.pairs, self.ranks, strict=True)
        }

    @torch.no_grad()
    def refit(self, solutions: Mapping[int, Solution]) -> None:
        """Take new projections, at the ranks there are."""
        for (block, _), rank in zip(self.pairs, self.ranks, strict=True):
            solution = solutions[block]
            for name, value in (
                (f"student_{block}", solution.student_projection[:rank]),
                (f"teacher_{block}", solution.teacher_projection[:rank]),
                (f"student_mean_{block}", solution.student_mean),
                (f"teacher_mean_{block}", solution.teacher_mean),
            ):
                self.get_buffer(name).copy_(value)

    def as_trained(self, tensors: Mapping[str, Tensor], student_weights: str) -> BridgeFile:
        """A file of the projections as they are after training, for the student as it is. `tensors` are this module's,
        whole; the held-out numbers stay those of the fit."""
        solutions = {
            block: replace(
                self.file.solutions[block],
                student_projection=tensors[f"student_{block}"],
                teacher_projection=tensors[f"teacher_{block}"],
                student_mean=tensors[f"student_mean_{block}"],
                teacher_mean=tensors[f"teacher_mean_{block}"],
            )
            for block, _ in self.pairs
        }
        return replace(
            self.file,
            student=replace(self.file.student, weights=student_weights),
            setting=replace(self.file.setting, blocks=self.pairs),
            solutions=solutions,
        )


def _of_distributions(student: Tensor, target: Tensor, _: Tensor) -> Tensor:
    return reverse_kl(student, target)


def bridge_pairs(config: BridgeConfig, student_blocks: int, teacher_blocks: int) -> tuple[tuple[int, int], ...]:
    """(student's block, teacher's block) of each matched pair."""
    chosen = select_blocks(config.layers, student_blocks)
    return tuple((block, partner(block, student_blocks, teacher_blocks)) for block in chosen)


def bridge_setting(config: BridgeConfig, pairs: tuple[tuple[int, int], ...], *, alignment: str) -> Setting:
    """What a file fitted for this objective has to say."""
    selection = TokenSelection.of(config.tokens, config.k)
    return Setting(
        blocks=pairs,
        tokens=selection.keep,
        k=selection.k,
        normalization=config.normalization,
        alignment=alignment,
        method=config.fit.method,
        features=config.fit.features,
        confidence=config.fit.confidence,
    )


def bridge_readings(
    config: BridgeConfig, pairs: tuple[tuple[int, int], ...]
) -> tuple[tuple[Reading, ...], tuple[Reading, ...]]:
    """What is read off the student and off the teacher, in the order of the pairs."""
    tokens = TokenSelection.of(config.tokens, config.k)
    student = tuple(Reading(block=block, at="completion", tokens=tokens) for block, _ in pairs)
    return student, tuple(Reading(block=block, at="completion", tokens=tokens) for _, block in pairs)


def check_rank(config: BridgeConfig, student_width: int, teacher_width: int) -> None:
    """Raise ConfigError for a rank above the smaller width."""
    smaller = min(student_width, teacher_width)
    asked = config.rank if isinstance(config.rank, tuple) else (config.rank,)
    for rank in asked:
        if isinstance(rank, int) and rank > smaller:
            raise ConfigError(
                f"objective.rank is {rank}; the student's states have {student_width} dimensions, the teacher's "
                f"{teacher_width}, so it is {smaller} at most"
            )


def _ranks(config: BridgeConfig, file: BridgeFile, blocks: list[int]) -> tuple[int, ...]:
    """The rank of each pair."""
    check_rank(config, file.student.width, file.teacher.width)
    canonical = [file.solutions[block].canonical for block in blocks]
    if config.rank == "full":
        ranks = (min(file.student.width, file.teacher.width),) * len(blocks)
    elif config.rank == "auto":
        ranks = tuple(map(auto_rank, canonical))
    elif config.rank == "auto_shared":
        ranks = (auto_rank(torch.stack(canonical).mean(0)),) * len(blocks)
    elif isinstance(config.rank, tuple):
        ranks = config.rank
    else:
        ranks = (config.rank,) * len(blocks)
    if len(ranks) != len(blocks):
        raise ConfigError(f"objective.rank lists {len(ranks)} ranks; {len(blocks)} blocks are matched")
    for block, rank in zip(blocks, ranks, strict=True):
        if rank == 0:
            raise ConfigError(
                f"objective.rank: no direction of the student's block {block} has a held-out squared canonical correlation "
                "of 1/2, so 'auto' leaves nothing of it. Give a rank, or leave the block out with objective.layers"
            )
        if rank > file.rank:
            raise ConfigError(
                f"objective.rank: block {block} is to have rank {rank}; {config.bridge} holds ranks up to {file.rank}. "
                "Fit again with a larger fit.max_rank, or give a smaller rank"
            )
    return ranks
