"""What was claimed and what was found: a table of the claims of two papers, from the numbers of figures/.

    python analyses/claims.py

Reads the CSVs in figures/ and writes `figures/claims.csv` and the page `docs/claims.md`. A claim *holds*
where the whole 95 % interval lies on the side that it claims, *does not hold* where the whole interval lies
on the other side, and *cannot be told* where the interval holds zero, or comes from fewer than 40 documents,
of which intervals are too narrow. Nothing is chosen here: which rows are
read is written down in `EVIDENCE`, and a claim that failed stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from shared.script import run_script

from probekit.data.corpus import FEW_DOCUMENTS
from probekit.errors import ProbekitError
from probekit.io import write_text
from probekit.reports.display import with_interval

PAPERS = {
    "2410.12492": "End-to-end planner training",
    "2410.13077": "Mixture-of-Depths ensemble",
}

CORPORA = {
    "planted": "planted corpus, an LM of 4 layers made for it",
    "wikitext": "WikiText-2, 30 training articles, an LM of 4 layers trained on them",
    "wikipedia": "openings of Wikipedia articles, frozen pre-trained LMs, actions of sentence embeddings; "
    "adapters trained on 136,000 tokens",
    "fiction": "Gutenberg fiction, pre-trained LMs",
}

WIKITEXT = "--preset text-small --set corpus.path WIKITEXT --seeds 3"

COMMANDS = {
    "table1_perplexity": "table1_perplexity.py --preset demo --seeds 5",
    "table1_wikitext": f"table1_perplexity.py {WIKITEXT} --out figures/table1_wikitext.png",
    "table1_smollm2": "table1_perplexity.py --preset smollm2-wikipedia --seeds 3 --set corpus.reader auto "
    "--set corpus.path WIKIPEDIA --set corpus.subset null --set lm.name LM --set actions.encoder ENCODER "
    "--out figures/table1_smollm2.png",
    "table3_joint": "table3_joint.py --preset demo --seeds 5",
    "figure3_probing": "figure3_probing.py RUNS/demo",
    "figure3_wikitext": "figure3_probing.py RUNS/wikitext/text-small/all/seed0 "
    "--out figures/figure3_wikitext.png",
    "figure3_pretrained": "figure3_pretrained.py WIKIPEDIA --models LMS --encoder ENCODER",
    "figure4_mixing_fraction": "figure4_mixing_fraction.py --preset demo --seeds 3 --generation",
    "figure4_wikitext": f"figure4_mixing_fraction.py {WIKITEXT} --out figures/figure4_wikitext.png",
    "labels_fiction": "labels_fiction.py FICTION --models LMS --passages 50 --sentences 12",
    "depth_table1_parameters": "depth_table1_parameters.py --preset demo --seeds 3 "
    "--set training.base.learning_rate 1e-3",
    "depth_wikitext": f"depth_table1_parameters.py {WIKITEXT} --tunings frozen --set depth.members plain "
    "ensemble distilled --set training.depth.epochs 1 --out figures/depth_wikitext.png",
}
"""The script that makes each figure's numbers, as in the Makefile; words in capitals are its variables."""

Side = Literal["below", "above"]


@dataclass(frozen=True)
class Evidence:
    """One number that a claim is judged by.

    Attributes:
        claim: The claim, in words.
        paper: Where it is made.
        corpus: Key of `CORPORA`.
        figure: Name of the CSV in figures/.
        rows: What a row of it must have to be read, by column; None stands for an empty cell.
        measure: What the number is, with its unit.
        side: The side of zero that the claim puts it on.
        columns: Columns of the value and the ends of its interval.
        best: Of several rows, the one with the smallest number in this column is read.
    """

    claim: str
    paper: str
    corpus: str
    figure: str
    rows: Mapping[str, Any]
    measure: str
    side: Side
    columns: tuple[str, str, str] = ("value", "value_low", "value_high")
    best: str | None = None

    def read(self, figures: Path) -> dict[str, Any]:
        """The row of the table.

        Raises:
            ProbekitError: The figure has not exactly one such row.
        """
        table = numbers(figures / f"{self.figure}.csv")
        for column, wanted in self.rows.items():
            table = table[table[column].isna() if wanted is None else table[column] == wanted]
        if self.best is not None:
            table = table.nsmallest(1, self.best)
        if len(table) != 1:
            raise ProbekitError(
                f"{self.figure}.csv has {len(table)} rows of {dict(self.rows)}; one is needed"
            )
        (row,) = table.to_dict("records")
        value, low, high = (float(row[column]) for column in self.columns)
        documents = int(row["documents"])
        return {
            "paper": self.paper,
            "claim": self.claim,
            "corpus": self.corpus,
            "measure": self.measure,
            "value": value,
            "low": low,
            "high": high,
            "seeds": int(row["seeds"]) if "seeds" in row else 1,
            "documents": documents,
            "verdict": verdict(low, high, self.side, documents),
            "figure": self.figure,
        }


@cache
def numbers(path: Path) -> pd.DataFrame:
    """The numbers of a figure, which many claims read."""
    return pd.read_csv(path, low_memory=False)


def verdict(low: float, high: float, side: Side, documents: int) -> str:
    """What an interval says of a claim that its number lies on a side of zero."""
    if low <= 0.0 <= high or documents < FEW_DOCUMENTS:
        return "cannot be told"
    return "holds" if (high < 0.0) == (side == "below") else "does not hold"


PERPLEXITY = "difference of perplexity"
OVER_OA = "gain over training on true actions, %"
MEANS = {"what": "difference", "seed": None}
"""Rows of differences, over all seeds."""


def _orderings() -> list[Evidence]:
    claims: dict[str, tuple[str, str, Side]] = {
        "Soft mixing beats the planner's single best action": ("soft", "predicted", "below"),
        "Predicted actions beat a constant one": ("predicted", "fixed", "below"),
        "Training on true actions suffers from exposure bias: predicted actions beat it": (
            "predicted",
            "oracle",
            "below",
        ),
        "Straight-through training is not effective": ("straight-through", "predicted", "above"),
        "Joint training beats soft mixing with the planner frozen": ("joint", "soft", "below"),
    }
    return [
        Evidence(
            claim,
            "2410.12492",
            corpus,
            figure,
            MEANS | {"first": first, "second": second},
            f"{PERPLEXITY}, {first} − {second}",
            side,
        )
        for claim, (first, second, side) in claims.items()
        for corpus, figure in (
            ("planted", "table1_perplexity"),
            ("wikitext", "table1_wikitext"),
            ("wikipedia", "table1_smollm2"),
        )
    ]


def _ingredients() -> list[Evidence]:
    claims = {
        "Tuning the planner on the next-token loss alone helps": "next-token loss alone",
        "Training the sentence encoder with the planner helps": "encoder trained",
        "A learned temperature helps": "temperature learned",
    }
    return [
        Evidence(
            claim,
            "2410.12492",
            "planted",
            "table3_joint",
            MEANS | {"first": first, "second": "soft, planner frozen"},
            f"{PERPLEXITY}, {first} − planner frozen",
            "below",
        )
        for claim, first in claims.items()
    ]


def _fractions() -> list[Evidence]:
    columns = ("improvement", "low", "high")
    whole = {"seed": "mean", "fraction": 1.0}
    perplexity = "Predicted actions alone in training give better perplexity than true ones alone"
    found = [
        Evidence(
            perplexity,
            "2410.12492",
            corpus,
            figure,
            whole | {"metric": "perplexity"},
            f"{OVER_OA} of its perplexity",
            "above",
            columns,
        )
        for corpus, figure in (("planted", "figure4_mixing_fraction"), ("wikitext", "figure4_wikitext"))
    ]
    structure = "True actions in training win on structure"
    for metric, called in (
        ("levenshtein", "Levenshtein distance"),
        ("latent_perplexity", "latent perplexity"),
    ):
        rows = whole | {"metric": metric, "texts": "continuations"}
        measure = f"{OVER_OA}, {called}"
        figure = "figure4_mixing_fraction"
        found.append(Evidence(structure, "2410.12492", "planted", figure, rows, measure, "below", columns))
    return found


BEYOND_COUNTING = "Activations tell the next sentence's action better than the best counted baseline"


def _pretrained() -> list[Evidence]:
    """Probes of pre-trained LMs, against counting, a planner, and all that is known of the text so far."""
    of_next = {"reader": "probe", "variant": "none", "distance": 1, "horizon": 1, "part": None}
    claims: tuple[tuple[str, dict[str, Any], str, str], ...] = (
        (BEYOND_COUNTING, of_next, "gain", "bits over the best baseline"),
        (
            "Activations tell the action four sentences ahead better than the best counted baseline",
            of_next | {"horizon": 4},
            "gain",
            "bits over the best baseline",
        ),
        (
            "They tell the next action better than bigram and bag of words together (asked by a critic)",
            {"reader": "probe", "part": "action"},
            "over_counts",
            "bits over a mixture of both",
        ),
        (
            "They tell it better than a planner of the sentences so far (asked by a critic)",
            {"reader": "probe", "part": "action"},
            "over_planner",
            "bits over the planner, both calibrated",
        ),
        (
            "They add to four readers of the text so far (asked by a critic)",
            {"reader": "text, probe", "part": "action"},
            "over_text",
            "bits that they add",
        ),
    )
    return [
        Evidence(
            claim,
            "2410.12492",
            "wikipedia",
            "figure3_pretrained",
            rows | {"lm": model},
            f"{model}: {measure}, layer chosen on validation",
            "above",
            (column, f"{column}_low", f"{column}_high"),
            best="validation_cross_entropy" if "variant" in rows else None,
        )
        for claim, rows, column, measure in claims
        for model in numbers(FIGURES / "figure3_pretrained.csv").lm.unique()
    ]


def _probes() -> list[Evidence]:
    gain = ("gain", "gain_low", "gain_high")
    chosen = {"reader": "probe", "solver": "softmax", "variant": "none"}
    place = {"location": "hook_resid_post", "distance": 1, "horizon": 1}
    found = [
        Evidence(
            BEYOND_COUNTING,
            "2410.12492",
            corpus,
            figure,
            chosen | place,
            "bits over the best baseline, layer chosen on validation",
            "above",
            gain,
            best="validation_cross_entropy",
        )
        for corpus, figure in (("planted", "figure3_probing"), ("wikitext", "figure3_wikitext"))
    ]
    found += _pretrained()
    fiction = numbers(FIGURES / "labels_fiction.csv")
    for model in fiction.model.unique():
        for target in ("next speech", "next paragraph"):
            found.append(
                Evidence(
                    BEYOND_COUNTING.replace("the next sentence's action", "a property of the next sentence"),
                    "2410.12492",
                    "fiction",
                    "labels_fiction",
                    chosen | {"target": target, "model": model},
                    f"{model}, {target}: bits over the best baseline, layer chosen on validation",
                    "above",
                    gain,
                    best="validation_cross_entropy",
                )
            )
    return found


def _depth() -> list[Evidence]:
    found = []
    for claim, first, second, metric, side in DEPTH:
        rows = MEANS | {"metric": metric, "first": first, "second": second}
        measure = f"difference of {metric}, {first} − {second}"
        found += [
            Evidence(
                claim,
                "2410.13077",
                "planted",
                "depth_table1_parameters",
                rows | {"runs": _runs(tuning)},
                f"{measure}, {tuning}",
                side,
            )
            for tuning in TUNINGS
        ]
        if second != "repeated":
            last = (rows, f"{measure}, frozen", side)
            found.append(Evidence(claim, "2410.13077", "wikitext", "depth_wikitext", *last))
    return found


TUNINGS = ("frozen", "lora", "full")


def _runs(tuning: str) -> str:
    return f"planted, training.base.tuning={tuning}"


DEPTH: tuple[tuple[str, str, str, str, Side], ...] = (
    ("Combining late layers beats tuning the last one", "ensemble", "plain", "perplexity", "below"),
    ("Combining late layers beats tuning the last one", "ensemble", "plain", "accuracy", "above"),
    ("It is the layers, not the parameters", "ensemble", "repeated", "perplexity", "below"),
    ("Distillation to the last layer helps", "distilled", "ensemble", "perplexity", "below"),
)
"""Claim, first and second member, metric, and the side of zero that is claimed."""

INTRODUCTION = """\
# Claims, and what was found

Every claim of two papers that has been tested here, with the number that it is judged by. *Holds*: the
whole 95 % interval, paired over documents, lies on the claimed side of zero; *does not hold*: on the other
side; *cannot be told*: it holds zero, or there are fewer than {few} documents, of which intervals are too
narrow to be trusted. Intervals say nothing of other seeds where there is one. Of {numbers} numbers, {told}.

Sentences of the planted corpus follow a plan by construction: that a claim holds there shows that the method
can find a plan, not that language has one. Hand-made features of a sentence's surface
(`surface` in `figures/labels_fiction.csv`) know more of the next sentence's speech than n-grams, and reach
most of what is read of it; of its paragraph they know as much as n-grams, half of what is read.

Not judged: that late layers solve problems which the last one does not. Some layer always differs on some
questions (`figures/depth_figure2_solved.csv`); what counts is whether the ensemble gains accuracy by it.
`analyses/claims.py` writes this page from the numbers in `figures/`.
"""

FIGURES = Path(__file__).parents[1] / "figures"
PAGE = FIGURES.parent / "docs" / "claims.md"


def evidence() -> list[Evidence]:
    """Every number, claim by claim."""
    return [*_orderings(), *_ingredients(), *_fractions(), *_probes(), *_depth()]


def page(table: pd.DataFrame) -> str:
    """The table as a page."""
    counts = table.verdict.value_counts()
    verdicts = ("holds", "does not hold", "cannot be told")
    told = ", ".join(f"{counts.get(name, 0)} *{name}*" for name in verdicts)
    lines = [
        INTRODUCTION.format(few=FEW_DOCUMENTS, numbers=len(table), told=told),
        *(f"- {name}: {what}" for name, what in CORPORA.items()),
    ]
    for paper, own in table.groupby("paper", sort=False):
        lines += ["", f"## {PAPERS[str(paper)]} ([{paper}](https://arxiv.org/abs/{paper}))", ""]
        lines += ["| claim | text | measured | value [95 % interval] | seeds | documents | verdict |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        before = None
        for row in own.to_dict("records"):
            claim = "" if row["claim"] == before else row["claim"]
            before = row["claim"]
            measured = with_interval(row["value"], row["low"], row["high"])
            lines.append(
                f"| {claim} | {row['corpus']} | {row['measure']} | {measured} | {row['seeds']} "
                f"| {row['documents']} | {row['verdict']} |"
            )
    lines += [
        "",
        "## Which command makes which number",
        "",
        "Words in capitals are variables of the Makefile, whose target `figures` runs these commands and",
        "what they need first.",
        "",
        "| numbers | `python analyses/...` |",
        "| --- | --- |",
    ]
    lines += [f"| `figures/{name}.csv` | `{COMMANDS[name]}` |" for name in dict.fromkeys(table.figure)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the figures, writes the table and the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    table = pd.DataFrame([part.read(FIGURES) for part in evidence()])
    write_text(FIGURES / "claims.csv", table.to_csv(index=False))
    write_text(PAGE, page(table))


if __name__ == "__main__":
    run_script(main)
