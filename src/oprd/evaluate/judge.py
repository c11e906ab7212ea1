"""Is the answer right? One completion at a time, without any time limit: `python -m oprd.evaluate.judge` is the worker
that `verify.Verifier` starts, limits and replaces. Reads and writes JSON lines.
"""

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
_TAIL = 2000
"""Without a box only the last characters are searched for an answer."""


def judge(completion: str, answer: str) -> dict[str, object]:
    """{"outcome": correct | wrong | no_answer, "extracted": text or None}.

    The last box counts; boxes that stand side by side are one answer. What stands in a reasoning block (<think>) does not.
    """
    text = final_part(completion)
    boxed = last_boxed(text)
    if boxed is None:
        found = _parse(text[-_TAIL:])
        if not found:
            return {"outcome": "no_answer", "extracted": None}
        extracted = str(found[-1])
    else:
        extracted = boxed.strip()
        if _plain(extracted) == _plain(answer):
            return {"outcome": "correct", "extracted": extracted}
        if _INTEGER.fullmatch(_plain(extracted)) and _INTEGER.fullmatch(_plain(answer)):
            right = int(_plain(extracted)) == int(_plain(answer))
            return {"outcome": "correct" if right else "wrong", "extracted": extracted}
        if _OR.search(extracted) and not _OR.search(answer):
            # math-verify would take one of the alternatives; a completion that names two has not answered
            return {"outcome": "wrong", "extracted": extracted}
        found = _parse_boxed(extracted)
    right = bool(found) and verify(_parse_boxed(answer), found, timeout_seconds=None)
    return {"outcome": "correct" if right else "wrong", "extracted": extracted}


def final_part(completion: str) -> str:
    """What follows the reasoning block; nothing if it was never closed."""
    if "</think>" in completion:
        return completion.rpartition("</think>")[2]
    return "" if "<think>" in completion else completion


def last_boxed(text: str) -> str | None:
    """Content of the last complete box, with those directly before it, separated by commas; None without one."""
    boxes: list[tuple[int, int, str]] = []
    for match in _BOXED.finditer(text):
        if boxes and match.start() < boxes[-1][1]:
            continue  # a box inside a box
        end = _closing(text, match.end())
        if end is not None:
            boxes.append((match.start(), end + 1, text[match.end() : end]))
    if not boxes:
        return None
    contents = [boxes[-1][2]]
    for before, after in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        if not _BETWEEN_BOXES.fullmatch(text[before[1] : after[0]]) or "\n" in text[before[1] : after[0]]:
            break
        contents.insert(0, before[2])
    return ",".join(contents)


def _closing(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before `start`."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return None


def _plain(answer: str) -> str:
    """Without what does not change an answer: spaces, dollar signs, a unicode minus, a final full stop."""
    return re.sub(r"\s|\$|\\[,;!]", "", answer).replace("\u2212", "-").removesuffix(".")


def _parse_boxed(answer: str) -> Any:
    return _parse(f"\\boxed{{{answer}}}")


def _parse(text: str) -> Any:
    # None switches math-verify's alarms off, though its annotation says int
    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(text, extraction_config=config, parsing_timeout=cast(int, None))


def main() -> None:
    """Answer each line of standard input with a line, until it closes: the parent is gone then."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the libraries print must not end up between our lines
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(3000)
    _warm_up()
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        item = json.loads(line)
        print(json.dumps(judge(item["completion"], item["answer"])), file=out, flush=True)


def _warm_up() -> None:
    """The first parse builds the grammar, which must not count against the first answer's time limit."""
    judge(r"\boxed{\frac{1}{2}}", "0.5")


if __name__ == "__main__":
    main()
