"""What a notebook imports: all of it there, and nothing heavy until it is used."""

import subprocess
import sys

import pytest

import probekit

HEAVY = {"torch", "transformers", "transformer_lens", "sklearn", "pandas", "matplotlib", "datasets"}


def loaded_by(code: str) -> set[str]:
    """The heavy modules that a fresh interpreter holds after running some code."""
    program = f"import sys\n{code}\nprint(*sorted(sys.modules), file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return HEAVY & set(ran.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import probekit",
        "import probekit; dir(probekit); probekit.Config.from_preset('demo'); probekit.ProbekitError",
        "from probekit.cli import main; main([]); main(['train', '--no.such 1'])",
    ],
)
def test_importing_and_settings_load_nothing_heavy(code: str):
    assert loaded_by(code.replace("main([])", "import io, contextlib; main([])")) == set()


@pytest.mark.parametrize("name", probekit.__all__)
def test_every_public_name_resolves_again_and_again(name: str):
    first, second = getattr(probekit, name), getattr(probekit, name)
    assert first == second
    assert callable(first)
    assert first.__doc__


def test_all_names_what_there_is():
    assert sorted(probekit.__all__) == probekit.__all__
    assert set(probekit._HOME) == set(probekit.__all__)
    assert set(probekit.__all__) <= set(dir(probekit))


def test_load_run_opens_a_run(tiny_run: probekit.Run):
    run = probekit.load_run(tiny_run.folder)
    assert isinstance(run, probekit.Run)
    assert run.config == tiny_run.config
