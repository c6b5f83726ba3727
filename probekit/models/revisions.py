"""Published checkpoints of a pre-trained LM: which are asked for, and after how many steps each was made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from probekit.config import Config, LanguageModelSettings, user_path
from probekit.data.special_tokens import bos_rule_for
from probekit.data.tokenizer import pretrained_tokenizer
from probekit.errors import ProbekitError
from probekit.models.pretrained import load_config

STEP = re.compile(r"step\D?(\d+)", re.IGNORECASE)
"""What the names of most revisions and folders say of their step, such as `step1000` and `global_step-20`."""


def at_revision(settings: LanguageModelSettings, revision: str) -> LanguageModelSettings:
    """The settings of one of an LM's checkpoints: a folder, or else a revision on the hub.

    Args:
        settings: The LM's.
        revision: A folder within that of the LM or anywhere; or a branch, tag or commit.

    Raises:
        ProbekitError: The LM is a folder here, and there is no such folder.
    """
    own = user_path(str(settings.name))
    folder = next((path for path in (own / revision, user_path(revision)) if path.is_dir()), None)
    if folder is not None:
        return settings.model_copy(update={"name": str(folder.absolute()), "revision": None})
    if own.exists():
        raise ProbekitError(
            f"--revisions has {revision!r}: no such folder, in {own} or elsewhere; only models on the hub "
            "have revisions by name"
        )
    return settings.model_copy(update={"revision": revision})


def published(config: Config, revisions: Sequence[str]) -> dict[int, Config]:
    """The settings with which each of several checkpoints of an LM is read, by its training step, in order.

    Args:
        config: Settings with the LM.
        revisions: Checkpoints as `at_revision` takes them. Their steps are the numbers after `step` in their
            names, or the only numbers there; `NAME=STEP` gives it where the name does not.

    Raises:
        ProbekitError: One does not exist or is no LM, or its step is unknown or that of another one.
    """
    names: dict[int, str] = {}
    found: dict[int, Config] = {}
    for revision in revisions:
        name, step = _step_of(revision)
        if step in names:
            raise ProbekitError(
                f"--revisions has {names[step]!r} and {name!r}, both of step {step}; give each step once, or "
                "its number as NAME=STEP"
            )
        names[step] = name
        found[step] = config.model_copy(update={"lm": at_revision(config.lm, name)})
    for lm in (own.lm for own in found.values()):
        load_config(str(lm.name), revision=lm.revision, trust_remote_code=lm.trust_remote_code)
    return dict(sorted(found.items()))


def name_of(config: Config, step: int) -> str:
    """What `published` was given for a checkpoint with these settings."""
    name = config.lm.revision or str(config.lm.name)
    found = _number_in(name)
    return name if found == step else f"{name}={step}"


def same_tokenizer(one: Config, other: Config) -> bool:
    """Whether two LMs' tokenizers make the same tokens of every text, and begin it with the same ones."""
    tokenizers = [pretrained_tokenizer(config.lm) for config in (one, other)]
    first, second = (
        (t.backend_tokenizer.to_str(), t.special_tokens_map, t.chat_template, bos_rule_for(t, one.lm.bos))
        for t in tokenizers
    )
    return first == second


def _step_of(revision: str) -> tuple[str, int]:
    """The name and the step of a revision as it is given."""
    if (found := _number_in(revision)) is not None:
        return revision, found
    name, _, step = revision.rpartition("=")
    if not (name and step.isdecimal()):
        raise ProbekitError(
            f"--revisions has {revision!r}, whose name does not say after how many steps of training it was "
            f"made; give it as {revision}=STEP"
        )
    return name, int(step)


def _number_in(revision: str) -> int | None:
    """The step in the name of a revision; None where there is none, or it is written as NAME=STEP."""
    name = Path(revision).name
    found = STEP.findall(name) or re.findall(r"\d+", name)
    return None if "=" in name or len(found) != 1 else int(found[0])
