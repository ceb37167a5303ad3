"""Sections about models: `proxy`, `target` and `trajectories`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from s2l_ray.config.section import Section, Seed, merge

# What each preset stands for among DeepSpeed's own settings.
PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "zero3_offload": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
}


class Model(Section):
    """Exactly one of path, hub and config."""

    path: str | None = Field(
        None, description="folder or URI of a Hugging Face model folder (config.json, safetensors)"
    )
    hub: str | None = Field(
        None, description="name on the Hugging Face Hub, as org/name or org/name@revision"
    )
    config: dict[str, Any] | None = Field(
        None,
        description="a transformers config (model_type and its fields): built with random weights",
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


class Adapter(Section):
    """Low-rank adapters, of peft: small matrices beside frozen layers, which alone are trained."""

    kind: Literal["lora", "dora", "qlora"] = Field(
        "lora",
        description="lora; dora learns the lengths of rows too; qlora keeps frozen weights in 4 "
        "bits, which needs a GPU and bitsandbytes",
    )
    rank: int = Field(16, ge=1, description="width of the matrices")
    alpha: float = Field(32, gt=0, description="their product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what goes into them")
    modules: list[str] = Field(
        default_factory=list,
        description="names of the layers, such as q_proj; default: all linear ones but the output",
    )
    start: str | None = Field(
        None, description="folder of an adapter in peft's format to begin with; default: a new one"
    )


class Training(Section):
    """Fields that the proxy and the target share: there is one training loop."""

    model: Model = Field(description="the model to fine-tune")
    tokenizer: str | None = Field(
        None,
        description="tokenizer folder or Hub name, or `bytes` for the built-in byte-level one; "
        "default: the model's own",
    )
    prompt: Literal["alpaca", "plain", "chat"] = Field(
        "alpaca",
        description="how a row becomes text: the paper's prompt, just its columns, or the "
        "tokenizer's chat template",
    )
    template: str | None = Field(
        None,
        description="file with a Jinja chat template, in place of the tokenizer's own; with "
        "prompt: chat",
    )
    learn: Literal["all", "last", "everything"] = Field(
        "all",
        description="what is learned: every assistant turn, the last one alone, or every token",
    )
    thoughts: Literal["needed", "optional"] = Field(
        "needed",
        description="needed: a row is left out where the chat template cuts the thought of a "
        "learned answer; optional: it may",
    )
    max_length: int = Field(512, ge=2, description="tokens of an example; longer ones are cut")
    truncation: Literal["right", "left"] = Field(
        "right", description="the side on which longer ones are cut"
    )
    epochs: int | None = Field(
        None, ge=1, description="passes over the data; exactly one of epochs and steps"
    )
    steps: int | None = Field(
        None, ge=1, description="optimiser steps; exactly one of epochs and steps"
    )
    global_batch: int = Field(
        128, ge=1, description="examples of one optimiser step, over all workers"
    )
    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant_with_warmup", "constant"] = Field(
        "cosine",
        description="learning rate after the warm-up, as transformers names it; `constant` has no "
        "warm-up",
    )
    warmup_ratio: float = Field(
        0.03,
        ge=0,
        lt=1,
        description="share of the steps over which the learning rate rises; not with schedule: "
        "constant",
    )
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled weight decay (AdamW) of all but norms and biases"
    )
    dropout: bool = Field(
        False,
        description="train with the dropout that the model's config names; off, the trained "
        "model's config has it at 0. On, every example is a pass by itself, which is slower",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    gradient_clipping: float = Field(
        1.0, ge=0, description="largest norm of the gradient; 0 clips nothing"
    )
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="precision of weights in the forward pass"
    )
    adapter: Adapter | None = Field(
        None,
        description="train a low-rank adapter in place of all weights; it is merged into the "
        "trained model, and stored beside it",
    )
    state_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of master weights, summed gradients and AdamW's moments; bf16 takes "
        "8 bytes a parameter in place of 18 and learns less (tests/bench/RESULTS.md)",
    )
    deepspeed: str = Field(
        "zero1",
        description="what DeepSpeed shards over the workers: zero1 (AdamW's state), zero2 (also "
        "gradients), zero3 (also weights), zero3_offload (AdamW's state in the CPU's memory); or a "
        "file with DeepSpeed's own JSON, whose keys count over ours",
    )
    shuffle_window: int = Field(
        131_072,
        ge=1,
        description="rows that are shuffled together; more needs more memory per reader",
    )
    state_every: int = Field(
        500, ge=1, description="optimiser steps between saves of the training state"
    )
    seed: Seed = Field(0, description="seed of initial weights and of the order of the data")

    @property
    def trained(self) -> bool:
        """Whether the job trains this model itself."""
        return True

    @field_validator("deepspeed")
    @classmethod
    def _a_preset_or_a_file(cls, value: str) -> str:
        if value not in PRESETS and not value.endswith(".json"):
            raise ValueError(
                f"expected {', '.join(PRESETS)} or the path of a .json file, got {value!r}"
            )
        return value

    @property
    def draws(self) -> bool:
        """Whether a forward pass draws random numbers."""
        return self.dropout or (self.adapter is not None and self.adapter.dropout > 0)

    @model_validator(mode="after")
    def _state_is_no_coarser_than_weights(self) -> "Training":
        if self.state_dtype == "bf16" and self.dtype == "fp32":
            raise ValueError("state_dtype: bf16 needs dtype: bf16; got dtype: fp32")
        return self

    @model_validator(mode="after")
    def _template_is_used(self) -> "Training":
        if self.template is not None and self.prompt != "chat":
            raise ValueError(f"template is only used with prompt: chat; got prompt: {self.prompt}")
        return self

    @model_validator(mode="after")
    def _warm_up_takes_place(self) -> "Training":
        named = "warmup_ratio" in self.model_fields_set
        if self.schedule == "constant" and named and self.warmup_ratio:
            raise ValueError(
                f"schedule: constant has no warm-up, but warmup_ratio is {self.warmup_ratio}. Set "
                "schedule: constant_with_warmup, or leave out warmup_ratio"
            )
        return self

    @model_validator(mode="after")
    def _exactly_one_length(self) -> "Training":
        if self.trained and (self.epochs is None) == (self.steps is None):
            raise ValueError(
                "expected exactly one of epochs and steps; got "
                f"epochs={self.epochs}, steps={self.steps}"
            )
        if self.tokenizer is None and self.model.config is not None:
            raise ValueError(
                "model.config has no tokenizer of its own: set tokenizer, for example to `bytes`"
            )
        return self


class Validation(Section):
    every: int = Field(ge=1, description="optimiser steps between two looks at held-out rows")
    patience: int | None = Field(
        None, ge=1, description="looks without a lower loss after which the training stops"
    )
    rows: int = Field(512, ge=1, description="rows of evaluation.files, of all of them alike")


class Target(Training):
    validation: Validation | None = Field(
        None,
        description="take the loss of rows of evaluation.files during training: the best model is "
        "kept beside the last one, and counts",
    )


class Proxy(Training):
    use: str | None = Field(
        None, description="URI of a committed proxy artifact, taken instead of training one"
    )
    checkpoints: int = Field(
        12,
        ge=1,
        description="T: points of training, evenly spaced, at which every example's loss is taken",
    )
    members: list[dict[str, Any]] = Field(
        default_factory=list,
        description="an ensemble: one proxy an entry, each with its own values of fields of this "
        "section",
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
        description="what else is stored of every example at every step: mean and lowest "
        "probability of the learned tokens, EL2N, GraNd of the output layer, the answer's loss "
        "without its prompt (a second forward pass)",
    )
    tokens_per_batch: int = Field(
        16_384, ge=1, description="most padded tokens of one forward pass; small parts take fewer"
    )
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="precision of the forward pass; the cross-entropy is always fp32"
    )
    sample: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the rows to score, drawn by a keyed hash of their ids",
    )
    seed: Seed = Field(0, description="seed of that draw")

    @field_validator("statistics")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"expected every statistic once, got {', '.join(twice)} twice or more")
        return value
