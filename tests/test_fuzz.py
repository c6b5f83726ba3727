"""Generated bad input: each ends in one line and exit code 2, or in a result, and damages nothing.

PROBEKIT_FUZZ=20 tries twenty times as many.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from running import TWO_CELLS, ran

import probekit
from probekit.config import Config, settings_of
from probekit.errors import ProbekitError
from probekit.evaluation.multiple_choice import read_questions
from probekit.run.run import Run

SCALE = int(os.environ.get("PROBEKIT_FUZZ", "1"))
"""How many times as many inputs are tried."""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ODD = [
    *("", " ", "nan", "-inf", "1e999", "-1", "0", "0.5", "1", "2", "true", "null", "none", "[]", "{}", "[1,"),
    *("a,b", "\x00", "\x1b[31m", "é\u2028ü", "\ud800", "../..", "/dev/null", "9" * 400, "%s", "{x}", "demo"),
    *("1 2", "~x/y"),
]
TEXT = st.sampled_from(ODD) | st.text(max_size=40)
NOISY = [
    *(b"", b"\n\n", b"\x00" * 50, b"\xff\xfe\x00", b"x" * 100_000, b"[" * 5000, b"{}\n" * 3, b'"a"\nnull\n'),
    *(b" = One = \n\nA sentence. Another.\n", b'{"text": 3}\n', b'{"text": "\\ud800"}\n', b"a,b\n1,2\n3\n"),
    *(b'{"text": null}\n[]\n', b'{"a": 1}\n{"a": [1]}\n', "\u2028\x85\r".encode() * 9, b"PAR1" * 9),
]
NOISE = (
    st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.sampled_from(NOISY)
)


def fuzz(count: int) -> Callable[[Any], Any]:
    """As many examples of a kind as are asked for; always the same ones."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=count * SCALE,
        deadline=None,
        derandomize=SCALE == 1,
        database=None,
        suppress_health_check=quiet,
        phases=[Phase.generate],  # to make a training smaller takes longer than to read it
    )


def checked(*words: object) -> int:
    """Runs a command on an input; its exit code, which is 0 or 2."""
    result = ran(*words)
    assert result.code == 0 or result.refused(), result
    return result.code


@pytest.fixture(scope="module")
def tiny(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of the tiny run, without most of its texts."""
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(tiny_config.override({"corpus.planted.documents": 40, "corpus.seed": 3}).to_yaml())
    return path


@pytest.fixture(scope="module")
def probed(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, evaluated and probed."""
    folder = tmp_path_factory.mktemp("probed") / "run"
    shutil.copytree(tiny_run.folder, folder)
    assert ran("evaluate", folder, "--quiet").code == 0
    assert ran("probe", folder, "--quiet", *TWO_CELLS).code == 0
    return folder


@pytest.fixture
def begun_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` checks its settings and begins a run, and trains nothing."""
    monkeypatch.setattr("probekit.training.train._train", lambda run, progress: None)


# Settings


@fuzz(25)
@given(
    given=st.lists(
        st.tuples(st.sampled_from([*settings_of(Config)]), st.lists(TEXT, min_size=1, max_size=3)),
        min_size=1,
        max_size=2,
    ),
    other=st.lists(TEXT | st.sampled_from(["--resume", "--preset", "--config", "--quiet"]), max_size=2),
)
def test_settings_on_the_command_line(begun_only: None, tiny: Path, tmp_path_factory, given, other):
    out = tmp_path_factory.mktemp("cli") / "run"
    words = [word for name, values in given for word in (f"--{name}", *values)]
    checked("train", "--config", tiny, "--quiet", "--out", out, *words, *other)


BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (c + 1, c + 1, *[c] * 8) for c in range(97, 110)
)
"""A short file of which aliases make a billion values."""


def _spoilt(text: str) -> st.SearchStrategy[bytes]:
    lines = text.splitlines(keepends=True)

    @st.composite
    def spoilt(draw: st.DrawFn) -> bytes:
        at = draw(st.integers(0, len(lines) - 1))
        key = lines[at].partition(":")[0]
        value = draw(
            TEXT | JSON.map(json.dumps) | st.sampled_from(["&a [*a, *a]", "!!python/object:os.x {}"])
        )
        new = draw(st.sampled_from([f"{key}: {value}\n", f"{value}\n", "", f"\t{lines[at]}", lines[at] * 2]))
        whole = "".join([*lines[:at], new, *lines[at + 1 :]]).encode("utf-8", "surrogatepass")
        cut = draw(st.integers(0, len(whole)) | st.just(len(whole)))
        return whole[:cut]

    return spoilt()


@fuzz(25)
@given(data=st.data())
def test_files_of_settings(begun_only: None, tiny: Path, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("yaml")
    file = folder / "settings.yaml"
    values = JSON.map(
        lambda value: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    )
    file.write_bytes(data.draw(_spoilt(tiny.read_text()) | NOISE | st.just(BOMB) | values))
    code = checked("train", "--config", file, "--quiet", "--out", folder / "run")
    if code == 0:
        assert Run.open(folder / "run").config == Config.from_yaml(file)


@fuzz(3)
@given(
    name=st.sampled_from([n for n in settings_of(Config) if n.split(".")[0] in ("training", "planner")]),
    value=st.sampled_from(["0", "0.1", "1", "2", "7", "true", "1e30", "-1", "none", "soft", "full", "lora"]),
)
def test_settings_that_are_trained_with(tiny: Path, tmp_path_factory, name, value):
    out = tmp_path_factory.mktemp("trained") / "run"
    words = ["--mixing.variants", "soft", "joint", "--training.lm.epochs", "0.3"]
    words = ["--config", tiny, "--quiet", "--out", out, *words, f"--{name}", value]
    code = checked("train", *words)
    if code == 0:
        weights = [p.flatten() for p in Run.open(out).planner("joint").parameters()]
        assert torch.isfinite(torch.cat(weights)).all()


# Texts and tables


def _documents(good: int) -> st.SearchStrategy[bytes]:
    """JSON lines or articles of which some are bad."""
    line = JSON.map(lambda value: json.dumps({"text": value}).encode()) | NOISE
    article = st.text(max_size=60).map(lambda text: f" = T = \n\n{text}\n".encode())
    fine = b'{"text": "A word. Two more words, here. And again some."}'
    return st.lists(line | article, max_size=3).map(lambda odd: b"\n".join([*odd, *[fine] * good]))


@fuzz(14)
@given(
    bytes_=NOISE | _documents(0) | _documents(40),
    reader=st.sampled_from(["text", "wikitext", "jsonl", "parquet"]),
    more=st.sampled_from(
        [
            [],
            ["--corpus.separator", "x"],
            ["--corpus.encoding", "utf-16"],
            ["--corpus.max_documents", "1"],
            ["--actions.k", "2"],
        ]
    ),
)
def test_texts(tiny: Path, tmp_path_factory, bytes_, reader, more):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_bytes(bytes_)
    words = ["--config", tiny, "--corpus.path", folder / "text.txt", "--corpus.reader", reader, *more]
    words += ["--actions.labels", "clusters", "--out", folder / "run", "--quiet"]
    code = checked("corpus", *words)
    assert (code == 0) == (folder / "run" / "corpus").exists()
    assert (folder / "text.txt").read_bytes() == bytes_


@fuzz(14)
@given(
    column=st.lists(JSON, min_size=1, max_size=4) | st.lists(st.integers(-2, 3) | st.none(), min_size=2),
    suffix=st.sampled_from([".csv", ".jsonl", ".parquet"]),
    noise=st.none() | NOISE,
    rows=st.sampled_from([None, None, 0, 1, 7]),
)
def test_tables_of_labels(probed: Path, tmp_path_factory, monkeypatch, column, suffix, noise, rows):
    def found(*_: object) -> None:
        raise ProbekitError("accepted")

    monkeypatch.setattr("probekit.probing.probe._grids", found)
    file = tmp_path_factory.mktemp("labels") / f"labels{suffix}"
    sentences = len(Run.open(probed).corpus.first_token)
    count = sentences if rows is None else rows
    try:
        table = pd.DataFrame({"kind": (column * (count // len(column) + 1))[:count]})
        {".csv": table.to_csv, ".parquet": table.to_parquet}.get(
            suffix, lambda file, index: table.to_json(file, orient="records", lines=True)
        )(file, index=False)
    except (ValueError, TypeError, OverflowError, pa.ArrowException):  # pandas does not write it
        file.write_bytes(b"")
    if noise is not None:
        file.write_bytes(noise)
    checked("probe", probed, "--quiet", "--probe.labels", file, "--probe.target", "kind")


@fuzz(14)
@given(bytes_=NOISE | _documents(1), suffix=st.sampled_from([".txt", ".jsonl"]))
def test_prompts(probed: Path, tmp_path_factory, bytes_, suffix):
    file = tmp_path_factory.mktemp("prompts") / f"prompts{suffix}"
    file.write_bytes(bytes_)
    words = ["--prompts", file, "--tokens", "1", "--variant", "none", "--quiet"]
    checked("generate", probed, *words)


@fuzz(8)
@given(text=TEXT | NOISE, plan=st.none() | TEXT, data=st.data())
def test_texts_to_read(probed: Path, tmp_path_factory, text, plan, data):
    folder = tmp_path_factory.mktemp("lens")
    if isinstance(text, bytes):
        (folder / "text.txt").write_bytes(text)
        text = folder / "text.txt"
    words = ["--text", text, "-o", folder / "lens.html", "--limit", "20", "--quiet"]
    checked("lens", probed, *words)
    if plan is not None:
        words = ["--plan", plan, "--prompt", data.draw(TEXT), "--tokens", "1", "--variant", "oracle"]
        checked("generate", probed, "--quiet", *words)


QUESTION = st.fixed_dictionaries(
    {},
    optional={
        "question": JSON | st.just("A?"),
        "choices": JSON | st.just(["b", "c"]),
        "answer": JSON | st.integers(0, 2),
    },
)


@fuzz(14)
@given(
    bytes_=NOISE
    | _documents(0)
    | st.lists(QUESTION, min_size=1, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
)
def test_files_of_questions(tiny_run: Run, tmp_path_factory, bytes_):
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    file.write_bytes(bytes_)
    try:
        questions = read_questions(str(file), tiny_run.corpus)
    except ProbekitError:
        return
    assert all(len(question.choices) > 1 for question in questions)


# What is no text, path, setting or number, given to the Python interface

OBJECTS = [
    *(None, True, -1, 2**70, 0.5, float("nan"), "", "\0", "\ud800", "x" * 400, b"x", [], [None], [[1]], {}),
    *({3: 1}, range(2), object(), Path("x"), {1}, 1j, pd.NA, np.array([1, 2]), np.array(3), np.int64(0)),
]
PYTHON: dict[str, Callable[[Path, Path, Any], Any]] = {
    "override": lambda run, out, given: Config().override(given),
    "from_dict": lambda run, out, given: Config.from_dict(given),
    "from_preset": lambda run, out, given: Config.from_preset(given),
    "from_yaml": lambda run, out, given: Config.from_yaml(given),
    "settings": lambda run, out, given: Run.open(run).with_settings({"probe.layers": given}),
    "prepare": lambda run, out, given: probekit.prepare(given, out / "run", quiet=True),
    "build_corpus": lambda run, out, given: probekit.build_corpus(given, out / "run", quiet=True),
    "load_run": lambda run, out, given: probekit.load_run(given),
    "sweep": lambda run, out, given: probekit.Sweep.open(given),
    "load_probes": lambda run, out, given: probekit.load_probes(given),
    "fit_grid": lambda run, out, given: probekit.fit_grid(given, given),
    "report": lambda run, out, given: probekit.report(given),
    "report to": lambda run, out, given: probekit.report(run, given),
    "score": lambda run, out, given: probekit.score(run, given, quiet=True),
    "score of": lambda run, out, given: probekit.score(run, ["a"], given, layer=given, quiet=True),
    "score layer": lambda run, out, given: probekit.score(run, ["a"], layer=given, quiet=True),
    "lens text": lambda run, out, given: probekit.lens(run, given, out / "lens.html", quiet=True),
    "lens limit": lambda run, out, given: probekit.lens(
        run, "A.", out / "lens.html", limit=given, quiet=True
    ),
    "lens layers": lambda run, out, given: probekit.lens(run, "A.", out / "l.html", layers=given, quiet=True),
    "lens of": lambda run, out, given: probekit.lens(run, "A.", out / "l.html", variant=given, quiet=True),
    "generate": lambda run, out, given: probekit.generate(run, given, variant="none", tokens=1),
    "generate tokens": lambda run, out, given: probekit.generate(run, "A.", tokens=given),
    "generate seed": lambda run, out, given: probekit.generate(run, "A.", tokens=1, seed=given),
    "generate variant": lambda run, out, given: probekit.generate(run, "A.", tokens=1, variant=given),
}


@fuzz(60)
@given(call=st.sampled_from(sorted(PYTHON)), number=st.integers(0, len(OBJECTS) - 1))
def test_objects_of_other_types_in_python(probed: Path, tmp_path_factory, monkeypatch, call, number):
    folder = tmp_path_factory.mktemp("python")
    monkeypatch.chdir(folder)
    said = ""
    try:
        PYTHON[call](probed, folder, OBJECTS[number])
    except (ProbekitError, OSError) as error:  # such as that of a name that is too long
        said = str(error)
    assert "\n" not in said
