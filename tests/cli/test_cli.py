"""The commands as they are typed: exit codes, what they print, and one line for whatever is wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from running import Capture, printed, refused

from probekit import cli
from probekit.cli import COMMANDS, main
from probekit.config import preset_names, setting_names
from probekit.errors import ProbekitError
from probekit.io import atomic_path, read_json, write_json
from probekit.run.run import Run

# Help


def test_help_lists_commands_and_presets(capsys: Capture):
    text = printed(capsys, "--help")
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.__doc__)}$", text, re.MULTILINE)
    assert f"presets: {', '.join(preset_names())}" in text


def test_version(capsys: Capture):
    assert printed(capsys, "--version") == f"probekit {version('probekit-lm')}\n"


@pytest.mark.parametrize(
    ("command", "sections"),
    [
        ("train", None),
        ("evaluate", ("method", "device", "evaluation.", "generation.")),
        ("probe", ("device", "evaluation.", "probe.", "lm.device_map", "lm.dtype", "corpus.encoding")),
        ("report", ()),
    ],
)
def test_help_of_a_command_has_all_its_settings_with_defaults(
    command: str, sections: tuple[str, ...] | None, capsys: Capture
):
    text = printed(capsys, command, "--help")
    wanted = {name for name in setting_names() if sections is None or name.startswith(tuple(sections))}
    options = set(re.findall(r"^  --([\w.]+)", text, re.MULTILINE))
    assert options & set(setting_names()) == wanted
    assert len(re.findall(r"\(default:", text)) == len(wanted)


def test_help_needs_no_pytorch():
    command = [sys.executable, "-X", "importtime", "-m", "probekit", "probe", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("usage: probekit")
    modules = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "probekit.cli.options" in modules
    assert not modules & {"torch", "transformers", "numpy", "pandas", "transformer_lens"}


# Bad command lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: COMMAND; see `probekit --help`"),
        (["trian"], "invalid choice: 'trian' (choose from 'train', "),
        (["train", "--preset", "dmo", "--help"], "unknown preset 'dmo'; did you mean 'demo'?"),
        (["train", "--preset"], "argument --preset: expected one argument; see `probekit train --help`"),
        (["train"], "runs/run holds no run to resume; give --preset or --config to begin one"),
        (["train", "--resume", "--overwrite"], "not allowed with argument"),
        (["evaluate"], "the following arguments are required: RUN; see `probekit evaluate --help`"),
        (["evaluate", "run", "--generation.samples", "9"], "argument --generation.samples: goes with"),
        (
            ["evaluate", "run", "--evaluation.batch_size", "4", "--generation.top_k", "5"],
            "argument --generation.top_k: goes with",
        ),
        (["probe"], "give a run's folder, or --model with --corpus or --labels; see `probekit probe --help`"),
        (["probe", "run", "--model", "gpt2"], "give a run's folder, or --model with --corpus"),
        (["probe", "run", "--overwrite"], "argument --overwrite: goes with --model"),
        (["probe", "run", "--lm.layers", "2"], "unknown setting 'lm.layers'; did you mean 'probe.layers'?"),
        (["corpus", "nowhere"], "/nowhere does not exist; make one with `probekit train --out /"),
        (["corpus", "nowhere", "--nearest", "-1"], "argument --nearest: -1 is below 0"),
        (["evaluate", "x" * 300], "File name too long"),
        (["sweep"], "the sweep has no settings to change; give --preset or --config"),
        (["sweep", "mixing-fraction", "--preset", "demo", "--seeds", "0"], "the sweep has no seeds"),
    ],
)
def test_bad_command_lines_are_refused_in_one_line(
    words: list[str], said: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ProbekitError, KeyboardInterrupt, TypeError])
def test_debug_shows_the_traceback(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    def fails(words: list[str]) -> None:
        raise error("in one line")

    monkeypatch.setitem(cli.COMMANDS, "train", fails)
    with pytest.raises(error):
        main(["train", "--debug"])
    if error is TypeError:  # a bug is not hidden
        with pytest.raises(error):
            main(["train"])
        return
    assert main(["train"]) == {ProbekitError: 2, KeyboardInterrupt: 130}[error]
    assert capsys.readouterr().err.startswith("probekit: ")


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
    assert capsys.readouterr().err == "probekit: terminated; the same command continues\n"
    assert not [*tmp_path.iterdir()]
    assert signal.getsignal(signal.SIGTERM) is before


# Runs with something missing


@pytest.mark.parametrize("stage", ["corpus", "lm"])
def test_a_run_that_lacks_a_stage_names_it_and_the_command(capsys: Capture, copy: Path, stage: str):
    state = read_json(copy / "run.json")
    del state["stages"][stage]
    write_json(copy / "run.json", state)
    for command in ("evaluate", "probe"):
        line = refused(capsys, command, copy, "--quiet")
        assert f"lacks the stage {stage!r}" in line
        assert f"`probekit train --resume --out {copy}`" in line


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
    [*(("half", file) for file in READ), *(("missing", file) for file in (READ[0], READ[2], READ[-1]))],
)
def test_a_damaged_file_is_named_in_one_line(capsys: Capture, copy: Path, file: str, damage: str):
    path = copy / file
    whole = path.read_bytes()
    path.unlink()
    if damage == "half":
        path.write_bytes(whole[: len(whole) // 2])
    line = refused(capsys, "evaluate", copy, "--quiet", "--evaluation.resamples", "100")
    assert names(line, file) or (damage == "missing" and file == "run.json"), line
