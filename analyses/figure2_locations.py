"""Figure 2: where probes read, in a drawing of one Transformer block; the CSV is the table of locations.

python analyses/figure2_locations.py
python analyses/figure2_locations.py --parallel   # attention and MLP side by side, as in GPT-NeoX
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from block_diagram import block_figure
from manifest import save_figure

from probekit.probing.locations import LOCATIONS, table_rows


def main() -> None:
    """Draws, saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parallel", action="store_true", help="draw a block of GPT-NeoX's kind")
    parser.add_argument("--out", type=Path, help="the picture (figures/figure2_locations[_parallel].png)")
    arguments = parser.parse_args()
    name = "figure2_locations_parallel.png" if arguments.parallel else "figure2_locations.png"
    rows = [row for row in table_rows() if LOCATIONS[row["location"]].parallel or not arguments.parallel]
    path = save_figure(
        block_figure(parallel=arguments.parallel),
        pd.DataFrame(rows),
        arguments.out or Path("figures") / name,
        script="analyses/figure2_locations.py",
        settings={"parallel": arguments.parallel},
        runs=[],
    )
    print(path)  # noqa: T201 - a script tells what it wrote


if __name__ == "__main__":
    main()
