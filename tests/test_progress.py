"""Progress: what a log or a terminal shows of work under way."""

import re

import pytest
from tqdm import notebook
from tqdm.auto import tqdm
from transformers.utils import logging

from probekit import progress
from probekit.progress import Meter, Progress, duration, without_bars_of_transformers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets: its one element is the time."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_end_of_a_task_is_reported_with_count_time_rate_and_note(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    with Progress().task("read", total=3000) as task:
        clock[0] += 2.0
        task.advance(3000, note="loss 1.5")
    captured = capsys.readouterr()
    assert captured.err == "read: done in 2.0 s, 3,000 (1,500/s) loss 1.5\n"
    assert captured.out == ""


def test_a_long_task_tells_now_and_then_how_far_it_is(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with Progress().task("train", total=40) as task:
        for _ in range(40):
            clock[0] += 1.0
            task.advance()
        lines = capsys.readouterr().err.splitlines()
    assert [line.strip() for line in lines] == [
        "train: 16 of 40 (1/s), 24 seconds left",
        "train: 32 of 40 (1/s), 8 seconds left",
    ]


def test_what_takes_seconds_each_says_how_many(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with Progress().task("train", total=200) as task:
        for _ in range(4):
            clock[0] += 4.5
            task.advance()
        (line,) = capsys.readouterr().err.splitlines()
    assert line.strip() == "train: 4 of 200 (4.5 s each), 15 minutes left"


def test_a_task_of_unknown_length_tells_its_count(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with Progress().task("read") as task:
        clock[0] += 20.0
        task.advance(1000)
    first, last = capsys.readouterr().err.splitlines()
    assert first.strip() == "read: 1,000 (50/s)"
    assert last.startswith("read: done in 20.0 s, 1,000")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_task_is_reported_and_its_error_passes(
    error: type[BaseException], clock: list[float], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(error), Progress().task("fit"):
        raise error
    assert capsys.readouterr().err == "fit: stopped in 0.0 s\n"


def test_a_terminal_gets_a_bar_and_a_line_that_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with Progress().task("read", total=2) as task:
        task.advance(2, note="loss 1")
    shown = capsys.readouterr().err
    first, *_, last = re.split(r"\r(?:\x1b\[1A)?\x1b\[2K", shown)
    assert "0/2" in first
    assert last == "read: done in 0.0 s, 2  loss 1\n"


def test_transformers_shows_no_bars_meanwhile(capsys: pytest.CaptureFixture[str]):
    """Those of its own, those that it makes of tqdm itself, and those of Jupyter."""
    with without_bars_of_transformers():
        for bar in (tqdm, logging.tqdm, notebook.tqdm):
            assert [*bar(range(2))] == [0, 1]
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""
    assert [*tqdm(range(2))] == [0, 1]
    assert "2/2" in capsys.readouterr().err


def test_a_meter_forecasts_once_by_the_time_spent_reading(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    shown = Progress()
    meter = Meter(shown, total=60_000, advice="; faster with a GPU")
    for _ in range(3):
        with shown.task("read", unit="tokens") as task, meter.reading(task) as done:
            for _ in range(2):
                clock[0] += 2.0
                done(1000)
        clock[0] += 100.0  # not spent reading
    lines = capsys.readouterr().err.splitlines()
    forecast = "reading takes about 2 minutes in all, at 500 tokens a second; faster with a GPU"
    assert [line for line in lines if "takes" in line] == [forecast]
    assert lines[0] == "read: done in 4.0 s, 2,000 (500 tokens a second)"
    assert (meter.tokens, meter.seconds) == (6000, 12.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 seconds"), (119, "119 seconds"), (600, "10 minutes"), (9000, "2 hours")]
)
def test_lengths_of_time_have_a_unit_that_suits_them(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("processes", "rank", "shown"), [("1", "1", True), ("2", "0", True), ("2", "1", False)]
)
def test_of_several_processes_the_first_shows_progress(
    processes: str,
    rank: str,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("RANK", rank)  # a shell may still have one when a process is alone
    Progress().say("something")
    assert ("something" in capsys.readouterr().err) == shown
