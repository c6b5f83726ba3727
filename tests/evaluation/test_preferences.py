"""Shares, margins and their table against brute force over the choices of each item."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from probekit.evaluation.items import Item
from probekit.evaluation.preferences import LogProbabilities, margins, preference_table, shares

FEW = {"resamples": 200, "seed": 0}


def item(answer: int | None = 0, choices: int = 2, **given: object) -> Item:
    texts = tuple(f"text {choice}" for choice in range(choices))
    known = {"where": "here", "context": "c", "kind": None, "group": "g", "score": math.nan}
    return Item(**{**known, **given, "choices": texts, "answer": answer})


@given(
    st.lists(st.tuples(st.lists(st.integers(-9, 0), min_size=2, max_size=4), st.integers(0, 3)), min_size=1)
)
def test_shares_and_margins_by_hand(rows: list[tuple[list[int], int]]):
    scores = np.full((len(rows), 4), -np.inf)
    for row, (own, _) in zip(scores, rows, strict=True):
        row[: len(own)] = own
    wanted = np.array([answer % len(own) for own, answer in rows])
    share, margin = shares(scores, wanted), margins(scores, wanted)
    for number, ((own, _), answer) in enumerate(zip(rows, wanted, strict=True)):
        best = [choice for choice, score in enumerate(own) if score == max(own)]
        assert share[number] == (1 / len(best) if answer in best else 0)
        assert margin[number] == own[answer] - max(own[:answer] + own[answer + 1 :])
    every = [shares(scores, np.full_like(wanted, choice)) for choice in range(4)]
    assert sum(every) == pytest.approx(1), "the shares of an item's choices add up to one"


@given(st.lists(st.tuples(st.integers(-9, 0), st.integers(-9, 0)), min_size=1))
def test_swapping_two_choices_flips_every_sign(rows: list[tuple[int, int]]):
    scores, first = np.array(rows, dtype=float), np.zeros(len(rows), dtype=int)
    assert margins(scores[:, ::-1], first).tolist() == (-margins(scores, first)).tolist()
    assert shares(scores[:, ::-1], first).tolist() == (1 - shares(scores, first)).tolist()


def log_probabilities(items: list[Item], seed: int) -> LogProbabilities:
    rng = np.random.default_rng(seed)
    most = max(len(item.choices) for item in items)
    there = np.arange(most) < np.array([len(item.choices) for item in items])[:, None]
    own, prior = (np.where(there, rng.normal(size=there.shape), -np.inf) for _ in range(2))
    return LogProbabilities(own, prior, np.where(there, rng.integers(1, 5, there.shape), 1))


@pytest.fixture(scope="module")
def items() -> list[Item]:
    rng = np.random.default_rng(1)
    return [
        item(
            int(rng.integers(2)),
            int(rng.integers(2, 4)),
            kind="ab"[number % 2],
            group=str(number // 3),
            score=float(rng.normal()) if number % 5 else math.nan,
        )
        for number in range(60)
    ]


@pytest.mark.parametrize("scoring", ["total", "mean"])
def test_the_table_by_hand(items: list[Item], scoring: str):
    found = {"first": log_probabilities(items, 0), "second": log_probabilities(items, 1)}
    table = preference_table(items, found, scoring, **FEW).set_index(["revision", "kind", "reader"])
    accuracies = {}
    for (revision, kind, reader), row in table.iterrows():
        right, margin, rated = [], [], []
        for own, log_p, prior, tokens in zip(
            items, found[revision].own, found[revision].prior, found[revision].tokens, strict=True
        ):
            if kind not in (own.kind, "all kinds"):
                continue
            scores = [
                {"LM": p, "LM over prior": p - q, "prior": q}[reader] / (n if scoring == "mean" else 1)
                for p, q, n, _ in zip(log_p, prior, tokens, own.choices, strict=False)
            ]
            right.append(scores.index(max(scores)) == own.answer)
            margin.append(scores[own.answer] - max(s for c, s in enumerate(scores) if c != own.answer))
            rated.append(own.score)
        accuracies[revision, kind, reader] = np.mean(right)
        assert row["items"] == len(right)
        assert row.accuracy == pytest.approx(np.mean(right))
        assert row.margin == pytest.approx(np.mean(margin))
        known = ~np.isnan(rated)
        assert row.rated == known.sum()
        assert row.rank_correlation == pytest.approx(
            spearmanr(np.array(margin)[known], np.array(rated)[known]).statistic
        )
        for name in ("accuracy", "margin", "rank_correlation"):
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    for (revision, kind, reader), row in table.iterrows():
        over_prior = accuracies[revision, kind, reader] - accuracies[revision, kind, "prior"]
        over_first = accuracies[revision, kind, reader] - accuracies["first", kind, reader]
        assert (
            math.isnan(row.over_prior) if reader == "prior" else row.over_prior == pytest.approx(over_prior)
        )
        assert (
            math.isnan(row.over_first) if revision == "first" else row.over_first == pytest.approx(over_first)
        )
    assert set(table.groups) == {20}
    chances = [1 / len(own.choices) for own in items if own.kind == "a"]
    assert table.loc["first", "a", "LM"].chance == pytest.approx(np.mean(chances))


def test_items_without_a_context_count_where_no_prior_is_read(items: list[Item]):
    """The readers of the prior have what they have on the other items alone; the LM's own rows count all."""
    bare = [item(0, context="", kind=kind, group=kind, score=1.0) for kind in ("a", "bare")]
    mixed = [*items, *bare]
    read = log_probabilities(mixed, 0)
    read.prior[-2:] = read.own[-2:]
    found = {"one": read, "two": log_probabilities(mixed, 1)}
    found["two"].prior[-2:] = found["two"].own[-2:]
    without = {
        name: LogProbabilities(own.own[:-2], own.prior[:-2], own.tokens[:-2]) for name, own in found.items()
    }
    keys = ["revision", "kind", "reader"]
    table, expected = (
        preference_table(rows, values, "total", **FEW).set_index(keys)
        for rows, values in ((mixed, found), (items, without))
    )
    assert [key for key in table.index if key[:2] == ("one", "bare")] == [("one", "bare", "LM")]
    for kind in ("a", "b", "all kinds"):
        for reader in ("LM over prior", "prior"):
            for name in ("items", "groups", "chance", "rated", "accuracy", "margin", "over_prior"):
                own, other = (part.loc[("two", kind, reader), name] for part in (table, expected))
                assert own == pytest.approx(other, nan_ok=True)
        over, same = (part.loc[("two", kind, "LM")].over_prior for part in (table, expected))
        assert over == pytest.approx(same)
    right = shares(read.own, np.array([row.answer for row in mixed]))
    assert table.loc[("one", "all kinds", "LM"), "accuracy"] == pytest.approx(right.mean())
    assert table.loc[("one", "all kinds", "LM"), ["items", "groups"]].tolist() == [62, 22]
    assert math.isnan(table.loc[("one", "bare", "LM")].over_prior)


def test_groups_are_resampled_not_items():
    """Items that are copies of one another tell no more than one of them."""
    once = [item(group=str(number)) for number in range(40)]
    read = log_probabilities(once, 0)
    often = [item(group=str(number // 10)) for number in range(400)]
    ten = LogProbabilities(*(np.repeat(part, 10, axis=0) for part in (read.own, read.prior, read.tokens)))
    alone, copied = (
        preference_table(rows, {None: found}, "total", **FEW).drop(columns="items")
        for rows, found in ((once, read), (often, ten))
    )
    pd.testing.assert_frame_equal(alone, copied)


def test_groups_are_told_apart_to_the_last_character():
    items = [item(group=name) for name in ("a", "a\0", "a", "b")]
    table = preference_table(items, {None: log_probabilities(items, 0)}, "total", **FEW)
    assert set(table.groups) == {3}


def test_without_a_context_there_is_no_prior_and_without_an_answer_no_accuracy():
    read = log_probabilities([item(None)] * 5, 0)
    bare = LogProbabilities(read.own, read.own, read.tokens)
    table = preference_table([item(None, group=str(n)) for n in range(5)], {None: bare}, "total", **FEW)
    assert [*table.reader] == ["LM"]
    assert not {"accuracy", "over_prior", "over_first", "rank_correlation"} & set(table)
    assert table.preference[0] == pytest.approx(np.mean(bare.own[:, 0] > bare.own[:, 1]))
