"""Whether a completion's answer is right, without a time limit. `python -m oprd.verify.judge` is the worker process that
`VerifierPool` starts, limits and replaces; it reads and writes JSON lines."""

import json
import logging
import os
import re
import sys
from typing import Any, cast

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN_BOXES = re.compile(r"[\s,;$.&]*(?:\\?text\{)?\s*(?:and|or)?\s*\}?[\s,;$.&]*")
_OR = re.compile(r"\bor\b|\\lor\b|\\vee\b")
_INTEGER = re.compile(r"[-+]?\d+")
_TAIL = 2000  # characters searched for an answer where there is no box


def judge(completion: str, answer: str) -> dict[str, object]:
    """{"outcome": correct | wrong | no_answer, "extracted": text or None}.

    The last box counts; adjacent boxes are one answer. A box inside a reasoning block (<think>) does not count.
    """
    text = final_part(completion)
    boxed = last_boxed(text)
    if boxed is not None:
        return {"outcome": "correct" if _same(boxed.strip(), answer) else "wrong", "extracted": boxed.strip()}
    found = _parse(text[-_TAIL:])
    if not found:
        return {"outcome": "no_answer", "extracted": None}
    return {"outcome": "correct" if _agree(found, answer) else "wrong", "extracted": str(found[-1])}


def _same(boxed: str, answer: str) -> bool:
    """Whether a box holds the answer: as text, as an integer, or by math-verify."""
    ours, theirs = _plain(boxed), _plain(answer)
    if ours == theirs:
        return True
    if _INTEGER.fullmatch(ours) and _INTEGER.fullmatch(theirs):
        return int(ours) == int(theirs)
    if _OR.search(boxed) and not _OR.search(answer):
        return False  # math-verify would take one of the alternatives; a completion that names two has not answered
    return _agree(_parse(f"\\boxed{{{boxed}}}"), answer)


def _agree(found: list[Any], answer: str) -> bool:
    """Whether math-verify finds the parsed expressions equal to the answer."""
    return bool(found) and verify(_parse(f"\\boxed{{{answer}}}"), found, timeout_seconds=None)


def final_part(completion: str) -> str:
    """The text after the reasoning block; empty if the block was never closed."""
    _, closed, rest = completion.rpartition("</think>")
    return rest if closed or "<think>" not in rest else ""


def last_boxed(text: str) -> str | None:
    """Content of the last complete box and of those directly before it, joined by commas; None without a box."""
    contents: list[str] = []
    end = 0
    for match in _BOXED.finditer(text):
        closing = _closing(text, match.end())
        if match.start() < end or closing is None:  # a box inside a box, or one that was cut
            continue
        between = text[end : match.start()]
        adjacent = "\n" not in between and _BETWEEN_BOXES.fullmatch(between)
        contents = [*(contents if adjacent else ()), text[match.end() : closing]]
        end = closing + 1
    return ",".join(contents) if contents else None


def _closing(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before `start`."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return None


def _plain(answer: str) -> str:
    """The answer without spaces, dollar signs and a final full stop, its unicode minus made plain."""
    return re.sub(r"\s|\$|\\[,;!]", "", answer).replace("\u2212", "-").removesuffix(".")


def _parse(text: str) -> list[Any]:
    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(text, extraction_config=config, parsing_timeout=cast(int, None))  # None: without alarms


def main() -> None:
    """Answer each line of standard input with a line, until it closes because the parent process ended."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the libraries print must not end up between our lines
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(3000)
    for line in sys.stdin:
        item = json.loads(line)
        print(json.dumps(judge(item["completion"], item["answer"])), file=out, flush=True)


if __name__ == "__main__":
    main()
