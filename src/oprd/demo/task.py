"""The miniature's task: signed sums of three to five numbers, worked out step by step.

`12+34-5` is answered by the running totals `12+34=46` and `46-5=41`, one a line, and then `\\boxed{41}`.
"""

import json
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


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
        """True of one in eight. The split depends on the problem's text alone: the two never overlap, whatever the seeds."""
        return zlib.crc32(self.problem.encode()) % 8 == 0


def sums(count: int, seed: int, *, held_out: bool) -> list[Sum]:
    """`count` problems of one split; the same for the same seed."""
    rng = random.Random(seed)
    found: list[Sum] = []
    while len(found) < count:
        terms = [rng.randint(1, 99) for _ in range(rng.randint(3, 5))]
        drawn = Sum(terms=(terms[0], *(term * rng.choice((1, -1)) for term in terms[1:])))
        if drawn.held_out == held_out:
            found.append(drawn)
    return found


def completion(problem: Sum, *, wrong_step: int | None = None, slip: int = 0) -> str:
    """The worked answer. One step may be wrong by `slip`; the later ones continue from the wrong total."""
    total, *others = problem.terms
    lines = []
    for step, term in enumerate(others):
        result = total + term + (slip if step == wrong_step else 0)
        lines.append(f"{total}{term:+d}={result}")
        total = result
    return "\n".join([*lines, f"\\boxed{{{total}}}"])


def wrong_completion(problem: Sum, rng: random.Random) -> str:
    """The worked answer with one wrong step."""
    step = rng.randrange(len(problem.terms) - 1)
    return completion(problem, wrong_step=step, slip=rng.choice((1, 2, 3, 10, 20)) * rng.choice((1, -1)))


def write_jsonl(path: Path, problems: Iterable[Sum]) -> None:
    """One row per problem with the columns `problem` and `answer`."""
    rows = ({"problem": problem.problem, "answer": problem.answer} for problem in problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
