"""Make the miniature's base and teacher from nothing: `python scripts/make_demo_models.py` (about 10 minutes, one core).

The base learns from demonstrations of which some are wrong, and stops early. The teacher is the base, trained further on
right ones only. Same machine and versions, same weights; elsewhere rounding differs and the accuracies move a little.
"""

import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
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

- Architecture: Qwen3, {parameters:.2f}M parameters (4 blocks, hidden size 128, tied embeddings), one token per byte, bfloat16.
- Made by: {how}; batches of 32 generated demonstrations, seed 0.
- Measured: {measured}.
- Again: `python scripts/make_demo_models.py`
"""


def make_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, so a character of the task is a token and any text comes back as it was."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False)])
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


def make_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
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


def prompt_ids(tokenizer: PreTrainedTokenizerBase, problem: Sum) -> list[int]:
    return list(render(tokenizer, [Message(role="user", content=problem.problem)]))


def batch_of(tokenizer: PreTrainedTokenizerBase, seed: int, wrong_share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh demonstrations, [B, T] ids and labels; only the completion is learned. Padding is on the right, where
    causal attention never looks, so no attention mask is needed."""
    rng = random.Random(seed)
    rows = []
    for problem in sums(BATCH, seed, held_out=False):
        text = wrong_completion(problem, rng) if rng.random() < wrong_share else completion(problem)
        rows.append((prompt_ids(tokenizer, problem), [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((BATCH, width), tokenizer.pad_token_id)
    labels = torch.full((BATCH, width), -100)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    first_seed: int,
    wrong_share: float,
    decay: bool,
) -> None:
    """Next-token loss. Muon on the matrices of the blocks: AdamW alone was slower in the few trials made."""
    model.train()
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [model.model.embed_tokens.weight] + [weight for weight in model.parameters() if weight.ndim == 1]
    optimizers = (
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    )

    def rate(step: int) -> float:
        return min(1, (step + 1) / WARMUP, (steps - step) / steps if decay else 1)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    for step in range(1, steps + 1):
        ids, labels = batch_of(tokenizer, first_seed + step, wrong_share)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def measure(folder: Path) -> str:
    """avg@4 of the saved weights on held-out problems, its 95% bootstrap interval over problems, the mean length."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(SEED)
    problems = [problem for problem in sums(PROBLEMS, SEED, held_out=True) for _ in range(SAMPLES)]
    rows = [{"input_ids": prompt_ids(tokenizer, problem)} for problem in problems]
    inputs = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
    out = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS)
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


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, how: str) -> PreTrainedModel:
    """Writes weights in bfloat16, tokenizer and card; returns what was saved, in float32."""
    folder = FOLDER / name
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    measured = measure(folder)
    print(f"{name}: {measured}", flush=True)
    (folder / "README.md").write_text(
        CARD.format(name=name, how=how, measured=measured, parameters=model.num_parameters() / 1e6), encoding="utf-8"
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    torch.set_num_threads(1)  # sums of floats in one order: the same weights again
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, tokenizer, steps=BASE_STEPS, first_seed=0, wrong_share=WRONG_SHARE, decay=False)
    how = f"{BASE_STEPS} steps from random weights; {WRONG_SHARE:.0%} of the completions have one wrong step"
    model = save(model, tokenizer, "base", how)
    train(model, tokenizer, steps=TEACHER_STEPS, first_seed=BASE_STEPS, wrong_share=0.0, decay=True)
    save(model, tokenizer, "teacher", f"{TEACHER_STEPS} more steps from `base`, every completion right")


if __name__ == "__main__":
    main()
