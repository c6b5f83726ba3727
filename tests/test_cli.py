"""The commands as they are typed: exit codes, what they print, and one line for whatever is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from probekit import cli
from probekit.cli import COMMANDS, main
from probekit.config import Config, preset_names, setting_names
from probekit.corpus.tokenizer import train_tokenizer
from probekit.errors import ProbekitError
from probekit.run import Run
from probekit.storage import atomic_path, read_json, write_json
from probekit.sweeps.results import Sweep

FAST = ["--probe.layers", "0", "--probe.distances", "1", "--probe.variants", "none", "--probe.l2", "0.1"]
FAST += ["--probe.code_length", "false", "--evaluation.resamples", "100"]
"""A grid of one cell."""

Capture = pytest.CaptureFixture[str]
STAGES = ["corpus", "lm", "planner", "adapter/fixed", "adapter/oracle", "adapter/predicted", "adapter/soft"]


def told(capsys: Capture, *words: str | Path) -> str:
    """Standard output of a command that succeeds, silently on standard error."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def refused(capsys: Capture, *words: str | Path) -> str:
    """The one line on standard error of a command that ends with code 2."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    (line,) = captured.err.splitlines()
    assert line.startswith("probekit: error: ")
    return line.removeprefix("probekit: error: ")


@pytest.fixture
def copy(tiny_run: Run, tmp_path: Path) -> Path:
    """The folder of a copy of the trained run, which a test may change."""
    return shutil.copytree(tiny_run.folder, tmp_path / "copy")


# Help


def test_help_lists_commands_and_presets(capsys: Capture):
    text = told(capsys, "--help")
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.__doc__)}$", text, re.MULTILINE)
    assert f"presets: {', '.join(preset_names())}" in text


def test_version(capsys: Capture):
    assert told(capsys, "--version") == f"probekit {version('probekit')}\n"


@pytest.mark.parametrize(
    ("command", "sections"),
    [
        ("train", None),
        ("corpus", None),
        ("evaluate", ("method", "device", "evaluation.", "generation.")),
        (
            "generate",
            ("seed", "device", *(f"generation.{name}" for name in ("context", "temp", "top_", "batch"))),
        ),
        ("probe", ("device", "evaluation.", "probe.")),
        ("lens", ("device",)),
        ("report", ()),
        ("sweep", None),
        ("demo", ()),
    ],
)
def test_help_of_a_command_has_all_its_settings_with_defaults(
    command: str, sections: tuple[str, ...] | None, capsys: Capture
):
    text = told(capsys, command, "--help")
    wanted = {name for name in setting_names() if sections is None or name.startswith(tuple(sections))}
    options = set(re.findall(r"^  --([\w.]+)", text, re.MULTILINE))
    assert options & set(setting_names()) == wanted
    assert len(re.findall(r"\(default:", text)) == len(wanted)
    assert text.startswith(f"usage: probekit {command} ")


@pytest.mark.parametrize("words", [["--preset", "demo"], ["--preset=demo"]])
def test_help_after_a_preset_has_its_defaults(words: list[str], capsys: Capture):
    plain, demo = (" ".join(told(capsys, "train", *more, "--help").split()) for more in ([], words))
    assert "--lm.width INT Residual stream width (d_model) of a new LM. (default: 128)" in plain
    assert "--lm.width INT Residual stream width (d_model) of a new LM. (default: 64)" in demo


def test_help_needs_no_pytorch():
    for words in (["--help"], ["train", "--help"], ["probe", "--help"], ["sweep", "--help"]):
        ran = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "probekit", *words],
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.startswith("usage: probekit")
        modules = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
        assert "probekit.options" in modules
        assert not modules & {"torch", "transformers", "numpy", "pandas", "transformer_lens"}


# Bad command lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: COMMAND; see `probekit --help`"),
        (["trian"], "invalid choice: 'trian' (choose from 'train', "),
        (["train", "--lm.layer", "3"], "unknown setting 'lm.layer'; did you mean 'lm.layers'?"),
        (
            ["probe", "run", "--probe.layer", "3"],
            "unknown setting 'probe.layer'; did you mean 'probe.layers'?",
        ),
        (["train", "--preset", "dmo"], "unknown preset 'dmo'; did you mean 'demo'?"),
        (["train", "--preset", "dmo", "--help"], "unknown preset 'dmo'; did you mean 'demo'?"),
        (["train", "--preset"], "argument --preset: expected one argument; see `probekit train --help`"),
        (
            ["train", "--preset", "--help"],
            "argument --preset: expected one argument; see `probekit train --help`",
        ),
        (["train", "--config", "/no/file.yaml"], "config file /no/file.yaml: No such file"),
        (["train"], "runs/run holds no run to resume; give --preset or --config to begin one"),
        (["train", "--resume", "--overwrite"], "not allowed with argument"),
        (["train", "stray"], "unexpected 'stray'; see `probekit train --help`"),
        (["evaluate"], "the following arguments are required: RUN; see `probekit evaluate --help`"),
        (["evaluate", "run", "--generation.samples", "9"], "argument --generation.samples: goes with"),
        (["probe"], "give a run's folder, or --model with --corpus; see `probekit probe --help`"),
        (["probe", "run", "--model", "gpt2"], "give a run's folder, or --model with --corpus"),
        (["probe", "run", "--corpus", "text"], "argument --corpus: goes with --model; run has its own"),
        (["probe", "run", "--out", "there"], "argument --out: goes with --model"),
        (["probe", "run", "--overwrite"], "argument --overwrite: goes with --model"),
        (["probe", "run", "--preset", "demo"], "argument --preset: goes with --model"),
        (["probe", "run", "--config", "a.yaml"], "argument --config: goes with --model"),
        (["probe", "run", "--lm.layers", "2"], "unknown setting 'lm.layers'; did you mean 'probe.layers'?"),
        (["probe", "--model", "m", "--probe.layer", "3"], "unknown setting 'probe.layer'; did you mean"),
        (["evaluate", "nowhere"], "nowhere does not exist; make one with `probekit train --out nowhere`"),
        (["corpus", "nowhere"], "nowhere does not exist"),
        (["corpus", "nowhere", "--nearest", "-1"], "argument --nearest: -1 is below 0"),
        (["corpus", "nowhere", "--nearest", "few"], "argument --nearest: invalid int value: 'few'"),
        (["evaluate", "x" * 300], "File name too long"),
        (["train", "--lm.heads", "3"], "lm: heads 3 does not divide width 128"),
        (["demo", "--preset", "demo"], "unknown setting 'preset'"),
        (["sweep"], "the sweep has no settings to change; give --preset or --config"),
        (["sweep", "--preset", "demo", "--over"], "argument --over: expected at least one argument"),
        (["sweep", "mixing-fraction", "--preset", "demo", "--seeds", "0"], "the sweep has no seeds"),
        (["sweep", "corpus.seed", "--values", "1", "2", "--preset", "demo"], "that makes other corpora"),
        (["sweep", "probe.hidden", "--values", "1", "--preset", "demo"], "probe.hidden changes nothing"),
    ],
)
def test_bad_command_lines_are_refused_in_one_line(
    words: list[str], said: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_invalid_yaml_is_refused_and_named(capsys: Capture, tmp_path: Path):
    path = tmp_path / "bad.yaml"
    path.write_text("lm: [")
    line = refused(capsys, "train", "--config", path, "--out", tmp_path / "run")
    assert line.startswith(f"config file {path} is not valid YAML")
    assert not (tmp_path / "run").exists()


def test_a_single_setting_may_put_a_file_right(capsys: Capture, tmp_path: Path):
    path = tmp_path / "heads.yaml"
    path.write_text("lm: {heads: 3}\ncorpus: {path: /no/text}")
    out = tmp_path / "run"
    assert "heads 3" in refused(capsys, "train", "--config", path, "--out", out)
    line = refused(capsys, "train", "--config", path, "--lm.width", "96", "--out", out, "--quiet")
    assert "/no/text" in line


def test_debug_shows_the_traceback(tmp_path: Path):
    with pytest.raises(ProbekitError, match="unknown preset"):
        main(["--debug", "train", "--preset", "dmo"])
    with pytest.raises(ProbekitError, match="does not exist"):
        main(["evaluate", str(tmp_path / "no"), "--debug"])


def test_an_interruption_is_code_130_and_says_how_to_go_on(capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    def interrupted(words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "probekit: interrupted; --resume goes on from there\n"
    with pytest.raises(KeyboardInterrupt):
        main(["train", "--debug"])


def test_sigterm_is_code_143_and_what_is_half_done_is_cleared(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def terminated(words: list[str]) -> None:
        with atomic_path(tmp_path / "file") as path:
            path.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(cli.COMMANDS, "sweep", terminated)
    assert main(["sweep"]) == 143
    assert capsys.readouterr().err == "probekit: terminated; the same command goes on from there\n"
    assert not [*tmp_path.iterdir()]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_is_told_in_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    def full(words: list[str]) -> None:
        raise OSError(28, "No space left on device", "runs/x/corpus")

    monkeypatch.setitem(cli.COMMANDS, "train", full)
    assert "No space left on device: 'runs/x/corpus'" in refused(capsys, "train")


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def wrong(words: list[str]) -> None:
        raise TypeError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "train", wrong)
    with pytest.raises(TypeError, match="a bug"):
        main(["train"])


# Runs


def test_existing_runs_and_other_folders_are_refused(capsys: Capture, tiny_run: Run, tmp_path: Path):
    assert "holds a run already" in refused(capsys, "train", "--preset", "demo", "--out", tiny_run.folder)
    assert "holds a run already" in refused(capsys, "corpus", "--preset", "demo", "--out", tiny_run.folder)
    (tmp_path / "thesis.tex").touch()
    line = refused(capsys, "train", "--preset", "demo", "--out", tmp_path, "--overwrite")
    assert "exists and holds no run" in line
    assert (tmp_path / "thesis.tex").exists()


def test_resuming_by_command_changes_only_what_is_free(capsys: Capture, copy: Path):
    line = refused(capsys, "train", "--resume", "--out", copy, "--lm.layers", "4")
    assert "lm.layers was 3 and is now 4" in line
    out = told(capsys, "train", "--resume", "--out", copy, "--probe.layers", "0", "--quiet")
    assert "adapter/joint" in out
    assert Run.open(copy).config.probe.layers == (0,)


def test_training_prints_stages_and_what_comes_next(capsys: Capture, tiny_run: Run):
    out = told(capsys, "train", "--resume", "--out", tiny_run.folder, "--quiet")
    for stage in STAGES:
        assert f" {stage} " in out
    assert f"probekit evaluate {tiny_run.folder}" in " ".join(out.split())


def test_corpus_prints_sizes_and_nearest_sentences(capsys: Capture, tiny_run: Run):
    corpus = tiny_run.corpus
    out = told(capsys, "corpus", tiny_run.folder, "--nearest", "1")
    for split in ("train", "probe", "validation", "test"):
        documents = corpus.documents(split)
        row = [split, len(documents), len(corpus.sentences(documents))]
        assert re.search(r" +│ +".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in row), out)
    assert out.count("█") >= 8
    assert told(capsys, "corpus", tiny_run.folder, "--nearest", "0") != out


def test_building_a_corpus_alone_is_the_first_stage_of_training(
    capsys: Capture, tmp_path: Path, tiny_config: Config
):
    (tmp_path / "tiny.yaml").write_text(tiny_config.to_yaml())
    out = tmp_path / "run"
    told(capsys, "corpus", "--config", tmp_path / "tiny.yaml", "--out", out, "--quiet")
    assert list(read_json(out / "run.json")["stages"]) == ["corpus"]
    for command, lacking in (("evaluate", "planner"), ("probe", "lm")):
        line = refused(capsys, command, out)
        assert f"lacks the stage {lacking!r}" in line
        assert f"probekit train --resume --out {out}" in line


def test_evaluating_writes_and_prints_the_same_numbers(capsys: Capture, copy: Path):
    out = told(capsys, "evaluate", copy, "--evaluation.resamples", "150", "--device", "cpu", "--quiet")
    written = json.loads((copy / "evaluation.json").read_text())
    assert written["settings"]["resamples"] == 150
    assert [row["variant"] for row in written["perplexity"]] == [
        "none", "fixed", "oracle", "oracle", "predicted", "soft", "joint",
    ]  # fmt: skip
    for row in written["perplexity"]:
        assert re.search(rf"{row['variant']} +│ +{row['actions']} +│ +{row['perplexity']:.3f} ", out)
    assert Run.open(copy).config.evaluation.resamples == 200, "a setting of one evaluation is not the run's"


def test_probing_writes_table_and_pictures(capsys: Capture, copy: Path):
    words = ["--probe.layers", "0", "--probe.distances", "1", "2", "--probe.variants", "none"]
    out = told(capsys, "probe", copy, *words, "--quiet")
    table = Run.open(copy).probes()
    probes = table[table.reader == "probe"]
    assert set(zip(probes.layer, probes.distance, strict=True)) == {(0, 1), (0, 2)}
    assert list((copy / "probes").glob("*.png"))
    assert "results.parquet" in out


def test_a_run_without_a_planner_is_probed(capsys: Capture, copy: Path):
    state = read_json(copy / "run.json")
    state["stages"] = {stage: state["stages"][stage] for stage in ("corpus", "lm")}
    write_json(copy / "run.json", state)
    told(capsys, "probe", copy, *FAST, "--quiet")
    assert set(Run.open(copy).probes().reader) == {
        *("probe", "token embedding", "prior", "bigram", "bigram (current action)", "skip n-gram"),
        *(f"ceiling ({of})" for of in ("actions", "words", "tokens read")),
    }


def test_a_store_of_activations_is_used_again(capsys: Capture, copy: Path):
    words = ["probe", copy, *FAST, "--store", "--quiet"]
    told(capsys, *words)
    first, shards = Run.open(copy).probes(), sorted((copy / "activations" / "none-seed0").iterdir())
    assert {path.suffix for path in shards} == {".json", ".safetensors"}
    times = [path.stat().st_mtime_ns for path in shards]
    told(capsys, *words)
    assert [path.stat().st_mtime_ns for path in shards] == times
    assert Run.open(copy).probes().equals(first)
    line = refused(capsys, *words, "--probe.distances", "2", "3")
    assert "none-seed0 stores activations of another distances: [1], and [2, 3]" in line
    assert "delete it, or run without --store" in line


def test_sentences_are_exported_and_a_column_of_labels_is_probed(capsys: Capture, copy: Path, tmp_path: Path):
    path = tmp_path / "sentences.csv"
    told(capsys, "corpus", copy, "--nearest", "0", "--export", path)
    table = pd.read_csv(path)
    corpus = Run.open(copy).corpus
    assert len(table) == len(corpus.first_token)
    assert table.action.tolist() == corpus.actions.tolist()
    words = ["probe", copy, *FAST, "--quiet", "--probe.labels", path]
    assert "has no column 'kind'" in refused(capsys, *words, "--probe.target", "kind")
    table.assign(kind=np.where(table.action < 4, "low", "high")).to_csv(path, index=False)
    out = told(capsys, *words, "--probe.target", "kind")
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


def test_settings_that_change_nothing_are_told(capsys: Capture, copy: Path):
    words = ["train", "--resume", "--out", str(copy), "--quiet", "--training.base.rank", "4"]
    assert main([*words, "--evaluation.stride", "7", "--seed", "0"]) == 0
    assert capsys.readouterr().err == (
        "probekit: note: training.base.rank changes nothing here: it goes with training.base.tuning lora, "
        "which is frozen\n"
    )


def test_output_that_nobody_reads_ends_quietly(tiny_run: Run):
    command = f"{sys.executable} -m probekit corpus {tiny_run.folder} | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (141, "")


# Sweeps


def test_sweeping_trains_prints_and_goes_on(capsys: Capture, tmp_path: Path, tiny_config: Config):
    (tmp_path / "tiny.yaml").write_text(tiny_config.to_yaml())
    out = tmp_path / "sweep"
    words = ["sweep", "mixing-fraction", "--config", tmp_path / "tiny.yaml", "--out", out, "--quiet"]
    words += ["--corpus.planted.documents", "120", "--seeds", "1"]
    told(capsys, *words, "--values", "0", "1")
    text = told(capsys, *words, "--values", "0.5")
    table = Sweep.open(out).table()
    means = table[table.seed.isna()]
    assert set(zip(means["mixing.fraction"], means.variant, strict=True)) == {
        (fraction, variant) for fraction in (0.0, 0.5, 1.0) for variant in ("none", "mixed")
    }
    for row in means.itertuples():
        shown = f"{row.value:.3f} [{row.value_low:.3f}, {row.value_high:.3f}]"
        assert re.search(rf"{row.member} +│ +{row.variant} +│ +{row.actions} +│ +{re.escape(shown)}", text)
    assert "Not finished" not in text
    assert "results.parquet" in text
    # Every other command works on a member.
    told(capsys, "evaluate", out / "mixing.fraction=0.5" / "seed0", "--quiet")
    line = refused(capsys, *words, "--lm.layers", "4", "--values", "0")
    assert "was begun with other settings: lm.layers was 3 and is now 4" in line
    assert "holds no sweep" in refused(capsys, *words, "--out", tmp_path)


# Generated text


def test_generated_text_is_measured_behind_perplexity(capsys: Capture, copy: Path):
    words = ["evaluate", copy, "--quiet", "--generation", "--generation.prompts", "4"]
    words += ["--generation.lengths", "8", "16", "--generation.samples", "3", "--evaluation.resamples", "100"]
    text = told(capsys, *words)
    titles = ["Perplexity per token on", "Generated continuations of 8", "Generated continuations of 16"]
    titles += [
        "Generated samples of 16 tokens",
        "Sentences that have the action",
        "No MAUVE: it needs 50 texts",
    ]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    found = read_json(copy / "generation.json")
    assert found["settings"]["lengths"] == [8, 16]
    line = refused(capsys, *words, "--generation.lengths", "4000")  # before perplexity, which prints
    assert "lower generation.lengths or generation.context" in line


# Any model


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
def lms(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a tiny random LM and its tokenizer, as a user would have them."""
    root = tmp_path_factory.mktemp("lms")
    lines = (path.read_text("utf-8") for path in sorted(texts.iterdir()))
    tokenizer = train_tokenizer(lines, 300, root / "tokenizer")
    common = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **common)
    llama = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=32,
        **common,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {"gpt2": GPT2LMHeadModel(gpt2), "llama": LlamaForCausalLM(llama)}
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in models}


ANY = ["--actions.k", "8", "--actions.dimensions", "8", "--training.window", "32", "--device", "cpu"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_any_model_is_probed_on_any_text(
    capsys: Capture, family: str, lms: dict[str, Path], texts: Path, tmp_path: Path
):
    out = tmp_path / "probed"
    words = ["probe", "--model", lms[family], "--corpus", texts, "--out", out, *ANY, *FAST, "--quiet"]
    shown = told(capsys, *words)
    assert "results.parquet" in shown
    run = Run.open(out)
    assert list(read_json(out / "run.json")["stages"]) == ["lm", "corpus"]
    assert run.config.lm.name == str(lms[family])
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
    }
    assert list((out / "probes").glob("*.png"))

    # Again, with another grid: corpus and model stay, what was probed is replaced.
    tokens = (out / "corpus" / "tokens.npy").stat().st_mtime_ns
    told(capsys, *words, "--probe.layers", "1", "--probe.variants", "random")
    assert (out / "corpus" / "tokens.npy").stat().st_mtime_ns == tokens
    again = Run.open(out).probes()
    probes = again[again.reader == "probe"]
    assert set(zip(probes.variant, probes.layer, strict=True)) == {("random", 1)}
    # As a run like any other, too.
    told(capsys, "probe", out, "--quiet")
    same = Run.open(out).probes()
    assert same.equals(again), "the run keeps the settings that it was last probed with"

    line = refused(capsys, *words, "--actions.k", "9")
    assert "actions.k was 8 and is now 9" in line
    told(capsys, *words, "--actions.k", "9", "--overwrite")
    assert Run.open(out).config.actions.k == 9


def test_any_model_needs_a_model_and_a_text(
    capsys: Capture, lms: dict[str, Path], texts: Path, tmp_path: Path
):
    words = ["probe", "--out", tmp_path / "run", "--quiet", *ANY]
    line = refused(capsys, *words, "--model", tmp_path / "no", "--corpus", texts)
    assert str(tmp_path / "no") in line
    line = refused(capsys, *words, "--model", lms["gpt2"], "--overwrite")
    assert "corpus.path is not set" in line
    line = refused(capsys, *words, "--model", lms["gpt2"], "--corpus", tmp_path / "no", "--overwrite")
    assert "corpus.path is" in line
    line = refused(
        capsys, *words, "--model", lms["gpt2"], "--corpus", texts, "--training.window", "64", "--overwrite"
    )
    assert line == "training.window is 64, but the LM reads at most 32 positions"


def test_any_model_does_not_take_over_a_run_of_another_kind(
    capsys: Capture, copy: Path, lms: dict[str, Path], texts: Path
):
    words = ["probe", "--model", lms["gpt2"], "--corpus", texts, "--out", copy, *ANY]
    before = (copy / "config.yaml").read_text()
    assert "was begun with other settings" in refused(capsys, *words)
    assert (copy / "config.yaml").read_text() == before


def test_help_tells_how_any_model_is_probed(capsys: Capture):
    text = told(capsys, "probe", "--help")
    for part in ("probekit probe RUN", "--model NAME", "--corpus FILE", "--store", "preset any-model"):
        assert part in text
    assert "--lm.revision" not in text
    everything = told(capsys, "probe", "--model", "gpt2", "--help")
    assert set(re.findall(r"^  --([\w.]+)", everything, re.MULTILINE)) >= set(setting_names())
    entry = " ".join(everything.split()).partition("--corpus.probe_fraction NUMBER")[2]
    assert entry[: entry.index(")")].endswith("(default: 0.5"), "those of the preset any-model"


def test_the_demo_goes_all_the_way_and_does_nothing_twice(
    capsys: Capture, copy: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config.override(
        {"probe.variants": ["soft"], "probe.layers": [1], "probe.distances": [1, 2]}
    )
    monkeypatch.setattr(Config, "from_preset", lambda name: {"demo": config}[name])
    weights = copy / "lm" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    out = told(capsys, "demo", "--out", copy, "--quiet")
    titles = ["Corpus", "Actions (8", "Training", "Perplexity per token on", "Next action on", "Best cells"]
    places = [out.index(title) for title in titles]
    assert places == sorted(places)
    assert weights.stat().st_mtime_ns == before
    assert (copy / "evaluation.json").exists()
    assert len(list((copy / "probes").glob("*.png"))) == 2


def test_quiet_leaves_standard_error_empty_in_a_fresh_process(copy: Path):
    state = read_json(copy / "run.json")
    del state["stages"]["lm"]
    write_json(copy / "run.json", state)
    ran = subprocess.run(
        [sys.executable, "-m", "probekit", "train", "--resume", "--out", str(copy), "--quiet"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stderr == ""


# Runs with something missing


@pytest.mark.parametrize("stage", ["corpus", "lm", "planner"])
def test_a_run_that_lacks_a_stage_names_it_and_the_command(capsys: Capture, copy: Path, stage: str):
    state = read_json(copy / "run.json")
    del state["stages"][stage]
    write_json(copy / "run.json", state)
    # Probes need no planner: without one they are compared with what needs none.
    for command in ("evaluate", "probe") if stage != "planner" else ("evaluate",):
        line = refused(capsys, command, copy, "--quiet")
        assert f"lacks the stage {stage!r}" in line
        assert f"`probekit train --resume --out {copy}`" in line


def test_a_variant_that_is_not_trained_is_not_probed(capsys: Capture, copy: Path):
    line = refused(capsys, "probe", copy, "--probe.variants", "gumbel", "--quiet")
    assert (
        "'gumbel', which this run has not trained; it has none, random, fixed, oracle, predicted, soft, joint"
        in line
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "--evaluation.window", "49"], "evaluation.window is 49"),
        (["evaluate", "--evaluation.stride", "49"], "evaluation.stride is 49"),
        (["probe", "--probe.layers", "3"], "probe.layers has 3"),
        (["probe", "--probe.locations", "attn.hook_zz"], "probe.locations is 'attn.hook_zz'"),
        (["evaluate", "--device", "abacus"], "device is 'abacus'"),
    ],
)
def test_settings_that_do_not_fit_the_run_are_refused(
    words: list[str], said: str, capsys: Capture, tiny_run: Run
):
    command, *options = words
    assert said in refused(capsys, command, tiny_run.folder, *options, "--quiet")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("command", ["evaluate", "probe"])
def test_a_gpu_that_is_not_there_is_refused(command: str, capsys: Capture, tiny_run: Run):
    assert "device is 'cuda'" in refused(capsys, command, tiny_run.folder, "--device", "cuda")


# Damage

READ = [
    "run.json",
    "config.yaml",
    *(f"corpus/{name}.npy" for name in ("tokens", "document_tokens", "document_sentences", "first_token")),
    *(f"corpus/{name}.npy" for name in ("spans", "split", "embeddings", "actions")),
    "corpus/codebook.safetensors",
    "corpus/facts.json",
    "corpus/documents.arrow",
    "corpus/tokenizer/tokenizer.json",
    "corpus/tokenizer/tokenizer_config.json",
    "lm/config.json",
    "lm/model.safetensors",
    "planner/model.safetensors",
    "adapters/fixed.safetensors",
    "adapters/joint.safetensors",
]  # fmt: skip
"""Every file that an evaluation reads."""


def names(line: str, file: str) -> bool:
    """Whether a line names a file; of what transformers reads, the folder."""
    folder = str(Path(file).parent)
    return file in line or (folder in ("corpus/tokenizer", "lm") and f"/{folder}'" in line)


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (damage, file)
        for damage in ("half", "empty", "missing", "noise")
        for file in READ
        if (damage, file) != ("missing", "corpus/tokenizer/tokenizer_config.json")  # it can be done without
    ],
)
def test_a_damaged_file_is_named_in_one_line(capsys: Capture, copy: Path, file: str, damage: str):
    path = copy / file
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        noise = bytes(range(128, 256)) * 4
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "noise": noise}[damage])
    line = refused(capsys, "evaluate", copy, "--quiet", "--evaluation.resamples", "100")
    assert names(line, file) or (damage == "missing" and file == "run.json"), line


# Report


def test_report_writes_both_files(copy: Path, capsys: Capture):
    printed = told(capsys, "report", copy)
    assert printed == f"The report: {copy / 'report.html'}\nThe report: {copy / 'report.md'}\n"
    assert (copy / "report.html").is_file()
    assert (copy / "report.md").is_file()


def test_report_writes_what_is_asked_for(copy: Path, tmp_path: Path, capsys: Capture):
    file = tmp_path / "mine.html"
    assert told(capsys, "report", copy, "-o", file) == f"The report: {file}\n"
    assert not (copy / "report.html").exists()


def test_report_refuses_bad_input(copy: Path, tmp_path: Path, capsys: Capture):
    assert "must end in .html or .md" in refused(capsys, "report", copy, "-o", tmp_path / "x.pdf")
    assert "holds no run" in refused(capsys, "report", tmp_path)
