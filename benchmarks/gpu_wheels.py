"""Pack what benchmarks/gpu.py needs and a machine with torch alone lacks: `python benchmarks/gpu_wheels.py FOLDER`.

What oprd depends on, as installed here, without what the machine has (BRINGS) and what the benchmark does not use (UNUSED).
`--list` prints it and downloads nothing.
"""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

BRINGS = {"torch", "numpy", "sympy", "packaging", "pyyaml", "jinja2", "filelock", "typing-extensions", "setuptools"}
UNUSED = {"datasets", "plotly", "kernels"}


def needed(package: str, found: dict[str, str]) -> dict[str, str]:
    """The package's dependencies and theirs, with versions, by name."""
    for line in requires(package) or ():
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        extras = {"extra": "antlr4_13_2"} if package == "math-verify" else {"extra": ""}
        if name in found | dict.fromkeys(BRINGS | UNUSED) or not (
            requirement.marker is None or requirement.marker.evaluate(extras)
        ):
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
        needed(name, found)
    return found


def main(folder: str) -> None:
    pinned = [f"{name}=={number}" for name, number in sorted(needed("oprd", {}).items())]
    if folder == "--list":
        print("\n".join(pinned))
        return
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder]
    subprocess.run([*pip, *pinned], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
