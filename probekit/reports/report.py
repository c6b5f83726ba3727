"""`probekit report`: all of a run on one page, what to mind at the top, as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from probekit.errors import ProbekitError
from probekit.io import atomic_path, write_text
from probekit.reports import report_causal as causal
from probekit.reports import report_results as results
from probekit.reports import report_sections as sections
from probekit.reports.checks import cautions_of
from probekit.reports.document import Block, Fold, Picture, Report, Section
from probekit.reports.report_findings import (
    CORPUS,
    EVALUATION,
    GENERATION,
    INTERVENTIONS,
    METRICS,
    PROBES,
    PROVENANCE,
    SUBNETWORKS,
    Findings,
    attempt,
)
from probekit.reports.report_html import to_html
from probekit.reports.report_markdown import to_markdown
from probekit.run.run import Run

SUFFIXES = (".html", ".md")
"""What a report can be written as."""


@dataclass(frozen=True)
class Part:
    """A section to be: its heading, the file it tells of, what makes it, a table that the file must have."""

    title: str
    file: str
    make: Callable[[Findings], list[Block]]
    table: str | None = None

    def there(self, found: Findings) -> bool:
        """Whether the run has what it tells of."""
        if not found.has(self.file):
            return False
        return self.table is None or bool(len(found.evaluation.get(self.table, ())))


BEFORE = (
    Part("What it is", "config.yaml", sections.about),
    Part("Corpus", CORPUS, sections.corpus),
    Part("Perplexity", EVALUATION, results.perplexity),
    Part("Planners", EVALUATION, results.planners, "planner"),
    Part("Multiple choice", EVALUATION, results.choices, "accuracy"),
    Part("Generated text", GENERATION, results.generation),
    Part("Probes", PROBES, results.probes),
)
"""Sections that stand before those of single variants and stages, where the run has them."""

BEHIND = (
    Part("Stages", "run.json", sections.stages),
    Part("Training", METRICS, sections.training),
    Part("How to reproduce it", PROVENANCE, sections.reproduction),
    Part("Settings", "config.yaml", sections.settings),
)
"""Sections that stand behind them."""


def report(run: Run | str | Path, out: str | Path | None = None) -> list[Path]:
    """Writes a run's report.

    Args:
        run: The run or its folder.
        out: Where to, ending in .html or .md; pictures of Markdown go into `figures/` beside it. None:
            `report.html` and `report.md` in the run's folder.

    Returns:
        The files, without the pictures.

    Raises:
        ProbekitError: There is no run, or the suffix is another one.
    """
    if out is not None and Path(out).suffix not in SUFFIXES:
        raise ProbekitError(f"-o is {str(out)!r}; it must end in {' or '.join(SUFFIXES)}")
    run = Run.at(run)
    made = compose(run)
    files = [Path(out)] if out is not None else [run.folder / f"report{suffix}" for suffix in SUFFIXES]
    for file in files:
        write_text(file, to_html(made) if file.suffix == ".html" else _with_pictures(made, file))
    return files


def compose(run: Run) -> Report:
    """A run's report, before it is written; what cannot be read is among the cautions."""
    found = Findings(run)
    damaged: dict[str, str] = {}
    made = []
    for part in (*BEFORE, *_of_each(found), *BEHIND):
        if attempt(part.file, damaged, partial(part.there, found)):
            blocks = attempt(part.file, damaged, partial(part.make, found))
            if blocks:
                made.append(Section(part.title, tuple(blocks)))
    cautions = cautions_of(found, damaged)  # may find more that is damaged
    return Report(f"Report on {found.name}", (*damaged.values(), *cautions), tuple(made))


def _of_each(found: Findings) -> Iterator[Part]:
    """Sections of single variants and stages."""
    for stage in found.probed_stages:
        make = partial(results.over_training, stage=stage)
        yield Part(f"Over training: {stage}", found.over_training_file(stage), make)
    for title, file, of_variant in (
        ("Interventions", INTERVENTIONS, causal.interventions),
        ("Subnetwork", SUBNETWORKS, causal.subnetwork),
    ):
        for variant in found.variants_with(file):
            yield Part(f"{title}: {variant}", file.format(variant), partial(of_variant, variant=variant))


def _with_pictures(made: Report, file: Path) -> str:
    """The Markdown of a report, whose pictures are written beside it."""
    paths = {}
    for picture in _pictures(block for section in made.sections for block in section.blocks):
        paths[picture.name] = f"figures/{file.stem}_{picture.name}.svg"
        with atomic_path(file.parent / paths[picture.name]) as temporary:
            temporary.write_bytes(picture.svg)
    return to_markdown(made, paths)


def _pictures(blocks: Iterator[Block]) -> Iterator[Picture]:
    for block in blocks:
        if isinstance(block, Picture):
            yield block
        elif isinstance(block, Fold):
            yield from _pictures(iter(block.blocks))
