"""What does not fit together is refused before long work is begun."""

from __future__ import annotations

import torch

from probekit.config import Config
from probekit.corpus.embeddings import check_encoder
from probekit.errors import ProbekitError
from probekit.models.conditioning import new_adapter
from probekit.models.depth_ensemble import new_ensemble
from probekit.models.mixing import VARIANTS
from probekit.run import Run
from probekit.stage_settings import variants_of
from probekit.training.adapter import check_tunable


def check_new_model(config: Config) -> None:
    """Refuses what does not fit a new LM, whose size the settings say, before anything is written."""
    check_positions(config, config.lm.positions)
    if config.method == "depth-ensemble" and config.depth.layers > config.lm.layers:
        raise ProbekitError(
            f"depth.layers is {config.depth.layers}, but lm.layers is {config.lm.layers}; an ensemble has at "
            "most all layers of the LM"
        )
    tuned = config.training.base
    if tuned.tuning == "lora" and tuned.last_layers is not None and tuned.last_layers > config.lm.layers:
        raise ProbekitError(
            f"training.base.last_layers is {tuned.last_layers}, but lm.layers is {config.lm.layers}"
        )
    if config.conditioning.kind == "adapter" and config.conditioning.skip_layers >= config.lm.layers:
        raise ProbekitError(
            f"conditioning.skip_layers is {config.conditioning.skip_layers}, but lm.layers is "
            f"{config.lm.layers}: no layer is left to condition"
        )


def check_adapters(run: Run) -> None:
    """Refuses adapters that do not fit the LM, or lack an encoder, while the planner is not trained yet."""
    joint = any(VARIANTS[variant].joint for variant in variants_of(run.config))
    if joint and run.config.training.joint.encoder == "trained":
        check_encoder(run.folder / "corpus" / "encoder")
    codebook = torch.from_numpy(run.corpus.codebook.centroids)
    adapter = new_adapter(run.config.conditioning, codebook, run.bridged, run.config.seed)
    if run.config.training.base.tuning != "frozen":
        lm = run.base_lm()
        check_tunable(lm.forward_pass(adapter.names), adapter)
        del lm.plain  # training has a copy of its own


def check_ensembles(run: Run) -> None:
    """Refuses ensembles that do not fit the LM while nothing is trained on it yet."""
    base = run.base_lm()
    for member in run.config.depth.members:
        new_ensemble(member, run.config.depth, base.bridged, base.plain, run.config.seed)


def check_positions(config: Config, positions: int) -> None:
    """Refuses windows that are longer than an LM can read."""
    for setting, window in (
        ("training.window", config.training.window),
        ("evaluation.window", config.evaluation.window),
    ):
        if window is not None and window > positions:
            raise ProbekitError(f"{setting} is {window}, but the LM reads at most {positions} positions")
