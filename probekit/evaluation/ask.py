"""`probekit ask`: which of several texts a causal LM finds more probable, without a run.

Choices are compared by their log-probability after the context, in total or by token. What a choice has
without the context, its prior, is compared alone, as a control, and taken off (arXiv 2104.08315).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from probekit.config import BosRule, Config, LanguageModelSettings, user_path
from probekit.data import hub
from probekit.data.special_tokens import bos_rule_for, separator_id
from probekit.data.tokenizer import pretrained_tokenizer
from probekit.distributed import compute_device
from probekit.errors import ProbekitError
from probekit.evaluation.items import Item, asked, read_items
from probekit.evaluation.multiple_choice import ChoiceReader, Question, choice_lengths
from probekit.evaluation.perplexity import own_losses
from probekit.evaluation.preferences import SCORINGS, LogProbabilities, Scoring, preference_table
from probekit.io import write_json, write_table
from probekit.models.backends import HFBackend
from probekit.models.bidirectional import refuse_bidirectional
from probekit.models.compression import compressed
from probekit.models.decoding import GrowingText
from probekit.models.hook_points import small_lm
from probekit.models.language_model import is_placed, load_model, longest_window, random_weights
from probekit.models.planned_lm import PlannedLM
from probekit.models.pretrained import check_tokenizer, check_weights, dtype_name, dtype_of, load_config
from probekit.models.revisions import at_revision
from probekit.progress import Progress
from probekit.run.folder import digest_of, lm_digest, provenance

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

OWN_WEIGHTS, RANDOM_WEIGHTS = "own weights", "random weights"
"""What an LM is called beside draws of random weights, and how their names begin."""


@dataclass(frozen=True)
class Asked:
    """What a causal LM chose; 95 % intervals (`_low`, `_high`) are from resampling groups of items.

    Attributes:
        table: One row for each revision, kind of items and reader.
        answers: One row for each revision, item and choice.
        settings: How it was measured.
    """

    table: pd.DataFrame
    answers: pd.DataFrame
    settings: dict[str, Any]

    def write(self, folder: str | Path) -> None:
        """Writes `results.parquet`, `answers.parquet` and `ask.json` into a folder."""
        folder = user_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / "results.parquet", self.table)
        write_table(folder / "answers.parquet", self.answers)
        write_json(folder / "ask.json", self.settings)


def ask(
    model: str,
    items: str | Path,
    out: str | Path | None = None,
    *,
    revisions: Sequence[str] = (),
    scoring: Scoring = "total",
    random: int = 0,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Asked:
    """Asks a causal LM to choose among texts.

    Args:
        model: Hub name, local folder or GGUF file of a causal LM.
        items: A table of items: CSV, JSON lines or Parquet.
        out: Folder to write the results to; None: nothing is written.
        revisions: Ask these instead: branches, tags or commits of a model on the hub, or folders, within the
            model's own or anywhere.
        scoring: What choices are compared by: their `total` log-probability, or the `mean` over tokens.
        random: Ask so many draws of random weights, too: a control that has learnt nothing.
        settings: Settings by dotted name. What counts is `device`, `seed`, those of `lm`,
            `evaluation.batch_size`, `evaluation.resamples` and `corpus.encoding`.
        quiet: Show no progress.

    Raises:
        ProbekitError: An item, a revision or a setting cannot be used, or the model is no causal LM.
    """
    if scoring not in SCORINGS:
        raise ProbekitError(f"scoring is {scoring!r}; give {' or '.join(SCORINGS)}")
    if random < 0:
        raise ProbekitError(f"random is {random}; give how many draws of random weights to ask, or 0")
    config = Config().override({**(settings or {}), "lm.name": model})
    if random and config.lm.device_map is not None:
        raise ProbekitError("random weights are made on one device; leave lm.device_map unset, or ask none")
    progress, device = Progress(quiet=quiet), compute_device(config.device)
    rows = read_items(items, config.corpus.encoding)
    # All that can be refused without weights is refused before the first are loaded.
    named: dict[str | None, LanguageModelSettings] = {config.lm.revision: config.lm}
    if revisions:
        named = {name: at_revision(config.lm, name) for name in revisions}
    lms = [_FoundLM.of(revision, lm, rows) for revision, lm in named.items()]
    if random and lms[0].revision is None:
        lms[0] = replace(lms[0], revision=OWN_WEIGHTS)
    drawn = range(config.seed, config.seed + random)
    lms += [replace(lms[0], revision=f"{RANDOM_WEIGHTS} {seed}", random=seed) for seed in drawn]
    found = {lm.revision: lm.read(rows, device, config.evaluation.batch_size, progress) for lm in lms}
    resampling = config.resampling
    result = Asked(
        preference_table(rows, found, scoring, **resampling),
        pd.concat([_answers(rows, revision, read) for revision, read in found.items()], ignore_index=True),
        {
            "model": _shortened(model),
            "revisions": [lm.record(device) for lm in lms],
            "items": {"file": Path(items).name, "digest": digest_of([user_path(items)]), "rows": len(rows)},
            "scoring": scoring,
            **resampling,
            "provenance": provenance(config),
        },
    )
    if out is not None:
        result.write(out)
    return result


@dataclass(frozen=True)
class _FoundLM:
    """An LM whose weights are not loaded yet.

    Attributes:
        revision: What it is called beside others.
        settings: Where it is, on the hub pinned to a commit, and how it is held.
        config: Its configuration.
        bos: Where it reads the separator.
        separator: The token before a text.
        questions: What it is asked, a question for each item.
        random: Seed of random weights that it is asked with; None: its own.
    """

    revision: str | None
    settings: LanguageModelSettings
    config: PreTrainedConfig
    bos: BosRule
    separator: int
    questions: list[Question]
    random: int | None = None

    @classmethod
    def of(cls, revision: str | None, settings: LanguageModelSettings, items: Sequence[Item]) -> _FoundLM:
        """Finds it, and refuses what cannot be asked."""
        name = str(settings.name)
        source = hub.find(name, setting="lm.name", revision=settings.revision)
        settings = settings.model_copy(update={"revision": source.revision})
        trusted = settings.trust_remote_code
        config = load_config(name, revision=source.revision, trust_remote_code=trusted)
        refuse_bidirectional(config, name)
        small_lm(config, name)
        tokenizer = pretrained_tokenizer(settings)
        check_tokenizer(tokenizer, config, name)
        separator = separator_id(tokenizer)
        questions = asked(items, tokenizer, separator, longest_window(config))
        return cls(revision, settings, config, bos_rule_for(tokenizer, settings.bos), separator, questions)

    def record(self, device: torch.device) -> dict[str, Any]:
        """What it is, for `ask.json`."""
        name = str(self.settings.name)
        return {
            "revision": None if self.revision is None else _shortened(self.revision),
            "name": _shortened(name),
            "commit": self.settings.revision,
            "weights": lm_digest(name) if self.random is None else f"random, seed {self.random}",
            "compress": self.settings.compress if self.random is None else None,
            "dtype": dtype_name(dtype_of(self.settings.dtype, self.config, device)),
            "bos": self.bos,
        }

    def read(
        self, items: Sequence[Item], device: torch.device, batch_size: int, progress: Progress
    ) -> LogProbabilities:
        """Loads it, and reads every choice after its context, and without it."""
        name, model = str(self.settings.name), self._loaded(device)
        placed = is_placed(model)
        backend = HFBackend(model if placed else model.to(device), {}, device if placed else None)
        reader = ChoiceReader(
            own_losses(PlannedLM(backend, None, None, temperature=1.0)),
            lambda contexts: [GrowingText(context.tolist(), [0] * len(context), []) for context in contexts],
            longest_window(self.config),
            self.bos,
            batch_size,
            device,
        )
        # Equal choices are read once without context: so their priors are equal to the bit.
        unread = {
            ids.tobytes(): Question(np.array([self.separator]), (ids,), 0, 0)
            for item, question in zip(items, self.questions, strict=True)
            if item.context
            for ids in question.choices
        }
        named = f"ask {name}" if self.revision is None else f"ask {name} at {self.revision}"
        with progress.task(named, total=len(self.questions) + len(unread)) as task:
            own = -reader.summed_losses(self.questions, task)[0]
            alone = -reader.summed_losses([*unread.values()], task)[0, :, 0] if unread else np.empty(0)
        priors = dict(zip(unread, alone, strict=True))
        prior = own.copy()
        for row, (item, question) in enumerate(zip(items, self.questions, strict=True)):
            if item.context:
                prior[row, : len(question.choices)] = [priors[ids.tobytes()] for ids in question.choices]
        return LogProbabilities(own, prior, choice_lengths(self.questions))

    def _loaded(self, device: torch.device) -> PreTrainedModel:
        name, dtype = str(self.settings.name), dtype_of(self.settings.dtype, self.config, device)
        if self.random is not None:
            return random_weights(self.config, self.random, dtype)
        model = load_model(
            name,
            revision=self.settings.revision,
            trust_remote_code=self.settings.trust_remote_code,
            device_map=self.settings.device_map,
            dtype=dtype,
        )
        check_weights(model, name)
        return model if self.settings.compress is None else compressed(model, self.settings.compress)


def _shortened(name: str) -> str:
    """A name, or that of a folder without where it is on this machine."""
    return Path(name).name if Path(name).is_absolute() else name


def _answers(items: Sequence[Item], revision: str | None, read: LogProbabilities) -> pd.DataFrame:
    """A row for each item and choice."""
    return pd.DataFrame(
        {
            "revision": revision,
            "item": number,
            "kind": item.kind,
            "group": item.group,
            "choice": choice,
            "answer": None if item.answer is None else choice == item.answer,
            "tokens": read.tokens[number, choice],
            "log_probability": read.own[number, choice],
            "prior": read.prior[number, choice] if item.context else None,
        }
        for number, item in enumerate(items)
        for choice in range(len(item.choices))
    )
