"""`evaluate` against sums over a plain pass, scikit-learn, the planted ceilings and its own file."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from running import ran
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

from probekit.data.corpus import SPLITS
from probekit.data.windows import cut_windows
from probekit.errors import ProbekitError
from probekit.evaluation.evaluate import evaluate
from probekit.evaluation.perplexity import Evaluation, EvaluationPass, own_losses
from probekit.io import read_json, write_json
from probekit.models.mixing import Fixed, Oracle, Predicted, Soft
from probekit.progress import Progress
from probekit.reports.report import report
from probekit.reports.terminal import print_evaluation
from probekit.run.run import Run
from probekit.statistics import bootstrap_ratio

ROWS = [
    ("none", "none"),
    ("fixed", "constant"),
    ("oracle", "planner"),
    ("oracle", "true"),
    ("predicted", "planner"),
    ("soft", "planner"),
    ("joint", "planner"),
]


def copied(run: Run, folder: Path) -> Run:
    return Run.open(shutil.copytree(run.folder, folder / "run"))


@pytest.fixture(scope="module")
def evaluated(tiny_run: Run, tmp_path_factory) -> tuple[Run, Evaluation]:
    run = copied(tiny_run, tmp_path_factory.mktemp("evaluated"))
    return run, evaluate(run, quiet=True)


def outside_test(run: Run) -> int:
    """Tokens of the documents that are not for testing."""
    lengths = np.diff(run.corpus.document_tokens) - 1
    return int(lengths[run.corpus.split != SPLITS.index("test")].sum())


def strict_json(path: Path):
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_file_holds_what_is_returned(evaluated: tuple[Run, Evaluation]):
    run, evaluation = evaluated
    written = strict_json(run.folder / "evaluation.json")
    assert written == run.evaluation()
    assert written["settings"] == evaluation.settings
    expected = {"split": "test", "window": 48, "stride": 24, "resamples": 200, "dtype": "float32"}
    assert written["settings"] == expected
    for name in ("perplexity", "differences", "planner"):
        pd.testing.assert_frame_equal(pd.DataFrame(written[name]), getattr(evaluation, name))


def test_every_variant_is_measured_on_the_same_tokens(evaluated: tuple[Run, Evaluation]):
    run, evaluation = evaluated
    table, corpus = evaluation.perplexity, run.corpus
    assert list(zip(table.variant, table.actions, strict=True)) == ROWS
    documents = corpus.documents("test")
    lengths = corpus.document_tokens[documents + 1] - corpus.document_tokens[documents] - 1
    assert set(table.tokens) == {lengths.sum()}
    assert set(table.documents) == {len(documents)}


def test_perplexity_is_exp_of_the_mean_loss(evaluated: tuple[Run, Evaluation]):
    run, evaluation = evaluated
    windows = cut_windows(run.corpus, run.corpus.documents("test"), 48, 24)
    scoring = EvaluationPass(run.corpus, windows, 16, "float32", torch.device("cpu"))
    mixings = [Fixed(), Fixed(), Predicted(), Oracle(), Predicted(), Soft(), Soft()]
    for row, mixing in zip(evaluation.perplexity.itertuples(), mixings, strict=True):
        with Progress(quiet=True).task("score") as task:
            (sums,) = scoring.document_losses(own_losses(run.model(row.variant)), mixing, task)
        assert row.perplexity == pytest.approx(np.exp(sums.sum() / scoring.tokens.sum()), rel=1e-6)
        assert row.perplexity_low < row.perplexity < row.perplexity_high


def test_losses_by_document(evaluated: tuple[Run, Evaluation]):
    run, evaluation = evaluated
    pd.testing.assert_frame_equal(run.losses(), evaluation.losses)
    documents = run.corpus.documents("test")
    lengths = np.diff(run.corpus.document_tokens)[documents] - 1
    for row in evaluation.perplexity.itertuples():
        own = evaluation.losses.query("variant == @row.variant and actions == @row.actions")
        assert own.document.tolist() == documents.tolist()
        assert own.tokens.tolist() == lengths.tolist()
        assert np.exp(own.loss.sum() / own.tokens.sum()) == pytest.approx(row.perplexity)


def test_differences_are_those_of_the_perplexities(evaluated: tuple[Run, Evaluation]):
    _, evaluation = evaluated
    labels = [
        "none",
        "fixed",
        "oracle (planner actions)",
        "oracle (true actions)",
        "predicted",
        "soft",
        "joint",
    ]
    value = dict(zip(labels, evaluation.perplexity.perplexity, strict=True))
    pairs = list(zip(evaluation.differences["first"], evaluation.differences["second"], strict=True))
    assert pairs == list(itertools.combinations(labels, 2))
    for row in evaluation.differences.itertuples():
        assert row.difference == pytest.approx(value[row.first] - value[row.second], abs=1e-9)
        assert row.difference_low <= row.difference <= row.difference_high
        # Pairing: documents that are hard are hard for both, which an unpaired difference would not know.
        assert (
            row.difference_high - row.difference_low
            < 0.1 * (evaluation.perplexity.perplexity_high - evaluation.perplexity.perplexity_low).min()
        )


def slow_planner(run: Run, variant: str | None) -> np.ndarray:
    """Probabilities of the actions of all test sentences but the first of each, one context at a time."""
    planner, corpus, rows = run.planner(variant), run.corpus, []
    for document in corpus.documents("test"):
        embeddings = torch.tensor(corpus.embeddings[corpus.sentences(np.array([document]))])
        for j in range(1, len(embeddings)):
            # What is asked about stands last, and is hidden.
            shown = torch.cat([embeddings[:j], torch.zeros(1, embeddings.shape[1])])
            rows.append(planner(shown[None])[0, j].double().softmax(dim=0).numpy())
    return np.stack(rows)


def later_sentences(run: Run, split: str = "test") -> np.ndarray:
    corpus = run.corpus
    return np.concatenate([corpus.sentences(np.array([n]))[1:] for n in corpus.documents(split)])


def metrics(evaluation: Evaluation, reader: str) -> dict[str, float]:
    rows = evaluation.planner[evaluation.planner.reader == reader]
    return dict(zip(rows.metric, rows.value, strict=True))


def scikit_learn(actions: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    classes = range(probabilities.shape[1])
    return {
        "accuracy": accuracy_score(actions, probabilities.argmax(axis=1)),
        "top5": top_k_accuracy_score(actions, probabilities, k=5, labels=classes),
        "cross_entropy": log_loss(actions, probabilities, labels=classes),
    }


@pytest.mark.parametrize(("reader", "variant"), [("planner", None), ("planner after joint", "joint")])
def test_planners_against_scikit_learn(evaluated: tuple[Run, Evaluation], reader: str, variant: str | None):
    run, evaluation = evaluated
    actions = run.corpus.actions[later_sentences(run)]
    expected = scikit_learn(actions, slow_planner(run, variant))
    assert metrics(evaluation, reader) == pytest.approx(expected, rel=1e-5)
    assert set(evaluation.planner.sentences) == {len(actions)}


def test_nobody_beats_the_ceiling(evaluated: tuple[Run, Evaluation]):
    table = evaluated[1].planner.set_index(["metric", "reader"])
    losses = table.loc["cross_entropy"]
    for ceiling in ("ceiling (actions)", "ceiling (words)"):
        for reader in ("prior", "bigram", "planner", "planner after joint"):
            assert losses.value_high[reader] > losses.value_low[ceiling]
            assert losses.value[reader] > losses.value[ceiling]
            assert table.value["accuracy", reader] < table.value["accuracy", ceiling]


def test_settings_hold_for_one_evaluation(tiny_run: Run, tmp_path: Path):
    run = copied(tiny_run, tmp_path)
    evaluation = evaluate(run.folder, {"evaluation.window": 20, "evaluation.stride": 20}, quiet=True)
    assert evaluation.settings.items() >= {"window": 20, "stride": 20}.items()
    assert Run.open(run.folder).config == tiny_run.config
    assert set(evaluation.perplexity.tokens) == {tiny_run.corpus.facts["tokens"] - outside_test(tiny_run)}


def test_one_test_document_has_values_but_no_intervals(tiny_run: Run, tmp_path: Path):
    run = copied(tiny_run, tmp_path)
    split = np.load(run.folder / "corpus" / "split.npy")
    split[np.flatnonzero(split == 3)[1:]] = 0
    np.save(run.folder / "corpus" / "split.npy", split)
    evaluation = evaluate(run, quiet=True)
    written = strict_json(run.folder / "evaluation.json")
    for name, value in (("perplexity", "perplexity"), ("differences", "difference"), ("planner", "value")):
        table = getattr(evaluation, name)
        assert (table.documents == 1).all()
        assert table[value].notna().all()
        assert table[[f"{value}_low", f"{value}_high"]].isna().all(axis=None)
        assert all(row[f"{value}_low"] is None and row[value] is not None for row in written[name])


def test_a_run_without_adapters_has_the_base_lm_alone(tiny_run: Run, tmp_path: Path):
    run = copied(tiny_run, tmp_path)
    state = read_json(run.folder / "run.json")
    state["stages"] = {name: facts for name, facts in state["stages"].items() if "/" not in name}
    write_json(run.folder / "run.json", state)
    evaluation = evaluate(run.folder, quiet=True)
    assert evaluation.perplexity.variant.tolist() == ["none"]
    assert len(evaluation.differences) == 0
    assert "planner after joint" not in set(evaluation.planner.reader)


def test_the_same_run_is_evaluated_the_same(evaluated: tuple[Run, Evaluation], tmp_path: Path):
    run, evaluation = evaluated
    again = evaluate(copied(run, tmp_path), {"evaluation.batch_size": 3}, quiet=True)
    for name in ("perplexity", "differences", "planner"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(evaluation, name), rtol=1e-5, atol=1e-3)


def test_a_run_without_a_planner_has_its_lm_evaluated(
    evaluated: tuple[Run, Evaluation], copy: Path, capsys: pytest.CaptureFixture[str]
):
    record = read_json(copy / "run.json")
    stages = {name: facts for name, facts in record["stages"].items() if name in ("corpus", "lm")}
    write_json(copy / "run.json", record | {"stages": stages})
    found = evaluate(copy)
    said = " ".join(capsys.readouterr().err.split())
    assert f"no planner is trained in {copy}: the LM alone is evaluated" in said
    whole = evaluated[1].perplexity
    pd.testing.assert_frame_equal(found.perplexity, whole[whole.variant == "none"])
    assert found.planner is None
    assert found.differences.empty
    assert Run.open(copy).evaluation()["perplexity"] == read_json(copy / "evaluation.json")["perplexity"]
    print_evaluation(found)
    assert "Perplexity per token" in capsys.readouterr().out
    report(copy, copy / "report.md")
    assert "perplexity" in (copy / "report.md").read_text("utf-8")
    write_json(copy / "run.json", record | {"stages": {"corpus": stages["corpus"]}})
    with pytest.raises(ProbekitError, match=r"lacks the stage 'lm'; finish it with"):
        evaluate(copy, quiet=True)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("probe", "--probe.variants", "soft"), "probe.variants has 'soft', which this run has not trained"),
        (("intervene",), "run `probekit probe"),
        (("subnetwork",), "run `probekit probe"),
        (("generate", "--prompt", "A", "--variant", "soft"), "adapter/soft"),
        (("evaluate", "--generation"), "lacks the stage"),
    ],
)
def test_what_a_run_without_a_planner_lacks_is_named(copy: Path, words: tuple[str, ...], wanted: str):
    record = read_json(copy / "run.json")
    stages = {name: facts for name, facts in record["stages"].items() if name in ("corpus", "lm")}
    write_json(copy / "run.json", record | {"stages": stages})
    found = ran(words[0], copy, "--quiet", *words[1:])
    assert found.refused(wanted), found


def test_copies_are_resampled_together(evaluated: tuple[Run, Evaluation], tmp_path: Path):
    """Test documents in pairs: the same values, and intervals from the pairs' sums."""
    run, alone = copied(evaluated[0], tmp_path), evaluated[1]
    group, test = run.corpus.group.copy(), run.corpus.documents("test")
    group[test[1::2]] = group[test[::2][: len(test) // 2]]
    np.save(run.folder / "corpus" / "group.npy", group)
    run = Run.open(run.folder)
    found = evaluate(run, quiet=True)
    pairs = -(-len(test) // 2)
    assert set(found.perplexity.documents) == set(found.planner.documents) == {pairs}
    pd.testing.assert_frame_equal(found.losses, alone.losses)
    np.testing.assert_allclose(found.perplexity.perplexity, alone.perplexity.perplexity)
    np.testing.assert_allclose(found.planner.value, alone.planner.value)
    for table in (found.perplexity.iloc[[0]], found.perplexity.iloc[[-1]]):
        (row,) = table.itertuples()
        own = found.losses[(found.losses.variant == row.variant) & (found.losses.actions == row.actions)]
        sums = own.groupby(np.arange(len(own)) // 2)[["loss", "tokens"]].sum()
        options = {"resamples": 200, "seed": run.config.seed, "transform": np.exp}
        expected = bootstrap_ratio(sums.loss, sums.tokens, **options)
        assert (row.perplexity_low, row.perplexity_high) == pytest.approx((expected.low, expected.high))
