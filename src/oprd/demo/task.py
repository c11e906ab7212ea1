"""The miniature's task: signed sums of three to five numbers, worked out step by step.

`12+34-5` is answered by the running totals `12+34=46` and `46-5=41`, one a line, and then `\\boxed{41}`.
"""

import json
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FEWEST_TERMS, MOST_TERMS, LARGEST_TERM = 3, 5, 99
_HELD_OUT_ONE_IN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """One problem: its terms with their signs. The first is positive."""

    terms: tuple[int, ...]

    @property
    def problem(self) -> str:
        return str(self.terms[0]) + "".join(f"{term:+d}" for term in self.terms[1:])

    @property
    def answer(self) -> str:
        return str(sum(self.terms))

    @property
    def held_out(self) -> bool:
        """Decided by the problem's text alone, so that no choice of seeds makes the two splits overlap."""
        return zlib.crc32(self.problem.encode()) % _HELD_OUT_ONE_IN == 0


def sums(count: int, seed: int, *, held_out: bool) -> list[Sum]:
    """`count` problems of one split; the same for the same seed."""
    rng = random.Random(seed)
    found: list[Sum] = []
    while len(found) < count:
        terms = [rng.randint(1, LARGEST_TERM) for _ in range(rng.randint(FEWEST_TERMS, MOST_TERMS))]
        drawn = Sum(terms=(terms[0], *(term * rng.choice((1, -1)) for term in terms[1:])))
        if drawn.held_out == held_out:
            found.append(drawn)
    return found


def completion(problem: Sum) -> str:
    """The worked answer, every step right."""
    return _worked(problem, slips={})


def wrong_completion(problem: Sum, rng: random.Random) -> str:
    """The worked answer with one slip in a step; the later steps count on from the wrong total."""
    step = rng.randrange(len(problem.terms) - 1)
    return _worked(problem, slips={step: rng.choice((1, 2, 3, 10, 20)) * rng.choice((1, -1))})


def write_jsonl(path: Path, problems: Iterable[Sum]) -> None:
    """One row per problem with the columns `problem` and `answer`."""
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"problem": p.problem, "answer": p.answer}) + "\n" for p in problems)


def _worked(problem: Sum, slips: dict[int, int]) -> str:
    total, *others = problem.terms
    lines = []
    for step, term in enumerate(others):
        result = total + term + slips.get(step, 0)
        lines.append(f"{total}{term:+d}={result}")
        total = result
    return "\n".join([*lines, f"\\boxed{{{total}}}"])
