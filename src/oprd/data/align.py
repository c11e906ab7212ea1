"""Two tokenizations of one completion, paired where they end at the same byte.

Every token is turned into the bytes it stands for, so that characters split over tokens, merged spaces and byte-fallback
pieces need no case of their own. Text pieces or character offsets would not do: a token may end inside a character.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, cast, final

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from oprd.data.chat import encode
from oprd.errors import TeacherMismatch
from oprd.types import Pairing


@final
class TokenBytes:
    """The bytes that a tokenizer's ids stand for.

    Knows byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece pieces (`▁` for a space, `<0xE4>` for a byte), the two
    kinds whose decoder loses nothing. Raises TeacherMismatch for another.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        if not tokenizer.is_fast:
            raise TeacherMismatch(f"{name}: pairing by bytes needs a fast tokenizer, got {type(tokenizer).__name__}")
        self._backend = cast(Any, tokenizer).backend_tokenizer
        kinds = set(_types(json.loads(self._backend.to_str())["decoder"]))
        if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
            raise TeacherMismatch(
                f"{name}: pairing by bytes knows byte-level and SentencePiece tokenizers; this one decodes by "
                f"{', '.join(sorted(kinds)) or 'nothing'}. Use a teacher with the student's tokenizer"
            )
        self._byte_level = "ByteLevel" in kinds
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        self._known: dict[int, bytes] = {}

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token. Special tokens count as they are written. A space that the decoder takes off the
        front of a text (SentencePiece marks the first word with one) is not there."""
        pieces = [self._of(i) for i in ids]
        if pieces and pieces[0].startswith(b" ") and not self._backend.decode(list(ids[:1])).startswith(" "):
            pieces[0] = pieces[0][1:]
        return pieces

    def _of(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._backend.id_to_token(token)
        if piece is None:  # a row of a padded embedding that no text gives
            return b""
        if self._byte_level:
            alphabet = _byte_alphabet()
            return b"".join([alphabet[c] if c in alphabet else c.encode() for c in piece])
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


@cache
def _byte_alphabet() -> dict[str, bytes]:
    """Byte of each character of the byte-level alphabet: printable Latin-1 stands for itself, the other bytes for the
    characters from 256 on, in order."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    own = {c: bytes([ord(c)]) for c in alphabet if ord(c) < 256}
    others = sorted(c for c in alphabet if ord(c) >= 256)
    missing = sorted(set(range(256)) - {ord(c) for c in own})
    return own | {c: bytes([b]) for c, b in zip(others, missing, strict=True)}


RESPELLED = 4
"""Tokens at the end of a cut text that may be spelled otherwise when it goes on [ours]. Within a word all may, but a tokenizer
that splits at spaces alone can have words as long as a line."""


@final
class Aligner:
    """Reads a student's completion as the teacher would have written it, and pairs the positions of both."""

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        *,
        student_stops: Iterable[int],
        teacher_end: int,
        teacher_name: str,
    ) -> None:
        self._student = TokenBytes(student, "student")
        self._teacher = TokenBytes(teacher, f"teacher {teacher_name}")
        self._teacher_tokenizer = teacher
        self._stops = frozenset(student_stops)
        self._teacher_end = teacher_end

    def pair(self, ids: Sequence[int], *, finished: bool) -> Pairing:
        """The teacher's tokens of the same text, and the positions of both that end at the same byte.

        The stop token of a finished completion becomes the teacher's own end of turn, paired with it. Of a cut one the
        teacher's last word is not paired, of it at most RESPELLED tokens: had the text gone on, it might have been others.
        Where the teacher's tokenizer changes the text (it normalises, or the student wrote bytes that are no text), nothing
        is paired from there on.
        """
        stopped = finished and bool(ids) and ids[-1] in self._stops
        ours = self._student.pieces(ids[:-1] if stopped else ids)
        written = b"".join(ours)
        text = _whole_characters(written).decode(errors="replace")
        teacher_ids = encode(self._teacher_tokenizer, text)
        theirs = self._teacher.pieces(teacher_ids)
        read, skipped = _same_start(written, b"".join(theirs))
        student_at = _ends(ours)
        teacher_at = {end - skipped: i for end, i in _ends(theirs).items() if skipped <= end <= read + skipped}
        if not finished:
            word, few = self._last_word(text), len(teacher_ids) - RESPELLED
            teacher_at = {end: i for end, i in teacher_at.items() if end <= word or i < few}
        pairs = [(i, teacher_at[end]) for end, i in student_at.items() if end in teacher_at]
        if stopped:
            pairs.append((len(ids) - 1, len(teacher_ids)))
            teacher_ids = (*teacher_ids, self._teacher_end)
        return Pairing(
            teacher_ids=teacher_ids,
            student=tuple(i for i, _ in pairs),
            teacher=tuple(i for _, i in pairs),
        )

    def _last_word(self, text: str) -> int:
        """Bytes before the last piece into which the teacher's tokenizer splits a text first; 0 if it does not."""
        splitter = cast(Any, self._teacher_tokenizer).backend_tokenizer.pre_tokenizer
        words = splitter.pre_tokenize_str(text) if splitter is not None else ()
        return len(text[: words[-1][1][0]].encode()) if words else 0


def _ends(pieces: Sequence[bytes]) -> dict[int, int]:
    """Position of the token that ends at each byte count, in order. Of tokens without bytes behind it, the first."""
    ends: dict[int, int] = {}
    for i, end in enumerate(accumulate(map(len, pieces))):
        ends.setdefault(end, i)
    return ends


def _same_start(written: bytes, read: bytes) -> tuple[int, int]:
    """Bytes that both begin with, and what is skipped in `read`: SentencePiece may put one space in front of a text."""

    skips = (0, 1) if read.startswith(b" ") else (0,)
    return max((_common(written, read[skip:]), skip) for skip in skips)


def _common(a: bytes, b: bytes) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _whole_characters(written: bytes) -> bytes:
    """Without a character at the end of which bytes are missing."""
    for cut in range(1, min(3, len(written)) + 1):
        lead = written[-cut]
        if lead >= 0xC0:
            needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return written[:-cut] if cut < needed else written
        if lead < 0x80:
            break
    return written


def _types(decoder: Any) -> Iterable[str]:
    """Kinds of a decoder and of those it is made of."""
    if decoder is not None:
        yield decoder["type"]
        for part in decoder.get("decoders", ()):
            yield from _types(part)
