"""What two processes do with a sharded LM; a wrong result ends them with an error.

torchrun --nproc_per_node 2 tests/models/sharded_processes.py trained RUN then probed RUN
"""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, PreTrainedModel

from probekit import distributed
from probekit.distributed import Stopped
from probekit.errors import ProbekitError
from probekit.models.hook_points import PlainPass, ShardedPass, forward_pass, gathered, shard
from probekit.models.language_model import (
    bridge_without_weights,
    hook_name,
    load_model,
    load_outline,
    locations,
)
from probekit.probing.probe import probe
from probekit.run.run import Run
from probekit.training import trainer as loop
from probekit.training.train import train

TOKENS = torch.randint(200, (2, 9), generator=torch.Generator().manual_seed(0))
LAST = "ln_final.hook_out"

Sharded = tuple[TransformerBridge, PreTrainedModel]


def sharded(folder: str) -> Sharded:
    """An LM that is bridged without its weights, and sharded with them."""
    outline = bridge_without_weights(load_outline(folder), AutoTokenizer.from_pretrained(folder), folder)
    model = load_model(folder) if distributed.is_first() else load_outline(folder)
    return outline, shard(model, torch.device("cpu"))


def hooks(*folders: str) -> None:
    """What is asked of hooks of LMs of every architecture."""
    for folder in folders:
        lm = sharded(folder)
        _see_what_those_of_a_whole_lm_see(lm, load_model(folder))
        _keep_up(lm)
        _refuse_what_only_the_bridge_has(lm)
    _refuse_other_weights_than_expected(*folders[:2])


def _see_what_those_of_a_whole_lm_see(lm: Sharded, whole: PreTrainedModel) -> None:
    outline, model = lm
    weights = gathered(model.state_dict())
    for name, tensor in whole.state_dict().items() if distributed.is_first() else ():
        assert torch.equal(weights[name], tensor), name
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert held < 0.6 * sum(parameter.numel() for parameter in whole.parameters())
    there = [location for location in ("hook_resid_pre", "hook_resid_post") if location in locations(outline)]
    names = [*(hook_name(location, 2) for location in there), LAST]
    road = forward_pass(outline, model, names)
    assert isinstance(road, ShardedPass)
    plain = PlainPass(whole, road._taps)
    for change in (lambda x: 1.0 * x, lambda x: x + torch.linspace(-1, 1, x.shape[-1])):
        found, expected = (_seen(one, names, change) for one in (road, plain))
        assert found.keys() == set(names)
        for name in names:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def _seen(
    road: PlainPass, names: Sequence[str], change: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[Tensor], None]:
        return lambda x: seen.update({name: x.clone()})

    changes = [] if change is None else [(names[0], change)]
    with torch.no_grad():
        road(TOKENS, [*changes, *((name, look(name)) for name in names)], len(names))
    return seen


def _keep_up(lm: Sharded) -> None:
    """A process that makes fewer passes than the other waits for no pass of its own."""
    road = forward_pass(*lm, [LAST])
    assert isinstance(road, ShardedPass)
    for passes in ((0, 3), (2, 2), (1, 0)):
        for _ in range(passes[distributed.rank()]):
            assert _seen(road, [LAST])
        road.keep_up()


def _refuse_what_only_the_bridge_has(lm: Sharded) -> None:
    with pytest.raises(ProbekitError, match=r"lm.sharded is true, .* blocks.1.attn.hook_pattern"):
        forward_pass(*lm, ["blocks.1.attn.hook_pattern"])


def _refuse_other_weights_than_expected(folder: str, other: str) -> None:
    model = load_model(folder) if distributed.is_first() else load_outline(other)
    with pytest.raises(ProbekitError, match=r"are not those that its config.json tells of"):
        shard(model, torch.device("cpu"))


def probed(folder: str) -> None:
    """Probes a run, by what is read and by what was stored of it."""
    read = probe(folder, quiet=True).table
    stored = probe(folder, store=True, quiet=True).table
    pd.testing.assert_frame_equal(read, stored)


def trained(*folders: str) -> None:
    """Goes on with runs."""
    for folder in folders:
        train(None, folder, existing="resume", quiet=True)


def stopped(folder: str) -> None:
    """Is asked to stop behind the third step, keeps where it stands, and goes on from there."""
    wishes = loop._Loop._wishes
    asked = []

    def wish(self: loop._Loop, holding: object) -> tuple[Stopped | None, bool]:
        asked.append(1)
        return (Stopped(signal.SIGTERM), False) if len(asked) == 3 else wishes(self, holding)

    loop._Loop._wishes = wish
    try:
        train(None, folder, existing="resume", quiet=True)
    except Stopped:
        distributed.wait()
        assert (Path(folder) / "checkpoints" / "adapter" / "soft" / "latest.safetensors").exists()
    else:
        raise AssertionError("not stopped")
    train(None, folder, existing="resume", quiet=True)
    metrics = Run.open(folder).metrics()
    assert len(asked) == metrics.step[metrics.stage == "adapter/soft"].max(), "no step is done twice"


if __name__ == "__main__":
    for asked in " ".join(sys.argv[1:]).split(" then "):
        name, *given = asked.split()
        {work.__name__: work for work in (hooks, probed, trained, stopped)}[name](*given)
    distributed.leave()
