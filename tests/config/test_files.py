"""Settings in files: what is left out has its default, what cannot be read is told in one line."""

from pathlib import Path

import pytest

from probekit.config import Config
from probekit.errors import ProbekitError


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


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(ProbekitError, match=r"unknown preset 'dem'; did you mean 'demo'\?.*text-small"):
        Config.from_preset("dem")


@pytest.mark.parametrize("name", ["../presets/demo", "demo.yaml", ""])
def test_a_preset_is_a_name_and_no_path(name: str):
    with pytest.raises(ProbekitError, match="unknown preset"):
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
def test_unreadable_files_are_told_in_one_line(tmp_path: Path, content: bytes, said: str):
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
