"""`probekit score`: a run's own probes on the run's own texts, on the command line, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import probekit
from probekit.cli import main
from probekit.config import Position
from probekit.errors import ProbekitError
from probekit.io import read_json, read_table, read_tensors, write_json, write_table, write_tensors
from probekit.probing.activations import ActivationReader
from probekit.probing.results import Cell, SavedProbes
from probekit.probing.score import _read_at, score
from probekit.probing.targets import Examples

CELL = "softmax|hook_resid_post|1|1|1"


@pytest.fixture(scope="module")
def texts(probed_run: probekit.Run) -> list[str]:
    """Beginnings of documents of the run's corpus, which the LM reads whole."""
    corpus = probed_run.corpus
    whole = [document.text for _, documents in corpus.texts.batches() for document in documents][:5]
    return [text[:80] for text in whole]


def test_every_token_is_read_as_in_probing(probed_run: probekit.Run, texts: list[str]):
    """The tokens of a document's beginning, read by the grid's own reader."""
    table = score(probed_run, texts, CELL, tokens=True, batch_size=2, quiet=True)
    corpus = probed_run.corpus
    for number in range(len(texts)):
        rows = table[table.text == number]
        first = corpus.document_tokens[number] + 1
        ids = corpus.tokenizer(texts[number], add_special_tokens=False).input_ids
        same = int(np.argmin([*np.equal(ids, corpus.tokens[first : first + len(ids)]), False]))
        assert same > 3  # the last token may be cut
        start = np.arange(first, first + same) + 1
        examples = Examples.of_tokens(
            np.full(same, number), start, np.zeros(same, int), np.zeros((same, 1), int)
        )
        (values,) = ActivationReader(probed_run, "none", [("hook_resid_post", 1)], [1]).read(examples)
        probe = SavedProbes(probed_run.folder / "probes", "none", probed_run.config.seed)[Cell.of(CELL)]
        expected = probe.log_probabilities(values[0, 0]).exp().numpy()
        found = rows[[f"p({action})" for action in range(corpus.k)]].to_numpy()[:same]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert rows.token.tolist() == list(range(len(ids)))
        assert "".join(rows.piece) == texts[number]


def test_the_last_token_is_that_of_the_text(probed_run: probekit.Run, texts: list[str]):
    every = score(probed_run, texts, CELL, tokens=True, quiet=True)
    last = score(probed_run, texts, CELL, batch_size=2, quiet=True)
    expected = every.groupby("text").last().reset_index()[list(last.columns)]
    pd.testing.assert_frame_equal(last, expected, atol=1e-5, check_dtype=False)


def test_without_a_cell_the_best_on_validation_is_taken(probed_run: probekit.Run, texts: list[str]):
    rows = probed_run.probes().query("reader == 'probe' and variant == 'none'")
    best = rows.loc[rows.validation_cross_entropy.idxmin()]
    key = f"{best.solver}|{best.location}|{best.layer}|{best.position}|{best.horizon}"
    assert score(probed_run, texts, quiet=True).equals(score(probed_run, texts, key, quiet=True))


def test_the_best_probe_of_a_layer(
    probed_run: probekit.Run, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = probed_run.probes().query("reader == 'probe' and variant == 'none' and layer == 1")
    best = rows.loc[rows.validation_cross_entropy.idxmin()]
    key = f"{best.solver}|{best.location}|1|{best.position}|{best.horizon}"
    expected = score(probed_run, texts, key, quiet=True)
    assert score(probed_run, texts, layer=1, quiet=True).equals(expected)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    words = ["score", str(probed_run.folder), str(tmp_path / "texts.jsonl"), "--layer", "1", "--quiet"]
    assert main([*words, "--out", str(tmp_path / "out.parquet")]) == 0
    capsys.readouterr()
    found = read_table(tmp_path / "out.parquet")
    np.testing.assert_allclose(found.probability, expected.probability, rtol=1e-6)
    with pytest.raises(ProbekitError, match=r"--layer is 9; probes are kept of layers 0, 1, 2"):
        score(probed_run, texts, layer=9, quiet=True)
    with pytest.raises(ProbekitError, match=r"--layer is 0, and --cell 'softmax"):
        score(probed_run, texts, CELL, layer=0, quiet=True)


def test_random_weights_are_never_read(probed_run: probekit.Run, texts: list[str], tmp_path: Path):
    """Even where they have the better probes: they are the control."""
    folder = shutil.copytree(probed_run.folder, tmp_path / "run")
    path = folder / "probes" / "results.parquet"
    table = read_table(path)
    control = table[(table.reader == "probe") & (table.variant == "none")].assign(variant="random")
    write_table(path, pd.concat([control.assign(validation_cross_entropy=0.0), table]))
    for layer in (None, 1):
        expected = score(probed_run, texts, layer=layer, quiet=True)
        assert score(folder, texts, layer=layer, quiet=True).equals(expected)


@pytest.mark.parametrize(
    ("position", "anchors", "read"),
    [
        (1, "start", "last"),
        (4, "start", "last"),
        (0, "start", "first"),
        (0, "token", "last"),
        ("mean", "start", "mean"),
        ("last-2", "start", "last-2"),
    ],
)
def test_where_new_texts_are_read(position: Position, anchors: Any, read: Position):
    assert _read_at(Cell("hook_resid_post", 1, position), anchors) == read
    with pytest.raises(ProbekitError, match=r"\|-1\|.* is counted from the first one labelled"):
        _read_at(Cell("hook_resid_post", 1, -1), anchors)


def test_a_probe_behind_the_first_token_is_chosen_for_every_token_alone(
    probed_run: probekit.Run, texts: list[str], tmp_path: Path
):
    """It may be the best one, for it has read some of the sentence; in a new text it has no place."""
    folder = shutil.copytree(probed_run.folder, tmp_path / "run")
    table = read_table(folder / "probes" / "results.parquet")
    inside = table[(table.reader == "probe") & (table.variant == "none") & (table.position == "1")]
    inside = inside.assign(position="-1", validation_cross_entropy=0.0)
    write_table(folder / "probes" / "results.parquet", pd.concat([inside, table]))
    for path in (folder / "probes").glob("none-*.safetensors"):
        old = read_tensors(path)
        moved = {re.sub(r"\|1\|1\|(\w+)$", r"|-1|1|\1", name): own.clone() for name, own in old.items()}
        write_tensors(path, old | {name: own for name, own in moved.items() if name not in old})
    assert score(folder, texts, quiet=True).equals(score(probed_run, texts, quiet=True))
    found = score(folder, texts, tokens=True, quiet=True)
    key = next(f"softmax|hook_resid_post|{layer}|-1|1" for layer in inside.layer)
    assert found.equals(score(folder, texts, key, tokens=True, quiet=True))


def test_a_file_is_read_as_the_corpus_was(probed_run: probekit.Run, texts: list[str], tmp_path: Path):
    folder = shutil.copytree(probed_run.folder, tmp_path / "run")
    settings = read_json(folder / "probes" / "settings.json")
    settings["corpus"]["reader"] = "lines"
    write_json(folder / "probes" / "settings.json", settings)
    (tmp_path / "texts.txt").write_text("\n".join(texts), "utf-8")
    (tmp_path / "texts.csv").write_text(pd.DataFrame({"text": texts}).to_csv(index=False), "utf-8")
    for name in ("texts.txt", "texts.csv"):
        assert len(score(folder, tmp_path / name, CELL, quiet=True)) == len(texts)
    settings["corpus"]["reader"] = "wikitext"
    write_json(folder / "probes" / "settings.json", settings)
    (tmp_path / "texts.txt").write_text(texts[0], "utf-8")
    assert len(score(folder, tmp_path / "texts.txt", CELL, quiet=True)) == 1


def test_a_file_has_an_encoding_of_its_own(
    probed_run: probekit.Run, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "texts.csv"
    pd.DataFrame({"text": [f"é {text}" for text in texts]}).to_csv(file, index=False, encoding="latin-1")
    words = ["score", str(probed_run.folder), str(file), "--cell", CELL, "--quiet"]
    assert main(words) == 2
    assert "not valid utf-8; set --corpus.encoding to the encoding of the file, such as latin-1" in (
        capsys.readouterr().err
    )
    assert main([*words, "--corpus.encoding", "latin-1", "--out", str(tmp_path / "out.parquet")]) == 0
    capsys.readouterr()
    expected = score(probed_run, [f"é {text}" for text in texts], CELL, quiet=True)
    np.testing.assert_allclose(read_table(tmp_path / "out.parquet").probability, expected.probability)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_the_command_reads_and_writes_files(
    ending: str,
    probed_run: probekit.Run,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    source, out = tmp_path / "texts.jsonl", tmp_path / f"out{ending}"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    words = ["score", str(probed_run.folder), str(source), "--cell", CELL, "--out", str(out), "--quiet"]
    assert main(words) == 0
    assert f"All {len(texts)} rows" in capsys.readouterr().out
    found = {
        ".csv": pd.read_csv,
        ".jsonl": lambda path: pd.read_json(path, lines=True),
        ".parquet": read_table,
    }[ending](out)
    expected = score(probed_run, texts, CELL, quiet=True)
    assert found.predicted.astype(str).tolist() == expected.predicted.tolist()
    np.testing.assert_allclose(found.probability, expected.probability, rtol=1e-5)
    assert found["name"].iloc[1] == "texts.jsonl:2"


def test_what_cannot_be_scored_is_refused(
    probed_run: probekit.Run, tiny_run: probekit.Run, texts: list[str], tmp_path: Path
):
    with pytest.raises(ProbekitError, match=r"--cell is 'softmax\|9'; the best of \d+ probes are softmax\|"):
        score(probed_run, texts, "softmax|9", quiet=True)
    with pytest.raises(ProbekitError, match="text 1 is empty"):
        score(probed_run, ["a plan", ""], quiet=True)
    with pytest.raises(ProbekitError, match="but the LM reads 47 of a text"):
        score(probed_run, [" ".join(texts)], quiet=True)
    with pytest.raises(ProbekitError, match=r"must end in \.csv, \.jsonl, \.parquet"):
        score(probed_run, texts, out="x.txt", quiet=True)
    with pytest.raises(ProbekitError, match="run `probekit probe"):
        score(tiny_run, texts, quiet=True)
    table = tmp_path / "texts.csv"
    table.write_text("statement\nA plan.\n", "utf-8")
    with pytest.raises(ProbekitError, match=r"^--text is 'text', but .*texts\.csv has statement$"):
        score(probed_run, table, CELL, quiet=True)


def test_a_table_is_read_as_the_labels_were(
    probed_run: probekit.Run, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """With the column of texts and the encoding that the run was probed with, or the column that is named."""
    folder = shutil.copytree(probed_run.folder, tmp_path / "run")
    settings = read_json(folder / "probes" / "settings.json")
    settings["probe"]["text_column"], settings["corpus"]["encoding"] = "statement", "latin-1"
    write_json(folder / "probes" / "settings.json", settings)
    own = [f"é {text}" for text in texts]
    columns = pd.DataFrame({"statement": own, "text": texts})
    columns.to_csv(tmp_path / "truth.csv", index=False, encoding="latin-1")
    expected = score(probed_run, own, CELL, quiet=True).drop(columns="name")
    found = score(folder, tmp_path / "truth.csv", CELL, quiet=True)
    pd.testing.assert_frame_equal(found.drop(columns="name"), expected)
    words = [str(folder), str(tmp_path / "truth.csv"), "--cell", CELL, "--out", str(tmp_path / "out.parquet")]
    assert main(["score", *words, "--text", "text", "--quiet"]) == 0
    capsys.readouterr()
    found = read_table(tmp_path / "out.parquet").probability
    np.testing.assert_allclose(found, score(probed_run, texts, CELL, quiet=True).probability)


def test_a_probe_before_an_intervention_reads_the_same(
    probed_run: probekit.Run, texts: list[str], tmp_path: Path
):
    folder = shutil.copytree(probed_run.folder, tmp_path / "run")
    table = read_table(folder / "probes" / "results.parquet")
    write_table(
        folder / "probes" / "results.parquet",
        table.assign(location=table.location.replace("hook_resid_post", "hook_resid_post:before")),
    )
    for path in (folder / "probes").glob("*.safetensors"):
        old = read_tensors(path)
        write_tensors(path, {name.replace("_post|", "_post:before|"): old[name] for name in old})
    found = score(folder, texts, CELL.replace("_post|", "_post:before|"), quiet=True)
    assert found.equals(score(probed_run, texts, CELL, quiet=True))


def test_texts_are_read_in_the_arithmetic_of_the_run(probed_run: probekit.Run, texts: list[str]):
    """As the grid's own reader does."""
    low = probed_run.with_settings({"training.precision": "bfloat16"})
    found = score(low, texts[:1], CELL, tokens=True, quiet=True)
    assert not found.equals(score(probed_run, texts[:1], CELL, tokens=True, quiet=True))
    first = low.corpus.document_tokens[0] + 1
    start = np.arange(first, first + 4) + 1
    examples = Examples.of_tokens(np.zeros(4, int), start, np.zeros(4, int), np.zeros((4, 1), int))
    (values,) = ActivationReader(low, "none", [("hook_resid_post", 1)], [1]).read(examples)
    probe = SavedProbes(low.folder / "probes", "none", low.config.seed)[Cell.of(CELL)]
    expected = probe.log_probabilities(values[0, 0]).exp().numpy()
    every = found[[f"p({action})" for action in range(low.corpus.k)]].to_numpy()
    np.testing.assert_allclose(every.sum(1), 1.0, atol=1e-5)  # probes themselves are read exactly
    own = every[:4]
    np.testing.assert_allclose(own, expected, atol=0.03)
