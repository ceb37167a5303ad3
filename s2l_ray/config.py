"""The whole configuration of a job: one YAML file with a section per artifact, dotted overrides, and variants.

Everything that can be known to be wrong from the config alone is refused here, in one message that lists every problem.
`scaling` says where and how fast; it is recorded, never hashed. All other sections enter the names of the artifacts.
"""

import difflib
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from s2l_ray.core import expressions
from s2l_ray.errors import UserError

MAX_ROWS_PER_PART = 65_536


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's numbers (1e-3 is one), and no key twice, which would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class Section(BaseModel):
    """Unknown keys are errors, and so are values of another type (`true` is no number); nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Run(Section):
    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run record under <storage>/runs",
    )
    storage: str = Field(
        "s2l_ray_storage",
        description="folder or URI (s3://, gs://, hdfs://) for all artifacts; with several nodes all must see it",
    )


class Columns(Section):
    """Which columns of the raw rows are what. Left out: found by their names."""

    instruction: str | None = Field(None, description="column with the text that is masked")
    input: str | None = Field(None, description="column with further masked text, may be empty in a row")
    output: str | None = Field(None, description="column with the text that is learned")
    messages: str | None = Field(
        None, description="column with whole conversations: a list of turns, OpenAI messages or ShareGPT"
    )
    system: str | None = Field(None, description="column with the system turn, may be empty in a row")
    tools: str | None = Field(
        None, description="column with the tools' JSON schemas, a list or its JSON text"
    )
    role: str | None = Field(None, description="key of a turn's role, where it is neither role nor from")
    content: str | None = Field(
        None, description="key of a turn's text, where it is neither content nor value"
    )
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(
        default_factory=dict, description="what further names of roles mean, as {bot: assistant}"
    )
    source: str | None = Field(
        None, description="column that says where a row is from; without one, the file's name is the source"
    )

    @model_validator(mode="after")
    def _one_schema(self) -> "Columns":
        beside = [name for name in ("instruction", "input", "output") if getattr(self, name) is not None]
        if self.messages is not None and beside:
            raise ValueError(f"expected either messages or instruction and output; got messages and {beside}")
        return self


class Examples(Section):
    files: list[str] = Field(
        default_factory=list,
        description="raw files, folders or globs (JSONL, JSON, CSV, Parquet, Arrow; .gz and .zst); paths or URIs",
    )
    root: str | None = Field(
        None, description="folder that file names are relative to; default: the deepest common folder"
    )
    dataset: str | None = Field(
        None,
        description="in place of files: a data set on the Hugging Face Hub, as org/name or org/name@revision, or a folder "
        "that save_to_disk wrote",
    )
    dataset_config: str | None = Field(
        None, description="configuration of that data set, where it has several"
    )
    split: str = Field("train", description="split of that data set")
    columns: Columns = Field(
        default_factory=Columns, description="columns by meaning, when their names do not tell"
    )
    on_bad_row: Literal["stop", "reject"] = Field(
        "stop", description="stop the run at a bad row, or list and count it"
    )
    rows_per_part: int = Field(
        16_384, ge=1, le=MAX_ROWS_PER_PART, description="rows of a part, the unit of work and of resume"
    )
    extends: str | None = Field(
        None,
        description="URI of a committed examples artifact, whose files keep their numbers; new files come after",
    )
    on_changed_file: Literal["stop", "drop"] = Field(
        "stop",
        description="with extends: stop at a file that is gone or has other content, or leave its old rows out",
    )
    expected_rows: int | None = Field(
        None, ge=1, description="rows, for --dry-run where the files are not at hand"
    )
    expected_tokens_per_row: float | None = Field(
        None, gt=0, description="mean tokens of a row, for the plan's FLOPs"
    )

    @field_validator("files", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _files_or_dataset(self) -> "Examples":
        if self.files and self.dataset is not None:
            raise ValueError("expected either files or dataset; got both")
        if self.dataset is None and self.dataset_config is not None:
            raise ValueError("dataset_config is only used with dataset")
        return self


class Model(Section):
    """Exactly one of path, hub and config."""

    path: str | None = Field(
        None, description="folder or URI of a Hugging Face model folder (config.json, safetensors)"
    )
    hub: str | None = Field(
        None, description="name on the Hugging Face Hub, as org/name or org/name@revision"
    )
    config: dict[str, Any] | None = Field(
        None, description="a transformers config (model_type and its fields): built with random weights"
    )
    parameters: int | None = Field(
        None, ge=1, description="number of parameters, for --dry-run where the model is not at hand"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> "Model":
        given = [name for name in ("path", "hub", "config") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of path, hub, config; got {given or 'none'}")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs a model_type, such as gpt_neox or llama")
        return self


class Training(Section):
    """Fields that the proxy and the target share: there is one training loop."""

    model: Model = Field(description="the model to fine-tune")
    tokenizer: str | None = Field(
        None,
        description="tokenizer folder or Hub name, or `bytes` for the built-in byte-level one; default: the model's own",
    )
    prompt: Literal["alpaca", "plain", "chat"] = Field(
        "alpaca",
        description="how a row becomes text: the paper's prompt, just its columns, or the tokenizer's chat template",
    )
    template: str | None = Field(
        None,
        description="file with a Jinja chat template, in place of the tokenizer's own; with prompt: chat",
    )
    learn: Literal["all", "last", "everything"] = Field(
        "all", description="what is learned: every assistant turn, the last one alone, or every token"
    )
    max_length: int = Field(512, ge=2, description="tokens of an example; longer ones are cut")
    truncation: Literal["right", "left"] = Field("right", description="the side on which longer ones are cut")
    epochs: int | None = Field(
        None, ge=1, description="passes over the data; exactly one of epochs and steps"
    )
    steps: int | None = Field(None, ge=1, description="optimiser steps; exactly one of epochs and steps")
    global_batch: int = Field(128, ge=1, description="examples of one optimiser step, over all workers")
    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning rate after the warm-up"
    )
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="share of the steps over which the learning rate rises"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (AdamW)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    gradient_clipping: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 clips nothing")
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="precision of weights in the forward pass; master weights are fp32"
    )
    zero_stage: Literal[1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage: what is sharded over the workers"
    )
    shuffle_window: int = Field(
        8, ge=1, description="parts whose rows are shuffled together; more needs more memory per reader"
    )
    state_every: int = Field(500, ge=1, description="optimiser steps between saves of the training state")
    seed: int = Field(0, ge=0, description="seed of initial weights and of the order of the data")

    @property
    def trained(self) -> bool:
        """Whether the job trains this model itself."""
        return True

    @model_validator(mode="after")
    def _template_is_used(self) -> "Training":
        if self.template is not None and self.prompt != "chat":
            raise ValueError(f"template is only used with prompt: chat; got prompt: {self.prompt}")
        return self

    @model_validator(mode="after")
    def _exactly_one_length(self) -> "Training":
        if self.trained and (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"expected exactly one of epochs and steps; got epochs={self.epochs}, steps={self.steps}"
            )
        if self.tokenizer is None and self.model.config is not None:
            raise ValueError(
                "model.config has no tokenizer of its own: set tokenizer, for example to `bytes`"
            )
        return self


class Proxy(Training):
    use: str | None = Field(
        None, description="URI of a committed proxy artifact, taken instead of training one"
    )
    checkpoints: int = Field(
        12, ge=1, description="T: points of training, evenly spaced, at which every example's loss is taken"
    )
    members: list[dict[str, Any]] = Field(
        default_factory=list,
        description="an ensemble: one proxy an entry, each with its own values of fields of this section",
    )

    @property
    def trained(self) -> bool:
        return self.use is None

    def each(self) -> list["Proxy"]:
        """The proxies to train, fully resolved; one when `members` is empty."""
        base = self.model_dump(exclude={"members"}, exclude_unset=True)
        return [Proxy(**merge(base, member)) for member in self.members or [{}]]

    @model_validator(mode="after")
    def _members_are_proxies(self) -> "Proxy":
        for number, member in enumerate(self.members):
            if "members" in member:
                raise ValueError(f"members[{number}] must not have members of its own")
        if self.members:
            self.each()
        return self


Statistic = Literal["mean_probability", "min_probability", "el2n", "grand", "answer_loss"]


class Trajectories(Section):
    statistics: list[Statistic] = Field(
        default_factory=list,
        description="what else is stored of every example at every step: mean and lowest probability of the learned tokens, "
        "EL2N, GraNd of the output layer, the answer's loss without its prompt (a second forward pass)",
    )
    tokens_per_batch: int = Field(
        16_384, ge=1, description="most padded tokens of one forward pass; small parts take fewer"
    )
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="precision of the forward pass; the cross-entropy is always fp32"
    )
    sample: float = Field(
        1.0, gt=0, le=1, description="share of the rows to score, drawn by a keyed hash of their ids"
    )
    seed: int = Field(0, ge=0, description="seed of that draw")

    @field_validator("statistics")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"expected every statistic once, got {', '.join(twice)} twice or more")
        return value


class Clusters(Section):
    k: int = Field(
        100,
        ge=1,
        le=MAX_ROWS_PER_PART,
        description="number of k-means groups, of each source with within: source",
    )
    within: Literal["all", "source"] = Field(
        "all", description="cluster all rows together, or those of each source by themselves"
    )
    features: Literal["raw", "centred", "differences", "zscored", "relative"] = Field(
        "raw",
        description="what of a trajectory is clustered: its losses, these less their mean, their differences, centred and divided "
        "by their standard deviation, or divided by the first loss",
    )
    steps: int | list[int] | None = Field(
        None,
        description="which steps make the trajectory: exactly so many, evenly spaced and with the last, or these; default: all",
    )
    initial: bool = Field(False, description="let trajectories begin with the loss before training (step 0)")
    weights: list[float] | None = Field(
        None, description="weight of each of the trajectory's steps (features are multiplied by its root)"
    )
    points_per_centroid: int | None = Field(
        None, ge=1, description="find the centroids on at most k times so many rows; default: on all"
    )
    use: str | None = Field(
        None,
        description="URI of a committed clusters artifact, whose centroids are taken instead of new ones",
    )
    refine: bool = Field(
        False, description="with use: go on from these centroids; otherwise they are kept as they are"
    )
    max_rounds: int = Field(100, ge=1, description="most rounds of k-means")
    tolerance: float = Field(
        1e-4, ge=0, description="stop when no centroid moves further than this, relative to the data's spread"
    )
    seed: int = Field(0, ge=0, description="seed of the start (k-means++)")

    @model_validator(mode="after")
    def _features_can_be_made(self) -> "Clusters":
        problems = []
        named = self.steps if isinstance(self.steps, list) else []
        if self.steps == [] or len(set(named)) < len(named) or min(named, default=0) < 0:
            problems.append(f"steps: expected distinct step numbers from 0, got {_short(self.steps)}")
        fewest = 1 + (self.initial or self.features != "raw")
        if isinstance(self.steps, int) and self.steps < fewest:
            problems.append(
                f"steps: expected at least {fewest} with features: {self.features} and initial: {str(self.initial).lower()}, "
                f"got {self.steps}"
            )
        if self.weights is not None and (min(self.weights, default=0) < 0 or not any(self.weights)):
            problems.append(
                f"weights: expected numbers from 0, not all of them 0, got {_short(self.weights)}"
            )
        if self.refine and self.use is None:
            problems.append("refine: expected clusters.use, the artifact whose centroids are refined")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def num_features(self, checkpoints: list[int]) -> int:
        """Columns that are clustered, from each proxy's number of steps after step 0."""
        if isinstance(self.steps, list):
            chosen = [len({*self.steps, *([0] if self.initial else [])})] * len(checkpoints)
        else:
            chosen = [count + self.initial if self.steps is None else self.steps for count in checkpoints]
        return sum(count - (self.features == "differences") for count in chosen)


GROUPS = ("all", "source", "cluster", "(source, cluster)", "source / cluster")


def group_kind(text: str) -> str:
    """One of GROUPS, however it is spaced.

    Raises:
        ValueError: it is none of them.
    """
    for kind in GROUPS:
        if "".join(text.split()) == "".join(kind.split()):
            return kind
    raise ValueError(f"expected one of {'; '.join(GROUPS)}, got {text!r}")


class Rule(Section):
    """A selection rule: which rows share a quota, and which of them come first. Expressions over the stored columns."""

    group: str = Field(
        "all",
        description="all, source, cluster, (source, cluster), or source / cluster (shares of sources first, then of their clusters)",
    )
    score: str = Field("hash", description="what is smallest is chosen first, ties by hash: an expression")
    take: Literal["smallest", "middle"] = Field(
        "smallest", description="the smallest scores of each group, or those in the middle"
    )

    @field_validator("group")
    @classmethod
    def _known_group(cls, value: str) -> str:
        return group_kind(value)

    @field_validator("score")
    @classmethod
    def _readable_score(cls, value: str) -> str:
        return expressions.parse(value).text


# Names for rules. The baselines of the paper (section 4 there) and of later work, each as its own paper defines it.
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "s2l": Rule(group="cluster"),
        # the authors' code as published, with clusters.within: source and subset.small_last: 2
        "s2l_within_sources": Rule(group="source / cluster"),
        "random": Rule(),
        "source_balanced": Rule(group="source"),
        "longest": Rule(score="-num_tokens"),
        "least_confidence": Rule(score="at(mean_probability)"),
        "middle_perplexity": Rule(score="exp(at(loss))", take="middle"),  # Marion et al. 2023
        "high_learnability": Rule(score="-(first(loss) - last(loss))"),  # Zhou et al. 2023
        "el2n": Rule(score="-at(el2n)"),  # Paul et al. 2021, the largest first
        "grand": Rule(score="-at(grand)"),  # Paul et al. 2021, the largest first
        # the "ambiguous" region of data maps: Swayamdipta et al. 2020, over what training did, so without step 0
        "variability": Rule(score="-std(after(mean_probability))"),
        # instruction-following difficulty, Li et al. 2023: the largest ratio of perplexities below 1 first. At 1 and
        # above the instruction does not help: these rows come last.
        "ifd": Rule(
            score="where(at(loss) < at(answer_loss), -1, 1) * exp(at(loss) - at(answer_loss))",
        ),
        "medoid": Rule(group="cluster", score="distance"),
        "stable_in_cluster": Rule(group="cluster", score="sum(abs(diff(after(loss))))"),  # XMAS, 2025
        # Varshney et al. 2022 order rows by a model's confidence. Our reading: confidence is the mean probability over
        # training, as in data maps; the budget goes to the most confident, and the column `score` keeps their order.
        "confidence_curriculum": Rule(score="-mean(after(mean_probability))"),
    }
)
FACILITY_LOCATION = (
    "facility_location"  # the one rule that is no expression: what it takes depends on what it took
)


class Subset(Section):
    budget: int | float = Field(
        0.11,
        description="rows to choose: a count (an integer) or a share of the scored rows (a decimal number up to 1.0)",
    )
    rule: Annotated[
        Annotated[str, Tag("(name)")] | Annotated[Rule, Tag("(own)")],
        Discriminator(lambda value: "(name)" if isinstance(value, str) else "(own)"),
    ] = Field(
        "s2l",
        description=f"how rows are chosen: {', '.join([*RULES, FACILITY_LOCATION])}, or your own {{group, score, take}}",
    )
    at: Literal["early", "late"] | int = Field(
        "late",
        description="the step that at() in a rule means: the first or last one stored after step 0, or a step's number",
    )
    small_last: int = Field(
        0, ge=0, description="groups of at most so many rows are only used when all others are exhausted"
    )
    seed: int = Field(0, ge=0, description="seed of the draw inside groups")
    rows_per_file: int = Field(16_384, ge=1, le=MAX_ROWS_PER_PART, description="rows of one output file")

    @field_validator("budget", mode="before")
    @classmethod
    def _count_or_share(cls, value: Any) -> Any:
        count = type(value) is int and value >= 1
        share = type(value) is float and 0 < value <= 1
        if not count and not share:
            raise ValueError(
                f"expected a count (an integer from 1) or a share (a decimal number above 0, up to 1.0), got {value!r}"
            )
        return value

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, value: str | Rule) -> str | Rule:
        if isinstance(value, str) and value not in (*RULES, FACILITY_LOCATION):
            raise ValueError(expressions.unknown("rule", value, [*RULES, FACILITY_LOCATION]))
        return value


class Evaluation(Section):
    files: list[str] = Field(default_factory=list, description="held-out raw files, folders or globs")
    root: str | None = Field(None, description="folder that file names are relative to")
    columns: Columns = Field(
        default_factory=Columns, description="columns by meaning, when their names do not tell"
    )
    rows_per_part: int = Field(1_024, ge=1, le=MAX_ROWS_PER_PART, description="rows of a part")
    tokens_per_batch: int = Field(8_192, ge=1, description="padded tokens of one forward pass")
    max_new_tokens: int = Field(
        64, ge=0, description="longest answer that is decoded greedily, in tokens; 0 decodes none"
    )

    @field_validator("files", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Report(Section):
    sample_rows: int = Field(3, ge=0, le=20, description="rows shown of each cluster")


class Scaling(Section):
    proxy_workers: int = Field(1, ge=1, description="data-parallel workers per proxy")
    proxy_micro_batch: int = Field(
        16, ge=1, description="examples per worker and forward pass; the accumulation follows"
    )
    target_workers: int = Field(1, ge=1, description="data-parallel workers of the target")
    target_micro_batch: int = Field(4, ge=1, description="examples per worker and forward pass")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of one training worker, scorer or evaluator")
    cpus_per_worker: float | None = Field(
        None,
        gt=0,
        description="CPUs of one training worker, scorer or evaluator; default: one, or what leaves room for reading",
    )
    threads: int = Field(1, ge=1, description="CPU threads of torch in a worker")
    side_by_side: int = Field(
        1,
        ge=1,
        description="artifacts made at the same time where none needs another, such as the targets of several variants; trainings "
        "share the CPUs and GPUs equally",
    )
    readers: int = Field(2, ge=1, description="tasks that read and tokenise for one training worker")
    scorers: int = Field(
        2, ge=1, description="actors that score, and that evaluate; fewer start when the cluster is smaller"
    )
    shards: int = Field(2, ge=1, description="k-means shard actors")
    shard_memory: int | None = Field(
        None,
        ge=1,
        description="bytes that one shard actor may use for rows; where its parts need more, it reads them again every round. "
        "Default: it holds all",
    )
    max_failures: int = Field(
        3, ge=0, description="worker or node losses that a training survives before the run stops"
    )
    local_cpus: int | None = Field(
        None, ge=1, description="CPUs of a Ray started on this machine; default: all"
    )
    local_object_store: int = Field(
        500_000_000, ge=80_000_000, description="bytes of shared memory of a Ray started on this machine"
    )


class Config(Section):
    """One fully resolved variant of a job."""

    run: Run = Field(default_factory=Run)
    examples: Examples = Field(default_factory=Examples)
    proxy: Proxy
    trajectories: Trajectories = Field(default_factory=Trajectories)
    clusters: Clusters = Field(default_factory=Clusters)
    subset: Subset = Field(default_factory=Subset)
    target: Training | None = Field(None, description="without this section the job ends at the subset")
    evaluation: Evaluation | None = Field(None, description="without this section nothing is evaluated")
    report: Report = Field(default_factory=Report)
    scaling: Scaling = Field(default_factory=Scaling)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        problems = []
        for member in self.proxy.each():
            problems += _batch_problem(
                "proxy", member, self.scaling.proxy_workers, self.scaling.proxy_micro_batch
            )
            if member.steps is not None and member.checkpoints > member.steps:
                problems.append(
                    f"proxy.checkpoints: expected at most proxy.steps = {member.steps}, got {member.checkpoints}"
                )
        if self.target is not None:
            problems += _batch_problem(
                "target", self.target, self.scaling.target_workers, self.scaling.target_micro_batch
            )
        if self.evaluation is not None and self.target is None:
            problems.append("evaluation: there is no target section, so there is nothing to evaluate")
        if self.evaluation is not None and not self.evaluation.files:
            problems.append("evaluation.files: expected at least one held-out file, folder or glob")
        problems += _feature_problems(self.clusters, self.proxy)
        if not (self.examples.files or self.examples.dataset or self.examples.expected_rows):
            problems.append(
                "examples.files: expected at least one file, folder or glob (or examples.dataset)"
            )
        problems += _rule_problem(self.subset, self.trajectories)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _rule_problem(subset: Subset, trajectories: Trajectories) -> list[str]:
    if subset.rule == FACILITY_LOCATION:
        return []
    rule = RULES[subset.rule] if isinstance(subset.rule, str) else subset.rule
    names = expressions.parse(rule.score).names & set(expressions.STATISTICS)
    missing = sorted(names - set(trajectories.statistics))
    if not missing:
        return []
    return [
        f"subset.rule: {subset.rule if isinstance(subset.rule, str) else rule.score!r} reads {', '.join(missing)}, which is not "
        f"stored. Set trajectories.statistics to [{', '.join([*trajectories.statistics, *missing])}]"
    ]


def _batch_problem(section: str, training: Training, workers: int, micro_batch: int) -> list[str]:
    if not training.trained or training.global_batch % (workers * micro_batch) == 0:
        return []
    return [
        f"{section}.global_batch: expected a multiple of scaling.{section}_workers x scaling.{section}_micro_batch = "
        f"{workers} x {micro_batch}, got {training.global_batch}"
    ]


def _feature_problems(clusters: Clusters, proxy: Proxy) -> list[str]:
    """What the proxies' checkpoints do not allow; a proxy that is used instead of trained has its own."""
    checkpoints = [member.checkpoints for member in proxy.each()]
    after_start = clusters.steps - clusters.initial if isinstance(clusters.steps, int) else 0
    if proxy.use is not None:
        return []
    if after_start > min(checkpoints):
        return [
            f"clusters.steps: expected at most {min(checkpoints) + clusters.initial}, the steps of every proxy (proxy.checkpoints), "
            f"got {clusters.steps}"
        ]
    columns = clusters.num_features(checkpoints)
    if clusters.weights is not None and len(clusters.weights) != columns:
        return [
            f"clusters.weights: expected {columns} numbers, one for every step that is clustered, got {len(clusters.weights)}"
        ]
    return []


class Job:
    """A config with variants: variant name -> fully resolved Config. All variants share `run` and `scaling`."""

    def __init__(self, variants: dict[str, Config]) -> None:
        self.variants = variants

    @property
    def first(self) -> Config:
        return next(iter(self.variants.values()))


def load(path: str | None, overrides: list[str], base: dict[str, Any] | None = None) -> Job:
    """Read a job file (or take `base`), apply overrides, resolve and check every variant.

    Args:
        path: YAML file, or None to use `base`.
        overrides: `section.field=value`, values in YAML, changes the job below its variants, so what a variant sets itself stays;
            `variants.NAME.section.field=value` changes one variant.

    Raises:
        UserError: listing every unknown key, wrong type and impossible combination.
    """
    where = path or "the built-in demo"
    raw = merge({}, base or {}) if path is None else _read_yaml(path)
    variants = raw.pop("variants", None) or {"s2l": {}}
    if not isinstance(variants, dict) or not all(isinstance(v, dict | None) for v in variants.values()):
        raise UserError(
            f"reading {where}: expected variants to map each name to overrides (section.field: value), got {_short(variants)}."
        )
    variants = {str(name): changes for name, changes in variants.items()}
    common, by_variant = _parse_overrides(overrides, variants)
    resolved: dict[str, Config] = {}
    problems: list[str] = []
    for name, changes in variants.items():
        tree = raw
        try:
            for dotted, value in [*common, *(changes or {}).items(), *by_variant.get(name, [])]:
                tree = merge(tree, _nest(str(dotted), value))
            resolved[name] = Config.model_validate(tree)
        except ValidationError as error:
            problems += [line for line in _explain(error) if line not in problems]
    if problems:
        raise UserError(
            f"reading {where}: {len(problems)} problem(s) in the configuration.\n  - "
            + "\n  - ".join(problems)
        )
    shared = {config.run.model_dump_json() + config.scaling.model_dump_json() for config in resolved.values()}
    if len(shared) > 1:
        raise UserError(
            f"reading {where}: variants must not change run or scaling; set these for the whole job."
        )
    return Job(resolved)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _Yaml)  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"reading the job file {path}: {error}. Expected a YAML file that can be read."
        ) from None
    if not isinstance(raw, dict):
        raise UserError(
            f"reading the job file {path}: expected sections (a mapping), got {type(raw).__name__}."
        )
    return raw


def _parse_overrides(
    overrides: list[str], variants: dict[str, Any]
) -> tuple[list[tuple[str, Any]], dict[str, list[tuple[str, Any]]]]:
    common: list[tuple[str, Any]] = []
    by_variant: dict[str, list[tuple[str, Any]]] = {}
    for text in overrides:
        key, equals, value = text.removeprefix("--").partition("=")
        if not equals or "." not in key:
            raise UserError(
                f"reading the command line: expected --section.field=value, got {text!r}. See --help."
            )
        try:
            parsed = yaml.load(value, _Yaml)
        except yaml.YAMLError:
            raise UserError(
                f"reading the command line: the value of {text!r} is not YAML. Put it in quotes."
            ) from None
        if key.startswith("variants."):
            _, name, *rest = key.split(".", 2)
            if name not in variants or not rest:
                raise UserError(
                    f"reading the command line: expected variants.NAME.section.field with NAME one of {sorted(variants)}, got {key!r}."
                )
            by_variant.setdefault(name, []).append((rest[0], parsed))
        else:
            common.append((key, parsed))
    return common, by_variant


def _nest(dotted: str, value: Any) -> dict[str, Any]:
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A new tree: mappings are merged, anything else is replaced. Another kind of model replaces the whole model."""
    if {"path", "hub", "config"} & old.keys() and {"path", "hub", "config"} & new.keys() - old.keys():
        old = {}
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        loc = [piece for piece in item["loc"] if not str(piece).startswith("(")]  # without the tags of unions
        dotted = ".".join(str(piece) for piece in loc)
        if item["type"] == "extra_forbidden":
            known = _fields_at(loc[:-1])
            close = difflib.get_close_matches(str(loc[-1]), known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            lines.append(f"{dotted}: unknown key.{hint} Known here: {', '.join(sorted(known))}")
        elif item["type"] == "missing":
            lines.append(f"{dotted}: expected a value, got none")
        elif item["type"] == "value_error":
            text = str(item["ctx"]["error"])
            lines += [f"{dotted}: {text}"] if dotted else text.split("; ")
        else:
            lines.append(f"{dotted}: {item['msg'][0].lower()}{item['msg'][1:]}, got {_short(item['input'])}")
    return lines


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(loc: list[int | str]) -> list[str]:
    section: type[BaseModel] | None = Config
    for piece in loc:
        info = section.model_fields.get(str(piece)) if section else None
        section = _section_of(info) if info else None
    return [*(section.model_fields if section else []), *(["variants"] if not loc else [])]


def _section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, be it one of several kinds of value."""
    open_: list[Any] = [info.annotation]
    while open_:
        kind = open_.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        open_ += getattr(kind, "__args__", ())  # of a union, or what Annotated is about
    return None


def describe() -> str:
    """Every field with its default and meaning, for --help."""
    lines: list[str] = []
    _describe(Config, "", lines)
    return "\n".join(lines)


def _describe(section: type[BaseModel], prefix: str, lines: list[str]) -> None:
    for name, info in section.model_fields.items():
        inner = _section_of(info)
        if inner is None or isinstance(info.default, str):  # a rule is a name or a section
            default = info.get_default(call_default_factory=True) if not info.is_required() else "required"
            lines.append(f"  {prefix}{name} = {_short(default)}\n      {info.description}")
        elif info.description:
            lines.append(f"  {prefix}{name}: {info.description}")
        if inner is not None:
            _describe(inner, f"{prefix}{name}.", lines)


def budget_rows(budget: int | float, eligible: int) -> int:
    """The exact number of rows to choose out of `eligible`: a count as it is, a share rounded down but at least 1.

    Raises:
        UserError: a count larger than what there is.
    """
    # As written: 0.29 of 100 is 29, though the nearest binary fraction is a little less.
    rows = budget if isinstance(budget, int) else max(1, math.floor(Fraction(str(budget)) * eligible))
    if rows > eligible:
        raise UserError(
            f"choosing the subset: subset.budget asks for {rows} rows, but only {eligible} can be chosen (scored rows). "
            "Lower the budget, or add data."
        )
    return rows
