"""The tiny run with kept probes, on which the lens's tests read."""

import shutil
from typing import Any

import pytest

from probekit.probing.probe import probe
from probekit.run.run import Run


@pytest.fixture(scope="session")
def probed_run(tiny_run: Run, quick_probes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the tiny run with probes at two locations, one of them outside the blocks."""
    folder = shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("probed") / "tiny")
    run = Run.open(folder)
    probe(run, quick_probes | {"probe.locations": ["hook_embed", "hook_resid_post"]}, quiet=True)
    return run


@pytest.fixture(scope="session")
def document(probed_run: Run) -> int:
    """The longest test document: it has more tokens than a window."""
    corpus = probed_run.corpus
    documents = corpus.documents("test")
    lengths = corpus.document_tokens[documents + 1] - corpus.document_tokens[documents]
    assert lengths.max() > 1.5 * probed_run.config.training.window
    return int(documents[lengths.argmax()])


@pytest.fixture(scope="session")
def text(probed_run: Run, document: int) -> str:
    """Its text."""
    return probed_run.corpus.texts[document].text
