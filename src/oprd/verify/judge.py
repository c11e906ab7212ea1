"""Whether a completion's answer is right, without a time limit. `main` is the worker process that `VerifierPool` starts,
limits and replaces; it reads and writes JSON lines."""

import contextlib
import json
import logging
import os
import re
import resource
import signal
import sys
from dataclasses import replace
from itertools import product
from typing import Any, cast

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Eq, Expr, I, Symbol

from oprd.verify.reasoning import final_part
from oprd.verify.spelling import is_literal, is_word, measured, plain, readings, split

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(-?\d(?:[\d.,/]*\d)?|[A-Z]\b))")
_BETWEEN_BOXES = re.compile(r"[\s,;$.&]*(?:\\?text\{)?\s*(?:and|or)?\s*\}?[\s,;$.&]*")
_EQUALS = re.compile(r"(?<![<>!\\])=")
_NAME = re.compile(r"\s*[A-Za-z]\w*\s*(?:\(.*\))?\s*")
_INTEGER = re.compile(r"[-+]?\d{1,4000}")  # int() takes no more
_PERCENT = re.compile(r"\\?%")
_COMMANDS = re.compile(r"\\[a-z]+")
_READ = replace(LatexExtractionConfig().normalization_config, units=False)  # it takes the t of 2t for tons
_MEMORY = 2 << 30  # bytes a worker may take
_MOST_PAIRS = 2000  # of two lists' elements that are not the same text; longer lists are not the same answer
_TAIL = 2000  # characters searched for an answer where there is no box


def judge(completion: str, answer: str) -> dict[str, object]:
    """{"outcome": correct | wrong | no_answer, "extracted": text or None}.

    The last box counts; adjacent boxes are one answer. A box inside the reasoning does not count.
    """
    text = final_part(completion)
    found = last_boxed(text)
    if found is None:
        parsed = [] if _BOXED.search(text) else _parse(text[-_TAIL:])  # a box that was cut is no answer
        if not parsed:
            return {"outcome": "no_answer", "extracted": None}
        found = str(parsed[-1])
    gold = last_boxed(answer)
    right = any(_same(x, y) for x, y in product(readings(found), readings(answer if gold is None else gold)))
    return {"outcome": "correct" if right else "wrong", "extracted": found.strip()}


def _same(ours: str, theirs: str) -> bool:
    """Whether two answers are the same: as text, or part by part, or by math-verify."""
    a, b = plain(ours), plain(theirs)
    if not a or not b or a == b:
        return a == b != ""
    (brackets, our_parts), (their_brackets, their_parts) = split(ours), split(theirs)
    if len(our_parts) == len(their_parts) == 1:
        inside = our_parts[0], their_parts[0]
        return _same_part(*inside) if inside == (ours.strip(), theirs.strip()) else _same(*inside)
    if brackets and their_brackets:
        pairs = zip(our_parts, their_parts, strict=False)
        return brackets == their_brackets and len(our_parts) == len(their_parts) and all(_same(*x) for x in pairs)
    if brackets or their_brackets:  # an interval may be a set with a name
        return len(our_parts) != len(their_parts) and 1 in (len(our_parts), len(their_parts)) and _agree(ours, theirs)
    ours_by_text, theirs_by_text = ({plain(x): x for x in parts} for parts in (our_parts, their_parts))
    left, missing = (
        [x for text, x in one.items() if text not in other]
        for one, other in ((ours_by_text, theirs_by_text), (theirs_by_text, ours_by_text))
    )
    if len(left) * len(theirs_by_text) + len(missing) * len(ours_by_text) > _MOST_PAIRS:
        return False
    return all(any(_same(x, y) for y in theirs_by_text.values()) for x in left) and all(
        any(_same(x, y) for x in ours_by_text.values()) for y in missing
    )


def _same_part(ours: str, theirs: str) -> bool:
    """Whether two answers of one part are the same though not as text."""
    (ours, unit), (theirs, their_unit) = measured(ours), measured(theirs)
    if unit and their_unit and unit != their_unit:  # also 1 hour and 60 minutes: nothing is converted
        return False
    a, b = plain(ours), plain(theirs)
    if is_literal(ours) or is_literal(theirs) or (is_word(ours) and is_word(theirs)) or a.lower() == b.lower():
        return a == b  # math-verify takes X for x
    if _INTEGER.fullmatch(a) and _INTEGER.fullmatch(b):
        return int(a) == int(b)
    for one, other in ((ours, theirs), (theirs, ours)):
        name, *sides = _EQUALS.split(one)
        if sides and not _EQUALS.search(other) and (one is ours or _NAME.fullmatch(name)):
            values = [x for x in (name, *sides) if not re.search("[A-Za-z]", _COMMANDS.sub("", x)) and x.strip()]
            return all(_same(x, other) for x in values or sides[-1:])  # math-verify believes 13 = 12
    return _agree(ours, theirs) or ("%" in ours + theirs and _agree(*(_PERCENT.sub("", x) for x in (ours, theirs))))


def _agree(ours: str, theirs: str) -> bool:
    """Whether math-verify finds two answers equal."""
    gold, found = _parse(f"\\boxed{{{theirs}}}"), _parse(f"\\boxed{{{ours}}}")
    return verify(gold, found, allow_set_relation_comp=True, timeout_seconds=None)


def last_boxed(text: str) -> str | None:
    """Content of the last complete box and of those directly before it, joined by commas; None without a box."""
    contents: list[str] = []
    end = 0
    for match in _BOXED.finditer(text):
        closing = match.end() if match[1] else _closing(text, match.end())
        if match.start() < end or closing is None:  # a box inside a box, or one that was cut
            continue
        between = text[end : match.start()]
        adjacent = "\n" not in between and _BETWEEN_BOXES.fullmatch(between)
        contents = [*(contents if adjacent else ()), match[1] or text[match.end() : closing]]
        end = closing if match[1] else closing + 1
    return ",".join(contents) if contents else None


def _closing(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before `start`."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return None


def _parse(text: str) -> list[Any]:
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=_READ), ExprExtractionConfig()]
    found = parse(text, extraction_config=config, parsing_timeout=cast(int, None))  # None: without alarms
    return [_complex(x) if isinstance(x, Expr | Eq) else x for x in found]


def _complex(found: Any) -> Any:
    """With i as the imaginary unit, and an equation's letters not taken for real: without roots all would be equal."""
    letters = {x: I if x.name == "i" else Symbol(x.name) for x in found.free_symbols}
    return found.xreplace({x: y for x, y in letters.items() if y is I or isinstance(found, Eq)})


def main() -> None:
    """Answer each line of standard input with a line, until it closes because the parent process ended. An answer that takes
    more than its `seconds` of processor time ends the process, wherever it is: on a busy machine the clock says nothing."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the libraries print must not end up between our lines
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(3000)
    with contextlib.suppress(ValueError):  # there is a lower limit already
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    for line in sys.stdin:
        item = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, item["seconds"])
        verdict = judge(item["completion"], item["answer"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=out, flush=True)
