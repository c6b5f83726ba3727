"""Runs with other kinds of conditioning and with tuned LMs, from training to probes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small_trainings import run_maker
from transformers import AutoModelForCausalLM, AutoTokenizer

from probekit.data.windows import collate, cut_windows
from probekit.errors import ProbekitError
from probekit.io import read_json
from probekit.models.mixing import VARIANTS
from probekit.models.planned_lm import PlannedLM, token_losses
from probekit.models.tuning import TUNINGS
from probekit.probing.activations import ActivationReader, HookPoint
from probekit.probing.probe import probe
from probekit.probing.targets import Examples
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.training.adapter import AdapterTraining
from probekit.training.trainer import Trainer

QUIET = Progress(quiet=True)
LEARNS = {
    "training.adapter.batch_size": 8,
    "training.adapter.epochs": 2,
    "training.adapter.learning_rate": 1e-2,
    "training.base.learning_rate": 3e-3,
}
"""Enough steps to learn something in."""

MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def make_run(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Trains the adapters of a run that has all else from the tiny one."""
    return run_maker(tiny_run, tmp_path_factory.mktemp("kinds"), {"mixing.variants": ["soft"]} | LEARNS)


def validation_loss(run: Run, model: PlannedLM) -> float:
    """Mean loss of validation tokens, as training measures it."""
    trainer = Trainer(run.config, run.corpus, run.device, lambda row: None, QUIET)

    def losses(windows: Any) -> torch.Tensor:
        batch = collate(run.corpus, windows)
        return token_losses(model(batch, VARIANTS["soft"].evaluation), batch.targets)

    return trainer.mean_loss(trainer.windows("validation"), 64, losses)


@pytest.mark.parametrize(
    "settings",
    [
        {"training__base__tuning": "lora"},
        {"training__base__tuning": "full"},
        {"training__base__tuning": "lora", "conditioning__kind": "token"},
        {"conditioning__kind": "embedding"},
        {"conditioning__kind": "token"},
    ],
)
def test_a_loaded_model_is_the_trained_one(make_run: MakeRun, tiny_run: Run, settings: dict[str, Any]):
    run = make_run(**settings)
    rows = run.metrics()
    best = rows[rows.stage == "adapter/soft"].validation_loss.min()
    again = Run.open(run.folder)
    assert validation_loss(again, again.model("soft")) == pytest.approx(best, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in again.model("soft").parameters())
    bare = validation_loss(again, again.model("none"))
    assert bare == validation_loss(tiny_run, tiny_run.model("none"))
    assert best < bare - 1e-3


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_every_variant_has_an_lm_of_its_own_if_it_was_tuned(make_run: MakeRun, tuning: str):
    run = make_run(training__base__tuning=tuning)
    base, own = run.frozen_lm(), run.frozen_lm("soft")
    assert (run.folder / "adapters" / "soft").exists() == (tuning != "frozen")
    assert (own is base) == (tuning == "frozen")
    assert run.frozen_lm("soft") is own
    weights = [*base.plain.parameters()]
    pairs = zip(weights, own.plain.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs) == (tuning == "frozen")
    assert run.model("soft").backend.model is own.plain
    assert ("plain" in vars(base)) == (tuning == "frozen"), "only the weights of one LM are held"
    facts = read_json(run.folder / "run.json")["stages"]["adapter/soft"]
    share = facts.get("tuned_parameters", 0) / sum(p.numel() for p in base.plain.parameters())
    assert {"frozen": share == 0, "lora": 0 < share < 0.5, "full": share == 1}[tuning]


def test_a_fully_tuned_lm_can_be_given_as_any_other(make_run: MakeRun):
    run = make_run(training__base__tuning="full")
    folder = run.tuned_folder("soft")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert all(map(torch.equal, model.parameters(), run.plain_model("soft").parameters()))
    text = "A word, and another."
    assert tokenizer(text).input_ids == run.corpus.tokenizer(text).input_ids


def test_a_digest_covers_the_tuned_lm(make_run: MakeRun, tmp_path: Path):
    run = make_run(training__base__tuning="lora")
    files = list((run.folder / "adapters" / "soft").iterdir())
    before = {variant: run.weights_digest(variant) for variant in ("none", "soft")}
    for path in files:
        data = path.read_bytes()
        try:
            path.write_bytes(data + b" ")
            assert run.weights_digest("soft") != before["soft"]
            assert run.weights_digest("none") == before["none"]
        finally:
            path.write_bytes(data)


def test_a_base_lm_is_tuned_at_its_own_learning_rate(tiny_run: Run):
    trainer = Trainer(
        tiny_run.config.override({"training.base.tuning": "full", "training.base.learning_rate": 3e-5}),
        tiny_run.corpus,
        tiny_run.device,
        lambda row: None,
        QUIET,
    )
    base = TUNINGS["full"](tiny_run.plain_model(), trainer.config.training.base, 0)
    groups = AdapterTraining(trainer, "soft", tiny_run.frozen_lm(), tiny_run.planner(), base).groups()
    (group,) = (group for group in groups if group.parameters[0] is base.parameters[0])
    assert group.learning_rate == 3e-5
    assert len(group.parameters) == len(list(base.model.parameters()))


def test_an_lm_is_not_tuned_where_only_the_bridge_has_the_hook(make_run: MakeRun):
    with pytest.raises(ProbekitError) as raised:
        make_run(training__base__tuning="lora", conditioning__location="attn.hook_q")
    message = str(raised.value)
    assert message.startswith("only TransformerLens has blocks.2.attn.hook_q, and no base LM can be tuned")
    assert "\n" not in message


# Reading


def seen_alone(run: Run, document: int, point: HookPoint) -> torch.Tensor:
    """What is at a hook point in a document's first window, from one pass of the bridge over it alone."""
    model = run.model("soft")
    windows = cut_windows(run.corpus, np.array([document]), run.config.training.window, 1000)[:1]
    batch = collate(run.corpus, windows)
    with torch.no_grad():
        read = model.conditioned(batch, VARIANTS["soft"].evaluation)
    seen: list[torch.Tensor] = []
    name = point[0] if point[0] == "hook_embed" else f"blocks.{point[1]}.{point[0]}"
    hooks = [*read.hooks, (name, lambda x, hook: seen.append(x[0].flatten(1)))]
    bridged = run.frozen_lm("soft").bridged
    with torch.no_grad(), bridged.hooks(fwd_hooks=hooks):
        bridged(read.tokens, position_ids=read.positions, attention_mask=torch.ones_like(read.tokens))
    return seen[0] if read.slots is None else seen[0][read.slots.own[0]]


POINTS: list[HookPoint] = [("hook_embed", 0), ("attn.hook_z", 1), ("hook_resid_post", 2)]


@pytest.mark.parametrize(
    "settings",
    [
        {"conditioning__kind": "embedding"},
        {"conditioning__kind": "token"},
        {"training__base__tuning": "lora"},
        {"training__base__tuning": "lora", "conditioning__kind": "token"},
    ],
)
def test_activations_are_those_of_the_variants_own_tokens(make_run: MakeRun, settings: dict[str, Any]):
    run = make_run(**settings)
    documents = run.corpus.documents("test")[:4]
    anchor = run.corpus.document_tokens[documents] + 20
    sentence = np.searchsorted(run.corpus.first_token, anchor, side="right") - 1
    reader = ActivationReader(run, "soft", POINTS, [1, 4, 18])
    blocks = reader.read(Examples.of_tokens(documents, anchor, sentence, np.zeros((4, 1), np.int64)))
    found = {
        point: values
        for b, v in zip(reader.stacks, blocks, strict=True)
        for point, values in zip(b.points, v, strict=True)
    }
    for point in POINTS:
        for row, document in enumerate(documents):
            expected = seen_alone(run, document, point)[[19, 16, 2]]
            torch.testing.assert_close(found[point][:, row], expected, atol=1e-4, rtol=1e-4)


EVERYWHERE = [
    (location, layer)
    for layer in range(3)
    for location in ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_post")
]


@pytest.mark.parametrize(
    ("kind", "unchanged"),
    [
        ("embedding", {("hook_embed:before", 0)}),
        ("token", {("hook_embed", 0), ("hook_embed:before", 0), ("hook_resid_pre", 0)}),
    ],
)
def test_what_conditioning_changes(make_run: MakeRun, kind: str, unchanged: set[HookPoint]):
    run = make_run(conditioning__kind=kind)
    points = [("hook_embed", 0), *EVERYWHERE, *([("hook_embed:before", 0)] if kind == "embedding" else [])]
    assert ActivationReader(run, "soft", points, [1]).changed_by_conditioning() == {*points} - unchanged


def injected(run: Run, locations: list[str], **settings: Any) -> pd.DataFrame:
    """Which cells are marked, by location and position."""
    given = {
        "probe.variants": ["soft"],
        "probe.locations": locations,
        "probe.layers": [0],
        "probe.positions": [1, 2],
        "probe.solvers": ["ridge"],
        "probe.control": False,
    } | {name.replace("__", "."): value for name, value in settings.items()}
    table = probe(run, given, quiet=True).table
    table = table[table.reader == "probe"]
    return table.set_index(["location", "position"]).injected


def test_cells_are_marked_where_the_embedding_tells_the_action(make_run: MakeRun):
    found = injected(
        make_run(conditioning__kind="embedding"), ["hook_embed:before", "hook_embed", "hook_resid_post"]
    )
    # Two tokens before it begins, no token carries the sentence's action yet.
    expected = {("hook_embed", "1"), ("hook_resid_post", "1")}
    assert set(found.index[found]) == expected
    assert len(found) == 6


def test_a_planning_token_tells_nothing_to_the_tokens_before_it(make_run: MakeRun):
    run = make_run(conditioning__kind="token")
    assert not injected(run, ["hook_embed", "hook_resid_post"]).any()
    # Of a token in the sentence, the one before it has read the sentence's action already.
    found = injected(run, ["hook_embed", "hook_resid_post"], probe__anchors="token")
    assert set(found.index[found]) == {("hook_resid_post", "1"), ("hook_resid_post", "2")}
    # So has a sentence's first token, which stands behind the planning token.
    found = injected(run, ["hook_resid_post"], probe__positions=[1, 0, "last", "mean"])
    assert set(found.index[found]) == {("hook_resid_post", name) for name in ("0", "last", "mean")}


@pytest.mark.parametrize(
    ("kind", "location", "message"),
    [
        ("embedding", "attn.hook_z:before", "actions are added at 'hook_embed'"),
        ("token", "hook_embed:before", "nothing is added to activations"),
        ("adapter", "hook_embed:before", r"actions are added at 'attn.hook_z'"),
    ],
)
def test_only_the_conditioned_location_has_a_before(
    make_run: MakeRun, kind: str, location: str, message: str
):
    with pytest.raises(ProbekitError, match=message):
        injected(make_run(conditioning__kind=kind), [location])
