"""What it would save to compute the prompt of a group once: `python benchmarks/group_prompt.py`.

A group of 4 completions of one prompt as four rows, as the update does it, and as one row [prompt, completion 1, ..., 4] with
restarting positions and a mask that lets each completion see the prompt and itself. Forward and backward of the blocks of a
model of SmolLM2-135M's shape with random weights, float32, one thread, CPU seconds, in turn.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from oprd.train.run_folder import describe_machine
from side_by_side import cpu_seconds

OUT = Path(__file__).parent / "results" / "group_prompt.json"
GROUP, ROUNDS = 4, 3
LENGTHS = ((64, 64), (64, 192), (256, 64))
"""(prompt, completion)."""


def arms(model: LlamaModel, prompt: int, length: int) -> dict[str, Callable[[], Tensor]]:
    """Both ways to the hidden states of all completions, [GROUP * length, D], with their backward pass."""
    ids = torch.randint(0, model.config.vocab_size, (GROUP, prompt + length))
    ids[:, :prompt] = ids[:1, :prompt]
    row = torch.cat([ids[0, :prompt], ids[:, prompt:].flatten()])[None]
    positions = torch.cat([torch.arange(prompt), torch.arange(prompt, prompt + length).repeat(GROUP)])[None]
    owner = torch.cat([torch.full((prompt,), -1), torch.arange(GROUP).repeat_interleave(length)])
    seen = torch.ones(row.shape[1], row.shape[1], dtype=torch.bool).tril()
    seen &= (owner[:, None] == owner) | (owner == -1)
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]

    def finish(states: Tensor) -> Tensor:
        states.sum().backward()
        model.zero_grad()
        return states.detach()

    def rows() -> Tensor:
        return finish(model(input_ids=ids, use_cache=False).last_hidden_state[:, prompt:].flatten(0, 1))

    def shared() -> Tensor:
        out = model(input_ids=row, position_ids=positions, attention_mask=mask, use_cache=False)
        return finish(out.last_hidden_state[0, prompt:])

    return {"rows": rows, "shared": shared}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaModel(
        LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192,
        )
    )  # fmt: skip
    found = []
    for prompt, length in LENGTHS:
        ways = arms(model, prompt, length)
        difference = float((ways["rows"]() - ways["shared"]()).abs().max())
        seconds = [{name: cpu_seconds(work) for name, work in ways.items()} for _ in range(ROUNDS)]
        ratios = [one["shared"] / one["rows"] for one in seconds]
        row = {
            "prompt": prompt, "completion": length, "group": GROUP,
            "positions_shared_to_rows": round((prompt + GROUP * length) / (GROUP * (prompt + length)), 3),
            "seconds_shared_to_rows": {"median": round(statistics.median(ratios), 3), "all": [round(x, 3) for x in ratios]},
            "largest_difference": difference,
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        found.append(row)
        OUT.write_text(json.dumps({"result": found, **describe_machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
