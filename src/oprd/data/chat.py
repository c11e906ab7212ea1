"""Chat templates: a conversation as the tokens one model reads, and the tokens that end its turn."""

import re
from collections.abc import Mapping, Sequence

from transformers import GenerationConfig, PreTrainedTokenizerBase

from oprd.errors import DataError
from oprd.types import Message

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


def fill(template: str, columns: Mapping[str, str]) -> str:
    """`template` with each `{column}` replaced. Other braces, such as LaTeX's `\\boxed{}`, stay as they are.

    Raises DataError for a placeholder that is not a column.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in columns:
            raise DataError(
                f"prompt_template asks for {{{match[1]}}}, the dataset has {', '.join(sorted(columns)) or 'no text columns'}"
            )
        return columns[match[1]]

    return _PLACEHOLDER.sub(value, template)


def with_prompt(
    messages: Sequence[Message], columns: Mapping[str, str], system_prompt: str | None, prompt_template: str | None
) -> tuple[Message, ...]:
    """The conversation with its system message and last user message replaced where asked."""
    turns = list(messages)
    if prompt_template is not None:
        last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
        if last is None:
            raise DataError("prompt_template replaces the last user message, but the conversation has none")
        turns[last] = Message(role="user", content=fill(prompt_template, columns))
    if system_prompt is not None:
        turns = [turn for turn in turns if turn.role != "system"]
        turns.insert(0, Message(role="system", content=fill(system_prompt, columns)))
    return tuple(turns)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[int, ...]:
    """The conversation up to where the assistant starts to write, as token ids.

    Without a chat template (base models) the contents are joined by blank lines and tokenized as plain text.
    """
    if tokenizer.chat_template is None:
        text = "\n\n".join(turn.content for turn in messages)
        return tuple(tokenizer(text)["input_ids"])
    turns = [{"role": turn.role, "content": turn.content} for turn in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # the template writes its own special tokens, so none are added a second time
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> tuple[int, ...]:
    """Every token that ends the assistant's turn: the generation config's (often several), the tokenizer's
    end-of-text, and the first special token the chat template puts after an assistant message."""
    found: set[int] = set()
    if generation is not None and generation.eos_token_id is not None:
        eos = generation.eos_token_id
        found.update(eos if isinstance(eos, list) else [eos])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    after_assistant = _after_assistant(tokenizer)
    if after_assistant is not None:
        found.add(after_assistant)
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
    marker = "1"
    turns = [{"role": "user", "content": marker}, {"role": "assistant", "content": marker}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    after = text[text.rindex(marker) + len(marker) :]
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return next((i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in special), None)
