"""Control tokens, such as the end of a turn. Where a message has the letters of one they are text, and end nothing."""

import json
import re
import secrets
from functools import lru_cache
from typing import Any, cast, final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from oprd.errors import DataError
from oprd.verify.reasoning import is_mark


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The control tokens by id."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> "ControlTokens":
    """Those of a tokenizer, with what it takes to read them as letters."""
    return _control_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> "ControlTokens":
    return ControlTokens(tokenizer)


@final
class ControlTokens:
    """Puts placeholders for the control tokens of a text, and tokenizes what a template makes of that."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, added, special = tokenizer, tokenizer.added_tokens_decoder, special_tokens(tokenizer)
        self.no_marks = frozenset(i for i, text in special.items() if not is_mark(text))
        """Those that do not stand around reasoning."""
        self._special = {i: added[i].content for i in special if i in added}
        self._ids = {text: i for i, text in self._special.items()}
        self._names = re.compile("|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) or "(?!)")
        self._letter = f"\U0010fffd{secrets.token_hex(8)}-"  # which no text has
        self._reader: Tokenizer | None = None
        self._meant = dict[int | None, int]()

    def typed(self, *texts: str) -> bool:
        """Whether a text has the letters of a control token."""
        return any(map(self._names.search, texts))

    def hide(self, text: str, *, marks: bool = False) -> str:
        """The text with a placeholder for each control token; with `marks` those around reasoning stay."""

        def hidden(found: re.Match[str]) -> str:
            return found[0] if marks and is_mark(found[0]) else f"{self._letter}{self._ids[found[0]]}."

        return self._names.sub(hidden, text)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text: a placeholder is the letters of its token, any other control token is itself.

        Raises DataError where the tokenizer cannot do that.
        """
        if self._reader is None and self._tokenizer.is_fast:
            self._reader = self._read_letters()
        meant = self._names.sub(lambda found: self._name(self._ids[found[0]]), text)
        meant = re.sub(f"{self._letter}([0-9]+)[.]", lambda found: self._special[int(found[1])], meant)
        ids = [] if self._reader is None else self._reader.encode(meant, add_special_tokens=False).ids
        unknown = self._tokenizer.unk_token_id
        if self._reader is None or any(i in self._special and i not in self._meant and i != unknown for i in ids):
            raise DataError(
                f"the text has a control token as letters, which {type(self._tokenizer).__name__} reads as the token; drop the row"
            )
        return tuple(self._meant.get(i, i) for i in ids)

    def _name(self, token: int) -> str:
        """Another name of a control token, for where it is meant."""
        return f"{self._letter}{token}!"

    def _read_letters(self) -> Tokenizer:
        """A copy of the tokenizer that reads the control tokens as letters, and by their other names as themselves."""
        state = json.loads(cast(Any, self._tokenizer).backend_tokenizer.to_str()) | {
            "truncation": None,
            "padding": None,
        }
        for token in state["added_tokens"]:
            if token["id"] in self._special:
                token |= {"content": self._name(token["id"]), "special": False}
        reader = Tokenizer.from_str(json.dumps(state))
        self._meant = {reader.token_to_id(self._name(i)): i for i in self._special}
        return reader
