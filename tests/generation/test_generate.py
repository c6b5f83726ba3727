"""Text that is written: draws, the conditioned LM over the finished text, and plans."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from small_trainings import with_strong_adapters

from probekit.config import Config, GenerationSettings
from probekit.data.corpus import Corpus
from probekit.data.sentences import align, complete_spans, sentence_spans
from probekit.data.windows import collate, cut_windows
from probekit.errors import ProbekitError
from probekit.generation.generate import Generated, draw, generate, reading_window
from probekit.generation.prompts import Prompt, document_prompts, text_prompt
from probekit.models.mixing import VARIANTS, Fixed, Oracle
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.training.train import train

SHARES = np.array([0.05, 0.3, 0.02, 0.4, 0.0, 0.2, 0.03])


LOGITS = torch.tensor(np.log(np.maximum(SHARES, 1e-300)))


def left(temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Probabilities by the definitions, one token after the other."""
    shares = SHARES ** (1 / temperature)
    order = sorted(range(len(SHARES)), key=lambda i: -shares[i])[: top_k or len(SHARES)]
    total = sum(shares[i] for i in order)
    kept: list[int] = []
    for i in order:
        if top_p is None or sum(shares[j] for j in kept) / total < top_p:
            kept.append(i)
    result = np.zeros(len(SHARES))
    result[kept] = shares[kept] / shares[kept].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    itertools.product([0.5, 1.0, 2.0], [None, 1, 3, 50], [None, 0.3, 0.7, 0.95, 1.0]),
)
def test_frequencies_are_the_probabilities(temperature: float, top_k: int | None, top_p: float | None):
    settings = GenerationSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    uniforms = torch.tensor(np.random.default_rng(0).random(20_000))
    drawn = draw(LOGITS.expand(len(uniforms), -1), uniforms, settings)
    counts = np.bincount(drawn.numpy(), minlength=len(SHARES))
    expected = left(temperature, top_k, top_p)
    assert (counts[expected == 0] == 0).all()
    there = expected > 0
    if there.sum() > 1:
        assert chisquare(counts[there], expected[there] * len(uniforms)).pvalue > 1e-3


def test_temperature_zero_takes_the_most_probable():
    settings = GenerationSettings(temperature=0.0, top_k=2)
    assert draw(LOGITS[None], torch.tensor([0.99]), settings).tolist() == [3]


def test_a_row_is_drawn_by_its_own_number_alone():
    settings = GenerationSettings(top_p=0.9)
    rng = np.random.default_rng(1)
    logits, uniforms = torch.tensor(rng.normal(size=(9, 30))), torch.tensor(rng.random(9))
    together = draw(logits, uniforms, settings)
    alone = [draw(logits[i : i + 1], uniforms[i : i + 1], settings).item() for i in range(9)]
    assert together.tolist() == alone


@pytest.mark.parametrize("settings", [GenerationSettings(), GenerationSettings(top_k=4, top_p=1.0)])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_never_draw_the_impossible(uniform: float, settings: GenerationSettings):
    logits = torch.tensor([[-np.inf, 0.0, -np.inf, 1.0, -np.inf]])
    assert draw(logits, torch.tensor([uniform], dtype=torch.float64), settings).item() in (1, 3)


# Written otherwise


WINDOW = 48


VARIANT_NAMES = ["none", "fixed", "oracle", "predicted", "soft", "joint"]


@pytest.fixture(scope="module")
def run(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return with_strong_adapters(tiny_run, tmp_path_factory.mktemp("strong"), 20)


@pytest.fixture(scope="module")
def prompts(run: Run) -> list[Prompt]:
    """Prompts of several lengths, one of them empty, one within a sentence, one longer than the window."""
    corpus = run.corpus
    found, _ = document_prompts(corpus, corpus.documents("test")[:3], 20, 1)
    long = corpus.texts[int(corpus.documents("test")[3])].text
    texts = ["", long[: len(long) // 3].rstrip(), long]
    return [*found, *(text_prompt(corpus, text) for text in texts)]


def same(first: list[Generated], second: list[Generated]) -> bool:
    return all(
        np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.plan, b.plan)
        and (a.text, a.ended) == (b.text, b.ended)
        for a, b in zip(first, second, strict=True)
    )


# Written otherwise


@pytest.mark.parametrize("variant", ["none", "oracle", "soft"])
def test_cache_and_batches_change_nothing(variant: str, run: Run, prompts: list[Prompt]):
    """Beyond the window, which every text passes."""
    found = generate(run, prompts, variant=variant, tokens=60, seed=3)
    assert all(len(g.tokens) == 60 and g.ended == "length" for g in found)
    assert same(found, generate(run, prompts, variant=variant, tokens=60, seed=3, cache=False))
    by_two = {"evaluation.batch_size": 2}
    assert same(found, generate(run, prompts, variant=variant, settings=by_two, tokens=60, seed=3))
    assert not same(found, generate(run, prompts, variant=variant, tokens=60, seed=4))


def test_a_text_is_drawn_by_seed_and_number(run: Run, prompts: list[Prompt]):
    many = generate(run, prompts, variant="soft", tokens=12, seed=1)
    assert same(many[:2], generate(run, prompts[:2], variant="soft", tokens=12, seed=1))
    twins = generate(run, prompts[:1] * 2, variant="soft", tokens=12, seed=1)
    assert same(twins[:1], many[:1])
    assert not np.array_equal(twins[0].tokens, twins[1].tokens)


# Against the conditioned LM


def as_corpus(run: Run, prompt: Prompt, tokens: np.ndarray, plan: np.ndarray | None) -> Corpus:
    """A corpus of one document, the finished text; its actions are the sentences' own, then the plan's."""
    corpus = run.corpus
    ids = np.concatenate([prompt.tokens, tokens])
    text = corpus.tokenizer.decode(ids[1:].tolist())
    ends = [len(corpus.tokenizer.decode(ids[1 : i + 2].tolist())) for i in range(len(ids) - 1)]
    aligned = align(text, sentence_spans(text), np.stack([[0, *ends[:-1]], ends], axis=1))
    embeddings = run.encoder().encode([text[a:b].strip() for a, b in aligned.spans])
    actions = corpus.codebook.nearest(embeddings)
    if plan is not None:
        first = len(complete_spans(prompt.text))
        actions[first:] = plan[: len(actions) - first]
    return replace(
        corpus,
        tokens=np.append(ids, 0),
        document_tokens=np.array([0, len(ids)]),
        document_sentences=np.array([0, len(aligned.spans)]),
        first_token=aligned.first_token + 1,
        embeddings=embeddings,
        actions=actions,
    )


def known_in_time(run: Run, prompt: Prompt, tokens: np.ndarray, corpus: Corpus) -> int:
    """How many tokens were written before the splitter's hindsight would have had another sentence."""
    for n in range(len(tokens)):
        length = len(prompt.tokens) + n
        text = run.corpus.tokenizer.decode([*prompt.tokens[1:].tolist(), *tokens[:n].tolist()])
        known = len(complete_spans(text))
        if known != np.searchsorted(corpus.first_token, length, side="right") - 1:
            return n
    return len(tokens)


def own_logits(run: Run, variant: str, corpus: Corpus, given: bool) -> torch.Tensor:
    """Logits after every token, in windows as in an evaluation `[tokens, vocabulary]`."""
    windows = cut_windows(corpus, np.array([0]), WINDOW, WINDOW - WINDOW // 2)
    if len(windows) > 1:
        windows = windows[:-1]  # it is full at a document's end, and so longer than what was read in time
    mixing = Oracle() if given else VARIANTS[variant].evaluation if variant != "none" else Fixed()
    with torch.no_grad():
        logits = run.model(variant)(collate(corpus, windows), mixing)
    logits[..., run.corpus.tokenizer.all_special_ids] = -torch.inf
    rows = zip(logits, windows.length, windows.scored, strict=True)
    return torch.cat([row[length - scored : length] for row, length, scored in rows])


@pytest.mark.parametrize(
    ("variant", "given"),
    [*((name, False) for name in VARIANT_NAMES), *((name, True) for name in VARIANT_NAMES[2:])],
)
def test_text_is_what_the_conditioned_lm_says(variant: str, given: bool, run: Run, prompts: list[Prompt]):
    """The finished text is put into windows as a corpus's documents are, and predicted by the model."""
    settings = GenerationSettings(top_k=20)
    plan = np.array([1, 6, 3, 2, 5, 0, 4, 7] * 10)
    asked = [replace(prompt, plan=plan) for prompt in prompts]
    source = "given" if given else "planner"
    found = generate(run, asked, variant=variant, settings=settings, tokens=60, plan=source, seed=2)
    compared, planned = 0, 0
    for number, (prompt, more) in enumerate(zip(asked, found, strict=True)):
        corpus = as_corpus(run, prompt, more.tokens, plan if given else None)
        logits = own_logits(run, variant, corpus, given)[len(prompt.tokens) - 1 :]
        upto = min(len(logits), known_in_time(run, prompt, more.tokens, corpus))
        if upto:
            uniforms = torch.tensor(np.random.default_rng([2, number]).random(upto))
            assert more.tokens[:upto].tolist() == draw(logits[:upto], uniforms, settings).tolist()
        compared += upto
        planned += len(more.plan)
    assert compared > 150
    assert planned > 15 or variant in ("none", "fixed")


# Plans


def test_a_text_ends_where_its_plan_ends(run: Run, prompts: list[Prompt]):
    asked = [replace(prompt, plan=np.array([3, 1])) for prompt in prompts]
    found = generate(run, asked, variant="soft", tokens=200, plan="given")
    ended = [more for more in found if more.ended == "plan"]
    assert len(ended) > 3
    for prompt, more in zip(asked, found, strict=True):
        if more.ended == "plan":
            assert more.plan.tolist() == [3, 1]
            first, last = (len(complete_spans(text)) for text in (prompt.text, prompt.text + more.text))
            assert last == first + 2
            assert len(more.tokens) < 200


def test_the_plan_tells_the_planners_choice_of_each_sentence(run: Run, prompts: list[Prompt]):
    for variant in ("soft", "predicted"):
        planner, encoder = run.planner(variant), run.encoder()
        for prompt, more in zip(prompts, generate(run, prompts, variant=variant, tokens=50), strict=True):
            text = prompt.text + more.text
            spans = sentence_spans(text)
            first = len(complete_spans(prompt.text))
            assert len(spans) - first - 1 <= len(more.plan) <= len(spans) - first
            sentences = encoder.encode([text[a:b].strip() for a, b in spans])
            with torch.no_grad():
                best = planner(torch.from_numpy(sentences)[None])[0].argmax(dim=-1).tolist()
            assert more.plan.tolist() == best[first : first + len(more.plan)]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"plan": "plnner"}, "plan is 'plnner'; give planner, given, or actions"),
        ({"plan": "given"}, "the plan of prompt 0 is None; give the action of a sentence or more"),
        ({"plan": []}, "the plan is"),
        ({"plan": [1, 8]}, "the plan has the action 8, which the codebook lacks; .* from 0 to 7"),
        ({"plan": [1.5]}, r"the plan is \[1\.5\]; give the action"),
        ({"plan": [10**30]}, "the plan has the action 10{30}, which the codebook lacks"),
        ({"plan": [1], "variant": "none"}, "variant 'none' follows no plan"),
        ({"variant": "uniform"}, "has no variant 'uniform'"),
        ({"tokens": 2.5}, "tokens is 2.5; it must be a whole number from 1 to 1,000,000"),
        ({"tokens": 10**30}, "tokens is 10{30}; it must be a whole number from 1"),
        ({"tokens": 0}, "tokens is 0; it must be"),
        ({"prompts": ["A.", 7]}, "prompt 1 is a int; give a text or a Prompt"),
        ({"settings": {"generation.topk": 3}}, "unknown setting 'generation.topk'"),
    ],
)
def test_what_cannot_be_written_is_refused(asked: dict, said: str, run: Run):
    with pytest.raises(ProbekitError, match=said):
        generate(run, **{"prompts": ["A."], "tokens": 3, "variant": "soft"} | asked)


@pytest.mark.parametrize("plan", [[3, 1], (3, 1), np.array([3, 1])])
def test_actions_are_the_plan_of_every_prompt(plan: object, run: Run, prompts: list[Prompt]):
    asked = [replace(prompt, plan=np.array([3, 1])) for prompt in prompts]
    expected = generate(run, asked, variant="soft", tokens=30, plan="given")
    assert same(generate(run, prompts, variant="soft", tokens=30, plan=plan), expected)
    assert not same(generate(run, prompts, variant="soft", tokens=30), expected)


def test_a_special_token_in_a_prompt_is_text(run: Run):
    separator = run.corpus.tokenizer.convert_ids_to_tokens(run.corpus.separator)
    prompt = text_prompt(run.corpus, f"A{separator}b")
    assert (prompt.tokens == run.corpus.separator).sum() == 1
    assert prompt.text == f"A{separator}b"


def test_planning_tokens_are_why_nothing_is_kept(tiny_config: Config, tmp_path: Path):
    said: list[str] = []
    progress = Progress(quiet=True)
    progress.say = said.append
    config = tiny_config.override({"conditioning.kind": "token", "mixing.variants": ["soft"]})
    run = train(config, tmp_path / "run", quiet=True)
    generate(run, ["Word."], tokens=3, progress=progress)
    (line,) = said
    assert "there are planning tokens between a text's own" in line
    generate(run, ["Word."], variant="none", tokens=3, progress=progress)
    assert said == [line]


# What is drawn, and what it is drawn for


def test_special_tokens_are_never_drawn(run: Run):
    wild = GenerationSettings(temperature=1000.0)
    found = generate(run, [""] * 20, variant="soft", settings=wild, tokens=60)
    drawn = np.concatenate([more.tokens for more in found])
    assert run.corpus.separator not in drawn
    assert len(np.unique(drawn)) > 0.8 * len(run.corpus.tokenizer)


def test_prompts_of_documents(run: Run):
    corpus, documents = run.corpus, run.corpus.documents("test")
    found, continuations = document_prompts(corpus, documents, 30, 25)
    assert 3 < len(found) == len(continuations)
    kept = [prompt.document for prompt in found]
    for prompt, true in zip(found, continuations, strict=True):
        begin, end = corpus.document_tokens[prompt.document : prompt.document + 2]
        cut = begin + len(prompt.tokens)
        assert np.array_equal(np.concatenate([prompt.tokens, true]), corpus.tokens[begin : cut + 25])
        assert len(true) == 25
        ends = corpus.first_token[corpus.sentences(np.array([prompt.document]))][1:] - begin - 1
        assert len(prompt.tokens) - 1 == ends[ends >= 30][0]
        number = np.searchsorted(corpus.first_token, cut)
        last = corpus.document_sentences[prompt.document + 1]
        assert prompt.plan.tolist() == corpus.actions[number:last].tolist()
        assert prompt.text.endswith(".")
    for document in set(documents.tolist()) - set(kept):
        begin, end = corpus.document_tokens[document : document + 2]
        ends = corpus.first_token[corpus.sentences(np.array([document]))][1:]
        assert not ((ends - begin - 1 >= 30) & (ends + 25 <= end)).any()
    assert document_prompts(corpus, documents, 10_000, 1) == ([], [])


def test_no_more_is_read_than_was_trained(run: Run):
    assert reading_window(run) == WINDOW
    assert reading_window(run.with_settings({"training.window": 20})) == 20
    loaded = {"training.window": 20, "lm.name": str(run.folder / "lm")}
    assert reading_window(Run(run.folder, run.config.override(loaded))) == WINDOW
