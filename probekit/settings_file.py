"""The settings in a run's folder, `config.yaml`, which tell when they were cut off or changed."""

from __future__ import annotations

from pathlib import Path

from probekit.checksums import text_checksum
from probekit.config import Config
from probekit.errors import ProbekitError

END_OF_SETTINGS = b"\n...\n"
"""How config.yaml ends when it is whole."""

CHECKED_SETTINGS = "# sha256 of all below: "
"""How config.yaml begins; the checksum follows."""


def check_settings(folder: Path) -> None:
    """Refuses settings of a run that are not whole; where there are none, nothing is said.

    Raises:
        ProbekitError: They were cut off, or changed since they were written.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return
    written = path.read_bytes()
    if not written.endswith(END_OF_SETTINGS):
        raise ProbekitError(f"{path} is cut off: its last line must be '...'; copy or train the run again")
    first, _, settings = written.decode("utf-8", "replace").partition("\n")
    if first.startswith(CHECKED_SETTINGS) and first != CHECKED_SETTINGS + text_checksum(settings):
        raise ProbekitError(
            f"{path} was changed or damaged since the run wrote it; copy it again, or, if the change is "
            "meant, delete its first line"
        )


def write_settings(folder: Path, config: Config) -> None:
    """Writes a run's settings."""
    from probekit.storage import write_text  # it loads PyTorch, which reading settings needs not

    settings = config.to_yaml()
    write_text(folder / "config.yaml", f"{CHECKED_SETTINGS}{text_checksum(settings)}\n{settings}")
