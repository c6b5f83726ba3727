"""`probekit generate`: what it continues, what it prints and writes, and one line for whatever is wrong."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import running

from probekit.data.sentences import complete_spans
from probekit.errors import ProbekitError
from probekit.generation import generate as texts
from probekit.generation.generate import Generated, generate, sentences_of
from probekit.generation.prompts import Prompt, read_prompts
from probekit.run.run import Run

Capture = pytest.CaptureFixture[str]


def printed(capsys: Capture, *words: str | Path) -> str:
    return running.printed(capsys, "generate", *words, "--quiet")


def refused(capsys: Capture, *words: str | Path) -> str:
    return running.refused(capsys, "generate", *words, "--quiet")


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_by_default_some_documents_are_continued(tiny_run: Run, capsys: Capture, tmp_path: Path):
    out = tmp_path / "texts.jsonl"
    shown = printed(capsys, tiny_run.folder, "--tokens", "30", "--out", out)
    rows = written(out)
    assert len(rows) == 4
    assert shown.endswith(f"All texts: {out}\n")
    tokenizer = tiny_run.corpus.tokenizer
    for number, row in enumerate(rows):
        assert row["variant"] == "soft"
        assert row["ended"] == "length"
        assert len(row["tokens"]) == 30
        assert row["document"] in tiny_run.corpus.documents("test")
        text = tiny_run.corpus.texts[row["document"]].text
        assert text.startswith(row["prompt"])
        assert len(tokenizer(row["prompt"]).input_ids) >= 24
        assert f"Text {number}, document {row['document']}, 30 tokens by soft" in shown
        sentences = [sentence["text"] for sentence in row["sentences"]]
        assert "".join("".join(sentences).split()) == "".join(row["text"].split())
        assert all(text in shown for text in sentences if text.isprintable() and len(text) < 80)


def test_it_is_what_generate_writes(tiny_run: Run, capsys: Capture, tmp_path: Path):
    out = tmp_path / "texts.jsonl"
    words = ("--prompt", "Word.", "", "--tokens", "9", "--seed", "5", "--variant", "joint")
    printed(capsys, tiny_run.folder, *words, "--generation.top_k", "7", "--out", out)
    settings = tiny_run.config.generation.model_copy(update={"top_k": 7})
    expected = generate(tiny_run, ["Word.", ""], variant="joint", settings=settings, tokens=9, seed=5)
    assert [row["tokens"] for row in written(out)] == [more.tokens.tolist() for more in expected]
    assert [row["text"] for row in written(out)] == [more.text for more in expected]


def test_an_out_that_cannot_be_is_refused_before_anything_is_written(
    tiny_run: Run, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(texts, "generate", pytest.fail)
    line = refused(capsys, tiny_run.folder, "--out", tmp_path / "no" / "texts.jsonl")
    assert line == f"--out {tmp_path}/no/texts.jsonl: there is no folder {tmp_path}/no"
    line = refused(capsys, tiny_run.folder, "--out", tmp_path)
    assert line == f"--out {tmp_path}: is a folder; give the name of a file"
    assert not [*tmp_path.iterdir()]


def test_prompts_come_from_files(tiny_run: Run, tmp_path: Path, capsys: Capture):
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("One.\n\nTwo. And three\n", "utf-8")
    lines.write_text('{"text": "One.", "other": 1}\n{"text": "Two.\\nAnd three"}\n', "utf-8")
    assert read_prompts(plain) == ["One.", "Two. And three"]
    assert read_prompts(lines) == ["One.", "Two.\nAnd three"]
    lines.write_text('\ufeff{"text": "One\u2028line.\x85"}\n', "utf-8")  # a mark, breaks of Unicode alone
    assert read_prompts(lines) == ["One\u2028line.\x85"]
    lines.write_text('{"text": "One."}\n\n  \n["text"]\n')
    with pytest.raises(ProbekitError, match="line 4 is no JSON object"):
        read_prompts(lines)
    shown = printed(capsys, tiny_run.folder, "--prompts", plain, "--tokens", "4")
    assert "Two. And three" in shown


def test_corpus_text_is_no_markup(tiny_run: Run, capsys: Capture):
    prompt = "[bold]x[/bold] [red] \x1b[31m :smile: [/nothing]"
    shown = printed(capsys, tiny_run.folder, "--prompt", prompt, "--tokens", "3")
    assert "[bold]x[/bold] [red] ‹U+001B›[31m :smile: [/nothing]" in shown


def test_a_plan_is_obeyed_and_its_end_reported(tiny_run: Run, capsys: Capture, tmp_path: Path):
    out = tmp_path / "texts.jsonl"
    shown = printed(
        capsys, tiny_run.folder, "--samples", "6", "--plan", "3,1", "--tokens", "90", "--out", out
    )
    rows = written(out)
    stopped = [row for row in rows if row["ended"] == "plan"]
    assert stopped
    assert f"Ended where the plan ends: {len(stopped)} of 6" in shown
    assert re.search("Longer than the 48 tokens that the LM reads at once: [1-6] of 6; whenever", shown)
    assert "probable" not in shown
    for row in rows:
        assert row["document"] is None
        assert [sentence["action"] for sentence in row["sentences"]] == [3, 1][: len(row["sentences"])]
        assert len(row["sentences"]) == 2 or row["ended"] == "length"


def test_the_oracles_plan_is_the_documents(tiny_run: Run, capsys: Capture, tmp_path: Path):
    out, corpus = tmp_path / "texts.jsonl", tiny_run.corpus
    printed(capsys, tiny_run.folder, "--documents", "2", "--plan", "oracle", "--tokens", "30", "--out", out)
    rows = written(out)
    assert len(rows) == 2
    for row in rows:
        true = corpus.actions[corpus.sentences(np.array([row["document"]]))]
        first = len(complete_spans(row["prompt"]))
        found_actions = [sentence["action"] for sentence in row["sentences"]]
        assert found_actions == true[first : first + len(found_actions)].tolist()


def test_sentences_are_found_by_hindsight():
    prompt = Prompt(np.zeros(1), "It cost 3.")
    more = Generated(np.zeros(1), "14 in all. The end", np.array([7, 5]), "length")
    assert sentences_of(prompt, more, "en") == [("14 in all.", None), ("The end", 7)]
    begun = Prompt(np.zeros(1), "A thing. It")
    more = Generated(np.zeros(1), " goes. On\nLast", np.array([7, 5]), "length")
    assert sentences_of(begun, more, "en") == [("goes.", 7), ("On", 5), ("Last", None)]
    assert sentences_of(begun, Generated(np.zeros(0), "", np.zeros(0), "plan"), "en") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", "0"], "--samples is 0; it must be 1 or more"),
        (["--documents", "-1"], "--documents is -1; it must be 1 or more"),
        (["--tokens", "many"], "argument --tokens: invalid int value: 'many'"),
        (["--plan", "1,x"], "--plan is '1,x'; give actions with commas between them"),
        (["--plan=-1"], "the plan has the action -1"),
        (["--plan", "1", "--variant", "fixed"], "variant 'fixed' follows no plan"),
        (["--plan", "oracle", "--samples", "2"], "--plan oracle is the plan of a document"),
        (["--prompts", "/no/file"], "--prompts /no/file: cannot be read as UTF-8 text"),
        (["--prompt", "a", "--samples", "1"], "not allowed with argument"),
        (["--generation.context", "9999"], "no test document goes on after its first 9999 tokens; lower"),
        (["--generation.temperature", "1e-309"], "1e-309 is too low to divide by; give 0.001 or more, or 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(words: list[str], said: str, tiny_run: Run, capsys: Capture):
    assert said in refused(capsys, tiny_run.folder, *words)
