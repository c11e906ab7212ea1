"""The page of model families, made from the family tests' data: `python scripts/make_family_docs.py`.

Writes docs/families.md. With `--check` it writes nothing and fails if the page is not current.
"""

import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pages import DOCS, write_or_check
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from oprd.models.families import NOT_SUPPORTED, auto_class, find_decoder, linear_layers, stacked_weights
from oprd.models.language_model import LanguageModel
from oprd.models.pretrained import load_tokenizer
from oprd.models.probe import packs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "models"))

from families_tiny import (  # noqa: E402
    BY_PROBE,
    COARSE_IN_BF16,
    FAMILIES,
    SUPPORTED,
    WITHOUT_BF16,
    make_config,
    make_model,
)

TOKENIZER = load_tokenizer(str(ROOT / "src" / "oprd" / "demo" / "models" / "base"))
HEAD = """# Model families

`python scripts/make_family_docs.py` makes this page from the data of the family tests (`tests/models`): edit those, not this
page. The tests build a tiny random model of every family below, {variants} variants of {types} model types, with transformers 5.23 on a
CPU; released checkpoints of most of them were never loaded. `model_type` is the one in a model's `config.json`.

For every family of the first table the tests show, against the model's own forward pass and plain autograd:

- hidden states of every block from padded rows, also where only the first blocks run, and the logits of our LM head;
- what it writes from left-padded prompts with its cache is what whole forward passes say;
- losses and gradients of OPRD and exact reverse KL, with and without gradient checkpointing, of all weights and of LoRA;
- the same in bfloat16 against plain autograd in bfloat16 (losses to 1%, gradients to 3% of their length);
- the saved weights, and an adapter saved on top of them, load to the same logits;
- every weight that is left trainable gets gradient, and no other does.

Other families may work as well. At load, `oprd` compares student and teacher with their own forward passes on a few tokens and
refuses, by name, a model that does not agree with itself in what the run uses (`models/probe.py`).

**Multimodal models** are trained on their text side; the vision tower is frozen and saved as it was. The saved student loads with
`AutoModelForCausalLM` unless the last column names another class. Qwen3.5 is loaded and saved as its text model: the vision weights
are not in the saved folder.

**Attention** is what `attn_implementation: auto` gives: SDPA where transformers has it for the family, else eager.

**LoRA** (`target_modules: all-linear`) adapts every linear layer of the text decoder but those in the table: layers that an adapter
would not change or would break, and 3-dimensional weights, such as experts, which are adapted where `target_modules` lists them.

**bf16**: "coarse" where transformers' own bfloat16 gradient is more than a quarter of its length off float32's in the tiny model, as
in linear attention; "no" where transformers fails to train or to write in it, which a run with `bf16: true` says at its start.

**Packed** says whether `packing: true` reads several rows behind each other as one. Other families are padded, and the run says so.

"""
COLUMNS = ("model type", "class", "attention", "LoRA leaves out", "bf16", "packed", "the saved student loads with")


def main(arguments: Sequence[str]) -> int:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page = make_page()
    return write_or_check(DOCS / "families.md", page, arguments)


def make_page() -> str:
    """The whole page, as Markdown."""
    by_type: dict[str, list[LanguageModel]] = defaultdict(list)
    for name in SUPPORTED:
        model = make_model(name)
        by_type[model.config.model_type].append(LanguageModel(model=model, tokenizer=TOKENIZER, name=name))
    rows = [(f"`{model_type}`", *_cells(by_type[model_type])) for model_type in sorted(by_type)]
    head = HEAD.format(variants=len(SUPPORTED), types=len(rows))
    refused = ["\n## Refused\n", *_table(("model type", "why"), sorted(_refused()))]
    return "\n".join([head + "## Supported\n", *_table(COLUMNS, rows), *refused]) + "\n"


def _cells(variants: Sequence[LanguageModel]) -> tuple[str, ...]:
    """Of one model type, whose variants differ at most in what LoRA leaves out."""
    left_out = sorted({f"`{name}`" for lm in variants for name in _left_out(lm.core)})
    packed = {packs(lm) for lm in variants}
    attention = {lm.core.config._attn_implementation for lm in variants}
    assert len(packed) == len(attention) == 1, [lm.name for lm in variants]
    core, name = variants[0].core, variants[0].name
    bf16 = "no" if name in WITHOUT_BF16 else "coarse" if name in COARSE_IN_BF16 else "yes"
    packs_rows = "yes" if packed.pop() else "no"
    return type(core).__name__, attention.pop(), ", ".join(left_out), bf16, packs_rows, _loader(core)


def _left_out(model: Any) -> Iterator[str]:
    """Layers without an adapter under `all-linear`, one name for all blocks."""
    inside, adapted = {id(module) for module in find_decoder(model).modules()}, {*linear_layers(model)}
    linear = [n for n, m in model.named_modules() if id(m) in inside and isinstance(m, nn.Linear | Conv1D)]
    for name in [*(name for name in linear if name not in adapted), *stacked_weights(model)]:
        yield re.sub(r"^.*?\.\d+\.", "", name)


def _loader(model: Any) -> str:
    loaded = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    if loaded is not None and loaded is not type(model):
        return f"`{loaded.__name__}`, without vision weights"
    loader = auto_class(model.config)
    return "" if loader is AutoModelForCausalLM else f"`{loader.__name__}`"


def _refused() -> Iterator[tuple[str, str]]:
    for model_type, why in NOT_SUPPORTED.items():
        yield f"`{model_type}`", why
    for name, (_, why) in BY_PROBE.items():
        yield f"`{make_config(name).model_type}`", why
    encoder_decoders = [make_config(name) for name, (config, *_) in FAMILIES.items() if config == "T5Config"]
    for config in encoder_decoders:
        yield (
            f"`{config.model_type}` and every other encoder-decoder",
            "its states are not those of one stack of blocks",
        )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
