"""Check that a version is the one of the package and has its section in CHANGELOG.md.

    python .github/check_release.py 0.1.0

It reads files only, and needs nothing to be installed.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problems(version: str, root: Path = ROOT) -> list[str]:
    """What keeps this version from being released."""
    found = []
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if project["version"] != version:
        found.append(f"pyproject.toml says {project['version']}")
    for name, pattern in {
        "pysciml_node/__init__.py": rf'^__version__ = "{re.escape(version)}"$',
        "CITATION.cff": rf"^version: {re.escape(version)}$",
        "conda/recipe.yaml": rf'^  version: "{re.escape(version)}"$',
        "CHANGELOG.md": rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$",
    }.items():
        if not re.search(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE):
            found.append(f"{name} has no line like {pattern}")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("the version is missing.\n  Write: python .github/check_release.py 0.1.0")
    if found := problems(sys.argv[1]):
        sys.exit(f"{sys.argv[1]} cannot be released:\n  " + "\n  ".join(found))
