"""`subset` from examples, trajectories and clusters: the chosen original rows, in id order.

First the rows are chosen, exactly the budget: by their keys (search.py) or by facility location
(facility.py). The subset is then a filter over parts (files.py).
"""

from collections import Counter

from s2l_ray.config import FACILITY_LOCATION
from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.data import exports
from s2l_ray.core.selection.quotas import budget_rows
from s2l_ray.core.storage.info import ClustersInfo, SubsetInfo, TrajectoriesInfo
from s2l_ray.core.storage.manifest import Part
from s2l_ray.errors import UserError
from s2l_ray.stages.subset import facility, files, search
from s2l_ray.stages.subset.rows import Choice, RowReader, row_reader


def make(work: Work) -> Outcome:
    """Choose and write the rows.

    Raises:
        UserError: the budget is larger than the number of rows that can be chosen, or a score is
            NaN.
    """
    reader = row_reader(work)
    scored = work.info("trajectories", TrajectoriesInfo).scored
    budget = budget_rows(work.config.subset.budget, scored)
    choice = choose(work, reader, budget)
    parts = files.write(work, reader, choice)
    stanzas = exports.stanzas(
        [
            exports.ChatFile(
                part.files["chat"].name,
                *(part.stats[name] for name in ("tools", "tool_calls", "masked")),
            )
            for part in parts
        ]
    )
    return Outcome(
        parts,
        files=[work.artifact.write_named(name, data) for name, data in stanzas.items()],
        info=_info(work, reader, choice, parts),
    )


def choose(work: Work, reader: RowReader, budget: int) -> Choice:
    """Find the rows that the rule chooses.

    Raises:
        UserError: a score is NaN, or an example id occurs twice.
    """
    if work.config.subset.rule == FACILITY_LOCATION:
        choice = facility.find(work, budget)
    else:
        choice = search.find(work, reader, budget)
    found = sum(choice.rows_of_part)
    if found != budget:
        raise UserError(
            f"choosing the subset: expected {budget} rows, got {found}: example ids repeat in "
            f"{work.inputs['examples'].uri}. Remove that folder and run again."
        )
    return choice


def _info(work: Work, reader: RowReader, choice: Choice, parts: list[Part]) -> SubsetInfo:
    before = Counter(work.info("trajectories", TrajectoriesInfo).sources)
    sources, clusters = Counter[str](), Counter[str]()
    for part in parts:
        sources.update(part.stats["sources"])
        clusters.update(part.stats["clusters"])
    of_clusters = None
    if "clusters" in work.manifests:
        numbers = range(work.info("clusters", ClustersInfo).k)
        of_clusters = [clusters[str(number)] for number in numbers]
    rule, name = reader.rule, work.config.subset.rule
    words = f"{rule.group}: {rule.score} ({rule.take} first)"
    return SubsetInfo(
        rule=name if isinstance(name, str) else words,
        group=rule.group,
        score=rule.score,
        take=rule.take,
        budget=int(choice.quotas.sum()),
        eligible=int(choice.sizes.sum()),
        groups=list(reader.groups.names),
        sizes=choice.sizes.tolist(),
        quotas=choice.quotas.tolist(),
        sources={source: [before[source], sources[source]] for source in sorted(before)},
        clusters=of_clusters,
    )
