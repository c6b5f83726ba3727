"""Choices of LMs against the plain model, the depth evaluation, and the exact posterior of planted pairs."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from probekit.config import PlantedSettings
from probekit.data.special_tokens import separator_id
from probekit.data.tokenizer import decoded
from probekit.errors import ProbekitError
from probekit.evaluation.ask import Asked, ask
from probekit.evaluation.items import read_items
from probekit.evaluation.multiple_choice import choice_losses, corpus_questions, solved
from probekit.evaluation.perplexity import own_losses
from probekit.evaluation.preferences import LogProbabilities, preference_table, shares
from probekit.io import read_json
from probekit.models.compression import compressed
from probekit.models.language_model import random_weights
from probekit.planted.corpus import PlantedModel, generate
from probekit.planted.posteriors import posterior_given_words
from probekit.progress import Progress
from probekit.run.run import Run

PAIRS = 150

Rows = list[dict[str, object]]
Planted = tuple[PlantedModel, Rows]


def written(path: Path, rows: Rows) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


@pytest.fixture(scope="module")
def planted(tiny_run: Run) -> Planted:
    """Pairs of second sentences, each asked behind the first sentence of either document."""
    settings = tiny_run.config.corpus.planted
    documents = generate(PlantedSettings(**settings.model_dump() | {"documents": 2 * PAIRS + 7})).documents()
    sentences = [[f"{part}." for part in document.text.split(".")[:2]] for document in documents]
    rows: Rows = []
    for pair in range(PAIRS):
        choices = [sentences[2 * pair + twin][1].strip() for twin in (0, 1)]
        for twin in (0, 1):
            context = sentences[2 * pair + twin][0]
            rows.append({"context": context, "choices": choices, "answer": twin, "group": f"pair {pair}"})
    return PlantedModel.draw(settings), rows


@pytest.fixture(scope="module")
def lm(tiny_run: Run) -> str:
    return str(tiny_run.folder / "lm")


@pytest.fixture(scope="module")
def of_planted(planted: Planted, lm: str, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = tmp_path_factory.mktemp("planted")
    return ask(lm, written(folder / "items.jsonl", planted[1]), folder / "out", quiet=True)


def by_choice(found: Asked, name: str) -> np.ndarray:
    """A column of the answers `[items, choices]`."""
    return found.answers.pivot_table(index="item", columns="choice", values=name).to_numpy()


def test_on_twins_the_prior_alone_is_right_in_exactly_one_half(of_planted: Asked):
    found = of_planted.table.set_index("reader")
    assert found.accuracy["prior"] == found.accuracy_low["prior"] == found.accuracy_high["prior"] == 0.5
    assert found.margin["prior"] == pytest.approx(0, abs=1e-12)
    assert (found.groups == PAIRS).all()
    assert (found["items"] == 2 * PAIRS).all()


def exact(model: PlantedModel, rows: Rows) -> LogProbabilities:
    """What who knows the planted model knows of each choice, after its context and without it."""
    documents = [[model.parse(text)[0] for text in (row["context"], row["choices"][0])] for row in rows]
    after = [found[1] for found in posterior_given_words(model, documents)]
    before = model.prior @ np.einsum("ta,tab->tb", model.initial, model.transition)
    own, prior = np.empty((2, len(rows), 2))
    for row, (known, item) in enumerate(zip(after, rows, strict=True)):
        for choice, text in enumerate(item["choices"]):
            words = model.emission[:, model.parse(text)[0]].prod(1)
            own[row, choice], prior[row, choice] = np.log(known @ words), np.log(before @ words)
    return LogProbabilities(own, prior, np.ones_like(own, dtype=np.int64))


def test_nothing_beats_the_exact_posterior(planted: Planted, of_planted: Asked, tmp_path: Path):
    model, rows = planted
    items = read_items(written(tmp_path / "items.jsonl", rows))
    parts = of_planted.answers.pivot_table(
        index="item", columns="choice", values=["log_probability", "prior"]
    )
    read = LogProbabilities(
        parts["log_probability"].to_numpy(),
        parts["prior"].to_numpy(),
        np.ones((len(rows), 2), dtype=np.int64),
    )
    found = {"exact": exact(model, rows), "LM": read}
    table = preference_table(items, found, "total", resamples=500, seed=0).set_index(["revision", "reader"])
    ceiling = table.loc["exact", "LM over prior"]
    assert ceiling.accuracy_low > table.loc["exact", "LM"].accuracy, (
        "a frequent sentence is often the wrong one"
    )
    for reader in ("LM", "LM over prior", "prior"):
        assert table.loc["LM", reader].accuracy == of_planted.table.set_index("reader").accuracy[reader]
        assert table.loc["LM", reader].accuracy <= ceiling.accuracy_high
    over_first = table.loc["LM", "LM over prior"]
    assert over_first.over_first_low <= 0


def test_random_weights_tell_nothing_apart(planted: Planted, lm: str, tmp_path: Path):
    items = written(tmp_path / "items.jsonl", planted[1])
    found = ask(lm, items, random=2, settings={"seed": 5}, quiet=True)
    assert [*found.table.revision.unique()] == ["own weights", "random weights 5", "random weights 6"]
    random = found.table[found.table.revision != "own weights"]
    assert ((random.accuracy_low <= 0.5) & (random.accuracy_high >= 0.5)).all()
    margins = random[random.reader == "LM"].margin
    assert margins.nunique() == 2
    first = found.answers[found.answers.revision == "random weights 5"].log_probability
    folder = shutil.copytree(lm, tmp_path / "random")
    random_weights(AutoModelForCausalLM.from_pretrained(lm).config, 5).save_pretrained(folder)
    own = ask(str(folder), items, quiet=True).answers.log_probability
    assert first.to_numpy() == pytest.approx(own.to_numpy())
    with pytest.raises(ProbekitError, match="random weights are made on one device"):
        ask(lm, items, random=1, settings={"lm.device_map": "auto"}, quiet=True)


def test_the_depth_evaluation_finds_the_same(tiny_run: Run, lm: str, tmp_path: Path):
    """Its own questions, as far as they fit the window and their texts have the same tokens again."""
    corpus = tiny_run.corpus
    questions, rows = [], []
    for question in corpus_questions(corpus, corpus.documents("test"), 200, 48, 0):
        context, *choices = (
            decoded(corpus.tokenizer, ids) for ids in (question.context[1:], *question.choices)
        )
        whole = [corpus.tokenizer(context + choice).input_ids for choice in choices]
        same = all(
            ids == [*question.context[1:], *choice]
            for ids, choice in zip(whole, question.choices, strict=True)
        )
        if same and len(question.context) + question.longest - 1 <= 48 and context == context.rstrip():
            questions.append(question)
            rows.append({"context": context, "choices": choices, "answer": question.answer})
    assert len(rows) > 30
    with Progress(quiet=True).task("choose") as task:
        losses = choice_losses(tiny_run, "none", questions, own_losses(tiny_run.model("none")), task)
    found = ask(lm, written(tmp_path / "items.jsonl", rows), scoring="mean", quiet=True)
    own = found.answers.log_probability / found.answers.tokens
    assert own.to_numpy().tolist() == (-losses[0].ravel()).tolist()
    assert found.table.accuracy[0] == solved(losses, questions).mean()
    assert 0 < found.table.accuracy[0] < 1


@torch.no_grad()
def test_log_probabilities_are_the_plain_models(of_planted: Asked, planted: Planted, tiny_run: Run):
    model, tokenizer = tiny_run.plain_model().eval(), tiny_run.corpus.tokenizer
    for _, row in of_planted.answers.head(24).iterrows():
        item = planted[1][row["item"]]
        choice = f" {item['choices'][row.choice]}"
        begin = [separator_id(tokenizer)]
        for context, expected in ((item["context"], row.log_probability), ("", row.prior)):
            before = begin + tokenizer(context).input_ids if context else begin
            ids = torch.tensor([*before, *tokenizer(choice).input_ids])
            logits = model(ids[None, :-1]).logits[0].log_softmax(-1)
            each = logits.gather(1, ids[1:, None])[len(before) - 1 :]
            assert row.tokens == len(each)
            assert expected == pytest.approx(each.sum().item(), rel=1e-4)


def test_swapping_the_choices_flips_every_sign(lm: str, tmp_path: Path):
    words = ["bolu", "da", "mina rola", "suti.", "Tido"]
    rows: Rows = [
        {"context": context, "choices": [one, other]}
        for context in ("", "Rona.")
        for one in words
        for other in words
        if one != other
    ]
    swapped = [{**row, "choices": row["choices"][::-1]} for row in rows]
    one, other = (
        ask(lm, written(tmp_path / f"{name}.jsonl", own), quiet=True)
        for name, own in (("one", rows), ("other", swapped))
    )
    for name in ("log_probability", "prior"):
        values = [by_choice(found, name) for found in (one, other)]
        first = np.zeros(len(values[0]), dtype=int)
        np.testing.assert_allclose(values[0], values[1][:, ::-1], rtol=1e-5)
        assert shares(values[0], first).tolist() == (1 - shares(values[1], first)).tolist()
    assert other.table.preference.to_numpy() == pytest.approx(1 - one.table.preference.to_numpy())
    assert other.table.margin.to_numpy() == pytest.approx(-one.table.margin.to_numpy(), abs=1e-4)


def test_revisions_are_asked_the_same(lm: str, tmp_path: Path):
    model = tmp_path / "model"
    for step in (1, 2):
        shutil.copytree(lm, model / f"step{step}")
    random_weights(AutoModelForCausalLM.from_pretrained(lm).config, 0).save_pretrained(model / "step1")
    items = written(
        tmp_path / "items.jsonl", [{"context": "Rona", "choices": ["da", "bolu"], "answer": 1}] * 3
    )
    out = tmp_path / "out"
    found = ask(str(model), items, out, revisions=["step1", "step2", lm], quiet=True)
    by = found.table[found.table.reader == "LM"].set_index("revision")
    assert [*by.index] == ["step1", "step2", lm]
    assert by.margin["step2"] == by.margin[lm] != by.margin["step1"]
    assert by.over_first.isna().tolist() == [True, False, False]
    assert by.over_first["step2"] == by.accuracy["step2"] - by.accuracy["step1"]
    pd.testing.assert_frame_equal(pd.read_parquet(out / "results.parquet"), found.table)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "answers.parquet"), found.answers)
    known = read_json(out / "ask.json")
    weights = [known["weights"] for known in known["revisions"]]
    assert weights[1] == weights[2] != weights[0]
    assert [known["revision"] for known in known["revisions"]] == ["step1", "step2", Path(lm).name]
    assert str(tmp_path) not in json.dumps(known["revisions"])
    with pytest.raises(ProbekitError, match=r"--revisions has 'step3': no such folder, in .* on the hub"):
        ask(str(model), items, tmp_path / "none", revisions=["step1", "step3"], quiet=True)
    assert not (tmp_path / "none").exists()


def test_a_compressed_lm_is_asked(lm: str, tmp_path: Path):
    items = written(tmp_path / "items.jsonl", [{"context": "Rona", "choices": ["da bolu", "mina"]}])
    folder = shutil.copytree(lm, tmp_path / "pruned")
    compressed(AutoModelForCausalLM.from_pretrained(lm), "prune=0.5").save_pretrained(folder)
    expected = ask(str(folder), items, quiet=True).answers.log_probability
    found = ask(lm, items, random=1, settings={"lm.compress": "prune=0.5"}, quiet=True)
    own = found.answers[found.answers.revision == "own weights"]
    assert own.log_probability.to_numpy() == pytest.approx(expected.to_numpy())
    assert [known["compress"] for known in found.settings["revisions"]] == ["prune=0.5", None]
    whole = ask(lm, items, quiet=True).answers.log_probability
    assert whole.to_numpy() != pytest.approx(expected.to_numpy())


def test_an_encoder_is_refused(lm: str, tmp_path: Path):
    folder = tmp_path / "bert"
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    shutil.copytree(lm, folder)
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=400, **size)).save_pretrained(folder)
    items = written(tmp_path / "items.jsonl", [{"choices": ["a", "b"]}])
    with pytest.raises(ProbekitError, match="reads in both directions and predicts no next token"):
        ask(str(folder), items, quiet=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scoring": "sum"}, "scoring is 'sum'; give total or mean"),
        ({"random": -1}, "random is -1; give how many draws"),
        ({"settings": {"evaluation.resamples": 3}}, "evaluation.resamples"),
        ({"settings": {"device": "abacus"}}, "device is 'abacus'"),
    ],
)
def test_what_cannot_be_asked(given: dict[str, object], said: str, lm: str, tmp_path: Path):
    with pytest.raises(ProbekitError, match=re.escape(said)):
        ask(lm, written(tmp_path / "items.jsonl", [{"choices": ["a", "b"]}]), **given, quiet=True)
