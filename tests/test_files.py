"""Files that survive a crash."""

import pytest

from oprd.errors import RunFolderError
from oprd.files import append_jsonl, read_json, read_jsonl, replacing, sync_folder, write_atomically, write_json


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
    first = path.read_bytes()
    append_jsonl(path, {"text": "🙂"})
    torn = path.read_bytes()[len(first) :]
    for cut in range(1, len(torn)):
        path.write_bytes(first + torn[:cut])
        assert read_jsonl(path) == [{"step": 1}]


def test_a_damaged_line_is_an_error_with_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    for step in range(3):
        append_jsonl(path, {"step": step, "loss": 0.125})
    lines = path.read_bytes().split(b"\n")
    for damaged in (b"", lines[1][:-3], lines[1].replace(b"0.125", b"0.525"), b'{"step": 1}', b"\0" * 40):
        path.write_bytes(b"\n".join([lines[0], damaged, *lines[2:]]))
        with pytest.raises(RunFolderError, match=r"rows\.jsonl:2 is damaged"):
            read_jsonl(path)


def test_no_flipped_bit_of_a_json_file_stays_unseen(tmp_path):
    path, row = tmp_path / "one.json", {"steps": 6, "text": "é", "inner": {"crc32": '"crc32": "0"'}}
    write_json(path, row)
    assert read_json(path) == row
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 7):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(RunFolderError, match=r"one\.json is damaged"):
            read_json(path)


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
