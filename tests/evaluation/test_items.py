"""Tables of items against what was written, in every format, and every fault in one line."""

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from probekit.data.tokenizer import decoded
from probekit.errors import ProbekitError
from probekit.evaluation.items import asked, read_items
from probekit.run.run import Run

ROWS = [
    {"context": "A is", "choices": ["b", "c", "d"], "answer": 2, "kind": "x", "group": "one", "score": 1.5},
    {"context": None, "choices": ["An e", "An f"], "answer": 0, "kind": "y", "group": None, "score": None},
    {"context": None, "choices": ["An f", "An e"], "answer": 1, "kind": "y", "group": "", "score": None},
]


def written(folder: Path, ending: str) -> Path:
    path = folder / f"items{ending}"
    if ending == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
        return path
    table = pd.DataFrame(ROWS)
    if ending == ".parquet":
        table.to_parquet(path)
        return path
    columns = pd.DataFrame([dict(enumerate(row["choices"])) for row in ROWS]).add_prefix("choice")
    table.drop(columns="choices").join(columns).to_csv(
        path, index=False, sep="\t" if ending == ".tsv" else ","
    )
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_holds_the_same_items(ending: str, tmp_path: Path):
    first, second, third = read_items(written(tmp_path, ending))
    assert (first.context, first.choices, first.answer) == ("A is", ("b", "c", "d"), 2)
    assert (first.kind, first.group, first.score) == ("x", "one", 1.5)
    assert (second.context, second.choices, second.answer) == ("", ("An e", "An f"), 0)
    assert math.isnan(second.score)
    assert second.group == third.group != first.group, "the same choices in another order are one observation"


GOOD = {"context": "A is", "choices": ["b", "c"], "answer": 0, "kind": "x"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "list where a JSON object should be"),
        ({**GOOD, "choices": ["b"]}, "an item with 1 choices; give two or more"),
        (
            {**GOOD, "choices": "b;c"},
            "'choices' is 'b;c'; give a list of texts, or columns choice0, choice1",
        ),
        (
            {**GOOD, "choices": {"text": ["b", "c"], "label": ["A", "B"]}},
            r"'choices' is .*'text'.*; give a list of texts, or columns choice0",
        ),
        ({**GOOD, "kind": "all kinds"}, "'kind' is 'all kinds', as results call all of them"),
        ({"context": "A", "answer": 0, "kind": "x"}, "an item with 0 choices"),
        ({**GOOD, "choices": ["b", "c", "b"]}, "two choices are 'b'; give different ones"),
        ({**GOOD, "choices": ["b", " "]}, "a choice is ' '; give a text that is not blank"),
        ({**GOOD, "choices": ["b", "\ud800"]}, r"a choice is '\\ud800'; give a text"),
        ({**GOOD, "choices": [["b"], "c"]}, r"a choice is \['b'\]; give one value"),
        ({"choice1": "b", "choice2": "c"}, "choices are in choice1, choice2; number them from choice0 on"),
        ({"choice0": None, "choice1": "b", "choice2": "c"}, "a choice is ''; give a text that is not blank"),
        ({**GOOD, "answer": 2}, "'answer' is '2'; give the number of a choice, from 0 to 1"),
        ({**GOOD, "answer": "b"}, "'answer' is 'b'; give the number of a choice"),
        ({**GOOD, "answer": [0]}, r"'answer' is \[0\]; give one value"),
        ({**GOOD, "context": ["A"]}, r"'context' is \['A'\]; give a text, or leave it empty"),
        ({**GOOD, "context": " "}, "'context' is ' '; give a text"),
        ({**GOOD, "score": "high"}, "'score' is 'high'; give a number, or leave it empty"),
        ({**GOOD, "score": "inf"}, "'score' is 'inf'; give a number"),
        (
            {"choices": ["b", "c"], "kind": "x"},
            "no 'answer', which 1 rows have; give it in all rows",
        ),
        ({"choices": ["b", "c"], "answer": 0}, "no 'kind', which 1 rows have"),
    ],
)
def test_a_bad_row_is_named(row: object, said: str, tmp_path: Path):
    path = tmp_path / "items.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(row)}\n", "utf-8")
    with pytest.raises(ProbekitError, match=f"^{re.escape(str(path))}:3: {said}") as raised:
        read_items(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "items.csv",
            "context,answer\na,0\n",
            "no column 'choices' (or 'choice0', 'choice1', ...); it has",
        ),
        (
            "items.csv",
            "context,choice0,choice1,anwser\na,b,c,0\n",
            "column 'anwser' is not read; did you mean 'answer'?",
        ),
        (
            "items.jsonl",
            '{"choices": ["b", "c"], "contxt": "a"}',
            ":1: column 'contxt' is not read; did you mean 'context'?",
        ),
        ("items.csv", "context,choice0,choice1\n", "holds no item; give one a row"),
        ("items.jsonl", "{", "not a line of JSON"),
        ("items.parquet", "no", "not a readable Parquet file"),
        ("items.txt", "no", "--items is '"),
    ],
)
def test_a_bad_table_is_named(name: str, content: str, said: str, tmp_path: Path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ProbekitError, match=re.escape(said)):
        read_items(path)


def test_columns_of_the_users_own_are_left_alone(tmp_path: Path):
    path = tmp_path / "items.csv"
    path.write_text(
        "choice0,choice1,choice,answers,content,score_a,groups,context\nb,c,b,b,x,1,g,A\n", "utf-8"
    )
    (item,) = read_items(path)
    assert (item.choices, item.context, item.answer) == (("b", "c"), "A", None)


def test_no_such_table(tmp_path: Path):
    with pytest.raises(ProbekitError, match=r"none\.csv: cannot be read: No such file"):
        read_items(tmp_path / "none.csv")


def test_what_is_asked_is_what_stands_in_the_table(tiny_run: Run, tmp_path: Path):
    corpus = tiny_run.corpus
    items = read_items(written(tmp_path, ".jsonl"))
    behind, bare, _ = asked(items, corpus.tokenizer, corpus.separator, 48)
    assert behind.context[0] == corpus.separator
    assert decoded(corpus.tokenizer, behind.context[1:]) == "A is"
    assert [decoded(corpus.tokenizer, choice) for choice in behind.choices] == [" b", " c", " d"]
    assert (behind.answer, bare.answer) == (2, 0)
    assert bare.context.tolist() == [corpus.separator]
    assert [decoded(corpus.tokenizer, choice) for choice in bare.choices] == ["An e", "An f"]


def test_what_does_not_fit_the_window_is_named(tiny_run: Run, tmp_path: Path):
    corpus, path = tiny_run.corpus, written(tmp_path, ".jsonl")
    items = read_items(path)
    long = max(len(q.context) + q.longest - 1 for q in asked(items, corpus.tokenizer, corpus.separator, 48))
    asked(items, corpus.tokenizer, corpus.separator, long)
    said = (
        rf"items.jsonl:\d: the context and its longest choice have {long} tokens, but the LM reads {long - 1}"
    )
    with pytest.raises(ProbekitError, match=said):
        asked(items, corpus.tokenizer, corpus.separator, long - 1)
