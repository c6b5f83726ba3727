"""A run's folder: begun once, resumed only as it was, whole or refused, and free to move."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from small_trainings import flat
from transformers import AutoModelForCausalLM, LlamaConfig

from probekit import load_run
from probekit.config import Config, setting_value
from probekit.data.windows import collate, cut_windows
from probekit.errors import ProbekitError
from probekit.io import read_json, read_tensors, write_json
from probekit.models.backends import Backend, BridgeBackend, HFBackend
from probekit.models.language_model import random_weights
from probekit.models.mixing import Fixed
from probekit.run.folder import FIRST_FILES, FORMAT, Existing
from probekit.run.run import Run
from probekit.training.train import prepare, train

TINY = Config().override({"device": "cpu", "corpus.reader": "planted"})


@pytest.fixture
def begun(tmp_path: Path) -> Run:
    """A run that has finished no stage."""
    return Run.begin(tmp_path / "run", TINY)


@pytest.fixture
def copy(tiny_run: Run, tmp_path: Path) -> Run:
    """A copy of the trained run that a test may change."""
    return Run.open(shutil.copytree(tiny_run.folder, tmp_path / "copy"))


def refusal(folder: Path, config: Config | None, existing: Existing = "refuse") -> str:
    before = contents(folder)
    with pytest.raises(ProbekitError) as caught:
        Run.begin(folder, config, existing)
    assert contents(folder) == before, "a refusal changed the folder"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# Beginning


@pytest.mark.parametrize("existing", ["refuse", "resume", "overwrite"])
@pytest.mark.parametrize("where", [".", "deep/er/run"])
def test_a_new_run_holds_its_settings_and_no_stage(tmp_path: Path, where: str, existing: Existing):
    run = Run.begin(tmp_path / where, TINY, existing)
    assert Run.open(run.folder).config == TINY
    assert read_json(run.folder / "run.json") == {"format": FORMAT, "stages": {}}
    assert run.variants == []
    assert not run.finished("corpus")


def test_a_run_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As Python and `--out=~/run`, which no shell expands, give it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = Run.begin("~/run", TINY)
    assert run.folder == tmp_path / "run"
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert load_run("~/run").config == load_run(Path("~/run")).config == TINY
    with Run.begin_locked("~/run", None, "resume") as again:
        assert again.folder == run.folder


def test_relative_paths_hold_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").touch()
    texts = TINY.override({"corpus.reader": "auto", "corpus.path": "texts.txt"})
    run = Run.begin("run", texts)
    monkeypatch.chdir("/")
    assert run.stages == {}
    assert Run.open(tmp_path / "run").config.corpus.path == str(tmp_path / "texts.txt")
    monkeypatch.chdir(tmp_path)
    run.mark_finished("corpus", {})
    assert Run.begin("run", texts, "resume").finished("corpus")  # the same file, given as before


def test_provenance_has_versions_device_and_command(tmp_path: Path):
    Run.begin(tmp_path, TINY)
    changed = TINY.override({"seed": 3, "corpus.seed": 4, "corpus.planted.seed": 5})
    Run.begin(tmp_path, changed, "resume")  # no stage is finished: everything may change
    found = read_json(tmp_path / "provenance.json")
    for package in ("probekit-lm", "torch", "transformers", "transformer-lens", "numpy"):
        assert found["versions"][package] == version(package)
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "seeds" not in found, "the settings have them"
    assert found["device"] == "cpu"
    assert found["command"] == sys.argv
    assert found["begun"].endswith("+00:00")
    if (Path(__file__).parents[2] / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", found["git_commit"])


@pytest.mark.parametrize("existing", ["refuse", "resume", "overwrite"])
@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml", "run.json"])
def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, existing: Existing, name: str):
    (tmp_path / name).write_text("{}")
    assert "exists and holds no run" in refusal(tmp_path, TINY, existing)
    assert "exists and holds no run" in refusal(tmp_path / name, TINY, existing)
    with pytest.raises(ProbekitError, match="cannot be made"):
        Run.begin(tmp_path / name / "run", TINY, existing)
    assert (tmp_path / name).read_text() == "{}"


@pytest.mark.parametrize("config", [TINY, None])
def test_an_existing_run_is_refused_by_default(begun: Run, config: Config | None):
    other = TINY.override({"seed": 9})
    assert Run.begin(begun.folder, other).config == other, "nothing was done in it yet"
    begun.log({"stage": "lm", "loss": 1.0})
    line = refusal(begun.folder, config)
    assert "--resume" in line
    assert "--overwrite" in line


@pytest.mark.parametrize("existing", ["refuse", "resume", "overwrite"])
def test_without_settings_nothing_is_begun(begun: Run, tmp_path: Path, existing: Existing):
    assert "give --preset or --config" in refusal(tmp_path / "new", None, existing)
    assert not (tmp_path / "new").exists()
    if existing != "resume":
        assert "give --preset or --config" in refusal(begun.folder, None, existing)


def test_two_processes_do_not_train_into_one_folder(copy: Run, tmp_path: Path):
    before = contents(copy.folder)
    held_elsewhere = (
        "import sys, time; from probekit.io import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", held_elsewhere, copy.folder], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            for existing in ("resume", "overwrite"):
                with pytest.raises(ProbekitError, match=f"another process is at work in {copy.folder}"):
                    train(copy.config, copy.folder, existing=existing, quiet=True)
            assert contents(copy.folder) == before
        finally:
            other.kill()
    train(copy.config, copy.folder, existing="resume", quiet=True)
    assert contents(copy.folder) == before, "nothing is left of one that was killed"


def test_a_stage_clears_what_killed_ones_left_of_its_own(begun: Run):
    for path in ("planner", "adapters", "mine"):
        (begun.folder / path).mkdir()
    mine = ["adapters/.tmp-0123456789ab-soft.safetensors", ".tmp-0123456789ab-run.json"]
    others = [
        "adapters/.tmp-0123456789ab-joint.safetensors",
        "planner/.tmp-0123456789ab-model.safetensors",
        "adapters/.tmp-notes-soft.safetensors",
        "mine/.tmp-0123456789ab-soft.safetensors",
        ".tmp-0123456789ab-evaluation.json",
        "adapters/soft.safetensors",
    ]
    for path in [*mine, *others]:
        (begun.folder / path).write_text("half")
    (begun.folder / "adapters" / ".tmp-0123456789ab-soft").mkdir()
    begun.begin_stage("adapter/soft")
    assert contents(begun.folder).keys() == {*FIRST_FILES, *others}
    assert not (begun.folder / "adapters" / ".tmp-0123456789ab-soft").exists()


def test_stages_record_the_precision_that_auto_came_to_and_go_on_with_no_other(copy: Run):
    path = copy.folder / "run.json"
    state = read_json(path)
    assert {name for name, facts in state["stages"].items() if "precision" in facts} == {
        stage for stage in state["stages"] if stage != "corpus"
    }
    assert state["stages"]["lm"]["precision"] == "float32"
    explicit = copy.config.override({"training.precision": "float32"})
    assert Run.begin(copy.folder, explicit, "resume").config == explicit, "the same arithmetic"
    for facts in state["stages"].values():
        facts.update({"precision": "bfloat16"} if "precision" in facts else {})
    write_json(path, state)
    line = "training.precision was 'bfloat16' and is now 'float32'"
    assert line in refusal(copy.folder, None, "resume")
    assert line in refusal(copy.folder, copy.config, "resume")


def test_a_sweep_opened_as_a_run_names_its_runs(tmp_path: Path):
    (tmp_path / "sweep.json").write_text("{}")
    for seed in range(5):
        Run.begin(tmp_path / "a" / f"seed{seed}", TINY)
    with pytest.raises(ProbekitError, match=f"its runs are {tmp_path}/a/seed0, .*seed1, .*seed2, …"):
        Run.open(tmp_path)


# Overwriting


def test_overwriting_begins_anew(copy: Run):
    run = Run.begin(copy.folder, TINY, "overwrite")
    assert sorted(contents(run.folder)) == ["config.yaml", "provenance.json", "run.json"]
    assert Run.open(run.folder).config == TINY
    assert not run.finished("corpus")


# Resuming


def test_resuming_keeps_settings_and_stages(copy: Run):
    before = contents(copy.folder)
    for config in (None, copy.config):
        run = Run.begin(copy.folder, config, "resume")
        assert run.config == copy.config
        assert run.variants == list(copy.config.mixing.variants)
    assert contents(copy.folder) == before


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lm.layers", 5, "lm.layers was 3 and is now 5"),
        ("seed", 1, "seed was 0 and is now 1"),
        ("corpus.planted.seed", 2, "corpus.planted.seed was 1 and is now 2"),
        ("training.adapter.epochs", 3, "training.adapter.epochs was 1.0 and is now 3.0"),
        ("corpus.path", "x.txt", "corpus.path was None and is now 'x.txt'"),
    ],
)
def test_changed_settings_are_refused_by_name(tiny_run: Run, name: str, value: object, said: str):
    changed = tiny_run.config.override({name: value})
    assert said in refusal(tiny_run.folder, changed, "resume")


def test_settings_that_no_stage_depends_on_may_change_and_are_kept(copy: Run):
    changed = copy.config.override({"device": "auto", "evaluation.stride": 7, "probe.positions": [3]})
    run = Run.begin(copy.folder, changed, "resume")
    assert run.config == changed
    assert Run.open(copy.folder).config == changed
    assert run.finished("adapter/joint")


# Opening


def test_what_is_no_run_cannot_be_opened(begun: Run, tmp_path: Path):
    def refuses(folder: Path, said: str) -> None:
        with pytest.raises(ProbekitError, match=said):
            Run.open(folder)

    refuses(tmp_path / "no", f"no does not exist.*probekit train --out {tmp_path}/no")
    refuses(tmp_path, "holds no run")
    refuses(begun.folder / "run.json", "holds no run")
    (begun.folder / "config.yaml").unlink()
    refuses(begun.folder, r"config\.yaml: No such file")
    write_json(begun.folder / "run.json", {"format": FORMAT + 1, "stages": {}})
    refuses(begun.folder, f"run format {FORMAT + 1}, this probekit reads format {FORMAT}")


# Stages and metrics


def test_a_missing_stage_is_named_with_the_command_that_adds_it(begun: Run):
    for missing in (
        lambda: begun.require("planner"),
        lambda: begun.corpus,
        lambda: begun.frozen_lm().bridged,
    ):
        with pytest.raises(ProbekitError, match=r"lacks the stage .*train --resume --out .*run"):
            missing()
    begun.mark_finished("planner", {"seconds": 1.0})
    begun.require("planner")
    assert read_json(begun.folder / "run.json")["stages"] == {"planner": {"seconds": 1.0}}


def test_results_that_are_not_there_are_reported_with_their_command(begun: Run):
    for read, command in (
        (begun.metrics, "train it first"),
        (begun.evaluation, "probekit evaluate"),
        (begun.generation_metrics, "probekit evaluate .* --generation"),
        (begun.probes, "probekit probe"),
    ):
        with pytest.raises(ProbekitError, match=command):
            read()


def test_metrics_come_back_as_they_were_logged(begun: Run):
    rows = [
        {"stage": "lm", "step": 1, "loss": 0.1 + 0.2},
        {"stage": "lm", "step": 2, "validation_loss": 1e-9},
    ]
    for row in rows:
        begun.log(row)
    metrics = begun.metrics()
    assert metrics.loss[0] == 0.1 + 0.2
    assert metrics.validation_loss[1] == 1e-9
    assert np.isnan(metrics.loss[1])
    assert [json.loads(line) for line in (begun.folder / "metrics.jsonl").open()] == rows


def test_only_the_stage_that_is_begun_again_is_forgotten(begun: Run):
    begun.begin_stage("lm")  # nothing there yet
    for stage in ("lm", "planner", "adapter/soft", "lm"):
        begun.log({"stage": stage, "step": 1, "loss": 0.1})
    begun.begin_stage("lm")
    begun.begin_stage("adapter")
    assert list(begun.metrics().stage) == ["planner", "adapter/soft"]


def test_a_row_that_an_interruption_cut_off_is_dropped(begun: Run):
    begun.log({"stage": "lm", "step": 1, "loss": 1.5})
    path = begun.folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "plan')
    assert list(begun.metrics().stage) == ["lm"]
    begun.begin_stage("planner")
    begun.log({"stage": "planner", "step": 1, "loss": 2.5})
    assert list(begun.metrics().stage) == ["lm", "planner"]


def test_damaged_results_are_named(begun: Run):
    (begun.folder / "metrics.jsonl").write_bytes(b"\xff\xff\n{}\n")
    for read in (begun.metrics, lambda: begun.begin_stage("lm")):
        with pytest.raises(ProbekitError, match=r"metrics\.jsonl is damaged"):
            read()
    (begun.folder / "probes").mkdir()
    (begun.folder / "probes" / "results.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ProbekitError, match=r"results\.parquet is no whole Parquet table"):
        begun.probes()


def test_metrics_of_a_training_have_every_stage_with_losses_and_validation(tiny_run: Run):
    metrics = tiny_run.metrics()
    stages = ["lm", "planner", *(f"adapter/{v}" for v in tiny_run.config.mixing.variants)]
    assert list(metrics.stage.unique()) == stages
    for _, rows in metrics.groupby("stage"):
        losses, validations = rows[rows.loss.notna()], rows[rows.validation_loss.notna()]
        assert losses.step.is_monotonic_increasing
        assert losses.step.max() == validations.step.max()
        assert list(validations.epoch) == list(range(1, len(validations) + 1))
        assert np.isfinite(losses.loss).all()


# What is in the folder


def test_files_of_a_run_are_no_pickles_nothing_temporary_and_readable_by_all(tiny_run: Run):
    files = [path for path in tiny_run.folder.rglob("*") if path.is_file()]
    assert not [path for path in tiny_run.folder.rglob("*") if path.name.startswith(".")]
    assert len({path.stat().st_mode for path in files}) == 1
    for path in files:
        start = path.read_bytes()[:2]
        assert start not in {b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6))}, path
        assert path.suffix in {".npy", ".safetensors", ".json", ".jsonl", ".yaml", ".arrow"}, path
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)


def test_the_lm_loads_in_plain_transformers_with_the_same_weights(tiny_run: Run):
    plain = AutoModelForCausalLM.from_pretrained(tiny_run.folder / "lm")
    tokens = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        expected = plain(tokens).logits
        torch.testing.assert_close(tiny_run.frozen_lm().bridged(tokens, return_type="logits"), expected)
    stored = read_tensors(tiny_run.folder / "lm" / "model.safetensors")
    state = plain.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_a_run_may_be_moved(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there = shutil.copytree(tiny_run.folder, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for folder in ("elsewhere", there):
        moved = Run.open(folder)
        assert moved.variants == tiny_run.variants
        tokens = torch.arange(6).unsqueeze(0)
        with torch.no_grad():
            expected = tiny_run.frozen_lm().bridged(tokens, return_type="logits")
            assert torch.equal(moved.frozen_lm().bridged(tokens, return_type="logits"), expected)
        assert torch.equal(
            moved.model("joint").adapter.projections, tiny_run.model("joint").adapter.projections
        )
        assert moved.corpus.texts[3] == tiny_run.corpus.texts[3]


# Forward passes


TOKENS = torch.arange(24).view(2, 12)


def states(backend: Backend, names: list[str]) -> list[torch.Tensor]:
    """What hooks of those names see."""
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        backend(TOKENS, [(name, lambda x: seen.append(x.flatten(2).clone())) for name in names], len(names))
    return seen


@pytest.mark.parametrize("variant", ["none", "soft", "random"])
@pytest.mark.parametrize("beside", [[], ["blocks.1.attn.hook_q"]])
def test_a_forward_pass_of_the_base_lm_or_of_random_weights(tiny_run: Run, variant: str, beside: list[str]):
    """On the plain backend, and on the bridge for a hook that no module has; the LM stays as it is."""
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)] + ["ln_final.hook_out"]
    backend = tiny_run.backend_for([*names, *beside], variant, seed=5)
    assert isinstance(backend, BridgeBackend if beside else HFBackend)
    plain = tiny_run.plain_model()
    plain = random_weights(plain.config, 5) if variant == "random" else plain
    with torch.no_grad():
        expected = plain.eval()(TOKENS, output_hidden_states=True).hidden_states
    for found, state in zip(states(backend, names), expected, strict=True):
        torch.testing.assert_close(found, state, rtol=1e-4, atol=1e-4)


def test_forward_passes_leave_the_lm_as_it_is(tiny_run: Run):
    run = Run.open(tiny_run.folder)
    with torch.no_grad():
        before = run.frozen_lm().bridged(TOKENS, return_type="logits")
        for variant in ("none", "random"):
            for name in ("blocks.1.hook_mlp_out", "blocks.1.attn.hook_q"):
                states(run.backend_for([name], variant), [name])
        assert torch.equal(run.frozen_lm().bridged(TOKENS, return_type="logits"), before)


def test_the_same_run_with_other_settings(tiny_run: Run):
    window = tiny_run.config.evaluation.window
    run = tiny_run.with_settings({"evaluation.window": 11, "probe.positions": [3]})
    assert run.folder == tiny_run.folder
    assert (run.config.evaluation.window, run.config.probe.positions) == (11, (3,))
    assert run.config.training == tiny_run.config.training
    assert tiny_run.config.evaluation.window == window
    assert Run.open(tiny_run.folder).config == tiny_run.config, "settings for now are not written"
    with pytest.raises(ProbekitError, match=r"unknown setting 'evaluation\.windows'"):
        tiny_run.with_settings({"evaluation.windows": 3})


@pytest.mark.parametrize(
    ("name", "value", "stage"),
    [
        ("lm.bos", "none", "corpus"),
        ("lm.name", "gpt2", "corpus"),
        ("lm.layers", 2, "lm"),
        ("lm.revision", "main", "corpus"),
    ],
)
def test_settings_of_what_is_made_already_are_refused(tiny_run: Run, name: str, value: object, stage: str):
    with pytest.raises(ProbekitError) as raised:
        Run.at(tiny_run.folder, {"evaluation.window": 11, name: value})
    before = setting_value(tiny_run.config, name)
    assert str(raised.value) == (
        f"{name} was {before!r} when the {stage} of {tiny_run.folder} was made, and cannot be {value!r} now; "
        "leave it out, or make another run"
    )
    tiny_run.with_settings({name: before})


def test_how_an_lm_is_loaded_may_change(tiny_run: Run):
    for settings in ({"lm.dtype": "bfloat16"}, {"lm.trust_remote_code": True}, {"training.window": 8}):
        assert tiny_run.with_settings(settings).config != tiny_run.config


def test_other_settings_load_nothing_anew_unless_they_say_what_to_load(tiny_run: Run):
    run = Run.open(tiny_run.folder)
    corpus, lm = run.corpus, run.frozen_lm()
    states(run.backend_for(["hook_embed"]), ["hook_embed"])
    same = run.with_settings({"evaluation.window": 11})
    assert same.corpus is corpus
    assert same.frozen_lm() is lm
    assert vars(same) == vars(run) | {"config": same.config}
    for settings in ({"lm.trust_remote_code": True}, {"device": "auto"}):
        assert vars(run.with_settings(settings)).keys() == {"folder", "config"}


def flip(path: Path) -> None:
    """Changes the last byte of a file."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_digest_tells_the_weights_of_a_variant(copy: Run):
    variants = ["none", "soft", "joint", "fixed"]
    before = {variant: copy.weights_digest(variant) for variant in variants}
    assert len({*before.values()}) == len(variants)
    moved = Run.open(shutil.copytree(copy.folder, copy.folder.parent / "moved"))
    assert {variant: moved.weights_digest(variant) for variant in variants} == before
    for file, touched in (
        ("adapters/soft.safetensors", {"soft"}),
        ("planner/model.safetensors", {"soft", "joint", "fixed"}),
        ("lm/model.safetensors", {*variants}),
        ("lm/config.json", {*variants}),
    ):
        path = copy.folder / file
        content = path.read_bytes()
        flip(path)
        changed = {variant for variant in variants if copy.weights_digest(variant) != before[variant]}
        assert changed == touched, file
        path.write_bytes(content)


@pytest.fixture
def prepared(tiny_run: Run, tiny_config: Config, tmp_path: Path) -> Run:
    """A run with a pre-trained LM and a corpus, and nothing trained."""
    size = {"vocab_size": 560, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "max_position_embeddings": 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**size)).save_pretrained(tmp_path / "model")
    tiny_run.corpus.tokenizer.save_pretrained(tmp_path / "model")
    return prepare(tiny_config.override({"lm.name": str(tmp_path / "model")}), tmp_path / "run", quiet=True)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_run_does_not_go_on_with_other_weights_of_its_lm(prepared: Run, tmp_path: Path, file: str):
    before = prepared.weights_digest("none")
    assert before == prepared.weights_digest("none")
    assert prepared.plain_model()
    flip(tmp_path / "model" / file)
    assert prepared.weights_digest("none") != before
    with pytest.raises(
        ProbekitError, match=f"^{tmp_path}/model is not the LM that .* its files have changed"
    ):
        Run.open(prepared.folder).plain_model()


def test_the_base_lm_needs_no_planner(prepared: Run):
    model = prepared.model("none")
    assert model.planner is None
    assert model.adapter is None
    assert not model.training
    batch = collate(prepared.corpus, cut_windows(prepared.corpus, np.arange(3), 20, 20))
    with torch.no_grad():
        expected = prepared.plain_model()(batch.tokens).logits
        torch.testing.assert_close(model(batch, Fixed()), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ProbekitError, match="lacks the stage 'adapter/soft'"):
        prepared.model("soft")
    with pytest.raises(ProbekitError, match="lacks the stage 'planner'"):
        prepared.planner()


def test_models_are_frozen_and_joint_variants_have_a_planner_of_their_own(tiny_run: Run):
    models = {name: tiny_run.model(name) for name in ("soft", "joint")}
    for model in models.values():
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
    planners = {name: flat(model.planner) for name, model in models.items()}
    assert torch.equal(planners["soft"], flat(tiny_run.planner()))
    assert not torch.equal(planners["joint"], flat(tiny_run.planner()))
    with pytest.raises(ProbekitError, match="has no variant 'gumbel'; it has none, fixed, oracle"):
        tiny_run.model("gumbel")


def test_weights_that_do_not_fit_or_are_missing_are_named(copy: Run, monkeypatch: pytest.MonkeyPatch):
    adapters = copy.folder / "adapters"
    shutil.copy(copy.folder / "planner" / "model.safetensors", adapters / "soft.safetensors")
    with pytest.raises(ProbekitError, match=r"soft\.safetensors does not fit"):
        copy.model("soft")
    shutil.rmtree(copy.folder / "lm")
    monkeypatch.chdir(copy.folder.parent)
    with pytest.raises(ProbekitError, match="no such folder"):  # it is not looked for on the hub
        Run.open("copy").plain_model()
