"""The page says what the files say, and nothing more."""

import json
import math
import random
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from oprd.errors import RunFolderError
from oprd.files import append_jsonl, write_json
from oprd.report.html import MOST_POINTS, Curve, write_report

RECIPE = {
    "student": {"model": "models/small"},
    "teacher": {"type": "local", "model": "models/big"},
    "objective": {"type": "oprd"},
    "max_steps": 9,
}


def make_run(folder: Path, *, steps: int = 3, torn: bool = False, **recipe) -> Path:
    write_json(folder / "run.json", {"recipe": RECIPE | recipe})
    rows = [
        {"step": i, "train/oprd/mean": 1.0 / i, "time/rollout_s/sum": 30.0, "time/update_s/sum": 30.0, "memory/peak_gib/max": 1.25,
         "training_seconds/total": 60.0 * i,
         "rollout/truncated/share": 0.25, "train/skipped_steps/total": 2, "health/cosine_block_01/mean": 0.5}
        for i in range(1, steps + 1)
    ]  # fmt: skip
    write_log(folder / "metrics.jsonl", rows)
    if torn:
        with (folder / "metrics.jsonl").open("a") as lines:
            lines.write('{"step": 99, "tr')
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
    write_log(folder / "evaluations.jsonl", [score])
    sample = {"step": 1, "prompt": "2+2", "completion": "<script>alert(1)</script> & 4", "finished": False, "length": 7}
    write_log(folder / "samples.jsonl", [sample])
    return folder


def write_log(file: Path, rows: Iterable[dict]) -> None:
    file.unlink(missing_ok=True)
    for row in rows:
        append_jsonl(file, row)


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
    write_json(empty / "run.json", {"recipe": RECIPE | {"max_steps": 5}})
    page = write_report([empty], tmp_path / "e.html").read_text()
    assert "0 of 5" in table_of(page)
    assert "No step has been logged yet." in page


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="is not a run folder"):
        write_report([tmp_path], tmp_path / "r.html")


def test_every_metric_is_drawn_whatever_its_name(tmp_path):
    run = make_run(tmp_path / "one")
    rows = [{"step": step, "train/new_loss_1/mean": 0.5, "invented/number": 1000.0**step} for step in (1, 2)]
    write_log(run / "metrics.jsonl", rows)
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
    write_log(run / "metrics.jsonl", rows)
    page = write_report([run], tmp_path / "r.html").read_text()
    (figure,) = [f for f in figures_of(page) if f["layout"]["title"]["text"] == "health/cosine/mean by block"]
    assert [(curve["name"], curve["x"], curve["y"]) for curve in figure["data"]] == [
        ("one: step 1", [1, 2, 10], [1.0, 2.0, 10.0]),
        ("one: step 4", [1, 2, 10], [0.25, 0.5, 2.5]),
    ]


def test_searches_and_a_bridge_are_drawn_where_a_run_has_them(tmp_path):
    run = make_run(tmp_path / "one")
    assert "Searches: factor accepted" not in write_report([run], tmp_path / "r.html").read_text()
    write_log(run / "searches.jsonl", [{"step": 2, "accepted": 6.0, "score": 0.4}])
    curves = {"teacher_block": 8, "cosine": [0.9, 0.8], "canonical": [0.7, 0.4], "rank": 2}
    write_json(run / "objectives.json", {"oprd_bridge": {"4": curves}})
    page = write_report([run], tmp_path / "r.html").read_text()
    titles = {figure["layout"]["title"]["text"]: figure for figure in figures_of(page)}
    assert titles["Searches: factor accepted (0: plain update)"]["data"][0]["y"] == [6.0]
    assert titles["Held-out cosine of the projections"]["data"][0]["name"] == "one: block 4 to 8, rank 2"
    assert titles["Held-out canonical correlations"]["data"][0]["y"] == [0.7, 0.4]


def test_the_terms_of_a_sum_are_named_in_the_table(tmp_path):
    objective = [{"type": "oprd"}, {"type": "opd_sampled", "weight": 0.1}]
    run = make_run(tmp_path / "one", teacher={"type": "server"}, objective=objective)
    table = table_of(write_report([run], tmp_path / "r.html").read_text())
    assert "<td>oprd + opd_sampled</td>" in table
    assert "<td>server</td>" in table


@pytest.mark.parametrize("count", [1, 7, MOST_POINTS, MOST_POINTS + 1, 5 * MOST_POINTS + 3, 20_000])
def test_a_long_curve_keeps_its_shape_in_few_points(count):
    rng = random.Random(count)
    ys = [rng.gauss(0, 1) for _ in range(count)]
    ys[count // 3], ys[count // 2] = 99.0, -99.0
    curve = Curve.of(enumerate(ys))
    points = curve.points
    assert len(points) <= MOST_POINTS
    assert points == sorted(points)
    assert all(ys[x] == y for x, y in points)
    assert {-99.0, 99.0} >= {min(y for _, y in points), max(y for _, y in points)} or count == 1
    assert (curve.first, curve.last) == ((0, ys[0]), (count - 1, ys[-1]))
    if count <= MOST_POINTS:
        assert points == list(enumerate(ys))
        return
    assert len(points) > MOST_POINTS / 4
    # every stretch is drawn by its own lowest and highest
    for start in range(0, count, curve.stretch):
        part = ys[start : start + curve.stretch]
        drawn = [y for x, y in points if start <= x < start + curve.stretch]
        assert {min(part), max(part)} == set(drawn)


def test_a_value_that_is_no_number_hides_no_extreme():
    ys = [1.0, math.nan, 5.0, -3.0, math.nan] * MOST_POINTS
    ys[7000] = 50.0
    drawn = [y for _, y in Curve.of(enumerate(ys)).points]
    assert max(drawn) == 50.0
    assert min(drawn) == -3.0
    assert len(drawn) <= MOST_POINTS


def test_the_page_says_that_long_curves_are_thinned(tmp_path):
    run = make_run(tmp_path / "one")
    said = "A curve of more than 2,000 points"
    assert said not in write_report([run], tmp_path / "r.html").read_text()
    write_log(run / "metrics.jsonl", [{"step": s, "train/loss/mean": float(s == 777)} for s in range(1, 2500)])
    page = write_report([run], tmp_path / "r.html").read_text()
    assert said in page
    (figure,) = [f for f in figures_of(page) if f["layout"]["title"]["text"] == "train/loss/mean"]
    assert max(zip(figure["data"][0]["y"], figure["data"][0]["x"], strict=True)) == (1.0, 777)


@pytest.mark.parametrize("name", ["run.json", "objectives.json", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl"])
def test_a_flipped_bit_is_told_with_the_name_of_the_file(name, tmp_path):
    run = make_run(tmp_path / "one")
    write_json(run / "objectives.json", {"oprd_bridge": {}})
    content = (run / name).read_bytes()
    for bit in range(0, 8 * (len(content) - 1), 97):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (run / name).write_bytes(changed)
        with pytest.raises(RunFolderError, match=f"{name}.* is damaged"):
            write_report([run], tmp_path / "r.html")
