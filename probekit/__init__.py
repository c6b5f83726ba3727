"""probekit: planner-conditioned language models, and probes for what any language model plans.

import probekit

run = probekit.train(probekit.Config.from_preset("demo"), "runs/demo")
probekit.evaluate(run).perplexity
probekit.probe(run).table
"""

from __future__ import annotations

from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probekit.causal.continuation import ContinuationResults, continuation
    from probekit.causal.intervene import InterventionResults, intervene
    from probekit.causal.subnetwork import SubnetworkResults, subnetwork
    from probekit.config import Config
    from probekit.errors import ProbekitError
    from probekit.evaluation.ask import Asked, ask
    from probekit.evaluation.evaluate import evaluate
    from probekit.evaluation.perplexity import Evaluation
    from probekit.generation.evaluate import GenerationEvaluation, evaluate_generation
    from probekit.generation.generate import Generated, generate
    from probekit.generation.prompts import Prompt
    from probekit.probing.arrays import ArrayResults, LinearProbes, fit_grid, load_probes
    from probekit.probing.compare import Comparison, compare
    from probekit.probing.geometry import geometry
    from probekit.probing.in_context import InContext, in_context
    from probekit.probing.over_training import TrainingProbes, probe_checkpoints
    from probekit.probing.probe import ProbeResults, probe
    from probekit.probing.score import score
    from probekit.probing.texts import TextActivations, activations
    from probekit.reports.attribution import Attribution, attribute
    from probekit.reports.lens import lens
    from probekit.reports.plot_compare import plot_comparison
    from probekit.reports.plot_geometry import plot_geometry
    from probekit.reports.plot_interventions import plot_interventions
    from probekit.reports.plot_over_training import plot_over_training
    from probekit.reports.plot_probes import plot_curve, plot_probes
    from probekit.reports.plot_runs import plot_perplexity, plot_sweep, plot_training
    from probekit.reports.report import report
    from probekit.run.run import Run
    from probekit.sweeps import Sweep, sweep
    from probekit.training.train import build_corpus, prepare, train

    load_run = Run.open

_HOME = {
    "ArrayResults": "probekit.probing.arrays",
    "Asked": "probekit.evaluation.ask",
    "Comparison": "probekit.probing.compare",
    "Attribution": "probekit.reports.attribution",
    "Config": "probekit.config",
    "ContinuationResults": "probekit.causal.continuation",
    "Evaluation": "probekit.evaluation.perplexity",
    "Generated": "probekit.generation.generate",
    "GenerationEvaluation": "probekit.generation.evaluate",
    "InContext": "probekit.probing.in_context",
    "InterventionResults": "probekit.causal.intervene",
    "LinearProbes": "probekit.probing.arrays",
    "ProbeResults": "probekit.probing.probe",
    "ProbekitError": "probekit.errors",
    "Prompt": "probekit.generation.prompts",
    "Run": "probekit.run.run",
    "SubnetworkResults": "probekit.causal.subnetwork",
    "Sweep": "probekit.sweeps",
    "TextActivations": "probekit.probing.texts",
    "TrainingProbes": "probekit.probing.over_training",
    "activations": "probekit.probing.texts",
    "ask": "probekit.evaluation.ask",
    "attribute": "probekit.reports.attribution",
    "build_corpus": "probekit.training.train",
    "compare": "probekit.probing.compare",
    "continuation": "probekit.causal.continuation",
    "demo": "probekit.cli.commands:run_demo",
    "evaluate": "probekit.evaluation.evaluate",
    "evaluate_generation": "probekit.generation.evaluate",
    "fit_grid": "probekit.probing.arrays",
    "geometry": "probekit.probing.geometry",
    "generate": "probekit.generation.generate",
    "in_context": "probekit.probing.in_context",
    "intervene": "probekit.causal.intervene",
    "load_probes": "probekit.probing.arrays",
    "load_run": "probekit.run.run:Run.open",
    "lens": "probekit.reports.lens",
    "plot_comparison": "probekit.reports.plot_compare",
    "plot_curve": "probekit.reports.plot_probes",
    "plot_geometry": "probekit.reports.plot_geometry",
    "plot_interventions": "probekit.reports.plot_interventions",
    "plot_over_training": "probekit.reports.plot_over_training",
    "plot_perplexity": "probekit.reports.plot_runs",
    "plot_probes": "probekit.reports.plot_probes",
    "plot_sweep": "probekit.reports.plot_runs",
    "plot_training": "probekit.reports.plot_runs",
    "prepare": "probekit.training.train",
    "probe": "probekit.probing.probe",
    "probe_checkpoints": "probekit.probing.over_training",
    "report": "probekit.reports.report",
    "score": "probekit.probing.score",
    "subnetwork": "probekit.causal.subnetwork",
    "sweep": "probekit.sweeps",
    "train": "probekit.training.train",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a name's module when it is first used, so that `probekit --help` need not load PyTorch."""
    if name not in _HOME:
        raise AttributeError(f"module 'probekit' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return attrgetter(attribute or name)(import_module(module))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
