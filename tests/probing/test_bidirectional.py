"""Bidirectional LMs, read against Transformers' own hidden states of the text up to each position alone."""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from random_lms import save_random_bidirectional
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

import probekit
from probekit.causal.continuation import continuation
from probekit.causal.subnetwork import subnetwork
from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.evaluation.ask import ask
from probekit.generation.evaluate import check_generation, evaluate_generation
from probekit.generation.generate import write_texts
from probekit.io import read_json
from probekit.models.language_model import load_model
from probekit.probing.activations import ActivationReader, probing_windows
from probekit.probing.record import SETTINGS
from probekit.probing.results import Cell, SavedProbes
from probekit.probing.score import score
from probekit.probing.targets import Examples, find_examples, find_target
from probekit.run.run import Run
from probekit.training.train import prepare, train

POSITIONS, LAYERS, COUNT = 24, 2, 240
ANIMALS, COLOURS = ("cat", "dog", "bird", "fish"), ("red", "blue")
WORDS = " ".join(["the", "a", "here", "sits", "runs", "it", "was", "is", ".", *ANIMALS, *COLOURS])
EVERY = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
POINTS = [("hook_resid_post", layer) for layer in range(LAYERS)]


def documents(count: int) -> list[tuple[str, str]]:
    """Texts of two sentences, and the colour that the second one alone tells, before some other words."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        animal, colour = rng.choice(ANIMALS), rng.choice(COLOURS)
        rest = " ".join([colour] * 3 + [*rng.choice(ANIMALS, 3)])
        found.append((f"The {animal} {rng.choice(['sits', 'runs'])} here. It was {rest}.", colour))
    return found


@pytest.fixture(scope="module", params=["bert", "roberta"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_bidirectional(tmp_path_factory.mktemp("lm") / kind, [WORDS], POSITIONS, kind)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on texts, of which some are longer than the LM reads at once."""
    root = tmp_path_factory.mktemp("run")
    rows = [{"text": text, "colour": colour, "start": 0, "end": text.index(".") + 1}
            for text, colour in documents(COUNT)]  # fmt: skip
    pd.DataFrame(rows).to_json(root / "labels.jsonl", orient="records", lines=True)
    long = " ".join(text for text, _ in documents(6))
    lines = [{"text": row["text"]} for row in rows] + [{"text": f"{long} {n} here."} for n in range(40)]
    pd.DataFrame(lines).to_json(root / "texts.jsonl", orient="records", lines=True)
    config = Config.from_preset("any-model").override(
        {
            "lm.name": str(folder),
            "corpus.path": str(root / "texts.jsonl"),
            "actions.labels": "none",
            "training.window": 16,
            "evaluation.window": 16,
            "probe.labels": str(root / "labels.jsonl"),
            "probe.text_column": "text",
            "probe.target": "colour",
        }
    )
    return prepare(config, root / "run", quiet=True)


@cache
def loaded(folder: Path) -> tuple[PreTrainedModel, list[int]]:
    """Transformers' own model, and the tokens that its tokenizer puts around a text."""
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)("").input_ids


def states_of(folder: Path, ids: list[int]) -> Tensor:
    """What Transformers returns of each layer for a text [layers, tokens, width]."""
    model, around = loaded(folder)
    with torch.no_grad():
        given = torch.tensor([[around[0], *ids, around[1]]])
        states = model(given, output_hidden_states=True).hidden_states
    return torch.cat(states[1:])[:, 1:-1]


@pytest.fixture(scope="module")
def held(folder: Path) -> list[object]:
    """What a user may hold: a masked LM, a tower without a head, TransformerLens's bridge."""
    masked, tower = (made.from_pretrained(folder) for made in (AutoModelForMaskedLM, AutoModel))
    own = AutoTokenizer.from_pretrained(folder)  # to which TransformerLens adds tokens
    plain = load_model(str(folder))
    return [masked, tower, TransformerBridge.boot_transformers(str(folder), hf_model=plain, tokenizer=own)]


TEXTS = [
    "the cat sits",
    "a",
    "here it was a red bird . the dog runs",
    "blue",
    "the dog is red . it was a fish",
]


@pytest.mark.parametrize(
    ("position", "until", "read"),
    [
        ("last", None, lambda states: states[:, -1]),
        ("mean", None, lambda states: states.mean(1)),
        ("first", 1, lambda states: states[:, 0]),
        ("last-2", -2, lambda states: states[:, -1]),
    ],
)
def test_texts_are_read_as_transformers_reads_them_up_to_the_position(folder, held, position, until, read):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = TEXTS[2::2] if position == "last-2" else TEXTS
    ids = [tokenizer(text, add_special_tokens=False).input_ids[:until] for text in texts]
    expected = torch.stack([read(states_of(folder, own)) for own in ids], 1)
    for model in held:
        for batch_size in (1, 5):
            own = None if isinstance(model, TransformerBridge) else tokenizer
            found = probekit.activations(
                model, own, texts, position=position, batch_size=batch_size, quiet=True
            )
            torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)
            assert found.tokens_read.tolist() == [len(own) for own in ids]


def test_padding_has_no_effect_at_all(run: Run):
    backend = run.backend_for(EVERY)
    tokens = torch.randint(5, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    seen = []
    for padding in (0, 7):
        read: list[Tensor] = []
        hooks = [
            (name, lambda activation, hook=None, read=read: read.append(activation.clone())) for name in EVERY
        ]
        backend(tokens.where(mask, padding), hooks, len(hooks), mask=mask)
        seen.append(torch.stack(read)[:, mask])
    assert torch.equal(*seen)


def test_every_example_is_read_on_the_text_up_to_its_position_alone(run: Run, folder: Path):
    """At all positions of sentences, in texts that are shorter and longer than what is read at once."""
    corpus = run.corpus
    length = np.diff(corpus.document_tokens)
    chosen = np.flatnonzero((length > 30) | (np.arange(len(length)) < 12))
    chosen = np.sort(np.concatenate([chosen[:6], chosen[-2:]]))
    examples = find_examples(corpus, chosen, find_target(corpus, "sentence-position"), (1,))
    positions = (1, 3, 0, "first", "last", "mean")
    reached = examples.start - corpus.document_tokens[examples.document] > 3
    examples = examples[reached]
    assert len(examples) > 20
    window, stride, cut = probing_windows(run)
    assert cut
    (found,) = ActivationReader(run, "none", POINTS, positions).read(examples)
    begins = corpus.document_tokens[examples.document]
    for number, position in enumerate(positions):
        for row, (first, last) in enumerate(zip(*examples.bounds(position), strict=True)):
            own = []
            for token in range(first, last + 1):
                # The first window that reaches the token; a later one has lost its own first token.
                at = token - begins[row]
                start = 0 if at < window else -(-(at + 1 - window) // stride) * stride
                # The range is read on to its end, or to that of the window.
                end = min(last - begins[row], start + window - 1)
                ids = corpus.tokens[begins[row] + start + 1 : begins[row] + end + 1].tolist()
                own.append(states_of(folder, ids)[:, at - start - 1])
            expected = torch.stack(own).mean(0)
            torch.testing.assert_close(found[:, number, row], expected, rtol=1e-3, atol=1e-4)


def test_what_only_the_text_behind_a_position_tells_is_not_there(run: Run, folder: Path):
    """Whole, the text gives the colour of the second sentence away at the end of the first one."""
    corpus, colour_of = run.corpus, dict(documents(COUNT))
    chosen = [
        n for _, batch in corpus.texts.batches() for n, text in enumerate(batch) if text.text in colour_of
    ]
    number = np.array(chosen)
    texts = [corpus.texts[n].text for n in chosen]
    y = np.array([colour_of[text] for text in texts])
    begin, end = corpus.document_tokens[number] + 1, corpus.document_tokens[number + 1]
    at = begin + 4  # the first full stop
    examples = Examples.of_tokens(number, at, number, np.zeros((len(number), 1), int))
    (values,) = ActivationReader(run, "none", POINTS, ("last",)).read(examples)
    whole = [states_of(folder, corpus.tokens[a:b].tolist())[-1, 4] for a, b in zip(begin, end, strict=True)]
    known = {}
    for name, X in (("cut", values[-1, 0]), ("whole", torch.stack(whole))):
        fitted = np.arange(len(y)) < 2 * len(y) // 3
        reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        known[name] = reader.fit(X[fitted], y[fitted]).score(X[~fitted], y[~fitted])
    assert known["whole"] > 0.9
    assert abs(known["cut"] - 0.5) < 0.15
    # More than chance: texts that differ in nothing but what follows are read alike.
    same = pd.Series([text.partition(".")[0] for text in texts]).groupby(lambda row: texts[row][:12]).indices
    assert all(len({*y[rows]}) == 2 for rows in same.values())
    for rows in same.values():
        torch.testing.assert_close(values[-1, 0, rows], values[-1, 0, rows[:1]].expand(len(rows), -1))


@pytest.fixture(scope="module")
def probed(run: Run) -> Run:
    """The run, probed for the colour that the second sentence tells, at the end of the first one."""
    settings = {"probe.positions": ["last"], "probe.solvers": ["softmax"], "probe.variants": ["none"]}
    probekit.probe(run, settings, quiet=True)
    return Run.open(run.folder)


def test_probes_of_what_follows_are_at_chance_and_the_note_says_what_was_read(probed: Run):
    results = probed.probes()
    rows = results[results.reader == "probe"]
    assert len(rows) == LAYERS
    assert (rows.accuracy_low < 0.5).all()
    assert (rows.accuracy_high > 0.5).all()
    record = read_json(probed.folder / "probes" / SETTINGS)
    assert "the LM reads in both directions: each example is read by itself" in " ".join(record["notes"])


def test_scores_are_those_of_the_probe_on_what_transformers_computes(probed: Run, folder: Path):
    texts, tokenizer = [TEXTS[0], TEXTS[2]], probed.corpus.tokenizer
    every = score(probed, texts, layer=1, tokens=True, batch_size=3, quiet=True)
    last = score(probed, texts, layer=1, quiet=True)
    probe = SavedProbes(probed.folder / "probes", "none", 0)[Cell.of("softmax|hook_resid_post|1|last|1")]
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        upto = [states_of(folder, ids[: end + 1])[1, -1] for end in range(len(ids))]
        expected = probe.log_probabilities(torch.stack(upto)).exp().numpy()
        own = every[every.text == number]
        assert own.token.tolist() == list(range(len(ids)))
        np.testing.assert_allclose(own[["p(blue)", "p(red)"]], expected, atol=1e-4)
        np.testing.assert_allclose(
            last.loc[number, ["p(blue)", "p(red)"]].astype(float), expected[-1], atol=1e-4
        )


REFUSED = {
    "evaluate": lambda run, folder: probekit.evaluate(run, quiet=True),
    "generate": lambda run, folder: write_texts(run, ["the cat"]),
    "evaluate generation": lambda run, folder: evaluate_generation(run, quiet=True),
    "check generation": lambda run, folder: check_generation(run),
    "intervene": lambda run, folder: probekit.intervene(run, quiet=True),
    "subnetwork": lambda run, folder: subnetwork(run, quiet=True),
    "continuation": lambda run, folder: continuation(run, quiet=True),
    "lens": lambda run, folder: probekit.lens(run, "the cat sits", quiet=True),
    "attribute": lambda run, folder: probekit.attribute(run, "the cat sits", 1, quiet=True),
    "logit lens": lambda run, folder: probekit.probe(
        run, {"probe.solvers": ["logit-lens"], "probe.labels": None, "probe.target": "token"}, quiet=True
    ),
    "ask": lambda run, folder: ask(str(run.config.lm.name), items_in(folder), quiet=True),
    "train": lambda run, folder: train(
        run.config.override({"actions.labels": "clusters", "actions.k": 8}), folder / "trained", quiet=True
    ),
}


def items_in(folder: Path) -> Path:
    (folder / "items.jsonl").write_text('{"choices": ["the cat", "the dog"]}\n', "utf-8")
    return folder / "items.jsonl"


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_next_tokens_refuses_in_one_line(what: str, probed: Run, kind: str, tmp_path: Path):
    with pytest.raises(ProbekitError) as raised:
        REFUSED[what](probed, tmp_path)
    named = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}[kind]
    assert str(raised.value) == (
        f"lm.name {probed.config.lm.name!r}: {named} reads in both directions and predicts no next token; it "
        "can be probed, scored and compared, but this needs a causal LM"
    )
