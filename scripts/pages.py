"""Pages of the docs that scripts make."""

import sys
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def write_or_check(page: Path, text: str, arguments: Sequence[str]) -> int:
    """Write the page; with `--check`, write nothing and say whether it is current. The exit status."""
    if arguments not in ([], ["--check"]):
        print(f"unknown arguments {list(arguments)}; the only option is --check", file=sys.stderr)
        return 2
    if not arguments:
        page.write_text(text, encoding="utf-8")
    elif not page.is_file() or page.read_text(encoding="utf-8") != text:
        print(f"{page} is not current; make it anew by running the script without --check", file=sys.stderr)
        return 1
    return 0
