"""Figure 1: the planner-conditioned LM, drawn from the parts of a trained one; the CSV lists what it tells.

    python analyses/figure1_method.py runs/demo --variant joint

A folder that does not exist is trained from `--preset` first.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from manifest import save_figure
from method_diagram import Structure, method_figure
from scripts import run_script, script_parser

import probekit


def main() -> None:
    """Trains what is missing, draws, saves."""
    parser = script_parser(__doc__, "figures/figure1_method.png")
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"), help="a run (runs/demo)")
    parser.add_argument("--preset", default="demo", help="settings of a run that is not there (demo)")
    parser.add_argument("--variant", help="whose model; the last of the run's by default")
    given = parser.parse_args()
    if given.run.exists():
        run = probekit.load_run(given.run)
    else:
        run = probekit.train(probekit.Config.from_preset(given.preset), given.run)
    variant = given.variant or (run.variants or ["joint"])[-1]
    structure = Structure.of(run, variant)
    path = save_figure(
        method_figure(structure),
        pd.DataFrame(structure.rows()),
        given.out,
        script="analyses/figure1_method.py",
        settings={"variant": variant},
        runs=[run],
    )
    print(path)  # noqa: T201 - a script tells what it wrote


if __name__ == "__main__":
    run_script(main)
