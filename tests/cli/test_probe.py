"""`probekit probe` as it is typed: of a run, and of any LM on any text."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from random_lms import save_random_llama
from running import ONE_CELL, Capture, printed, refused

from probekit.cli.commands import probe
from probekit.cli.probe_options import parse_probe, probed_config
from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.io import read_json, write_json
from probekit.run.folder import FORMAT
from probekit.run.run import Run


def test_probing_writes_table_and_pictures(capsys: Capture, copy: Path):
    words = ["--probe.layers", "0", "--probe.positions", "1", "2", "--probe.variants", "none"]
    out = printed(capsys, "probe", copy, *words, "--quiet")
    table = Run.open(copy).probes()
    probes = table[table.reader == "probe"]
    assert set(zip(probes.layer, probes.distance, strict=True)) == {(0, 1), (0, 2)}
    assert list((copy / "probes").glob("*.png"))
    assert "results.parquet" in out


def test_a_run_without_a_planner_is_probed(capsys: Capture, copy: Path):
    state = read_json(copy / "run.json")
    state["stages"] = {stage: state["stages"][stage] for stage in ("corpus", "lm")}
    write_json(copy / "run.json", state)
    printed(capsys, "probe", copy, *ONE_CELL, "--quiet")
    assert set(Run.open(copy).probes().reader) == {
        *("probe", "token embedding", "prior", "bigram", "bigram (current action)", "skip n-gram"),
        *(f"ceiling ({of})" for of in ("actions", "words", "tokens read")),
    }


def test_a_store_of_activations_is_used_again(capsys: Capture, copy: Path):
    words = ["probe", copy, *ONE_CELL, "--store", "--quiet"]
    printed(capsys, *words)
    first, shards = Run.open(copy).probes(), sorted((copy / "activations" / "none-seed0").iterdir())
    assert {path.suffix for path in shards} == {".json", ".safetensors"}
    times = [path.stat().st_mtime_ns for path in shards]
    printed(capsys, *words)
    assert [path.stat().st_mtime_ns for path in shards] == times
    assert Run.open(copy).probes().equals(first)
    line = refused(capsys, *words, "--probe.positions", "2", "3")
    assert "none-seed0 stores activations of another positions: [1], but [2, 3]" in line
    assert "delete it, or run without --store" in line


def test_a_variant_that_is_not_trained_is_not_probed(capsys: Capture, copy: Path):
    line = refused(capsys, "probe", copy, "--probe.variants", "gumbel", "--quiet")
    assert (
        "'gumbel', which this run has not trained; it has none, random, fixed, oracle, predicted, soft, joint"
        in line
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files, a document each."""
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    words = np.array(["the", "plan", "of", "a", "river", "town", "old", "king", "went", "fell"])
    for number in range(60):
        sentences = [" ".join(generator.choice(words, size=4)).capitalize() + "." for _ in range(8)]
        (folder / f"{number}.txt").write_text(" ".join(sentences), "utf-8")
    return folder


@pytest.fixture(scope="module")
def lm(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random LM and its tokenizer, as a user would have it."""
    lines = (path.read_text("utf-8") for path in sorted(texts.iterdir()))
    return save_random_llama(tmp_path_factory.mktemp("lms") / "llama", lines, positions=32)


ANY = ["--actions.k", "8", "--actions.dimensions", "8", "--training.window", "32", "--device", "cpu"]


def test_any_model_is_probed_on_any_text(capsys: Capture, lm: Path, texts: Path, tmp_path: Path):
    out = tmp_path / "probed"
    words = ["probe", "--model", lm, "--corpus", texts, "--out", out, *ANY, *ONE_CELL, "--quiet"]
    shown = printed(capsys, *words)
    assert "results.parquet" in shown
    run = Run.open(out)
    assert list(read_json(out / "run.json")["stages"]) == ["lm", "corpus"]
    assert run.config.lm.name == str(lm)
    assert run.config.corpus.probe_fraction == 0.5
    assert not list((out / "lm").glob("*.safetensors")), "a model that is there already is not copied"
    first = run.probes()
    assert set(first[first.reader == "probe"].layer) == {0}
    assert set(first.reader) == {
        "probe",
        "token embedding",
        "prior",
        "bigram",
        "bigram (current action)",
        "skip n-gram",
        "bag of words",
    }
    assert list((out / "probes").glob("*.png"))

    # Again, with another grid: corpus and model stay, what was probed is replaced.
    tokens = (out / "corpus" / "tokens.npy").stat().st_mtime_ns
    printed(capsys, *words, "--probe.layers", "1", "--probe.variants", "random")
    assert (out / "corpus" / "tokens.npy").stat().st_mtime_ns == tokens
    again = Run.open(out).probes()
    probes = again[again.reader == "probe"]
    assert set(zip(probes.variant, probes.layer, strict=True)) == {("random", 1)}
    # As a run like any other, too.
    printed(capsys, "probe", out, "--quiet")
    same = Run.open(out).probes()
    assert same.equals(again), "the run keeps the settings that it was last probed with"

    line = refused(capsys, *words, "--actions.k", "9")
    assert "actions.k was 8 and is now 9" in line
    printed(capsys, *words, "--actions.k", "9", "--overwrite")
    assert Run.open(out).config.actions.k == 9


def test_a_corpus_that_was_built_first_is_probed(capsys: Capture, lm: Path, texts: Path, tmp_path: Path):
    out, built = tmp_path / "whole", tmp_path / "by-and-by"
    printed(capsys, "probe", "--model", lm, "--corpus", texts, "--out", out, *ANY, *ONE_CELL, "--quiet")
    of_corpus = ["--preset", "any-model", "--lm.name", lm, "--corpus.path", texts, "--out", built]
    printed(capsys, "corpus", *of_corpus, *ANY, "--quiet")
    printed(capsys, "probe", built, *ONE_CELL, "--quiet")
    pd.testing.assert_frame_equal(Run.open(built).probes(), Run.open(out).probes())


def test_any_model_needs_a_model_and_a_text(capsys: Capture, lm: Path, texts: Path, tmp_path: Path):
    words = ["probe", "--out", tmp_path / "run", "--quiet", *ANY]
    line = refused(capsys, *words, "--model", tmp_path / "no", "--corpus", texts)
    assert str(tmp_path / "no") in line
    line = refused(capsys, *words, "--model", lm, "--overwrite")
    assert "corpus.path is not set" in line
    line = refused(capsys, *words, "--model", lm, "--corpus", tmp_path / "no", "--overwrite")
    assert "corpus.path is" in line
    line = refused(capsys, *words, "--model", lm, "--corpus", texts, "--training.window", "64", "--overwrite")
    assert line == "training.window is 64, but the LM reads at most 32 positions"


def test_any_model_does_not_take_over_a_run_of_another_kind(
    capsys: Capture, copy: Path, lm: Path, texts: Path
):
    words = ["probe", "--model", lm, "--corpus", texts, "--out", copy, *ANY]
    before = (copy / "config.yaml").read_text()
    assert "was begun with other settings" in refused(capsys, *words)
    assert (copy / "config.yaml").read_text() == before


def probed(
    *words: str,
    model: str | None = "gpt2",
    corpus: str | None = "some/text",
    out: Path = Path("nowhere"),
    overwrite: bool = False,
) -> Config:
    """The config of `probekit probe --model MODEL --corpus CORPUS` and more words."""
    parsed, given = parse_probe(probe, ["--model", "m", *words])
    parsed.model, parsed.corpus, parsed.out, parsed.overwrite = model, corpus, out, overwrite
    return probed_config(parsed, given)


def test_any_model_is_a_preset_with_a_model_and_a_corpus(tmp_path: Path):
    paths = {"lm.name": "gpt2", "corpus.path": "some/text"}
    preset = Config.from_preset("any-model")
    assert probed() == preset.override(paths)
    assert probed("--seed", "3") == preset.override(paths | {"seed": 3})
    assert probed("--lm.name", "other") == preset.override(paths), "--model is what it says"
    assert probed("--preset", "demo") == Config.from_preset("demo").override(paths)
    file = tmp_path / "mine.yaml"
    file.write_text("lm: {name: mine}\ncorpus: {path: text}\n", "utf-8")
    assert probed("--config", str(file)) == Config().override(paths)
    assert probed("--config", str(file), corpus=None) == Config().override(paths | {"corpus.path": "text"})


def test_a_model_that_was_probed_before_keeps_its_settings(tmp_path: Path):
    begun = Config.from_preset("any-model").override(
        {"actions.k": 9, "lm.name": "old", "corpus.path": "text"}
    )
    (tmp_path / "config.yaml").write_text(begun.to_yaml(), "utf-8")
    write_json(tmp_path / "run.json", {"format": FORMAT, "stages": {"corpus": {}}})
    assert probed(model=None, corpus=None, out=tmp_path) == begun
    assert probed("--seed", "3", model="old", corpus=None, out=tmp_path) == begun.override({"seed": 3})
    afresh = Config.from_preset("any-model").override({"lm.name": "gpt2", "corpus.path": "some/text"})
    assert probed(out=tmp_path, overwrite=True) == afresh
    demo = probed("--preset", "demo", out=tmp_path)
    assert demo == Config.from_preset("demo").override({"lm.name": "gpt2", "corpus.path": "some/text"})


# Tables of labels


def statements(folder: Path, count: int = 400) -> Path:
    """Statements of one sentence, true if they end in `old king`; two rows a topic are copies."""
    generator = np.random.default_rng(1)
    rows = []
    for n in range(count):
        true = bool(generator.integers(2))
        words = " ".join(generator.choice(["the", "plan", "of", "a", "river", "town", "went"], size=6))
        end = "old king" if true else "a town"
        rows.append({"statement": f"{words} {end}.".capitalize(), "topic": f"t{n % 60}"})
        rows[-1]["is_true"] = "yes" if true else "no"
    path = folder / "truth.csv"
    pd.DataFrame(rows).drop_duplicates("statement").to_csv(path, index=False)
    return path


def test_a_table_of_statements_is_corpus_and_labels(capsys: Capture, lm: Path, tmp_path: Path):
    table, out = statements(tmp_path), tmp_path / "out"
    words = ["--text", "statement", "--target", "is_true", "--group", "topic", "--training.window", "32"]
    few = ["--probe.layers", "1", "--probe.variants", "none", "--evaluation.resamples", "100", "--quiet"]
    shown = printed(capsys, "probe", "--model", lm, "--labels", table, *words, "--out", out, *few)
    assert "classes of 'is_true'" in shown
    assert "groups" in shown
    run = Run.open(out)
    corpus = run.corpus
    assert not corpus.has_actions
    assert not (out / "corpus" / "encoder").exists(), "nothing is built that the target does not need"
    found = run.probes()
    (probe,) = found[found.reader == "probe"].itertuples()
    assert probe.position == "last"
    assert probe.groups < probe.documents == len(corpus.documents("test"))
    assert set(found.reader) >= {"probe", "prior", "skip n-gram", "token embedding"}
    with pytest.raises(ProbekitError, match="built without actions"):
        corpus.require_actions()
    # Another column of a table for the finished run, from another folder.
    spans = tmp_path / "spans.tsv"
    texts = [document.text for _, batch in corpus.texts.batches() for document in batch]
    rows = [(n, text.rindex(" ") + 1, len(text) - 1) for n, text in enumerate(texts)]
    last = [texts[n][a:b] for n, a, b in rows]
    pd.DataFrame(rows, columns=["document", "start", "end"]).assign(word=last).to_csv(
        spans, sep="\t", index=False
    )
    printed(capsys, "probe", out, "--labels", spans, "--target", "word", "--positions", "mean", *few)
    found = Run.open(out).probes()
    (probe,) = found[found.reader == "probe"].itertuples()
    assert (probe.target, probe.position) == ("word", "mean")
    assert probe.accuracy > 0.95, "the word is in its own tokens"
    assert "built without actions" in refused(capsys, "probe", out, "--target", "action", "--quiet")
    assert "goes with --target" in refused(capsys, "probe", out, "--labels", spans)
    assert "--group: goes with --model" in refused(capsys, "probe", out, "--group", "topic")


def test_a_corrected_command_takes_the_table_that_it_names(capsys: Capture, lm: Path, tmp_path: Path):
    wrong, out = tmp_path / "wrong.csv", tmp_path / "out"
    wrong.write_text("sentence,is_true\nOne.,yes\n")
    words = ["probe", "--model", lm, "--text", "statement", "--target", "is_true", "--training.window", "32"]
    words += [
        "--probe.layers",
        "1",
        "--probe.variants",
        "none",
        "--evaluation.resamples",
        "100",
        "--out",
        out,
    ]
    assert "statement" in refused(capsys, *words, "--labels", wrong, "--quiet")
    printed(capsys, *words, "--labels", statements(tmp_path), "--quiet")
    assert Run.open(out).config.corpus.path == str(tmp_path / "truth.csv")


FEW = ["--probe.layers", "1", "--probe.variants", "none", "--evaluation.resamples", "100", "--quiet"]
FEW += ["--probe.control", "false", "--probe.code_length", "false"]


def test_a_table_of_other_texts_names_what_the_corpus_was_made_of(capsys: Capture, lm: Path, tmp_path: Path):
    """A command that was refused after the corpus was made, and corrected to name another table."""
    table, other, out = statements(tmp_path), tmp_path / "other.csv", tmp_path / "out"
    pd.read_csv(table).assign(statement=lambda rows: "So, " + rows.statement).to_csv(other, index=False)
    words = ["probe", "--model", lm, "--text", "statement", "--training.window", "32", "--out", out, *FEW]
    assert "has no column 'truth'" in refused(capsys, *words, "--labels", table, "--target", "truth")
    line = refused(capsys, *words, "--labels", other, "--target", "is_true")
    assert f"no row with a label has a text of the corpus, which was made of {table}" in line
    assert "--overwrite" in line
    printed(capsys, *words, "--labels", other, "--target", "is_true", "--overwrite")
    assert Run.open(out).config.corpus.path == str(other)


@pytest.mark.parametrize("given", ["column", "shares"])
def test_no_training_documents_are_needed_to_probe(capsys: Capture, lm: Path, tmp_path: Path, given: str):
    table, out = statements(tmp_path), tmp_path / "out"
    rows = pd.read_csv(table)[:360]
    rows.assign(part=np.array(["probe", "probe", "validation", "test"])[np.arange(len(rows)) % 4]).to_csv(
        table, index=False
    )
    words = ["--text", "statement", "--target", "is_true", "--training.window", "32", "--out", out]
    fractions = {"probe": "0.5", "validation": "0.25", "test": "0.25"}
    words += (
        ["--corpus.split_column", "part"]
        if given == "column"
        else [word for name, share in fractions.items() for word in (f"--corpus.{name}_fraction", share)]
    )
    printed(capsys, "probe", "--model", lm, "--labels", table, *words, *FEW)
    run = Run.open(out)
    assert not len(run.corpus.documents("train"))
    assert run.probes().query("reader == 'probe'").auroc.item() > 0.5
    new = ["--corpus.reader", "csv", "--corpus.path", table, "--corpus.text_column", "statement"]
    new += ["--actions.labels", "clusters", "--lm.name", "null", *words[6:], "--overwrite", "--quiet"]
    line = refused(capsys, "train", "--preset", "demo", *new)
    assert "no document 'train', which the tokenizer of a new LM and actions are fitted on" in line


def test_a_table_of_another_encoding_for_a_run(capsys: Capture, lm: Path, tmp_path: Path):
    table, out = statements(tmp_path), tmp_path / "out"
    rows = pd.read_csv(table).assign(is_true=lambda rows: rows.is_true.replace("yes", "sí"))
    words = ["--text", "statement", "--target", "is_true"]
    model = ["--model", lm, "--training.window", "32", "--out", out]
    printed(capsys, "probe", "--labels", table, *words, *model, *FEW)
    rows.to_csv(table, index=False, encoding="latin-1")
    line = refused(capsys, "probe", out, "--labels", table, *words, *FEW)
    assert "is not valid utf-8; set --corpus.encoding to the encoding of the file, such as latin-1" in line
    shown = printed(capsys, "probe", out, "--labels", table, *words, *FEW, "--corpus.encoding", "latin-1")
    assert "classes of 'is_true': " in shown
    assert "sí" in shown


def test_a_given_column_of_texts_is_kept(tmp_path: Path):
    """Whether by --text, as a setting or in a file; only an earlier run's own is forgotten."""
    out = tmp_path / "out"
    words = ["--model", "m", "--labels", "t.csv", "--target", "is_true", "--out", str(out)]
    file = tmp_path / "own.yaml"
    file.write_text("probe: {text_column: statement}\n", "utf-8")
    for given in (["--text"], ["--probe.text_column"], ["--config"]):
        value = str(file) if given == ["--config"] else "statement"
        config = probed_config(*parse_probe(probe, [*words, *given, value]))
        assert (config.probe.text_column, config.corpus.text_column) == ("statement", "statement")
    out.mkdir()
    earlier = config.override({"probe.text_column": "earlier"}).to_yaml()
    (out / "config.yaml").write_text(earlier, "utf-8")
    write_json(out / "run.json", {"format": FORMAT, "stages": {"corpus": {}}})
    assert probed_config(*parse_probe(probe, words)).probe.text_column is None
    given = ["--probe.text_column", "statement"]
    assert probed_config(*parse_probe(probe, [*words, *given])).probe.text_column == "statement"


def test_labels_of_sentences_are_probed_and_changed_without_actions(
    capsys: Capture, lm: Path, texts: Path, tmp_path: Path
):
    out, table = tmp_path / "out", tmp_path / "sentences.csv"
    few = ["--probe.variants", "none", "--evaluation.resamples", "100", "--quiet"]
    corpus = ["--corpus", texts, "--target", "token", "--training.window", "32"]
    printed(capsys, "probe", "--model", lm, *corpus, "--out", out, *few)
    printed(capsys, "corpus", out, "--export", table)
    sentences = pd.read_csv(table)
    assert "action" not in sentences
    sentences.assign(
        length=np.where(sentences.text.str.len() > sentences.text.str.len().median(), "long", "short")
    ).to_csv(table, index=False)
    printed(capsys, "probe", out, "--labels", table, "--target", "length", "--positions", "1", "2", *few)
    changed = ["--intervene.distances", "1", "--intervene.samples", "4", "--intervene.strengths", "1"]
    shown = printed(capsys, "intervene", out, *changed, "--evaluation.resamples", "100", "--quiet")
    assert "labelled by a classifier of words" in shown
    found = Run.open(out).interventions()
    assert {"erase", "steer", "patch"} == set(found.kind)
    assert found.value.notna().all()
