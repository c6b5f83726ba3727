r"""What the documentation site takes from elsewhere, so that nothing is copied by hand.

- Settings, presets and commands are pages generated from the package itself.
- CHANGELOG.md, CONTRIBUTING.md and LOG.md are pages, and figures/*.png are available to all pages.
- Notebooks are pages with the pictures that are stored in them.
- `\(...\)`, and `$$...$$` on lines of its own, become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from importlib import resources
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

from probekit import cli
from probekit.cli.options import ALL, Parser, parse
from probekit.config import preset_names, setting_names
from probekit.run.stages import ONLY_WITH

ROOT = Path(__file__).parents[1]

PROJECT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "LOG.md": "log.md"}
"""Files of the repository that are pages, and the pages' paths."""

COLUMNS = "84"
"""Width of the commands' help."""

_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)\s]+)\)")
_MATH = re.compile(r"^\$\$(?P<block>.+?)\$\$$|\\\((?P<inline>.+?)\\\)", re.MULTILINE | re.DOTALL)
_STYLE = re.compile(r"<style scoped>.*?</style>\s*", re.DOTALL)
_SECTIONS = "|".join({re.escape(name.rpartition(".")[0] or "general") for name in setting_names()})
_SECTION = re.compile(rf"^({_SECTIONS}) options:$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made, and the figures."""
    made = {"settings": settings_page(), "presets": presets_page(), "commands": commands_page()}
    for name, text in made.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    for source, path in PROJECT.items():
        text = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, path, content=relinked(text, path)))
    for picture in sorted((ROOT / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{picture.name}", abs_src_path=str(picture)))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for path, content in notebook_pages(notebook).items():
            files.append(File.generated(config, f"notebooks/{path}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Marks formulas."""
    if page.file.src_uri.startswith("method/"):
        markdown = _MATH.sub(lambda found: f"MATH{found.start()}HTAM", page_formulas(page, markdown))
    return markdown


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Draws the formulas."""
    formulas: dict[str, str] = page.meta.get("formulas", {})
    return re.sub(r"MATH\d+HTAM", lambda found: formulas[found[0]], html)


def page_formulas(page: Page, markdown: str) -> str:
    """Keeps a page's formulas as MathML, by the marks that stand for them; the page as it was."""
    page.meta["formulas"] = {
        f"MATH{found.start()}HTAM": convert(
            " ".join((found["block"] or found["inline"]).split()),
            display="block" if found["block"] else "inline",
        )
        for found in _MATH.finditer(markdown)
    }
    return markdown


def relinked(text: str, path: str) -> str:
    """Links of a file in the repository's root as a page has them; what is no page loses its link."""
    up = "../" * (len(PurePosixPath(path).parts) - 1)

    def link(found: re.Match[str]) -> str:
        words, target = found["text"], found["target"]
        if "://" in target or target.startswith("#"):
            return found[0]
        if target in PROJECT:
            return f"{words}({up}{PROJECT[target]})"
        if target.startswith("docs/"):
            return f"{words}({up}{target.removeprefix('docs/')})"
        if target.startswith("figures/") and target.endswith(".png"):
            return f"{words}({up}{target})"
        if not (ROOT / target.partition("#")[0]).exists():
            raise PluginError(f"{path}: the repository has no {target}, to which it links")
        return f"`{words[1:-1].strip('`')}`"

    return _LINK.sub(link, text)


def notebook_pages(notebook: Path) -> dict[str, str | bytes]:
    """A notebook as it was executed: its page and the pictures on it, by path."""
    pictures = f"{notebook.stem}_files"
    names = {"unique_key": notebook.stem, "output_files_dir": pictures}
    page, made = MarkdownExporter().from_filename(str(notebook), resources=names)
    page = _STYLE.sub("", page)  # of each table: the theme has its own
    page = page.replace("](../docs/", "](../")
    return {f"{notebook.stem}.md": page} | made["outputs"]


def settings_page() -> str:
    """Every setting: values, default, what it does; from the options of the commands."""
    parser = Parser("probekit", add_help=False)
    parse(parser, [], ALL)
    parts = [
        "# Settings\n\n`probekit train --help` tells the same. In YAML, sections are nested; on the command "
        "line and in `Config.override`, names are dotted. `null` unsets what can be unset.\n"
    ]
    for group in parser._action_groups:
        if not group._group_actions:
            continue
        title = str(group.title).removesuffix(" options")
        parts.append(f"## {title}\n\n{group.description or 'Settings of a run as a whole.'}\n")
        parts.append("| setting | values | default | what it does |\n| --- | --- | --- | --- |")
        for action in group._group_actions:
            text, _, default = str(action.help).replace("%%", "%")[:-1].rpartition(" (default: ")
            several = " ..." if action.nargs == "+" else ""
            values = str(action.metavar).strip("{}").replace(",", ", ") + several
            name = action.dest
            cells = (f"`{name}`", values, f"`{default}`" if default else "", text + only_with(name))
            parts.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def only_with(name: str) -> str:
    """What a setting needs to have an effect, if anything."""
    if name not in ONLY_WITH:
        return ""
    other, values = ONLY_WITH[name]
    shown = " or ".join("unset" if value is None else str(value) for value in values)
    return f" Only with `{other}` {shown}."


def presets_page() -> str:
    """Every preset as its file has it."""
    parts = [
        "# Presets\n\n`--preset NAME`, or `Config.from_preset(NAME)`. "
        "What a preset leaves out has its default.\n"
    ]
    for name in preset_names():
        text = (resources.files("probekit.config") / "presets" / f"{name}.yaml").read_text("utf-8")
        parts.append(f"## {name}\n\n```yaml\n{text}```\n")
    return "\n".join(parts)


def commands_page() -> str:
    """Every command's help, with the names of the sections of settings that it takes."""
    parts = [f"# Commands\n\n```text\n{command_help()}```\n"]
    for name, command in cli.COMMANDS.items():
        first, *rest = _SECTION.split(command_help(name))
        taken = [f"[{section}](settings.md#{section.replace('.', '')})" for section in rest[::2]]
        settings = f"\nSettings: {', '.join(taken)}.\n" if taken else ""
        parts.append(f"## {name}\n\n{command.__doc__}\n\n```text\n{first.rstrip()}\n```\n{settings}")
    return "\n".join(parts)


def command_help(*words: str) -> str:
    """What a command prints as its help."""
    os.environ["COLUMNS"] = COLUMNS
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return printed.getvalue()


def _cell(text: str) -> str:
    """A text as a cell of a table: signs that Markdown would take for its own are marked."""
    escaped = " ".join(text.split()).replace("|", "\\|")
    return escaped if escaped.startswith("`") else escaped.replace("<", "&lt;")
