"""Whole trainings: repeatable to the bit, resumable at any stage, harmless when refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.evaluation.evaluate import evaluate
from probekit.io import read_json, write_json
from probekit.probing.probe import probe
from probekit.run.run import Run
from probekit.training.train import build_corpus, prepare, train

STAGES = {
    "corpus": "corpus",
    "lm": "lm",
    "planner": "planner",
    "adapter/soft": "adapters/soft.safetensors",
    "adapter/joint": "adapters/joint.safetensors",
}
"""Stages and what they leave."""
MADE = ["corpus", "lm", "planner", "adapters", "metrics.jsonl", "config.yaml"]
"""All of a run that is to be the same when it is trained again: the rest tells when and how long."""


def made(folder: Path) -> dict[str, bytes]:
    """What a training made, by file."""
    files = [file for name in MADE for file in [folder / name, *(folder / name).rglob("*")] if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def written(folder: Path) -> dict[str, int]:
    """When each file was written."""
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()
    }


def rows_by_stage(folder: Path) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        rows.setdefault(json.loads(line)["stage"], []).append(json.loads(line))
    return rows


def unmark(folder: Path, stage: str) -> None:
    state = read_json(folder / "run.json")
    del state["stages"][stage]
    write_json(folder / "run.json", state)


def refusal(config: Config, out: Path, **options: Any) -> str:
    with pytest.raises(ProbekitError) as caught:
        train(config, out, quiet=True, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Seeds


def test_a_run_without_actions_is_refused_before_an_earlier_one_is_lost(
    tiny_config: Config, tiny_run: Run, tmp_path: Path
):
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    with pytest.raises(ProbekitError, match=r"actions\.labels is 'none'"):
        train(tiny_config.override({"actions.labels": "none"}), folder, existing="overwrite", quiet=True)
    assert made(folder) == made(tiny_run.folder)


def test_another_seed_makes_another_run_on_the_same_corpus(
    tiny_config: Config, tiny_run: Run, tmp_path: Path
):
    config = tiny_config.override({"seed": 1, "mixing.variants": ["fixed", "joint"]})
    other = train(config, tmp_path / "other", quiet=True)
    first, second = made(tiny_run.folder), made(other.folder)
    same = {name for name in second if first[name] == second[name]}
    assert {name for name in second if name.startswith("corpus/")} <= same
    for name in (
        "lm/model.safetensors",
        "planner/model.safetensors",
        "adapters/fixed.safetensors",
        "adapters/joint.safetensors",
        "metrics.jsonl",
    ):
        assert name not in same


def test_the_order_of_variants_does_not_matter_to_each(tiny_config: Config, tiny_run: Run, tmp_path: Path):
    config = tiny_config.override({"mixing.variants": ["joint", "soft"]})
    other = train(config, tmp_path / "other", quiet=True)
    for variant in ("soft", "joint"):
        name = f"adapters/{variant}.safetensors"
        assert (other.folder / name).read_bytes() == (tiny_run.folder / name).read_bytes()
    assert other.variants == ["joint", "soft"]


# Resuming


@pytest.mark.parametrize("stage", ["corpus", "lm", "planner", "adapter/joint"])
def test_a_stage_that_is_not_marked_is_made_again_and_no_other(tiny_run: Run, copy: Path, stage: str):
    unmark(copy, stage)
    target = copy / STAGES[stage]
    for file in [target, *target.rglob("*")]:
        if file.is_file():
            file.write_bytes(b"broken off")
    before = written(copy)
    train(None, copy, existing="resume", quiet=True)
    assert made(copy).keys() == made(tiny_run.folder).keys()
    again, first = rows_by_stage(copy), rows_by_stage(tiny_run.folder)
    assert again == first
    for name, content in made(tiny_run.folder).items():
        if name != "metrics.jsonl":  # its rows are in the order in which the stages were trained
            assert (copy / name).read_bytes() == content, name
    changed = {name for name, when in written(copy).items() if when != before.get(name)}
    assert {name for name in changed if not name.startswith(STAGES[stage])} <= {"run.json", "metrics.jsonl"}
    assert {name for name in changed if name.startswith(STAGES[stage])}


def test_a_finished_run_is_left_as_it_is(copy: Path, monkeypatch: pytest.MonkeyPatch):
    for work in ("train_language_model", "train_planner", "AdapterTraining"):
        monkeypatch.delattr(f"probekit.training.train.{work}")
    before = written(copy)
    run = train(None, copy, existing="resume", quiet=True)
    assert written(copy) == before
    assert run.finished("adapter/joint")


def test_an_interrupted_training_goes_on_to_the_same_bits_and_quiet_prints_nothing(
    tiny_config: Config,
    tiny_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder = tmp_path / "run"
    torch.manual_seed(12345)  # whatever a notebook did before
    log, steps = Run.log, 0

    def interrupted(self: Run, row: dict[str, Any]) -> None:
        nonlocal steps
        steps += row["stage"] == "adapter/oracle"
        if steps == 3:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write('{"stage": "adapter/or')  # as a process that is killed leaves it
            raise KeyboardInterrupt
        log(self, row)

    monkeypatch.setattr(Run, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config, folder, quiet=True)
    monkeypatch.undo()
    assert list(read_json(folder / "run.json")["stages"]) == ["corpus", "lm", "planner", "adapter/fixed"]
    assert Run.open(folder).variants == ["fixed"]
    train(tiny_config, folder, existing="resume", quiet=True)
    assert made(folder) == made(tiny_run.folder)
    assert capsys.readouterr() == ("", "")


def test_a_corpus_built_alone_is_trained_on(tiny_config: Config, tiny_run: Run, tmp_path: Path):
    config = tiny_config.override({"mixing.variants": ["fixed"]})
    built = build_corpus(config, tmp_path / "run", quiet=True)
    before = written(built.folder / "corpus")
    run = train(None, tmp_path / "run", existing="resume", quiet=True)
    assert written(run.folder / "corpus") == before
    name = "adapters/fixed.safetensors"
    assert (run.folder / name).read_bytes() == (tiny_run.folder / name).read_bytes()


def test_stages_tell_seconds_and_sizes(tiny_run: Run):
    stages = read_json(tiny_run.folder / "run.json")["stages"]
    variants = ("fixed", "oracle", "predicted", "soft", "joint")
    assert list(stages) == ["corpus", "lm", "planner", *(f"adapter/{variant}" for variant in variants)]
    assert all(facts["seconds"] >= 0 for facts in stages.values())
    plain = tiny_run.plain_model()
    assert stages["lm"]["parameters"] == sum(p.numel() for p in plain.parameters())
    adapter = tiny_run.model("soft").adapter
    assert stages["adapter/soft"]["parameters"] == sum(p.numel() for p in adapter.parameters())


# Refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"training.window": 49}, "training.window is 49, but the LM reads at most 48 positions"),
        ({"evaluation.window": 64}, "evaluation.window is 64, but the LM reads at most 48 positions"),
        ({"conditioning.skip_layers": 3}, "conditioning.skip_layers is 3, but lm.layers is 3"),
        ({"device": "abacus"}, "device is 'abacus'"),
    ],
)
def test_what_can_be_refused_at_once_is_refused_before_anything_is_written(
    settings: dict[str, Any], said: str, tiny_config: Config, copy: Path, tmp_path: Path
):
    config = tiny_config.override(settings)
    assert said in refusal(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    before = written(copy)
    assert said in refusal(config, copy, existing="overwrite")
    assert written(copy) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"actions.k": 4096}, "actions.k is 4096, but the training documents have"),
        ({"corpus.planted.documents": 4}, "none for the split"),
        ({"corpus.reader": "text", "actions.labels": "planted"}, "actions.labels is 'planted'"),
        ({"corpus.reader": "text", "corpus.path": "/no/text", "actions.labels": "clusters"}, "/no/text"),
    ],
)
def test_a_corpus_that_cannot_be_built_leaves_a_run_to_overwrite(
    settings: dict[str, Any], said: str, tiny_config: Config, tmp_path: Path
):
    assert said in refusal(tiny_config.override(settings), tmp_path / "run")
    assert read_json(tmp_path / "run" / "run.json")["stages"] == {}
    build_corpus(tiny_config, tmp_path / "run", existing="overwrite", quiet=True)


def test_a_location_that_the_lm_lacks_is_refused_before_any_training(copy: Path, tiny_config: Config):
    config = tiny_config.override({"conditioning.location": "attn.hook_zz", "training.lm.epochs": 0.1})
    assert "conditioning.location is 'attn.hook_zz'" in refusal(config, copy, existing="overwrite")
    assert list(read_json(copy / "run.json")["stages"]) == ["corpus"]


# A pre-trained LM


def pretrained(kind: str, tiny_run: Run, folder: Path) -> Path:
    """A small random LM of another architecture with its tokenizer, as a hub folder has them."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

    size = {"vocab_size": 560, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    size |= {"num_attention_heads": 2, "max_position_embeddings": 40}
    config = {"llama": LlamaConfig, "gpt-neox": GPTNeoXConfig}[kind](**size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_run.corpus.tokenizer.save_pretrained(folder)
    return folder


def test_a_pretrained_lm_is_conditioned_evaluated_and_probed(
    tiny_config: Config, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = pretrained("gpt-neox", tiny_run, tmp_path / "model")
    weights = (model / "model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)  # a relative name is recorded so that it is found from anywhere
    config = tiny_config.override(
        {
            "lm.name": "model",
            "training.window": 40,
            "mixing.variants": ["fixed", "joint"],
            "probe.positions": [1],
            "probe.layers": [2],
            "probe.variants": ["none", "joint"],
        }
    )
    run = train(config, tmp_path / "run", quiet=True)
    assert read_json(run.folder / "lm" / "source.json") == {"name": str(model), "revision": None}
    assert [path.name for path in (run.folder / "lm").iterdir()] == ["source.json"], "weights are not copied"
    assert "lm" not in set(run.metrics().stage)
    assert (model / "model.safetensors").read_bytes() == weights

    monkeypatch.chdir("/")
    run = Run.open(run.folder)
    assert set(evaluate(run, quiet=True).perplexity.variant) == {"none", "fixed", "joint"}
    table = probe(run, quiet=True).table
    assert set(table[table.reader == "probe"].variant) == {"none", "joint"}
    plain = run.plain_model()
    tokens = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(
            run.frozen_lm().bridged(tokens, return_type="logits"), plain(tokens).logits
        )

    shutil.move(model, tmp_path / "moved")
    with pytest.raises(ProbekitError, match=rf"{model}.*no such folder"):
        Run.open(run.folder).plain_model()


# A pre-trained LM, and nothing trained


def test_any_lm_is_probed_with_nothing_trained(
    tiny_config: Config, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for work in ("train_language_model", "train_planner", "AdapterTraining"):
        monkeypatch.delattr(f"probekit.training.train.{work}")
    name = str(pretrained("llama", tiny_run, tmp_path / "model"))
    config = tiny_config.override({"lm.name": name, "training.window": 40})
    run = prepare(config, tmp_path / "run", quiet=True)
    stages = read_json(run.folder / "run.json")["stages"]
    assert list(stages) == ["lm", "corpus"]
    assert stages["lm"]["parameters"] == sum(p.numel() for p in run.plain_model().parameters())
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "config.yaml", "corpus", "lm", "provenance.json", "run.json",
    ]  # fmt: skip
    few = {"probe.variants": ["none", "random"], "probe.layers": [1], "probe.positions": [1]}
    table = probe(run, few, quiet=True).table
    assert set(table[table.reader == "probe"].variant) == {"none", "random"}
    assert "planner" not in set(table.reader)


def test_what_was_prepared_can_be_trained(tiny_config: Config, tiny_run: Run, tmp_path: Path):
    name = str(pretrained("llama", tiny_run, tmp_path / "model"))
    config = tiny_config.override({"lm.name": name, "training.window": 40, "mixing.variants": ["fixed"]})
    prepared = prepare(config, tmp_path / "run", quiet=True)
    before = written(prepared.folder)
    assert prepare(config, tmp_path / "run", existing="resume", quiet=True).finished("lm")
    assert written(prepared.folder) == before
    run = train(None, tmp_path / "run", existing="resume", quiet=True)
    assert run.variants == ["fixed"]
    after = written(run.folder)
    assert all(after[name] == when for name, when in before.items() if name != "run.json")


def test_without_the_name_of_an_lm_nothing_is_prepared(tiny_config: Config, copy: Path):
    before = written(copy)
    with pytest.raises(ProbekitError, match=r"lm\.name is not set.*--model"):
        prepare(tiny_config, copy, existing="overwrite", quiet=True)
    assert written(copy) == before


def test_a_missing_encoder_is_reported_before_the_planner_is_trained(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"mixing.variants": ["soft", "joint"], "training.joint.encoder_learning_rate": 1e-5}
    run = Run.begin(tmp_path / "run", tiny_run.config.override(settings))
    for stage in ("corpus", "lm"):
        run.take_over(stage, tiny_run)

    def missing(folder: Path) -> None:
        raise ProbekitError(f"{folder} needs a library")

    monkeypatch.setattr("probekit.training.train.check_encoder", missing)
    with pytest.raises(ProbekitError, match=r"corpus/encoder needs a library"):
        train(None, run.folder, existing="resume", quiet=True)
    assert not run.finished("planner")


@pytest.mark.parametrize("work", [prepare, train])
def test_an_unusable_lm_is_refused_before_a_corpus_is_built(
    work: Callable[..., Run], tiny_config: Config, tiny_run: Run, tmp_path: Path
):
    model = pretrained("llama", tiny_run, tmp_path / "model")
    for settings, said in (
        ({"lm.name": str(tmp_path / "no")}, f"lm.name is '{tmp_path}/no': no such folder"),
        (
            {"lm.name": str(model), "training.window": 41},
            "window is 41, but the LM reads at most 40 positions",
        ),
    ):
        with pytest.raises(ProbekitError, match=said):
            work(tiny_config.override(settings), tmp_path / "run", existing="overwrite", quiet=True)
        assert read_json(tmp_path / "run" / "run.json")["stages"] == {}
        assert not (tmp_path / "run" / "corpus").exists()


def test_few_test_documents_are_noted_when_the_corpus_is_built(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    build_corpus(tiny_config, tmp_path / "run")
    assert "Only 16 test documents: intervals from resampling so few" in capsys.readouterr().err


def test_what_auto_stood_for_is_recorded(tiny_run: Run):
    """The dtype of the LM beside which something was trained."""
    for stage, facts in tiny_run.stages.items():
        assert facts.get("dtype") == ("float32" if stage.startswith("adapter/") else None), stage
