"""Make the miniature's models from nothing: `python scripts/make_demo_models.py base teacher wide_teacher`, or some of them.

The base learns from demonstrations of which some are wrong, and stops early. The teacher is the base, trained further on
right ones only. The wide teacher shares nothing with them but the task: other width, other depth, another tokenizer.
About 10 minutes of one core for the first two, an hour and a half for the third. Same machine and versions, same weights; elsewhere
rounding differs and the accuracies move a little.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from oprd.data.chat import render
from oprd.demo.task import Sum, completion, sums, wrong_completion
from oprd.types import Message

FOLDER = Path(__file__).parents[1] / "src/oprd/demo/models"
SEED = 0
BATCH, WARMUP, MUON_LR, ADAMW_LR = 32, 20, 5e-3, 2e-3
BASE_STEPS, WRONG_SHARE = 1240, 0.15
TEACHER_STEPS = 800
WIDE_PHASES = ((1800, 5e-3), (2000, 1e-2), (4000, 1e-2))
"""Steps and Muon's rate. avg@4 0.38, 0.65 and 0.96 after them: most of it comes late, when sums are off by one no more."""
PROBLEMS, SAMPLES, MAX_NEW_TOKENS = 200, 4, 64

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CARD = """# oprd miniature: {name}

For demonstrations and tests of oprd, no use beyond. Signed sums of 3 to 5 numbers up to 99, worked out step by step.

- Architecture: Qwen3, {parameters:.2f}M parameters ({blocks} blocks, hidden size {width}, tied embeddings), {tokens}, bfloat16.
- Made by: {how}; batches of 32 generated demonstrations, seed 0.
- Measured: {measured}.
- Again: `python scripts/make_demo_models.py {name}`
"""


Turns = tuple[str, str]
"""A question and its answer."""


def make_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, so a character of the task is a token and any text comes back as it was."""
    tokenizer = byte_tokenizer(merges=[])
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False)])
    return wrapped(tokenizer)


def make_wide_tokenizer() -> PreTrainedTokenizerBase:
    """A two-digit number that is added or taken away is one piece, as is `\\boxed`; other digits and bytes stand alone.

    With every number in pieces of two digits the results became classes out of a hundred, and 2,000 steps were too few to
    learn their sums.
    """
    letters = ["\\", *"boxed"]
    word = [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]
    tokenizer = byte_tokenizer(merges=[(a, b) for a in "0123456789" for b in "0123456789"] + word)
    numbers = pre_tokenizers.Split(Regex(r"(?<=\+|\d-)\d{2}|\d"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([numbers, tokenizer.pre_tokenizer])
    return wrapped(tokenizer)


def byte_tokenizer(merges: list[tuple[str, str]]) -> Tokenizer:
    """Byte-level BPE with the given merges and no splitting into words."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """With the miniature's special tokens and chat template."""
    tokenizer.add_special_tokens(["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_model(
    tokenizer: PreTrainedTokenizerBase, *, width: int = 128, intermediate: int = 384, blocks: int = 4
) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    return list(render(tokenizer, [Message(role="user", content=question)]))


def demonstrations(seed: int, wrong_share: float) -> list[Turns]:
    """A batch of worked problems, some of them with a slip."""
    rng = random.Random(seed)
    return [(problem.problem, worked(problem, wrong_share, rng)) for problem in sums(BATCH, seed, held_out=False)]


def worked(problem: Sum, wrong_share: float, rng: random.Random) -> str:
    """With a slip in that share of the cases."""
    return wrong_completion(problem, rng) if rng.random() < wrong_share else completion(problem)


def with_slips(seed: int) -> list[Turns]:
    return demonstrations(seed, WRONG_SHARE)


def all_right(seed: int) -> list[Turns]:
    return demonstrations(seed, 0.0)


def batch_of(tokenizer: PreTrainedTokenizerBase, turns: list[Turns]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] ids and labels; only the assistant's turn is learned. Padding is on the right, where causal attention
    never looks, so no attention mask is needed."""
    rows = [
        (prompt_ids(tokenizer, question), [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id])
        for question, answer in turns
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


class BatchedMuon(torch.optim.Muon):
    """torch's Muon, its orthogonalisation in float32 and once for all matrices of a shape: torch's runs in bfloat16,
    matrix by matrix, which took four fifths of a step at width 192 on a CPU without bfloat16 arithmetic."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                updates = []
                for weight in weights:
                    momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                    momentum.lerp_(weight.grad, 1 - group["momentum"])
                    updates.append(weight.grad.lerp(momentum, group["momentum"]))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for weight, update in zip(weights, orthogonal(torch.stack(updates), group), strict=True):
                    weight.sub_(update, alpha=rate)


def orthogonal(x: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Near the nearest orthogonal matrix of each of `x` [n, rows, columns], by Newton and Schulz's iteration."""
    a, b, c = group["ns_coefficients"]
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draw: Callable[[int], list[Turns]],
    *,
    steps: int,
    first_seed: int,
    decay: bool,
    muon: type[torch.optim.Optimizer] = torch.optim.Muon,
    muon_lr: float = MUON_LR,
) -> None:
    """Next-token loss on what `draw` makes of one seed after the other. Muon on the matrices of the blocks: AdamW alone
    was slower in the few trials made."""
    model.train()
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [model.model.embed_tokens.weight] + [weight for weight in model.parameters() if weight.ndim == 1]
    optimizers = (
        muon(matrices, lr=muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    )

    def rate(step: int) -> float:
        return min(1, (step + 1) / WARMUP, (steps - step) / steps if decay else 1)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    for step in range(1, steps + 1):
        ids, labels = batch_of(tokenizer, draw(first_seed + step))
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def measure(folder: Path, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
    """avg@4 of the saved weights on held-out problems, its 95% bootstrap interval over problems, the mean length."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(SEED)
    problems = [problem for problem in sums(PROBLEMS, SEED, held_out=True) for _ in range(SAMPLES)]
    rows = [{"input_ids": prompt_ids(tokenizer, problem.problem)} for problem in problems]
    inputs = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
    out = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens)
    out = out[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    right = torch.tensor(
        [float(text.endswith(f"\\boxed{{{problem.answer}}}")) for text, problem in zip(texts, problems, strict=True)]
    )
    accuracy = right.view(PROBLEMS, SAMPLES).mean(1)
    resampled = accuracy[torch.randint(PROBLEMS, (10_000, PROBLEMS))].mean(1)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975])).tolist()
    length = (out != tokenizer.pad_token_id).sum(1).float().mean().item()
    return (
        f"avg@{SAMPLES} {accuracy.mean().item():.3f} (95% interval {low:.3f} to {high:.3f}) on {PROBLEMS} held-out "
        f"problems at temperature 1.0; {length:.1f} tokens a completion"
    )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, how: str) -> None:
    """Weights in bfloat16, tokenizer and card."""
    folder = FOLDER / name
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    measured = measure(folder)
    print(f"{name}: {measured}", flush=True)
    card = CARD.format(
        name=name,
        how=how,
        measured=measured,
        parameters=model.num_parameters() / 1e6,
        blocks=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        tokens="one token per byte" if name in ("base", "teacher") else "two-digit terms in one piece",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def make_base() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, tokenizer, with_slips, steps=BASE_STEPS, first_seed=0, decay=False)
    how = f"{BASE_STEPS} steps from random weights; {WRONG_SHARE:.0%} of the completions have one wrong step"
    save(model, tokenizer, "base", how)


def make_teacher() -> None:
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32)
    train(model, tokenizer, all_right, steps=TEACHER_STEPS, first_seed=BASE_STEPS, decay=True)
    save(model, tokenizer, "teacher", f"{TEACHER_STEPS} more steps from `base`, every completion right")


def make_wide_teacher() -> None:
    tokenizer = make_wide_tokenizer()
    model, done = make_model(tokenizer, width=192, intermediate=320, blocks=6), 0
    for steps, rate in WIDE_PHASES:
        train(
            model,
            tokenizer,
            all_right,
            steps=steps,
            first_seed=done,
            decay=True,
            muon=BatchedMuon,
            muon_lr=rate,
        )
        done += steps
        save(model, tokenizer, "wide_teacher", f"{done} steps from random weights, every completion right")
        model = AutoModelForCausalLM.from_pretrained(FOLDER / "wide_teacher", dtype=torch.float32)


MAKERS = {"base": make_base, "teacher": make_teacher, "wide_teacher": make_wide_teacher}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the miniature's models again.")
    parser.add_argument("models", nargs="+", choices=MAKERS, help="made in the order given; teacher starts from base")
    torch.set_num_threads(1)  # sums of floats in one order: the same weights again
    for name in parser.parse_args().models:
        MAKERS[name]()


if __name__ == "__main__":
    main()
