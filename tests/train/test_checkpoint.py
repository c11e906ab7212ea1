"""A checkpoint is loaded whole and unchanged, or not at all."""

import hashlib
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from conftest import miniature_recipe
from oprd.distributed import Ranks
from oprd.errors import RunFolderError
from oprd.files import SUMS
from oprd.recipe import parse_recipe
from oprd.train import loop
from oprd.train.checkpoint import checkpoints, load_checkpoint, whole_checkpoint
from oprd.train.run import run_recipe
from oprd.train.setup import setup
from train.runs import assert_equal_runs, assert_same_weights, metrics, save_checkpoint, update, weights

FILES = ("SHA256SUMS", "shard-00001-model-00001-of-00001.safetensors", "state.json")


@pytest.fixture(scope="module")
def tree(tmp_path_factory, train_file):
    """A recipe, and the run of it with every checkpoint."""
    out = tmp_path_factory.mktemp("whole") / "run"
    extrapolation = {"every": 1, "score": "objective", "validation_prompts": 2}
    tree = miniature_recipe(out, train_file, max_steps=3, save_steps=1, save_total_limit=3, extrapolation=extrapolation)
    run_recipe(parse_recipe(tree))
    return tree


@pytest.fixture
def run(tree, tmp_path):
    """The run as it was before its last lines were written."""
    shutil.copytree(tree["output_dir"], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def ranks():
    return Ranks(Accelerator())


def resume(tree, run: Path, asked: Path | str = "latest", **changes) -> None:
    run_recipe(parse_recipe(tree | {"output_dir": str(run), "resume_from_checkpoint": str(asked)} | changes))


def truncate(file: Path, rng: random.Random, _: Path) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def flip(file: Path, rng: random.Random, _: Path) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def swap(file: Path, _: random.Random, other: Path) -> None:
    shutil.copyfile(other / file.name, file)


def lengthen(file: Path, rng: random.Random, _: Path) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(1 + rng.randrange(9)))


def replace_by_a_folder(file: Path, _: random.Random, __: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE: dict[Callable[[Path, random.Random, Path], object], int] = {
    truncate: 8,
    flip: 16,
    lengthen: 3,
    lambda file, *_: file.write_bytes(b""): 1,
    lambda file, *_: file.unlink(): 1,
    swap: 1,
    replace_by_a_folder: 1,
}
"""How often each kind is tried on each file."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_a_file_is_named_and_the_checkpoint_before_is_taken(name, run, ranks, capfd):
    folder, rng = run / "checkpoints", random.Random(name)
    before, newest = checkpoints(folder)[-2:]
    assert tuple(sorted(file.name for file in newest.iterdir())) == FILES
    shutil.copytree(newest, run / "intact")
    for damage, times in DAMAGE.items():
        for _ in range(times):
            damage(newest / name, rng, before)
            with pytest.raises(RunFolderError, match="step-000003"):
                whole_checkpoint(folder, str(newest), ranks)
            capfd.readouterr()
            assert whole_checkpoint(folder, "latest", ranks) == before
            told = capfd.readouterr().err
            assert "step-000003: " in told
            assert name in told or name == SUMS  # a name that changed in it is a file that is missing
            assert "step-000002 instead" in told
            shutil.rmtree(newest)
            shutil.copytree(run / "intact", newest)
    assert whole_checkpoint(folder, "latest", ranks) == newest


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_to_the_same_end(tree, run):
    flip(run / "checkpoints" / "step-000003" / FILES[1], random.Random(0), run)
    resume(tree, run)
    assert_equal_runs(Path(tree["output_dir"]), run)
    assert whole_checkpoint(run / "checkpoints", "latest", Ranks(Accelerator())) == run / "checkpoints" / "step-000003"


def test_a_run_without_a_whole_checkpoint_does_not_start_anew_by_itself(tree, run):
    for path in checkpoints(run / "checkpoints"):
        (path / SUMS).unlink()
    with pytest.raises(
        RunFolderError, match=r"step-000003: SHA256SUMS is missing.*step-000001: SHA256SUMS.*delete them"
    ):
        resume(tree, run)
    assert len(metrics(run)) == 3


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run, ranks):
    last = run / "checkpoints" / "step-000003"
    shutil.rmtree(last)
    (run / "checkpoints" / "step-000001").rename(last)
    with pytest.raises(RunFolderError, match="step-000003: it is the checkpoint of another step"):
        whole_checkpoint(run / "checkpoints", str(last), ranks)


class Stranger:
    def __reduce__(self):
        return pytest.fail, ("code of a checkpoint ran",)


def test_what_a_stranger_pickled_is_never_loaded(tree, run, ranks):
    """With a fitting checksum too: nothing in a checkpoint is unpickled."""
    path = run / "checkpoints" / "step-000003"
    (path / ".metadata").write_bytes(pickle.dumps(Stranger()))
    with pytest.raises(RunFolderError, match=r"damaged: \.metadata"):
        whole_checkpoint(run / "checkpoints", str(path), ranks)
    digest = hashlib.sha256((path / ".metadata").read_bytes()).hexdigest()
    with (path / SUMS).open("a") as sums:
        sums.write(f"{digest}  .metadata\n")
    resume(tree, run)
    assert_equal_runs(Path(tree["output_dir"]), run)


def test_a_run_resumed_from_an_earlier_checkpoint_and_killed_goes_on_from_there(tree, run, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    real = loop._step
    monkeypatch.setattr(loop, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        resume(tree, run, run / "checkpoints" / "step-000001")
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-000001"]
    assert len(metrics(run)) == 1
    monkeypatch.setattr(loop, "_step", real)
    resume(tree, run, save_total_limit=1)
    assert_equal_runs(Path(tree["output_dir"]), run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000003"]


def test_junk_beside_checkpoints_does_no_harm_and_what_is_of_a_run_is_cleaned(tree, run):
    folder = run / "checkpoints"
    for number in range(100):
        (folder / f"step-{number + 4:06d}").mkdir()
        (folder / f"notes {number}").write_text("mine")
    shutil.copytree(folder / "step-000003", folder / ".step-000003.tmp")
    (folder / "step-000200").write_text("a file")
    (folder / "step-000003" / SUMS).unlink()
    resume(tree, run)
    assert_equal_runs(Path(tree["output_dir"]), run)
    left = {path.name for path in folder.iterdir() if not path.name.startswith("notes ")}
    assert left == {"step-000001", "step-000002", "step-000003"}
    assert len(list(folder.glob("notes *"))) == 100


def test_saving_a_step_again_leaves_its_checkpoint_alone(tree, run, ranks):
    parts = setup(parse_recipe(tree | {"output_dir": str(run), "resume_from_checkpoint": "latest"}))
    folder = run / "checkpoints"
    made = {path: path.stat().st_ino for path in folder.rglob("*")}
    save_checkpoint(folder, 3, parts.method.student, ranks, keep=3)
    assert {path: path.stat().st_ino for path in folder.rglob("*")} == made


def test_before_the_first_update_the_optimizer_has_no_state(tmp_path, train_file, ranks):
    """Saved and loaded then, AdamW makes its first update as its first."""
    tree = miniature_recipe(tmp_path / "run", train_file)
    plain, saved, loaded = (setup(parse_recipe(tree)) for _ in range(3))
    save_checkpoint(tmp_path / "run" / "checkpoints", 0, saved.method.student, ranks, keep=1)
    assert not saved.method.student.optimizer.state
    path = whole_checkpoint(tmp_path / "run" / "checkpoints", "latest", ranks)
    assert path is not None
    load_checkpoint(path, loaded.method.student, ranks, {})
    for parts in (plain, saved, loaded):
        update(parts)
        assert {float(state["step"]) for state in parts.method.student.optimizer.state.values()} == {1.0}
    assert_same_weights(weights(plain), weights(saved), atol=0)
    assert_same_weights(weights(plain), weights(loaded), atol=0)


def test_weights_moments_and_rate_come_back_bit_for_bit(tmp_path, train_file, ranks):
    tree = miniature_recipe(tmp_path / "run", train_file, student={"lora": {"r": 4}}, warmup_ratio=0.5)
    tree["student"]["model"] = miniature_recipe(tmp_path, train_file)["student"]["model"]
    one, other = (setup(parse_recipe(tree)) for _ in range(2))
    update(one)
    save_checkpoint(tmp_path / "run", 1, one.method.student, ranks, keep=1)
    load_checkpoint(tmp_path / "run" / "step-000001", other.method.student, ranks, {})
    assert_same_weights(weights(one), weights(other), atol=0)
    ours, theirs = (parts.method.student.optimizer for parts in (one, other))
    for mine, its in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert all(torch.equal(value, its[key]) for key, value in mine.items())
    rates = [{key: value for key, value in o.param_groups[0].items() if key != "params"} for o in (ours, theirs)]
    assert rates[0] == rates[1]
