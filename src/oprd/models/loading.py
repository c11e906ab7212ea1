"""From names to models: what a config says before weights are loaded, loading, and what two models have in common."""

import copy
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self, cast

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from oprd.data.chat import decode, render, stop_ids
from oprd.data.endless import refuse_endless
from oprd.errors import ConfigError, ModelError
from oprd.models.families import (
    auto_class,
    context_of,
    linear_layers,
    refuse_family,
    stacked_weights,
    without_router_losses,
)
from oprd.models.language_model import CausalLM, FrozenModel, LanguageModel, is_peft
from oprd.models.pretrained import (
    base_of,
    cast_parameters,
    check_files,
    in_short,
    load_tokenizer,
    load_weights,
    naming,
    read_config,
    read_generation_config,
    shapes_only,
)  # fmt: skip
from oprd.models.probe import EVERYTHING, Use, check_family
from oprd.models.quantization import Bits, keep_gradients, quantized, require_bitsandbytes
from oprd.progress import console
from oprd.section import Field, Listed, PositiveInt, Section
from oprd.seeds import derive_seed
from oprd.types import Capability, Message

PROBE_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  indented\n\n\ttabs and   spaces ",
    "\\frac{1}{2} + x^{2} \\le \\boxed{42}",
    "naïve café, 你好世界, мир, 🙂🏳️‍🌈",
    "def f(x):\n    return x ** 2  # 0xFF",
)


class LoraSection(Section):
    """Train low-rank adapters instead of the full weights (PEFT)."""

    r: PositiveInt = 16
    """Rank of each adapter."""
    alpha: PositiveInt = 32
    """The adapter's output is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the adapter's input, in training."""
    target_modules: Literal["all-linear"] | Listed[str] = "all-linear"
    """Names of the layers that get an adapter, also of 3-dimensional expert weights such as `experts.gate_up_proj`. all-linear:
    every linear layer of the text decoder but routers; experts that are one 3-dimensional weight are left out, and named."""


class StudentConfig(Section):
    """The model that is trained."""

    model: str
    """Folder or Hub name. An adapter is trained on as it is, on the base model that it names."""
    lora: LoraSection | None = None
    """None: train all weights, or the adapter that `model` is."""
    weights: Literal["float32", "bfloat16", "4bit"] = "float32"
    """How the weights are held; in bfloat16 and 4bit the model computes in bfloat16, and neither works under FSDP. bfloat16 is
    meant for the frozen base of an adapter. All weights can be trained in it too: an update is mostly smaller than the distance
    of two bfloat16 numbers and would vanish, so it is computed in float32 and rounded up or down at random, its mean kept.
    4bit: the frozen base of an adapter (QLoRA, NF4), by bitsandbytes."""
    gradient_checkpointing: bool | Literal["offload"] = False
    """Recompute activations in the backward pass: less memory, about a third more compute. offload: the inputs of the blocks,
    from which they are recomputed, wait in CPU memory."""
    torch_compile: bool = False
    """Compile the blocks' forward and backward passes in the update. Rollouts and diagnostics run as they are."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel, as transformers names it; auto: sdpa where the family has it, else eager."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What config and tokenizer of a model say before any weights are loaded."""

    name: str
    blocks: int
    width: int
    vocabulary: int
    """Rows of the embedding, padding included."""
    context: int
    """Most tokens of a row."""
    parameters: int
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    """Every token that ends the assistant's turn."""
    context_reason: str = ""
    """Why the context ends there, where longer rows could be read but not alike."""
    adapter: bool = False
    """Whether it is an adapter on a base model."""

    @classmethod
    def read(cls, model: str | CausalLM, tokenizer: PreTrainedTokenizerBase | None = None) -> Self:
        """Facts of a model given by folder, Hub name or object. Raises ModelError when there are none to read."""
        name = _name_of(model)
        with naming(f"cannot read the config of {name!r}"):
            config = read_config(model) if isinstance(model, str) else model.config
            refuse_family(config, name)
            empty = without_weights(config) if isinstance(model, str) else model
            text = config.get_text_config()
        tokenizer = tokenizer or load_tokenizer(name)
        with naming(f"cannot use the tokenizer or the generation config of {name!r}"):
            own = read_generation_config(model) if isinstance(model, str) else cast(Any, model).generation_config
            if tokenizer.chat_template is not None:
                refuse_endless(tokenizer.get_chat_template())
            stops = stop_ids(tokenizer, own)
            in_template = render(tokenizer, (Message(role="user", content="1"),))
        most = max(*stops, *in_template, cast(int, tokenizer.pad_token_id or 0))
        if most >= text.vocab_size:
            raise ModelError(
                f"{name}: {decode(tokenizer, (most,), special=True)!r} is token {most}, but the embedding has "
                f"{text.vocab_size} rows; call resize_token_embeddings and save the model, or use another token"
            )
        if isinstance(model, str):
            check_files(model)
        context, reason = context_of(config)
        return cls(
            name=name,
            blocks=text.num_hidden_layers,
            width=text.hidden_size,
            vocabulary=text.vocab_size,
            context=context,
            context_reason=reason,
            parameters=sum(parameter.numel() for parameter in empty.parameters()),
            tokenizer=tokenizer,
            stop_ids=stops,
            adapter=base_of(model) != model if isinstance(model, str) else is_peft(model),
        )


def student_facts(
    config: StudentConfig, given: CausalLM | None, tokenizer: PreTrainedTokenizerBase | None
) -> ModelFacts:
    """Facts of the student, by name or as `given`. Raises an OprdError if it cannot be trained as the recipe says."""
    if given is not None and not is_peft(given) and given._hf_peft_config_loaded:  # pyright: ignore[reportPrivateUsage]
        raise ModelError(
            "the student holds an adapter that transformers loaded, which is saved without its base's training; load it "
            "with peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)"
        )
    if given is not None and not any(parameter.requires_grad for parameter in given.parameters()):
        raise ModelError(
            "no weight of the student requires gradient; load an adapter with is_trainable=True, or call "
            "requires_grad_(True) on what is to be trained"
        )
    facts = ModelFacts.read(given if given is not None else config.model, tokenizer)
    if facts.adapter and config.lora is not None:
        raise ConfigError(
            f"student.lora asks for a fresh adapter, but {facts.name!r} is an adapter already, which is trained on as it is; "
            "drop student.lora, or merge the adapter into its base first (PEFT's merge_and_unload)"
        )
    if config.weights == "4bit":
        require_bitsandbytes("student.weights '4bit'")
        if given is not None or not (facts.adapter or config.lora is not None):
            raise ConfigError(
                "student.weights is '4bit', which holds the frozen base of an adapter and is loaded by name; set student.lora, "
                "or use bfloat16"
            )
    compiler = os.environ.get("CXX", "g++")
    if config.torch_compile and not shutil.which(compiler):
        raise ConfigError(
            f"student.torch_compile needs a C++ compiler, and there is no {compiler}; install one, or drop it"
        )
    return facts


def missing_in_common(student: ModelFacts, teacher: ModelFacts) -> Mapping[Capability, str]:
    """What the two models do not share, with the reason: SAME_SHAPE, SAME_TOKENIZER.

    Tokenizers are compared by content, not size: padded embeddings of equal content (151,936 and 152,064 rows) agree.
    """
    missing = {}
    if (student.blocks, student.width) != (teacher.blocks, teacher.width):
        missing[Capability.SAME_SHAPE] = (
            f"the student has {student.blocks} blocks of width {student.width}, "
            f"teacher {teacher.name} has {teacher.blocks} of width {teacher.width}"
        )
    difference = tokenizer_difference(student.tokenizer, teacher.tokenizer)
    if difference is not None:
        missing[Capability.SAME_TOKENIZER] = f"teacher {teacher.name} has {difference}"
    return missing


def tokenizer_difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """How the tokenizers differ; None if every id means the same to both and both split text the same way."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        different = sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1])
        return f"another vocabulary: {len(different)} entries differ, the first {different[0]!r}"
    for text in PROBE_TEXTS:
        a, b = (list(cast(list[int], t(text, add_special_tokens=False)["input_ids"])) for t in (student, teacher))
        if a != b:
            return f"the student's vocabulary but splits {text!r} as {b}, not {a}"
    return None


def load_student(config: StudentConfig, given: CausalLM | None = None, *, seed: int = 0) -> CausalLM:
    """The student with its adapter, which is in float32, if the recipe has one. `given` replaces loading by name, `seed` draws
    a new adapter's weights."""
    dtype = torch.float32 if config.weights == "float32" else torch.bfloat16
    if given is None:
        kernel = {} if config.attn_implementation == "auto" else {"attn_implementation": config.attn_implementation}
        kernel |= quantized("4bit" if config.weights == "4bit" else None, dtype)
        model = load_weights(config.model, trainable=True, dtype=dtype, **kernel)
        if config.weights == "4bit":
            keep_gradients(model)
    else:
        model = given.float() if config.weights == "float32" else given
        if config.weights != "float32":
            cast_parameters(
                cast(Any, given).get_base_model() if is_peft(given) else cast(PreTrainedModel, given), dtype
            )
    check_finite(model, config.model)
    without_router_losses(model)
    if config.lora is not None:
        model = _add_lora(cast(PreTrainedModel, model), config.lora, seed)
    for name, adapter in cast(Any, model).peft_config.items() if is_peft(model) else ():
        if adapter.is_prompt_learning:
            raise ModelError(
                f"adapter {name!r} is {adapter.peft_type.value}: it works by extra positions, which tapping hidden states "
                "off the blocks would bypass. Use LoRA or full weights"
            )
    return model


def load_frozen(
    model: str | CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    dtype: torch.dtype,
    held: Bits | Literal["in CPU memory"] | None = None,
    use: Use = EVERYTHING,
    pair_stops: tuple[int, ...] = (),
) -> FrozenModel:
    """A model that is never trained, in its own dtype, checked in what is used of it. `held`: quantized, or in CPU memory
    between its passes."""
    name, offload = _name_of(model), held == "in CPU memory"
    bits = None if held == "in CPU memory" else held
    if isinstance(model, str):
        loaded = load_weights(model, dtype=dtype, **quantized(bits, dtype))
        if not (use.taps.head or use.text):
            _drop_head(loaded)
        loaded = loaded if held else loaded.to(device)
    else:  # one that Accelerate has spread over devices stays there
        loaded = model if getattr(model, "hf_device_map", None) else cast(Any, model).to(device)
    check_finite(loaded, name)
    without_router_losses(loaded)
    frozen = loaded.eval().requires_grad_(False)
    if offload and device.type == "cuda":
        for weight in frozen.parameters():  # locked in memory: copied several times as fast
            weight.data = weight.data.pin_memory()
    lm = LanguageModel(
        model=frozen, tokenizer=tokenizer, name=name, pair_stops=pair_stops, computes_on=device if offload else None
    )
    found = FrozenModel(lm)
    with found.in_place():
        check_family(lm, use)
    return found


def frozen_copy(
    lm: LanguageModel, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]
) -> FrozenModel:
    """The same weights, apart and frozen, computing under `autocast` as the model does."""
    # torch's own copy of a tensor breaks where it has no content
    tensors = (*lm.model.parameters(), *lm.model.buffers()) if shapes_only() else ()
    copies = {
        id(x): nn.Parameter(y) if isinstance(x, nn.Parameter) else y for x in tensors for y in [torch.empty_like(x)]
    }
    model = copy.deepcopy(lm.model, copies).eval().requires_grad_(False).to(cast(Any, device))
    return FrozenModel(replace(lm, model=model, name=f"{lm.name} before training"), autocast)


def check_finite(model: nn.Module, name: str) -> None:
    """Raise ModelError naming the first weight with a NaN or infinity."""
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise ModelError(
                f"{name}: weight {parameter_name} holds NaN or infinite values; the file is broken or was trained "
                "through a divergence"
            )


def _drop_head(model: PreTrainedModel) -> None:
    """Free an LM head that nothing reads, unless it is the embedding as well."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.set_output_embeddings(nn.Identity())


def _add_lora(model: PreTrainedModel, config: LoraSection, seed: int) -> CausalLM:
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    stacked, every = stacked_weights(model), config.target_modules == "all-linear"
    targets = linear_layers(model) if every else list(config.target_modules)
    experts = [t for t in targets if any(f".{name}".endswith(f".{t}") for name in stacked)]
    if stacked and every:
        kinds = sorted({re.sub(r"^.*\.\d+\.", "", name) for name in stacked})
        console.print(
            f"LoRA leaves out {', '.join(kinds)}, which are no linear layers; name them in student.lora.target_modules "
            "beside the layers that you want adapted."
        )
    peft_config = LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=[t for t in targets if t not in experts],
        target_parameters=experts or None, task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "lora"))
            return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ConfigError(f"student.lora: {in_short(error)}") from error


def _name_of(model: str | CausalLM) -> str:
    """Folder or Hub name; empty for an object that came from none."""
    return model if isinstance(model, str) else str(getattr(model, "name_or_path", None) or "")


def without_weights(config: Any) -> nn.Module:
    """A model of this config whose tensors have no content."""
    with torch.device("meta"):
        return cast(nn.Module, auto_class(config).from_config(config, trust_remote_code=False))
