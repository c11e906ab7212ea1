"""Send requests to a server with random faults, and count what came of them.

    python scripts/server_faults.py [REQUESTS] [SEED]

Prints the counts; exits with 1 if a wrong response was taken for right, or anything but a message ended a step.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oprd.teacher import transport
from teacher.test_faults import campaign


def main() -> int:
    requests, seed = (int(given) for given in [*sys.argv[1:3], *("1000", "0")[len(sys.argv) - 1 :]])
    transport.MAX_LOST_SHARE = 1.0
    with tempfile.TemporaryDirectory() as folder:
        found, seen = campaign(Path(folder), requests, seed)
    for counts in (found, seen):
        print(", ".join(f"{what}: {count}" for what, count in sorted(counts.items())))
    return int(found["right"] + found["lost"] + found["refused"] != found["tried"])


if __name__ == "__main__":
    raise SystemExit(main())
