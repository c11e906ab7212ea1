"""The command line: demo | train | plan | fit-bridge | eval | report | show-config | schema."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from oprd.errors import DiskError, Interrupted, OprdError, TrainingStopped
from oprd.progress import console

# commands import what they need when they run: torch takes seconds, and `oprd --help` does without it
HELP = "On-policy distillation: the student writes, the teacher answers, the student learns."
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=HELP)

RecipePath = Annotated[Path, typer.Argument(help="A recipe in YAML.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as rollout.group_size=4.")]
Model = Annotated[str, typer.Argument(help="Folder or Hub name; a run's student/, or an adapter's folder.")]
BENCHMARKS = "Names, or paths with columns problem, answer; keys of a recipe's `evaluation`, such as samples=4."
Benchmarks = Annotated[list[str], typer.Argument(metavar="BENCHMARK|KEY=VALUE", help=BENCHMARKS)]
Runs = Annotated[list[Path], typer.Argument(help="Run folders.")]
EvalFolder = Annotated[Path, typer.Option(help="Folder for scores and completions with their verdicts.")]
DemoFolder = Annotated[Path, typer.Option(help="Folder of the two runs; an interrupted demo goes on there.")]
DemoSeed = Annotated[int, typer.Option(min=0, max=2**32 - 1)]
Page = Annotated[Path, typer.Option(help="The page to write.")]

DeviceName = Annotated[str, typer.Option(help="Of the table in plan/devices.yaml, or its memory in GB.")]
Processes = Annotated[int, typer.Option(min=1, help="Devices, one process each.")]
Sharded = Annotated[bool, typer.Option("--sharded", help="The student's weights are sharded over them (FSDP2).")]

Host = Annotated[str, typer.Option(help="Address to listen on; other than this machine's own it needs a key.")]
Port = Annotated[int, typer.Option(min=1, max=65535)]
Dtype = Annotated[Literal["bfloat16", "float32"], typer.Option(help="Precision of weights and computation.")]
Blocks = Annotated[str, typer.Option(help="Whose hidden states may be asked for: all, last, or numbers as in 4,8,12.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens of one request; they are read in one forward pass.")]
KeyVariable = Annotated[str | None, typer.Option(help="Environment variable that holds the key which clients send.")]

EXIT_USER_ERROR, EXIT_STOPPED = 2, 3


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Distil as the recipe says. Resume with resume_from_checkpoint=latest."""
    from oprd.recipe import load_recipe
    from oprd.train.run import run_recipe

    done = run_recipe(load_recipe(recipe, overrides or []))
    if int(os.environ.get("RANK", "0")) == 0:
        for row in done.result.evaluations:
            interval = f"[{row.avg_at_k_low:.3f}, {row.avg_at_k_high:.3f}]"
            print(f"{row.benchmark} avg@{row.samples} {row.avg_at_k:.3f} {interval}")
        print(f"student: {done.run_folder / 'student'}")


@app.command()
def plan(
    recipe: RecipePath, overrides: Overrides = None, device: DeviceName = "h100", processes: Processes = 1,
    sharded: Sharded = False,
) -> None:  # fmt: skip
    """Say whether a run fits a device, what would help, and the least time a step takes. Loads no weights, needs no GPU."""
    from oprd.plan.plan import Place, explain, find_device, largest_budget, plan_recipe
    from oprd.recipe import load_recipe

    wanted = load_recipe(recipe, overrides or [])
    found = plan_recipe(wanted, Place(device=find_device(device), processes=processes, sharded=sharded))
    console.print(explain(wanted, found))
    console.print(f"largest micro_batch_tokens that fits: {largest_budget(wanted, found)}")
    least = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in found.seconds.items())
    console.print(f"a step takes at least: {least}")


@app.command("fit-bridge")
def fit_bridge(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Fit the maps of objective oprd_bridge and write the file that training reads."""
    from oprd.recipe import load_recipe
    from oprd.train.fit_bridge import fit_bridge as fit

    path, curves = fit(load_recipe(recipe, overrides or []))
    for block, curve in curves.items():
        rank = curve["auto_rank"]
        cosine = curve["cosine"][min(max(rank, 1), len(curve["cosine"])) - 1]
        print(f"block {block} to {curve['teacher_block']}: automatic rank {rank}, held-out cosine there {cosine:.3f}")
    print(f"{min(curve['rows'] for curve in curves.values())} rows; bridge: {path}")


@app.command("eval")
def evaluate(model: Model, benchmarks: Benchmarks, out: EvalFolder = Path("runs/eval")) -> None:
    """Score a model: avg@k, pass@k, best@k, maj@k, length, distinct-4-grams, truncation."""
    from oprd.evaluate.evaluate import evaluate_model, print_table
    from oprd.recipe import parse_evaluation

    overrides = [text for text in benchmarks if re.match(r"\w+=", text)]
    config = parse_evaluation([text for text in benchmarks if text not in overrides], overrides)
    if not config.benchmarks:
        raise typer.BadParameter("name a benchmark to score the model on")
    print_table((row.benchmark, row) for row in evaluate_model(model, config, out=out))
    print(f"completions and verdicts: {out}")


@app.command("serve-teacher")
def serve_teacher(
    model: Model, host: Host = "127.0.0.1", port: Port = 8500, dtype: Dtype = "bfloat16", blocks: Blocks = "all",
    max_tokens: MaxTokens = 65_536, api_key_env: KeyVariable = None,
) -> None:  # fmt: skip
    """Give a model's hidden states to trainings on other machines: `teacher: {type: remote, urls: [...]}`."""
    from oprd.teacher.serve import Options, serve

    serve(model, host, port, Options(dtype=dtype, blocks=blocks, max_tokens=max_tokens, api_key_env=api_key_env))


@app.command("show-config")
def show_config(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print the whole recipe with every default spelled out."""
    from oprd.recipe import load_recipe, recipe_to_yaml

    print(recipe_to_yaml(load_recipe(recipe, overrides or [])), end="")


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    import json

    from oprd.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def report(runs: Runs, out: Page = Path("report.html")) -> None:
    """Write one self-contained HTML page about runs."""
    from oprd.report.html import write_report

    print(write_report(runs, out))


@app.command()
def demo(out: DemoFolder = Path("runs/demo"), seed: DemoSeed = 0) -> None:
    """Watch a tiny student reach its teacher: OPRD and sampled-token OPD on signed sums, in minutes on two cores."""
    from oprd.demo.run import run_demo

    run_demo(out, seed=seed)


def main() -> None:
    """Run the command line; errors a user can mend are shown without a traceback."""
    # the Rust tokenizers' threads do not survive the forks of worker processes and warn about it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    go_on = {
        "train": "Go on with the same command and resume_from_checkpoint=latest",
        "demo": "The same command goes on from there",
    }.get(" ".join(sys.argv[1:2]), "Nothing that was written is lost")
    received: list[int] = []

    def stop_at_once(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, stop_at_once)
    try:
        app()
    except OprdError as error:
        stopped = isinstance(error, TrainingStopped | DiskError)
        _say(str(error), "stopped" if stopped else type(error).__name__)
        sys.exit(EXIT_STOPPED if stopped else EXIT_USER_ERROR)
    except OSError as error:  # a full disk, a folder that nobody may write to
        _say(str(error), "stopped")
        sys.exit(EXIT_STOPPED)
    except Interrupted as error:
        _say(f"{error}. {go_on}.")
        sys.exit(128 + error.signal)
    except (SystemExit, KeyboardInterrupt):
        # typer turns a KeyboardInterrupt into an exit, in silence
        if received:
            _say(f"Stopped at once; what was saved before is intact. {go_on}.")
            sys.exit(128 + received[-1])
        raise


def _say(text: str, kind: str = "") -> None:
    console.print(Text.assemble((f"{kind}: ", "bold red") if kind else "", text))
