"""Sweeps: what runs share is trained once and is what a training of its own leaves; stopped ones go on."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.evaluation.evaluate import evaluate
from probekit.io import locked, read_json, write_json
from probekit.run.run import Run
from probekit.statistics import bootstrap_ratio
from probekit.sweeps import Place, Sweep, grid, sweep
from probekit.training import train as training
from probekit.training.train import train

FRACTIONS = {"mixing.fraction": [0, 0.5, 1]}


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    """Fewer stages, smaller still."""
    return tiny_config.override(
        {
            "corpus.planted.documents": 120,
            "lm.width": 16,
            "training.planner.epochs": 1,
            "mixing.variants": ["oracle", "predicted", "mixed"],
        }
    )


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each stage is trained, not taken over."""
    yield from counting(monkeypatch)


def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    counted: Counter[str] = Counter()
    stage = training._stage

    def counts(run: Run, name: str, work: Any) -> None:
        counted[name] += not run.finished(name)
        stage(run, name, work)

    monkeypatch.setattr(training, "_stage", counts)
    yield counted


@pytest.fixture(scope="module")
def swept(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Counter[str]]:
    """A sweep over the fraction with two seeds, and how often each stage was trained."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        counted = next(counting(monkeypatch))
        out = tmp_path_factory.mktemp("sweeps") / "fractions"
        return sweep(config, grid(config, FRACTIONS), [0, 1], out, quiet=True), counted


@pytest.fixture
def copy(swept: tuple[Sweep, Counter[str]], tmp_path: Path) -> Path:
    """The folder of a copy of the sweep, linked as the sweep is."""
    return shutil.copytree(swept[0].folder, tmp_path / "copy", copy_function=os.link)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in ("corpus", "lm", "planner", "adapters", "losses.parquet")
        for path in [folder / name, *(folder / name).rglob("*")]
        if path.is_file()
    }


def refusal(config: Config, members: Any, seeds: Any, out: Path, **options: Any) -> str:
    with pytest.raises(ProbekitError) as caught:
        sweep(config, members, seeds, out, quiet=True, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is shared


def test_no_stage_is_trained_twice(swept: tuple[Sweep, Counter[str]]):
    _, trained = swept
    assert trained == {
        "corpus": 1,
        "lm": 2,
        "planner": 2,
        "adapter/oracle": 2,
        "adapter/predicted": 2,
        "adapter/mixed": 6,
    }


def test_every_run_is_what_a_training_of_its_own_leaves(
    swept: tuple[Sweep, Counter[str]], config: Config, tmp_path: Path
):
    place = Place("mixing.fraction=0.5", 1)
    run = swept[0].runs[place]
    alone = train(config.override({"mixing.fraction": 0.5, "seed": 1}), tmp_path / "alone", quiet=True)
    assert run.config == alone.config
    mine, its = files(run.folder), files(alone.folder)
    del mine["losses.parquet"]
    assert mine == its
    rows = [
        r.metrics().sort_values(["stage", "step"], kind="stable").reset_index(drop=True) for r in (run, alone)
    ]
    pd.testing.assert_frame_equal(*rows)
    assert run.variants == ["oracle", "predicted", "mixed"]


def test_no_share_is_oracle_training_and_all_is_predicted_training_to_the_bit(
    swept: tuple[Sweep, Counter[str]],
):
    for seed in (0, 1):
        for fraction, variant in ((0, "oracle"), (1, "predicted")):
            run = swept[0].runs[Place(f"mixing.fraction={fraction}", seed)]
            adapters = run.folder / "adapters"
            assert (adapters / "mixed.safetensors").read_bytes() == (
                adapters / f"{variant}.safetensors"
            ).read_bytes()
            metrics = run.metrics().drop(columns="stage").astype(float)
            same, other = (
                metrics[run.metrics().stage == f"adapter/{name}"].reset_index(drop=True)
                for name in ("mixed", variant)
            )
            pd.testing.assert_frame_equal(same, other, check_exact=True)
        between = swept[0].runs[Place("mixing.fraction=0.5", seed)].folder / "adapters"
        assert len({path.read_bytes() for path in between.iterdir()}) == 3


def test_shared_files_are_linked_and_say_where_they_come_from(swept: tuple[Sweep, Counter[str]]):
    first, second = (swept[0].runs[Place(f"mixing.fraction={f}", 0)] for f in ("0", "1"))
    for name in ("corpus/tokens.npy", "lm/model.safetensors", "adapters/oracle.safetensors"):
        assert (first.folder / name).samefile(second.folder / name)
    assert not (first.folder / "metrics.jsonl").samefile(second.folder / "metrics.jsonl"), "it is appended to"
    stages = read_json(second.folder / "run.json")["stages"]
    origin = second.folder / stages["lm"]["taken_from"]
    assert origin.resolve() == first.folder.resolve()
    assert stages["lm"]["parameters"] == read_json(first.folder / "run.json")["stages"]["lm"]["parameters"]
    assert "taken_from" not in stages["adapter/mixed"]


@pytest.mark.parametrize("how", ["removed", "overwritten"])
def test_what_becomes_of_one_run_leaves_the_others_whole(how: str, copy: Path, config: Config):
    gone = copy / "mixing.fraction=0" / "seed0"  # the one that trained what others share
    others = {place: files(run.folder) for place, run in Sweep.open(copy).runs.items()}
    if how == "removed":
        shutil.rmtree(gone)
    else:
        train(config.override({"lm.width": 8, "corpus.seed": 3}), gone, existing="overwrite", quiet=True)
    for place, before in others.items():
        if place != Place("mixing.fraction=0", 0):
            assert files(copy / str(place)) == before


def test_a_run_that_was_removed_is_made_again_of_what_others_have(
    copy: Path, config: Config, trained: Counter[str], swept: tuple[Sweep, Counter[str]]
):
    shutil.rmtree(copy / "mixing.fraction=0" / "seed0")
    opened = Sweep.open(copy)
    assert opened.missing == [Place("mixing.fraction=0", 0)]
    assert len(opened.table()) == len(swept[0].table()) - 5  # none, predicted, mixed, oracle on both sources
    assert [*opened.table().member.unique()] == [*opened.members]
    done = sweep(config, grid(config, FRACTIONS), [0, 1], copy, quiet=True)
    assert trained["lm"] == trained["planner"] == trained["corpus"] == trained["adapter/oracle"] == 0
    assert trained["adapter/mixed"] == 1
    pd.testing.assert_frame_equal(done.table(), swept[0].table())


# Going on


def test_a_sweep_that_was_stopped_goes_on(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swept: tuple[Sweep, Counter[str]]
):
    log, rows = Run.log, 0

    def interrupted(self: Run, row: dict[str, Any]) -> None:
        nonlocal rows
        rows += row["stage"] == "adapter/mixed" and self.config.mixing.fraction == 0.5
        if rows == 2:
            raise KeyboardInterrupt
        log(self, row)

    members, out = grid(config, FRACTIONS), tmp_path / "out"
    monkeypatch.setattr(Run, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(config, members, [0], out, quiet=True)
    monkeypatch.undo()
    half = Sweep.open(out)
    assert [*half.runs] == [Place("mixing.fraction=0", 0)]
    assert half.missing == [Place(f"mixing.fraction={f}", 0) for f in ("0.5", "1")]
    assert set(half.table().member) == {"mixing.fraction=0"}
    counted = counting(monkeypatch)
    trained = next(counted)
    done = sweep(config, members, [0], out, quiet=True)
    assert +trained == {"adapter/mixed": 2}
    for place, run in done.runs.items():
        assert files(run.folder) == files(swept[0].runs[place].folder)


def test_the_same_command_again_does_nothing(copy: Path, config: Config, trained: Counter[str]):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.parent != copy}
    sweep(config, grid(config, FRACTIONS), [0, 1], copy, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.parent != copy} == before
    assert not +trained


def test_members_and_seeds_can_be_added(copy: Path, config: Config, trained: Counter[str]):
    done = sweep(config, grid(config, {"mixing.fraction": [0.25]}), [0], copy, quiet=True)
    assert +trained == {"adapter/mixed": 2}, "one for each seed that the sweep has"
    assert [*done.members] == [f"mixing.fraction={f}" for f in ("0", "0.5", "1", "0.25")]
    assert done.seeds == (0, 1)
    assert not done.missing


def test_a_run_that_fails_is_reported_when_the_others_are_done(config: Config, tmp_path: Path):
    members = {"wild": {"training.adapter.learning_rate": 1e12}, "tame": {}}
    line = refusal(config.override({"mixing.variants": ["mixed"]}), members, [0], tmp_path / "out")
    assert line.startswith("wild/seed0: training of adapter/mixed: the ")
    assert "1 of 2 runs" in line
    done = Sweep.open(tmp_path / "out")
    assert [*done.runs] == [Place("tame", 0)]
    assert done.missing == [Place("wild", 0)]
    assert set(pd.read_parquet(done.folder / "results.parquet").member) == {"tame"}


# Results


def test_the_table_is_as_computed_by_hand(swept: tuple[Sweep, Counter[str]]):
    done, _ = swept
    table = done.table()
    written = pd.read_parquet(done.folder / "results.parquet")
    pd.testing.assert_frame_equal(table, written)
    assert (table["mixing.fraction"] == table.member.str.partition("=")[2].astype(float)).all()
    for fraction in (0.0, 0.5, 1.0):
        rows = table[
            (table["mixing.fraction"] == fraction) & (table.variant == "mixed") & (table.actions == "planner")
        ].set_index("seed")
        sums = []
        for seed in (0, 1):
            run = done.runs[Place(f"mixing.fraction={fraction:g}", seed)]
            evaluated = pd.DataFrame(run.evaluation()["perplexity"]).set_index("variant").loc["mixed"]
            assert rows.loc[seed].value == pytest.approx(evaluated.perplexity)
            losses = run.losses()[run.losses().variant == "mixed"]
            sums.append(losses.loss.sum() / losses.tokens.sum())
        mean = rows[rows.index.isna()].iloc[0]
        assert mean.value == pytest.approx(np.exp(np.mean(sums)))
        assert mean.seed_spread == pytest.approx(np.std(np.exp(sums), ddof=1))
        assert mean.documents == len(run.corpus.documents("test"))
        assert mean.value_low < mean.value < mean.value_high


def test_copies_are_resampled_together(copy: Path):
    """Test documents in pairs: the same values, and intervals from the pairs' sums."""
    before, place = Sweep.open(copy), Place("mixing.fraction=1", 0)
    corpus, alone = before.corpus, before.table()
    group, test = corpus.group.copy(), corpus.documents("test")
    group[test[1::2]] = group[test[::2][: len(test) // 2]]
    rows = {"variant": "mixed", "actions": "planner", "length": 8, "metric": "rouge2", "empty": 0}
    continued = pd.DataFrame(rows | {"texts": "continuations", "document": test[:4], "sum": 1.0, "count": 1})
    samples = continued.assign(texts="samples", document=range(4))
    true = continued.assign(variant="true", actions="true")
    for run in before.runs.values():
        file = run.folder / "corpus" / "group.npy"
        file.unlink()  # linked files are one
        np.save(file, group)
        pd.concat([continued, samples, true], ignore_index=True).to_parquet(run.folder / "generation.parquet")
    done = Sweep.open(copy)
    table = done.table()
    perplexity = table[table.metric == "perplexity"].reset_index(drop=True)
    pd.testing.assert_series_equal(perplexity.value, alone.value)
    pairs = -(-len(test) // 2)
    assert set(perplexity.documents) == {pairs}
    assert done.values().query("metric == 'rouge2' and texts == 'samples'").document.nunique() == 4
    assert done.values().query("metric == 'rouge2' and texts == 'continuations'").document.nunique() == 2
    losses = done.runs[place].losses().query("variant == 'mixed' and actions == 'planner'")
    sums = losses.groupby(np.arange(len(losses)) // 2)[["loss", "tokens"]].sum()
    resampling = {"resamples": 200, "seed": done.config.seed, "transform": np.exp}
    expected = bootstrap_ratio(sums.loss, sums.tokens, **resampling)
    (row,) = perplexity.query(
        "member == @place.member and seed == 0 and variant == 'mixed' and actions == 'planner'"
    ).itertuples()
    assert (row.value_low, row.value_high) == pytest.approx((expected.low, expected.high))


def test_runs_on_other_tokens_are_not_averaged(copy: Path):
    place = Place("mixing.fraction=1", 1)
    table = Run.open(copy / str(place)).losses()
    (copy / str(place) / "losses.parquet").unlink()
    table.assign(tokens=table.tokens + 1).to_parquet(copy / str(place) / "losses.parquet")
    with pytest.raises(ProbekitError, match=r"mixing.fraction=1/seed1 was not evaluated on the same tokens"):
        Sweep.open(copy).table()


def test_generated_texts_on_other_documents_are_not_averaged(copy: Path):
    done = Sweep.open(copy)
    rows = {"variant": "true", "actions": "true", "texts": "continuations", "length": 8, "metric": "rouge2"}
    table = pd.DataFrame(rows | {"document": [3, 5, 9], "sum": 1.0, "count": 1})
    for run in done.runs.values():
        table.to_parquet(run.folder / "generation.parquet")
    assert {*done.values().texts} == {"test documents", "continuations"}
    odd = copy / "mixing.fraction=1" / "seed1" / "generation.parquet"
    table.assign(document=[3, 5, 8]).to_parquet(odd)
    with pytest.raises(ProbekitError, match=r"mixing.fraction=1/seed1 generated text that was not compared"):
        done.values()


def test_named_members_with_settings_of_their_own(config: Config, tmp_path: Path):
    members = {
        "paper": {},
        "last layer": {},
    }
    assert "'last layer' is no name of a member" in refusal(config, members, [0], tmp_path / "out")
    members = {"paper": {}, "stride": {"evaluation.stride": 5, "mixing.variants": ["oracle"]}}
    done = sweep(config, members, [4], tmp_path / "out", quiet=True)
    table = done.table()
    assert set(table["mixing.variants"]) == {"oracle predicted mixed", "oracle"}
    assert set(table[table.member == "stride"]["evaluation.stride"]) == {5}
    assert table[table.member == "paper"]["evaluation.stride"].isna().all()
    assert done.runs[Place("stride", 4)].variants == ["oracle"]


# Grids


def test_a_grid_has_a_member_for_every_combination(config: Config):
    over = {
        "training.adapter.learning_rate": ["1e-3", 0.00002],
        "mixing.variants": [["soft", "joint"], ["soft"]],
    }
    assert grid(config, over) == {
        f"training.adapter.learning_rate={rate},mixing.variants={'+'.join(variants)}": {
            "training.adapter.learning_rate": float(rate),
            "mixing.variants": variants,
        }
        for rate in ("0.001", "2e-05")
        for variants in (("soft", "joint"), ("soft",))
    }
    assert [*grid(config, {"conditioning.location": ["attn.hook_z"], "evaluation.window": [None]})] == [
        "conditioning.location=attn.hook_z,evaluation.window=none"
    ]


# Refusals


ONE: dict[str, Any] = {"a": {}}


@pytest.mark.parametrize(
    ("members", "seeds", "said"),
    [
        ({}, [0], "the sweep has no members"),
        (ONE, [], "the sweep has no seeds"),
        (ONE, [1, 1], "the seed 1 is given twice"),
        ({"../a": {}}, [0], "'../a' is no name of a member"),
        ({"a": {"mixing.fractoin": 1}}, [0], "'mixing.fractoin'; did you mean 'mixing.fraction'?"),
        ({"a": {"mixing.fraction": 1.5}}, [0], "mixing.fraction is 1.5: input should be less than or equal"),
        ({"a": {"seed": 3}}, [0], "seed is no setting to sweep over; give --seeds"),
        ({"a": {"probe.layers": [1]}}, [0], "probe.layers changes nothing that the sweep trains or measures"),
        ({"a": {"conditioning.skip_layers": 3}}, [0], "conditioning.skip_layers is 3, but lm.layers is 3"),
        (ONE | {"b": {"corpus.seed": 3}}, [0], "corpus.seed is 0 in a and 3 in b: that makes other corpora"),
        ({"a": {"training.base.rank": 4}}, [0], "it goes with training.base.tuning lora, which is frozen"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(
    members: Any, seeds: list[int], said: str, config: Config, tmp_path: Path
):
    assert said in refusal(config, members, seeds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "members", "said"),
    [
        ({"lm.layers": 4}, {"a": {}}, "lm.layers was 3 and is now 4; choose another --out"),
        ({"evaluation.stride": 4}, {"a": {}}, "evaluation.stride was None and is now 4"),
        (
            {},
            {"mixing.fraction=1": {"mixing.fraction": 0.9}},
            "mixing.fraction=1 was {'mixing.fraction': 1.0}",
        ),
        ({}, {"other": {"corpus.seed": 3}}, "corpus.seed is 0 in mixing.fraction=0 and 3 in other"),
    ],
)
def test_a_sweep_begun_with_other_settings_is_left_alone(
    settings: dict[str, Any], members: Any, said: str, copy: Path, config: Config
):
    before = (copy / "sweep.json").read_bytes()
    assert said in refusal(config.override(settings), members, [0], copy)
    assert (copy / "sweep.json").read_bytes() == before


def test_what_is_no_sweep_is_refused(tmp_path: Path, config: Config, tiny_run: Run):
    with pytest.raises(ProbekitError, match="does not exist; make one with `probekit sweep"):
        Sweep.open(tmp_path / "no")
    with pytest.raises(ProbekitError, match=r"holds no sweep \(no sweep.json\)"):
        Sweep.open(tmp_path)
    write_json(tmp_path / "sweep.json", {"format": 0})
    with pytest.raises(ProbekitError, match="no record of a sweep in format 1"):
        Sweep.open(tmp_path)
    for folder in (tiny_run.folder, tmp_path / "sweep.json"):
        assert "exists and holds no sweep; choose another --out" in refusal(config, ONE, [0], folder)
    wrong = config.override({"device": "nonsense"})
    assert "device is 'nonsense'" in refusal(wrong, ONE, [0, 1], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with locked(tmp_path):
        Sweep.of(tmp_path, config, ONE, [0]).write()
        assert f"another process is at work in {tmp_path}" in refusal(config, ONE, [0], tmp_path)
    begun = Sweep.open(tmp_path)
    assert begun.missing == [Place("a", 0)]
    with pytest.raises(ProbekitError, match="has no finished run yet"):
        begun.table()


def test_files_are_copied_where_there_are_no_links(
    copy: Path, config: Config, monkeypatch: pytest.MonkeyPatch, swept: tuple[Sweep, Counter[str]]
):
    def no_links(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    shutil.rmtree(copy / "mixing.fraction=1" / "seed1")
    done = sweep(config, grid(config, FRACTIONS), [0, 1], copy, quiet=True)
    first, second = (done.runs[Place(f"mixing.fraction={f}", 1)] for f in ("0", "1"))
    for name in ("corpus/tokens.npy", "adapters/oracle.safetensors"):
        assert not (first.folder / name).samefile(second.folder / name)
    assert files(second.folder) == files(swept[0].runs[Place("mixing.fraction=1", 1)].folder)


# What lies in the folders of members is not what the sweep asks for


def test_members_that_were_made_with_other_settings_are_named(copy: Path, config: Config):
    """Both when the sweep is read and when it continues."""

    def mismatch(place: Place) -> str:
        with pytest.raises(ProbekitError) as caught:
            Sweep.open(copy).table()
        assert refusal(Sweep.open(copy).config, grid(config, FRACTIONS), [0, 1], copy) == str(caught.value)
        assert str(place) in str(caught.value)
        return str(caught.value)

    third = Place("mixing.fraction=1", 0)
    settings = config.generation.model_dump(mode="json") | {"seeds": [0], "temperature": 0.5}
    write_json(copy / str(third) / "generation.json", {"settings": settings, "metrics": []})
    assert "generated text with generation.temperature 0.5, and the sweep has 1.0" in mismatch(third)
    second = Place("mixing.fraction=0.5", 0)
    other = Sweep.open(copy).config_of(second).override({"training.adapter.epochs": 2})
    evaluate(train(other, copy / str(second), existing="overwrite", quiet=True), quiet=True)
    assert "was trained with training.adapter.epochs 2.0, and the sweep has 1.0" in mismatch(second)
    first = Place("mixing.fraction=0", 0)
    evaluate(copy / str(first), {"evaluation.stride": 7}, quiet=True)
    assert "was evaluated with evaluation.stride 7, and the sweep has 24" in mismatch(first)


def test_what_nothing_uses_may_be_other(copy: Path, swept: tuple[Sweep, Counter[str]]):
    run = Run.open(copy / str(Place("mixing.fraction=1", 1)))
    settings = {"probe.hidden": 7, "training.base.rank": 3, "generation.prompts": 3, "planner.layers": 1}
    Run.begin(run.folder, run.config.override(settings), "resume")
    pd.testing.assert_frame_equal(Sweep.open(copy).table(), swept[0].table())


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ("precision", "training.precision 'auto' was float32 in mixing.fraction=0/seed0 and other in"),
        ("weights", "lm.name None was other"),
    ],
)
def test_runs_that_were_made_in_other_ways_are_not_compared(fact: str, said: str, copy: Path):
    for number, member in enumerate(("mixing.fraction=0", "mixing.fraction=1")):
        path = copy / member / "seed0" / "run.json"
        state = read_json(path)
        if number or fact == "weights":
            state["stages"]["lm"][fact] = f"other{number or ''}" if fact == "weights" else "other"
            for facts in state["stages"].values():
                if fact in facts:
                    facts[fact] = state["stages"]["lm"][fact]
        write_json(path, state)
    with pytest.raises(ProbekitError) as caught:
        Sweep.open(copy).table()
    assert said in str(caught.value)


def test_a_stage_whose_files_are_gone_is_trained_not_shared(
    copy: Path, config: Config, trained: Counter[str]
):
    shutil.rmtree(copy / "mixing.fraction=1" / "seed0")
    for path in copy.glob("*/seed0/adapters/oracle.safetensors"):
        path.unlink()
    sweep(config, grid(config, FRACTIONS), [0, 1], copy, quiet=True)
    assert +trained == {"adapter/oracle": 1, "adapter/mixed": 1}
    assert (copy / "mixing.fraction=1" / "seed0" / "adapters" / "oracle.safetensors").exists()
