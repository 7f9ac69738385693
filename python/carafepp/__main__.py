"""`python -m carafepp` prints the configuration; `demo` and `upsample` are its commands."""

import sys

from . import show_config


def main(arguments: list[str]) -> int:
    """Run one command and return the exit status."""
    if not arguments:
        show_config()
        return 0
    if arguments[0] == "demo":
        from .demo import main as demo  # imports scikit-image and matplotlib

        return demo(arguments[1:])
    if arguments[0] == "upsample":
        from .upsample import main as upsample

        return upsample(arguments[1:])
    print(
        f"carafepp: no command {arguments[0]!r}.\n"
        "usage: python -m carafepp          version, build, instruction sets, threads, devices\n"
        "       python -m carafepp demo     the demo on real data (--help tells more)\n"
        "       python -m carafepp upsample a map along the edges of a picture (--help tells more)",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
