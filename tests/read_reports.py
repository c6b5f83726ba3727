"""Reports as their readers see them: what an HTML or Markdown parser finds, in the same terms."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

from markdown_it import MarkdownIt

VOID = {"meta", "img", "br"}


@dataclass
class Page:
    """What is on a page: headings with their levels, tables by caption, items, pictures, code, links."""

    headings: list[tuple[int, str]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    items: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.caption = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.page.tags.add(tag)
        self.page.links += [values[name] for name in ("href", "src", "action", "data") if name in values]
        if tag == "img":
            self.page.pictures.append((values["alt"], values["src"]))
        if tag == "br":
            self.text += "\n"
        if tag not in VOID:
            self.open.append(tag)
        if tag not in ("br", "strong", "em", "code", "a"):
            self.text = ""
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:  # as Markdown's renderer writes them: <img />
            return
        assert self.open.pop() == tag
        page, text = self.page, self.text.strip()
        if tag in ("h1", "h2", "h3"):
            page.headings.append((int(tag[1]), text))
        elif tag in ("caption", "strong"):
            self.caption = text
        elif tag in ("td", "th"):
            self.rows[-1].append(text)
        elif tag == "table":
            assert self.caption not in page.tables
            page.tables[self.caption] = self.rows
        elif tag == "li" and "nav" not in self.open:
            page.items.append(text)
        elif tag == "pre":
            page.code.append(text)
        elif tag == "p":
            page.paragraphs.append(text)


def read_html(text: str) -> Page:
    """Parses HTML whose tags have to be balanced."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader.page


def read_markdown(text: str) -> Page:
    """Renders Markdown as GitHub does, and parses what comes of it."""
    return read_html(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))
