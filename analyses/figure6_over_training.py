"""Figure 6: when the plan appears: what probes read at every checkpoint of a training.

    probekit train --preset demo --training.lm.checkpoints 12 --out runs/steps
    probekit probe runs/steps --checkpoints
    python analyses/figure6_over_training.py runs/steps

Left, test accuracy of probes of the next sentence's action by layer at the nearest position; right, by
position at the layer that is best on validation documents at the last step. Bands are 95 % intervals from
resampling documents; baselines, on the same examples, are drawn where the position is fixed. Below, the
losses of the training over the same steps, on a logarithmic axis from 1 on.
"""

from __future__ import annotations

from shared.script import run_script, save_figure, script_parser

import probekit
from probekit.reports.plot_over_training import draw_over_training, over_training_numbers
from probekit.reports.plot_probes import METRIC_LABELS


def main() -> None:
    """Reads the run, draws, saves."""
    parser = script_parser(__doc__, "figures/figure6_over_training.png")
    parser.add_argument("run", metavar="RUN", help="a run whose checkpoints were probed")
    parser.add_argument("--stage", default="lm", help="whose checkpoints (lm)")
    parser.add_argument(
        "--metric", default="accuracy", choices=METRIC_LABELS, help="what is drawn (accuracy)"
    )
    parser.add_argument("--location", help="where (the first that was probed)")
    given = parser.parse_args()
    run = probekit.load_run(given.run)
    numbers = over_training_numbers(run.probes_over_training(given.stage), given.metric, given.location)
    settings = {"stage": given.stage, "metric": given.metric, "location": given.location}
    figure = draw_over_training(numbers, run.losses_of(given.stage))
    save_figure(figure, numbers, given.out, settings, [run])


if __name__ == "__main__":
    run_script(main)
