"""The command `crystalframer`: it parses, and imports what a subcommand needs only to run it."""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import crystalframer_jax
from crystalframer_jax.cli import arguments, show_arguments
from crystalframer_jax.cli.arguments import Parser
from crystalframer_jax.cli.common import parsed, reporting_errors

DESCRIPTION = """Properties of crystals by CrystalFramer (ICLR 2025): predict them with the model of the package, or
    train your own. Every subcommand tells its options and examples with --help."""
EXAMPLES = """\
  crystalframer predict examples/NaCl.cif
  crystalframer train --config=quickstart --workdir=runs/quickstart
  crystalframer evaluate --model=runs/quickstart

exit status: 0 if all was done, 1 if something could not be used, 2 for a wrong command line"""


class Command(NamedTuple):
    """A subcommand: its parser, the module and the function that does it, and what it is for."""

    parser: Callable[[], Parser]
    module: str
    function: str
    summary: str


COMMANDS = {
    "prepare": Command(arguments.prepare_parser, "prepare", "run", "download or read crystals with labels to train on"),
    "train": Command(arguments.train_parser, "train", "run", "train a model, or continue a training"),
    "evaluate": Command(arguments.evaluate_parser, "evaluate", "run", "errors of a model on crystals with labels"),
    "predict": Command(arguments.predict_parser, "predict", "run", "properties of crystals in files"),
    "embed": Command(arguments.embed_parser, "embed", "run", "vectors of crystals and atoms; which crystals are near"),
    "show frames": Command(
        show_arguments.show_frames_parser, "show", "run_frames", "what the heads of a model see from an atom"
    ),
    "show attention": Command(
        show_arguments.show_attention_parser, "show", "run_attention", "attention weights against distance"
    ),
    "show crystal": Command(show_arguments.show_crystal_parser, "show", "run_crystal", "the cell with its atoms"),
    "show runs": Command(show_arguments.show_runs_parser, "show", "run_runs", "validation errors of several trainings"),
    "import": Command(arguments.import_parser, "convert", "import_run", "a run of an official PyTorch checkpoint"),
    "export torch": Command(
        arguments.export_torch_parser, "convert", "export_run", "an official PyTorch checkpoint of a run"
    ),
    "export jarvis": Command(
        arguments.export_jarvis_parser, "export_jarvis", "run", "a contribution to the JARVIS-Leaderboard"
    ),
    "export matbench": Command(
        arguments.export_matbench_parser, "export_matbench", "run", "results of five folds for Matbench"
    ),
    "doctor": Command(arguments.doctor_parser, "doctor", "run", "does all work here; how fast is this GPU"),
}
GROUPS = (["export"], ["show"])  # first words of subcommands of two


def main(argv: Sequence[str] | None = None) -> int:
    """Is the command `crystalframer`; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = " ".join(words[: 1 + (words[:1] in GROUPS)])
    if name not in COMMANDS:
        _refuse(words)
    found, others = COMMANDS[name], words[name.count(" ") + 1 :]
    if name == "train" and not {"--help", "-h"} & set(others):  # its configuration is for ml_collections
        return _module(found).train_main(others, f"crystalframer {name}")
    given = parsed(found.parser(), others)  # before what takes long is imported
    return getattr(_module(found), found.function)(given)


def _module(command: Command) -> Any:
    return importlib.import_module(f"crystalframer_jax.cli.{command.module}")


@reporting_errors()
def _refuse(words: list[str]) -> NoReturn:
    """Tells what there is: --help and --version are asked for, or the subcommand is missing or wrong."""
    group = f"{words[0]} " if words[:1] in GROUPS else ""
    found = {name.removeprefix(group): command for name, command in COMMANDS.items() if name.startswith(group)}
    words = words[bool(group) :]
    parser = Parser(f"crystalframer {group}".strip(), DESCRIPTION, "" if group else EXAMPLES)
    if not group:
        version = f"crystalframer_jax {crystalframer_jax.__version__}"
        parser.add_argument("--version", action="version", version=version)
    listed = "\n".join(f"  {name:{max(map(len, found))}}  {command.summary}" for name, command in found.items())
    parser.usage = f"{parser.prog} SUBCOMMAND ... [--help]"
    parser.epilog = f"subcommands:\n{listed}\n\n{parser.epilog or ''}"
    if words and not words[0].startswith("-"):
        parser.error(f"there is no subcommand {words[0]!r}; choose among {', '.join(found)}")
    parser.parse_args(words)
    parser.error(f"name a subcommand: {', '.join(found)}")
