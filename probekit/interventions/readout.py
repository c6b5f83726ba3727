"""The probe that tells what the LM makes of a change: of its last layer, right before the next sentence."""

from __future__ import annotations

from probekit.config import VariantName
from probekit.errors import ProbekitError
from probekit.probe_record import read_probe_record
from probekit.probing.activations import Place
from probekit.probing.saved import Cell, LinearProbe, SavedProbes
from probekit.run import Run

READOUT = "hook_resid_post"
"""Where, in the last layer, it reads."""


def last_probe(run: Run, variant: VariantName) -> tuple[Place, LinearProbe]:
    """Where it reads, and the probe, as `probekit probe` left it.

    Raises:
        ProbekitError: The run has no such probe, or those of something else.
    """
    last = run.bridged.cfg.n_layers - 1
    folder = run.folder / "probes"
    saved = SavedProbes(folder, variant, run.config.seed)
    probed = read_probe_record(run.folder).config.probe
    if (probed.target, probed.labels, probed.anchors) != ("action", None, "sentence"):
        raise ProbekitError(
            f"{folder} holds probes of {probed.target!r} before every {probed.anchors}, but "
            "interventions need those of the next sentence's action; run "
            f"`probekit probe {run.folder} --probe.variants {variant}`"
        )
    return (READOUT, last), saved[Cell(READOUT, last, 1)]
