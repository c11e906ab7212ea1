"""A teacher behind an OpenAI-compatible endpoint: text, and log-probabilities of given tokens where the server has them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, final

import torch
from pydantic import model_validator
from rapidfuzz.distance import Levenshtein
from transformers import PreTrainedTokenizerBase

from oprd.data.chat import decode, encode, encode_written, render
from oprd.data.control import control_tokens
from oprd.errors import ServerError
from oprd.models.loading import PROBE_TEXTS, ModelFacts, tokenizer_difference
from oprd.models.pretrained import load_tokenizer
from oprd.progress import console
from oprd.teacher.base import (
    Chains,
    Generation,
    GenerationRequest,
    Generations,
    Teacher,
    TeacherConfig,
    TeacherContext,
    TeacherFacts,
)
from oprd.teacher.exchange import Request, Response, ServerSection, Tokens
from oprd.types import Capability, LogprobTargets, Message, Metric, Prompt, Rollouts, Taps, Targets

if TYPE_CHECKING:
    from oprd.teacher.transport import Transport

# of the teacher's own text, half of which it is then asked to continue
PROBE_TOKENS = 24
# a continuation whose first so many characters are those of the completion has begun anew
RESTART_CHARACTERS = 12
# above this share of such continuations the run stops
RESTARTED_ALARM = 0.5
# a log-probability below it stands for a probability of 0: servers send -9999 where JSON has no -inf
IMPOSSIBLE = -9000.0
# a log-probability may be above 0 by so much
ROUNDING = 1e-3
BY_TOKEN_ID = (Capability.LOGPROBS, Capability.TOP_K, Capability.SAME_TOKENIZER)


class ServerTeacherConfig(TeacherConfig, ServerSection):
    """A model behind an OpenAI-compatible endpoint. It gives text, and where the server can, log-probabilities."""

    type: Literal["server"] = "server"
    tokenizer: str | None = None
    """Folder or Hub name of the server's tokenizer: for `continuation: completions`, and for log-probabilities."""
    continuation: Literal["completions", "continue_final_message", "prefill"] = "completions"
    """How a completion is continued: the rendered prompt on the raw endpoint, vLLM's flag on the chat endpoint, or a last
    assistant message that the provider continues."""
    many_samples: bool = True
    """Whether one request can ask for several samples (`n`); false sends one request per sample."""
    cache: str | None = None
    """SQLite file of all responses, so that none is paid twice; `teacher_cache.sqlite` in the run folder unless given."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(ServerSection.model_fields) - {"model"} | {"cache"}

    @model_validator(mode="after")
    def _check_continuation(self) -> "ServerTeacherConfig":
        if self.continuation == "completions" and self.tokenizer is None:
            raise ValueError(
                "continuation 'completions' renders the prompt here: give `tokenizer`, the folder or Hub name of the "
                "server's tokenizer, or use 'continue_final_message' or 'prefill'"
            )
        return self

    @property
    def longest_wait_s(self) -> float:
        return self.step_timeout_s

    def cache_bytes(self, tokens: int, logprobs: int) -> int:
        return 0 if self.cache else tokens * max(1, logprobs) * 10  # measured: 9.4 bytes a number, with its token id

    def facts(self, context: TeacherContext) -> TeacherFacts:
        model, why = None, "give `tokenizer`, the folder or Hub name of the server's tokenizer"
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer)
            model = ModelFacts(
                name=self.tokenizer, blocks=0, width=0, vocabulary=len(tokenizer), context=2**31, parameters=0,
                tokenizer=tokenizer, stop_ids=(),
            )  # fmt: skip
            difference = tokenizer_difference(context.student.tokenizer, tokenizer)
            why = "" if difference is None else f"{self.tokenizer} has {difference}"
        why_not = {capability: why for capability in BY_TOKEN_ID if why}
        provides = frozenset({Capability.TEXT, *BY_TOKEN_ID}.difference(why_not))
        return TeacherFacts(provides=provides, why_not=why_not, model=model)

    def build(self, facts: TeacherFacts, context: TeacherContext, name: str = "") -> Teacher:
        from oprd.teacher.transport import Transport  # openai takes a second to import

        # the file in the run folder is this run's alone, wherever the folder is moved
        run = str(context.cache.parent.resolve()) if self.cache else ""
        cache, account = Path(self.cache or context.cache), (run, name, context.rank)
        transport = Transport(self, cache=cache, account=account, world_size=context.world_size, seed=context.seed)
        teacher = ServerTeacher(self, facts, context, transport)
        teacher.check([prompt for prompt in context.prompts if name in {"", prompt.teacher}] or context.prompts)
        return teacher


@final
class ServerTeacher(Teacher):
    """Asks the server for text, and for log-probabilities of the student's tokens if its model has their tokenizer."""

    def __init__(
        self, config: ServerTeacherConfig, facts: TeacherFacts, context: TeacherContext, transport: "Transport"
    ) -> None:
        self._config, self._transport, self._needs, self._device = config, transport, context.needs, context.device
        # None only where nothing asks for it
        self._tokenizer = cast(PreTrainedTokenizerBase, facts.model and facts.model.tokenizer)
        self._vocabulary = context.student.vocabulary
        self._control = control_tokens((facts.model or context.student).tokenizer)
        self._plausible, self._impossible = False, 0
        self._restarted, self._continued = 0, 0

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Request a little of what will be needed. Raises ServerError when the server cannot give it."""
        needs = self._needs
        if needs.logprobs:
            ids = encode(self._tokenizer, PROBE_TEXTS[0])
            advice = (
                "It was asked for `prompt_logprobs`. If it refuses that, use a server that has them (vLLM) and allows as many "
                f"as asked for: objective.k is {needs.top_k}, vLLM's --max-logprobs is 20 unless set higher"
            )
            response = self._transport.probe(self._logprobs_request(ids[:1], ids[1:]), advice=advice)
            self._read_logprobs(response, ids[:1], ids[1:])
        typed = (p for p in prompts if self._control.typed(*(turn.content for turn in p.teacher_messages)))
        if needs.text and self._config.continuation != "completions" and (prompt := next(typed, None)):
            console.print(
                f"Row {prompt.row} has the letters of a control token. The server renders conversations itself and may read "
                "them as the token, which can end a turn; drop such rows, or use continuation 'completions'.",
                style="yellow",
            )
        if needs.text:
            messages = prompts[0].teacher_messages
            question = GenerationRequest(messages=messages, max_new_tokens=PROBE_TOKENS, temperature=0.0)
            samples = 2 if needs.continues and self._config.many_samples else 1
            self._probe_text(replace(question, samples=samples, max_new_tokens=4, temperature=1.0))
            if needs.continues:
                self._check_continues(question)

    def annotate(self, rollouts: Rollouts) -> Rollouts:
        """Rollouts with the log-probabilities of every completion; what the server lost or calls impossible has weight 0."""
        if not self._needs.logprobs:
            return rollouts
        pairs = [(p.teacher_token_ids, ids) for p, ids in zip(rollouts.prompts, rollouts.completion_ids, strict=True)]
        rows = self._transport.send([[self._logprobs_request(*pair)] if pair[1] else [] for pair in pairs])
        given = rollouts.token_weights or tuple((1.0,) * length for length in rollouts.lengths)
        targets, weights, known = [], [], []
        for (prompt_ids, ids), row, own in zip(pairs, rows, given, strict=True):
            if row and row[0] is not None:
                read = self._read_logprobs(row[0], prompt_ids, ids)
                # a probability of 0, which no loss can use: the token is left out
                possible = (torch.cat((read.sampled[:, None], read.top_logprobs), dim=1) > IMPOSSIBLE).all(1)
                read = replace(
                    read,
                    sampled=read.sampled.masked_fill(~possible, 0.0),
                    top_logprobs=read.top_logprobs.masked_fill(~possible[:, None], 0.0),
                )
                self._impossible += int((~possible).sum())
                targets.append(read)
                known.append(read.sampled[possible])
                weights.append(tuple(w * yes for w, yes in zip(own, possible.tolist(), strict=True)))
            else:
                targets.append(self._targets([0.0] * len(ids), [[(0, 0.0)] * self._needs.top_k] * len(ids)))
                weights.append((0.0,) * len(ids))
        self._check_plausible(known)
        return replace(rollouts, logprobs=tuple(targets), token_weights=tuple(weights))

    def targets(self, rollouts: Rollouts, taps: Taps) -> Targets:
        if rollouts.logprobs is None:
            return Targets()
        names = ("sampled", "top_ids", "top_logprobs")
        joined = {name: torch.cat([getattr(x, name) for x in rollouts.logprobs]).to(self._device) for name in names}
        return Targets(logprobs=LogprobTargets(**joined))

    def generate(self, chains: Chains) -> Generations:
        # a server without `n` gets as many chains side by side as samples; one lost sample loses the request
        copies = [1 if self._config.many_samples or not chain else chain[0].samples for chain in chains]
        rows = [
            [self._text_request(replace(request, samples=request.samples // n)) for request in chain]
            for chain, n in zip(chains, copies, strict=True)
            for _ in range(n)
        ]
        sent = iter(self._transport.send(rows))
        generations = [
            [_generation(parts) for parts in zip(*(next(sent) for _ in range(n)), strict=True)] for n in copies
        ]
        self._look_for_restarts(chains, generations)
        return generations

    def metrics(self) -> tuple[Metric, ...]:
        found = [*self._transport.metrics()]
        if self._needs.logprobs:
            found.append(Metric(name="teacher/impossible_tokens/sum", sum=float(self._impossible)))
        if self._needs.text:
            share = Metric(name="teacher/restarted/share", sum=float(self._restarted), count=float(self._continued))
            found.append(share)
        self._restarted, self._continued, self._impossible = 0, 0, 0
        return tuple(found)

    def _text_request(self, request: GenerationRequest) -> Request:
        sampling = {"n": request.samples} if request.samples > 1 else {}
        sampling |= {"max_tokens": request.max_new_tokens, "temperature": request.temperature, "top_p": 1.0}
        most = request.samples * request.max_new_tokens
        if self._config.continuation == "completions":
            prompt, tokens = self._raw_prompt(request)
            body: dict[str, Any] = {"prompt": prompt} | sampling
            return Request(endpoint="completions", body=body, samples=request.samples, upper_bound=Tokens(tokens, most))
        begun = [Message(role="assistant", content=request.prefix)] if request.prefix else []
        turns = [*request.messages, *begun]
        body = {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]} | sampling
        if begun and self._config.continuation == "continue_final_message":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if self._config.chat_template_kwargs:
            body["chat_template_kwargs"] = self._config.chat_template_kwargs
        # no tokenizer makes more tokens than the text has bytes; templates add some to each turn
        bound = Tokens(sum(len(turn.content.encode()) + 32 for turn in turns) + 32, most)
        return Request(endpoint="chat/completions", body=body, samples=request.samples, upper_bound=bound)

    def _raw_prompt(self, request: GenerationRequest) -> tuple[str | list[int], int]:
        """The rendered conversation with the prefix behind it, and its number of tokens. As text, but as ids where it has the
        letters of a control token, which a server would read as the token."""
        ids = render(self._tokenizer, request.messages, self._config.chat_template_kwargs)
        begun, begin = encode_written(self._tokenizer, request.prefix), encode(self._tokenizer, "", special=True)[:1]
        if self._control.typed(*(turn.content for turn in request.messages), request.prefix):
            return [*ids, *begun], len(ids) + len(begun)
        # servers add the beginning-of-text token to a text
        plain = ids[1:] if begin and ids[:1] == begin else ids
        return decode(self._tokenizer, plain, special=True) + request.prefix, len(ids) + len(begun)

    def _probe_text(self, request: GenerationRequest) -> str:
        return self._transport.probe(self._text_request(request), advice="Look at the server's log").texts[0]

    def _check_continues(self, question: GenerationRequest) -> None:
        """Give the first half of the teacher's own text back to it: it should continue with the second half."""
        whole = self._probe_text(question)
        half = len(whole) // 2
        if half < RESTART_CHARACTERS:
            return  # too short a text to tell
        again = self._probe_text(replace(question, prefix=whole[:half]))[:half]
        anew = Levenshtein.normalized_similarity(again, whole[:half])
        if anew > max(Levenshtein.normalized_similarity(again, whole[half : 2 * half]), 0.5):
            raise ServerError(self._begins_anew("its own text, given back to it by half"))

    def _look_for_restarts(self, chains: Chains, generations: Generations) -> None:
        pairs = [pair for rows in zip(chains, generations, strict=True) for pair in zip(*rows, strict=True)]
        known = [(r.prefix, g.texts) for r, g in pairs if g is not None and len(r.prefix) >= 2 * RESTART_CHARACTERS]
        anew = [text.startswith(prefix[:RESTART_CHARACTERS]) for prefix, texts in known for text in texts]
        self._continued += len(anew)
        self._restarted += sum(anew)
        if sum(anew) > max(RESTARTED_ALARM * len(anew), 10):
            raise ServerError(self._begins_anew(f"{sum(anew)} of {len(anew)} completions of this step"))

    def _begins_anew(self, what: str) -> str:
        others = {"completions", "continue_final_message", "prefill"} - {self._config.continuation}
        return (
            f"{self._config.base_url}: the teacher begins anew instead of continuing {what}, with continuation="
            f"{self._config.continuation!r}. Use another one: {', '.join(sorted(others))}"
        )

    def _logprobs_request(self, prompt_ids: tuple[int, ...], ids: tuple[int, ...]) -> Request:
        # one token is generated because servers insist on it; it is not looked at
        sent, k = [*prompt_ids, *ids], max(1, self._needs.top_k)
        body: dict[str, Any] = {"prompt": sent, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}
        return Request(endpoint="completions", body=body, samples=1, upper_bound=Tokens(len(sent), 1))

    def _read_logprobs(self, response: Response, prompt_ids: tuple[int, ...], ids: tuple[int, ...]) -> LogprobTargets:
        """Log-probabilities of `ids`, which were sent behind `prompt_ids`.

        Raises ServerError when the server's ids are others, which would train on nonsense without any error.
        """
        url, k = self._config.base_url, self._needs.top_k
        try:
            given = cast(list[dict[str, float] | None], response.logprobs)[len(prompt_ids) :][: len(ids)]
            rows = [{int(i): x for i, x in (row or {}).items()} for row in given]
        except (TypeError, ValueError):
            raise ServerError(f"{url} does not answer `prompt_logprobs` as vLLM does; use a server that does") from None
        wrong = [token for token, row in zip(ids, rows, strict=False) if token not in row]
        if any(not x <= ROUNDING for row in rows for x in row.values()):
            raise ServerError(f"{url} gives log-probabilities that are not numbers or are above 0; it is broken")
        if strange := [i for row in rows for i in row if not 0 <= i < self._vocabulary]:
            raise ServerError(
                f"{url} gives token id {strange[0]}; the student's vocabulary ends at {self._vocabulary - 1}"
            )
        if wrong or len(rows) != len(ids):
            token = wrong[0] if wrong else ids[0]
            piece = self._tokenizer.convert_ids_to_tokens([token])
            raise ServerError(
                f"{url} answers for other token ids than were sent (id {token}, {piece}, is not among those at its place): "
                f"its model {self._config.model!r} has another tokenizer than {self._config.tokenizer}, or cuts prompts"
            )
        tops = [sorted(row.items(), key=lambda item: -item[1])[:k] for row in rows]
        if any(len(top) < k for top in tops):
            raise ServerError(
                f"{url} gives fewer than objective.k={k} log-probabilities a token; start vLLM with a higher "
                "--max-logprobs, or lower k"
            )
        return self._targets([row[token] for token, row in zip(ids, rows, strict=True)], tops)

    def _targets(self, sampled: list[float], tops: list[list[tuple[int, float]]]) -> LogprobTargets:
        shape = (len(sampled), self._needs.top_k)
        return LogprobTargets(
            sampled=torch.tensor(sampled),
            top_ids=torch.tensor([[i for i, _ in top] for top in tops], dtype=torch.long).view(shape),
            top_logprobs=torch.tensor([[x for _, x in top] for top in tops]).view(shape),
        )

    def _check_plausible(self, sampled: Sequence[torch.Tensor]) -> None:
        """Once: a teacher that finds the completions less probable than random tokens was given other ones."""
        if self._plausible or not sampled:
            return
        self._plausible = True
        mean, random = float(torch.cat(list(sampled)).mean()), -math.log(len(self._tokenizer))
        if mean < random:
            raise ServerError(
                f"{self._config.base_url}: the completions of the first step have a mean log-probability of {mean:.2f} nats "
                f"a token; random tokens would have {random:.2f}. The server scores other tokens than were sent, or the "
                "teacher does not know this kind of text at all"
            )


def _generation(responses: Sequence[Response | None]) -> Generation | None:
    """All samples of one request; None when one was lost."""
    known = [response for response in responses if response is not None]
    if len(known) < len(responses):
        return None
    return Generation(
        texts=tuple(text for response in known for text in response.texts),
        finished=tuple(finished for response in known for finished in response.finished),
        tokens=sum(response.used.completion for response in known),
    )
