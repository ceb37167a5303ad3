"""Run a job: reuse or make every artifact its config asks for.

    python -m s2l_ray.run                                           the built-in demo
    python -m s2l_ray.run --config jobs/NAME.yaml --until subset    a job of yours, up to a stage
    python -m s2l_ray.run --config jobs/NAME.yaml --clusters.k=200  with another value of any field
    python -m s2l_ray.run --config jobs/NAME.yaml --dry-run         what it would do, and its cost

The same command again resumes where it stopped.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from rich.table import Table

from s2l_ray import api, config, pipeline
from s2l_ray.core.storage.info import EvaluationInfo, HeldOut, info_of
from s2l_ray.core.storage.store import Store, join_uri
from s2l_ray.display import Console, ShownRecords, say
from s2l_ray.edge.failures import described
from s2l_ray.errors import UsageError, UserError
from s2l_ray.pipeline.columns import columns_table

log = logging.getLogger("s2l_ray")
# What shells say of a command that Ctrl-C or SIGTERM ended.
INTERRUPTED, TERMINATED = 130, 143
MOSTLY_SET = ("run.storage", "examples.files", "proxy.model.hub", "clusters.k", "subset.budget")


def main(arguments: list[str] | None = None) -> int:
    """Parse, plan, run, print. Exit status 0 only when every requested artifact is committed."""
    args, overrides = parser(__doc__ or "").parse_known_args(arguments)
    set_up_logging(args)
    return exit_status(functools.partial(_run, args, overrides))


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    job = load_job(args.config, overrides)
    plan = api.plan(job, args.until, assume=args.dry_run)
    if plan.uses and not args.quiet:
        Console().print(columns_table(plan))
    if args.dry_run:
        from s2l_ray.pipeline.estimate import dry_run

        dry_run(plan)
    else:
        print_results(plan, api.make(plan))


def leave(status: int) -> NoReturn:
    """End the process.

    After Ctrl-C other threads are still in calls to Ray, and now and then they crash when Ray is
    taken down under them, or start another one. So it is not taken down: Ray itself ends what
    belongs to a driver that is gone.
    """
    if status in (INTERRUPTED, TERMINATED):
        # Whoever read the output may have gone too, and a signal may have come amid a line.
        with contextlib.suppress(OSError, RuntimeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def exit_status(command: Callable[[], int | None], failed: int = 1) -> int:
    """Exit status of a command: what it returns, or else 0.

    After an error, which it prints, 2 where the command line was wrong and else `failed`; 130 after
    Ctrl-C. SIGTERM ends the process with 143.
    """
    try:
        with _ended_by_sigterm():
            return command() or 0
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here", sys.stderr)
        return INTERRUPTED
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        log.debug("raised here:", exc_info=True)
        return 2 if isinstance(error, UsageError) else failed
    except Exception as error:
        # A full disk, a lost host, a fault of ours: nothing half-written counts.
        say(f"error: {described(error)}", sys.stderr)
        log.debug("raised here:", exc_info=True)
    return failed


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """`ray job stop` and Kubernetes send it.

    The process ends where it stands: an exception could be lost on its way through a library.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: object) -> NoReturn:
    # Not by print, which the signal may have interrupted.
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), b"terminated; the same command goes on from here\n")
    leave(TERMINATED)


def parser(text: str) -> argparse.ArgumentParser:
    """The command line that `run` and `sweep` share."""
    made = job_parser(text)
    made.add_argument(
        "--until",
        default="report",
        metavar="STAGE",
        help=f"stop after this stage: {', '.join(pipeline.NAMES)}",
    )
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be reused and made, and its cost; start nothing",
    )
    return made


def job_parser(text: str) -> argparse.ArgumentParser:
    """A command line that names a job; arguments --section.field=value change its config."""
    made = bare_parser(text, add_help=False)
    made.add_argument(
        "-h", "--help", nargs="?", choices=["all"], action=_Help, help="all: every field of a job"
    )
    made.add_argument(
        "--config", metavar="FILE", help="the job, a YAML file; without one the built-in demo runs"
    )
    made.add_argument("--quiet", action="store_true", help="no progress, only warnings and results")
    made.add_argument("--verbose", action="store_true", help="also where an error was raised")
    return made


def bare_parser(text: str, **options: Any) -> argparse.ArgumentParser:
    """A command line without arguments; `text` is shown as it is, names may not be cut short."""
    return argparse.ArgumentParser(
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


class _Help(argparse.Action):
    """Prints how the command is used, with the fields that most jobs set or with all fields."""

    def __call__(self, made: argparse.ArgumentParser, *rest: Any) -> NoReturn:
        every = rest[1] == "all"
        which = "every field of a job" if every else "fields of a job that most jobs set"
        made.epilog = (
            f"{which} (--section.field=value on the command line; variants.NAME.section.field for "
            f"one variant):\n\n{config.describe(None if every else MOSTLY_SET)}"
        )
        if not every:
            made.epilog += "\n\n--help all lists every field, with its default and its choices."
        made.print_help()
        made.exit()


def load_job(path: str | None, overrides: list[str]) -> config.Job:
    """The job of a YAML file, or the built-in demo, whose data are written into its storage."""
    if path is not None:
        return api.load(path, *overrides)
    from s2l_ray import demo

    def at(folder: str) -> config.Job:
        files = {
            "examples": {"files": [join_uri(folder, "train.jsonl")]},
            "evaluation": {"files": [join_uri(folder, "heldout.jsonl")]},
        }
        return api.load(config.merge(demo.CONFIG, files), *overrides)

    store = Store(at("demo").first.run.storage)
    for name, rows in (
        ("train.jsonl", demo.training_rows()),
        ("heldout.jsonl", demo.heldout_rows()),
    ):
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if not store.exists(f"demo/{name}") or store.read(f"demo/{name}") != data:
            store.write(f"demo/{name}", data)
    return at(store.uri_of("demo"))


def set_up_logging(args: argparse.Namespace | None = None) -> None:
    """One line an event, on stderr. Ray's own usage report is left off.

    Args:
        args: of `job_parser`, whose --quiet and --verbose count.
    """
    _move_stderr()
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    quiet, verbose = args is not None and args.quiet, args is not None and args.verbose
    log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    if not any(isinstance(known, ShownRecords) for known in log.filters):
        log.addFilter(ShownRecords())
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def _move_stderr() -> None:
    """Write our own lines to a copy of stderr, so that lines of Ray's C++ can go to its log."""
    if sys.stderr is sys.__stderr__ and sys.stderr is not None and sys.stderr.fileno() == 2:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")


def print_results(plan: pipeline.Plan, done: list[pipeline.Done]) -> None:
    """The table of stages, the comparison of variants where there is one, and where results lie."""
    job, console = plan.job, Console()
    console.print(_stages(job, done))
    by_label = {result.node.label: result.manifest for result in done}
    of_variant = {variant: plan.of(variant) for variant in job.variants}
    evaluated = {
        variant: info_of(by_label[nodes["evaluation"].label], EvaluationInfo)
        for variant, nodes in of_variant.items()
        if "evaluation" in nodes
    }
    if evaluated:
        console.print(comparison(evaluated))
        for variant, info in evaluated.items():
            _say_of_answers(variant, info)
    for variant, nodes in of_variant.items():
        # Variants that share a subset are named together, by the first of them.
        if "subset" in nodes and nodes["subset"].variants[0] == variant:
            names = ", ".join(nodes["subset"].variants)
            say(f"subset ({names}): {nodes['subset'].artifact.uri}")
    say(f"every artifact by name: {plan.store.uri_of(f'runs/{job.first.run.name}')}")
    if any(result.node.stage.of_job for result in done):
        say(f"report: {plan.store.uri_of(f'runs/{job.first.run.name}/report.html')}")


def _stages(job: config.Job, done: list[pipeline.Done]) -> Table:
    table = Table(title=f"run {job.first.run.name}")
    for name in ("stage", "variants", "reused or made", "rows", "seconds", "start-up"):
        numeric = name in ("rows", "seconds", "start-up")
        table.add_column(name, justify="right" if numeric else "left")
    for result in done:
        node, manifest = result.node, result.manifest
        everyone = len(node.variants) == len(job.variants)
        table.add_row(
            node.stage.name,
            "all" if everyone else ", ".join(node.variants),
            "made" if result.made else "reused",
            f"{manifest.rows:,}" if manifest.parts else "",
            f"{result.seconds:.1f}",
            "" if manifest.start_seconds is None else f"{manifest.start_seconds:.1f}",
        )
    return table


def comparison(evaluated: dict[str, EvaluationInfo]) -> Table:
    """Held-out loss and scores by source, one column a variant; intervals of the means below."""
    names = list(dict.fromkeys(n for info in evaluated.values() for n in info.macro.metrics))
    table = Table(title=f"held-out {' / '.join(names)}")
    table.add_column("source")
    for variant in evaluated:
        table.add_column(variant, justify="right")

    def cell(found: HeldOut) -> str:
        return " / ".join(_mean(found, name) for name in names)

    for source in next(iter(evaluated.values())).by_source:
        found = (info.by_source.get(source) for info in evaluated.values())
        table.add_row(source, *("" if own is None else cell(own) for own in found))
    table.add_section()
    table.add_row("mean over sources", *(cell(info.macro) for info in evaluated.values()))
    for name in names:
        table.add_row(f"{name}, 95 %", *(_interval(i.macro, name) for i in evaluated.values()))
    return table


def _mean(found: HeldOut, name: str) -> str:
    digits = 3 if name == "loss" else 2
    return f"{found.metrics[name].mean:.{digits}f}" if name in found.metrics else "-"


def _interval(found: HeldOut, name: str) -> str:
    if name not in found.metrics:
        return "-"
    return f"{found.metrics[name].low:.3f} to {found.metrics[name].high:.3f}"


def _say_of_answers(variant: str, info: EvaluationInfo) -> None:
    """What is to be known of the answers beside their scores."""
    if info.counts:
        told = ", ".join(f"{count:,} {what}" for what, count in info.counts.items())
        say(f"answers of {variant}: {told}")
    if info.differ:
        say(f"answers of {variant}: the rules differ about {info.differ:,}, such as")
    for row in info.differing:
        say(
            f"  {row.source}, example_id {row.example_id}, gold {row.gold!r}: {row.answer!r} is "
            f"right by {', '.join(row.right)}, wrong by {', '.join(row.wrong)}"
        )


if __name__ == "__main__":
    leave(main())
