"""The protocol on a tiny run: who is measured on what, and true text in the place of generated text."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probekit.errors import ProbekitError
from probekit.generation import evaluate as generation_metrics
from probekit.generation.evaluate import (
    GenerationEvaluation,
    TrueTexts,
    beginnings,
    check_generation,
    evaluate_generation,
)
from probekit.generation.generate import Generated
from probekit.generation.prompts import Prompt
from probekit.io import write_json
from probekit.run.run import Run

SETTINGS = {
    "generation.prompts": 20,
    "generation.context": 16,
    "generation.lengths": [10, 30],
    "generation.samples": 52,
    "evaluation.resamples": 100,
}


WRITERS = [
    ("none", "none"),
    ("fixed", "constant"),
    ("oracle", "planner"),
    ("oracle", "true"),
    ("predicted", "planner"),
    ("soft", "planner"),
    ("joint", "planner"),
]


PLANNED = [pair for pair in WRITERS if pair[1] in ("planner", "true")]


COMPARED = ["rouge2", "levenshtein", "levenshtein_normalised", "latent_perplexity"]


def with_test_documents(run: Run, folder: Path) -> Run:
    """A copy whose test documents are enough for MAUVE, and those of the split `probe` too."""
    copy = Run.open(shutil.copytree(run.folder, folder / "run"))
    split = np.load(copy.folder / "corpus" / "split.npy")
    train = np.flatnonzero(split == 0)
    split[train[:40]], split[train[40:60]] = 3, 1
    np.save(copy.folder / "corpus" / "split.npy", split)
    return copy


@pytest.fixture(scope="module")
def large(tiny_run: Run, tmp_path_factory) -> Run:
    return with_test_documents(tiny_run, tmp_path_factory.mktemp("generated"))


@pytest.fixture(scope="module")
def evaluation(large: Run) -> GenerationEvaluation:
    return evaluate_generation(large.folder, SETTINGS, quiet=True)


def pairs(rows: pd.DataFrame) -> list[tuple[str, str]]:
    return list(dict.fromkeys(zip(rows.variant, rows.actions, strict=True)))


def test_who_is_measured_by_what(evaluation: GenerationEvaluation):
    metrics = evaluation.metrics
    assert not metrics.duplicated(["variant", "actions", "texts", "length", "metric"]).any()
    continued = metrics[metrics.texts == "continuations"].set_index(["metric", "length"])
    for length in (10, 30):
        for metric in COMPARED[:3]:
            assert pairs(continued.loc[metric, length]) == [("other document", "true"), *WRITERS]
        assert pairs(continued.loc["latent_perplexity", length]) == [("true", "true"), *WRITERS]
    for metric in ("plan_following", "plan_following_by_chance"):
        assert pairs(continued.loc[metric, 30]) == [("true", "true"), *PLANNED]
    samples = metrics[metrics.texts == "samples"].set_index("metric")
    without = [pair for pair in WRITERS if pair[1] != "true"]
    assert (
        pairs(samples.loc["mauve"]) == pairs(samples.loc["latent_perplexity"]) == [("true", "true"), *without]
    )
    assert {*samples.length} == {30}


def test_values_are_ratios_of_what_the_table_holds(evaluation: GenerationEvaluation):
    keys = ["variant", "actions", "texts", "length", "metric"]
    sums = evaluation.values.groupby(keys)[["sum", "count"]].sum()
    for row in evaluation.metrics.itertuples():
        assert row.value_low <= row.value <= row.value_high
        if row.metric == "mauve":
            assert row.documents == 52
            continue
        total, count = sums.loc[row.variant, row.actions, row.texts, row.length, row.metric]
        expected = np.exp(total / count) if row.metric == "latent_perplexity" else total / count
        assert row.value == pytest.approx(expected)
    continued = evaluation.metrics[evaluation.metrics.metric == "rouge2"]
    assert {*continued.documents} == {20}


def test_the_file_holds_what_is_returned(evaluation: GenerationEvaluation, large: Run):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    written = json.loads((large.folder / "generation.json").read_text("utf-8"), parse_constant=refuse)
    assert written == large.generation_metrics()
    assert written["settings"] == evaluation.settings
    assert written["notes"] == evaluation.notes
    (note,) = evaluation.notes
    assert note.startswith("MAUVE of 52 texts on either side does not tell variants apart; it takes 500")
    rows = pd.DataFrame(written["metrics"]).astype({"seed_spread": float})
    pd.testing.assert_frame_equal(rows, evaluation.metrics)
    pd.testing.assert_frame_equal(pd.read_parquet(large.folder / "generation.parquet"), evaluation.values)
    assert evaluation.settings["seeds"] == [0]
    assert evaluation.settings["true_samples"] == 52
    assert "last hidden state" in evaluation.settings["features"]


def few(settings: dict) -> dict:
    return SETTINGS | {"mixing.variants": ["oracle"], "generation.samples": 6} | settings


def test_seeds_are_pooled_and_their_spread_is_reported(large: Run):
    both = evaluate_generation(large, few({"generation.seeds": [3, 5], "generation.prompts": 6}), quiet=True)
    single = [
        evaluate_generation(large, few({"generation.seeds": [seed], "generation.prompts": 6}), quiet=True)
        for seed in (3, 5)
    ]
    keys = ["variant", "actions", "texts", "length", "metric"]
    first, second = (one.metrics.set_index(keys) for one in single)
    assert first.seed_spread.isna().all()
    for key, row in both.metrics.set_index(keys).iterrows():
        if key[0] in ("true", "other document"):
            assert row.seeds == 1
            continue
        each = [first.value[key], second.value[key]]
        assert row.seeds == 2
        assert row.seed_spread == pytest.approx(np.std(each, ddof=1))
        assert min(each) <= row.value <= max(each)
    own = both.metrics.set_index(keys).loc["none", "none", "continuations", 30, "rouge2"]
    assert own.value == pytest.approx((first.value[own.name] + second.value[own.name]) / 2)


def test_too_few_texts_for_mauve_are_reported(large: Run):
    evaluation = evaluate_generation(large, few({"mixing.variants": ["fixed"]}), quiet=True)
    assert "mauve" not in set(evaluation.metrics.metric)
    assert evaluation.notes == [
        "No MAUVE: it needs 50 texts of 30 tokens on either side, and 6 test documents are that long, of "
        "generation.samples 6; lower generation.lengths, or raise what is too low"
    ]


def test_an_encoder_that_is_gone_is_reported_before_work_begins(tiny_run: Run, tmp_path: Path):
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    lengths = {"generation.context": 8, "generation.lengths": [8]}
    check_generation(run, lengths)
    gone = {"kind": "pretrained", "name": str(tmp_path / "gone"), "revision": None}
    write_json(run.folder / "corpus" / "encoder" / "encoder.json", gone)
    with pytest.raises(ProbekitError, match=r"actions\.encoder is"):
        check_generation(run, lengths)


# In place of what generates


def written_by(monkeypatch: pytest.MonkeyPatch, run: Run, write) -> pd.DataFrame:
    """The metrics where `write` gives the tokens of the n-th continuation or sample, and its plan."""

    def generate(run: Run, prompts: Sequence[Prompt], **_: object) -> list[Generated]:
        return [Generated(*write(n, prompt), "length") for n, prompt in enumerate(prompts)]

    monkeypatch.setattr(generation_metrics, "generate", generate)
    settings = SETTINGS | {"mixing.variants": ["oracle"]}
    metrics = evaluate_generation(run, settings, quiet=True).metrics
    return metrics.set_index(["variant", "actions", "texts", "length", "metric"]).value.sort_index()


def test_who_writes_true_text_is_true(large: Run, monkeypatch: pytest.MonkeyPatch):
    run = large.with_settings(SETTINGS)
    true, samples = TrueTexts(run), beginnings(run, "test")[1]

    def write(n: int, prompt: Prompt) -> tuple[np.ndarray, str, np.ndarray]:
        if prompt.plan is None:
            return samples[n], "", np.zeros(0, np.int64)
        return true.tokens[n], "", prompt.plan

    value = written_by(monkeypatch, run, write)
    for actions in ("planner", "true"):
        own = value["oracle", actions, "continuations", 30]
        assert own["rouge2"] == 1.0
        assert own["levenshtein"] == own["levenshtein_normalised"] == 0.0
        for metric in ("latent_perplexity", "plan_following", "plan_following_by_chance"):
            assert own[metric] == pytest.approx(value["true", "true", "continuations", 30, metric])
    assert value["oracle", "planner", "samples", 30, "mauve"] == pytest.approx(1.0)
    reference = value["true", "true", "samples", 30]
    own = value["oracle", "planner", "samples", 30]
    assert own["latent_perplexity"] == pytest.approx(reference["latent_perplexity"])
    assert 0.5 < reference["mauve"] < 1.0


def test_who_writes_nothing_gets_no_nan_but_where_nothing_is_to_be_measured(
    large: Run, monkeypatch: pytest.MonkeyPatch
):
    value = written_by(
        monkeypatch, large, lambda n, prompt: (np.zeros(0, np.int64), "", np.zeros(0, np.int64))
    )
    own = value["oracle", "planner"]
    assert own["continuations", 30, "rouge2"] == 0.0
    assert own["continuations", 30, "levenshtein_normalised"] == 1.0
    assert own["samples", 30, "mauve"] < 0.1
    assert set(own.index[own.isna()]) == {
        ("continuations", 10, "latent_perplexity"),
        ("continuations", 30, "latent_perplexity"),
        ("samples", 30, "latent_perplexity"),
    }
    assert "NaN" not in (large.folder / "generation.json").read_text("utf-8")
    written = pd.DataFrame(large.generation_metrics()["metrics"])
    counted = written[(written.variant == "oracle") & (written.metric == "levenshtein")]
    assert counted["empty"].tolist() == [20] * 4


# True texts


SHORT = {
    "generation.prompts": 12,
    "generation.context": 24,
    "generation.lengths": [10, 40],
    "generation.samples": 9,
}


@pytest.fixture(scope="module")
def run(tiny_run: Run) -> Run:
    return tiny_run.with_settings(SHORT)


@pytest.fixture(scope="module")
def true(run: Run) -> TrueTexts:
    return TrueTexts(run)


def means(values: pd.DataFrame, length: int = 40) -> pd.Series:
    sums = values[values.length == length].groupby("metric")[["sum", "count"]].sum()
    return sums["sum"] / sums["count"]


@pytest.mark.parametrize("split", ["test", "probe"])
def test_beginnings(run: Run, split: str):
    corpus, (documents, found) = run.corpus, beginnings(run, split)
    assert len(found) == len({*documents}) == 9
    assert {*documents} <= {*corpus.documents(split)}
    for document, tokens in zip(documents, found, strict=True):
        start = corpus.document_tokens[document] + 1
        assert tokens.tolist() == corpus.tokens[start : start + 40].tolist()


def test_all_runs_on_a_corpus_have_the_same_documents(run: Run, true: TrueTexts):
    """Whatever their own seed; the corpus's decides."""
    other = TrueTexts(run.with_settings({"seed": 1}))
    assert [p.document for p in other.prompts] == [p.document for p in true.prompts]
    assert other.sampled.tolist() == true.sampled.tolist()
    assert other.sampled.tolist() != sorted(other.sampled)
    other = TrueTexts(run.with_settings({"corpus.seed": 1}))
    assert [p.document for p in other.prompts] != [p.document for p in true.prompts]


def test_true_text_is_perfect_and_labelled_as_planted_but_for_the_labeller(run: Run, true: TrueTexts):
    plans = [prompt.plan for prompt in true.prompts]
    found = means(true.continuation_values(true.tokens, plans))
    assert found["rouge2"] == 1.0
    assert found["levenshtein"] == found["levenshtein_normalised"] == 0.0
    agreement = [
        (actions == plan[: len(actions)]) for actions, plan in zip(true.cuts[40].actions, plans, strict=True)
    ]
    assert found["plan_following"] == pytest.approx(np.concatenate(agreement).mean())
    assert found["plan_following"] > 0.9
    assert found["plan_following_by_chance"] < 0.3


def shuffled(true: TrueTexts, run: Run) -> list[np.ndarray]:
    """True continuations with their whole sentences in another order."""
    corpus, generator, texts = run.corpus, np.random.default_rng(0), []
    for prompt, tokens in zip(true.prompts, true.tokens, strict=True):
        begin = corpus.document_tokens[prompt.document] + len(prompt.tokens)
        first = corpus.first_token[corpus.sentences(np.array([prompt.document]))] - begin
        cuts = [*first[(first >= 0) & (first < len(tokens))], len(tokens)]
        parts = [tokens[a:b] for a, b in itertools.pairwise(cuts)]
        order = generator.permutation(len(parts) - 1)
        texts.append(np.concatenate([*(parts[i] for i in order), parts[-1]]))
    return texts


def test_sentences_in_another_order_are_worse(run: Run, true: TrueTexts):
    right, wrong = (means(true.continuation_values(t)) for t in (true.tokens, shuffled(true, run)))
    assert wrong["levenshtein_normalised"] > 0.3
    assert wrong["latent_perplexity"] > right["latent_perplexity"] + 0.3
    assert 0.3 < wrong["rouge2"] < 1.0


@pytest.mark.parametrize(("context", "length"), [(24, 4000), (4000, 10)])
def test_too_few_long_documents_are_refused(tiny_run: Run, context: int, length: int):
    run = tiny_run.with_settings({"generation.context": context, "generation.lengths": [8, length]})
    with pytest.raises(ProbekitError, match=r"0 of the 16 test documents .*lower generation\.lengths"):
        TrueTexts(run)
