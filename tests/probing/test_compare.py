"""Two LMs on the same texts: planted activations, other tokenizers, and compression that changes nothing."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from random_lms import save_random_llama

import probekit
from probekit.config import Config
from probekit.data.documents import Document
from probekit.errors import ProbekitError
from probekit.probing import compare as comparing
from probekit.probing.compare import READINGS, compare, same_depth
from probekit.reports.tables_compare import comparison_notes, comparison_tables
from probekit.training.train import prepare

WORDS = ["the", "plan", "of", "river", "town", "old", "king", "went", "fell"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts, a label of each of their sentences, and three tiny LMs."""
    folder = tmp_path_factory.mktemp("compared")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(60):
        sentences = [" ".join(generator.choice(WORDS, size=5)).capitalize() + "." for _ in range(6)]
        text = " ".join(sentences)
        rows += [
            {
                "text": text,
                "sentence": n,
                "king": "king" in sentence.lower(),
                "author": number // 2,
                "length": len(sentence) / 7,
            }
            for n, sentence in enumerate(sentences)
        ]
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    texts = pd.DataFrame(rows).text.unique().tolist()
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    save_random_llama(folder / "lm", texts, positions=128)
    save_random_llama(
        folder / "other", ["kingdom planning rivers and towns, olden and fallen"] * 3, positions=128
    )
    save_random_llama(folder / "wide", texts, positions=128, hidden_size=24, num_hidden_layers=3)
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return Config.from_preset("any-model").override(
        {
            "device": "cpu",
            "lm.name": str(folder / "lm"),
            "lm.dtype": "float32",
            "corpus.path": str(folder / "labels.csv"),
            "corpus.distinct": True,
            "corpus.group_column": "author",
            "corpus.probe_fraction": 0.5,
            "corpus.test_fraction": 0.3,
            "actions.labels": "none",
            "training.window": 64,
            "probe.labels": str(folder / "labels.csv"),
            "probe.text_column": "text",
            "probe.target": "king",
            "probe.l2": [0.1],
            "evaluation.resamples": 200,
        }
    )


@pytest.fixture(scope="module")
def prepared(folder, config):
    """The run of the first LM: what it takes is not what is tested here."""
    prepare(config.override({"probe.positions": ["last"]}), folder / "first", quiet=True)
    return folder / "first"


@pytest.fixture
def out(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "out" / "first")
    return tmp_path / "out"


def compared(config, second, out):
    return compare(config, second, out, permutations=9, quiet=True)


def test_a_rotated_lm_has_drifted_and_lost_nothing(config, out, monkeypatch):
    """What is read of the second LM is that of the first, turned."""
    rng = np.random.default_rng(0)
    turn = torch.from_numpy(np.linalg.qr(rng.normal(size=(16, 16)))[0])
    values: list[torch.Tensor] = []

    def planted(run, points, parts, name, progress):
        if values:
            return (values[0] @ turn).float()
        labels = np.concatenate([part.labels[:, 0] for part in parts])
        noise = torch.from_numpy(rng.normal(size=(len(points), len(labels), 16)))
        noise[..., 0] += 4 * torch.from_numpy(labels)
        values.append(noise)
        return noise.float()

    monkeypatch.setattr(comparing, "_read", planted)
    found = compared(config, {"lm.compress": "int8"}, out)
    same = found.similarity.layer == found.similarity.second_layer
    assert found.similarity.cka[same].to_numpy() == pytest.approx(1, abs=1e-5)
    assert found.similarity.procrustes[same].to_numpy() == pytest.approx(0, abs=1e-5)
    assert (found.similarity.cka[~same] < 0.6).all(), "layers share what the label adds, and no noise"
    auroc = found.probes.pivot_table("auroc", "layer", "reading")
    over = found.probes.pivot_table("over_first_lm", "layer", "reading")
    assert (auroc["first"] > 0.95).all()
    assert (auroc.frozen < 0.85).all()
    np.testing.assert_allclose(auroc[["mapped", "refitted"]], auroc[["first", "first"]], atol=0.01)
    assert (over.frozen < -0.1).all()
    np.testing.assert_allclose(over[["mapped", "refitted"]], 0, atol=0.03)
    rows = found.probes.set_index(["reading", "layer"])
    moved = rows.loc["frozen"]
    np.testing.assert_allclose(
        moved.over_refitted, moved.accuracy - rows.loc["refitted"].accuracy, rtol=0, atol=1e-12
    )
    assert (moved.over_refitted_high < 0).all(), "it has drifted, and the interval says so"
    assert (rows.loc["mapped"].over_refitted_high >= 0).all()
    assert rows.loc[["first", "refitted"]].over_refitted.isna().all()
    assert "over the refitted" in comparison_tables(found)[-1].cells


def test_a_layer_that_does_not_vary_is_named_and_left_out_of_the_notes(config, out, monkeypatch):
    """The last layer of the second LM is the same for all examples."""
    read = comparing._read

    def planted(run, points, parts, name, progress):
        values = read(run, points, parts, name, progress)
        if "int8" in name:
            values[1] = 0.1
        return values

    monkeypatch.setattr(comparing, "_read", planted)
    found = compared(config, {"lm.compress": "int8"}, out)
    assert "lm float32 int8: all examples are the same at layer 1: nothing is said of it" in found.notes
    assert found.similarity[found.similarity.second_layer == 1].cka_p.isna().all()
    (note,) = comparison_notes(found)
    assert "of 2 layers of lm float32, 1 are most similar (CKA) to one of another depth" in note
    assert "of 2 pairs cannot be told" in note
    assert found.probes.accuracy.notna().all()
    assert probekit.plot_comparison(found).axes
    assert [*comparison_notes(replace(found, similarity=found.similarity.assign(cka=np.nan)))] == []


@pytest.mark.parametrize("how", ["prune=0", "rank=16"])
def test_compressing_nothing_changes_nothing(config, out, how):
    found = compared(config, {"lm.compress": how}, out)
    diagonal = found.similarity[found.similarity.layer == found.similarity.second_layer]
    assert diagonal.cka.to_numpy() == pytest.approx(1, abs=1e-12)
    assert diagonal.procrustes.to_numpy() == pytest.approx(0, abs=1e-12)
    numbers = ["layer", "auroc", "accuracy", "cross_entropy"]
    first = found.probes[found.probes.reading == "first"][numbers].to_numpy(float)
    for reading in READINGS[1:]:
        own = found.probes[found.probes.reading == reading]
        np.testing.assert_allclose(
            own[numbers].to_numpy(float), first, rtol=0 if reading != "mapped" else 1e-4
        )
        assert (own.over_first_lm == 0).all()
    assert found.names == ("lm float32", f"lm float32 {how}")


def test_other_tokenizers_meet_at_the_ends_of_sentences(config, folder, tmp_path):
    names = {"first": "lm", "second": "other"}
    runs = [
        prepare(
            config.override({"lm.name": str(folder / name), "probe.positions": ["last"]}),
            tmp_path / run,
            quiet=True,
        )
        for run, name in names.items()
    ]
    assert len(runs[0].corpus.tokens) < len(runs[1].corpus.tokens)
    _, examples, notes = comparing._shared_examples(runs)
    assert notes
    for split, own in examples[0].items():
        other = examples[1][split]
        np.testing.assert_array_equal(own.document, other.document)
        np.testing.assert_array_equal(own.labels, other.labels)
        for run, part in zip(runs, (own, other), strict=True):
            for row in range(0, len(part), 7):
                begin = run.corpus.document_tokens[part.document[row]] + 1
                read = run.corpus.tokenizer.decode(run.corpus.tokens[begin : part.stop[row]])
                text = run.corpus.texts[int(part.document[row])].text
                assert text.startswith(read)
                assert read.rstrip().endswith(".")


def test_tokens_that_end_within_one_of_the_other_are_left_out(config, folder, tmp_path):
    settings = {
        "probe.target": "action",
        "probe.labels": None,
        "probe.text_column": None,
        "probe.anchors": "token",
    }
    settings["lm.name"] = str(folder / "other")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "probes.parquet").write_bytes(b"of an earlier call with labels")
    found = compared(config.override(settings), {"lm.name": str(folder / "lm")}, tmp_path / "out")
    assert not (tmp_path / "out" / "probes.parquet").exists()
    assert found.probes is None
    (note,) = found.notes
    assert "examples end within a token of the other LM" in note
    assert found.similarity.documents.iloc[0] > 20


def test_lms_that_are_held_in_different_precision_are_named(config, out):
    found = compared(config, {"lm.dtype": "bfloat16"}, out)
    assert sum("part of what differs is rounding" in note for note in found.notes) == 1


def test_widths_and_depths_may_differ_but_for_a_frozen_probe(config, folder, out):
    found = compared(config, {"lm.name": str(folder / "wide")}, out)
    assert len(found.similarity) == 6
    assert set(found.probes.reading) == {"first", "mapped", "refitted"}
    assert found.probes.second_layer.unique().tolist() == [0, 2]
    assert "no frozen probe: one of 16 features cannot read the other LM's 24" in found.notes
    assert found.similarity[found.similarity.same_depth].second_layer.tolist() == [0, 2]
    config = config.override({"probe.layers": [1]})
    given = compared(config, {"lm.name": str(folder / "wide")}, out.with_name("asked"))
    assert given.similarity[["layer", "second_layer"]].to_numpy().tolist() == [[1, 2]], (
        "layers are the first LM's"
    )
    layers = np.array([0, 17, 29]) / 29, np.array([0, 5, 10, 17]) / 17
    assert same_depth(*layers).tolist() == [0, 2, 3]


def test_numbers_are_read_by_ridge_and_what_is_returned_is_written(config, out):
    found = compared(config.override({"probe.target": "length"}), {"lm.compress": "rank=2"}, out)
    rows = found.probes.set_index(["reading", "layer"])
    assert set(found.probes.solver) == {"ridge"}
    frozen, first = rows.loc["frozen"], rows.loc["first"]
    np.testing.assert_allclose(frozen.over_first_lm, frozen.r2 - first.r2, atol=1e-9)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "similarity.parquet"), found.similarity)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "probes.parquet"), found.probes)
    settings = json.loads((out / "settings.json").read_text("utf-8"))
    assert settings["examples"] == found.similarity.examples.iloc[0]
    assert (settings["permutations"], settings["seed"]) == (9, config.seed)
    assert settings["provenance"]["versions"]["torch"]
    assert set(found.probes.reading) == {*READINGS}
    diagonal = found.similarity[found.similarity.layer == found.similarity.second_layer]
    assert diagonal.cka.between(0.1, 0.999).all()
    assert (diagonal.cka_low < diagonal.cka).all()
    assert probekit.plot_comparison(found).axes


@pytest.mark.parametrize(
    ("changed", "second", "message"),
    [
        ({}, {}, "both LMs are .*; give another one, or --compress int8, prune=0.5 or rank=64"),
        (
            {"probe.layers": [1, 9]},
            {"lm.compress": "int8"},
            "probe.layers has 9, but the LM's layers are 0 to 1",
        ),
        (
            {"probe.locations": ["hook_resid_post", "hook_mlp_out"]},
            {"lm.compress": "int8"},
            "give one, whose",
        ),
        ({"probe.locations": ["hook_nowhere"]}, {"lm.compress": "int8"}, "probe.locations is 'hook_nowhere'"),
        ({"probe.positions": ["mean"]}, {"lm.compress": "int8"}, "probe.positions is mean; LMs are compared"),
        ({"probe.solvers": ["logit-lens"]}, {"lm.compress": "int8"}, "probe.solvers has logit-lens"),
    ],
)
def test_what_cannot_be_compared_is_refused(config, out, changed, second, message):
    with pytest.raises(ProbekitError, match=message) as caught:
        compared(config.override(changed), second, out)
    assert "\n" not in str(caught.value)


def test_examples_that_both_lms_read_must_be_enough(config, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "MINIMUM_EXAMPLES", 100_000)
    settings = {"probe.target": "action", "probe.anchors": "token", "probe.labels": None}
    settings |= {"probe.text_column": None, "lm.name": str(folder / "other")}
    with pytest.raises(ProbekitError, match=r"examples \(all\) [\d,]+ end at the same character in both LMs"):
        compared(config.override(settings), {"lm.name": str(folder / "lm")}, tmp_path)
    assert not (tmp_path / "similarity.parquet").exists()


def test_what_fails_at_the_end_leaves_the_earlier_results(config, out, monkeypatch):
    compared(config, {"lm.compress": "rank=2"}, out)
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    monkeypatch.setattr(comparing, "_probes", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compared(config.override({"seed": 5}), {"lm.compress": "rank=2"}, out)
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before


def test_chats_that_are_written_out_in_two_ways_are_refused():
    corpora = [
        SimpleNamespace(texts=[Document("A plan.", "0"), Document(text, "1")], facts={"chats": 2})
        for text in ("[INST] Go on. [/INST]", "<|user|> Go on.")
    ]
    with pytest.raises(ProbekitError, match=r"the LMs' chat templates write out in different ways"):
        comparing._shared_examples([SimpleNamespace(corpus=corpus) for corpus in corpora])


def test_another_lm_has_its_own_revision_and_is_compressed_only_if_asked(config, monkeypatch):
    """What names a revision of the first LM names none of another; a copy of the first has it, too."""
    seen = []

    def check(first, second):
        seen.append((second.lm.name, second.lm.revision, second.lm.compress))
        raise ProbekitError("seen")

    monkeypatch.setattr(comparing, "_check", check)
    first = config.override({"lm.name": "a", "lm.revision": "step1", "lm.compress": "int8"})
    for second in (
        {"lm.name": "b"},
        {"lm.name": "a", "lm.revision": "step2", "lm.compress": "rank=2"},
        {"lm.compress": "rank=2"},
    ):
        with pytest.raises(ProbekitError, match="seen"):
            compare(first, second, quiet=True)
    assert seen == [("b", None, None), ("a", "step2", "rank=2"), ("a", "step1", "rank=2")]


def test_lms_are_told_apart_by_name():
    def names(**second):
        first = Config().override({"lm.name": "before/lm"})
        return comparing._names(
            first, first.override({f"lm.{name}": value for name, value in second.items()})
        )

    assert names(name="after/lm") == ("before/lm", "after/lm")
    assert names(name="after/tuned") == ("lm", "tuned")
    assert names(dtype="bfloat16", compress="int8") == ("lm", "lm bfloat16 int8")
