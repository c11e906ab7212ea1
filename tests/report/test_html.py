"""The page says what the files say, and nothing more."""

import json
import re
from pathlib import Path

import pytest

from oprd.errors import RunFolderError
from oprd.report.html import write_report


def make_run(folder: Path, *, steps: int = 3, torn: bool = False) -> Path:
    folder.mkdir(parents=True)
    folder.joinpath("recipe.yaml").write_text(
        "student: {model: models/small}\nteacher: {type: local, model: models/big}\nobjective: {type: oprd}\nmax_steps: 9\n"
    )
    folder.joinpath("run.json").write_text("{}")
    rows = [
        {"step": i, "train/oprd/mean": 1.0 / i, "time/rollout_s": 30.0, "time/update_s": 30.0, "memory/peak_gib": 1.25,
         "training_seconds/total": 60.0 * i,
         "rollout/truncated/share": 0.25, "train/skipped_steps/total": 2, "health/cosine_block_01/mean": 0.5}
        for i in range(1, steps + 1)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows) + ('{"step": 99, "tr' if torn else "")
    folder.joinpath("metrics.jsonl").write_text(text)
    score = {
        "step": 3,
        "training_seconds": 180.0,
        "generated_tokens": 987654,
        "benchmark": "aime24",
        "samples": 4,
        "avg_at_k": 0.4321,
        "avg_at_k_low": 0.4,
        "avg_at_k_high": 0.5,
    }
    folder.joinpath("evaluations.jsonl").write_text(json.dumps(score) + "\n")
    sample = {"step": 1, "prompt": "2+2", "completion": "<script>alert(1)</script> & 4", "finished": False, "length": 7}
    folder.joinpath("samples.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def table_of(page: str) -> str:
    return page[page.index("<table>") : page.index("</table>")]


def test_the_table_shows_the_numbers_of_the_files(tmp_path):
    page = write_report([make_run(tmp_path / "one")], tmp_path / "r.html").read_text()
    table = table_of(page)
    for text in ("one", "models/small", "models/big", "oprd", "3 of 9", "0.432 (0.400 to 0.500)", "3.0", "1.25", "25%"):
        assert f">{text}<" in table or text in table, text


def test_accuracy_is_held_against_steps_seconds_and_tokens(tmp_path):
    run = make_run(tmp_path / "one")
    page = write_report([run], tmp_path / "r.html").read_text()
    assert all(f"by {cost}" in page for cost in ("step", "seconds of training", "tokens the student wrote"))
    assert "987654" in page


def test_two_runs_of_the_same_name_both_appear_and_can_be_told_apart(tmp_path):
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")]
    table = table_of(write_report(runs, tmp_path / "r.html").read_text())
    assert "run (1)" in table
    assert "run (2)" in table


def test_what_a_model_wrote_is_shown_and_not_run(tmp_path):
    page = write_report([make_run(tmp_path / "one")], tmp_path / "r.html").read_text()
    assert "<script>alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; 4" in page


def test_nothing_is_loaded_from_the_network(tmp_path):
    page = write_report([make_run(tmp_path / "one")], tmp_path / "r.html").read_text()
    ours = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(src|href)\s*=|url\(|@import", ours)
    assert "<script src" not in page


def test_a_run_that_is_still_going_is_shown_as_far_as_it_has_come(tmp_path):
    page = write_report([make_run(tmp_path / "one", torn=True)], tmp_path / "r.html").read_text()
    assert "3 of 9" in table_of(page)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.yaml").write_text("max_steps: 5\n")
    page = write_report([empty], tmp_path / "e.html").read_text()
    assert "0 of 5" in table_of(page)
    assert "No step has been logged yet." in page


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="is not a run folder"):
        write_report([tmp_path], tmp_path / "r.html")


def test_searches_and_updates_are_drawn_where_a_run_has_them(tmp_path):
    run = make_run(tmp_path / "one")
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "Extrapolation: factor accepted" not in page
    search = {"step": 2, "accepted": 6.0, "score": 0.4, "candidates": []}
    (run / "searches.jsonl").write_text(json.dumps(search) + "\n")
    matrix = {"step": 3, "block": 1, "kind": "mlp.up_proj", "norm": 2.0, "relative_norm": 0.1}
    matrix |= {"cosine": 1.0, "top_energy": 0.5, "subspace_cosine": 1.0}
    scores = {
        "benchmark": "aime24",
        "early_step": 1,
        "final_step": 9,
        "before": 0.1,
        "early": 0.2,
        "rescaled": 0.3,
        "along": [[0.5, 0.35]],
        "final": 0.4,
    }
    (run / "updates.json").write_text(json.dumps({"rank": 4, "matrices": [matrix], "far_early": [scores]}))
    page = write_report([run], tmp_path / "r.html").read_text()
    titles = (
        "Extrapolation: factor accepted",
        "Energy of the update in its top 4 directions",
        "go far early, from step 1 of 9",
        "at 0.5",
    )
    assert all(title in page for title in titles)


def test_two_terms_of_a_kind_are_two_curves(tmp_path):
    run = make_run(tmp_path / "one")
    rows = [{"step": step, "train/reverse_kl_1/mean": 0.5, "train/reverse_kl_2/mean": 0.25} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "one: reverse_kl_1" in page
    assert "one: reverse_kl_2" in page
