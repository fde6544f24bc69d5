"""The packages that juliapkg installs: `install` registers them, `--remove` undoes it.

juliapkg resolves one project for everything in a Python environment. So the engine's packages go
onto that environment's list only when somebody asks for the engine.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from typing import Any

from pysciml_node.julia_engine.process import env

# juliapkg resolves again when its list has changed, but does not look into the Julia package. A
# digest of that package's needs makes the list change with them.
_DIGEST = "x-pysciml-node-needs"


def _wanted() -> tuple[dict[str, Any], str, str]:
    """Packages by name, Julia versions, and the digest of the needs of the engine's package."""
    content = json.loads(env.REQUIREMENTS.read_text(encoding="utf-8"))
    packages: dict[str, Any] = content["packages"]
    for package in packages.values():
        if package.get("dev"):
            package["path"] = str(env.bundled_project())
    project = tomllib.loads((env.bundled_project() / "Project.toml").read_text(encoding="utf-8"))
    needs = {name: project.get(name, {}) for name in ("deps", "weakdeps", "compat")}
    digest = hashlib.sha256(json.dumps(needs, sort_keys=True).encode()).hexdigest()
    return packages, str(content["julia"]), digest


def registered() -> bool:
    """Whether juliapkg's list for this environment holds the needs of this copy of the engine."""
    from juliapkg import deps

    packages, _, digest = _wanted()
    listed = deps.load_cur_deps()
    known = listed.get("packages", {})
    return listed.get(_DIGEST) == digest and all(
        known.get(name) == package for name, package in packages.items()
    )


def register() -> None:
    """Put the engine's packages on juliapkg's list; a Julia version on it stays."""
    from juliapkg import deps
    from juliapkg.state import STATE

    packages, julia, digest = _wanted()
    listed = deps.load_cur_deps()
    listed.setdefault("julia", julia)
    listed.setdefault("packages", {}).update(packages)
    listed[_DIGEST] = digest
    deps.write_cur_deps(listed)
    STATE["resolved"] = False


def unregister() -> bool:
    """Take the engine's packages off the list.

    Returns:
        Whether any were on it.
    """
    from juliapkg import deps
    from juliapkg.state import STATE

    packages, julia, _ = _wanted()
    listed = deps.load_cur_deps()
    if listed.pop(_DIGEST, None) is None:
        return False
    known = listed.get("packages", {})
    listed["packages"] = {name: known[name] for name in known if name not in packages}
    if not listed["packages"]:
        del listed["packages"]
    if listed.get("julia") == julia:
        del listed["julia"]
    deps.write_cur_deps(listed)
    STATE["resolved"] = False
    return True
