"""`probekit demo`: train, evaluate and probe on the planted corpus."""

from __future__ import annotations

from pathlib import Path

from probekit.config import Config
from probekit.evaluation.evaluate import evaluate
from probekit.probing.probe import probe
from probekit.reports.figures import save_probe_figures
from probekit.reports.terminal import print_corpus, print_evaluation, print_probes, print_training
from probekit.run.run import Run
from probekit.training.train import train


def demo(out: str | Path = "runs/demo", *, overwrite: bool = False, quiet: bool = False) -> Run:
    """Runs the main job on the embedded default; what an earlier demo finished is not done again.

    Args:
        out: The run's folder.
        overwrite: Begin anew.
        quiet: Show no progress.
    """
    run = train(Config.from_preset("demo"), out, existing="overwrite" if overwrite else "resume", quiet=quiet)
    print_corpus(run.corpus, nearest=1)
    print_training(run)
    print_evaluation(evaluate(run, quiet=quiet))
    probes = probe(run, quiet=quiet)
    save_probe_figures(probes.table, probes.folder)
    print_probes(probes)
    return run
