"""What commands have left in a run's folder, as data frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.checksums import value_checksum
from probekit.errors import ProbekitError
from probekit.storage import read_json
from probekit.table_files import read_table

if TYPE_CHECKING:
    import pandas as pd


class RunResults:
    """The results in a run's folder.

    Attributes:
        folder: Where it is.
    """

    folder: Path

    def metrics(self) -> pd.DataFrame:
        """The rows of metrics.jsonl."""
        import pandas as pd

        path = self.folder / "metrics.jsonl"
        if not path.exists():
            raise ProbekitError(f"{self.folder} has no metrics yet; train it first")
        for stage, facts in read_json(self.folder / "run.json")["stages"].items():
            if facts.get("rows", found := self.rows_checksum(stage)) != found:
                raise ProbekitError(f"{path} is damaged (rows of {stage} are other ones); copy it again")
        return pd.DataFrame(read_rows(path))

    def rows_checksum(self, stage: str) -> str | None:
        """A checksum of a stage's rows of metrics.jsonl; None where it has none."""
        path = self.folder / "metrics.jsonl"
        rows = [row for row in read_rows(path) if row["stage"] == stage] if path.exists() else []
        return value_checksum(rows) if rows else None

    def losses_of(self, stage: str) -> pd.DataFrame:
        """A stage's losses in training: columns `step`, `loss` and `validation_loss`."""
        metrics = self.metrics()
        return metrics[metrics.stage == stage][["step", "loss", "validation_loss"]]

    def evaluation(self) -> dict[str, Any]:
        """What `probekit evaluate` found."""
        if not (self.folder / "evaluation.json").exists():
            raise ProbekitError(f"{self.folder} is not evaluated; run `probekit evaluate {self.folder}`")
        return read_json(self.folder / "evaluation.json")

    def losses(self) -> pd.DataFrame:
        """Test losses by document, variant and source of actions, as `probekit evaluate` left them."""
        return self._table("losses.parquet", "evaluate")

    def generation_metrics(self) -> dict[str, Any]:
        """What `probekit evaluate --generation` found."""
        if not (self.folder / "generation.json").exists():
            raise ProbekitError(
                f"{self.folder} has no generation.json; run `probekit evaluate {self.folder} --generation`"
            )
        return read_json(self.folder / "generation.json")

    def choices(self) -> pd.DataFrame:
        """Who solves which multiple-choice question, as `probekit evaluate` left it (depth ensemble)."""
        return self._table("choices.parquet", "evaluate")

    def probes(self) -> pd.DataFrame:
        """What `probekit probe` found: one row for each reader and cell of the grid."""
        return self._table("probes/results.parquet", "probe")

    def checkpoints_of(self, stage: str) -> Path:
        """The folder of a stage's checkpoints."""
        return self.folder / "checkpoints" / stage

    def probes_file(self, stage: str) -> Path:
        """Where the results of probing a stage's checkpoints are."""
        return self.checkpoints_of(stage) / "probes.parquet"

    def probes_over_training(self, stage: str = "lm") -> pd.DataFrame:
        """What `probekit probe --checkpoints` found: the rows of `probes` with the stage's `step`."""
        return self._table(str(self.probes_file(stage).relative_to(self.folder)), "probe --checkpoints")

    def interventions(self) -> pd.DataFrame:
        """What `probekit intervene` found, of all variants: a row for each condition, place and metric."""
        return self._of_variants("interventions", "results.parquet", "intervene")

    def subnetworks(self) -> pd.DataFrame:
        """What `probekit subnetwork` found, of all variants: a row for each condition, draw and metric."""
        return self._of_variants("subnetworks", "results.parquet", "subnetwork")

    def subnetwork_masks(self) -> pd.DataFrame:
        """The subnetworks themselves, of all variants: a row for each component."""
        return self._of_variants("subnetworks", "mask.parquet", "subnetwork")

    def _of_variants(self, folder: str, name: str, command: str) -> pd.DataFrame:
        import pandas as pd

        variants = sorted(path.parent.name for path in self.folder.glob(f"{folder}/*/{name}"))
        tables = [self._table(f"{folder}/{variant}/{name}", command) for variant in variants or ["none"]]
        return pd.concat(tables, ignore_index=True)

    def _table(self, name: str, command: str) -> pd.DataFrame:
        path, remedy = self.folder / name, f"run `probekit {command} {self.folder}`"
        if not path.exists():
            raise ProbekitError(f"{path} does not exist; {remedy}")
        try:
            return read_table(path)
        except ValueError as error:
            raise ProbekitError(f"{path} is damaged ({error}); {remedy}") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last one that an interruption cut off is left out."""
    try:
        *whole, _ = path.read_text("utf-8").split("\n")
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise ProbekitError(f"{path} is damaged ({error}); delete it") from None
