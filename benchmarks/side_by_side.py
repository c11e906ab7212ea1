"""Updates of several programs side by side, in one process and on one thread, in turn:

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0
    PEERS/bin/pip install --no-deps liger-kernel==0.8.5
    python benchmarks/side_by_side.py PEERS/lib/python3.11/site-packages [--rounds 5] [--cases short ...] [--arms bare ...]

Only what is not installed here (TRL, Liger) is taken from PEERS. An update is the teacher's forward pass, the student's
forward pass, loss and backward pass, in float32, between two models of SmolLM2-135M's shape with random weights. `bare` runs
the blocks alone: no loss can do without them. Cases: 4 completions of 64 + 192 tokens, 2 of 64 + 960, and 8 of lognormal
lengths, as micro-batches of least padding and as packed rows; TRL pads all to the longest. `kernel-*` are the losses alone,
from hidden states and LM heads; there `bare` is the four products. `step` is a whole step but for the optimizer: the student
writes 16 completions of lognormal lengths (each end is forced where it is to come), then the update on them; its times are
those of TRL's. CPU seconds are compared, so that a busy machine matters less; peak memory is the most that tensors hold above
the models. After each round benchmarks/results/side_by_side.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from memory import peak_gib
from oprd.data.batching import split_by_tokens, student_batch
from oprd.losses.divergences import reverse_kl
from oprd.models.generate import Sampling
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.models.loading import ModelFacts
from oprd.objectives.base import Objective
from oprd.objectives.opd import OPD, OPDSampled, OPDTopK
from oprd.objectives.oprd import OPRD
from oprd.rollout.hf import HFEngine
from oprd.student import DistillModel
from oprd.train.run_folder import describe_machine
from oprd.types import ALL_TOKENS, Batch, HiddenSpec, HiddenStates, LMHead, Prompt, Rollouts, Taps, Targets

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "side_by_side.json"
PROMPT, WIDTH, VOCABULARY = 64, 576, 49_152
BUDGET = 2048
"""Positions of a micro-batch."""
KERNELS = {"kernel-49k": (1024, WIDTH, WIDTH, VOCABULARY), "kernel-152k": (1024, 896, 1536, 151_936)}
"""N, the widths of student and teacher, V."""
PREDICTING = HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS)
LONGEST = 1024
"""Most tokens of a completion."""
Arms = dict[str, Callable[[], object]]


class Ending(LlamaForCausalLM):
    """Ends each completion at a given length, whatever else is sampled. `lengths`: by the first token of the prompt."""

    lengths: dict[int, int]
    stops: tuple[int, ...]

    def _get_logits_processor(self, *args: Any, **given: Any) -> Any:
        return LogitsProcessorList([_EndAt(self.lengths, self.stops), *super()._get_logits_processor(*args, **given)])


class _EndAt(LogitsProcessor):
    def __init__(self, lengths: dict[int, int], stops: tuple[int, ...]) -> None:
        self.lengths, self.stops = lengths, list(stops)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        number = input_ids.shape[1] - PROMPT + 1  # of the token to come
        ends = torch.tensor([number == self.lengths[int(row[0])] for row in input_ids])
        scores = scores.masked_fill(ends[:, None], -torch.inf)
        scores[:, self.stops] = torch.where(ends, 0.0, -torch.inf)[:, None]
        return scores


def lengths(case: str) -> list[int]:
    if case in ("short", "long"):
        return [192] * 4 if case == "short" else [960] * 2
    count = 16 if case == "step" else 8
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(3)).exp() * 90  # mean 150, sigma 1
    return drawn.long().clamp(8, LONGEST).tolist()


def rollouts(case: str) -> Rollouts:
    draw = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(100, 40_000, (PROMPT + n,), generator=draw).tolist()) for n in lengths(case)]
    prompts = tuple(Prompt(row=i, messages=(), token_ids=row[:PROMPT]) for i, row in enumerate(ids))
    return Rollouts(prompts=prompts, completion_ids=tuple(row[PROMPT:] for row in ids), finished=(True,) * len(ids))


def load(seed: int, name: str, packs: bool) -> LanguageModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "src" / "oprd" / "demo" / "models" / "base", padding_side="left")
    tokenizer.add_tokens([f"<{i}>" for i in range(VOCABULARY - len(tokenizer))])  # each row of the LM head is a token
    return LanguageModel(model=Ending(config), tokenizer=tokenizer, name=name, packs=packs)


def updates(case: str) -> Arms:
    packs, every = case == "heavy-packed", rollouts(case)
    student, teacher = load(0, "student", packs), load(1, "teacher", packs)
    teacher.model.eval().requires_grad_(False)
    facts, frozen = ModelFacts.read(student.model, student.tokenizer), FrozenModel(teacher)
    batches = [
        student_batch(part, pad_id=0, device=student.device) for part in split_by_tokens(every, BUDGET, packed=packs)
    ]

    def whole(update: Callable[[Batch], Tensor]) -> None:
        for batch in batches:
            (update(batch) / sum(every.lengths)).backward()
        student.model.zero_grad()

    def bare(batch: Batch) -> Tensor:
        frozen.hidden(batch, Taps(hidden=(PREDICTING,)))
        return student.tap(batch, Taps(hidden=(PREDICTING,))).hidden[PREDICTING].sum()

    def ours(objective: Objective) -> Callable[[], None]:
        bound = objective.bind(facts)
        model = DistillModel(student, [bound])
        return partial(
            whole, lambda batch: model(batch, Targets(teacher=frozen.hidden(batch, bound.teacher_taps)))[0].sum()
        )

    def states(batch: Batch) -> tuple[HiddenStates, HiddenStates]:
        taps = Taps(hidden=(PREDICTING,), head=True)
        return student.tap(batch, taps), frozen.hidden(batch, taps)

    def plain(batch: Batch) -> Tensor:
        p, q = (of.hidden[PREDICTING] @ head_of(of).T for of in states(batch))
        return reverse_kl(p, q).sum()

    liger = liger_loss()

    def with_liger(batch: Batch) -> Tensor:
        ours, theirs = states(batch)
        hidden, ids = ours.hidden[PREDICTING], batch.sampled_ids(ALL_TOKENS)
        return liger(hidden, head_of(ours), theirs.hidden[PREDICTING], head_of(theirs), ids) * len(ids)

    return {
        "bare": partial(whole, bare),
        "oprd": ours(OPRD()),
        "ours": ours(OPD()),
        "ours-top-16": ours(OPDTopK()),
        "ours-sampled": ours(OPDSampled()),
        "plain": partial(whole, plain),
        "liger": partial(whole, with_liger),
        "trl": partial(trl_update, trl_trainer(student, teacher), student, every),
    }


def steps() -> Arms:
    """The student writes, then learns on what it has written."""
    asked = rollouts("step")
    student, teacher = load(0, "student", packs=False), load(1, "teacher", packs=False)
    teacher.model.eval().requires_grad_(False)
    model, ids = cast(Ending, student.model), [prompt.token_ids for prompt in asked.prompts]
    model.stops = student.stop_ids
    model.lengths = dict(zip((row[0] for row in ids), asked.lengths, strict=True))
    facts, frozen, trainer = (
        ModelFacts.read(student.model, student.tokenizer), FrozenModel(teacher), trl_trainer(student, teacher)
    )  # fmt: skip
    engine, sampling = HFEngine(FrozenModel(student)), Sampling(temperature=1.0, max_new_tokens=LONGEST)

    def ours(objective: Objective) -> Callable[[], None]:
        bound = objective.bind(facts)
        distilled = DistillModel(student, [bound])

        def step() -> None:
            student.model.eval()
            written = engine.generate(asked.prompts, sampling, seed=0)
            assert written.lengths == asked.lengths, written.lengths
            for part in split_by_tokens(written, BUDGET):
                batch = student_batch(part, pad_id=0, device=student.device)
                targets = Targets(teacher=frozen.hidden(batch, bound.teacher_taps))
                (distilled(batch, targets)[0].sum() / sum(written.lengths)).backward()
            student.model.zero_grad()

        return step

    def trl() -> None:
        completions = trainer._generate_single_turn(ids, None, {})
        written = replace(asked, completion_ids=tuple(map(tuple, completions)))
        assert written.lengths == asked.lengths, written.lengths
        trl_update(trainer, student, written)

    return {"trl": trl, "oprd": ours(OPRD()), "ours": ours(OPD()), "ours-top-16": ours(OPDTopK())}


def head_of(states: HiddenStates) -> Tensor:
    assert states.head is not None
    return states.head.weight


def liger_loss() -> Callable[..., Tensor]:
    """Reverse KL, mean over tokens; torch.compile, its default, is left out on a CPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)


def trl_trainer(student: LanguageModel, teacher: LanguageModel) -> Any:
    """Its DistillationTrainer with the reverse KL."""
    from trl import DistillationConfig, DistillationTrainer  # type: ignore[import-not-found]

    arguments = DistillationConfig(
        output_dir=tempfile.mkdtemp(),
        beta=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        max_completion_length=LONGEST,
    )
    return DistillationTrainer(
        model=student.model, teacher_model=teacher.model, args=arguments, processing_class=student.tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * 8),
    )  # fmt: skip


def trl_update(trainer: Any, student: LanguageModel, every: Rollouts) -> None:
    """On prompts padded on the left and completions on the right, 8 at a time, all padded to the longest of the step."""
    batch = student_batch(every, pad_id=0, device=student.device)
    ids, mask = batch.input_ids, batch.attention_mask
    for rows in torch.arange(len(ids)).split(8):
        inputs = {
            "prompt_ids": ids[rows, :PROMPT], "prompt_mask": mask[rows, :PROMPT],
            "completion_ids": ids[rows, PROMPT:], "completion_mask": mask[rows, PROMPT:],
            "num_items_in_batch": torch.tensor(float(sum(every.lengths))),
        }  # fmt: skip
        trainer.compute_loss(student.model, inputs).backward()
    student.model.zero_grad()


def kernels(case: str) -> Arms:
    rows, width, teacher_width, vocabulary = KERNELS[case]
    torch.manual_seed(0)
    hidden, theirs = torch.randn(rows, width, requires_grad=True), torch.randn(rows, teacher_width)
    weight, their_weight = (torch.randn(vocabulary, d) * d**-0.5 for d in (width, teacher_width))
    weight.requires_grad_()
    ids = torch.randint(0, vocabulary, (1, rows))
    batch = one_completion(ids)
    student = HiddenStates(hidden={PREDICTING: hidden}, head=LMHead(weight=weight), batch=batch)
    teacher = HiddenStates(hidden={PREDICTING: theirs}, head=LMHead(weight=their_weight), batch=batch)

    def backward(loss: Callable[[], Tensor]) -> None:
        loss().backward()
        hidden.grad = weight.grad = None

    @torch.no_grad()
    def bare() -> None:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        buffers = torch.empty(2, 256, vocabulary)
        for some in range(0, rows, 256):
            chunk = slice(some, some + 256)
            torch.mm(hidden[chunk], weight.T, out=buffers[0])
            torch.mm(theirs[chunk], their_weight.T, out=buffers[1])
            torch.mm(buffers[0], weight, out=grad_hidden[chunk])
            grad_weight.addmm_(buffers[0].T, hidden[chunk])

    def ours(objective: Objective) -> Callable[[], None]:
        return partial(backward, lambda: objective.per_token(student, Targets(teacher=teacher)).mean())

    liger = liger_loss()
    return {
        "bare": bare,
        "ours": ours(OPD()),
        "ours-top-16": ours(OPDTopK()),
        "ours-sampled": ours(OPDSampled()),
        "plain": partial(backward, lambda: reverse_kl(hidden @ weight.T, theirs @ their_weight.T).mean()),
        "liger": partial(backward, lambda: liger(hidden, weight, theirs, their_weight, ids[0])),
    }


def one_completion(ids: Tensor) -> Batch:
    prompt = Prompt(row=0, messages=(), token_ids=(0,))
    one = Rollouts(prompts=(prompt,), completion_ids=(tuple(ids[0].tolist()),), finished=(True,))
    return student_batch(one, pad_id=0, device=ids.device)


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def summary(seconds: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, Any]:
    """By arm: median CPU seconds, the median and the range over rounds of its ratio to the first arm, peak memory."""
    found, first = {}, next(iter(seconds))
    for arm, taken in seconds.items():
        ratios = [mine / floor for mine, floor in zip(taken, seconds[first], strict=True)]
        found[arm] = {
            "cpu_seconds": round(statistics.median(taken), 3),
            f"times_{first}": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
        } | ({"peak_gib": round(peaks[arm], 3)} if peaks else {})
    return found


def measure(case: str, names: list[str] | None, rounds: int, write: Callable[[dict[str, Any]], None]) -> None:
    arms = kernels(case) if case in KERNELS else steps() if case == "step" else updates(case)
    arms = {arm: work for arm, work in arms.items() if names is None or arm in (next(iter(arms)), *names)}
    # the first run of each, which warms up as well; a profile of the thousands of tokens of `step` would fill the memory
    peaks = {arm: peak_gib(work) for arm, work in arms.items()} if case != "step" else {}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, work in arms.items():
            seconds[arm].append(cpu_seconds(work))
        write({"rounds": len(next(iter(seconds.values()))), "arms": summary(seconds, peaks)})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peers", help="site-packages of an environment with TRL and Liger")
    parser.add_argument("--rounds", type=int, default=5)
    cases = ["short", "long", "heavy-padded", "heavy-packed", *KERNELS, "step"]
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases)
    parser.add_argument("--arms", nargs="+", help="only these, beside the first")
    given = parser.parse_args()
    sys.path.append(given.peers)
    torch.set_num_threads(1)
    stored = json.loads(OUT.read_text()) if OUT.is_file() else {}
    for case in given.cases:

        def write(result: dict[str, Any], case: str = case) -> None:
            stored[case] = result | {"machine": describe_machine()}
            OUT.write_text(json.dumps(stored, indent=1) + "\n")

        measure(case, given.arms, given.rounds, write)
        print(case, json.dumps(stored[case]["arms"], indent=1), flush=True)


if __name__ == "__main__":
    main()
