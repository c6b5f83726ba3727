"""Features of texts against plain passes of the Hugging Face module."""

import numpy as np
import pytest
import torch

from probekit.generation.metrics import text_features
from probekit.progress import Progress
from probekit.run.run import Run


def features(run: Run, texts: list[np.ndarray], window: int = 48) -> np.ndarray:
    with Progress(quiet=True).task("read") as task:
        return text_features(run, texts, window, task)


def plain(run: Run, text: np.ndarray, window: int = 48) -> np.ndarray:
    """The mean of the last hidden states, one window at a time."""
    model = run.plain_model().eval()
    tokens = torch.tensor([[run.corpus.separator, *text.tolist()]])
    with torch.no_grad():
        states = [
            model(part, output_hidden_states=True).hidden_states[-1] for part in tokens.split(window, 1)
        ]
    return torch.cat(states, dim=1)[0].mean(dim=0).numpy()


def random_texts(run: Run, *lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(1, run.corpus.facts["vocabulary"], size=length) for length in lengths]


@pytest.mark.parametrize("window", [48, 11])
def test_features_are_means_of_last_hidden_states(tiny_run: Run, window: int):
    texts = random_texts(tiny_run, 30, 1, 47, 48, 100, 0)
    found = features(tiny_run, texts, window)
    assert found.shape == (6, 32)
    expected = [plain(tiny_run, text, window) for text in texts]
    assert found == pytest.approx(np.stack(expected), abs=1e-5)


def test_texts_of_a_batch_do_not_mix(tiny_run: Run):
    texts = random_texts(tiny_run, 20, 60, 0, 33, 7)
    one_by_one = tiny_run.with_settings({"evaluation.batch_size": 1})
    assert features(tiny_run, texts) == pytest.approx(features(one_by_one, texts), abs=1e-5)
