"""Figure 1: the planner-conditioned LM, drawn from the parts of a trained one; the CSV lists what it tells.

    python analyses/figure1_method.py runs/demo --variant joint

A folder that does not exist is trained from `--preset` first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import pandas as pd

import probekit
from probekit.config import VariantName
from probekit.reports.manifest import save_figure
from probekit.reports.method_diagram import Structure, method_figure


def main() -> None:
    """Trains what is missing, draws, saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"), help="a run (runs/demo)")
    parser.add_argument("--preset", default="demo", help="settings of a run that is not there (demo)")
    parser.add_argument(
        "--variant", default="joint", choices=get_args(VariantName), help="whose model (joint)"
    )
    parser.add_argument("--out", type=Path, default=Path("figures/figure1_method.png"))
    arguments = parser.parse_args()
    if arguments.run.exists():
        run = probekit.load_run(arguments.run)
    else:
        run = probekit.train(probekit.Config.from_preset(arguments.preset), arguments.run)
    structure = Structure.of(run, arguments.variant)
    path = save_figure(
        method_figure(structure),
        pd.DataFrame(structure.rows()),
        arguments.out,
        script="analyses/figure1_method.py",
        settings={"variant": arguments.variant},
        runs=[run],
    )
    print(path)  # noqa: T201 - a script tells what it wrote


if __name__ == "__main__":
    main()
