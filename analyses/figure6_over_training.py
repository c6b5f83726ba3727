"""Figure 6: when the plan appears: what probes read at every checkpoint of a training.

    probekit train --preset demo --training.lm.checkpoints 12 --out runs/steps
    probekit probe runs/steps --checkpoints
    python analyses/figure6_over_training.py runs/steps

Left, test accuracy of probes of the next sentence's action by layer at the nearest distance; right, by
distance at the layer that is best on validation documents at the last step. Bands are 95 % intervals from
resampling documents; baselines, on the same examples, stand where the distance is one. Below, the losses
of the training on the same axis of steps: logarithmic from 1 on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from manifest import save_figure
from scripts import run_script, script_parser

import probekit
from probekit.reports.figures import METRICS
from probekit.reports.plots import draw_over_training, over_training_numbers


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script_parser(__doc__, "figures/figure6_over_training.png")
    parser.add_argument("run", metavar="RUN", help="a run whose checkpoints were probed")
    parser.add_argument("--stage", default="lm", help="whose checkpoints (lm)")
    parser.add_argument("--metric", default="accuracy", choices=METRICS, help="what is drawn (accuracy)")
    parser.add_argument("--location", help="where (the first that was probed)")
    return parser.parse_args(words)


def main() -> None:
    """Reads the run, draws, saves."""
    given = parse()
    run = probekit.load_run(given.run)
    numbers = over_training_numbers(run.probes_over_training(given.stage), given.metric, given.location)
    settings = {"stage": given.stage, "metric": given.metric, "location": given.location}
    path = save_figure(
        draw_over_training(numbers, run.losses_of(given.stage)),
        numbers,
        given.out,
        script="analyses/figure6_over_training.py",
        settings=settings,
        runs=[run],
    )
    print(path)  # noqa: T201 - a script tells what it wrote


if __name__ == "__main__":
    run_script(main)
