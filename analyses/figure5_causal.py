"""Figure 5: where the plan can be read, and where it is used, by layer and distance.

    probekit probe runs/demo && probekit intervene runs/demo
    python analyses/figure5_causal.py runs/demo
    python analyses/figure5_causal.py runs/demo --variant soft --strength 2

Above, heat maps of layers by distances. Left, what a linear probe reads of the next sentence's action.
Beside it, by how much the next sentence's loss rises (nats per token) when that action is erased, when the
activation of a document that continues with another action is patched in, and when it is steered to a wrong
action: each beyond an equally large change in a random direction at the same boundaries. Brackets mean that
the 95 % interval contains 0, a plus that the LM was conditioned on the next action.

Below, the same against layers at the nearest distance, with 95 % intervals from resampling documents and
every control: random directions, random subspaces of the erased dimension, a donor with the same action,
steering to the true action. The left panel shows least-squares probes at the same boundaries, before and
after erasing.
"""

from __future__ import annotations

from shared.script import run_script, save_figure, script_parser

import probekit
from probekit.reports.plot_interventions import draw_interventions, intervention_numbers


def main() -> None:
    """Reads the run, draws, saves."""
    parser = script_parser(__doc__, "figures/figure5_causal.png")
    parser.add_argument("run", metavar="RUN", help="a run with probes and interventions")
    parser.add_argument("--variant", help="whose activations were changed (none, if they were)")
    parser.add_argument("--location", default="hook_resid_post", help="where (hook_resid_post)")
    parser.add_argument("--strength", type=float, help="of steering (the smallest)")
    given = parser.parse_args()
    run = probekit.load_run(given.run)
    numbers = intervention_numbers(run, given.variant, given.location, given.strength)
    settings = {"variant": numbers.variant.iloc[0], "location": given.location, "strength": given.strength}
    save_figure(draw_interventions(numbers), numbers, given.out, settings, [run])


if __name__ == "__main__":
    run_script(main)
