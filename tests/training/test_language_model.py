"""The LM's stage: its loss, and that it learns."""

import numpy as np
import pytest
from small_trainings import first_loss, mean_token_loss, one_step, trainer

from probekit.models.language_model import new_model
from probekit.run.run import Run
from probekit.training.language_model import train_language_model


@pytest.mark.parametrize("accumulate", [1, 7])
def test_the_lms_loss_is_the_mean_over_all_tokens(tiny_run: Run, accumulate: int):
    stage, rows = trainer(tiny_run, **one_step("lm", training__accumulate=accumulate))
    trained = train_language_model(stage)
    untrained = new_model(tiny_run.config.lm, tiny_run.corpus.tokenizer, tiny_run.config.seed)
    untrained.eval()
    assert first_loss(rows) == pytest.approx(mean_token_loss(tiny_run, untrained, "train"), rel=1e-5)
    assert rows[-1]["validation_loss"] == pytest.approx(
        mean_token_loss(tiny_run, trained, "validation"), rel=1e-5
    )
    assert not trained.training


def test_the_lm_learns(tiny_run: Run):
    stage, rows = trainer(tiny_run, training__lm__epochs=6, training__lm__learning_rate=1e-2)
    train_language_model(stage)
    unigram = np.bincount(tiny_run.corpus.tokens)
    frequencies = unigram[unigram > 0] / unigram.sum()
    assert rows[-1]["validation_loss"] < -(frequencies * np.log(frequencies)).sum()
