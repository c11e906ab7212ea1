"""The rules of the house: imports point down, sizes stay small, a method has one place, every option has a user."""

import ast
import graphlib
import io
import re
import subprocess
import sys
import tokenize
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest

from conftest import ROOT
from oprd.recipe import Recipe, load_recipe
from oprd.section import Section

Node = TypeVar("Node", bound=ast.AST)
SOURCE = ROOT / "src" / "oprd"
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = (
    {"types", "section", "errors", "seeds", "files", "distributed", "clock", "progress"},
    {"losses", "models", "data", "verify", "report"},
    {"teacher", "bridge", "effopd"},  # EffOPD moves weights and knows no objective
    {"rollout", "objectives"},
    {"recipe", "student", "evaluate"},
    {"algorithm"},
    {"train", "plan"},
    {"demo"},
    {"cli", "__main__"},
)
"""A module imports from its own floor and from those below it, in no circle. `oprd/__init__.py` names what is public."""
MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS, MOST_FIELDS = 350, 50, 7, 128
MOST_LINES = 14_350
"""Of the whole package: 8,919 for what the house holds, whose aim is 7,500; checks of numbers, files and engines came since."""
MOST_PLACES = 3
REGISTRIES = {"__init__.py", "objectives/__init__.py", "teacher/__init__.py", "teacher/several.py", "cli.py"}
"""Where a variant is entered: public names, the unions on `type`, the commands. Keys of a recipe are entered in recipe.py."""
NAMES = {
    "oprd": (r"\bOPRD\b(?!-)", "objectives/oprd.py"),
    "ride": (r"(?i)\bride\b", "objectives/ride.py"),
    "opd": (r"\bOPD(Sampled|TopK)?\b|\bopd(_sampled|_top_k)?\b", "objectives/opd.py"),
    "oprd_bridge": (r"(?i)bridge", "bridge/|objectives/oprd_bridge|train/fit_bridge.py"),
    "omni_opd": (r"(?i)omni", "objectives/omni_opd.py"),
    "nll": (r"(?i)\bnll\b", "objectives/nll.py"),
    "source student": (r"StudentSource", "rollout/sources.py"),
    "source dataset": (r"DatasetSource", "rollout/sources.py"),
    "source teacher": (r"TeacherSource|\bsequence/", "rollout/sources.py"),
    "source rewrite": (r"\brewrites?\b|RewriteSource|\bMPD\b", "rollout/sources.py"),  # Rollouts.rewritten is data
    "teacher local": (r"LocalTeacherConfig", "teacher/local.py"),
    "teacher self": (r"SelfTeacher|['\"]self['\"]", "teacher/local.py"),
    "teacher server": (
        r"(?i)server(?!error)|openai|vllm",
        "teacher/(server|transport|exchange|remote|serve|wire).py|rollout/vllm",
    ),  # errors name causes; remote teachers have servers of their own
    "teacher remote": (r"Remote(Teacher|Model)|['\"]remote['\"]", "teacher/(remote|serve|wire).py"),
    "teacher several": (r"SeveralTeachers|['\"]several['\"]", "teacher/several.py"),
    "engine hf": (r"HFEngine|['\"]hf['\"]", "rollout/hf.py"),
    "engine vllm": (r"(?i)vllm", "rollout/vllm"),
    "effopd": (r"(?i)effopd|extrapolat", "effopd.py|train/validation.py|objectives/ride.py"),  # RIDE: of targets
}
"""(pattern, own files) of each method, source, teacher and engine. Its own files are one place. Identifiers and texts of the
program count; docstrings and comments, which explain by examples, do not."""


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, without `oprd.`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "oprd":
            base = node.module.removeprefix("oprd").removeprefix(".")
            inner = {f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
            modules = {name for name in inner if (SOURCE / f"{name.replace('.', '/')}.py").is_file()}
            found |= modules | ({base} if base and modules != inner else set())
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("oprd.") for alias in node.names if alias.name.startswith("oprd.")}
    return found


def module(file: Path) -> str:
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def floor_of(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name.split(".")[0] in names)


def where(file: Path) -> str:
    return str(file.relative_to(SOURCE))


def every_node(kind: type[Node]) -> Iterator[tuple[Path, Node]]:
    for file in FILES:
        yield from ((file, node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kind))


def every_function() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(file, line and name; function) of every function and method."""
    for kind in (ast.FunctionDef, ast.AsyncFunctionDef):
        for file, node in every_node(kind):
            yield f"{where(file)}:{node.lineno} {node.name}", node


def none_of(offenders: Iterable[str]) -> None:
    found = sorted(offenders)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", FILES, ids=where)
def test_imports_point_down(file):
    if module(file) == "__init__":
        return
    none_of(name for name in imports(file) if floor_of(name) > floor_of(module(file)))


def test_no_modules_import_each_other_in_a_circle():
    graph = {module(file): imports(file) for file in FILES if module(file) != "__init__"}
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_the_report_reads_files_only():
    assert set().union(*(imports(file) for file in (SOURCE / "report").glob("*.py"))) == {"errors", "files"}


def test_help_comes_without_torch_and_a_recipe_without_what_it_does_not_use():
    code = (
        "import sys, oprd\n"
        "assert 'torch' not in sys.modules, 'import oprd'\n"
        "import oprd.cli\n"
        "sys.argv = ['oprd', '--help']\n"
        "try: oprd.cli.main()\n"
        "except SystemExit as exit: assert not exit.code\n"
        "assert 'torch' not in sys.modules, 'oprd --help'\n"
        "import oprd.recipe\n"
        "assert not {'openai', 'peft', 'bitsandbytes', 'plotly'} & set(sys.modules), 'a recipe that uses none of them'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_package_is_small():
    lines = {where(file): len(file.read_text().splitlines()) for file in FILES}
    none_of(f"{name}: {count} lines" for name, count in lines.items() if count > MOST_FILE_LINES)
    assert sum(lines.values()) <= MOST_LINES


def test_functions_are_short():
    sizes = [(name, (node.end_lineno or 0) - node.lineno + 1) for name, node in every_function()]
    none_of(f"{name}: {size} lines" for name, size in sizes if size > MOST_FUNCTION_LINES)


def test_functions_take_few_parameters():
    found = []
    for name, node in every_function():
        args = node.args
        given = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg) if a]
        count = len([a for a in given if a not in {"self", "cls"}])
        found += [f"{name}: {count} parameters"] if count > MOST_PARAMETERS else []
    none_of(found)


def test_no_callable_takes_and_returns_anything():
    none_of(
        f"{where(file)}:{node.lineno}"
        for file, node in every_node(ast.Subscript)
        if ast.unparse(node).endswith("Callable[..., Any]")
    )


def test_no_code_asks_which_variant_a_section_is():
    """`isinstance` of a name that ends in Config, or of a section that a `type` tells apart from others, outside of the
    registries and of a method's own command."""
    tagged = [section for section in sections() if "type" in section.model_fields]
    variants = {cls.__name__ for cls in sections() if any(issubclass(section, cls) for section in tagged)}
    calls = [(file, node) for file, node in every_node(ast.Call) if ast.unparse(node.func) == "isinstance"]
    found = []
    for file, node in calls:
        asked = set(re.findall(r"\w+", ast.unparse(node.args[1])))
        if asked & variants or any(name.endswith("Config") for name in asked):
            found += (
                [f"{where(file)}:{node.lineno} {ast.unparse(node)}"]
                if where(file) not in REGISTRIES | {"train/fit_bridge.py"}
                else []
            )
    none_of(found)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_named_in_few_places(name):
    pattern, own = NAMES[name]
    named = [where(file) for file in FILES if re.search(pattern, words(file))]
    others = [file for file in named if file not in REGISTRIES and not re.match(own, file)]
    assert any(re.match(own, file) for file in named), f"the pattern of {name!r} misses its own files"
    assert len(others) + 1 <= MOST_PLACES, f"{name!r} is named in its own files and in {', '.join(others)}"


@cache
def words(file: Path) -> str:
    """Identifiers and texts of a file, one a line, without comments, docstrings, and what recipe.py registers."""
    text = file.read_text()
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        registers = isinstance(node, ast.ImportFrom | ast.AnnAssign) or (
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "GONE"
        )
        if is_docstring or (file.name == "recipe.py" and registers):
            skipped |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(
        token.string
        for token in tokens
        if token.type in {tokenize.NAME, tokenize.STRING} and token.start[0] not in skipped
    )


@cache
def sections() -> tuple[type[Section], ...]:
    """Every section that a recipe can hold, with the classes that they share fields with."""
    found: set[type[Section]] = set()

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, Section) and annotation not in found:
            found.update(cls for cls in annotation.__mro__ if issubclass(cls, Section) and cls is not Section)
            for field in annotation.model_fields.values():
                visit(field.annotation)
        for argument in typing.get_args(annotation):
            visit(argument)

    visit(Recipe)
    return tuple(sorted(found, key=lambda section: (section.__module__, section.__name__)))


def options(section: type[Section]) -> list[str]:
    """The options that a class adds: its own fields but for the tag `type` and for other defaults of inherited ones."""
    inherited = {name for base in section.__bases__ if issubclass(base, Section) for name in base.model_fields}
    return [name for name in section.model_fields if name != "type" and name not in inherited]


def defined_in(section: type[Section], name: str) -> str:
    """`Class.field` of the class that adds the field."""
    return next(
        f"{cls.__name__}.{name}" for cls in section.__mro__ if issubclass(cls, Section) and name in options(cls)
    )


def fields() -> list[str]:
    return [f"{section.__name__}.{name}" for section in sections() for name in options(section)]


def test_there_are_few_options():
    assert len(fields()) <= MOST_FIELDS


def test_every_option_has_a_description():
    none_of(
        f"{section.__name__}.{name}"
        for section in sections()
        for name in options(section)
        if not section.model_fields[name].description
    )


OPERATIONAL = {
    "the data at hand": {"DataConfig.split", "DataConfig.drop_overlong", "DataConfig.deduplicate"},
    "a machine without network, a quick look, other draws": {
        "RowsSection.limit", "EvaluationConfig.seed", "Recipe.seed",
    },
    "what the model's family and the installed kernels allow": {
        "LoraSection.target_modules", "StudentConfig.attn_implementation",
    },
    "the optimizer's and the adapters' usual settings": {
        "OptimizerSection.weight_decay", "OptimizerSection.adam_epsilon", "OptimizerSection.max_grad_norm",
        "LoraSection.dropout",
    },
    "what fits into memory": {
        "Recipe.micro_batch_tokens", "Recipe.packing", "RolloutConfig.engine", "EngineConfig.cache_tokens", "LocalTeacherConfig.device",
        "LocalTeacherConfig.quantization", "LocalTeacherConfig.offload", "StudentConfig.weights", "OptimizerSection.optim",
    },
    "what the GPU, its compiler and servers beside it make faster": {
        "StudentConfig.torch_compile", "RolloutConfig.rollouts_ahead",
    },
    "where vLLM is, and how far it is trusted": {
        "VLLMEngineConfig.urls", "VLLMEngineConfig.python", "VLLMEngineConfig.memory_share", "VLLMEngineConfig.timeout_s",
        "VLLMEngineConfig.max_logprob_difference",
    },
    "what is logged, evaluated and kept, and going on after a stop": {
        "Recipe.logging_steps", "Recipe.health_tokens", "Recipe.eval_steps", "Recipe.save_total_limit",
        "Recipe.report_to", "Recipe.resume_from_checkpoint", "Recipe.max_skipped_steps",
    },
    "what the server can do, how slow it is, and what may be spent on it": {
        "ServerTeacherConfig.cache", "ServerSection.timeout_s",
        "ServerSection.step_timeout_s", "ServerSection.max_retries", "ServerSection.max_requests",
        "ServerSection.max_tokens", "RemoteTeacherConfig.timeout_s", "RemoteTeacherConfig.max_retries",
    },
}  # fmt: skip
"""Options that no recipe of a method needs, by the reason why they are there."""


def test_every_option_is_used_by_a_recipe_or_operational():
    used = set().union(*(spelled_out(load_recipe(path)) for path in (ROOT / "recipes").glob("*.yaml")))
    operational = set().union(*OPERATIONAL.values())
    none_of(operational - set(fields()))  # no such option
    none_of(operational & used)  # a recipe uses it: no reason is needed
    none_of(set(fields()) - used - operational)


def spelled_out(value: object) -> set[str]:
    """`Class.field` of every option that a recipe spells out."""
    if isinstance(value, dict):
        return set().union(*map(spelled_out, value.values()))
    if isinstance(value, tuple):
        return set().union(*map(spelled_out, value))
    if not isinstance(value, Section):
        return set()
    own = {defined_in(type(value), name) for name in value.model_fields_set - {"type"}}
    return own.union(*(spelled_out(getattr(value, name)) for name in value.model_fields_set))
