"""The command line: demo | train | fit-bridge | eval | diagnose | report | show-config."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from oprd.config.reading import load_recipe, recipe_to_yaml
from oprd.errors import Interrupted, OprdError, TrainingStopped
from oprd.progress import console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="On-policy distillation: the student writes, the teacher answers, the student learns.",
)
diagnose = typer.Typer(no_args_is_help=True, help="Look closer at a finished run.")
app.add_typer(diagnose, name="diagnose")
RecipePath = Annotated[Path, typer.Argument(help="A recipe in YAML.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, such as objective.k=500 or learning_rate=1e-4.")
]

EXIT_USER_ERROR, EXIT_STOPPED, EXIT_INTERRUPTED = 2, 3, 130


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Distil as the recipe says. Resume with resume_from_checkpoint=latest."""
    parsed = load_recipe(recipe, overrides or [])
    from oprd.train.run import run_recipe

    done = run_recipe(parsed)
    if int(os.environ.get("RANK", "0")) == 0:
        for row in done.result.evaluations:
            print(
                f"{row.benchmark} avg@{row.samples} {row.avg_at_k:.3f} [{row.avg_at_k_low:.3f}, {row.avg_at_k_high:.3f}]"
            )
        print(f"student: {done.run_folder / 'student'}")


@app.command("fit-bridge")
def fit_bridge(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Fit the maps of objective oprd_bridge; an interrupted fit goes on where it was."""
    parsed = load_recipe(recipe, overrides or [])
    from oprd.train.fit_bridge import fit_bridge as fit

    fitted = fit(parsed)
    for (student, teacher), rank, cosine in zip(fitted.blocks, fitted.auto_ranks, fitted.cosine, strict=True):
        print(f"block {student} to {teacher}: automatic rank {rank}, held-out cosine there {cosine:.3f}")
    print(f"{fitted.rows} rows; bridge: {fitted.path}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name; a run's student/, or an adapter's folder.")],
    benchmarks: Annotated[list[str], typer.Argument(help="Benchmark names or paths with columns problem, answer.")],
    out: Annotated[Path, typer.Option(help="Folder for scores and completions with their verdicts.")] = Path(
        "runs/eval"
    ),
    data_dir: Annotated[str | None, typer.Option(help="Folder searched first for NAME.jsonl.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions per problem.")] = 16,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    max_completion_length: Annotated[int, typer.Option(min=1, help="In tokens.")] = 1024,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first problems.")] = None,
    prompt_template: Annotated[str | None, typer.Option(help="The user message; {column} is filled.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file inside the model folder.")] = None,
    seed: int = 0,
) -> None:
    """Score a model: avg@k, pass@k, best@k, maj@k, length, distinct-4-grams, truncation."""
    from oprd.evaluate.command import evaluate_model

    rows = evaluate_model(
        model,
        {
            "benchmarks": benchmarks,
            "data_dir": data_dir,
            "samples": samples,
            "sampling_temperature": temperature,
            "top_p": top_p,
            "max_completion_length": max_completion_length,
            "limit": limit,
            "prompt_template": prompt_template,
            "seed": seed,
        },
        out=out,
        gguf_file=gguf_file,
    )
    from oprd.evaluate.table import evaluation_table

    table = Console()
    table.print(evaluation_table(rows, width=table.width))
    print(f"completions and verdicts: {out}")


@diagnose.command("updates")
def diagnose_updates(
    run: Annotated[Path, typer.Argument(help="A run folder that keeps several checkpoints.")],
    share: Annotated[
        list[float] | None, typer.Option(help="Score the early update at this share of the final norm too; repeatable.")
    ] = None,
) -> None:
    """Where the weights went and how early: norms, dominant directions, "go far early". Writes RUN/updates.json."""
    from oprd.diagnose.updates import diagnose_updates

    print(f"{diagnose_updates(run, share or ())}; look at it: oprd report {run}")


@app.command("show-config")
def show_config(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print the whole recipe with every default spelled out."""
    print(recipe_to_yaml(load_recipe(recipe, overrides or [])), end="")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about runs."""
    from oprd.report.html import write_report

    print(write_report(runs, out))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the two runs; an interrupted demo goes on there.")] = Path(
        "runs/demo"
    ),
    seed: int = 0,
) -> None:
    """Watch a tiny student reach its teacher: OPRD and sampled-token OPD on signed sums, in minutes on two cores."""
    from oprd.demo.run import run_demo

    run_demo(out, seed=seed)


def main() -> None:
    """Run the command line; errors of the user's making are told without a traceback."""
    # the Rust tokenizers' threads do not survive the forks of worker processes and warn about it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except TrainingStopped as error:
        console.print(f"[bold red]stopped:[/] {error}", highlight=False)
        sys.exit(EXIT_STOPPED)
    except OprdError as error:
        console.print(f"[bold red]{type(error).__name__}:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        sys.exit(EXIT_USER_ERROR)
    except Interrupted as error:
        console.print(f"{error}. {_go_on()}.", highlight=False)
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as exit:
        # typer turns a Ctrl-C outside of the loop into this exit, in silence
        if exit.code == EXIT_INTERRUPTED:
            console.print(f"Stopped at once; what was saved before is intact. {_go_on()}.", highlight=False)
        raise


def _go_on() -> str:
    """What to type after an interrupt."""
    if sys.argv[1:2] == ["train"]:
        return "Go on with the same command and resume_from_checkpoint=latest"
    return "The same command goes on from there" if sys.argv[1:2] == ["demo"] else "Nothing that was written is lost"
