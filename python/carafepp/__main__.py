"""`python -m carafepp` prints the configuration; its commands are `demo` and `upsample`."""

from __future__ import annotations

import argparse
import sys

from . import __version__, show_config


def demo(arguments: list[str]) -> int:
    """Run the demo, which imports scikit-image and matplotlib."""
    from .demo import main

    return main(arguments)


def upsample(arguments: list[str]) -> int:
    """Upsample a map."""
    from .upsample import main

    return main(arguments)


COMMANDS = {
    "demo": (demo, "draw the demo on real data, or shrink a picture of yours"),
    "upsample": (upsample, "upsample a map along the edges of a picture"),
}


def main(arguments: list[str]) -> int:
    """Run one command and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m carafepp",
        description="Without a command, print the version, the build, instruction sets, CUDA "
        "devices and threads.",
    )
    version = f"carafepp {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (_, what) in COMMANDS.items():  # each has a parser of its own
        commands.add_parser(name, help=what, add_help=False)
    helper = commands.add_parser("help", help="print this, or the help of a command")
    helper.add_argument("topic", nargs="?", choices=COMMANDS, metavar="COMMAND")
    commands.add_parser("version", help="print the version")
    given, rest = parser.parse_known_args(arguments)
    if given.command in COMMANDS:
        return COMMANDS[given.command][0](rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if given.command is None:
        show_config()
    elif given.command == "version":
        print(version)
    elif given.topic is None:
        parser.print_help()
    else:
        return main([given.topic, "--help"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
