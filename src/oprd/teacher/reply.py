"""One request to a server, and its reply: whole and well-formed, or not a reply at all."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

ENDED = frozenset({"stop", "stop_sequence", "eos", "eos_token", "end_turn"})
CUT = frozenset({"length", "max_tokens", "model_length"})
"""`finish_reason` of a text that the model ended, and of one that a limit cut. Any other one loses the reply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request."""

    endpoint: Literal["completions", "chat"]
    body: Mapping[str, Any]
    """As JSON, without the model's name."""
    samples: int
    """Choices the reply must have."""
    most_prompt_tokens: int
    """An upper bound, for the budget."""
    most_completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of a reply's answers."""

    text: str
    finished: bool
    """False: cut at the length limit, or maybe cut."""
    logprobs: Any
    """As the server gave them: `prompt_logprobs`, or `logprobs` of an echoed prompt; None if not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole and well-formed reply."""

    choices: tuple[Choice, ...]
    prompt_tokens: int
    completion_tokens: int


class BadReplyError(Exception):
    """The server answered with something that is not the asked-for reply. The tokens are those it says it used."""

    def __init__(self, what: str, *, prompt_tokens: int = 0, completion_tokens: int = 0, final: bool = False) -> None:
        super().__init__(what)
        self.final = final
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens


def read_reply(text: str, call: Call) -> Reply:
    """Raises BadReplyError for anything but the whole reply that was asked for."""
    try:
        reply = json.loads(text)
        texts = [_read_text(choice, call) for choice in reply["choices"]]
        usage = reply.get("usage") or {}
        prompt = int(usage.get("prompt_tokens", call.most_prompt_tokens))
        completion = int(usage.get("completion_tokens", call.most_completion_tokens))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadReplyError("a reply that is not the JSON it should be") from None
    bad = partial(BadReplyError, prompt_tokens=prompt, completion_tokens=completion)
    choices = reply["choices"]
    if not choices:
        raise bad("an empty reply")
    if len(choices) != call.samples:
        advice = "; set many_samples: false if the server takes no `n`" if len(choices) == 1 else ""
        raise bad(f"{len(choices)} samples for the {call.samples} asked for{advice}")
    if completion > call.most_completion_tokens:
        raise bad(f"a longer reply than asked for ({completion} tokens)")
    reasons = [None if (reason := choice.get("finish_reason")) is None else str(reason) for choice in choices]
    other = next((reason for reason in reasons if reason is not None and reason not in ENDED | CUT), None)
    if other is not None:
        raise bad(f"a reply that neither ended nor was cut (finish_reason {other!r})", final=True)
    # without a reason, a lone text shorter than the limit was not cut by it; of several, nobody knows which one is short
    ended = len(choices) == 1 and completion < call.most_completion_tokens
    # vLLM answers an echo in both forms
    form = "prompt_logprobs" if "prompt_logprobs" in call.body else "logprobs"
    return Reply(
        choices=tuple(
            Choice(text=text, finished=ended if reason is None else reason in ENDED, logprobs=choice.get(form))
            for choice, text, reason in zip(choices, texts, reasons, strict=True)
        ),
        prompt_tokens=prompt,
        completion_tokens=completion,
    )


def _read_text(choice: Mapping[str, Any], call: Call) -> str:
    text = choice["text"] if call.endpoint == "completions" else choice["message"]["content"] or ""
    if not isinstance(text, str):
        raise TypeError(text)
    return text
