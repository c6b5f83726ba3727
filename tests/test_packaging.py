"""What is built and installed: archives leave nothing out, and nothing is used that is not declared."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import chdir
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from hatchling.build import build_sdist, build_wheel
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "probekit"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OPTIONAL = {"sentence-transformers"}
"""What the package imports only where it is asked for; its absence is reported in one line."""


def files_below(folder: Path) -> set[str]:
    """Files of the repository, by their paths in it."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    with chdir(ROOT):
        name = build_wheel(str(folder))
    with zipfile.ZipFile(folder / name) as archive:
        yield archive


def test_the_wheel_has_all_files_of_the_package(wheel: zipfile.ZipFile):
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = files_below(PACKAGE)
    assert {Path(name).suffix for name in expected} >= {".py", ".yaml", ".html", ".css", ".js", ".typed"}
    assert inside == expected


def test_the_wheel_runs_where_nothing_else_of_the_repository_is(wheel: zipfile.ZipFile, tmp_path: Path):
    for name in wheel.namelist():
        wheel.extract(name, tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import probekit\n"
        "from probekit.config import preset_names\n"
        "print(probekit.__file__, *(probekit.Config.from_preset(name).method for name in preset_names()))"
    )
    ran = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    place, *methods = ran.stdout.split()
    assert Path(place).is_relative_to(tmp_path)
    assert len(methods) == len(list((PACKAGE / "config" / "presets").glob("*.yaml")))


def test_the_source_archive_has_what_tests_and_documentation_need(tmp_path: Path):
    with chdir(ROOT):
        name = build_sdist(str(tmp_path))
    with tarfile.open(tmp_path / name) as archive:
        inside = {Path(*Path(member).parts[1:]).as_posix() for member in archive.getnames()}
    folders = ("probekit", "tests", "docs", "analyses", "benchmarks", "figures", "notebooks")
    needed = set().union(*(files_below(ROOT / folder) for folder in folders))
    needed |= {
        path.name for path in ROOT.glob("*.*") if path.suffix in {".md", ".toml", ".yml", ".txt", ".cff"}
    }
    needed |= {"LICENSE", "Makefile", ".ci/run", ".pre-commit-config.yaml"}
    assert sorted(needed - inside) == []


def imported() -> dict[str, str]:
    """Top-level modules that the package imports, and a file that does."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            found |= {name.split(".")[0]: path.name for name in names}
    return {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, "probekit"}}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    distributions = packages_distributions()
    used = {canonicalize_name(distributions[name][0]) for name in imported()}
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert used - OPTIONAL == declared
    assert {canonicalize_name(Requirement(text).name) for text in EXTRAS["encoders"]} == OPTIONAL


def test_what_is_tested_is_pinned_within_the_bounds():
    pins = {
        canonicalize_name(name): pinned
        for name, pinned in re.findall(
            r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
        )
    }
    wanted = [
        *PROJECT["dependencies"],
        *(text for extra in ("dev", "docs", "encoders") for text in EXTRAS[extra]),
    ]
    for requirement in map(Requirement, wanted):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement.name
