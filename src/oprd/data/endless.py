"""Chat templates that do not come to an end: tried on one word in a process that may be stopped, before they run in ours."""

import json
import re
import subprocess
import sys

from oprd.errors import DataError

MOST_SECONDS, MOST_BYTES, WAIT_S = 10, 1 << 30, 120.0
"""Of processor time and memory that a template may take for one word; of the clock, on a busy machine."""
_SUSPICIOUS = re.compile(r"range|\*|lipsum|\d{4}")
"""A template without any of these only walks over its messages."""
_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""transformers' own; jinja2 does not know them."""
_TRIAL = """
import json, resource, sys
from jinja2.sandbox import ImmutableSandboxedEnvironment
for kind, most in zip((resource.RLIMIT_CPU, resource.RLIMIT_DATA), map(int, sys.argv[1:])):
    resource.setrlimit(kind, (most, most))
def stop(message=""):
    raise ValueError(message)
try:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": stop, "strftime_now": str}
    turns = [{"role": "user", "content": "1"}]
    environment.from_string(json.load(sys.stdin)).render(messages=turns, add_generation_prompt=True)
except MemoryError:
    sys.exit(3)
except Exception:
    pass  # what else is wrong with it is told where it is used
"""


def refuse_endless(template: str) -> None:
    """Raise DataError for a template that takes more time or memory than any conversation of one word needs."""
    if not _SUSPICIOUS.search(template):
        return
    try:
        command = [sys.executable, "-I", "-c", _TRIAL, str(MOST_SECONDS), str(MOST_BYTES)]
        given = json.dumps(_TAGS.sub("", template)).encode()
        done = subprocess.run(command, input=given, capture_output=True, timeout=WAIT_S, check=False)
        stopped = done.returncode < 0 or done.returncode == 3
    except subprocess.TimeoutExpired:
        stopped = True
    if stopped:
        raise DataError(
            f"the chat template does not come to an end on a prompt of one word (in {MOST_SECONDS} s and {MOST_BYTES >> 30} "
            "GiB); correct its loops and numbers"
        )
