"""Settings on the command line: every one can be given, as itself, and wins over file and preset."""

import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.config import Config, preset_names, setting_names, settings_of
from probekit.errors import ProbekitError
from probekit.options import (
    Parser,
    add_setting_options,
    add_source_options,
    chosen_config,
    given_settings,
    parse,
    source_config,
)


def parser(defaults: Config | None = None, sections: list[str] | None = None) -> Parser:
    made = Parser(prog="probekit test")
    add_source_options(made)
    add_setting_options(made, defaults or Config(), sections)
    return made


def chosen(*words: str, begun: Path | None = None) -> Config | None:
    return chosen_config(parse(parser(), list(words)), begun)


def refusal(*words: str) -> str:
    with pytest.raises(ProbekitError) as caught:
        chosen(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_words(name: str, value: Any) -> list[str]:
    """How a user would type a value."""
    if isinstance(value, tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value).lower() if value is None or isinstance(value, bool) else str(value)]


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
        (["--seed", "7"], "seed", 7),
        (["--seed=7"], "seed", 7),
        (["--training.lm.learning_rate", "1e-5"], "training.lm.learning_rate", 1e-5),
        (["--training.lm.epochs", "2"], "training.lm.epochs", 2.0),
        (["--lm.trust_remote_code", "true"], "lm.trust_remote_code", True),
        (["--lm.trust_remote_code", "no"], "lm.trust_remote_code", False),
        (["--probe.layers", "0", "2"], "probe.layers", (0, 2)),
        (["--probe.layers", "none"], "probe.layers", None),
        (["--probe.l2", "0.1"], "probe.l2", (0.1,)),
        (["--probe.variants", "none"], "probe.variants", ("none",)),
        (["--probe.variants", "random", "soft"], "probe.variants", ("random", "soft")),
        (["--probe.solvers", "lda", "mlp"], "probe.solvers", ("lda", "mlp")),
        (["--probe.seeds", "0", "7"], "probe.seeds", (0, 7)),
        (["--probe.seeds", "none"], "probe.seeds", None),
        (["--probe.labels", "none"], "probe.labels", None),
        (["--probe.control", "false"], "probe.control", False),
        (["--probe.locations", "attn.hook_z:before"], "probe.locations", ("attn.hook_z:before",)),
        (["--mixing.variants", "none"], "mixing.variants", ("none",)),
        (["--mixing.variants", "soft", "straight-through"], "mixing.variants", ("soft", "straight-through")),
        (["--training.lm.patience", "none"], "training.lm.patience", None),
        (["--training.lm.patience", "4"], "training.lm.patience", 4),
        (["--evaluation.window", "64"], "evaluation.window", 64),
        (["--corpus.path", "none"], "corpus.path", None),
        (["--corpus.path", "a b.txt"], "corpus.path", "a b.txt"),
        (["--corpus.subset", "20231101.en"], "corpus.subset", "20231101.en"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
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


def test_nothing_given_is_no_config():
    assert chosen() is None


def test_single_settings_alone_change_the_run_that_is_resumed(tmp_path: Path):
    begun = tmp_path / "config.yaml"
    config = Config.from_preset("demo").override({"seed": 9})
    begun.write_text(config.to_yaml(), "utf-8")
    assert chosen("--device", "cpu", begun=begun) == config.override({"device": "cpu"})
    assert chosen(begun=begun) is None
    assert chosen("--preset", "demo", "--seed", "9", begun=begun) == config
    assert chosen("--config", str(begun), "--seed", "8", begun=begun) == config.override({"seed": 8})


def test_only_what_is_given_is_given():
    parsed = parse(parser(), ["--lm.layers", "3", "--probe.layers", "null"])
    assert given_settings(parsed) == {"lm.layers": "3", "probe.layers": None}


# Refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lm.layer", "3"], "unknown setting 'lm.layer'; did you mean 'lm.layers'?"),
        (["--lm.layer=3"], "unknown setting 'lm.layer'; did you mean 'lm.layers'?"),
        (["--presets", "demo"], "unknown setting 'presets'; did you mean 'preset'?"),
        (["--qqqqqqqqqqqq"], "unknown setting 'qqqqqqqqqqqq'"),
        (["stray"], "unexpected 'stray'; see `probekit test --help`"),
        (["-x"], "unexpected '-x'; see `probekit test --help`"),
        (["--lm.layers"], "argument --lm.layers: expected one argument; see `probekit test --help`"),
        (
            ["--probe.layers"],
            "argument --probe.layers: expected at least one argument; see `probekit test --help`",
        ),
    ],
)
def test_what_is_not_understood_is_told(words: list[str], said: str):
    assert refusal(*words) == said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "-1"], ["seed", "'-1'"]),
        (["--lm.layers", "2.5"], ["lm.layers", "'2.5'"]),
        (["--lm.layers", "none"], ["lm.layers", "'none'"]),
        (["--lm.layers", "true"], ["lm.layers", "'true'"]),
        (["--training.lm.learning_rate=-1e-3"], ["training.lm.learning_rate", "'-1e-3'"]),
        (["--training.lm.learning_rate", "nan"], ["training.lm.learning_rate", "'nan'"]),
        (["--training.lm.epochs", "inf"], ["training.lm.epochs", "'inf'"]),
        (["--mixing.variants", "soft,joint"], ["mixing.variants.0", "'soft,joint'"]),
        (["--probe.layers", "0", "x"], ["probe.layers.1", "'x'"]),
        (["--corpus.reader", "pdf"], ["corpus.reader", "'pdf'"]),
        (["--probe.solvers", "svm"], ["probe.solvers.0", "'svm'", "'softmax'"]),
        (["--probe.shrinkage", "0"], ["probe.shrinkage.0", "'0'"]),
        (["--lm.heads", "5"], ["heads 5", "width 128"]),
        (["--preset", "demos"], ["unknown preset 'demos'", "did you mean 'demo'?"]),
        (["--config", "/no/such.yaml"], ["config file /no/such.yaml"]),
    ],
)
def test_wrong_values_name_setting_and_value(words: list[str], said: list[str]):
    line = refusal(*words)
    assert all(part in line for part in said), line


def test_abbreviations_are_not_guessed():
    # An abbreviation that works today is another setting's name tomorrow.
    assert "did you mean 'seed'" in refusal("--see", "1")


@given(
    settings=st.lists(
        st.tuples(st.sampled_from(setting_names()), st.text(max_size=8)), min_size=1, max_size=3
    )
)
def test_any_text_for_any_setting_is_taken_or_refused(settings: list[tuple[str, str]]):
    try:
        config = chosen(*(f"--{name}={value}" for name, value in settings))
    except ProbekitError as error:
        line = str(error)
    else:
        assert isinstance(config, Config)
        return
    assert "\n" not in line


@given(
    words=st.lists(
        st.sampled_from(["--seed", "--probe.layers", "--config"]) | st.text(max_size=5), max_size=4
    )
)
def test_any_command_line_is_taken_or_refused(words: list[str]):
    try:
        config = chosen(*words)
    except (ProbekitError, SystemExit) as caught:  # -h ends in help
        end = caught
    else:
        assert config is None or isinstance(config, Config)
        return
    assert isinstance(end, ProbekitError) or end.code == 0


# Help


@pytest.mark.parametrize("preset", [None, "demo", "gpt2-wikipedia"])
def test_help_tells_every_setting_its_default_and_what_it_does(preset: str | None):
    words = ["--preset", preset] if preset else []
    defaults = source_config("probekit test", words)
    assert defaults == (Config.from_preset(preset) if preset else Config())
    _, _, text = " ".join(parser(defaults).format_help().split()).partition("general:")
    for name, field in settings_of(Config).items():
        start = text.index(f"--{name} ")
        entry = text[start : text.index("(default: ", start)]
        told = text[text.index("(default: ", start) + len("(default: ") :].split(")")[0].split()
        named = [word.removeprefix("--") for word in entry.split() if word.startswith("--")]
        assert [word for word in named if word in settings_of(Config)] == [name], "no default of its own"
        # A long word may be broken at a hyphen.
        assert squeezed(str(field.description)) in squeezed(entry), name
        typed = as_words(name, value_of(defaults, name))[1:]
        assert same_values(told, typed), (name, told, typed)


def squeezed(text: str) -> str:
    return "".join(text.split())


def same_values(told: list[str], typed: list[str]) -> bool:
    try:
        return [float(word) for word in told] == [float(word) for word in typed]
    except ValueError:
        return squeezed("".join(told)) == squeezed("".join(typed))


def test_help_without_a_source_may_have_a_preset_of_its_own():
    assert source_config("probekit test", [], "any-model") == Config.from_preset("any-model")
    words = ["--preset", "demo"]
    assert source_config("probekit test", words, "any-model") == Config.from_preset("demo")


def test_help_of_some_sections_has_only_those():
    text = parser(sections=["device", "evaluation"]).format_help()
    assert "--evaluation.stride" in text
    assert "--device" in text
    assert "--lm." not in text
    assert "--seed" not in text


def test_choices_are_listed():
    text = parser().format_help()
    for name, field in settings_of(Config).items():
        if typing.get_origin(field.annotation) is typing.Literal:
            assert f"--{name} {{{','.join(typing.get_args(field.annotation))}}}" in text


# Sweeps
