"""Files that survive a crash."""

import pytest

from oprd.errors import RunFolderError
from oprd.files import append_jsonl, read_jsonl, replacing, sync_folder, write_atomically


def test_rows_come_back_as_they_were_appended(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_jsonl(path) == []
    rows = [{"step": 1, "text": "ä\n🙂"}, {"step": 2, "loss": 0.5}]
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows


def test_a_torn_last_line_is_left_out_wherever_it_was_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"step": 1})
    whole, torn = path.read_bytes(), '{"text": "🙂"}'.encode()
    for cut in range(1, len(torn)):
        path.write_bytes(whole + torn[:cut])
        assert read_jsonl(path) == [{"step": 1}]


def test_a_damaged_line_in_the_middle_is_an_error_with_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"rows\.jsonl:2: not JSON"):
        read_jsonl(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    write_atomically(path, "old")

    def fail() -> None:
        with replacing(path) as aside:
            aside.write_text("half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    sync_folder(path.parent)
