"""Settings: what is accepted comes back unchanged, what is not is refused in one line."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.config import Config, nest, preset_names, setting_names, settings_of, yaml_values
from probekit.errors import ProbekitError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["soft", "none", "planted", "1e-3", "0", "-1", ".inf", "auto"])
)
SECTIONS = [*Config.model_fields, "planted", "lm", "joint", "layers", "k", "window", "variants", "distances"]
KEYS = (
    st.sampled_from(SECTIONS) | st.text(max_size=5) | st.integers() | st.none() | st.booleans() | st.floats()
)
GARBAGE = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
SETTINGS = st.sampled_from(setting_names())


def refusal(values: dict[str, Any]) -> str:
    """The one line that refuses these settings, given by dotted name."""
    with pytest.raises(ProbekitError) as caught:
        Config().override(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def values_of(config: Config) -> dict[str, Any]:
    """Every setting by dotted name."""
    found = {}
    for name in setting_names():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = value
    return found


# Round trips


@pytest.mark.parametrize("preset", [None, *preset_names()])
def test_yaml_comes_back_equal_and_complete(preset: str | None, tmp_path: Path):
    config = Config.from_preset(preset) if preset else Config()
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), "utf-8")
    assert Config.from_yaml(path) == config
    written = yaml_values(path)
    for name in setting_names():
        section = written
        for part in name.split("."):
            section = section[part]


@settings(max_examples=20)
@given(
    rate=st.floats(1e-300, 1e12),
    seed=st.integers(0, 2**32 - 1),
    path=st.text(st.characters(codec="utf-8"), max_size=12),
    distances=st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=4, unique=True),
)
def test_any_value_survives_yaml(
    tmp_path_factory: pytest.TempPathFactory, rate: float, seed: int, path: str, distances: list[int]
):
    config = Config().override(
        {"training.lm.learning_rate": rate, "seed": seed, "corpus.path": path, "probe.positions": distances}
    )
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(config.to_yaml(), "utf-8")
    assert Config.from_yaml(file) == config
    assert config.training.lm.learning_rate == rate
    assert config.corpus.path == path


# Overriding


def test_override_replaces_by_dotted_name_and_leaves_the_rest():
    before = Config.from_preset("demo")
    after = before.override({"training.joint.planner_loss_weight": 0, "probe.layers": [1, 3]})
    assert after.training.joint.planner_loss_weight == 0.0
    assert after.probe.layers == (1, 3)
    changed = {name for name, value in values_of(after).items() if value != values_of(before)[name]}
    assert changed == {"training.joint.planner_loss_weight", "probe.layers"}
    assert before == Config.from_preset("demo")


# Refusals


@pytest.mark.parametrize(
    ("wrong", "near"), [("lm.layer", "lm.layers"), ("training.lm.learning-rate", "training.lm.learning_rate")]
)
def test_unknown_setting_gets_the_nearest(wrong: str, near: str):
    assert refusal({wrong: 1}) == f"unknown setting {wrong!r}; did you mean {near!r}?"
    assert refusal({"zzzzzzzzzzz": 1}) == "unknown setting 'zzzzzzzzzzz'"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("lm.layers", 2.5),
        ("lm.layers", None),
        ("lm.trust_remote_code", "perhaps"),
        ("corpus.reader", "pdf"),
        ("corpus.test_fraction", 0),
        ("corpus.planted", 3),
        ("actions.k", 4097),
        ("planner.dropout", 1.0),
        ("mixing.temperature", math.nan),
        ("training.lm.epochs", math.inf),
        ("mixing.variants", "soft"),
        ("probe.positions", []),
        ("probe.memory", 1e300),
        ("probe.hidden", 10**9),
        ("corpus.text_column", ""),
        ("probe.text_column", ""),
    ],
)
def test_wrong_value_names_setting_and_value(name: str, value: object):
    assert refusal({name: value}).startswith(f"{name} is {value!r}: ")


@pytest.mark.parametrize(
    ("name", "value"), [("probe.positions", 2**31), ("probe.horizons", 2**63 - 1), ("probe.l2", 1e300)]
)
def test_a_number_that_is_too_large_is_named(name: str, value: float):
    line = refusal({name: [value]})
    assert line.startswith(name)
    assert str(value) in line


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mixing.variants": ["soft", "sof"]}, ["mixing.variants.1", "'sof'", "'soft'"]),
        ({"probe.layers": [2, 0, 2]}, ["probe.layers", "2 is listed twice"]),
        ({"probe.shrinkage": [0.5, 0.0]}, ["probe.shrinkage.1", "0.0"]),
        ({"lm.heads": 3}, ["lm", "heads 3", "width 128"]),
        ({"planner.width": 9}, ["planner", "heads 2", "width 9"]),
        ({"corpus.test_fraction": 0.75}, ["corpus", "test_fraction", "1.05"]),
        ({"corpus.planted.sentences": (30, 16)}, ["corpus.planted.sentences", "30", "16"]),
        ({"corpus.planted.sentences": (1, 16)}, ["corpus.planted", "sentences", "at least 2"]),
        ({"corpus.planted.examples": 2}, ["corpus.planted", "examples 2", "10 to 16", "one length"]),
        ({"corpus.planted.successors": 25}, ["corpus.planted", "successors 25", "actions 24"]),
        ({"training.joint.planner_frozen": 1.5}, ["planner_frozen is 1.5; above 1 it is a number of steps"]),
        (
            {"training.joint.end_to_end": False, "training.joint.planner_loss_weight": 0},
            ["end_to_end is false"],
        ),
        (
            {"training.joint.encoder_learning_rate": 0.1, "training.joint.planner_frozen": 1},
            ["encoder_learning_rate is 0.1, but planner_frozen"],
        ),
    ],
)
def test_inconsistent_settings_name_what_does_not_fit(values: dict[str, Any], said: list[str]):
    line = refusal(values)
    assert all(words in line for words in said), line


# Whatever is given


def config_or_line(make: Callable[[], Config]) -> Config | str:
    """The config that is made, or the one line that refuses it; any other end fails the test."""
    try:
        made = make()
    except ProbekitError as error:
        line = str(error)
    else:
        assert isinstance(made, Config)
        return made
    assert line.strip()
    assert "\n" not in line
    return line


@settings(max_examples=40)
@given(values=st.dictionaries(SETTINGS, GARBAGE, min_size=1, max_size=3))
def test_any_value_of_a_setting_is_taken_or_refused(values: dict[str, Any]):
    config = config_or_line(lambda: Config().override(values))
    if isinstance(config, Config):
        assert config.override(values_of(config)) == config


# Documentation


def test_every_setting_says_what_it_does():
    for name, field in settings_of(Config).items():
        assert field.description, name
        assert field.description.rstrip().endswith((".", ".)")), name


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"probe.labels": "a.csv", "corpus.path": "a.csv"}, "probe.labels"),
        ({"corpus.planted.examples": 2}, "examples is 2"),
    ],
)
def test_openings_do_not_go_with_what_is_of_whole_texts(other: dict[str, Any], named: str):
    fixed = {"corpus.planted.sentences": [3, 3]}
    with pytest.raises(ProbekitError, match=f"corpus.max_sentences is 4, but .*{named}.*leave it unset"):
        Config().override({"corpus.max_sentences": 4} | fixed | other)


def test_openings_of_a_corpus_can_have_labels():
    """Those of a table that names the run's own sentences."""
    config = Config().override({"corpus.max_sentences": 4, "corpus.path": "a.jsonl", "probe.labels": "b.csv"})
    assert Path(config.probe.labels or "").name == "b.csv"


def test_settings_are_added_deliberately():
    # Each is a promise to users: think before this number grows.
    assert len(setting_names()) == 168


# Files and presets


def test_a_file_leaves_out_what_it_does_not_change(tmp_path: Path):
    path = tmp_path / "few.yaml"
    path.write_text("lm: {layers: 7}\nseed: 3\n", "utf-8")
    assert Config.from_yaml(path) == Config().override({"lm.layers": 7, "seed": 3})
    path.write_text("# nothing\n", "utf-8")
    assert Config.from_yaml(path) == Config()


def test_numbers_may_be_written_as_yaml_mistakes_them_for_text(tmp_path: Path):
    # YAML 1.1 reads 1e-3 as text.
    path = tmp_path / "rate.yaml"
    path.write_text("training: {adapter: {learning_rate: 1e-3}}\n", "utf-8")
    assert Config.from_yaml(path).training.adapter.learning_rate == 1e-3


@pytest.mark.parametrize("name", ["dem", "../presets/demo", "demo.yaml", ""])
def test_a_preset_is_a_name_and_no_path(name: str):
    with pytest.raises(ProbekitError, match=r"unknown preset .*text-small"):
        Config.from_preset(name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"lm: [1, 2", "not valid YAML"),
        (b"\xff\xfe\xff", "not valid YAML"),
        (b"lm: !!python/object:os.system {}", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b"- 1\n- 2\n", "holds a list"),
        (b"just words", "holds a str"),
        (b"false", "holds a bool"),
        (b"lm: &a {lm: *a}", "unknown setting 'lm.lm'"),
        (b"lm: {layers: &a [*a]}", "lm.layers"),
    ],
)
def test_unreadable_files_are_reported_in_one_line(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ProbekitError) as caught:
        Config.from_yaml(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path: Path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ProbekitError, match=f"config file {path}: "):
            Config.from_yaml(path)


# Dotted names


@pytest.mark.parametrize("values", [{"lm": 3, "lm.layers": 2}, {"seed": 1, "seed.x.y": 2}])
def test_a_section_and_its_setting_are_not_given_together(values: dict[str, Any]):
    with pytest.raises(
        ProbekitError, match=f"^{list(values)[1]} is given, and {next(iter(values))} as a whole"
    ):
        nest(values)


def test_paths_arrays_and_ranges_are_values(tmp_path: Path):
    config = Config().override(
        {
            "corpus.path": tmp_path / "a.txt",
            "lm.name": tmp_path,
            "actions.k": np.int64(16),
            "probe.l2": np.array([0.1, 1.0]),
            "probe.layers": range(3),
            "probe.horizons": np.arange(1, 3),
        }
    )
    assert config.corpus.path == str(tmp_path / "a.txt")
    assert config.lm.name == str(tmp_path)
    assert (config.actions.k, config.probe.l2, config.probe.layers) == (16, (0.1, 1.0), (0, 1, 2))
    assert config.probe.horizons == (1, 2)
    assert Config.from_dict(config.model_dump()) == config
    (tmp_path / "settings.yaml").write_text(config.to_yaml())
    assert Config.from_yaml(tmp_path / "settings.yaml") == config


def test_paths_that_are_there_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "questions.jsonl", "lm", "gpt2", "tfidf"):
        (tmp_path / name).touch()
    assert Config().with_absolute_paths() == Config()  # tfidf is an encoder, whatever has its name here
    given = {
        "corpus.path": "a.txt",
        "lm.name": "~/lm",
        "evaluation.questions_file": "./questions.jsonl",
        "actions.encoder": "gone/model",
    }
    config = Config().override(given).with_absolute_paths()
    assert config.corpus.path == str(tmp_path / "a.txt")
    assert config.lm.name == str(tmp_path / "lm")
    assert config.evaluation.questions_file == str(tmp_path / "questions.jsonl")
    assert config.actions.encoder == "gone/model"  # it may be on the hub
    monkeypatch.chdir("/")
    assert config.with_absolute_paths() == config
    for odd in ("~nobody-of-this-name/x", "\x00", "x" * 5000, ""):
        assert Config().override({"corpus.path": odd}).with_absolute_paths().corpus.path == odd


def test_a_home_of_nobody_is_no_traceback():
    for name in ("probe.labels", "corpus.path", "lm.name"):
        config = Config().override({name: "~nobody-of-this-name/x"}).with_absolute_paths()
        assert "~nobody-of-this-name/x" in config.to_yaml()
