"""Make the miniature's base and teacher from nothing: `python scripts/make_demo_models.py` (about 15 minutes, one core).

The base learns from demonstrations of which some are wrong, and stops early. The teacher is the base, trained further on
right ones only. Same machine and versions, same weights; elsewhere rounding differs and the accuracies move a little.
"""

import random
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from oprd.demo.task import Sum, completion, sums, wrong_completion

FOLDER = Path(__file__).parents[1] / "src/oprd/demo/models"
SEED = 0
BATCH, WARMUP, MUON_LR, ADAMW_LR = 32, 20, 5e-3, 2e-3
BASE_STEPS, WRONG_SHARE = 1200, 0.15
TEACHER_STEPS = 1000
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


def make_tokenizer() -> PreTrainedTokenizerFast:
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


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
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


def prompt_ids(tokenizer: PreTrainedTokenizerFast, problem: Sum) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.problem}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def batch_of(tokenizer: PreTrainedTokenizerFast, seed: int, wrong_share: float) -> tuple[torch.Tensor, torch.Tensor]:
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
    """Next-token loss. Muon on the blocks' matrices: with AdamW alone the addition of digits is learned at half the speed."""
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
def measure(model, tokenizer) -> tuple[float, float, float, float]:
    """avg@4 on held-out problems with its 95% bootstrap interval over problems, and the mean completion length."""
    model.eval()
    torch.manual_seed(SEED)
    problems = sums(PROBLEMS, SEED, held_out=True)
    prompts = [{"input_ids": prompt_ids(tokenizer, p)} for p in problems for _ in range(SAMPLES)]
    inputs = tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    out = model.generate(**inputs, generation_config=sampling)[:, inputs["input_ids"].shape[1] :]
    length = (out != tokenizer.pad_token_id).sum(1).float().mean().item()
    answers = [p.answer for p in problems for _ in range(SAMPLES)]
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    right = [float(t.rsplit("\n")[-1] == f"\\boxed{{{a}}}") for t, a in zip(texts, answers, strict=True)]
    per_problem = torch.tensor(right).view(PROBLEMS, SAMPLES).mean(1)
    resampled = per_problem[torch.randint(PROBLEMS, (10_000, PROBLEMS))].mean(1)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975])).tolist()
    return per_problem.mean().item(), low, high, length
