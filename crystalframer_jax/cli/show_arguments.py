"""The arguments of `crystalframer show`, which draws; nothing here imports what takes long."""

import argparse
from pathlib import Path

from crystalframer_jax.cli.arguments import Parser, model_parser

FIGURES, PAGES = (".png", ".svg", ".pdf"), (".html",)


def show_frames_parser(prog: str = "crystalframer show frames") -> Parser:
    """Makes the parser of show frames."""
    examples = """\
  crystalframer show frames examples/SrTiO3.cif --atom=1 --block=2 --output=frames.png
  crystalframer show frames examples/SrTiO3.cif --atom=1 --head=0 --output=frames.html"""
    description = """Draw what the heads of a block see from an atom: its neighbors, with areas by attention weight, and
        the axes of each head's frame. A page (.html) can be turned around, and needs no network."""
    parser = _view_parser(prog, description, examples, (*FIGURES, *PAGES))
    head_help = "one of the heads, from 0, or all; default: all"
    parser.add_argument("--head", type=_head, default=None, metavar="NUMBER|all", help=head_help)
    return parser


def show_attention_parser(prog: str = "crystalframer show attention") -> Parser:
    """Makes the parser of show attention."""
    examples = """\
  crystalframer show attention examples/SrTiO3.cif --atom=1 --block=2 --output=attention.png"""
    description = "Draw the attention weights of every head of a block against the distance of the neighbors."
    return _view_parser(prog, description, examples, FIGURES)


def show_crystal_parser(prog: str = "crystalframer show crystal") -> Parser:
    """Makes the parser of show crystal."""
    examples = """\
  crystalframer show crystal examples/SrTiO3.cif --output=crystal.png"""
    parser = Parser(prog, "Draw the cell of a crystal with its atoms.", examples)
    parser.add_argument("file", metavar="FILE", help="structure file with one crystal")
    _add_output(parser, FIGURES)
    return parser


def show_runs_parser(prog: str = "crystalframer show runs") -> Parser:
    """Makes the parser of show runs."""
    examples = """\
  crystalframer show runs runs/quickstart --output=runs.png"""
    description = "Draw the validation errors of several trainings against their epochs."
    parser = Parser(prog, description, examples)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directories")
    parser.add_argument("--target", default="", metavar="NAME", help="default: the first")
    _add_output(parser, FIGURES, has_dark=False)
    return parser


def _view_parser(prog: str, description: str, examples: str, endings: tuple[str, ...]) -> Parser:
    """Makes a parser of what looks at an atom through a block of a model."""
    parser = model_parser(prog, description, examples)
    parser.add_argument("file", metavar="FILE", help="structure file with one crystal")
    parser.add_argument("--atom", type=int, default=0, metavar="NUMBER", help="in the order of the file, from 0")
    parser.add_argument("--block", type=int, default=-1, metavar="NUMBER", help="from 0; default: the last")
    _add_output(parser, endings)
    return parser


def _add_output(parser: Parser, endings: tuple[str, ...], has_dark: bool = True) -> None:
    def file(text: str) -> Path:
        if not text.lower().endswith(endings):
            raise argparse.ArgumentTypeError(f"{text!r} ends in none of {', '.join(endings)}")
        return Path(text)

    parser.add_argument("--output", type=file, required=True, metavar="FILE", help=f"to write: {', '.join(endings)}")
    if has_dark:
        parser.add_argument("--dark", action="store_true", help="on a dark ground")


def _head(text: str) -> int | None:
    """Reads the number of a head; None for all."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor all") from None
