"""The command line: vlmfast train, eval, regions and the others."""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import torch

import vlmfast
from vlmfast.cli.arguments import UsageError

COMMANDS = {
    "train": ("vlmfast.cli.train", "Train a model."),
    "eval": ("vlmfast.cli.evaluate", "Scores of a checkpoint on a task: retrieval, captioning, ..."),
    "predict": ("vlmfast.cli.predict", "What a checkpoint says of images: captions, answers, boxes, matches."),
    "regions": ("vlmfast.cli.regions", "What a detector finds in every image, kept in a folder for other models."),
    "anchors": (
        "vlmfast.cli.anchors",
        "Anchor pairs of a model that compares without training: made, changed, explained.",
    ),
    "convert": ("vlmfast.cli.convert", "A public data set to tar shards."),
    "models": ("vlmfast.cli.models", "Every model, its strategy, tasks and paper."),
    "bench": ("vlmfast.cli.bench", "Ops and training steps beside what people use instead: time, memory, error."),
    "doctor": ("vlmfast.cli.doctor", "What runs on this machine, why not the rest, and whether it is right."),
}
FINDINGS = ("bench", "doctor")
"""Commands whose exit code 1 is a finding; their errors are 2."""
EXTRAS = {"bench": "bench", "eval": "eval"}
"""The extra that a command's optional packages are of, where it is not `train`."""
PACKAGES = {"torchvision": "detection", "webdataset": "streaming"}
"""The same of a package, whatever the command."""


END_SECONDS = 60
"""What the interpreter may take to exit once a command has returned or failed."""


def program() -> int:
    """The program's entry: `main`, and a process that ends soon after it, whatever threads or children are left."""
    try:
        return main()
    except KeyboardInterrupt:
        print("vlmfast: interrupted", file=sys.stderr)
        return 130
    finally:
        faulthandler.dump_traceback_later(END_SECONDS, exit=True)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:8}{text}" for name, (_, text) in COMMANDS.items()]
        print("usage: vlmfast COMMAND [options]\n", *lines, sep="\n")
        print("\n'vlmfast COMMAND --help' lists the options.")
        return 0
    if arguments[0] == "--version":
        print(f"vlmfast {vlmfast.__version__}, torch {torch.__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    # Before workers are forked; they tokenize in parallel already.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if command not in COMMANDS:
        print(f"vlmfast: COMMAND must be one of {', '.join(COMMANDS)}; got {command!r}", file=sys.stderr)
        return 2
    try:
        code: int = import_module(COMMANDS[command][0]).run(rest)
        return code
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("vlmfast"):
            raise
        extra = PACKAGES.get(error.name or "", EXTRAS.get(command, "train"))
        print(f"vlmfast {command}: {error.name} is not installed; pip install 'vlmfast[{extra}]'", file=sys.stderr)
    except UsageError as error:
        print(f"vlmfast {command}: {error}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if os.environ.get("VLMFAST_TRACEBACK") == "1":
            raise
        print(f"vlmfast {command}: {_message(error)}", file=sys.stderr)
    except Exception:
        if command not in FINDINGS or os.environ.get("VLMFAST_TRACEBACK") == "1":
            raise
        traceback.print_exc()
    return 2 if command in FINDINGS else 1


def _message(error: Exception) -> str:
    """The error's own words; torch puts the whole traceback of a data worker before them."""
    text = str(error)
    if "\nOriginal Traceback " not in text:
        return text
    lines = text.splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("  "))
    return "\n".join(lines[last + 1 :]).partition(": ")[2]
