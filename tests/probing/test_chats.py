"""Chats from a table to probes, where what is labelled stands in one role's messages alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import probekit
from probekit.cli import main
from probekit.config import Config
from probekit.data.build import write_corpus
from probekit.data.corpus import Corpus
from probekit.data.tokenizer import load_tokenizer, train_tokenizer
from probekit.errors import ProbekitError
from probekit.probing.labels import target_of
from probekit.probing.results import SavedProbes
from probekit.probing.score import score
from probekit.progress import Progress
from probekit.run.run import Run

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' }}"
    "{{ message['content'] | trim }}{{ '<|end|>\n' }}{% endfor %}"
)
WORDS = ["the", "plan", "of", "a", "river", "town", "old", "king", "went", "fell"]
POLITE, RUDE = ["please", "thanks", "kindly"], ["stupid", "idiot", "nonsense"]


def chats(count: int) -> list[dict]:
    """Chats whose assistant is polite or rude, and whose user is either, by chance."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        polite = bool(generator.random() < 0.5)

        def said(kind: list[str], number: int = number) -> str:
            words = [*generator.choice(WORDS, 4), f"w{number}", generator.choice(kind), "."]
            return " ".join(map(str, words))

        turns = int(generator.integers(1, 3))
        messages = []
        for _ in range(turns):
            messages.append({"role": "user", "content": said(POLITE if generator.random() < 0.5 else RUDE)})
            messages.append({"role": "assistant", "content": f" {said(POLITE if polite else RUDE)}\n"})
        rows.append({"messages": messages, "polite": "yes" if polite else "no"})
    return rows


ROWS = chats(160)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random LM whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("lms") / "llama"
    texts = [message["content"] for row in ROWS for message in row["messages"]]
    tokenizer = train_tokenizer(texts, 380, folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "max_position_embeddings": 256, "vocab_size": len(tokenizer)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**size, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return path


SMALL = [
    "--probe.variants",
    "none",
    "--probe.locations",
    "hook_embed",
    "--positions",
    "mean",
    "--probe.l2",
    "0.01",
]
SMALL += ["--probe.control", "false", "--probe.code_length", "false", "--evaluation.resamples", "100"]
SMALL += ["--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def run(lm: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ["probe", "--model", lm, "--labels", table, "--text", "messages", "--target", "polite"]
    assert main([str(word) for word in [*words, "--roles", "assistant", "--out", out, *SMALL]]) == 0
    return Run.open(out)


def settings(table: Path, roles: list[str] | None = None, text: str = "messages") -> Config:
    given = {
        "probe.labels": str(table),
        "probe.target": "polite",
        "probe.text_column": text,
        "probe.roles": roles,
    }
    return Config().override(given)


def test_the_probe_reads_the_role_that_is_asked_for(run: Run, table: Path, tmp_path: Path):
    probes = run.probes().query("reader == 'probe'")
    assert probes.accuracy.item() > 0.9
    messages = sum(len(row["messages"]) // 2 for row in ROWS)
    notes = json.loads((run.folder / "probes" / "settings.json").read_text())["notes"]
    assert f"messages of assistant: {messages} in 160 chats" in notes
    # The words of the other role say nothing of the label.
    copy = shutil.copytree(run.folder, tmp_path / "copy")
    words = ["probe", str(copy), "--labels", str(table), "--text", "messages", "--target", "polite"]
    assert main([*words, "--roles", "user", *SMALL]) == 0
    probes = Run.open(copy).probes().query("reader == 'probe'")
    assert probes.auroc_low.item() < 0.5 < probes.auroc_high.item()


def test_ranges_are_the_messages(run: Run, table: Path):
    corpus = run.corpus
    tokenizer = corpus.tokenizer
    labels = target_of(corpus, settings(table, ["assistant"])).labels
    found: dict[int, list[str]] = {}
    for document, start, stop in zip(labels.document, labels.start, labels.stop, strict=True):
        found.setdefault(int(document), []).append(tokenizer.decode(corpus.tokens[start:stop].tolist()))
    for number, said in found.items():
        chat = corpus.texts[number].messages
        assert said == [m["content"].strip() for m in chat if m["role"] == "assistant"]
    assert len(found) == len(ROWS)
    whole = target_of(corpus, settings(table)).labels
    assert whole.start.tolist() == (corpus.document_tokens[:-1] + 1).tolist()
    assert whole.stop.tolist() == corpus.document_tokens[1:].tolist()


def test_tokens_are_those_of_the_template_with_one_bos(run: Run):
    corpus = run.corpus
    assert corpus.bos_rule == "document"
    for number in range(5):
        chat = [{"role": m["role"], "content": m["content"]} for m in corpus.texts[number].messages]
        own = corpus.tokens[corpus.document_tokens[number] : corpus.document_tokens[number + 1]]
        assert own.tolist() == corpus.tokenizer.apply_chat_template(chat, return_dict=False)


def built(table: Path, lm: Path | None, out: Path, text: str = "messages") -> Corpus:
    given = {"corpus.path": str(table), "corpus.text_column": text, "actions.labels": "none"}
    given |= {"lm.name": None if lm is None else str(lm), "corpus.distinct": True}
    return write_corpus(Config().override(given), out, Progress(quiet=True))


def test_a_template_without_bos_is_read_without(lm: Path, table: Path, tmp_path: Path):
    tokenizer = load_tokenizer(lm)
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    tokenizer.save_pretrained(tmp_path / "lm")
    corpus = built(table, tmp_path / "lm", tmp_path / "corpus")
    assert corpus.bos_rule == "none"
    assert corpus.tokens[1] == corpus.tokenizer.convert_tokens_to_ids("<|start|>")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_chats_as_json_and_as_parquet(suffix: str, run: Run, table: Path, tmp_path: Path):
    other = tmp_path / f"chats{suffix}"
    frame = pd.DataFrame(ROWS)
    if suffix == ".csv":
        frame.assign(messages=frame.messages.map(json.dumps)).to_csv(other, index=False)
    else:
        frame.to_parquet(other)
    expected = target_of(run.corpus, settings(table, ["assistant"])).labels
    found = target_of(run.corpus, settings(other, ["assistant"])).labels
    for field in ("document", "start", "stop", "labels"):
        assert getattr(found, field).tolist() == getattr(expected, field).tolist()


def test_chats_are_scored_message_by_message(run: Run, table: Path, lm: Path):
    scored = score(run, table, quiet=True)
    given = pd.DataFrame(
        [
            (number, place, row["polite"])
            for number, row in enumerate(ROWS)
            for place, message in enumerate(row["messages"])
            if message["role"] == "assistant"
        ],
        columns=["text", "message", "polite"],
    )
    assert scored.text.tolist() == given.text.tolist()
    assert scored.message.tolist() == given.message.tolist()
    assert scored.role.unique().tolist() == ["assistant"]
    assert (scored.predicted == given.polite).mean() > 0.9
    # By hand: the mean embedding of what a message says, read by the probe.
    probe = SavedProbes(run.folder / "probes", "none", run.config.seed)
    embedding = LlamaForCausalLM.from_pretrained(lm).get_input_embeddings().weight.detach()
    for row in scored.head(9).itertuples():
        said = ROWS[row.text]["messages"][row.message]["content"].strip()
        mean = embedding[run.corpus.tokenizer(said, add_special_tokens=False).input_ids].mean(0, keepdim=True)
        expected = probe[probe.cells[0]].log_probabilities(mean).exp().max().item()
        assert row.probability == pytest.approx(expected, abs=1e-4)
    pd.testing.assert_frame_equal(
        score(run, [row["messages"] for row in ROWS[:9]], quiet=True).drop(columns="name"),
        scored[scored.text < 9].drop(columns="name"),
    )
    tokens = score(run, [ROWS[0]["messages"]], tokens=True, quiet=True)
    expected = run.corpus.tokenizer.apply_chat_template(ROWS[0]["messages"], return_dict=False)
    assert len(tokens) == len(expected) - 1  # BOS is none of the text's own


def test_every_token_is_scored_at_itself(run: Run, table: Path, lm: Path, tmp_path: Path):
    """Whatever position of a range the probe was fitted at."""
    copy = shutil.copytree(run.folder, tmp_path / "copy")
    words = ["probe", str(copy), "--labels", str(table), "--text", "messages", "--target", "polite"]
    assert main([*words, "--roles", "assistant", *SMALL, "--positions", "last-1"]) == 0
    text = "the plan of a river"
    scored = score(copy, [text], tokens=True, quiet=True)
    probe = SavedProbes(copy / "probes", "none", run.config.seed)
    ids = run.corpus.tokenizer(text, add_special_tokens=False).input_ids
    embedding = LlamaForCausalLM.from_pretrained(lm).get_input_embeddings().weight.detach()
    expected = probe[probe.cells[0]].log_probabilities(embedding[ids]).exp().numpy()
    np.testing.assert_allclose(scored[["p(no)", "p(yes)"]].to_numpy(), expected, atol=1e-4)


def test_sentences_of_chats_are_labelled_by_their_export(run: Run, tmp_path: Path):
    path = tmp_path / "sentences.csv"
    assert main(["corpus", str(run.folder), "--export", str(path), "--quiet"]) == 0
    sentences = pd.read_csv(path).head(20)
    sentences.assign(polite=["yes", "no"] * 10).to_csv(path, index=False)
    config = Config().override({"probe.labels": str(path), "probe.target": "polite"})
    target = target_of(run.corpus, config)
    assert target.of_sentences is not None
    assert (target.of_sentences[:20] == [1, 0] * 10).all()


def test_plain_text_has_one_rule_of_bos(run: Run):
    """In the lens and in scores: the tokenizer's own, whatever the chat template has."""
    chats = run.corpus.facts | {"bos": "document"}
    corpus = replace(run.corpus, facts=chats)
    assert corpus.bos_rule == "document"
    assert corpus.bos_rule_of_text("none") == "none"
    assert replace(corpus, facts=chats | {"chats": False}).bos_rule_of_text("none") == "document"


def test_activations_of_chats(lm: Path):
    model, tokenizer = LlamaForCausalLM.from_pretrained(lm), load_tokenizer(lm)
    given = [row["messages"] for row in ROWS[:3]]
    for position, column in (("last", -1), ("first", 1), ("last-1", -2)):
        found = probekit.activations(
            model, tokenizer, given, location="hook_embed", position=position, quiet=True
        )
        for chat, values in zip(given, found.values[0], strict=True):
            ids = torch.tensor(tokenizer.apply_chat_template(chat, return_dict=False))
            torch.testing.assert_close(values, model.get_input_embeddings()(ids)[column].detach())
    with pytest.raises(ProbekitError, match="some texts are chats, and some are not"):
        probekit.activations(model, tokenizer, [given[0], "text"], quiet=True)
    with pytest.raises(ProbekitError, match="text 1: message 0 of the chat"):
        probekit.activations(model, tokenizer, [given[0], [3]], quiet=True)


# Bad input


def refusal(corpus: Corpus, config: Config) -> str:
    with pytest.raises(ProbekitError) as error:
        target_of(corpus, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_roles_that_nothing_has(run: Run, table: Path, tiny_run: Run, tmp_path: Path):
    assert "probe.roles has 'tool', but the chats have user, assistant" in refusal(
        run.corpus, settings(table, ["assistant", "tool"])
    )
    goes = "probe.roles goes with a column of probe.labels, not with target 'token'"
    assert goes in refusal(run.corpus, Config().override({"probe.target": "token", "probe.roles": ["user"]}))
    texts = tmp_path / "texts.jsonl"
    rows = [{"text": tiny_run.corpus.texts[n].text, "polite": "yn"[n % 2]} for n in range(4)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "the texts of the corpus are no chats" in refusal(
        tiny_run.corpus, settings(texts, ["user"], text="text")
    )


@pytest.mark.parametrize("column", ["start", "sentence"])
def test_ranges_in_chats_are_messages(column: str, run: Run, tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row | {column: 0}) + "\n" for row in ROWS))
    assert f"has a column {column!r}, but probe.roles labels" in refusal(run.corpus, settings(path, ["user"]))
    if column == "start":
        assert "chats.jsonl:1: 'start' counts the characters" in refusal(run.corpus, settings(path))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"messages": []}], "chats.jsonl:2: 'messages' holds an empty chat"),
        ([{"messages": [{"role": "user"}]}], "chats.jsonl:2: 'messages': message 0 of the chat is"),
        ([{"messages": {"role": "user"}}], "'messages' holds dict, not a string or a chat"),
        ([{"messages": "A text."}], "holds 1 chats and 1 plain texts; give all of one kind"),
        ([{"messages": [{"role": "user", "content": "\ud800"}]}], "half a surrogate pair"),
    ],
)
def test_what_is_no_chat_is_refused(rows: list, said: str, lm: Path, tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [ROWS[0], *rows]))
    with pytest.raises(ProbekitError) as error:
        built(path, lm, tmp_path / "corpus")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_template_is_refused(table: Path, tmp_path: Path):
    with pytest.raises(ProbekitError, match="the tokenizer of a new LM has no chat template"):
        built(table, None, tmp_path / "corpus")
