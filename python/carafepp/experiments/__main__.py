"""`python -m carafepp.experiments NAME`: the paper's tables in miniature, trained and reported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import carafepp

MISSING: ImportError | None = None
try:
    import torch
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..pictures import make_folder, sentence
    from ..torch.models import DOWNSAMPLERS, UPSAMPLERS
    from .figures import draw_figures
    from .report import markdown, plot
    from .tables import PRESETS, TABLES
    from .trainings import Trainings, choose_rows, train_table

    OPERATORS = {"upsampler": UPSAMPLERS, "downsampler": DOWNSAMPLERS}
except ImportError as error:
    MISSING = error


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    if MISSING is not None:
        print(
            f"carafepp.experiments: {MISSING}.\n"
            'Everything that they need: pip install "carafepp[experiments]"',
            file=sys.stderr,
        )
        return 1
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    carafepp.set_num_threads(options.threads)
    try:
        make_folder(options.out)
        run(options)
    except (OSError, ValueError) as error:
        print(f"carafepp.experiments: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last finished training.")
        return 130
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options, or exit with an error message."""
    tables = "\n".join(f"  {t.name:25} {t.question} ({t.paper})" for t in TABLES.values())
    parser = argparse.ArgumentParser(
        prog="python -m carafepp.experiments",
        description="The paper's tables in miniature, trained on data that needs no network.",
        epilog=f"tables:\n{tables}\n\n"
        "Each finished training is a line of OUT/trainings.jsonl, with all its arguments, and is\n"
        "not done again, for no table. A table is OUT/NAME.md and OUT/NAME.png. The figures are\n"
        "drawn from a network of their own, OUT/figures.pt.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*TABLES, "all", "figures"]
    parser.add_argument("name", choices=names, metavar="NAME", help="a table, all, or figures")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="large: for a GPU")
    parser.add_argument("--seeds", type=_positive, help="how many; default: 3")
    parser.add_argument("--steps", type=_positive, help="of a training; default: the preset's")
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="a folder")
    parser.add_argument("--device", default="cpu", help="PyTorch's name for it; default: cpu")
    parser.add_argument(
        "--threads", type=_positive, default=1, help="of the CPU; default: 1, as results need"
    )
    for option, operators in OPERATORS.items():
        parser.add_argument(
            f"--{option}",
            type=lambda words: words.split(","),
            default=[],
            metavar="A,B",
            help=f"of {', '.join(operators)}: the rows with these, or all rows with each of these",
        )
    options = parser.parse_args(arguments)
    for option, operators in OPERATORS.items():
        for name in getattr(options, option):
            if name not in operators:
                parser.error(f"--{option} must be of {', '.join(operators)}; got {name!r}.")
        if getattr(options, option) and options.name in ("all", "figures"):
            parser.error(f"--{option} must be left out for {options.name}, which are many things.")
    for option in ("seeds", "steps"):
        if getattr(options, option) is not None and options.name == "figures":
            parser.error(
                f"--{option} must be left out for figures, whose networks have one seed and the "
                "steps of the preset."
            )
    options.seeds = options.seeds or 3
    if reason := _refusal(options.device):
        parser.error(
            f"--device must be one that PyTorch and carafepp compute on here; got "
            f"{options.device!r}: {reason}"
        )
    return options


def _refusal(device: str) -> str | None:
    """Tell why networks cannot be trained on a device; None if they can."""
    try:
        one = torch.ones(1, 1, 1, 1, device=device)
        carafepp.reassemble(one, one).item()
    except Exception as error:  # each device of PyTorch has its own
        return str(error).splitlines()[0].partition(". ")[0]
    return None


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1; got {word!r}.")
    return int(word)


def run(options: argparse.Namespace) -> None:
    """Train, write and print as the options say."""
    columns = (
        *Progress.get_default_columns()[1:2],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, redirect_stdout=False) as progress:
        if options.name == "figures":
            for path in draw_figures(
                options.out, preset=options.preset, device=options.device, progress=progress
            ):
                print(path)
            return
        trainings = Trainings(options.out / "trainings.jsonl")
        tables = list(TABLES.values()) if options.name == "all" else [TABLES[options.name]]
        for table in tables:
            table = choose_rows(table, upsampler=options.upsampler, downsampler=options.downsampler)
            lines = train_table(
                table,
                trainings,
                preset=options.preset,
                seeds=options.seeds,
                steps=options.steps,
                device=options.device,
                progress=progress,
            )
            words = markdown(table, lines, options.preset)
            (options.out / f"{table.name}.md").write_text(words)
            plot(table, lines, options.out / f"{table.name}.png")
            print(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
