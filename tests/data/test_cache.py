"""What is kept is taken where nothing else would have been made, and nowhere else; damage is noticed."""

import json
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from probekit.config import Config, setting_names
from probekit.data import build, hub
from probekit.data import build as cache
from probekit.data.build import Entry, cache_folder, write_corpus
from probekit.data.corpus import Corpus
from probekit.progress import Progress

TEXTS = [f"The {word} is here. It is {n} and old. So it ends." for n, word in enumerate(["dog", "cat"] * 12)]
SMALL = {"actions.k": 8, "actions.dimensions": 4, "lm.vocabulary": 300, "corpus.reader": "jsonl"}
OTHERS: dict[str, Any] = {
    "corpus.language": "de",
    "corpus.probe_fraction": 0.3,
    "corpus.validation_fraction": 0.2,
    "corpus.test_fraction": 0.2,
    "corpus.seed": 7,
    "actions.dimensions": 5,
    "actions.k": 9,
    "actions.fit_sentences": 20,
    "lm.vocabulary": 301,
}
"""Another value of every setting that decides what is made of texts."""
ABOUT_TEXTS = {
    *("reader", "path", "separator", "text_column", "subset", "dataset_split", "encoding"),
    "max_documents",
}
"""Settings of `corpus` that say which texts are read: these are told by their own digest."""


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where everything is kept, however soon it is made."""
    monkeypatch.setenv("PROBEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SECONDS_WORTH_KEEPING", -1.0)
    return tmp_path / "cache" / "corpora"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every codebook that is fitted."""
    counted: list[int] = []

    def fit(*arguments: Any) -> Any:
        counted.append(1)
        return fit_codebook(*arguments)

    fit_codebook = build.fit_codebook
    monkeypatch.setattr(build, "fit_codebook", fit)
    return counted


def source(folder: Path, texts: list[str]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return SMALL | {"corpus.path": str(folder)}


def built(folder: Path, overrides: dict[str, Any]) -> Corpus:
    return write_corpus(Config().override(overrides), folder, Progress(quiet=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_texts_and_settings_are_made_once(tmp_path: Path, kept: Path, made: list[int]):
    first = built(tmp_path / "first", source(tmp_path / "texts", TEXTS))
    # Other names and another format of the same texts; other names of documents are not lost.
    named = source(tmp_path / "moved", ["", *TEXTS])
    second = built(tmp_path / "second", named)
    assert len(made) == 1
    assert second.texts.row(0)["name"] == "texts.jsonl:2"
    assert second.facts == first.facts | {"blank_documents_dropped": 1}
    assert (first.facts["blank_documents_dropped"], list(first.facts)) == (0, list(second.facts))
    own = {"documents.arrow", "facts.json"}
    one, two = contents(first.folder), contents(second.folder)
    assert {name: two[name] for name in two.keys() - own} == {name: one[name] for name in one.keys() - own}
    assert (second.folder / "tokens.npy").samefile(first.folder / "tokens.npy")
    assert not any("documents.arrow" in name for name in contents(kept))
    third = built(tmp_path / "third", source(tmp_path / "texts", TEXTS))
    assert contents(third.folder) == one


@pytest.mark.parametrize("name", OTHERS)
def test_another_value_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[int], name: str
):
    given = source(tmp_path / "texts", TEXTS)
    built(tmp_path / "first", given)
    taken = built(tmp_path / "second", given | {name: OTHERS[name]})
    assert len(made) == 2
    monkeypatch.setenv("PROBEKIT_CACHE", "off")
    assert contents(built(tmp_path / "third", given | {name: OTHERS[name]}).folder) == contents(taken.folder)


def test_every_setting_of_the_corpus_is_accounted_for():
    names = {name for name in setting_names() if name.startswith(("corpus.", "actions."))}
    names = {name for name in names if not name.startswith("corpus.planted.")}
    apart = {f"corpus.{name}" for name in ABOUT_TEXTS} | {"actions.encoder", "actions.labels"}
    assert names - apart == {name for name in OTHERS if not name.startswith("lm.")}


@pytest.mark.parametrize(
    "changed",
    [TEXTS[:-1], [*TEXTS[:-1], TEXTS[-1] + " "], TEXTS[::-1], [*TEXTS, TEXTS[0]]],
    ids=["fewer", "a space more", "another order", "one twice"],
)
def test_other_texts_are_made_anew(tmp_path: Path, made: list[int], changed: list[str]):
    built(tmp_path / "first", source(tmp_path / "texts", TEXTS))
    built(tmp_path / "second", source(tmp_path / "texts", changed))
    assert len(made) == 2


def test_the_plan_of_the_planted_corpus_counts(tmp_path: Path, made: list[int]):
    planted = SMALL | {
        "corpus.reader": "planted",
        "corpus.planted.documents": 40,
        "corpus.planted.actions": 8,
    }
    built(tmp_path / "first", planted)
    built(tmp_path / "second", planted | {"actions.labels": "planted"})
    built(tmp_path / "third", planted | {"corpus.planted.seed": 1})
    assert len(made) == 3
    built(tmp_path / "fourth", planted)
    assert len(made) == 3


def test_another_version_or_code_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[int]
):
    given = source(tmp_path / "texts", TEXTS)
    built(tmp_path / "first", given)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "installed_version", lambda name: f"another {name}")
        built(tmp_path / "second", given)
    digest_of = cache.digest_of
    with monkeypatch.context() as patch:
        patch.setattr(cache, "digest_of", lambda files: "other code" if len(files) > 1 else digest_of(files))
        built(tmp_path / "third", given)
    assert len(made) == 3


def test_another_tokenizer_is_made_anew(tmp_path: Path, made: list[int]):
    given = source(tmp_path / "texts", TEXTS)
    trained = [
        built(tmp_path / f"{n}", given | {"lm.vocabulary": n}).folder / "tokenizer" for n in (270, 290)
    ]
    for n, folder in enumerate([*trained, trained[0]]):
        built(tmp_path / f"pretrained{n}", given | {"lm.name": str(folder)})
    assert len(made) == 4


def test_another_encoder_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def entry(encoder: Path | str, device: str = "cpu") -> Path:
        found = Entry.of(Config().override({"actions.encoder": str(encoder)}), tmp_path, "texts", device)
        assert found is not None
        return found.folder

    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    first = entry(model)
    assert first == entry(model) != entry(model, "cuda")
    (model / "model.safetensors").write_bytes(b"Weights")
    assert entry(model) != first
    ask = Mock(side_effect=lambda name, **_: hub.Source(name, "abc", local_only=False))
    monkeypatch.setattr(hub, "find", ask)
    of_hub = entry("some/model")
    assert of_hub == entry("some/model") != entry("other/model")
    ask.side_effect = lambda name, **_: hub.Source(name, "def", local_only=False)
    assert entry("some/model") != of_hub


@pytest.mark.parametrize("damage", ["bit", "missing", "more", "no entry", "cut entry", "other entry"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, kept: Path, made: list[int], damage: str):
    given = source(tmp_path / "texts", TEXTS)
    whole = contents(built(tmp_path / "first", given).folder)
    (entry,) = kept.iterdir()
    file = entry / "corpus" / "actions.npy"
    bits = bytearray(file.read_bytes())
    bits[-4] ^= 1
    file.unlink()  # so that the first corpus, which is the same file, stays whole
    if damage == "bit":
        file.write_bytes(bits)
    elif damage != "missing":
        file.write_bytes(whole["actions.npy"])
    if damage == "more":
        (entry / "corpus" / "more").touch()
    elif damage == "no entry":
        (entry / "entry.json").unlink()
    elif damage == "cut entry":
        (entry / "entry.json").write_text((entry / "entry.json").read_text()[:40])
    elif damage == "other entry":
        (entry / "entry.json").write_text("[]")
    assert contents(built(tmp_path / "second", given).folder) == whole
    assert len(made) == 2
    assert contents(built(tmp_path / "third", given).folder) == whole
    assert len(made) == 2, "it is kept again"


def test_an_entry_that_goes_while_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[int]
):
    given = source(tmp_path / "texts", TEXTS)
    first = built(tmp_path / "first", given)
    whole = contents(first.folder)
    link = cache.link_or_copy

    def gone(origin: Path, target: Path) -> None:
        if origin.name == "spans.npy" and "corpora" in origin.parts:
            raise FileNotFoundError(origin)
        link(origin, target)

    monkeypatch.setattr(cache, "link_or_copy", gone)
    assert contents(built(tmp_path / "second", given).folder) == whole
    assert contents(first.folder) == whole, "linked files were written to"
    assert len(made) == 2


def test_builders_at_once(tmp_path: Path, kept: Path):
    given = source(tmp_path / "texts", TEXTS)
    found: dict[int, dict[str, bytes]] = {}

    def work(n: int) -> None:
        found[n] = contents(built(tmp_path / f"corpus{n}", given).folder)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(each == found[0] for each in found.values())
    (entry,) = kept.iterdir()
    assert {path.name for path in entry.iterdir()} == {"corpus", "entry.json"}


def test_where_nothing_can_be_kept_corpora_are_built(tmp_path: Path, made: list[int]):
    (tmp_path / "cache").write_text("a file where the folder should be")
    given = source(tmp_path / "texts", TEXTS)
    assert contents(built(tmp_path / "first", given).folder) == contents(
        built(tmp_path / "second", given).folder
    )
    assert len(made) == 2


def test_what_is_made_soon_or_not_to_be_kept_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Path
):
    given = source(tmp_path / "texts", TEXTS)
    monkeypatch.setenv("PROBEKIT_CACHE", "off")
    built(tmp_path / "first", given)
    monkeypatch.setenv("PROBEKIT_CACHE", str(kept.parent))
    monkeypatch.setattr(cache, "SECONDS_WORTH_KEEPING", 1e9)
    built(tmp_path / "second", given)
    assert not kept.exists()


def test_where_things_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for chosen, base, folder in [
        ("off", None, None),
        ("~/here", None, tmp_path / "here"),
        ("", None, tmp_path / ".cache/probekit"),
        (None, str(tmp_path / "base"), tmp_path / "base/probekit"),
        (None, None, tmp_path / ".cache/probekit"),
    ]:
        for name, value in (("PROBEKIT_CACHE", chosen), ("XDG_CACHE_HOME", base)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        assert cache_folder() == folder
