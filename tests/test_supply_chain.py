"""What is installed is what was chosen: every dependency pinned, none older than its known vulnerabilities, none from elsewhere."""

import importlib.metadata
import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from ragtune_ray.cluster.doctor import FLOORS
from tests.support.processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = [
    line.partition("#")[0].strip()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.partition("#")[0].strip()
]


def pins() -> dict[str, Version]:
    return {canonicalize_name(line.partition("==")[0]): Version(line.partition("==")[2]) for line in CONSTRAINTS}


def requirements() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(text) for group in groups for text in group]
    return [each for each in found if each.name != PROJECT["name"]]


def test_every_constraint_is_one_exact_version_of_the_index() -> None:
    assert [line for line in CONSTRAINTS if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+!]*", line)] == []
    assert len(pins()) == len(CONSTRAINTS), "a package is pinned twice"


def test_every_dependency_and_what_it_needs_in_turn_is_pinned() -> None:
    pinned, seen, waiting = pins(), set(), [(each.name, set(each.extras)) for each in requirements()]
    missing = []
    while waiting:
        name, extras = waiting.pop()
        name = canonicalize_name(name)
        if (name, frozenset(extras)) in seen:
            continue
        seen.add((name, frozenset(extras)))
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # not for this platform
        if name not in pinned:
            missing.append(name)
        for requirement in map(Requirement, needed):
            applies = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if requirement.marker is None or any(
                requirement.marker.evaluate(each) for each in [{"extra": ""}, *applies]
            ):
                waiting.append((requirement.name, set(requirement.extras)))
    assert sorted(set(missing)) == []


def test_pins_satisfy_the_project_and_are_newer_than_known_vulnerabilities() -> None:
    pinned = pins()
    for each in requirements():
        if each.name != "vllm":  # it needs an environment of its own, pinned in tests/vllm
            assert each.specifier.contains(pinned[canonicalize_name(each.name)]), each
    for name, floor in FLOORS.items():
        lowest = Version(".".join(map(str, floor)))
        assert pinned[name] >= lowest
        (required,) = {each.specifier for each in requirements() if each.name == name}
        assert not required.contains(Version("0")), name
        assert {Version(part.version) for part in required} == {lowest}, "pip refuses what doctor calls vulnerable"


def test_what_is_installed_is_what_is_pinned() -> None:
    wrong = {}
    for name, version in pins().items():
        try:
            installed = Version(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.public != version.public:
            wrong[name] = (str(installed), str(version))
    assert wrong == {}
