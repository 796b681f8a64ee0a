"""The command line of ensemble: says that the graph engine is not in this version."""

import sys


def main() -> int:
    """Say on stderr that there is no engine yet; return 2, the status of a command that cannot run."""
    print("ensemble: this version of remote-ops does not contain the graph engine yet", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
