"""Chat templates: a conversation as one model's tokens, and the tokens that end its turn."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedTokenizerBase

from oprd.data.control import control_tokens, special_tokens
from oprd.errors import DataError
from oprd.types import Message, Rollouts
from oprd.verify.reasoning import left_open

MARK_TOKENS = 16
"""At the end of a prompt; enough for a mark that opens the reasoning there, whatever the tokenizer makes of it."""
_PLACEHOLDER = re.compile(r"(\\[A-Za-z]+)?\{([A-Za-z_]\w*)\}")
"""`{column}`; behind a LaTeX command it may be that command's argument."""


def fill(template: str, columns: Mapping[str, str], *, key: str = "prompt_template") -> str:
    """`template` with each `{column}` replaced. Other braces, such as LaTeX's `\\boxed{}`, stay as they are.

    Raises DataError for a placeholder that is not a column, naming the recipe's `key` of the template.
    """

    def value(match: re.Match[str]) -> str:
        command, name = match.groups(default="")
        if name in columns:
            return command + (f"{{{columns[name]}}}" if command else columns[name])
        if command:
            return match[0]
        known = ", ".join(sorted(columns)) or "no text columns"
        raise DataError(f"{key} asks for {{{name}}}, the dataset has {known} to show")

    return _PLACEHOLDER.sub(value, template)


def with_prompt(
    messages: Sequence[Message], columns: Mapping[str, str], system_prompt: str | None, prompt_template: str | None
) -> tuple[Message, ...]:
    """The conversation with its system message and last user message replaced where these are given."""
    turns = list(messages)
    if prompt_template is not None:
        last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
        if last is None:
            raise DataError("prompt_template replaces the last user message, but the conversation has none")
        turns[last] = Message(role="user", content=fill(prompt_template, columns))
    if system_prompt is not None:
        turns = [turn for turn in turns if turn.role != "system"]
        turns.insert(0, Message(role="system", content=fill(system_prompt, columns, key="system_prompt")))
    return tuple(turns)


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False, letters: bool = False
) -> tuple[int, ...]:
    """The text's token ids; `special` adds the special tokens that the tokenizer puts around plain text, `letters` reads
    those in the text as such."""
    return _encode_all(tokenizer, [text], special=special, letters=letters)[0]


def encode_written(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of what a model wrote. The marks around its reasoning are tokens; other control tokens in it are letters."""
    control = control_tokens(tokenizer)
    hidden = control.hide(text, marks=True)
    return encode(tokenizer, text) if hidden == text else control.encode(hidden)


def _encode_all(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool, letters: bool = False
) -> list[tuple[int, ...]]:
    rows = tokenizer(list(texts), add_special_tokens=special, split_special_tokens=letters)["input_ids"]
    return [tuple(ids) for ids in cast(list[list[int]], rows)]


def refuse_beyond(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], rows: int) -> None:
    """Raise DataError for an id that an embedding of so many rows lacks."""
    if max(ids, default=0) >= rows:
        text = decode(tokenizer, (max(ids),), special=True)
        raise DataError(
            f"{text!r} in the text is token {max(ids)}, but the model's embedding has {rows} rows; drop the row, or "
            "call resize_token_embeddings and save the model"
        )


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = False) -> str:
    """The ids' text, with or without special tokens."""
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=not special))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Token ids of one conversation, as `render_all` makes them."""
    return render_all(tokenizer, [messages], options)[0]


def render_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    options: Mapping[str, Any] | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of each conversation up to where the assistant starts to write; `options` are variables of the chat template.
    Control tokens in a message are letters, but for marks around an assistant's reasoning.

    Without a chat template (base models) the contents are joined by blank lines and tokenized as plain text. Raises DataError
    for an option that the template does not read.
    """
    template = "" if tokenizer.chat_template is None else tokenizer.get_chat_template()
    if unread := [name for name in options or () if not re.search(rf"\b{re.escape(name)}\b", template)]:
        lacks = f"does not read {unread[0]!r}" if template else "does not exist"
        raise DataError(f"chat_template_kwargs gives {unread[0]!r}, but the chat template {lacks}; correct or drop it")
    if template:  # it writes its own special tokens, so none are added a second time
        control = control_tokens(tokenizer)
        hidden = [
            [replace(turn, content=control.hide(turn.content, marks=turn.role == "assistant")) for turn in turns]
            for turns in conversations
        ]
        texts = [_up_to_the_answer(tokenizer, turns, options or {}) for turns in hidden]
        rows = _encode_all(tokenizer, texts, special=False)
        together = zip(conversations, hidden, texts, rows, strict=True)
        return [ids if list(turns) == shown else control.encode(text) for turns, shown, text, ids in together]
    texts = ["\n\n".join(turn.content for turn in turns) for turns in conversations]
    rows = _encode_all(tokenizer, texts, special=True, letters=True)
    # some tokenizers end every text; the student's goes on
    return [ids[:-1] if ids[-1:] == (tokenizer.eos_token_id,) and len(ids) > 1 else ids for ids in rows]


def decode_written(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What a model wrote, with the marks around its reasoning, which may be special tokens too."""
    no_marks = control_tokens(tokenizer).no_marks
    return decode(tokenizer, [i for i in ids if i not in no_marks], special=True)


def opened_reasoning(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str:
    """The mark that a prompt opens the reasoning with; empty where it opens none."""
    return left_open(decode(tokenizer, prompt_ids[-MARK_TOKENS:], special=True))


def texts_to_judge(tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts) -> list[str]:
    """The completions as an answer checker reads them: with the marks of their reasoning, also one that the prompt ends with."""
    prompts = {prompt.token_ids for prompt in rollouts.prompts}
    begun = {ids: opened_reasoning(tokenizer, ids) for ids in prompts}
    return [
        begun[prompt.token_ids] + decode_written(tokenizer, ids)
        for prompt, ids in zip(rollouts.prompts, rollouts.completion_ids, strict=True)
    ]


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> tuple[int, ...]:
    """Every token that ends the assistant's turn: the generation config's (often several), the tokenizer's
    end-of-text, and the first special token the chat template puts after an assistant message."""
    eos = None if generation is None else generation.eos_token_id
    given: list[Any] = eos if isinstance(eos, list) else [eos]
    if odd := [token for token in given if token is not None and (type(token) is not int or token < 0)]:
        raise DataError(f"the generation config's eos_token_id is {odd[0]!r}, which is no token id; correct it")
    named = (*given, tokenizer.eos_token_id, _after_assistant(tokenizer))
    found = {cast(int, token) for token in named if token is not None}
    if not found:
        raise DataError("the tokenizer and the generation config name no stop token; completions would never end")
    return tuple(sorted(found))


def end_of_turn(tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...]) -> int:
    """The stop token that ends an assistant message in text we write ourselves."""
    after_assistant = _after_assistant(tokenizer)
    return after_assistant if after_assistant is not None else stops[-1]


def _after_assistant(tokenizer: PreTrainedTokenizerBase) -> int | None:
    if tokenizer.chat_template is None:
        return None
    special = special_tokens(tokenizer)
    _, behind = _around_an_answer(tokenizer, (Message(role="user", content="1"),), {})
    return next((i for i in encode(tokenizer, behind) if i in special), None)


def _around_an_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any]
) -> tuple[str, str]:
    """What the template writes in front of an answer to the messages, they included, and behind it; nothing where it takes
    none."""
    turns = (*messages, Message(role="assistant", content="1"))
    try:
        before, _, behind = _apply_template(tokenizer, turns, options, add_generation_prompt=False).rpartition("1")
    except DataError:
        return "", ""
    return before, behind


def _up_to_the_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any]
) -> str:
    """The conversation as text, up to where the assistant starts to write. A template without a generation prompt has its
    place in front of an answer, but for space there."""
    text = _apply_template(tokenizer, messages, options, add_generation_prompt=True)
    if "add_generation_prompt" in tokenizer.get_chat_template():
        return text
    before = _around_an_answer(tokenizer, messages, options)[0].rstrip(" ")
    return before if before.startswith(text) and before.strip() != text.strip() else text


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> str:
    """The conversation as text. Raises DataError if the template refuses it or leaves its last message out."""
    refusal: Exception | str = "it leaves the last message out"
    for in_parts in (False, True):  # some templates read a list of parts only
        turns = [
            {"role": turn.role, "content": [{"type": "text", "text": turn.content}] if in_parts else turn.content}
            for turn in messages
        ]
        try:
            text = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except Exception as error:  # a template is a program, which may raise anything
            refusal = refusal if in_parts else error
            continue
        if messages[-1].role == "tool" or messages[-1].content.strip() in cast(str, text):
            return cast(str, text)
    roles = ", ".join(turn.role for turn in messages)
    raise DataError(f"the chat template refuses a conversation of the roles {roles}: {refusal}")
