"""Settings on the command line: every one can be given, as itself, and wins over file and preset."""

import argparse
import typing
from pathlib import Path
from typing import Any

import pytest

from probekit.cli.options import ALL, Parser, add_sources, chosen_config, parse
from probekit.config import Config, preset_names, setting_names, settings_of
from probekit.errors import ProbekitError


def typed(*words: str) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = Parser("probekit test")
    add_sources(parser)
    return parse(parser, words, ALL)


def chosen(*words: str, continued: Path | None = None) -> Config | None:
    return chosen_config(*typed(*words), continued)


def refusal(*words: str) -> str:
    with pytest.raises(ProbekitError) as caught:
        chosen(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_words(name: str, value: Any) -> list[str]:
    """How a user would type a value."""
    if isinstance(value, tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", "null" if value is None else str(value)]


def value_of(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("preset", preset_names())
def test_every_setting_of_a_preset_can_be_typed(preset: str):
    config = Config.from_preset(preset)
    words = [word for name in setting_names() for word in as_words(name, value_of(config, name))]
    assert chosen(*words) == config


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--seed=7"], "seed", 7),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--training.lm.learning_rate", "1e-5"], "training.lm.learning_rate", 1e-5),
        (["--training.lm.epochs", "2"], "training.lm.epochs", 2.0),
        (["--lm.trust_remote_code", "no"], "lm.trust_remote_code", False),
        (["--probe.layers", "0", "2"], "probe.layers", (0, 2)),
        (["--probe.layers", "null"], "probe.layers", None),
        (["--probe.l2", "0.1"], "probe.l2", (0.1,)),
        (["--mixing.variants", "none"], "mixing.variants", ("none",)),
        (["--mixing.variants", "soft", "straight-through"], "mixing.variants", ("soft", "straight-through")),
        (["--training.lm.patience", "null"], "training.lm.patience", None),
        (["--corpus.path", "a b.txt"], "corpus.path", "a b.txt"),
        (["--corpus.subset", "20231101.en"], "corpus.subset", "20231101.en"),
    ],
)
def test_a_typed_setting_has_its_type(words: list[str], name: str, value: object):
    config = chosen(*words)
    assert config == Config().override({name: value})
    assert config is not None
    assert type(value_of(config, name)) is type(value)


def test_the_command_line_wins_over_the_file_and_it_over_the_preset(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("lm: {layers: 6, width: 32}\nseed: 5\n", "utf-8")
    config = chosen("--lm.layers", "7", "--preset", "demo", "--config", str(file))
    expected = Config.from_preset("demo").override({"lm.layers": 7, "lm.width": 32, "seed": 5})
    assert config == expected


def test_single_settings_alone_change_the_run_that_is_resumed(tmp_path: Path):
    begun = tmp_path / "config.yaml"
    config = Config.from_preset("demo").override({"seed": 9})
    begun.write_text(config.to_yaml(), "utf-8")
    assert chosen("--device", "cpu", continued=begun) == config.override({"device": "cpu"})
    assert chosen(continued=begun) is None
    assert chosen("--preset", "demo", "--seed", "9", continued=begun) == config
    assert chosen("--config", str(begun), "--seed", "8", continued=begun) == config.override({"seed": 8})


# Refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lm.layer=3"], "unknown setting 'lm.layer'; did you mean 'lm.layers'?"),
        (["--see", "1"], "unknown setting 'see'; did you mean 'seed'?"),  # abbreviations are not guessed
        (["--presets", "demo"], "unknown setting 'presets'; did you mean 'preset'?"),
        (["stray"], "unexpected 'stray'; see `probekit test --help`"),
        (["-x"], "unexpected '-x'; see `probekit test --help`"),
        (["--lm.layers"], "argument --lm.layers: expected one argument; see `probekit test --help`"),
    ],
)
def test_what_is_not_understood_is_refused(words: list[str], said: str):
    assert refusal(*words) == said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "-1"], ["seed", "'-1'"]),
        (["--lm.layers", "null"], ["lm.layers", "None"]),
        (["--training.lm.learning_rate", "nan"], ["training.lm.learning_rate", "'nan'"]),
        (["--mixing.variants", "soft,joit"], ["mixing.variants.1", "'joit'"]),
        (["--probe.layers", "0", "x"], ["probe.layers.1", "'x'"]),
        (["--preset", "demos"], ["unknown preset 'demos'", "did you mean 'demo'?"]),
        (["--config", "/no/such.yaml"], ["config file /no/such.yaml"]),
    ],
)
def test_wrong_values_name_setting_and_value(words: list[str], said: list[str]):
    line = refusal(*words)
    assert all(part in line for part in said), line


# Help


def help_of(capsys: pytest.CaptureFixture[str], *words: str, **arguments: Any) -> str:
    parser = Parser("probekit test")
    add_sources(parser)
    with pytest.raises(SystemExit):
        parse(parser, [*words, "--help"], **({"sections": ALL} | arguments))
    return capsys.readouterr().out


@pytest.mark.parametrize("preset", [None, "demo", "gpt2-wikipedia"])
def test_help_shows_what_every_setting_does_and_its_default(
    preset: str | None, capsys: pytest.CaptureFixture[str]
):
    defaults = Config.from_preset(preset) if preset else Config()
    text = help_of(capsys, *(["--preset", preset] if preset else []))
    assert text == help_of(capsys, preset=preset), "a preset of the command's own is shown in the same way"
    text = "".join(text.partition("options:")[2].split())
    for name, field in settings_of(Config).items():
        # Long words are broken at hyphens.
        assert "".join(str(field.description).split()) in text, name
        if isinstance(default := value_of(defaults, name), int | float) and name not in ("seed", "device"):
            start = text.index(f"--{name}")
            assert text[start:].partition("(default:")[2].startswith(f"{default})"), name


def test_help_of_some_sections_has_only_those(capsys: pytest.CaptureFixture[str]):
    text = help_of(capsys, sections=["device", "evaluation", "lm.layers"])
    assert "--evaluation.stride" in text
    assert "--device" in text
    assert "--lm.layers" in text
    assert "--lm.width" not in text
    assert "--seed" not in text


def test_choices_are_listed(capsys: pytest.CaptureFixture[str]):
    text = help_of(capsys)
    for name, field in settings_of(Config).items():
        if typing.get_origin(field.annotation) is typing.Literal:
            assert f"--{name} {{{','.join(typing.get_args(field.annotation))}}}" in text
