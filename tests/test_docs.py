"""Pages fit the source: public names, navigation, figures, version."""

import re
from pathlib import Path

import hooks
import yaml

import probekit

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_api_page_has_every_public_name():
    named = re.findall(
        r"^::: probekit\.(?:cli\.commands\.run_)?(\w+)$",
        (DOCS / "reference" / "api.md").read_text("utf-8"),
        re.MULTILINE,
    )
    assert sorted(named) == sorted(probekit.__all__)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    for page in DOCS.rglob("*.md"):
        assert f" {page.relative_to(DOCS).as_posix()}\n" in navigation, page


def test_figures_on_pages_are_there():
    shown = [
        name
        for page in DOCS.rglob("*.md")
        for name in re.findall(r"\]\(\.\./figures/(\w+\.png)\)", page.read_text("utf-8"))
    ]
    assert shown
    for name in shown:
        assert (ROOT / "figures" / name).exists(), name


def test_citation_and_changes_tell_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'version = "{cited["version"]}"' in project
    assert cited["license"] == "MIT"
    assert {reference["url"] for reference in cited["references"]} >= {
        f"https://arxiv.org/abs/{number}" for number in ("2410.12492", "2404.00614", "2410.13077")
    }
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_commands_link_to_their_settings():
    found = re.findall(r"\[(\S+)\]\(settings\.md#(\S+)\)", hooks.commands_page())
    assert ("probe", "probe") in found
    assert ("training.adapter", "trainingadapter") in found
    assert {f"## {name}" for name, _ in found} <= {*hooks.settings_page().splitlines()}
