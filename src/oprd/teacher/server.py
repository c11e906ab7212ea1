"""A teacher behind an OpenAI-compatible endpoint: text, and log-probabilities of given tokens where the server has them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from transformers import PreTrainedTokenizerBase

from oprd.config.models import ServerTeacherConfig
from oprd.data.chat import decode, encode, render, with_prompt
from oprd.errors import ServerError
from oprd.models import PROBE_TEXTS
from oprd.teacher.base import Teacher
from oprd.teacher.client import Client
from oprd.teacher.reply import Call, Reply
from oprd.teacher.similarity import edit_similarity
from oprd.teacher.writer import Ask, Writer, Written
from oprd.types import (
    JointTargets,
    Lost,
    Message,
    Prompt,
    Reading,
    Rollouts,
    SampledTargets,
    ServedLogprobs,
    Tally,
    TeacherTargets,
    TopKTargets,
)

PROBE_TOKENS = 24
"""Of the teacher's own answer, half of which it is then asked to continue."""
RESTARTED_ALARM = 0.5
"""Above this share of continuations that repeat the beginning of the answer instead of going on, the run stops."""
RESTART_CHARACTERS = 12
"""A continuation whose first so many characters are those of the answer it was to continue has begun anew."""


@final
class ServerWriter(Writer):
    """Asks the server for text. `tokenizer` is the server's, for `continuation: completions`."""

    def __init__(self, config: ServerTeacherConfig, client: Client, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.system_prompt = config.system_prompt
        self.prompt_template = config.prompt_template
        self._config = config
        self._client = client
        self._tokenizer = tokenizer
        self._restarted, self._continued = 0, 0

    def check(self, prompt: Prompt, *, continues: bool) -> None:
        """Ask a little before anything is loaded. Raises ServerError when the server does not answer, and for a writer that
        `continues`, when it gives one sample for several or begins its answer anew instead of going on with one."""
        question = Ask(messages=self.conversation(prompt), max_tokens=PROBE_TOKENS, temperature=0.0)
        samples = 2 if continues and self._config.many_samples else 1
        self._probe(replace(question, samples=samples, max_tokens=4, temperature=1.0))
        if continues:
            self._check_continues(question)

    def write(self, chains: Sequence[Sequence[Ask]]) -> list[list[Written | None]]:
        if self._config.many_samples:
            replies = self._client.send([[self._call(ask) for ask in chain] for chain in chains])
        else:
            replies = self._one_by_one(chains)
        written = [[_written(reply) for reply in row] for row in replies]
        self._look_for_restarts(chains, written)
        return written

    def tallies(self) -> tuple[Tally, ...]:
        return (
            *self._client.tallies(),
            Tally(name="teacher/restarted/share", total=self._restarted, of=float(self._continued)),
        )

    def _one_by_one(self, chains: Sequence[Sequence[Ask]]) -> list[list[Reply | None]]:
        """A server without `n`: as many chains side by side as samples; one lost sample loses the question."""
        rows = [
            [self._call(replace(ask, samples=1)) for ask in chain if at < ask.samples]
            for chain in chains
            for at in range(max((ask.samples for ask in chain), default=0))
        ]
        got = iter(self._client.send(rows))
        replies: list[list[Reply | None]] = []
        for chain in chains:
            columns = [iter(next(got)) for _ in range(max((ask.samples for ask in chain), default=0))]
            replies.append([_join([next(column) for column in columns[: ask.samples]]) for ask in chain])
        return replies

    def _call(self, ask: Ask) -> Call:
        sampling = {"n": ask.samples} if ask.samples > 1 else {}
        sampling |= {"max_tokens": ask.max_tokens, "temperature": ask.temperature, "top_p": 1.0}
        most = ask.samples * ask.max_tokens
        if self._config.continuation == "completions":
            assert self._tokenizer is not None
            prompt = self._rendered(ask)
            body: dict[str, Any] = {"prompt": prompt} | sampling
            return Call(
                endpoint="completions",
                body=body,
                samples=ask.samples,
                most_prompt_tokens=len(encode(self._tokenizer, prompt, special=True)),
                most_completion_tokens=most,
            )
        turns = [*ask.messages, *([Message(role="assistant", content=ask.prefix)] if ask.prefix else [])]
        body = {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]} | sampling
        if ask.prefix and self._config.continuation == "continue_final_message":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        # no tokenizer makes more tokens than the text has bytes; templates add some to each turn
        bound = sum(len(turn.content.encode()) + 32 for turn in turns) + 32
        return Call(
            endpoint="chat",
            body=body,
            samples=ask.samples,
            most_prompt_tokens=bound,
            most_completion_tokens=most,
        )

    def _rendered(self, ask: Ask) -> str:
        """The prompt as text, without the beginning of text that servers put before what they get."""
        assert self._tokenizer is not None
        ids = render(self._tokenizer, ask.messages)
        added = encode(self._tokenizer, "", special=True)
        begins = bool(added) and ids[:1] == added[:1]
        return decode(self._tokenizer, ids[1:] if begins else ids, special=True) + ask.prefix

    def _probe(self, ask: Ask) -> str:
        """The first sample of an answer."""
        return self._client.probe(self._call(ask), advice="Look at the server's log").choices[0].text

    def _check_continues(self, question: Ask) -> None:
        """Give the first half of the teacher's own answer back to it: it should go on with the second half."""
        whole = self._probe(question)
        half = len(whole) // 2
        if half < RESTART_CHARACTERS:
            return  # too short an answer to tell
        again = self._probe(replace(question, prefix=whole[:half]))
        anew, on = edit_similarity(again[:half], [whole[:half], whole[half : 2 * half]])
        if anew > on and anew > 0.5:
            raise ServerError(self._begins_anew("its own answer, given back to it by half"))

    def _look_for_restarts(self, chains: Sequence[Sequence[Ask]], written: Sequence[Sequence[Written | None]]) -> None:
        pairs = [
            (ask.prefix[:RESTART_CHARACTERS], text)
            for chain, row in zip(chains, written, strict=True)
            for ask, answer in zip(chain, row, strict=True)
            if answer is not None and len(ask.prefix) >= 2 * RESTART_CHARACTERS
            for text in answer.texts
        ]
        self._continued = len(pairs)
        self._restarted = sum(text.startswith(beginning) for beginning, text in pairs)
        if self._restarted > max(RESTARTED_ALARM * self._continued, 10):
            raise ServerError(self._begins_anew(f"{self._restarted} of {self._continued} answers of this step"))

    def _begins_anew(self, what: str) -> str:
        others = {"completions", "continue_final_message", "prefill"} - {self._config.continuation}
        return (
            f"{self._config.base_url}: the teacher begins anew instead of continuing {what}, with continuation="
            f"{self._config.continuation!r}. Use another one: {', '.join(sorted(others))}"
        )


@final
class ServerTeacher(Teacher):
    """Log-probabilities of the student's tokens, from a server whose model has the student's tokenizer.

    `top_k`: how many of the teacher's most probable tokens are asked for at every position; 0 for the sampled ones alone.
    """

    provides = frozenset({SampledTargets, TopKTargets})

    def __init__(
        self,
        config: ServerTeacherConfig,
        client: Client,
        tokenizer: PreTrainedTokenizerBase,
        *,
        top_k: int,
        device: torch.device,
    ) -> None:
        self._config = config
        self._client = client
        self._tokenizer = tokenizer
        self._top_k = top_k
        self._device = device
        self._checked = False

    def check(self) -> None:
        """Raise ServerError unless the server's ids mean what the tokenizer says, and it gives as many as asked for."""
        ids = encode(self._tokenizer, PROBE_TEXTS[0])
        advice = (
            f"It was asked for log-probabilities by {self._config.logprobs!r}. If it refuses that, use a server that has "
            f"them (vLLM) and allows as many as asked for: objective.top_k is {self._top_k}, vLLM's --max-logprobs is 20 "
            "unless set higher"
        )
        reply = self._client.probe(self._call((), ids), advice=advice)
        self._read(reply, 0, ids)

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            self._prompt_ids(prompt)

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        calls = [
            [self._call(self._prompt_ids(prompt), ids)] if ids else []
            for prompt, ids in zip(rollouts.prompts, rollouts.completion_ids, strict=True)
        ]
        replies = self._client.send(calls)
        answers: list[ServedLogprobs | Lost] = []
        for prompt, ids, row in zip(rollouts.prompts, rollouts.completion_ids, replies, strict=True):
            if not ids:
                answers.append(_nothing(0, self._top_k))
            elif row[0] is None:
                answers.append(Lost(reason="no reply"))
            else:
                answers.append(self._read(row[0], len(self._prompt_ids(prompt)), ids))
        self._check_plausible(answers)
        return replace(rollouts, answers=tuple(answers))

    def tallies(self) -> tuple[Tally, ...]:
        return self._client.tallies()

    def targets(self, rollouts: Rollouts, readings: Iterable[Reading], *, head: bool) -> TeacherTargets:
        answers = [
            answer if isinstance(answer, ServedLogprobs) else _nothing(length, self._top_k)
            for answer, length in zip(rollouts.answers or (), rollouts.lengths, strict=True)
        ]
        sampled = SampledTargets(logprobs=torch.cat([a.sampled for a in answers]).to(self._device))
        if not self._top_k:
            return sampled
        top = TopKTargets(
            ids=torch.cat([a.top_ids for a in answers]).to(self._device),
            logprobs=torch.cat([a.top_logprobs for a in answers]).to(self._device),
        )
        return JointTargets(parts=(sampled, top))

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        turns = with_prompt(prompt.messages, prompt.columns, self._config.system_prompt, self._config.prompt_template)
        return render(self._tokenizer, turns)

    def _call(self, prompt_ids: tuple[int, ...], ids: tuple[int, ...]) -> Call:
        # one token is generated because servers insist on it; it is not looked at
        body: dict[str, Any] = {"prompt": [*prompt_ids, *ids], "max_tokens": 1, "temperature": 1.0}
        k = max(1, self._top_k)
        if self._config.logprobs == "prompt_logprobs":
            body |= {"prompt_logprobs": k}
        else:
            body |= {"echo": True, "logprobs": k, "return_tokens_as_token_ids": True}
        return Call(
            endpoint="completions",
            body=body,
            samples=1,
            most_prompt_tokens=len(body["prompt"]),
            most_completion_tokens=1,
        )

    def _read(self, reply: Reply, start: int, ids: tuple[int, ...]) -> ServedLogprobs:
        """Log-probabilities of `ids`, which stand at `start` of the prompt that was sent.

        Raises ServerError when the server's ids are others, which would train on nonsense without any error.
        """
        given = reply.choices[0].logprobs
        try:
            rows = _rows(given, self._config.logprobs)[start : start + len(ids)]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ServerError(
                f"{self._config.base_url} has no log-probabilities of prompts in the form of {self._config.logprobs!r}; "
                "set logprobs to the other form, or use a server that has them"
            ) from None
        if not start:
            # nothing predicts the first token of all
            rows = [{ids[0]: 0.0}, *rows[1:]] if rows else rows
        wrong = next((i for i, (token, row) in enumerate(zip(ids, rows, strict=False)) if token not in row), None)
        if len(rows) != len(ids) or wrong is not None:
            at = wrong or 0
            piece = self._tokenizer.convert_ids_to_tokens([ids[at]])
            raise ServerError(
                f"{self._config.base_url} answers for other token ids than were sent (id {ids[at]}, {piece}, is not among "
                f"those at its place): its model {self._config.model!r} has another tokenizer than "
                f"{self._config.tokenizer}, or cuts prompts"
            )
        tops = [sorted(row.items(), key=lambda item: -item[1])[: self._top_k] for row in rows]
        if start and any(len(top) < self._top_k for top in tops):
            raise ServerError(
                f"{self._config.base_url} gives fewer than objective.top_k={self._top_k} log-probabilities a token; "
                "start vLLM with a higher --max-logprobs, or lower top_k"
            )
        if not start:
            tops = [[(0, 0.0)] * self._top_k] * len(ids)
        return ServedLogprobs(
            sampled=torch.tensor([row[token] for token, row in zip(ids, rows, strict=True)]),
            top_ids=torch.tensor([[i for i, _ in top] for top in tops], dtype=torch.long).view(len(ids), self._top_k),
            top_logprobs=torch.tensor([[x for _, x in top] for top in tops]).view(len(ids), self._top_k),
        )

    def _check_plausible(self, answers: Sequence[ServedLogprobs | Lost]) -> None:
        """Once: a teacher that finds the completions less probable than random tokens has been asked about others."""
        known = [answer.sampled for answer in answers if isinstance(answer, ServedLogprobs)]
        if self._checked or not known:
            return
        self._checked = True
        mean = float(torch.cat(known).mean())
        random = -float(torch.tensor(len(self._tokenizer)).log())
        if mean < random:
            raise ServerError(
                f"{self._config.base_url}: the completions of the first step have a mean log-probability of {mean:.2f} nats "
                f"a token; random tokens would have {random:.2f}. The server scores other tokens than were sent, or the "
                "teacher does not know this kind of text at all"
            )


def _rows(given: Any, form: str) -> list[Mapping[int, float]]:
    """Log-probabilities by token id at every position of the prompt; none at the first."""
    if form == "prompt_logprobs":
        return [{int(i): float(entry["logprob"]) for i, entry in (row or {}).items()} for row in given]
    tokens = [int(token.removeprefix("token_id:")) for token in given["tokens"]]
    rows = []
    for token, logprob, top in zip(tokens, given["token_logprobs"], given["top_logprobs"], strict=True):
        row = {int(t.removeprefix("token_id:")): float(x) for t, x in (top or {}).items()}
        rows.append(row if logprob is None else row | {token: float(logprob)})
    return rows


def _nothing(length: int, top_k: int) -> ServedLogprobs:
    """Stands in where nothing is known and nothing has weight."""
    return ServedLogprobs(
        sampled=torch.zeros(length),
        top_ids=torch.zeros(length, top_k, dtype=torch.long),
        top_logprobs=torch.zeros(length, top_k),
    )


def _written(reply: Reply | None) -> Written | None:
    if reply is None:
        return None
    return Written(
        texts=tuple(choice.text for choice in reply.choices),
        finished=tuple(choice.finished for choice in reply.choices),
        tokens=reply.completion_tokens,
    )


def _join(replies: Sequence[Reply | None]) -> Reply | None:
    """Several samples of one question; None when one was lost."""
    known = [reply for reply in replies if reply is not None]
    if len(known) < len(replies):
        return None
    return Reply(
        choices=tuple(choice for reply in known for choice in reply.choices),
        prompt_tokens=sum(reply.prompt_tokens for reply in known),
        completion_tokens=sum(reply.completion_tokens for reply in known),
    )
