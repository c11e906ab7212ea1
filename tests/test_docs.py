"""Pages that scripts make are those of the code as it is."""

import importlib

import pytest

from conftest import ROOT


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


@pytest.mark.parametrize("name", ["make_recipe_docs", pytest.param("make_family_docs", marks=pytest.mark.slow)])
def test_a_page_is_current(name, script):
    assert script(name).main(["--check"]) == 0


def test_a_page_that_is_not_current_is_named_and_left_alone(script, tmp_path, capsys):
    write_or_check, page = script("pages").write_or_check, tmp_path / "page.md"
    assert write_or_check(page, "new", ["--check"]) == 1
    assert not page.exists()
    page.write_text("old")
    assert write_or_check(page, "new", ["--check"]) == 1
    assert page.read_text() == "old"
    assert capsys.readouterr().err.count(f"{page} is not current") == 2
    assert write_or_check(page, "new", []) == write_or_check(page, "new", ["--check"]) == 0
    assert page.read_text() == "new"


def test_another_option_is_refused(script, tmp_path):
    assert script("pages").write_or_check(tmp_path / "page.md", "new", ["--chek"]) == 2
    assert not list(tmp_path.iterdir())
