"""The commands: what is typed, parsed and passed on. All else is elsewhere, and callable from Python."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from probekit import distributed
from probekit.commands import (
    corpus,
    demo,
    evaluate,
    generate,
    intervene,
    lens,
    probe,
    report,
    subnetwork,
    sweep,
    train,
)
from probekit.config import preset_names
from probekit.distributed import Stopped, terminable
from probekit.errors import ProbekitError
from probekit.options import Parser

Command = Callable[[list[str]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0; 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM, 141 where nobody reads the output.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    # What these libraries say on standard error is for their developers; ours is for the user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with terminable():
            _command(words)
            sys.stdout.flush()
        distributed.leave()
    except BrokenPipeError:  # whoever read the output has read enough, as `head` does
        if debug:
            raise
        # The flush at exit is not to fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ProbekitError, OSError) as error:  # a full disk or a forbidden folder is the user's to put right
        if debug:
            raise
        who = f"process {distributed.rank()}: " if distributed.count() > 1 else ""
        # What was typed may hold line breaks and what moves the cursor.
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{who}{error}")
        sys.stderr.write(f"probekit: error: {line}\n")
        return 2
    except KeyboardInterrupt as stop:
        if debug:
            raise
        number = stop.signal if isinstance(stop, Stopped) else signal.SIGINT
        said = "terminated" if number == signal.SIGTERM else "interrupted"
        again = GO_ON.get(words[0], "it leaves nothing behind, and begins anew next time")
        sys.stderr.write(f"probekit: {said}; {again}\n")
        return 128 + number
    return 0


def _command(words: list[str]) -> None:
    names = "\n".join(f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="probekit",
        description="Train planner-conditioned language models; probe what they know of the next sentence.",
        epilog=f"commands:\n{names}\n\npresets: {', '.join(preset_names())}",
    )
    parser.add_argument("--version", action="version", version=f"probekit {version('probekit')}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="see below; COMMAND --help explains it"
    )
    command = parser.parse_args(words[:1]).command
    if command not in SHARED:
        if not distributed.is_first():
            return
        distributed.alone()
    COMMANDS[command](words[1:])


SHARED = ("train", "probe")
"""Commands that several processes do together; others are done by the first one alone."""

GO_ON = dict.fromkeys(("train", "corpus"), "--resume goes on from there")
GO_ON |= dict.fromkeys(("probe", "sweep", "demo"), "the same command goes on from there")
"""What an interruption leaves, by command."""

COMMANDS: dict[str, Command] = {
    "train": train.command,
    "evaluate": evaluate.command,
    "generate": generate.command,
    "probe": probe.command,
    "intervene": intervene.command,
    "subnetwork": subnetwork.command,
    "lens": lens.command,
    "report": report.command,
    "corpus": corpus.command,
    "sweep": sweep.command,
    "demo": demo.command,
}


if __name__ == "__main__":
    sys.exit(main())
