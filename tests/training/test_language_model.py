"""The LM's stage: its loss, and that it learns."""

import numpy as np
import pytest
from small_trainings import first_loss, mean_token_loss, one_step, trainer
from transformers import PreTrainedModel

from probekit.models.language_model import new_model
from probekit.run.run import Run
from probekit.training.language_model import train_language_model


def new_lm(run: Run) -> PreTrainedModel:
    return new_model(run.config.lm, run.corpus.tokenizer, run.config.seed)


@pytest.mark.parametrize("accumulate", [1, 7])
def test_the_lms_loss_is_the_mean_over_all_tokens(tiny_run: Run, accumulate: int):
    stage, rows = trainer(tiny_run, **one_step("lm", training__accumulate=accumulate))
    untrained = new_lm(tiny_run).eval()
    trained = train_language_model(stage, new_lm(tiny_run))
    assert first_loss(rows) == pytest.approx(mean_token_loss(tiny_run, untrained, "train"), rel=1e-5)
    assert rows[-1]["validation_loss"] == pytest.approx(
        mean_token_loss(tiny_run, trained, "validation"), rel=1e-5
    )
    assert not trained.training


def test_the_lm_learns(tiny_run: Run):
    stage, rows = trainer(tiny_run, training__lm__epochs=6, training__lm__learning_rate=1e-2)
    train_language_model(stage, new_lm(tiny_run))
    unigram = np.bincount(tiny_run.corpus.tokens)
    frequencies = unigram[unigram > 0] / unigram.sum()
    assert rows[-1]["validation_loss"] < -(frequencies * np.log(frequencies)).sum()
