"""The planted corpus of the default settings."""

import pytest

from probekit.config import PlantedSettings
from probekit.planted.corpus import PlantedCorpus, PlantedDocument, generate


@pytest.fixture(scope="session")
def corpus() -> PlantedCorpus:
    return generate(PlantedSettings())


@pytest.fixture(scope="session")
def documents(corpus: PlantedCorpus) -> list[PlantedDocument]:
    return list(corpus.documents())
