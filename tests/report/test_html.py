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
        {"step": i, "train/oprd/mean": 1.0 / i, "time/rollout_s/sum": 30.0, "time/update_s/sum": 30.0, "memory/peak_gib/max": 1.25,
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


def figures_of(page: str) -> list[dict]:
    groups = re.search(r"const groups = (.*);", page)
    return [figure for group in json.loads(groups[1]) for figure in group]


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


def test_every_metric_is_drawn_whatever_its_name(tmp_path):
    run = make_run(tmp_path / "one")
    rows = [{"step": step, "train/new_loss_1/mean": 0.5, "invented/number": 1000.0**step} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report([run], tmp_path / "r.html").read_text()
    assert re.findall(r"<h3>(.*)</h3>", page) == ["Accuracy", "train", "invented"]
    titles = {figure["layout"]["title"]["text"]: figure for figure in figures_of(page)}
    assert titles["train/new_loss_1/mean"]["data"][0]["y"] == [0.5, 0.5]
    assert titles["train/new_loss_1/mean"]["layout"]["yaxis"]["type"] == "linear"
    assert titles["invented/number"]["layout"]["yaxis"]["type"] == "log"


def test_a_metric_by_block_is_drawn_against_the_block_at_the_first_and_the_last_step(tmp_path):
    run = make_run(tmp_path / "one")
    rows = [{"step": s, **{f"health/cosine_block_{b:02d}/mean": b / s for b in (1, 2, 10)}} for s in (1, 2, 4)]
    rows.append({"step": 5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report([run], tmp_path / "r.html").read_text()
    (figure,) = [f for f in figures_of(page) if f["layout"]["title"]["text"] == "health/cosine/mean by block"]
    assert [(curve["name"], curve["x"], curve["y"]) for curve in figure["data"]] == [
        ("one: step 1", [1, 2, 10], [1.0, 2.0, 10.0]),
        ("one: step 4", [1, 2, 10], [0.25, 0.5, 2.5]),
    ]


def test_searches_and_a_bridge_are_drawn_where_a_run_has_them(tmp_path):
    run = make_run(tmp_path / "one")
    assert "Searches: factor accepted" not in write_report([run], tmp_path / "r.html").read_text()
    (run / "searches.jsonl").write_text(json.dumps({"step": 2, "accepted": 6.0, "score": 0.4}) + "\n")
    curves = {"teacher_block": 8, "cosine": [0.9, 0.8], "canonical": [0.7, 0.4], "rank": 2}
    (run / "objectives.json").write_text(json.dumps({"oprd_bridge": {"4": curves}}))
    page = write_report([run], tmp_path / "r.html").read_text()
    titles = {figure["layout"]["title"]["text"]: figure for figure in figures_of(page)}
    assert titles["Searches: factor accepted (0: plain update)"]["data"][0]["y"] == [6.0]
    assert titles["Held-out cosine of the projections"]["data"][0]["name"] == "one: block 4 to 8, rank 2"
    assert titles["Held-out canonical correlations"]["data"][0]["y"] == [0.7, 0.4]


def test_the_terms_of_a_sum_are_named_in_the_table(tmp_path):
    run = make_run(tmp_path / "one")
    recipe = "teacher: {type: server}\nobjective: [{type: oprd}, {type: opd_sampled, weight: 0.1}]\nmax_steps: 9\n"
    (run / "recipe.yaml").write_text(recipe)
    table = table_of(write_report([run], tmp_path / "r.html").read_text())
    assert "<td>oprd + opd_sampled</td>" in table
    assert "<td>server</td>" in table
