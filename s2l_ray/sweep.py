"""Try several values of some fields with Ray Tune, by default of the number of clusters.

    python -m s2l_ray.sweep --config jobs/NAME.yaml             half, all and twice of clusters.k
    python -m s2l_ray.sweep --over 'clusters.k=[50, 100, 200]'  these values
    python -m s2l_ray.sweep --over 'clusters.k=[10, 20]' --over 'subset.budget=[0.1, 0.2]'

A trial is a variant of the run NAME-sweep, whose record names the artifacts of all trials. What its
fields do not touch is made once, before the trials start, and shared. The same command again
resumes.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import time
from typing import Any

import yaml
from rich.table import Table

from s2l_ray import config, pipeline
from s2l_ray.config.loading import JobYaml
from s2l_ray.core.selection.rules import by_cluster
from s2l_ray.core.storage.info import ClustersInfo, EvaluationInfo, info_of
from s2l_ray.core.storage.store import Store
from s2l_ray.display import Console, say
from s2l_ray.errors import UserError
from s2l_ray.run import exit_status, leave, load_job, parser, set_up_logging

Grid = dict[str, list[Any]]
# What a sweep leaves beside its run's record.
TABLE = "sweep.json"


def main(arguments: list[str] | None = None) -> int:
    """Make what trials share, run them, print a table. Exit 0 only if every trial succeeded."""
    line = parser(__doc__ or "")
    line.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="FIELD=[VALUES]",
        help="a field and the values to try",
    )
    args, overrides = line.parse_known_args(arguments)
    set_up_logging(args)
    return exit_status(functools.partial(_sweep, args, overrides))


def _sweep(args: argparse.Namespace, overrides: list[str]) -> None:
    until = "evaluation" if args.until == "report" else args.until
    base = _base(load_job(args.config, overrides))
    grid = _grid(args.over, base)
    if args.dry_run:
        from s2l_ray.pipeline.estimate import dry_run

        dry_run(pipeline.plan(_job_of(base, _points(grid)), until, assume=True))
        return
    rows = run(base, grid, until)
    Console(wide=True).print(_table(grid, rows))
    folder = Store(base.run.storage).uri_of(f"runs/{_run_name(base)}")
    say(f"every artifact by name: {folder}")
    say(f"this table: {folder}/{TABLE}")


def _base(job: config.Job) -> config.Config:
    """The variant that is swept: the first that chooses by clusters."""
    for variant in job.variants.values():
        if by_cluster(variant.subset):
            return variant
    raise UserError(
        "planning the sweep: no variant of the job chooses by clusters. Set subset.rule: s2l in "
        "one of them."
    )


def _grid(over: list[str], base: config.Config) -> Grid:
    grid: Grid = {}
    for text in over:
        field, _, values = text.partition("=")
        try:
            parsed = yaml.load(values, JobYaml)
        except (ValueError, yaml.YAMLError):
            parsed = None
        if not isinstance(parsed, list) or not parsed or "." not in field:
            raise UserError(
                "reading the command line: --over expects section.field=[value, value, ...], got "
                f"{text!r}."
            )
        grid[field] = parsed
    k = base.clusters.k
    return grid or {"clusters.k": sorted({max(1, k // 2), k, 2 * k})}


def _points(grid: Grid) -> list[dict[str, Any]]:
    """The values of every trial."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _job_of(base: config.Config, points: list[dict[str, Any]]) -> config.Job:
    """The base with the values of each trial as a variant."""
    tree = config.merge(base.model_dump(exclude_unset=True), {"run": {"name": _run_name(base)}})
    return config.load(None, [], {**tree, "variants": {_name(point): point for point in points}})


def _run_name(base: config.Config) -> str:
    return f"{base.run.name}-sweep"


def _name(point: dict[str, Any]) -> str:
    """Of a trial; a variant has no slash in its name."""
    return ",".join(f"{field}={value}" for field, value in point.items()).replace("/", "|")


def run(base: config.Config, grid: Grid, until: str) -> list[dict[str, Any]]:
    """All points of the grid as Tune trials; returns a row a trial: its values and its results.

    Raises:
        UserError: a trial's config is wrong (before any work), or a trial failed.
    """
    job = _job_of(base, _points(grid))
    plan = pipeline.plan(job, until)
    shared = {node.label for node in plan.nodes if len(node.variants) == len(job.variants)}

    from s2l_ray.edge import session

    session.connect(base.scaling)
    pipeline.run(plan, only=shared)
    rows = _tune(plan, grid)
    # All is there: this leaves the record.
    pipeline.run(plan)
    plan.store.write(f"runs/{job.first.run.name}/{TABLE}", json.dumps(rows, indent=1).encode())
    return rows


def _tune(plan: pipeline.Plan, grid: Grid) -> list[dict[str, Any]]:
    # Tune's own handler would end the process without a word of ours; and relative paths of the job
    # begin where the command was given.
    os.environ |= {"TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    from ray import tune

    from s2l_ray.edge import user_errors

    store = plan.store
    name = f"{plan.job.first.run.name}-{time.time_ns()}"
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, plan=plan), {"CPU": 0.01}),
        param_space={field: tune.grid_search(values) for field, values in grid.items()},
        # One at a time: a trial spreads over the whole cluster itself.
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(name=name, storage_path=store.uri_of("scratch"), verbose=0),
    )
    try:
        # Tune prints where its own files are, which are deleted.
        with contextlib.redirect_stdout(io.StringIO()):
            results = tuner.fit()
    finally:
        store.delete(f"scratch/{name}")
    trials = [results[number] for number in range(len(results))]
    for result in trials:
        if result.error is not None:
            found = user_errors.find_user_error(result.error)
            raise found or UserError(
                f"running the sweep: the trial {result.config} failed: {result.error}"
            )
    rows = [
        {**(result.config or {}), **json.loads((result.metrics or {})["summary"])}
        for result in trials
    ]
    rows.sort(key=lambda row: [row[field] for field in grid])
    return rows


def _trial(values: dict[str, Any], plan: pipeline.Plan) -> None:
    """One trial: all artifacts of its variant, most of which are there already.

    It takes the plan as it is: raw files are looked at once, where the command was given.
    """
    from ray import tune

    set_up_logging()
    own = {node.label for node in plan.of(_name(values)).values()}
    done = pipeline.run(plan, only=own)
    manifests = {result.node.stage.name: result.manifest for result in done}
    clusters = info_of(manifests["clusters"], ClustersInfo)
    summary: dict[str, Any] = {
        "objective": clusters.objective,
        "rounds": len(clusters.objectives),
    }
    summary["smallest"] = min(clusters.sizes)
    if "evaluation" in manifests:
        macro = info_of(manifests["evaluation"], EvaluationInfo).macro.metrics
        summary |= {f"held-out {name}": found.mean for name, found in macro.items()}
    summary["made"] = (
        ", ".join(result.node.stage.name for result in done if result.made) or "nothing"
    )
    tune.report({"summary": json.dumps(summary)})


def _table(grid: Grid, rows: list[dict[str, Any]]) -> Table:
    table = Table(title="sweep")
    columns = [*grid, *(name for name in rows[0] if name not in grid)]
    for column in columns:
        table.add_column(column, justify="left" if column == "made" else "right")
    for row in rows:
        table.add_row(
            *(f"{row[c]:.6g}" if isinstance(row[c], float) else str(row[c]) for c in columns)
        )
    return table


if __name__ == "__main__":
    leave(main())
