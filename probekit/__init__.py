"""probekit: planner-conditioned language models, and probes for what any language model plans.

import probekit

run = probekit.train(probekit.Config.from_preset("demo"), "runs/demo")
probekit.evaluate(run).perplexity
probekit.probe(run).table
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probekit.config import Config
    from probekit.errors import ProbekitError
    from probekit.evaluation.evaluate import evaluate
    from probekit.evaluation.generation import Generated, generate
    from probekit.evaluation.generation_metrics import GenerationEvaluation, evaluate_generation
    from probekit.evaluation.perplexity import Evaluation
    from probekit.evaluation.prompts import Prompt
    from probekit.interventions.intervene import InterventionResults, intervene
    from probekit.probing.over_training import TrainingProbes, probe_checkpoints
    from probekit.probing.probe import ProbeResults, probe
    from probekit.reports.intervention_figure import plot_interventions
    from probekit.reports.lens import lens
    from probekit.reports.over_training import plot_over_training
    from probekit.reports.plots import plot_curve, plot_perplexity, plot_probes, plot_sweep, plot_training
    from probekit.reports.report import report
    from probekit.run import Run
    from probekit.subnetworks.subnetwork import SubnetworkResults, subnetwork
    from probekit.sweeps.results import Sweep
    from probekit.sweeps.sweep import sweep
    from probekit.training.train import build_corpus, prepare, train
    from probekit.walkthrough import demo

    load_run = Run.open

_HOME = {
    "Config": "probekit.config",
    "Evaluation": "probekit.evaluation.perplexity",
    "Generated": "probekit.evaluation.generation",
    "GenerationEvaluation": "probekit.evaluation.generation_metrics",
    "InterventionResults": "probekit.interventions.intervene",
    "ProbeResults": "probekit.probing.probe",
    "ProbekitError": "probekit.errors",
    "Prompt": "probekit.evaluation.prompts",
    "Run": "probekit.run",
    "SubnetworkResults": "probekit.subnetworks.subnetwork",
    "Sweep": "probekit.sweeps.results",
    "TrainingProbes": "probekit.probing.over_training",
    "build_corpus": "probekit.training.train",
    "demo": "probekit.walkthrough",
    "evaluate": "probekit.evaluation.evaluate",
    "evaluate_generation": "probekit.evaluation.generation_metrics",
    "generate": "probekit.evaluation.generation",
    "intervene": "probekit.interventions.intervene",
    "lens": "probekit.reports.lens",
    "plot_curve": "probekit.reports.plots",
    "plot_interventions": "probekit.reports.intervention_figure",
    "plot_over_training": "probekit.reports.over_training",
    "plot_perplexity": "probekit.reports.plots",
    "plot_probes": "probekit.reports.plots",
    "plot_sweep": "probekit.reports.plots",
    "plot_training": "probekit.reports.plots",
    "prepare": "probekit.training.train",
    "probe": "probekit.probing.probe",
    "probe_checkpoints": "probekit.probing.over_training",
    "report": "probekit.reports.report",
    "subnetwork": "probekit.subnetworks.subnetwork",
    "sweep": "probekit.sweeps.sweep",
    "train": "probekit.training.train",
}
__all__ = [
    "Config",
    "Evaluation",
    "Generated",
    "GenerationEvaluation",
    "InterventionResults",
    "ProbeResults",
    "ProbekitError",
    "Prompt",
    "Run",
    "SubnetworkResults",
    "Sweep",
    "TrainingProbes",
    "build_corpus",
    "demo",
    "evaluate",
    "evaluate_generation",
    "generate",
    "intervene",
    "lens",
    "load_run",
    "plot_curve",
    "plot_interventions",
    "plot_over_training",
    "plot_perplexity",
    "plot_probes",
    "plot_sweep",
    "plot_training",
    "prepare",
    "probe",
    "probe_checkpoints",
    "report",
    "subnetwork",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports a name's module when it is first used, so that `probekit --help` need not load PyTorch."""
    if name == "load_run":
        return import_module("probekit.run").Run.open
    if name not in _HOME:
        raise AttributeError(f"module 'probekit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
