"""What goes over the network between `oprd serve-teacher` and teacher `remote`: token ids there, hidden states back."""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from oprd.data.batching import collate
from oprd.types import Batch, HiddenSpec, Taps, TokenAlignment

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""As safetensors names them."""


class Message(BaseModel):
    """A JSON body."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class About(Message):
    """What a server says of its model. Weights and tokenizer are known by `fingerprint`, whatever `name` says."""

    name: str
    fingerprint: str
    """Hash of weights, LM head and tokenizer."""
    weights: str
    """Hash of the weights before the LM head."""
    files: Mapping[str, str]
    """Config and tokenizer, by file name, in base64."""
    blocks: tuple[int, ...]
    """Whose hidden states it gives, counted from 1."""
    max_tokens: int
    """Most token ids of one request."""


class Asked(Message):
    """Hidden states of a batch, at some tokens."""

    fingerprint: str
    """Of the model that is asked for."""
    prompt_ids: Sequence[tuple[int, ...]]
    completion_ids: Sequence[tuple[int, ...]]
    alignments: tuple[TokenAlignment, ...] | None
    """Where the student's tokens are others; without the teacher's ids."""
    taps: tuple[HiddenSpec, ...]

    @classmethod
    def of(cls, batch: Batch, taps: Taps, fingerprint: str, rows: range) -> Self:
        """What is asked about some rows of a teacher's batch."""
        ids, prompts, completions = batch.input_ids.tolist(), batch.prompt_lengths, batch.completion_lengths
        alignments = batch.alignments and tuple(replace(batch.alignments[i], teacher_ids=()) for i in rows)
        return cls(
            fingerprint=fingerprint,
            prompt_ids=[tuple(ids[i][: prompts[i]]) for i in rows],
            completion_ids=[tuple(ids[i][prompts[i] : prompts[i] + completions[i]]) for i in rows],
            alignments=alignments,
            taps=taps.hidden,
        )

    def batch(self, *, pad_id: int, device: torch.device) -> Batch:
        """The batch that was asked about."""
        return collate(
            self.prompt_ids, self.completion_ids, pad_id=pad_id, device=device, alignments=self.alignments, reads="teacher"
        )  # fmt: skip


def stream(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """A safetensors body, a tensor at a time: no two are in CPU memory at once."""
    header, end = {}, 0
    for name, x in tensors.items():
        start, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for x in tensors.values():
        yield x.contiguous().cpu().view(torch.uint8).numpy().tobytes()
