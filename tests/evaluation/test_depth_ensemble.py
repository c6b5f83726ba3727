"""A depth ensemble's evaluation against logits made at once, layer by layer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

import probekit
from probekit.cli import main
from probekit.data.windows import IGNORE, collate, cut_windows
from probekit.errors import ProbekitError
from probekit.evaluation import evaluate as depth_ensemble
from probekit.evaluation.ask import ask
from probekit.evaluation.evaluate import evaluate
from probekit.evaluation.multiple_choice import corpus_questions
from probekit.evaluation.perplexity import Evaluation
from probekit.run.run import Run
from probekit.sweeps import Sweep, sweep
from probekit.training.train import train

QUESTIONS = 30


@pytest.fixture(scope="module")
def run(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny run with ensembles that have learnt something."""
    config = tiny_run.config.override(
        {
            "method": "depth-ensemble",
            "depth.last_weight": 0.5,
            "training.depth.learning_rate": 3e-2,
            "training.depth.batch_size": 8,
            "evaluation.questions": QUESTIONS,
            "evaluation.stride": 48,
        }
    )
    run = Run.begin(tmp_path_factory.mktemp("ensembles") / "run", config)
    for stage in ("corpus", "lm"):
        run.take_over(stage, tiny_run)
    return train(config, run.folder, existing="resume", quiet=True)


@pytest.fixture(scope="module")
def evaluation(run: Run) -> Evaluation:
    return evaluate(run, quiet=True)


READERS = [
    "none", "plain", "repeated",
    "ensemble", "ensemble, layer 0", "ensemble, layer 1", "ensemble, layer 2",
    "distilled", "distilled, layer 0", "distilled, layer 1", "distilled, layer 2",
]  # fmt: skip


@pytest.fixture(scope="module")
def parts(run: Run) -> tuple[torch.nn.Module, dict[str, torch.nn.Module]]:
    """The plain LM, and the ensembles."""
    return run.plain_model().eval(), {member: run.model(member).depth for member in run.members}


def logits_of(parts, reader: str, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a member or of one of its layers, by a plain LM that gives all its hidden states."""
    model, ensembles = parts
    norm, head = model.transformer.ln_f, model.lm_head
    hidden = model(tokens, output_hidden_states=True).hidden_states
    states = [norm(hidden[1]), norm(hidden[2]), hidden[3]]  # the last has gone through the norm already
    name, _, layer = reader.partition(", layer ")
    if name == "none":
        return head(states[-1])
    ensemble = ensembles[name]
    read = states if name in ("ensemble", "distilled") else [states[-1]] * len(ensemble.scale)
    each = [head(s * a + b) for s, a, b in zip(read, ensemble.scale, ensemble.shift, strict=True)]
    if layer:
        return each[int(layer)]
    if ensemble.router is None:
        return each[0]
    weights = torch.softmax(states[-1] @ ensemble.router.weight.T + ensemble.router.bias, dim=-1)
    return sum(weights[..., i : i + 1] * one for i, one in enumerate(each))


@torch.no_grad()
def test_perplexities_are_those_of_the_logits(run: Run, parts, evaluation: Evaluation):
    table = evaluation.perplexity.set_index("variant")
    assert [*table.index] == READERS
    corpus = run.corpus
    batch = collate(corpus, cut_windows(corpus, corpus.documents("test"), 48, 48))
    for reader in READERS:
        logits = logits_of(parts, reader, batch.tokens)
        loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        assert table.perplexity[reader] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert table.perplexity["ensemble, layer 0"] > table.perplexity["ensemble"]
    assert table.layer["distilled, layer 1"] == 1
    assert table.member["distilled, layer 1"] == "distilled"
    assert pd.isna(table.layer["plain"])


@torch.no_grad()
def test_questions_are_solved_by_the_least_mean_loss(run: Run, parts, evaluation: Evaluation):
    corpus = run.corpus
    questions = corpus_questions(corpus, corpus.documents("test"), QUESTIONS, 48, run.config.corpus.seed)
    choices = evaluation.choices
    assert len(choices) == len(READERS) * len(questions)
    for reader in READERS:
        own = choices[choices.variant == reader].set_index("question")
        right = []
        for number, question in enumerate(questions):
            context = question.context[-(48 - question.longest + 1) :]
            losses = []
            for ids in question.choices:
                tokens = torch.tensor([*context, *ids])
                logits = logits_of(parts, reader, tokens[None, :-1])[0, len(context) - 1 :]
                losses.append(cross_entropy(logits, torch.tensor(ids)).item())
            right.append(min(losses) == losses[question.answer])
            assert own.document[number] == question.document
            assert own.solved[number] == right[-1]
        assert evaluation.accuracy.set_index("variant").accuracy[reader] == pytest.approx(np.mean(right))


def test_differences_are_of_members_alone_and_of_equal_documents(evaluation: Evaluation):
    names = {"none", "plain", "repeated", "ensemble", "distilled"}
    for table in (evaluation.differences, evaluation.accuracy_differences):
        assert {*table["first"], *table["second"]} == names
        assert len(table) == 10
    accuracy = evaluation.accuracy.set_index("variant").accuracy
    for row in evaluation.accuracy_differences.itertuples():
        assert row.difference == pytest.approx(accuracy[row.first] - accuracy[row.second])
        assert row.difference_low <= row.difference <= row.difference_high


def test_questions_from_a_file(run: Run, tmp_path: Path):
    file = tmp_path / "questions.jsonl"
    lines = [
        {
            "question": "Some words",
            "choices": ["and more of it.", "then something else altogether."],
            "answer": 0,
        },
        {"question": "Others", "choices": ["one", "two", "three"], "answer": 2},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = (run.folder / "choices.parquet").read_bytes()
    try:
        found = evaluate(run, {"evaluation.questions_file": str(file)}, quiet=True)
        assert {*found.accuracy.questions} == {2}
        items = [{"context": line["question"], **line} for line in lines]
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        asked = ask(str(run.folder / "lm"), tmp_path / "items.jsonl", scoring="mean", quiet=True).table
        beneath = found.accuracy.set_index("variant").accuracy["none"]
        assert asked.set_index("reader").accuracy["LM"] == beneath, "the LM beneath, asked without a run"
        file.write_text('{"question": "a", "choices": ["b", "b"], "answer": 0}\n')
        with pytest.raises(ProbekitError, match=r"questions\.jsonl, line 1"):
            evaluate(run, {"evaluation.questions_file": str(file)}, quiet=True)
    finally:
        (run.folder / "choices.parquet").write_bytes(before)
        evaluate(run, quiet=True)


def test_documents_too_short_to_be_asked_about_cost_multiple_choice_alone(
    run: Run,
    evaluation: Evaluation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    # No sentence is short enough for a window of one token.
    asked = depth_ensemble.corpus_questions
    monkeypatch.setattr(
        depth_ensemble,
        "corpus_questions",
        lambda corpus, documents, count, _, seed: asked(corpus, documents, count, 1, seed),
    )
    assert main(["evaluate", str(folder)]) == 0
    said = capsys.readouterr()
    assert "no multiple choice: none of 16 documents has a sentence" in " ".join(said.err.split())
    assert "Multiple choice" not in said.out
    copy = Run.open(folder)
    written = copy.evaluation()
    assert written.keys() == {"settings", "perplexity", "differences"}
    pd.testing.assert_frame_equal(copy.losses(), evaluation.losses)
    assert not (folder / "choices.parquet").exists()
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text("utf-8")
    assert "Perplexity" in page
    assert "Multiple choice" not in page


def test_a_sweep_over_ensembles_has_perplexity_and_accuracy(tiny_run: Run, tmp_path: Path):
    config = tiny_run.config.override(
        {"method": "depth-ensemble", "depth.members": ["plain", "ensemble"], "evaluation.questions": 12}
    )
    members = {"one": {"depth.layers": 2}, "two": {"depth.layers": 2, "depth.top_k": 1}}
    done: Sweep = sweep(config, members, [0], tmp_path / "sweep", quiet=True)
    table = done.table()
    assert {*table.metric} == {"perplexity", "accuracy"}
    readers = ["none", "plain", "ensemble", "ensemble, layer 1", "ensemble, layer 2"]
    means = table[table.seed.isna()].set_index(["member", "metric", "variant"]).value.sort_index()
    for member in members:
        assert {*means[member, "accuracy"].index} == {*means[member, "perplexity"].index} == {*readers}
        runs = [run for place, run in done.runs.items() if place.member == member]
        solved = np.mean([run.choices().query("variant == 'ensemble'").solved.mean() for run in runs])
        assert means[member, "accuracy", "ensemble"] == pytest.approx(solved)
    # What the number of kept weights does not touch is trained once.
    stages = json.loads((done.folder / "two" / "seed0" / "run.json").read_text())["stages"]
    assert "taken_from" in stages["depth/plain"]
    assert "taken_from" not in stages["depth/ensemble"]
    assert probekit.load_run(done.folder / "two" / "seed0").members == ["plain", "ensemble"]


def test_a_sweep_that_asked_different_questions_is_refused(tiny_run: Run, tmp_path: Path):
    config = tiny_run.config.override(
        {"method": "depth-ensemble", "depth.members": ["plain"], "evaluation.questions": 200}
    )
    with pytest.raises(ProbekitError, match="was asked other questions"):
        sweep(config, {"a": {"training.window": 24}, "b": {}}, [0], tmp_path / "sweep", quiet=True)
