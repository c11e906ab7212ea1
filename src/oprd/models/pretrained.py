"""Config, tokenizer and weights by folder or Hub name. A file that is missing, broken or would run code is a ModelError."""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch._guards import detect_fake_mode
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from oprd.errors import DataError, ModelError
from oprd.files import SUMS, checksums
from oprd.models.families import auto_class
from oprd.models.quantization import hold_quantized

MOST_OF = {"(layers?|blocks|experts)$": 2**12, "size|dim|embd|inner|d_model|head|width|rank|channels": 2**24}
"""By what a config's key contains: several times the largest that was published."""
MOST_SHOWN = 400
"""Letters of another library's error that are shown."""


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub name. Raises ModelError saying what was tried."""
    with naming(f"cannot load a tokenizer from {model!r}"):
        try:
            return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError):
            if (base := base_of(model)) == model:
                raise
            return load_tokenizer(base)


def shapes_only() -> bool:
    """Whether tensors are made without content here, as `oprd plan` does: no file is read and nothing is compared."""
    return detect_fake_mode() is not None


def load_weights(model: str, *, trainable: bool = False, **given: Any) -> Any:
    """The model of a folder or Hub name, an adapter on its base. `given` goes to `from_pretrained`. No pickle is read."""
    with naming(f"cannot load model {model!r}"):
        base = base_of(model)
        if base != model:  # trainable, it continues as an adapter
            from peft import PeftConfig, PeftModel, get_peft_model  # takes seconds to import

            loaded = load_weights(base, **given)
            if shapes_only():
                return get_peft_model(loaded, PeftConfig.from_pretrained(model))
            return PeftModel.from_pretrained(loaded, model, is_trainable=trainable, use_safetensors=True)
        config = read_config(model)
        if shapes_only():
            bits = given.pop("quantization_config", None)
            empty = auto_class(config).from_config(config, trust_remote_code=False, **given)
            if bits is not None:
                hold_quantized(empty, bits)
            return empty
        loaded, info = auto_class(config).from_pretrained(
            model, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **given
        )
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"{model}: its files lack {len(missing)} weights, the first is {missing[0]}; transformers would draw them "
                "at random. Download or save the model again"
            )
        return loaded


def held_as(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """How transformers holds each parameter in a model of `dtype`: a family may keep some in float32."""
    with torch.device("meta"):
        empty = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)  # pyright: ignore[reportPrivateUsage]
    float32 = "|".join(empty._get_dtype_plan(dtype)).replace("*", ".*") or "(?!)"  # pyright: ignore[reportPrivateUsage]
    own = empty.named_parameters(remove_duplicate=False)
    return {name: torch.float32 if re.search(float32, name) else x.dtype for name, x in own}


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold the parameters as a model of `dtype` does. Buffers stay: rotary embeddings need their precision."""
    held = held_as(model, dtype)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(held.get(name.replace(".base_layer", ""), dtype))


def read_config(model: str) -> Any:
    """The config, of an adapter that of its base. Raises ModelError for sizes that no model has."""
    base = base_of(model)
    _check_sizes(PreTrainedConfig.get_config_dict(base)[0], base)
    return AutoConfig.from_pretrained(base, trust_remote_code=False)


def _check_sizes(config: Mapping[str, Any], name: str) -> None:
    """Before the config is used: a million blocks would be built, if only without weights."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_sizes(value, name)
        for pattern, most in MOST_OF.items():
            if type(value) is int and value > most and re.search(pattern, key):
                raise ModelError(
                    f"{name}: config.json says {key} is {value:,}, at most {most:,} are built; correct it, or download the "
                    "model again"
                )


def read_generation_config(model: str) -> GenerationConfig | None:
    """The generation config; None where the model has none."""
    base = base_of(model)
    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:
        if (Path(base) / "generation_config.json").exists():  # broken
            raise
        return None


def check_files(model: str) -> None:
    """Raise ModelError for a folder that lacks a file of weights, has one that is cut, or differs from its checksums."""
    for name, stem in {model: "adapter_model", base_of(model): "model"}.items():
        whole, index = Path(name, f"{stem}.safetensors"), Path(name, f"{stem}.safetensors.index.json")
        if not Path(name).is_dir():
            continue
        if not whole.exists() and not index.exists():
            raise ModelError(
                f"{name} holds no {whole.name}; weights in another format may run code. Save them by transformers' or PEFT's "
                "save_pretrained"
            )
        with naming(f"cannot read the weights in {name!r}"):
            shards = [whole.name] if whole.exists() else json.loads(index.read_text("utf-8"))["weight_map"].values()
            for shard in sorted(set(shards)):
                with safe_open(Path(name, shard), "pt"):
                    pass
            listed = Path(name, SUMS).read_text("utf-8").splitlines(keepends=True) if Path(name, SUMS).exists() else []
            if changed := sorted(set(listed) - set(checksums(Path(name), [line[66:-1] for line in listed]))):
                raise ModelError(
                    f"{name}: {changed[0][66:-1] or SUMS} was damaged or changed since it was saved. Save or copy the model "
                    f"again; if you changed it yourself, delete {SUMS}"
                )


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Makes every error a ModelError: what the libraries raise over broken files has no class in common."""
    try:
        yield
    except ModelError:
        raise
    except DataError as error:
        raise ModelError(f"{what}: {error}") from error
    except Exception as error:
        raise ModelError(f"{what}: {in_short(error)}") from error


def base_of(model: str) -> str:
    """The model an adapter is for; other models are their own base."""
    adapter = find_adapter_config_file(model)
    return model if adapter is None else str(json.loads(Path(adapter).read_text("utf-8"))["base_model_name_or_path"])


def in_short(error: Exception) -> str:
    """What another library's error says, in a line, and what to do."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it needs code from its own folder, and oprd runs none (trust_remote_code is always False)"
    if isinstance(error, ImportError):
        return f"a package that it needs is not installed: {text[:MOST_SHOWN]}"
    if isinstance(error, OSError | ValueError):
        return text[:MOST_SHOWN]
    return f"{type(error).__name__}: {text[:MOST_SHOWN]}. A file of it seems to be broken; download or save the model again"
