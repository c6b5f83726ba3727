"""Published checkpoints of an LM give what the checkpoints of a run's own training give."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from random_lms import save_random_llama
from running import Capture, printed, refused

from probekit.cli import main
from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.models.revisions import name_of, published
from probekit.probing import over_training
from probekit.probing.over_training import probe_checkpoints
from probekit.probing.probe import ProbeResults, probe
from probekit.reports.report import report
from probekit.run.run import Run
from probekit.training.train import prepare, train

FAST = {
    "probe.layers": [0, 2],
    "probe.positions": [1, 2],
    "probe.l2": [0.1],
    "probe.solvers": ["ridge"],
    "probe.window": 48,
    "probe.code_length": False,
    "probe.control": False,
    "evaluation.resamples": 100,
}


@pytest.fixture(scope="module")
def own(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that keeps checkpoints, which are probed."""
    kept = tiny_config.override({"training.lm.checkpoints": 3, "mixing.variants": ["fixed"]} | FAST)
    run = train(kept, tmp_path_factory.mktemp("own") / "run", quiet=True)
    probe_checkpoints(run, quiet=True)
    return run


@pytest.fixture(scope="module")
def folders(own: Run, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The LMs of its checkpoints, as Hugging Face saves them."""
    there = tmp_path_factory.mktemp("published")
    return [
        shutil.copytree(path / "lm", there / f"step-{step}") for step, path in own.checkpoints("lm").items()
    ]


def words_of(own: Run, folders: list[Path], out: Path) -> list[str | Path]:
    """The command that probes them as published checkpoints of the last."""
    config = own.folder / "config.yaml"
    return ["probe", "--model", folders[-1], "--config", config, "--out", out, "--revisions", *folders]


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """The checkpoints that were probed for `run`, in their order."""
    return []


@pytest.fixture(scope="module")
def run(own: Run, folders: list[Path], asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run to which the first of them is added when the others were probed."""
    out = tmp_path_factory.mktemp("revisions") / "run"

    def noted(checkpoint: Run, **_: object) -> ProbeResults:
        asked.append(checkpoint.folder.name)
        return probe(checkpoint, quiet=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(over_training, "probe", noted)
        for some in (folders[1:], folders):
            assert main([*map(str, words_of(own, some, out)), "--quiet"]) == 0
    return Run.open(out)


def test_folders_give_the_tables_of_the_runs_own_checkpoints(own: Run, run: Run):
    pd.testing.assert_frame_equal(run.probes_over_training("lm"), own.probes_over_training("lm"))
    assert len(set(own.probes_over_training("lm").query("reader == 'probe'").accuracy)) > 3
    assert (run.folder / "checkpoints" / "lm" / "probes.png").stat().st_size > 10_000


def test_the_corpus_is_built_once(run: Run):
    for path in run.checkpoints("lm").values():
        assert Run.open(path).stages["corpus"]["taken_from"] == "../../.."
        tokens = path / "corpus" / "tokens.npy"
        assert tokens.stat().st_ino == (run.folder / "corpus" / "tokens.npy").stat().st_ino


def test_another_tokenizer_has_a_corpus_of_its_own(own: Run, folders: list[Path], tmp_path: Path):
    other = save_random_llama(tmp_path / "step-99", ["some other words"], positions=64)
    config = own.config.override({"lm.name": str(folders[0])})
    run = prepare(config, tmp_path / "run", revisions=[str(folders[0]), str(other)], quiet=True)
    shared, built = (Run.open(path) for path in run.checkpoints("lm").values())
    assert "taken_from" in shared.stages["corpus"]
    assert "taken_from" not in built.stages["corpus"]
    assert built.corpus.tokenizer.vocab_size == built.plain_model().config.vocab_size
    assert len(built.corpus.split) == len(run.corpus.split)
    assert (built.corpus.split == run.corpus.split).all()
    assert len(built.corpus.tokens) > len(run.corpus.tokens)


def test_what_is_probed_is_not_probed_again(own: Run, run: Run, asked: list[str]):
    first, *others = run.checkpoints("lm")
    assert asked == [f"step{step:07d}" for step in (*others, first)]


def test_settings_of_today_count(run: Run, folders: list[Path], tmp_path: Path):
    there = shutil.copytree(run.folder, tmp_path / "run")
    words = ["probe", "--model", folders[-1], "--out", there, "--revisions", folders[0], "--quiet"]
    assert main([*map(str, words), "--probe.positions", "1"]) == 0
    assert set(Run.open(there).probes_over_training().position.dropna()) == {"1"}


def test_one_that_does_not_exist_is_refused_before_anything_is_built(
    capsys: Capture, own: Run, folders: list[Path], tmp_path: Path
):
    out = tmp_path / "run"
    gone = folders[0].with_name("step-7000")
    line = refused(capsys, *words_of(own, [gone, *folders], out), "--quiet")
    assert f"--revisions has '{gone}': no such folder" in line
    empty = tmp_path / "step5"
    empty.mkdir()
    line = refused(capsys, *words_of(own, [empty, *folders], out), "--quiet")
    assert "step5" in line
    assert "it lacks config.json" in line
    name = "someone/some-lm"
    line = refused(
        capsys, "probe", "--model", name, "--corpus", "x.txt", "--out", out, "--revisions", "step3"
    )
    assert f"lm.name is '{name}' at revision 'step3'" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["step1000", "step0", "main=143000"], [0, 1000, 143000]),
        (["stage1-step500-tokens3B", "ckpt_020", "step600=7"], [7, 20, 500]),
    ],
)
def test_steps_are_in_names_or_beside_them(
    names: list[str], steps: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("probekit.models.revisions.load_config", lambda *_, **__: None)
    config = Config.from_preset("any-model").override({"lm.name": "someone/some-lm"})
    found = published(config, names)
    assert [*found] == steps
    assert sorted(name_of(own, step) for step, own in found.items()) == sorted(names)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["main"], "'main', whose name does not say .* main=STEP"),
        (["v1.2"], "'v1.2', whose name does not say"),
        (["step1", "step1=2", "checkpoint-1"], "'step1' and 'checkpoint-1', both of step 1"),
    ],
)
def test_steps_that_are_not_known(names: list[str], said: str):
    config = Config.from_preset("any-model").override({"lm.name": "someone/some-lm"})
    with pytest.raises(ProbekitError, match=said):
        published(config, names)


def test_a_step_that_is_another_ones(own: Run, run: Run, folders: list[Path]):
    config = Run.open(run.folder).config
    with pytest.raises(ProbekitError, match=r"step0000000 is '.*step-0', not '.*step-1=0'"):
        prepare(config, run.folder, revisions=[f"{folders[1]}=0"], existing="resume", quiet=True)


def test_the_report_shows_them_and_how_to_repeat_it(run: Run, folders: list[Path], tmp_path: Path):
    (page,) = report(run, tmp_path / "report.md")
    text = page.read_text("utf-8")
    assert "Over training: lm" in text
    assert re.search(rf"--revisions {re.escape(str(folders[0]))} ", text)
    assert "probekit train" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN", "--revisions", "step1"], "--revisions: goes with --model"),
        (["--model", "x", "--revisions", "step1", "--store"], "--store: does not go with --revisions"),
    ],
)
def test_what_does_not_go_together(capsys: Capture, words: list[str], said: str):
    assert said in refused(capsys, "probe", *words)


def test_the_help_says_so(capsys: Capture):
    assert "--revisions NAME" in printed(capsys, "probe", "--help")
