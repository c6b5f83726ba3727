"""Figure 5: where the plan can be read, and where it is used, by layer and distance.

    probekit probe runs/demo && probekit intervene runs/demo
    python analyses/figure5_causal.py runs/demo
    python analyses/figure5_causal.py runs/demo --variant soft --strength 2

Above, heat maps of layers over distances. Left, what a linear probe reads of the next sentence's action.
Beside it, by how much the next sentence's loss rises (nats a token) when that is erased, when the activation
of a document that goes on with another action is put in its place, and when it is steered to a wrong action:
each less what as large a change in a random direction does in the same scenes. Brackets say that 0 is within
the 95 % interval, a plus that the adapter had told the LM of the next action.

Below, the same against layers at the nearest distance, with 95 % intervals from resampling documents, and
every control on its own: random directions, random subspaces of as many dimensions as are erased, a donor
with the same action, steering to the true action. The left one shows least-squares probes on the same scenes,
before and after erasing. The title tells of how many documents all that is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from manifest import save_figure
from scripts import run_script, script_parser

import probekit
from probekit.reports.plots import draw_interventions, intervention_numbers


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script_parser(__doc__, "figures/figure5_causal.png")
    parser.add_argument("run", metavar="RUN", help="a run with probes and interventions")
    parser.add_argument("--variant", help="whose activations were changed (none, if they were)")
    parser.add_argument("--location", default="hook_resid_post", help="where (hook_resid_post)")
    parser.add_argument("--strength", type=float, help="of steering (the least)")
    return parser.parse_args(words)


def main() -> None:
    """Reads the run, draws, saves."""
    given = parse()
    run = probekit.load_run(given.run)
    numbers = intervention_numbers(run, given.variant, given.location, given.strength)
    settings = {
        "variant": numbers.variant.iloc[0],
        "location": given.location,
        "strength": given.strength,
    }
    script = "analyses/figure5_causal.py"
    path = save_figure(
        draw_interventions(numbers), numbers, given.out, script=script, settings=settings, runs=[run]
    )
    print(path)  # noqa: T201 - a script tells what it wrote


if __name__ == "__main__":
    run_script(main)
