"""Are the losses of a job faithful on its own rows? Score some rows in several ways and compare.

    python -m s2l_ray.check --config jobs/NAME.yaml      64 rows, every checkpoint of its proxy
    python -m s2l_ray.check --rows 16 --checkpoints 3    quicker
    python -m s2l_ray.check                              on the built-in demo

The rows come from the raw files of the job's first variant. The checkpoints are those of its proxy,
or the model at its start where the proxy is not trained yet. Nothing is written but the index of
the raw files, and no Ray is started. Exit status: 0 when the job's own setting shifts no loss by
more than --tolerance, 1 when it does, 2 when that could not be found out.
"""

import argparse
import functools
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from s2l_ray import config, pipeline
from s2l_ray.display import Console, printable, say
from s2l_ray.errors import UserError
from s2l_ray.progress import track
from s2l_ray.run import exit_status, job_parser, leave, load_job, set_up_logging

# torch is loaded once there is something to compute
if TYPE_CHECKING:
    from s2l_ray.core.fidelity.losses import Checkpoint, Setting
    from s2l_ray.core.fidelity.rows import EncodedRows
    from s2l_ray.core.fidelity.shifts import Grouping, Shift
    from s2l_ray.core.text.encoding import Encoded, Encoder

# characters shown of each masked or learned stretch of the sample row
SHOWN = 1_000
# In nats. In fp32 only the order of sums differs: some 1e-6 to 1e-5. bf16 keeps 8 bits of weights
# and activations: on 500 short answers a small trained model showed up to 0.034, half of the rows
# under 0.001. A wrong mask, position or cap moves whole nats.
TOLERANCES = {"bf16": 0.05, "fp32": 1e-3}


def main(arguments: list[str] | None = None) -> int:
    """Parse, score, print. Returns the exit status."""
    args, overrides = parser().parse_known_args(arguments)
    set_up_logging(args)
    return exit_status(functools.partial(_check, args, overrides), failed=2)


def _check(args: argparse.Namespace, overrides: list[str]) -> int:
    job = load_job(args.config, overrides)
    name, first = next(iter(job.variants.items()))
    # Only a committed artifact of the plan is looked at; nothing of it is made.
    made_plan = pipeline.plan(config.Job({name: first}), "clusters", checked=False)
    return check(made_plan.job.first, made_plan.of(name), args)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = job_parser(__doc__ or "")
    made.add_argument("--rows", type=_count, default=64, help="rows to score (64)")
    made.add_argument(
        "--checkpoints",
        type=_count,
        help="look at so many checkpoints of each proxy, step 0 and the last among them (all)",
    )
    made.add_argument("--seed", type=int, default=0, help="of the draw of rows (0)")
    made.add_argument(
        "--tolerance",
        type=float,
        help="largest shift of a loss, in nats, that the job's own setting may cause "
        f"({', '.join(f'{value:g} for {dtype}' for dtype, value in TOLERANCES.items())})",
    )
    return made


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def check(first: config.Config, nodes: dict[str, pipeline.Node], args: argparse.Namespace) -> int:
    """Score rows of the job in every setting and print the shifts; returns the exit status."""
    import torch
    import transformers

    from s2l_ray.core.fidelity import losses, shifts
    from s2l_ray.core.model.architecture import load_config
    from s2l_ray.core.model.scoring import device_of

    transformers.logging.set_verbosity_error()
    console = Console(wide=True)
    rows = _read_rows(console, first, nodes["examples"], args)
    proxies, proxy = first.proxy.each(), nodes["proxy"].artifact
    checkpoints, complete = losses.checkpoints_of(proxies, proxy, rows, args.checkpoints)
    columns = [checkpoint.column for checkpoint in checkpoints]

    attention = {losses.default_attention(load_config(section.model)) for section in proxies}
    tokens = first.trajectories.tokens_per_batch
    settings = losses.settings(checkpoints, tokens, attention != {"eager"})
    device = device_of(first.scaling.trajectories)
    torch.set_num_threads(max(first.scaling.trajectories.threads, len(os.sched_getaffinity(0))))
    with track("check", (1 + len(settings)) * len(checkpoints), "passes") as tracker:
        reference, found = losses.measure(checkpoints, settings, device, tracker.advance)

    clusters = nodes["clusters"].artifact.committed() if "clusters" in nodes and complete else None
    if clusters is not None:
        grouping = shifts.committed_grouping(clusters, columns, first.clusters)
    else:
        grouping = shifts.fresh_grouping(reference, rows.ids, columns, first.clusters, complete)
    before = grouping.labels(reference, rows.sources)
    moved = {
        setting: shifts.shift(reference, values, before, grouping.labels(values, rows.sources))
        for setting, values in found.items()
    }
    own = losses.job_setting(settings, first.trajectories.dtype)
    labels, ids = [checkpoint.label for checkpoint in checkpoints], rows.ids.tolist()
    console.print(_table(moved, own, labels, ids, nodes["examples"], device))
    say(_origin(len(ids), checkpoints, nodes["proxy"], grouping))
    index = nodes["examples"].artifact.store.uri_of("index")
    say(f"made: the index of the raw files alone, {index}")
    return _verdict(moved[own].absolute, own, args.tolerance)


def _read_rows(
    console: Console, first: config.Config, examples: pipeline.Node, args: argparse.Namespace
) -> "EncodedRows":
    """Rows of the job that every member of its ensemble can score; prints what is left out, and
    one row as each member reads it.

    Raises:
        UserError: none of the rows that were drawn can be scored.
    """
    from s2l_ray.core.fidelity.rows import draw, encode
    from s2l_ray.core.model.architecture import check_architecture
    from s2l_ray.core.model.loading import load_encoder

    for proxy in first.proxy.each():
        if proxy.trained:
            check_architecture(proxy.model)
    drawn = draw(examples.ranges, first.examples, args.rows, args.seed)
    rows = encode(drawn.table, [load_encoder(proxy) for proxy in first.proxy.each()])
    console.print(_left_out(drawn.rejects, rows.reasons))
    if not rows.sources:
        raise UserError(
            f"checking losses: none of {len(rows.reasons)} rows has a token that is learned. "
            "Raise proxy.max_length, or look at how rows are read (examples.columns, "
            "proxy.prompt)."
        )
    samples = zip(rows.encoders, rows.examples, strict=True)
    console.print(Group(*(_sample(encoder, each[0]) for encoder, each in samples)))
    return rows


# --------------------------------------------------------------------------------- what is printed


def _left_out(rejects: dict[str, int], reasons: list[str | None]) -> Table | str:
    """What of the rows is not scored, and why."""
    unlearned = Counter(reason for reason in reasons if reason is not None)
    if not rejects and not unlearned:
        return f"{len(reasons)} rows drawn; none is left out."
    table = Table(title=f"left out: {sum(unlearned.values())} of {len(reasons)} rows drawn")
    table.add_column("rows", justify="right")
    table.add_column("why")
    for reason, count in rejects.items():
        table.add_row(f"{count:,}", f"{reason} (rejected, in the parts that were read)")
    for reason, count in unlearned.items():
        table.add_row(f"{count:,}", reason)
    return table


def _sample(encoder: "Encoder", example: "Encoded") -> Panel:
    """A row as the model sees it; the learned part is bold, green and between marks."""
    text = Text()
    borders = [0, *(np.flatnonzero(np.diff(example.learned)) + 1).tolist(), len(example.input_ids)]
    for first, stop in zip(borders, borders[1:], strict=False):
        piece = printable(encoder.tokenizer.decode(example.input_ids[first:stop].tolist()))
        if len(piece) > SHOWN:
            half = SHOWN // 2
            piece = f"{piece[:half]}[... {len(piece) - SHOWN:,} characters ...]{piece[-half:]}"
        if example.learned[first]:
            text.append(f"⟦{piece}⟧", style="bold green")
        else:
            text.append(piece, style="dim")
    count = int(example.learned.sum())
    return Panel(
        text,
        title=f"example_id {example.example_id}: ⟦learned⟧ are {count:,} of "
        f"{len(example.input_ids):,} tokens",
    )


def _table(
    shifts: "dict[Setting, Shift]",
    own: "Setting",
    labels: list[str],
    ids: list[int],
    examples: pipeline.Node,
    device: Any,
) -> Table:
    table = Table(
        title=f"largest shift of any loss against each row alone, unpadded, in fp32 (on {device})"
    )
    for name in (
        "dtype",
        "tokens a batch",
        "attention",
        "nats",
        "relative",
        "example_id",
        "where",
        "under",
        "moved",
    ):
        right = name in ("tokens a batch", "nats", "relative", "example_id", "moved")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "where")
    for setting, moved in shifts.items():
        mark = "the job's: " if setting == own else ""
        table.add_row(
            f"{mark}{setting.dtype}",
            "one row" if setting.tokens == 1 else f"{setting.tokens:,}",
            setting.attention or "default",
            f"{moved.absolute:.2g}",
            f"{moved.relative:.2%}",
            str(ids[moved.row]),
            _place(ids[moved.row], examples),
            labels[moved.column].removeprefix("the proxy at "),
            str(moved.moved),
            style="bold" if setting == own else "",
        )
    return table


def _place(example_id: int, examples: pipeline.Node) -> str:
    """File and row of an example."""
    from s2l_ray.core.data.parts import ID_BITS

    number, row = example_id >> ID_BITS, example_id & ((1 << ID_BITS) - 1)
    name = next(part.file.name for part in examples.ranges if part.file_number == number)
    return f"{name}, row {row + 1:,}"


def _origin(
    count: int, checkpoints: "list[Checkpoint]", node: pipeline.Node, grouping: "Grouping"
) -> str:
    trained = node.artifact.committed() is not None
    models = (
        f"{len(checkpoints)} checkpoints of {node.artifact.uri}"
        if trained
        else "the model at its start (the proxy is not trained yet)"
    )
    return f"{count} rows under {models}; `moved` rows change between {grouping.origin}."


def _verdict(largest: float, own: "Setting", given: float | None) -> int:
    tolerance = TOLERANCES[own.dtype] if given is None else given
    what = (
        f"the job's setting ({own.dtype}, {own.tokens:,} tokens a batch) shifts losses by up to "
        f"{largest:.2g} nats"
    )
    if largest <= tolerance:
        say(f"faithful: {what}, within the tolerance of {tolerance:g}.")
        return 0
    remedy = (
        "Set trajectories.dtype: fp32, or accept it with --tolerance if no row changes cluster."
        if own.dtype == "bf16"
        else "In fp32 losses must not depend on how rows are batched: do not trust this model "
        "family's losses, and report it."
    )
    say(f"NOT faithful: {what}, more than the tolerance of {tolerance:g}. {remedy}")
    return 1


if __name__ == "__main__":
    leave(main())
