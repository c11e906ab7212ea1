"""A causal language model in two halves: blocks that give hidden states, and an LM head that gives logits.

Blocks are counted from 1. Block L is tapped after the final norm, the others before it, as in the `hidden_states` of
Hugging Face's models. The embedding output is never used.
"""

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.data.chat import end_of_turn, stop_ids
from oprd.errors import ModelError
from oprd.models.families import find_blocks, find_body, find_decoder, logit_rule
from oprd.types import Batch, HiddenSpec, HiddenStates, LMHead, Taps

if TYPE_CHECKING:
    from peft import PeftModel

    CausalLM = PreTrainedModel | PeftModel
else:  # peft takes seconds to import, bitsandbytes with it: it is imported where there is an adapter
    CausalLM = nn.Module
"""A causal language model, alone or with an adapter."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A loaded model and its tokenizer."""

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    name: str
    pair_stops: tuple[int, ...] = ()
    """Ids that end a turn of this model or of its partner, where the two differ: they end it for both, as one action."""
    packs: bool = False
    """Reads the rows of a batch behind each other, without padding."""

    computes_on: torch.device | None = None
    """Where weights that wait in CPU memory are copied for every pass; None: they stay where they are."""
    weights: str | None = None
    """Hash of the weights before the LM head, where these are on another machine."""
    rows: int | None = None
    """Ids from here on are never sampled: a partner has no row for them. None: all may be that the tokenizer has."""

    @property
    def core(self) -> PreTrainedModel:
        """The model without its PEFT wrapper; adapters stay inside its layers."""
        return cast(PreTrainedModel, cast(Any, self.model).get_base_model() if is_peft(self.model) else self.model)

    @property
    def backbone(self) -> nn.Module:
        """Everything before the LM head."""
        return find_body(self.core)

    @property
    def decoder(self) -> nn.Module:
        """The part of the backbone that holds the blocks: of a multimodal model its language model."""
        return find_decoder(self.core)

    @property
    def blocks(self) -> nn.ModuleList:
        return self._located[1]

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return self.computes_on or next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        """Any valid id: padded positions are masked out."""
        return cast(int, self.tokenizer.pad_token_id) if self.tokenizer.pad_token_id is not None else 0

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends the assistant's turn."""
        return self.pair_stops or stop_ids(self.tokenizer, self.core.generation_config)

    @cached_property
    def unsampled_ids(self) -> tuple[int, ...]:
        """Rows of the LM head that are no token: they pad the vocabulary, and a partner may not have them."""
        size = self.core.config.get_text_config().vocab_size
        known = {*self.tokenizer.get_vocab().values(), *self.stop_ids}.intersection(range(self.rows or size))
        return tuple(i for i in range(size) if i not in known)

    @cached_property
    def end_of_turn(self) -> int:
        """The stop token behind an assistant message that we write ourselves."""
        return end_of_turn(self.tokenizer, self.stop_ids)

    def head(self) -> LMHead:
        """The LM head as tensors that take part in autograd. Raises ModelError when it is more than one linear map."""
        module = self.core.get_output_embeddings()
        if type(module) is not nn.Linear:
            raise ModelError(
                f"{self.name}: the LM head is {type(module).__name__}, not a plain linear map; "
                "leave it out of LoRA's target_modules and modules_to_save, and out of quantization"
            )
        scale, softcap = logit_rule(self.core.config)
        return LMHead(weight=module.weight, bias=module.bias, scale=scale, softcap=softcap, stops=self.pair_stops)

    def tap(self, batch: Batch, taps: Taps) -> HiddenStates:
        """One forward pass that keeps the tapped hidden states, [N, D] each. Gradient flows where it is enabled.

        Blocks above the deepest tap do not run; the LM head never does.
        """
        by_block: dict[int, list[HiddenSpec]] = {}
        for spec in taps.hidden:
            by_block.setdefault(self.block_of(spec), []).append(spec)
        hidden: dict[HiddenSpec, Tensor] = {}

        def keep(block: int, states: Tensor) -> None:
            hidden.update({spec: batch.gather(states, spec) for spec in by_block[block]})

        def hook(block: int) -> Any:
            return lambda module, args, out: keep(block, out[0] if isinstance(out, tuple | list) else out)

        with contextlib.ExitStack() as stack:
            for block in by_block:
                if block < self.num_blocks:
                    stack.callback(self.blocks[block - 1].register_forward_hook(hook(block)).remove)
            stack.enter_context(self._only_first(max(by_block)))
            if self.packs:
                ids, positions = batch.packed()
                out = self.backbone(input_ids=ids, position_ids=positions, use_cache=False)
            else:
                # no mask: what is padded on the right is behind every token that counts
                out = self.backbone(input_ids=batch.input_ids, use_cache=False)
        if self.num_blocks in by_block:
            keep(self.num_blocks, out.last_hidden_state)
        return HiddenStates(hidden=hidden, head=self.head() if taps.head else None, batch=batch)

    def block_of(self, spec: HiddenSpec) -> int:
        return self.num_blocks if spec.block == "last" else spec.block

    def recompute_blocks(self, *, offload: bool = False) -> None:
        """Keep the blocks' inputs alone for the backward pass, which runs them once more. `offload`: in CPU memory."""
        for block in self.blocks:
            block.forward = partial(_recomputed, block.forward, offload)

    def compile_blocks(self) -> None:
        """Compile the blocks' passes with gradient, once for all blocks of a class."""
        for block in self.blocks:  # forward, not the module: hooks on a compiled module may be left out
            block.forward = partial(_compiled, torch.compile(type(block).forward, dynamic=True), block)

    @property
    def _located(self) -> tuple[str, nn.ModuleList]:
        found = find_blocks(self.decoder)
        if found is None:
            raise ModelError(f"{self.name}: no list of transformer blocks found in {type(self.decoder).__name__}")
        expected = self.core.config.get_text_config().num_hidden_layers
        if len(found[1]) != expected:
            raise ModelError(
                f"{self.name} ({self.core.config.model_type}): {len(found[1])} blocks found at {found[0]!r}, its config "
                f"says {expected}; this family is not supported"
            )
        return found

    @contextlib.contextmanager
    def _only_first(self, deepest: int) -> Iterator[None]:
        """Run with the first `deepest` blocks in place of all."""
        path, blocks = self._located
        if deepest == len(blocks):
            yield
            return
        parent_name, _, own_name = path.rpartition(".")
        parent = self.decoder.get_submodule(parent_name)
        setattr(parent, own_name, blocks[:deepest])
        try:
            yield
        finally:
            setattr(parent, own_name, blocks)


class Model(ABC):
    """A model that can be tapped and can write: a frozen one, the student, or the student before training."""

    lm: LanguageModel

    @abstractmethod
    def hidden(self, batch: Batch, taps: Taps) -> HiddenStates:
        """Hidden states in evaluation mode, without gradient. The LM head comes whole, also where weights are sharded."""

    @abstractmethod
    def generate(self, **kwargs: Any) -> Any:
        """transformers' generate, in evaluation mode."""

    def writer(self) -> "Model":
        """The model that writes with the weights as they are now: this one, or a copy that is faster. Every rank calls it."""
        return self

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """What `save_pretrained` is given: the tensors, of a student with an adapter the trained ones, in CPU memory and
        whole. Called on every rank; only the main rank gets them where there are several."""


@final
class FrozenModel(Model):
    """Weights that are not trained; `autocast` computes in another precision than theirs."""

    def __init__(self, lm: LanguageModel, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.lm, self._autocast = lm, autocast

    @torch.no_grad()
    def hidden(self, batch: Batch, taps: Taps) -> HiddenStates:
        with self.in_place(), evaluating(self.lm.model), self._autocast():
            states = self.lm.tap(batch, taps)
            return replace(states, head=None if states.head is None else detached(states.head))

    @torch.no_grad()
    def generate(self, **kwargs: Any) -> Any:
        with self.in_place(), evaluating(self.lm.model), self._autocast():
            return cast(Any, self.lm.model).generate(**kwargs)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, weights that wait in CPU memory are on the device where they compute."""
        tensors = (*self.lm.model.parameters(), *self.lm.model.buffers()) if self.lm.computes_on else ()
        waiting = [(x, x.data) for x in tensors]
        for x, data in waiting:
            x.data = data.to(self.lm.device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            for x, data in waiting:
                x.data = data

    def weights(self) -> dict[str, Tensor]:
        return self.lm.model.state_dict()


def detached(head: LMHead) -> LMHead:
    """The LM head without gradient, on the tensors of now: a model's own parameters may move."""
    return replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())


def is_peft(model: nn.Module) -> bool:
    """Whether an adapter of PEFT is around or inside the model."""
    return (peft := sys.modules.get("peft")) is not None and isinstance(model, peft.PeftModel)


def train_mode(model: nn.Module) -> None:
    """Training mode for adapters, whose dropout a recipe asks for, and evaluation mode for the rest: the model's own dropout
    and its routers' noise would give other states than the rollouts were sampled with."""
    model.eval()
    if (peft := sys.modules.get("peft")) is None:
        return
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.train()
            cast(Any, module).get_base_layer().eval()


def _recomputed(forward: Callable[..., object], offload: bool, *args: Any, **kwargs: Any) -> object:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
        # reentrant checkpointing would run the blocks without a graph, and the tapped states would get no gradient
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _compiled(forward: Callable[..., object], block: nn.Module, *args: Any, **kwargs: Any) -> object:
    return (forward if torch.is_grad_enabled() else type(block).forward)(block, *args, **kwargs)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the previous mode after, also on errors."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
