"""Depth ensemble: time and memory of its loss with gradients, against all layers' logits at once.

    python benchmarks/depth_ensemble.py [--device cuda] [--quick] [--repeats 3] [--out FOLDER]
        [--only distilled] [--tokens 1024] [--vocabulary 50000] [--width 768] [--layers 1 2 4 8]

Random hidden states of k layers, as a tuned LM gives them, go in; the loss and its gradients with respect to
these states, the layers' norms and the router come out; the head is frozen. "All logits" computes what the
paper writes: k times the head, PyTorch's cross-entropy of the weighted sum, its divergences, autograd. With
k = 8 and distillation that takes about 7 GB for the 1,024 tokens that a CPU is given here; a GPU is given
8,192, which take eight times as much. "Plain LM" is the cross-entropy of the last layer alone. Gradients have
to agree: `difference` is the largest one in any tensor, as a share of that tensor's largest entry. Memory is
what one call adds, in a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from harness import (
    REFERENCE,
    Contestant,
    Options,
    Row,
    best_matrix_rate,
    compare,
    keep,
    parse_options,
    peak_memory,
    race,
)
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
    """What goes in.

    Attributes:
        tokens: Tokens whose loss is summed.
        vocabulary: Logits of a token and layer.
        width: Features of a hidden state.
        layers: Late layers, k.
        distilled: Whether they learn from the last one.
    """

    tokens: int = 1024
    vocabulary: int = 50_000
    width: int = 768
    layers: int = 1
    distilled: bool = False

    @property
    def name(self) -> str:
        """The workload's."""
        return f"k = {self.layers}, distilled" if self.distilled else f"k = {self.layers}"


QUICK = Sizes(tokens=256, vocabulary=4000, width=16)
TINY = Sizes(tokens=8, vocabulary=50, width=16)
GPU_TOKENS = 8192


class Scene:
    """Hidden states, an untrained ensemble and a head.

    Attributes:
        sizes: As given.
        ensemble: Of the late layers, or of the last one alone.
        leaves: What gradients are wanted of.
    """

    def __init__(self, sizes: Sizes, device: torch.device, *, last_only: bool = False) -> None:
        self.sizes, self._device = sizes, device
        depth, generator = max(12, sizes.layers), torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        # Neighbouring layers are alike, the last one is drawn first, and logits spread by about 2.
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
        """How the layers learn from the last one."""
        return DistillationSettings() if self.sizes.distilled else None

    def gradients(self, loss: Callable[[Scene], Tensor]) -> list[Tensor]:
        """The gradients of a loss with respect to all leaves, in the arithmetic that training has."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            value = loss(self)
        return list(torch.autograd.grad(value, self.leaves))

    @property
    def dtype(self) -> torch.dtype:
        """Of the head's products: what `training.precision: auto` takes."""
        half = self._device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if half else torch.float32


# Contestants: each takes a scene and gives the summed loss, through which gradients flow.


def probekit(scene: Scene) -> Tensor:
    """One head for the mixed states, and the layers' logits a few tokens at a time."""
    return DepthLoss(scene.distillation)(scene.head, scene.ensemble(scene.hidden), scene.targets)


def all_logits(scene: Scene) -> Tensor:
    """The logits of all layers, their weighted sum, and autograd, as the paper's formulas are written."""
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
    """The loss that the LM has without an ensemble, behind the same trainable norm."""
    (state,) = scene.ensemble(scene.hidden).states
    return F.cross_entropy(scene.head(state).float(), scene.targets, reduction="sum")


@dataclass(frozen=True)
class Way:
    """A contestant.

    Attributes:
        loss: Its loss.
        heads: How often it applies the head to all tokens.
        last_only: Whether it reads the last layer alone.
    """

    loss: Callable[[Scene], Tensor]
    heads: Callable[[Sizes], int]
    last_only: bool = False


CONTESTANTS: Mapping[str, Way] = {
    REFERENCE: Way(probekit, lambda sizes: 1 + sizes.distilled * sizes.layers),
    ALL: Way(all_logits, lambda sizes: sizes.layers),
    PLAIN: Way(plain, lambda _: 1, last_only=True),
}


def prepare_loss(device: str, contestant: str, sizes: dict[str, Any]) -> Callable[[], Any]:
    """The call takes a loss and its gradients; a smaller one, before, has loaded what the libraries need."""
    way, place = CONTESTANTS[contestant], torch.device(device)
    Scene(TINY, place, last_only=True).gradients(plain)
    scene = Scene(Sizes(**sizes), place, last_only=way.last_only)
    return lambda: scene.gradients(way.loss)


def measure(sizes: Sizes, options: Options) -> list[Row]:
    """The rows of a workload."""
    scenes = {
        name: Scene(sizes, options.device, last_only=way.last_only) for name, way in CONTESTANTS.items()
    }
    works = {name: _work(scenes[name], way) for name, way in CONTESTANTS.items()}
    outcomes = race({n: Contestant(work, work) for n, work in works.items()}, options.repeats, options.device)
    dtype = scenes[REFERENCE].dtype
    shape = (sizes.tokens, sizes.width, sizes.vocabulary)
    rate = best_matrix_rate(options, options.device, dtype, shape)
    rows = []
    for name, outcome in outcomes.items():
        row = {"workload": sizes.name} | asdict(sizes)
        row |= {"dtype": str(dtype).removeprefix("torch."), "contestant": name} | outcome.columns()
        # Two operations a multiplication; the backward pass, to the states alone, is another product.
        flops = 2.0 * 2.0 * sizes.tokens * sizes.width * sizes.vocabulary * CONTESTANTS[name].heads(sizes)
        row["matrix_rate_share"] = flops / row["seconds"] / rate
        alike = name != PLAIN or sizes.layers == 1
        row["difference"] = difference(outcome.result, outcomes[REFERENCE].result) if alike else None
        row |= peak_memory(prepare_loss, options.device, contestant=name, sizes=asdict(sizes))
        rows.append(row)
    compare(rows, SAME[dtype])
    added = "added_device_megabytes" if options.device.type == "cuda" else "added_megabytes"
    by_name = {row["contestant"]: row for row in rows}
    for row in rows:
        row["memory_ratio"] = row[added] / by_name[REFERENCE][added]
        row["time_of_plain"] = row["seconds"] / by_name[PLAIN]["seconds"]
        row["memory_of_plain"] = row[added] / by_name[PLAIN][added]
    return rows


def _work(scene: Scene, way: Way) -> Callable[[], list[Tensor]]:
    return lambda: scene.gradients(way.loss)


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of any two tensors, as a share of the second one's largest entry."""
    pairs = zip(found, wanted, strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, list[Sizes]]:
    """What all benchmarks take from a command line, and the workloads."""
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
        if k > 1 or not distilled  # one layer has nobody to learn from
    ]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measures all workloads, prints and writes them."""
    options, workloads = parse(arguments)
    rows = []
    for sizes in workloads:
        if options.only not in sizes.name:
            continue
        print(f"{sizes.name} ...", flush=True)
        rows += measure(sizes, options)
    told = {
        "ratio": f"seconds over those of {REFERENCE}",
        "memory_ratio": f"added memory over that of {REFERENCE}",
        "time_of_plain": f"seconds over those of {PLAIN}",
        "memory_of_plain": f"added memory over that of {PLAIN}",
    }
    keep("depth_ensemble", options, told, rows)
    return rows


if __name__ == "__main__":
    main()
