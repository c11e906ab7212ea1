"""Two tokenizations of one completion, aligned where their tokens end at the same byte.

Bytes, not characters: a token may end inside a character.
"""

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, cast, final

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from oprd.data.chat import encode
from oprd.errors import TeacherMismatch
from oprd.types import TokenAlignment


@final
class TokenBytes:
    """The bytes that a tokenizer's ids stand for.

    Supports byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece pieces (`▁` for a space, `<0xE4>` for a byte), the two
    kinds whose decoder loses nothing. Raises TeacherMismatch for any other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        if not tokenizer.is_fast:
            raise TeacherMismatch(f"{name}: alignment by bytes needs a fast tokenizer, got {type(tokenizer).__name__}")
        self._backend = cast(Any, tokenizer).backend_tokenizer
        decoder = json.dumps(json.loads(self._backend.to_str())["decoder"])
        kinds = set(re.findall(r'"type": "(\w+)"', decoder))  # of the decoder and of its parts
        if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
            raise TeacherMismatch(
                f"{name}: alignment by bytes supports byte-level and SentencePiece tokenizers; this one decodes by "
                f"{', '.join(sorted(kinds)) or 'nothing'}. Use a teacher with the student's tokenizer"
            )
        self._alphabet = {c: bytes([b]) for b, c in bytes_to_unicode().items()} if "ByteLevel" in kinds else None
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        self._piece = cache(self._spell)

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token. A special token counts as its text; the space with which SentencePiece marks the first
        word does not count."""
        pieces = [self._piece(i) for i in ids]
        if pieces and pieces[0].startswith(b" ") and not self._backend.decode(list(ids[:1])).startswith(" "):
            pieces[0] = pieces[0][1:]
        return pieces

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._backend.id_to_token(token)
        if piece is None:  # a row of a padded embedding that no text gives
            return b""
        if self._alphabet is not None:
            return b"".join([self._alphabet.get(c) or c.encode() for c in piece])
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


UNSTABLE_TOKENS = 4
"""Tokens at the end of a cut text that could be other ones if the text went on. All tokens of the last word could, but a
tokenizer that splits only at spaces can have words as long as a line. Our choice, no paper's."""


@final
class Aligner:
    """Retokenizes a student's completion for the teacher and aligns the tokens of both."""

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        *,
        student_stops: Iterable[int],
        teacher_end: int,
        teacher_name: str,
        teacher_rows: int = 2**31,
    ) -> None:
        """`teacher_rows`: of its embedding; a token beyond them is read as its letters."""
        self._student = TokenBytes(student, "student")
        self._teacher = TokenBytes(teacher, f"teacher {teacher_name}")
        self._teacher_tokenizer = teacher
        self._stops = frozenset(student_stops)
        self._teacher_end, self._rows = teacher_end, teacher_rows

    def align(self, ids: Sequence[int], *, finished: bool) -> TokenAlignment:
        """The teacher's tokens of the same text, and the indices of the tokens of both that end at the same byte.

        The stop token of a finished completion is aligned with the teacher's own end of turn. Of an unfinished one the
        teacher's last word is left out, at most UNSTABLE_TOKENS of it. Where the teacher's tokenizer changes the text (it
        normalizes, or the student wrote bytes that are not text), nothing is aligned from there on.
        """
        stopped = finished and bool(ids) and ids[-1] in self._stops
        student_pieces = self._student.pieces(ids[:-1] if stopped else ids)
        student_bytes = b"".join(student_pieces)
        text = getincrementaldecoder("utf-8")("replace").decode(student_bytes)  # less a character that was cut
        teacher_ids = encode(self._teacher_tokenizer, text)
        if max(teacher_ids, default=0) >= self._rows:
            teacher_ids = encode(self._teacher_tokenizer, text, letters=True)
        teacher_pieces = self._teacher.pieces(teacher_ids)
        common, skipped = _common_start(student_bytes, b"".join(teacher_pieces))
        ends = ((end - skipped, i) for end, i in _ends(teacher_pieces).items())
        teacher_at = {end: i for end, i in ends if 0 <= end <= common}
        if not finished:
            word, stable = self._last_word(text), len(teacher_ids) - UNSTABLE_TOKENS
            teacher_at = {end: i for end, i in teacher_at.items() if end <= word or i < stable}
        pairs = [(i, teacher_at[end]) for end, i in _ends(student_pieces).items() if end in teacher_at]
        if stopped:
            pairs.append((len(ids) - 1, len(teacher_ids)))
            teacher_ids = (*teacher_ids, self._teacher_end)
        return TokenAlignment(
            teacher_ids=teacher_ids,
            student_length=len(ids),
            student_index=tuple(i for i, _ in pairs),
            teacher_index=tuple(i for _, i in pairs),
        )

    def _last_word(self, text: str) -> int:
        """Bytes before the last word, as the teacher's tokenizer pre-splits the text; 0 if it does not."""
        splitter = cast(Any, self._teacher_tokenizer).backend_tokenizer.pre_tokenizer
        words = splitter.pre_tokenize_str(text) if splitter is not None else ()
        return len(text[: words[-1][1][0]].encode()) if words else 0


def _ends(pieces: Sequence[bytes]) -> dict[int, int]:
    """Index of the token that ends at each byte count; of several, because some have no bytes, the first."""
    ends: dict[int, int] = {}
    for i, end in enumerate(accumulate(map(len, pieces))):
        ends.setdefault(end, i)
    return ends


def _common_start(written: bytes, read: bytes) -> tuple[int, int]:
    """Length of the common prefix, and bytes skipped in `read`: SentencePiece may put one space in front of a text."""

    def common(skip: int) -> int:
        pairs = enumerate(zip(written, read[skip:], strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(written), len(read) - skip))

    return max((common(skip), skip) for skip in ((0, 1) if read.startswith(b" ") else (0,)))
