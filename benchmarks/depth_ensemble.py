"""Depth ensemble: time and memory of its loss with gradients, against computing all layers' logits.

    python benchmarks/depth_ensemble.py [--device cuda] [--quick] [--repeats 3] [--out FOLDER]
        [--only distilled] [--tokens 1024] [--vocabulary 50000] [--width 768] [--layers 1 2 4 8]

From random hidden states of k layers, the loss and its gradients with respect to these states, the layers'
norms and the router are computed; the head is frozen. "All logits" computes the paper's formulas: k times the
head, PyTorch's cross-entropy of the weighted sum, its divergences, autograd. With k = 8 and distillation that
takes about 7 GB for 1,024 tokens on a CPU; a GPU gets 8,192 tokens, which take eight times as much. "Plain
LM" is the cross-entropy of the last layer alone. Gradients must agree: `difference` is the largest one in any
tensor, relative to that tensor's largest entry. Memory is what one call adds, in a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from harness import (
    REFERENCE,
    Contestant,
    Options,
    Row,
    best_matrix_rate,
    compare,
    parse_options,
    peak_memory,
    race,
    run_workloads,
)
from random_lm import product_dtype
from torch import Tensor, nn
from torch.nn import functional as F

from probekit.config import DistillationSettings
from probekit.models.depth_ensemble import DepthEnsemble, DepthLoss

ALL = "all logits"
PLAIN = "plain LM"
SAME = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far gradients may differ: sums are rounded in another order."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a workload."""

    tokens: int = 1024
    vocabulary: int = 50_000
    width: int = 768  # of the hidden states
    layers: int = 1  # late layers, k
    distilled: bool = False  # whether layers are distilled from the last one

    @property
    def name(self) -> str:
        """The workload's name."""
        return f"k = {self.layers}, distilled" if self.distilled else f"k = {self.layers}"


QUICK = Sizes(tokens=256, vocabulary=4000, width=16)
TINY = Sizes(tokens=8, vocabulary=50, width=16)
GPU_TOKENS = 8192


class Scene:
    """Hidden states, an untrained ensemble (of the last layer alone, if asked for) and a head."""

    def __init__(self, sizes: Sizes, device: torch.device, *, last_only: bool = False) -> None:
        self.sizes, self._device = sizes, device
        depth, generator = max(12, sizes.layers), torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        # Neighbouring layers are similar, the last one is drawn first, and logits spread by about 2.
        common = normal(sizes.tokens, sizes.width)
        noise = [0.5 * normal(sizes.tokens, sizes.width) for _ in range(sizes.layers)]
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False).requires_grad_(False).to(device)
        self.head.weight.copy_(2.0 / sizes.width**0.5 * normal(sizes.vocabulary, sizes.width))
        self.targets = torch.randint(sizes.vocabulary, (sizes.tokens,), generator=generator).to(device)
        layers = [depth - 1] if last_only else list(range(depth - sizes.layers, depth))
        self.ensemble = DepthEnsemble(nn.LayerNorm(sizes.width), layers, depth=depth, width=sizes.width)
        self.ensemble.to(device)
        names = self.ensemble.read_names[::-1]  # the last layer first
        states = zip(names, noise, strict=last_only is False)
        self.hidden = {name: (common + one).requires_grad_() for name, one in states}
        self.leaves = [*self.hidden.values(), *self.ensemble.trained]

    @property
    def distillation(self) -> DistillationSettings | None:
        """The settings of distillation, if there is any."""
        return DistillationSettings() if self.sizes.distilled else None

    def gradients(self, loss: Callable[[Scene], Tensor]) -> list[Tensor]:
        """Computes the gradients of a loss with respect to states, norms and router, as in training."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            value = loss(self)
        return list(torch.autograd.grad(value, self.leaves))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the head's products."""
        return product_dtype(self._device, "auto")


# Contestants: each takes a scene and returns the summed loss, through which gradients flow.


def probekit(scene: Scene) -> Tensor:
    """One head for the mixed states, and the layers' logits a few tokens at a time."""
    return DepthLoss(scene.distillation)(scene.head, scene.ensemble(scene.hidden), scene.targets)


def all_logits(scene: Scene) -> Tensor:
    """The logits of all layers, their weighted sum, and autograd: the paper's formulas."""
    late = scene.ensemble(scene.hidden)
    logits = [scene.head(state).float() for state in late.states]
    mixed = sum((late.weights[:, [i]] * one for i, one in enumerate(logits)), torch.zeros(()))
    loss = F.cross_entropy(mixed, scene.targets, reduction="sum")
    if (distilled := scene.distillation) is not None:
        last = logits[-1].log_softmax(dim=-1).detach()
        for one in logits[:-1]:
            divergence = F.kl_div(last, one.log_softmax(dim=-1), reduction="sum", log_target=True)
            loss = loss + distilled.weight * divergence
    return loss


def plain(scene: Scene) -> Tensor:
    """The LM's loss without an ensemble, after the same trainable norm."""
    (state,) = scene.ensemble(scene.hidden).states
    return F.cross_entropy(scene.head(state).float(), scene.targets, reduction="sum")


class Method(NamedTuple):
    """A contestant: its loss, how often it applies the head to all tokens, and whether it needs one layer."""

    loss: Callable[[Scene], Tensor]
    heads: Callable[[Sizes], int]
    last_only: bool = False


CONTESTANTS: Mapping[str, Method] = {
    REFERENCE: Method(probekit, lambda sizes: 1 + sizes.distilled * sizes.layers),
    ALL: Method(all_logits, lambda sizes: sizes.layers),
    PLAIN: Method(plain, lambda _: 1, last_only=True),
}


def prepare_loss(device: str, contestant: str, sizes: dict[str, Any]) -> Callable[[], Any]:
    """Prepares a loss and its gradients; libraries load code in a smaller one before."""
    method, place = CONTESTANTS[contestant], torch.device(device)
    Scene(TINY, place, last_only=True).gradients(plain)
    scene = Scene(Sizes(**sizes), place, last_only=method.last_only)
    return lambda: scene.gradients(method.loss)


def measure(name: str, sizes: Sizes, options: Options) -> list[Row]:
    """Measures a workload."""
    scenes = {
        each: Scene(sizes, options.device, last_only=method.last_only) for each, method in CONTESTANTS.items()
    }
    works = {
        each: Contestant(partial(scenes[each].gradients, method.loss)) for each, method in CONTESTANTS.items()
    }
    outcomes = race(works, options.repeats, options.device)
    dtype = scenes[REFERENCE].dtype
    rate = best_matrix_rate(options, options.device, dtype, (sizes.tokens, sizes.width, sizes.vocabulary))
    rows = []
    for each, outcome in outcomes.items():
        row = {"workload": name} | asdict(sizes)
        row |= {"dtype": str(dtype).removeprefix("torch."), "contestant": each} | outcome.columns()
        # Two operations a multiplication; the backward pass, to the states alone, is another product.
        flops = 2.0 * 2.0 * sizes.tokens * sizes.width * sizes.vocabulary * CONTESTANTS[each].heads(sizes)
        row["matrix_rate_share"] = flops / row["seconds"] / rate
        same_loss = each != PLAIN or sizes.layers == 1
        row["difference"] = difference(outcome.result, outcomes[REFERENCE].result) if same_loss else None
        row |= peak_memory(prepare_loss, options.device, contestant=each, sizes=asdict(sizes))
        rows.append(row)
    compare(rows, SAME[dtype])
    added = "added_device_megabytes" if options.device.type == "cuda" else "added_megabytes"
    by_name = {row["contestant"]: row for row in rows}
    for row in rows:
        row["memory_ratio"] = row[added] / by_name[REFERENCE][added]
        row["time_of_plain"] = row["seconds"] / by_name[PLAIN]["seconds"]
        row["memory_of_plain"] = row[added] / by_name[PLAIN][added]
    return rows


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Returns the largest difference of two tensors, relative to the second one's largest entry."""
    pairs = zip(found, wanted, strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, list[Sizes]]:
    """Parses the options, and the sizes of the workloads."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("tokens", "vocabulary", "width"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--layers", type=int, nargs="+")
    given, others = parser.parse_known_args(arguments)
    options = parse_options(__doc__, others)
    base = QUICK if options.quick else Sizes()
    if options.device.type == "cuda" and not options.quick:
        base = replace(base, tokens=GPU_TOKENS)
    layers = given.layers or ([2] if options.quick else [1, 2, 4, 8])
    changed = {name: n for name, n in vars(given).items() if name != "layers" and n is not None}
    if min(*layers, *changed.values(), 1) < 1:
        parser.error("tokens, vocabulary, width and layers must be 1 or more")
    base = replace(base, **changed)
    return options, [
        replace(base, layers=k, distilled=distilled)
        for distilled in (False, True)
        for k in layers
        if k > 1 or not distilled  # one layer cannot be distilled
    ]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measures all workloads, prints and writes them."""
    options, workloads = parse(arguments)
    settings = {
        "ratio": f"seconds over those of {REFERENCE}",
        "memory_ratio": f"added memory over that of {REFERENCE}",
        "time_of_plain": f"seconds over those of {PLAIN}",
        "memory_of_plain": f"added memory over that of {PLAIN}",
    }
    return run_workloads(
        "depth_ensemble", options, {each.name: each for each in workloads}, measure, settings
    )


if __name__ == "__main__":
    main()
