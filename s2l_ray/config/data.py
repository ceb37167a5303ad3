"""Sections about the data: `run`, `examples`, `evaluation` and `report`."""

from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from s2l_ray.config.section import MAX_ROWS_PER_PART, Section
from s2l_ray.config.training import Model


class Run(Section):
    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run record under <storage>/runs",
    )
    storage: str = Field(
        "s2l_ray_storage",
        description="folder or URI (s3://, gs://, hdfs://) for all artifacts; with several nodes "
        "all must see it",
    )


class Columns(Section):
    """Which columns of the raw rows are what. Left out: found by their names.

    Attributes:
        section: of the config whose files have them, for messages.
    """

    section: ClassVar[str] = "examples"

    instruction: str | None = Field(None, description="column with the text that is masked")
    input: str | None = Field(
        None, description="column with further masked text, may be empty in a row"
    )
    output: str | None = Field(None, description="column with the text that is learned")
    messages: str | None = Field(
        None,
        description="column with whole conversations: a list of turns, OpenAI messages or ShareGPT",
    )
    history: str | None = Field(
        None,
        description="column with the rounds before an instruction: a list of [instruction, answer]",
    )
    system: str | None = Field(
        None, description="column with the system turn, may be empty in a row"
    )
    tools: str | None = Field(
        None, description="column with the tools' JSON schemas, a list or its JSON text"
    )
    label: str | None = Field(
        None,
        description="column that says whether a row is good: rows where it is false are left out",
    )
    role: str | None = Field(
        None, description="key of a turn's role, where it is neither role nor from"
    )
    content: str | None = Field(
        None, description="key of a turn's text, where it is neither content nor value"
    )
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(
        default_factory=dict, description="what further names of roles mean, as {bot: assistant}"
    )
    source: str | None = Field(
        None,
        description="column that says where a row is from; without one, the file's name is the "
        "source",
    )

    @model_validator(mode="after")
    def _one_schema(self) -> "Columns":
        beside = [
            name
            for name in ("instruction", "input", "output", "history")
            if getattr(self, name) is not None
        ]
        if self.messages is not None and beside:
            raise ValueError(
                f"expected either messages or instruction and output; got messages and {beside}"
            )
        return self


class HeldOutColumns(Columns):
    section: ClassVar[str] = "evaluation"


class Examples(Section):
    files: list[str] = Field(
        default_factory=list,
        description="raw files, folders or globs (JSONL, JSON, CSV, Parquet, Arrow; .gz, .zst, "
        ".bz2, .xz), or the folder of a subset; paths or URIs",
    )
    root: str | None = Field(
        None,
        description="folder that file names are relative to; default: the deepest common folder",
    )
    dataset: str | None = Field(
        None,
        description="in place of files: a data set on the Hugging Face Hub, as org/name or "
        "org/name@revision, or a folder that save_to_disk wrote",
    )
    dataset_config: str | None = Field(
        None, description="configuration of that data set, where it has several"
    )
    split: str = Field("train", description="split of that data set")
    columns: Columns = Field(
        default_factory=Columns, description="columns by meaning, when their names do not tell"
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="columns of the raw files that are left out, also of the subset",
    )
    on_bad_row: Literal["stop", "reject"] = Field(
        "stop", description="stop the run at a bad row, or list and count it"
    )
    most_rejects: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of listed bad rows above which the run stops all the same",
    )
    rows_per_part: int = Field(
        16_384,
        ge=1,
        le=MAX_ROWS_PER_PART,
        description="rows of a part, the unit of work and of resume",
    )
    extends: str | None = Field(
        None,
        description="URI of a committed examples artifact, whose files keep their numbers; new "
        "files come after",
    )
    on_changed_file: Literal["stop", "drop"] = Field(
        "stop",
        description="with extends: stop at a file that is gone or has other content, or leave its "
        "old rows out",
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

    @model_validator(mode="after")
    def _not_both_read_and_ignored(self) -> "Examples":
        return _check_ignored(self, self.columns, self.ignore)


Score = Literal["exact", "published", "numeric", "math_verify", "rouge_l", "bleu", "bert_score"]
Set = Literal["gsm8k", "math", "numglue", "svamp", "mathematics", "simuleq"]


class Evaluation(Section):
    files: list[str] = Field(
        default_factory=list, description="held-out raw files, folders or globs"
    )
    root: str | None = Field(None, description="folder that file names are relative to")
    columns: HeldOutColumns = Field(
        default_factory=HeldOutColumns,
        description="columns by meaning, when their names do not tell",
    )
    ignore: list[str] = Field(
        default_factory=list, description="columns of the held-out files that are left out"
    )
    rows_per_part: int = Field(1_024, ge=1, le=MAX_ROWS_PER_PART, description="rows of a part")
    tokens_per_batch: int = Field(8_192, ge=1, description="padded tokens of one forward pass")
    max_new_tokens: int = Field(
        64, ge=0, description="longest answer that is decoded greedily, in tokens; 0 decodes none"
    )
    answers: Literal["chain", "program", "hybrid"] = Field(
        "chain",
        description="what is asked for: an answer in words, a program that prints it, or a program "
        "and words where it gives nothing, as MAmmoTH does. Programs run in a sandbox (bubblewrap)",
    )
    program_prompt: str = Field(
        " Let's write a program.",
        description="text behind a question that asks for a program; this one is MathInstruct's",
    )
    program_seconds: float = Field(5.0, gt=0, le=600, description="longest time of a program")
    scores: list[Score] = Field(
        ["exact"],
        description="how answers are scored, a column each: exact (equal text), published (the "
        "rules of MAmmoTH and CoLM for their six sets, with their bugs), numeric (our own: by "
        "value), math_verify; rouge_l, bleu (of sentences) and bert_score for summaries",
    )
    bert_model: Model | None = Field(
        None, description="model of the score bert_score, such as {hub: roberta-large}"
    )
    bert_layer: int | None = Field(
        None, ge=1, description="layer of it that is compared (of roberta-large 17); default: last"
    )
    sets: dict[str, Set] = Field(
        default_factory=dict,
        description="which of the six sets a source is, for the score published, where its name is "
        "not gsm8k, math, numglue, svamp, mathematics or simuleq",
    )

    @field_validator("files", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _programs_are_written(self) -> "Evaluation":
        if self.answers != "chain" and self.max_new_tokens == 0:
            raise ValueError(f"answers: {self.answers} needs max_new_tokens above 0")
        if ("bert_score" in self.scores) != (self.bert_model is not None):
            raise ValueError("scores: bert_score and bert_model belong together; got one of them")
        if len(set(self.scores)) < len(self.scores):
            raise ValueError(f"scores: each is named once; got {self.scores}")
        return self

    @model_validator(mode="after")
    def _not_both_read_and_ignored(self) -> "Evaluation":
        return _check_ignored(self, self.columns, self.ignore)


SomeSection = TypeVar("SomeSection", bound=Section)


def _check_ignored(section: SomeSection, columns: Columns, ignore: list[str]) -> SomeSection:
    named = columns.model_dump(exclude={"role", "content", "roles"}).values()
    both = [name for name in named if name in ignore]
    if both:
        raise ValueError(f"expected each column in columns or in ignore; {both} are in both")
    return section


class Report(Section):
    sample_rows: int = Field(3, ge=0, le=20, description="rows shown of each cluster")
