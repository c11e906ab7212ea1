"""What is kept of a server's answers, and what was spent on them: one SQLite file, over all starts of a run."""

import json
import sqlite3
from typing import Any

from oprd.config.models import ServerTeacherConfig
from oprd.teacher.reply import Choice, Reply

BUDGETS = ("max_requests", "max_tokens", "max_cost")


class Book:
    """The cache file: answers by key, and what each run has spent on each teacher in each process."""

    def __init__(self, database: sqlite3.Connection, account: tuple[str, str, int]) -> None:
        self._database = database
        self._account = account
        database.execute("PRAGMA journal_mode=WAL")
        with database:
            database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
            database.execute(
                "CREATE TABLE IF NOT EXISTS accounts (run TEXT, teacher TEXT, rank INTEGER, requests INTEGER NOT NULL, "
                "prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, PRIMARY KEY (run, teacher, rank))"
            )
            database.execute("INSERT OR IGNORE INTO accounts VALUES (?, ?, ?, 0, 0, 0)", account)

    def find(self, key: str) -> Reply | None:
        row = self._database.execute("SELECT reply FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else _reply_from(json.loads(row[0]))

    def spent(self) -> tuple[int, int, int]:
        """Requests, prompt tokens and completion tokens of this process, over all its starts."""
        return self._sums("run = ? AND teacher = ? AND rank = ?", self._account)

    def spent_by_all(self) -> tuple[int, int, int]:
        """The same of all processes that this run ever had."""
        return self._sums("run = ? AND teacher = ?", self._account[:2])

    def _sums(self, which: str, values: tuple[str | int, ...]) -> tuple[int, int, int]:
        columns = "SUM(requests), SUM(prompt_tokens), SUM(completion_tokens)"
        return self._database.execute(f"SELECT {columns} FROM accounts WHERE {which}", values).fetchone()

    def spend(self, *, requests: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        with self._database:
            self._spend(requests, prompt_tokens, completion_tokens)

    def charge(self, reply: Reply, *, store_as: str | None) -> None:
        """Charge an answer's tokens and keep it under its key if it has one, both or neither."""
        choices = [[c.text, c.finished, c.logprobs] for c in reply.choices]
        text = json.dumps([choices, reply.prompt_tokens, reply.completion_tokens])
        with self._database:
            if store_as is not None:
                self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (store_as, text))
            self._spend(0, reply.prompt_tokens, reply.completion_tokens)

    def _spend(self, requests: int, prompt_tokens: int, completion_tokens: int) -> None:
        self._database.execute(
            "UPDATE accounts SET requests = requests + ?, prompt_tokens = prompt_tokens + ?, "
            "completion_tokens = completion_tokens + ? WHERE run = ? AND teacher = ? AND rank = ?",
            (requests, prompt_tokens, completion_tokens, *self._account),
        )


def _reply_from(row: Any) -> Reply:
    choices, prompt_tokens, completion_tokens = row
    return Reply(
        choices=tuple(Choice(text=text, finished=finished, logprobs=logprobs) for text, finished, logprobs in choices),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )


def limits_of(config: ServerTeacherConfig, book: Book, processes: int) -> tuple[float | None, ...]:
    """How much of each budget this process may have spent: what it has, and an equal part of what is left for all, so that
    none has to know what the others spend from here on."""
    budgets = (config.max_requests, config.max_tokens, config.max_cost)
    everyone, own = amounts(config, *book.spent_by_all()), amounts(config, *book.spent())
    return tuple(
        None if budget is None else mine + (budget - spent) / processes
        for budget, spent, mine in zip(budgets, everyone, own, strict=True)
    )


def amounts(
    config: ServerTeacherConfig, requests: int, prompt_tokens: int, completion_tokens: int
) -> tuple[float, float, float]:
    """In the units of BUDGETS."""
    return requests, prompt_tokens + completion_tokens, cost_of(config, prompt_tokens, completion_tokens)


def cost_of(config: ServerTeacherConfig, prompt_tokens: int, completion_tokens: int) -> float:
    return (
        prompt_tokens * config.price_per_million_prompt_tokens
        + completion_tokens * config.price_per_million_completion_tokens
    ) / 1e6
