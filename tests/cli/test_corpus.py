"""`probekit corpus` as it is typed: a run's corpus, one built alone, and all sentences as a table."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from read_tables import rows_of
from running import ONE_CELL, Capture, printed, refused

from probekit.cli import main
from probekit.run.run import Run


def test_corpus_prints_sizes_and_nearest_sentences(capsys: Capture, tiny_run: Run):
    corpus = tiny_run.corpus
    out = printed(capsys, "corpus", tiny_run.folder, "--nearest", "1")
    for split in ("train", "probe", "validation", "test"):
        documents = corpus.documents(split)
        row = [split, f"{len(documents):,}", f"{len(corpus.sentences(documents)):,}"]
        assert row in [cells[:3] for cells in rows_of(out)]
    assert out.count("█") >= 8
    assert printed(capsys, "corpus", tiny_run.folder, "--nearest", "0") != out


def test_sentences_are_exported_and_a_column_of_labels_is_probed(capsys: Capture, copy: Path, tmp_path: Path):
    path = tmp_path / "sentences.csv"
    printed(capsys, "corpus", copy, "--nearest", "0", "--export", path)
    table = pd.read_csv(path)
    corpus = Run.open(copy).corpus
    assert len(table) == len(corpus.first_token)
    assert table.action.tolist() == corpus.actions.tolist()
    words = ["probe", copy, *ONE_CELL, "--quiet", "--probe.labels", path]
    assert "has no column 'kind'" in refused(capsys, *words, "--probe.target", "kind")
    table.assign(kind=np.where(table.action < 4, "low", "high")).to_csv(path, index=False)
    out = printed(capsys, *words, "--probe.target", "kind")
    probes = Run.open(copy).probes()
    assert set(probes.target) == {"kind"}
    assert "kind" in out
    assert "bigram" in set(probes.reader)
    assert "--export is 'a.txt'; it must end in .csv" in refused_late(
        capsys, "corpus", copy, "--export", "a.txt"
    )


def refused_late(capsys: Capture, *words: str | Path) -> str:
    """The one line on standard error of a command that ends with code 2, whatever it printed before."""
    assert main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_output_that_nobody_reads_ends_quietly(tiny_run: Run):
    command = f"{sys.executable} -m probekit corpus {tiny_run.folder} | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_files_in_the_home_folder(
    capsys: Capture, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`--export=~/x` is a word that no shell expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    printed(capsys, "corpus", "~/run", "--nearest", "0", "--export=~/sentences.csv")
    printed(capsys, "report", "~/run", "--out=~/report.md")
    write = ["generate", "~/run", "--prompt", "A", "--tokens", "1", "--variant", "none", "--quiet"]
    printed(capsys, *write, "--out=~/texts.jsonl")
    (tmp_path / "prompts.txt").write_text("A word\n")
    printed(capsys, *write[:2], "--prompts=~/prompts.txt", *write[4:])
    assert {path.name for path in tmp_path.iterdir()} >= {"sentences.csv", "report.md", "texts.jsonl"}
    assert not (tmp_path / "~").exists()
