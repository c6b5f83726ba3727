"""How long the rest of a sweep takes, by how long the same stages took in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean

from probekit.config import Config
from probekit.run import Run
from probekit.stage_settings import stage_settings, stages_of
from probekit.storage import read_json

MEASURING = "measuring"
"""What a run does beside its stages."""


class TimeLeft:
    """Stages that are still to be trained, and how long those that were took.

    Args:
        finished: Settings of runs that are finished: what they have is shared.
        ahead: Settings of the others, in their order.
    """

    def __init__(self, finished: Iterable[Config], ahead: Sequence[Config]) -> None:
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        made = {key for config in finished for key in _keys(config).values()}
        self._ahead: list[list[str]] = []
        for config in ahead:
            keys = _keys(config)
            self._ahead.append([MEASURING, *(stage for stage, key in keys.items() if key not in made)])
            made.update(keys.values())

    def done(self, run: Run | None, trained: Sequence[str], seconds: float) -> None:
        """Takes the next run off; None for one that failed.

        Args:
            run: The run.
            trained: Its stages that were trained, not shared.
            seconds: How long all of it took.
        """
        self._ahead.pop(0)
        if run is None:
            return
        stages = read_json(run.folder / "run.json")["stages"]
        took = {stage: stages[stage]["seconds"] for stage in trained}
        for stage, its_seconds in (took | {MEASURING: max(0.0, seconds - sum(took.values()))}).items():
            self._seconds[stage].append(its_seconds)

    @property
    def seconds(self) -> float | None:
        """For the runs ahead; None while a stage of theirs was not trained yet."""
        ahead = [stage for stages in self._ahead for stage in stages]
        if not {*ahead} <= self._seconds.keys():
            return None
        return sum(mean(self._seconds[stage]) for stage in ahead)


def _keys(config: Config) -> dict[str, str]:
    return {stage: f"{stage} {stage_settings(config, stage)}" for stage in stages_of(config)}
