"""Where a completion's reasoning ends and its answer begins, in the marks that model families use."""

import re

_OPEN = r"<(?:seed:)?(?:think|thinking|thought)>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|channel>|<\|channel\|>(?!final)\w*(?:<\|message\|>)?"
_CLOSE = r"</(?:seed:)?(?:think|thinking|thought)>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<channel\|>|<\|channel\|>final<\|message\|>"
_OPENING, _CLOSING, _OPEN_AT_END = re.compile(_OPEN), re.compile(_CLOSE), re.compile(rf"(?:{_OPEN})\s*\Z")
_MARK = re.compile(rf"{_OPEN}|{_CLOSE}|<\|message\|>")


def final_part(completion: str) -> str:
    """The text after the reasoning; empty if the reasoning was never closed."""
    rest = _CLOSING.split(completion)[-1]
    return "" if _OPENING.search(rest) else rest


def is_mark(token: str) -> bool:
    """Whether a token of this text marks reasoning."""
    return _MARK.fullmatch(token) is not None


def left_open(prompt: str) -> str:
    """The mark that a prompt ends with if the completion starts inside the reasoning; else empty."""
    found = _OPEN_AT_END.search(prompt)
    return found[0] if found else ""


def closing(mark: str) -> str:
    """The mark that ends the reasoning which `mark` opens."""
    if mark.startswith("<|channel|>"):
        return "<|channel|>final<|message|>"
    for opened, closed in (("<|START_", "<|END_"), ("<|channel>", "<channel|>"), ("◁", "◁/"), ("[", "[/"), ("<", "</")):
        if mark.startswith(opened):
            return mark.strip().replace(opened, closed, 1)
    return ""
