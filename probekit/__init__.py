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
    from probekit.probing.probe import ProbeResults, probe
    from probekit.reports.lens import lens
    from probekit.reports.plots import plot_curve, plot_perplexity, plot_probes, plot_training
    from probekit.reports.report import report
    from probekit.run import Run
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
    "Sweep": "probekit.sweeps.results",
    "build_corpus": "probekit.training.train",
    "demo": "probekit.walkthrough",
    "evaluate": "probekit.evaluation.evaluate",
    "evaluate_generation": "probekit.evaluation.generation_metrics",
    "generate": "probekit.evaluation.generation",
    "intervene": "probekit.interventions.intervene",
    "lens": "probekit.reports.lens",
    "plot_curve": "probekit.reports.plots",
    "plot_perplexity": "probekit.reports.plots",
    "plot_probes": "probekit.reports.plots",
    "plot_training": "probekit.reports.plots",
    "prepare": "probekit.training.train",
    "probe": "probekit.probing.probe",
    "report": "probekit.reports.report",
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
    "Sweep",
    "build_corpus",
    "demo",
    "evaluate",
    "evaluate_generation",
    "generate",
    "intervene",
    "lens",
    "load_run",
    "plot_curve",
    "plot_perplexity",
    "plot_probes",
    "plot_training",
    "prepare",
    "probe",
    "report",
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
