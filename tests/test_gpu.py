"""On a GPU: the CPU's numbers but for rounding, in float32; bfloat16 is near."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from probekit.config import Config
from probekit.evaluation.evaluate import evaluate
from probekit.generation.generate import generate
from probekit.generation.prompts import document_prompts
from probekit.probing.probe import probe
from probekit.run.run import Run
from probekit.training.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ON_GPU = {"device": "cuda", "training.precision": "float32"}
FEW = {
    "probe.layers": [0, 2],
    "probe.positions": [1, 2],
    "probe.l2": [0.1],
    "probe.solvers": ["softmax", "ridge"],
}


@pytest.fixture(scope="module")
def run(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny_config.override(ON_GPU), tmp_path_factory.mktemp("gpu") / "run", quiet=True)


@pytest.fixture
def copy(tiny_run: Run, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(tiny_run.folder, tmp_path / "copy"))


def test_training_is_that_of_the_cpu(run: Run, tiny_run: Run):
    first, second = (other.metrics().groupby("stage").validation_loss.min() for other in (run, tiny_run))
    # Dropout of the planner draws other numbers.
    for stage in ("lm", "adapter/fixed", "adapter/oracle"):
        assert first[stage] == pytest.approx(second[stage], rel=1e-2)


def test_losses_of_one_model_agree(copy: Run):
    on_cpu, on_gpu = (
        evaluate(copy.with_settings(settings), quiet=True).perplexity.perplexity.to_numpy()
        for settings in ({}, ON_GPU)
    )
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-4)


def test_probes_of_one_model_agree(copy: Run):
    tables = [probe(copy, FEW | settings, quiet=True).table for settings in ({}, ON_GPU)]
    for column in ("cross_entropy", "validation_cross_entropy"):
        np.testing.assert_allclose(tables[1][column], tables[0][column], rtol=1e-2)


def test_a_resumed_training_ends_like_an_undisturbed_one(run: Run, tiny_config: Config, tmp_path: Path):
    config = tiny_config.override(ON_GPU | {"training.save_minutes": 0.0})
    folder, step, steps = tmp_path / "run", torch.optim.AdamW.step, 0

    def stopping(self: torch.optim.AdamW, *arguments: object, **named: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(config, folder, quiet=True)
    resumed = train(None, folder, existing="resume", quiet=True)
    first, second = (other.metrics().groupby("stage").validation_loss.min() for other in (run, resumed))
    np.testing.assert_allclose(first, second, rtol=1e-2)


def test_bfloat16_is_near_float32(run: Run, tiny_config: Config, tmp_path: Path):
    if not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bfloat16")
    half = train(
        tiny_config.override(ON_GPU | {"training.precision": "bfloat16"}), tmp_path / "run", quiet=True
    )
    first, second = (other.metrics().groupby("stage").validation_loss.min() for other in (run, half))
    np.testing.assert_allclose(first, second, rtol=5e-2)


def test_text_is_written(run: Run):
    prompts, _ = document_prompts(run.corpus, run.corpus.documents("test")[:4], 8, 4)
    written = generate(run.with_settings(ON_GPU), prompts, variant="joint", tokens=12)
    assert all(len(text.tokens) for text in written)
