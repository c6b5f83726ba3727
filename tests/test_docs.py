"""Pages fit the source: messages of errors, names of the package, sections of the README, figures."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import probekit
from probekit.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RAISED_BY = {"ProbekitError", "TooShortError", "_wrong", "error"}
"""What makes an error of its argument: the classes, and the two functions that put something around it."""

TOLD_BY_LIBRARIES = {
    "lm.layers is '0': input should be greater than or equal to 1": "train --lm.layers 0",
    "corpus.reader is 'csv': input should be 'planted', 'text', 'wikitext', 'jsonl', 'parquet' or "
    "'huggingface'": "train --corpus.reader csv",
    "corpus.planted: successors 30 exceeds actions 24": "train --corpus.planted.successors 30",
    "argument --tokens: expected one argument; see `probekit generate --help`": "generate runs/demo --tokens",
}
"""Messages with few words of ours, and commands that bring them about."""

LEAST_LETTERS = 9
"""Messages with fewer letters of their own pass on another message."""


def words_of(node: ast.expr) -> str | None:
    """A message's own words, with a star for each value in it; None if it is no literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
    if isinstance(node, ast.BinOp):
        return "".join(words_of(part) or "*" for part in (node.left, node.right))
    return None


def raised() -> Iterator[tuple[str, str]]:
    """Where errors are raised, and their words."""
    for path in sorted((ROOT / "probekit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in RAISED_BY or (name == "ValueError" and path.parent.name == "config"):
                message = words_of(node.args[0])
                if message and len(re.findall(r"[A-Za-z]", message)) >= LEAST_LETTERS:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", message


def pattern(message: str) -> re.Pattern[str]:
    """What a message looks like when something stands for its values, and may stand around it."""
    return re.compile(
        ".*".join(map(re.escape, message.split("*"))).join(("(.+: )?", r"(; see .+|.+failed.+)?"))
    )


def quoted() -> dict[str, list[str]]:
    """The messages that each page of errors quotes."""
    return {
        page.name: [
            line
            for block in re.findall(r"```text\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
            for line in block.splitlines()
        ]
        for page in sorted((DOCS / "errors").glob("*.md"))
        if page.name != "index.md"
    }


RAISED = dict(raised())


@pytest.mark.parametrize("page", quoted())
def test_quoted_messages_are_still_raised(page: str):
    messages = quoted()[page]
    assert messages
    patterns = [pattern(message) for message in RAISED.values()]
    gone = [
        message
        for message in messages
        if message not in TOLD_BY_LIBRARIES and not any(found.fullmatch(message) for found in patterns)
    ]
    assert not gone, f"docs/errors/{page} quotes what no ProbekitError says"


def test_every_message_is_on_a_page():
    pages = [message for messages in quoted().values() for message in messages]
    missing = {
        where: message
        for where, message in RAISED.items()
        if not any(pattern(message).fullmatch(line) for line in pages)
    }
    assert not missing, "quote them in docs/errors, with cause and remedy"


@pytest.mark.parametrize("message", TOLD_BY_LIBRARIES)
def test_messages_with_few_words_of_ours(message: str):
    assert any(message in messages for messages in quoted().values())
    with pytest.raises(probekit.ProbekitError, match=f"^{re.escape(message)}$"):
        main(["--debug", *TOLD_BY_LIBRARIES[message].split()])


def test_a_changed_message_is_noticed():
    (message,) = [words for words in RAISED.values() if words.startswith("unknown preset")]
    quote = "unknown preset 'dmo'; did you mean 'demo'?; there are any-model, demo"
    assert pattern(message).fullmatch(quote)
    assert not pattern(message.replace("there are", "known are")).fullmatch(quote)


def test_the_api_page_has_every_public_name():
    named = re.findall(
        r"^::: probekit\.(\w+)$", (DOCS / "reference" / "api.md").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(named) == sorted(probekit.__all__)


def test_every_page_is_in_the_navigation_and_every_page_of_errors_in_the_index():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    index = (DOCS / "errors" / "index.md").read_text("utf-8")
    for page in DOCS.rglob("*.md"):
        assert f" {page.relative_to(DOCS).as_posix()}\n" in navigation, page
        if page.parent.name == "errors" and page.name != "index.md":
            assert f"]({page.name})" in index, page


def test_every_section_of_the_readme_is_on_a_page():
    text = "".join(page.read_text("utf-8") for page in DOCS.rglob("*.md"))
    sections = re.findall(r"^## (.+)$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    taken = re.findall(r"^<!-- readme: (.+) -->$", text, re.MULTILINE)
    # Development is told by CONTRIBUTING.md, which is a page.
    assert sorted(taken) == sorted({*sections} - {"Development", "Documentation"})


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
