"""The console command `s2l-ray`: one name for the commands that are modules of this package.

s2l-ray run --config jobs/NAME.yaml      the same as python -m s2l_ray.run --config jobs/NAME.yaml
"""

import argparse
import importlib
import sys

import s2l_ray

COMMANDS = {
    "run": "reuse or make every artifact of a job",
    "init": "look at data and write a first job for it",
    "sweep": "choose values of fields by Ray Tune",
    "check": "whether losses are faithful on rows of yours",
    "status": "what is stored, which runs name it, and what can go",
}


def main(arguments: list[str] | None = None) -> int:
    """Hand the arguments over to the command that the first of them names."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        "s2l-ray",
        description="Choose fine-tuning data from the loss trajectories of a small proxy model.",
        epilog="s2l-ray COMMAND --help says what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"s2l_ray {s2l_ray.__version__}")
    commands = "; ".join(f"{name}: {text}" for name, text in COMMANDS.items())
    parser.add_argument("command", choices=COMMANDS, help=commands)
    named = parser.parse_args(given[:1]).command
    module = importlib.import_module(f"s2l_ray.{named}")
    status: int = module.main(given[1:])
    return status


def console() -> None:
    """What the installed command calls."""
    from s2l_ray.run import leave

    leave(main())
