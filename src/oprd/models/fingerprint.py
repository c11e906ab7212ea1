"""Models known by content, not by name."""

import hashlib
import json
import re

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from oprd.data.chat import encode
from oprd.models.language_model import LanguageModel
from oprd.models.loading import PROBE_TEXTS

_ADAPTER = re.compile(r"base_model\.model\.|\.base_layer")
"""What a LoRA adapter adds to the names of parameters."""


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides how a conversation becomes ids: vocabulary, splitting of the probe texts, chat template."""
    probes = [encode(tokenizer, text) for text in PROBE_TEXTS]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), probes, tokenizer.chat_template])
    return hashlib.sha256(content.encode()).hexdigest()


def weights_fingerprint(lm: LanguageModel) -> str:
    """Hash of the architecture and every weight before the LM head, which no hidden state depends on. Weights of an
    adapter are left out: at this point it has not been trained."""
    if lm.weights is not None:
        return lm.weights
    digest = hashlib.sha256(lm.core.config.model_type.encode())
    prefix = f"{lm.core.base_model_prefix}."
    plain = {_ADAPTER.sub("", name): weight for name, weight in lm.model.named_parameters() if "lora_" not in name}
    for name, weight in sorted(item for item in plain.items() if item[0].startswith(prefix)):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        values = weight.full_tensor() if isinstance(weight, DTensor) else weight  # FSDP has sharded the student by now
        values = values.detach().to(torch.bfloat16) if values.is_floating_point() else values.detach()
        digest.update(values.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
