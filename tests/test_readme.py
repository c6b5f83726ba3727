"""Commands and code of the README and the guides are run as they stand, on less data."""

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest

import probekit
from probekit.cli import main
from probekit.config import Config
from probekit.errors import ProbekitError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
GUIDES = [(ROOT / "docs" / "guides" / f"{name}.md").read_text("utf-8") for name in (
    "train", "generate", "probe", "python", "causal-tests", "continuation", "sweep", "depth-ensemble",
    "lens-and-report", "ask",
)]  # fmt: skip
COMMANDS = list(
    dict.fromkeys(
        line.split("  #")[0].strip()
        for page in (README, *GUIDES)
        for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("probekit ")
    )
)
LESS = (
    "--device cpu --actions.k 8 --actions.dimensions 16 --lm.layers 3 --lm.width 16 --lm.heads 2 "
    "--lm.vocabulary 560 --lm.positions 48 --planner.width 16 --training.window 48 --training.lm.epochs 1 "
    "--training.planner.epochs 1 --training.adapter.epochs 1 --mixing.variants fixed soft "
    "--evaluation.resamples 100"
)
FEW = (
    "--probe.layers 0 2 --probe.l2 0.01 0.1 --probe.max_iterations 30 --evaluation.resamples 100 "
    "--probe.control false --probe.code_length false"
)
LESS_CHANGED = (
    "--intervene.layers 2 --intervene.distances 1 --intervene.boundaries 6 --intervene.strengths 1 "
    "--intervene.samples 2 --evaluation.resamples 100"
)
LESS_REMOVED = "--subnetwork.steps 2 --subnetwork.documents 4 --evaluation.resamples 100"
LITTLE = "--generation.prompts 4 --generation.samples 4 --generation.lengths 6 12 --evaluation.resamples 100"
SMALLER = {
    "probe": FEW,
    "continuation": "--continuation.boundaries 6 --continuation.tokens 4 --evaluation.resamples 100",
    "intervene": LESS_CHANGED,
    "subnetwork": LESS_REMOVED,
    "generate": "--tokens 12",
    "sweep": "--seeds 1",
}
"""What is added to commands, so that they take little."""
LOCAL = (
    "--lm.name {lm} --corpus.reader jsonl --corpus.path passages.jsonl --corpus.validation_fraction 0.1 "
    "--corpus.test_fraction 0.1 --actions.encoder tfidf --actions.dimensions 8 "
    "--evaluation.window 48 --evaluation.stride 24"
)
"""In place of an LM, an encoder and a dataset of the hub."""
PLANTED = "--corpus.planted.documents 80 --corpus.planted.actions 8"


def articles(count: int) -> str:
    """Made-up articles in WikiText format."""
    rng = random.Random(0)
    words = ["the", "a", "red", "blue", "river", "town", "grew", "fell", "was", "of", "near", "old", "king"]

    def sentence() -> str:
        return " ".join(rng.choices(words, k=8)).capitalize() + " . "

    def body() -> str:
        return "".join(sentence() for _ in range(10))

    return "".join(f" = Article {n} = \n \n {body()}\n = = More = = \n {body()}\n" for n in range(count))


@pytest.fixture(scope="module")
def folder(probed_run: probekit.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with what the README's commands read."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(probed_run.folder, folder / "runs" / "demo")
    (folder / "articles.txt").write_text(articles(40), encoding="utf-8")
    (folder / "mine.yaml").write_text("planner: {layers: 1}\n", encoding="utf-8")
    passages = [
        {"text": text.split(" \n \n ")[1], "work": f"{n}"}
        for n, text in enumerate(articles(40).split(" = Article ")[1:])
    ]
    (folder / "passages.jsonl").write_text("\n".join(map(json.dumps, passages)), encoding="utf-8")
    statements = [(topic, word, n) for topic in range(12) for word in "ab" for n in range(8)]
    rows = [f"{topic} is {word} thing {n},{word == 'a'},{topic}" for topic, word, n in statements]
    (folder / "truth.csv").write_text("\n".join(["statement,is_true,topic", *rows]), encoding="utf-8")
    new = [{"text": text, "statement": text} for text in ("a plan", "of a king")]
    row = {"context": "The king", "choices": ["grew", "fell"], "answer": 1}
    (folder / "items.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (folder / "items.csv").write_text("choice0,choice1\nThe king,A town\n", encoding="utf-8")
    (folder / "new.jsonl").write_text("\n".join(map(json.dumps, new)), encoding="utf-8")
    return folder


def test_the_readme_has_the_commands_that_are_tested():
    commands = {command.split()[1] for command in COMMANDS}
    assert commands == {
        "--help",
        "train",
        "evaluate",
        "generate",
        "ask",
        "probe",
        "score",
        "lens",
        "report",
        "corpus",
        "sweep",
        "continuation",
        "intervene",
        "subnetwork",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_readme(
    command: str, folder: Path, tiny_run: probekit.Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder)
    words = shlex.split(command)[1:]
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            main(words)
    elif "runs/gpt2" in words or "cuda" in words:
        # No such model or machine here: all but the loading is checked.
        assert_settings_are_understood(words, folder)
    else:
        if words[0] in ("train", "sweep") and "--resume" not in words:
            words += shlex.split(f"{LESS} {PLANTED if 'demo' in words else ''}")
        if any(word.startswith("smollm2-") for word in words):
            given = shlex.split(LOCAL.format(lm=tiny_run.folder / "lm"))
            words = [
                word
                for at, word in enumerate(words)
                if not {word, words[at - 1]} & {"--lm.name", "--corpus.path"}
            ]
            words += given
        if "--training.lm.checkpoints" in words:
            words[words.index("--training.lm.checkpoints") + 1] = "2"
        words += shlex.split(SMALLER.get(words[0], ""))
        if "--generation" in words:
            words += shlex.split(LITTLE)
        if words[0] == "ask":
            words[1] = str(tiny_run.folder / "lm")
        if "--model" in words:
            words[words.index("--model") + 1] = str(tiny_run.folder / "lm")
            words += shlex.split("--actions.k 8 --actions.dimensions 16 --training.window 48")
        assert main([*words, "--quiet"] if words[0] not in ("corpus", "report") else words) == 0


def assert_settings_are_understood(words: list[str], folder: Path) -> None:
    """The command fails for want of a GPU or of the run, not for what it asks."""
    with pytest.raises(ProbekitError, match=r"device is 'cuda'|runs/gpt2 does not exist"):
        main([*words, "--debug"])


def test_python_of_the_readme(folder: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    scope: dict[str, object] = {}
    (brief,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = "\n".join(re.findall(r"```python\n(.*?)```", GUIDES[0], re.DOTALL))
    monkeypatch.setattr(Config, "from_preset", lambda name: tiny_config)
    probekit.probe("runs/demo", {"probe.layers": [0, 2], "probe.code_length": False}, quiet=True)
    few = {"generation.prompts": 4, "generation.lengths": [6, 12], "generation.samples": 4}
    measure = probekit.evaluate_generation
    monkeypatch.setattr(probekit, "evaluate_generation", lambda run, given: measure(run, given | few))
    exec(brief, {})  # noqa: S102 - our own README
    exec(code.replace('"runs/seed1"', '"runs/seed2"'), scope)  # noqa: S102 - our own guide
    assert (folder / "runs" / "seed1" / "probes" / "results.parquet").exists()


def test_python_of_the_guide_to_arrays(
    tiny_run: probekit.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "guides" / "python.md").read_text("utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    texts = [f"{'red' if number % 2 else 'blue'} river number {number}" for number in range(120)]
    scope = {
        "texts": texts,
        "labels": ["odd", "even"] * 60,
        "authors": [number // 3 for number in range(120)],
    }
    scope |= {"model": tiny_run.plain_model(), "tokenizer": tiny_run.corpus.tokenizer}
    exec(code, scope)  # noqa: S102 - our own guide
    assert "even" in capsys.readouterr().out
    assert (tmp_path / "genre.safetensors").exists()


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"\bmake ([a-z]+)\b", README)) - {"sure", "it"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_the_readme_names_exist():
    named = re.findall(r"`((?:probekit|analyses|figures|benchmarks)/[\w./]*)`", README)
    linked = re.findall(r"\]\(((?:figures/)?\w+\.\w+)\)", README)
    assert linked
    for path in named + linked:
        assert (ROOT / path).exists(), path
