"""What a stage declares of itself, as a value.

Planning, placing and running compare these values and know no stage by its name. Everything here is
pure: planning a job imports neither Ray nor torch. A new stage is a folder with a `stage.py` that
holds such a value, a `make.py` that does the work, and one line in `stages/__init__.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from s2l_ray.config import Config, ModelWorkers, Training
from s2l_ray.core.data.catalog import RawFiles
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.storage.artifact import Artifact

# Of English text, for tokenizers that are not byte-level.
BYTES_PER_TOKEN = 4.0


@dataclass(frozen=True)
class Facts:
    """What is known of a variant before any work.

    Attributes:
        rows: rows of the raw files; 0 when they are not at hand.
        scored: of these, the rows that get a trajectory.
        tokens_per_row: mean tokens of a row, before it is cut to max_length.
        chosen: rows of the subset.
    """

    rows: int
    scored: int
    tokens_per_row: float
    chosen: int

    @classmethod
    def of(cls, config: Config, raw: RawFiles) -> "Facts":
        """From the files that `examples` names, or else from what the config expects of them."""
        section = config.examples
        ranges = raw.ranges(section, "examples")
        rows = sum(part.rows for part in ranges) or section.expected_rows or 0
        tokens = section.expected_tokens_per_row
        if tokens is None:
            per_token = 1.0 if config.proxy.tokenizer == "bytes" else BYTES_PER_TOKEN
            tokens = raw.text_bytes(ranges) / max(1, rows) / per_token
        scored, budget = int(rows * config.trajectories.sample), config.subset.budget
        chosen = budget if isinstance(budget, int) else int(budget * scored)
        return cls(rows, scored, tokens, chosen)


@dataclass(frozen=True)
class Request:
    """What a stage needs of the cluster at once; equal requests can be met by the same workers.

    Attributes:
        kind: `workers` are placed together and talk to each other; `actors` work by themselves, and
            fewer start where not all fit; `tasks` come and go; `nothing` needs no Ray.
        count: workers or actors.
        cpus: of one of them; None: derived from what the cluster has.
        gpus: of one of them.
        all_at_once: actors that are useless until all are placed.
        labels: of Ray, which the hosts must have.
        stage: for messages only.
    """

    kind: Literal["workers", "actors", "tasks", "nothing"]
    count: int = 0
    cpus: float | None = None
    gpus: float = 0.0
    all_at_once: bool = False
    labels: tuple[tuple[str, str], ...] = ()
    stage: str = field(default="", compare=False)

    @classmethod
    def of(cls, kind: Literal["workers", "actors"], scaling: ModelWorkers, stage: str) -> "Request":
        """What processes that hold a model need."""
        labels = scaling.required_labels
        return cls(kind, scaling.workers, scaling.cpus, scaling.gpus, labels=labels, stage=stage)


@dataclass(frozen=True)
class Cost:
    """An estimate: rows, tokens, FLOPs (0: unknown), bytes of one worker. None: does not apply."""

    rows: int | None = None
    tokens: float | None = None
    flops: float | None = None
    memory: float | None = None


def _always(config: Config) -> bool:
    return True


def _not_given(config: Config, assume: bool) -> Artifact | None:
    return None


def _no_parts(config: Config, raw: RawFiles) -> list[PartRange]:
    return []


def _no_check(config: Config, facts: Facts) -> None:
    return None


def _no_models(config: Config) -> Sequence[Training]:
    return ()


def _no_texts(config: Config) -> Sequence[tuple[Training, int, str]]:
    return ()


def _nothing(config: Config) -> Request:
    return Request("nothing")


def _no_cost(config: Config, facts: Facts) -> Cost:
    return Cost()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of artifact, and everything that the rest of the code needs to know of it.

    In all functions, `assume` (for --dry-run) allows for files and models that are not at hand.

    Attributes:
        name: of the artifact, its config section, its folder in the storage and its log prefix.
        version: goes up whenever the stage makes something else from the same inputs; it is part of
            the artifact's name.
        make: module whose `make(work)` makes the artifact; imported when there is one to make.
        identity: (config, assume) -> what of the config decides the artifact's content, as JSON.
        inputs: config -> by name, what it is made from: the name of an earlier stage, or an
            artifact that the config names by its URI.
        wanted: config -> whether the job has this stage.
        given: (config, assume) -> an artifact that the config names in place of making one, if it
            does. Raises UserError when that one does not fit the config.
        parts: (config, raw) -> the parts of raw files that it reads itself.
        check: (config, facts); raises UserError for what is known to fail before any work.
        models: config -> models and tokenizers it will use; all are loaded before any work begins.
        texts: config -> models, how many tokens each is given at most, and what of the config says
            so.
        request: config -> what it needs of the cluster at once.
        cost: (config, facts) -> what it is estimated to take.
        of_job: it is made once a job, from all artifacts of all variants; `inputs` is not asked.
    """

    name: str
    version: int
    make: str
    identity: Callable[[Config, bool], dict[str, Any]]
    inputs: Callable[[Config], Mapping[str, "str | Artifact"]]
    wanted: Callable[[Config], bool] = _always
    given: Callable[[Config, bool], Artifact | None] = _not_given
    parts: Callable[[Config, RawFiles], list[PartRange]] = _no_parts
    check: Callable[[Config, Facts], None] = _no_check
    models: Callable[[Config], Sequence[Training]] = _no_models
    texts: Callable[[Config], Sequence[tuple[Training, int, str]]] = _no_texts
    request: Callable[[Config], Request] = _nothing
    cost: Callable[[Config, Facts], Cost] = _no_cost
    of_job: bool = False
