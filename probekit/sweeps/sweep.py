"""`probekit sweep`: the same settings with some changed, over seeds; a run for each, no stage trained twice.

OUT/sweep.json        settings, members, seeds
OUT/<member>/seed<N>  a run like any other
OUT/results.parquet   one row for each member, variant, metric and seed, and one over all seeds
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from probekit.config import Config, setting_names, setting_value
from probekit.devices import compute_device
from probekit.errors import ProbekitError
from probekit.evaluation.evaluate import evaluate
from probekit.progress import Progress
from probekit.run import Run
from probekit.stage_settings import stage_settings, stages_of, why_idle
from probekit.storage import held
from probekit.sweeps.members import Members
from probekit.sweeps.results import Place, Sweep
from probekit.sweeps.time_left import TimeLeft
from probekit.table_files import write_table
from probekit.training.checks import check_new_model
from probekit.training.train import train

MEMBER = re.compile(r"\w[\w.=,+-]*")
"""Names of members: folders everywhere."""


def sweep(
    config: Config,
    members: Members,
    seeds: Sequence[int],
    out: str | Path,
    *,
    generation: bool = False,
    quiet: bool = False,
) -> Sweep:
    """Trains and evaluates every member with every seed, each a run in `out/<member>/seed<N>`.

    Runs share all stages that their settings leave equal: these are trained once, and linked. Called again,
    it goes on where it was stopped; members and seeds that are new are added. A run that fails is told when
    the others are done.

    Args:
        config: The settings that members change.
        members: Settings by dotted name for every member by its name, the name of its folder too.
        seeds: Seeds of every member's runs, in place of the setting `seed`.
        out: The sweep's folder.
        generation: Measure generated text, too.
        quiet: Show no progress.

    Raises:
        ProbekitError: A setting is bad, members have other corpora, the folder holds something else, or a
            run failed.
    """
    compute_device(config.device)  # one that is not there is told once, and before anything is written
    begun = _begin(Path(out), config, members, seeds, generation=generation)
    with held(begun.folder):
        failed = _all_runs(begun, Progress(quiet=quiet), generation=generation, quiet=quiet)
        done, places = Sweep.open(begun.folder), begun.places
        if done.runs:
            write_table(done.folder / "results.parquet", done.table())
    for place, reason in failed.items():
        raise ProbekitError(
            f"{place}: {reason} ({len(failed)} of {len(places)} runs in {done.folder} failed, the others are "
            "finished)"
        )
    return done


def _all_runs(
    begun: Sweep, progress: Progress, *, generation: bool, quiet: bool
) -> dict[Place, ProbekitError]:
    """Trains and evaluates all runs; those that failed, with the reason."""
    failed: dict[Place, ProbekitError] = {}
    places = begun.places
    finished = [place for place in places if _is_done(begun, place, generation=generation)]
    ahead = [begun.config_of(place) for place in places if place not in finished]
    time_left = TimeLeft((begun.config_of(place) for place in begun.runs), ahead)
    for number, place in enumerate(places):
        if place in finished:
            continue
        left = "" if time_left.seconds is None else f"; about {time_left.seconds:.0f} s left"
        progress.say(f"run {number + 1} of {len(places)}: {place}{left}")
        since = time.monotonic()
        run, trained = None, list[str]()
        try:
            run, trained = _run(begun, place, progress, generation=generation, quiet=quiet)
        except ProbekitError as error:
            progress.say(f"{place} failed: {error}")
            failed[place] = error
        time_left.done(run, trained, time.monotonic() - since)
    return failed


def _is_done(begun: Sweep, place: Place, *, generation: bool) -> bool:
    measured = not generation or (begun.folder / str(place) / "generation.json").is_file()
    return place in begun.runs and measured


def _run(
    begun: Sweep, place: Place, progress: Progress, *, generation: bool, quiet: bool
) -> tuple[Run, list[str]]:
    """Trains and evaluates one run, but for what is done already or another run of the sweep has.

    Returns:
        The run, and the stages that were trained.
    """
    folder, config = begun.folder / str(place), begun.config_of(place)
    trained: list[str] = []
    if place in begun.runs:
        run = begun.runs[place]
    else:
        with Run.begun(folder, config, "resume") as run:
            unfinished = [stage for stage in stages_of(config) if not run.finished(stage)]
            shared = _take_over(run, unfinished, begun.folder)
        if shared:
            progress.say(f"shared with other runs: {', '.join(shared)}")
        trained = [stage for stage in unfinished if stage not in shared]
        if trained:
            run = train(config, folder, existing="resume", quiet=quiet)
    if not (folder / "evaluation.json").is_file():
        evaluate(run, quiet=quiet)
    if generation and not (folder / "generation.json").is_file():
        from probekit.evaluation.generation_metrics import evaluate_generation

        evaluate_generation(run, quiet=quiet)
    return run, trained


def _take_over(run: Run, stages: Sequence[str], folder: Path) -> list[str]:
    """Takes those of a run's stages that another run of the sweep has finished with equal settings."""
    others = [Run.open(path.parent) for path in sorted(folder.glob("*/seed*/run.json"))]
    taken = []
    for stage in stages:
        wanted = stage_settings(run.config, stage)
        for other in others:
            if not (other.finished(stage) and stage_settings(other.config, stage) == wanted):
                continue
            if difference := other.difference(stage, run.config):
                raise ProbekitError(
                    f"{other.folder} has the stage {stage}, but {difference}; go on as it was trained"
                )
            if run.take_over(stage, other):
                taken.append(stage)
                break
    return taken


def _begin(
    folder: Path, config: Config, members: Members, seeds: Sequence[int], *, generation: bool
) -> Sweep:
    """Checks all that can be before anything is written; goes on with a sweep that is there."""
    wanted = Sweep.of(folder, config, members, seeds)
    _check(wanted, generation=generation)
    if Sweep.is_in(folder):
        found = Sweep.open(folder)
        _check_same(found, wanted)
        wanted = Sweep.of(
            folder, config, found.members | wanted.members, dict.fromkeys([*found.seeds, *seeds])
        )
        _check_one_corpus(wanted)
        _ = wanted.runs  # told before anything is trained: a run that is not what the sweep asks for
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ProbekitError(f"{folder} exists and holds no sweep; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        wanted.write()
    return wanted


def _check(wanted: Sweep, *, generation: bool) -> None:
    if not wanted.members:
        raise ProbekitError("the sweep has no members; give one or more")
    if not wanted.seeds:
        raise ProbekitError("the sweep has no seeds; --seeds takes how many, 1 or more, or several seeds")
    for seed in wanted.seeds:
        if wanted.seeds.count(seed) > 1:
            raise ProbekitError(f"the seed {seed} is given twice; leave one out")
        wanted.config.override({"seed": seed})
    for member, settings in wanted.members.items():
        if not MEMBER.fullmatch(member):
            raise ProbekitError(
                f"{member!r} is no name of a member: it becomes a folder's, so it begins with a letter or "
                "digit, and has letters, digits and _ . = , + - behind it"
            )
        config = wanted.config_of(Place(member, wanted.seeds[0]))
        if config.lm.name is None:
            check_new_model(config)
        for name in settings:
            _check_changes_something(config, name, generation=generation)
    _check_one_corpus(wanted)


def _check_one_corpus(wanted: Sweep) -> None:
    corpora = {
        member: stage_settings(wanted.config_of(Place(member, wanted.seeds[0])), "corpus")
        for member in wanted.members
    }
    (first, settings), *others = corpora.items()
    for other, its_settings in others:
        for name, value in settings.items():
            if its_settings[name] != value:
                raise ProbekitError(
                    f"{name} is {value!r} in {first} and {its_settings[name]!r} in {other}: that makes other "
                    "corpora, whose perplexities cannot be compared; make a run of each by `probekit train`"
                )


def _check_changes_something(config: Config, name: str, *, generation: bool) -> None:
    """Refuses a setting that leaves all runs equal."""
    if name == "seed":
        raise ProbekitError("seed is no setting to sweep over; give --seeds")
    measured = ("evaluation", "generation") if generation else ("evaluation",)
    if name.split(".")[0] in measured:
        return
    if reason := why_idle(config, name):
        raise ProbekitError(f"{name} changes nothing that the sweep trains or measures: {reason}")


def _check_same(found: Sweep, wanted: Sweep) -> None:
    begun = f"{found.folder} was begun with other settings: "
    for name in setting_names():
        was, now = setting_value(found.config, name), setting_value(wanted.config, name)
        if was != now and name not in ("seed", "device"):
            raise ProbekitError(f"{begun}{name} was {was!r} and is now {now!r}; choose another --out")
    for member in found.members.keys() & wanted.members.keys():
        was, now = found.members[member], wanted.members[member]
        if was != now:
            raise ProbekitError(f"{begun}{member} was {was!r} and is now {now!r}; choose another --out")
