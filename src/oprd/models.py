"""A causal language model in two halves: blocks that give hidden states, and an LM head that gives logits.

Block l of L is counted from 1. The state of block L is taken after the final norm, the others before it: the last entry
of Hugging Face's `hidden_states` is so, and the authors' code uses that tuple [code]. The embedding output is never used.
"""

import contextlib
import copy
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from oprd.config.models import LocalTeacherConfig, LoraConfig, StudentConfig
from oprd.errors import ConfigError, ModelError, TeacherMismatch
from oprd.types import LMHead, MicroBatch, Reading, States, pack

PROBE_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  indented\n\n\ttabs and   spaces ",
    "\\frac{1}{2} + x^{2} \\le \\boxed{42}",
    "naïve café, 你好世界, мир, 🙂🏳️‍🌈",
    "def f(x):\n    return x ** 2  # 0xFF",
)


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A loaded model with its tokenizer; what the rest of the library needs to know about its inside."""

    model: PreTrainedModel
    """May be a PEFT model."""
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def core(self) -> PreTrainedModel:
        """The model without its PEFT wrapper; adapters stay inside its layers."""
        return self.model.get_base_model() if is_peft(self.model) else self.model  # type: ignore[operator, no-any-return]

    @property
    def backbone(self) -> nn.Module:
        """Everything before the LM head."""
        return self.core.base_model

    @property
    def blocks(self) -> nn.ModuleList:
        return _blocks(self.backbone, self.name)[1]

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        """Any valid id: padded positions are masked out."""
        return cast(int, self.tokenizer.pad_token_id) if self.tokenizer.pad_token_id is not None else 0

    def head(self) -> LMHead:
        """The LM head as tensors that take part in autograd. Raises ModelError when it is more than one linear map."""
        module = self.core.get_output_embeddings()
        if type(module) is not nn.Linear:
            raise ModelError(
                f"{self.name}: the LM head is {type(module).__name__}, not a plain linear map; "
                "leave it out of LoRA's target_modules and modules_to_save, and out of quantization"
            )
        text = self.core.config.get_text_config()
        return LMHead(
            weight=module.weight,
            bias=module.bias,
            scale=1.0 / getattr(text, "logits_scaling", 1.0) * getattr(text, "logit_scale", 1.0),
            softcap=getattr(text, "final_logit_softcapping", None),
        )


def is_peft(model: nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def read_states(lm: LanguageModel, batch: MicroBatch, readings: Iterable[Reading], *, head: bool) -> States:
    """One forward pass that keeps the asked hidden states at the supervised tokens only, [N, D] each.

    Blocks above the deepest reading do not run; the LM head never does. Gradient flows if it is enabled.
    """
    last = lm.num_blocks
    by_block: dict[int, list[Reading]] = {}
    for reading in readings:
        by_block.setdefault(last if reading.block == "last" else reading.block, []).append(reading)
    hidden: dict[Reading, Tensor] = {}

    def keep(block: int, states: Tensor) -> None:
        for reading in by_block[block]:
            hidden[reading] = pack(states, batch.mask(reading))

    def hook(block: int) -> Any:
        return lambda module, args, out: keep(block, out[0] if isinstance(out, tuple) else out)

    handles = [lm.blocks[b - 1].register_forward_hook(hook(b)) for b in by_block if b < last]
    try:
        with _only_first(lm, max(by_block)):
            out = lm.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if last in by_block:
        keep(last, out.last_hidden_state)
    return States(hidden=hidden, head=lm.head() if head else None, batch=batch)


def deepest_block(lm: LanguageModel, readings: Iterable[Reading]) -> int:
    """The last block that has to run for the readings."""
    return max(lm.num_blocks if reading.block == "last" else reading.block for reading in readings)


def freeze_unused(lm: LanguageModel, deepest: int, *, head: bool) -> None:
    """Take gradient from what the objective cannot reach: a parameter that never gets one is silently left
    unsynchronised by DDP. Blocks above `deepest`, the final norm if it is not read, an untied head that is not used."""
    unreached: list[nn.Module] = list(lm.blocks[deepest:])
    if deepest < lm.num_blocks:
        name = _blocks(lm.backbone, lm.name)[0]
        parent = lm.backbone.get_submodule(name.rpartition(".")[0])
        children = list(parent.named_children())
        at = [child for child, _ in children].index(name.rpartition(".")[2])
        unreached += [module for _, module in children[at + 1 :]]
    embedding = {id(p) for p in lm.core.get_input_embeddings().parameters()}
    output = lm.core.get_output_embeddings()
    if not head and output is not None:
        unreached.append(output)
    for module in unreached:
        for parameter in module.parameters():
            if id(parameter) not in embedding:
                parameter.requires_grad_(False)


@contextlib.contextmanager
def _only_first(lm: LanguageModel, deepest: int) -> Iterator[None]:
    """Run with the first `deepest` blocks in place of all."""
    if deepest == lm.num_blocks:
        yield
        return
    name, blocks = _blocks(lm.backbone, lm.name)
    parent_name, _, attribute = name.rpartition(".")
    parent = lm.backbone.get_submodule(parent_name)
    setattr(parent, attribute, blocks[:deepest])
    try:
        yield
    finally:
        setattr(parent, attribute, blocks)


def _blocks(backbone: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    """Path and list of the transformer blocks: the first ModuleList, however the architecture calls it."""
    for path, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return path, module
    raise ModelError(f"{name}: no list of transformer blocks found in {type(backbone).__name__}")


# Loading


def load_tokenizer(model: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub name. Raises ModelError saying what was tried."""
    try:
        return AutoTokenizer.from_pretrained(model, **({"gguf_file": gguf_file} if gguf_file else {}))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a tokenizer from {model!r}: {_first_line(error)}") from error


def load_student(config: StudentConfig, given: PreTrainedModel | None = None) -> PreTrainedModel:
    """The student in float32, with its adapter if asked for. `given` replaces loading by name."""
    if given is None:
        model = _load(
            config.model, config.gguf_file, dtype=torch.float32, attn_implementation=config.attn_implementation
        )
    else:
        model = given.float()
    check_finite(model, config.model)
    if config.lora is not None:
        if is_peft(model):
            raise ConfigError("student.lora is given, but the student already is a PEFT model; drop one of them")
        model = _add_lora(model, config.lora)
    if is_peft(model):
        _refuse_prompt_learning(model)
    if config.gradient_checkpointing:
        # reentrant checkpointing would run the blocks without a graph, and the states read off them would get no gradient
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if is_peft(model):
            model.enable_input_require_grads()
    return model


def load_teacher(
    config: LocalTeacherConfig, device: torch.device, given: PreTrainedModel | None = None, *, head: bool = True
) -> PreTrainedModel:
    """A frozen model in its own dtype on its own device, in evaluation mode. `head`: whether its LM head will be asked for."""
    if given is None:
        quantization = None
        if config.quantization is not None:
            # it says once a layer and forward pass that inputs are cast, which is what was asked for
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            quantization = BitsAndBytesConfig(
                load_in_8bit=config.quantization == "8bit", load_in_4bit=config.quantization == "4bit"
            )
        model = _load(
            config.model,
            config.gguf_file,
            dtype=getattr(torch, config.dtype),
            attn_implementation="sdpa",
            quantization_config=quantization,
        )
        if not head:
            _drop_head(model)
        if quantization is None:
            model = model.to(torch.device(config.device) if config.device else device)
    else:
        model = given
    check_finite(model, config.model)
    return model.eval().requires_grad_(False)


def _drop_head(model: PreTrainedModel) -> None:
    """Free an LM head that nothing reads, unless it is the embedding as well."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.set_output_embeddings(nn.Identity())


def load_for_generation(model: str, gguf_file: str | None, device: torch.device) -> PreTrainedModel:
    """A model to sample from: bfloat16 on a GPU, float32 on a CPU, where bfloat16 is slow. Adapters load on their base."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = _load(model, gguf_file, dtype=dtype, attn_implementation="sdpa").to(device)
    check_finite(loaded, model)
    return loaded.eval()


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, apart and frozen."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def _load(model: str, gguf_file: str | None, **kwargs: Any) -> Any:
    if gguf_file:
        kwargs["gguf_file"] = gguf_file
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, **{k: v for k, v in kwargs.items() if v is not None})
    except ImportError as error:
        raise ModelError(f"loading {model!r} needs a package that is not installed: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load model {model!r}: {_first_line(error)}") from error
    if gguf_file:
        # the weights are plain tensors now; what says otherwise makes the model unsaveable and the saved folder unloadable
        cast(Any, loaded.hf_quantizer).remove_quantization_config(loaded)
    return loaded


def _add_lora(model: PreTrainedModel, config: LoraConfig) -> PreTrainedModel:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    peft_config = PeftLoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, peft_config)  # type: ignore[return-value]
    except ValueError as error:
        raise ConfigError(f"student.lora: {_first_line(error)}") from error


def _refuse_prompt_learning(model: Any) -> None:
    for name, adapter in model.peft_config.items():
        if adapter.is_prompt_learning:
            raise ModelError(
                f"adapter {name!r} is {adapter.peft_type.value}: it works by extra positions that reading hidden states "
                "off the blocks would bypass. Use LoRA or full weights"
            )


def check_finite(model: nn.Module, name: str) -> None:
    """Raise ModelError naming the first weight with a NaN or infinity."""
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise ModelError(
                f"{name}: weight {parameter_name} holds NaN or infinite values; the file is broken or was trained through a divergence"
            )


# Agreement of two models


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a model's config says before any weights are loaded."""

    blocks: int
    width: int
    vocabulary: int
    """Rows of the embedding, padding included."""
    context: int
    """Tokens."""


def read_shape(model: str | PreTrainedModel, gguf_file: str | None = None) -> Shape:
    """The shape of a model given by folder, Hub name or object. Raises ModelError when there is none to read."""
    try:
        loaded = _config(model, gguf_file) if isinstance(model, str) else model.config
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the config of {model!r}: {_first_line(error)}") from error
    text = loaded.get_text_config()
    return Shape(
        blocks=text.num_hidden_layers,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None) or 2**31,
    )


def count_parameters(model: str | PreTrainedModel, gguf_file: str | None = None) -> int:
    """Parameters of a model, from its config alone when it is given by name."""
    if isinstance(model, str):
        with torch.device("meta"):
            model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(_config(model, gguf_file)))
    return sum(parameter.numel() for parameter in model.parameters())


def _config(model: str, gguf_file: str | None) -> Any:
    adapter = Path(model) / "adapter_config.json"
    if adapter.is_file():
        model = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return AutoConfig.from_pretrained(model, **({"gguf_file": gguf_file} if gguf_file else {}))


def check_same_shape(student: Shape, teacher: Shape, name: str) -> None:
    """OPRD-Vanilla subtracts states: blocks and width must be equal. Raises TeacherMismatch naming the bridge."""
    if (student.blocks, student.width) != (teacher.blocks, teacher.width):
        raise TeacherMismatch(
            f"objective 'oprd' matches hidden states one to one: the student has {student.blocks} blocks of width "
            f"{student.width}, teacher {name} has {teacher.blocks} of width {teacher.width}. "
            "Use a teacher of the student's shape, objective 'opd', or OPRD-Bridge (objective 'oprd_bridge')"
        )


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Raise TeacherMismatch unless both tokenizers give every id the same piece and split text the same way.

    Contents are compared, not sizes: padded embedding matrices of equal content (151,936 against 152,064) agree.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        different = sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1])
        raise TeacherMismatch(
            f"teacher {name} has another vocabulary: {len(different)} entries differ, the first {different[0]!r}. "
            "Token ids of one mean nothing to the other; use a teacher with the student's tokenizer, "
            "or OPRD-Bridge (objective 'oprd_bridge')"
        )
    for text in PROBE_TEXTS:
        a, b = (list(cast(list[int], t(text, add_special_tokens=False)["input_ids"])) for t in (student, teacher))
        if a != b:
            raise TeacherMismatch(f"teacher {name} has the student's vocabulary but splits {text!r} as {b}, not {a}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
