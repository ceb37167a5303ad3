"""The section `subset`: the budget, and the rule that spends it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from s2l_ray.config import expressions
from s2l_ray.config.section import MAX_ROWS_PER_PART, Section, Seed

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
    """A selection rule: which rows share a quota, and which of them come first.

    Both are expressions over the stored columns.
    """

    group: str = Field(
        "all",
        description="all, source, cluster, (source, cluster), or source / cluster (shares of "
        "sources first, then of their clusters)",
    )
    score: str = Field(
        "hash", description="what is smallest is chosen first, ties by hash: an expression"
    )
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


# Names for rules: the baselines of the S2L paper (Yang et al. 2024, section 4) and of later work,
# each as its own paper defines it. Where the authors' code is public, its repository on GitHub,
# commit and file are named, and the rule orders rows as that file does; others were not
# compared with code.
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "s2l": Rule(group="cluster"),
        # BigML-CS-UCLA/S2L 2bc84dd, schedules/s2l.py: shares of sources, smallest first, and inside
        # them k-means. As published with clusters.within: source and subset.small_last: 2.
        "s2l_within_sources": Rule(group="source / cluster"),
        "random": Rule(),
        "source_balanced": Rule(group="source"),
        "longest": Rule(score="-num_tokens"),
        "least_confidence": Rule(score="at(mean_probability)"),
        # Marion et al. 2023.
        "middle_perplexity": Rule(score="exp(at(loss))", take="middle"),
        # Zhou et al. 2023.
        "high_learnability": Rule(score="-(first(loss) - last(loss))"),
        # Paul et al. 2021, the largest first: mansheej/data_diet aee462e, data_diet/scores.py
        # (l2_error, grad_norm) and keep_max_scores of data_diet/data.py. There a row has one label;
        # here these are of its learned tokens, and GraNd of the output layer alone.
        "el2n": Rule(score="-at(el2n)"),
        "grand": Rule(score="-at(grand)"),
        # The "ambiguous" region of data maps, Swayamdipta et al. 2020: allenai/cartography 3df3438,
        # cartography/selection/train_dy_filtering.py (np.std, descending). It is about what
        # training did, so without step 0.
        "variability": Rule(score="-std(after(mean_probability))"),
        # Instruction-following difficulty, Li et al. 2023: MingLiiii/Cherry_LLM ad15ef5,
        # cherry_seletion/data_by_IFD.py. The largest ratio of mean losses up to 1 first. Above 1
        # the instruction does not help: the code leaves these rows out, here they come last.
        "ifd": Rule(
            score="where(at(loss) <= at(answer_loss), -1, 1) * at(loss) / "
            "where(at(answer_loss) > 0, at(answer_loss), 1)",
        ),
        # Superfiltering, Li et al. 2024: tianyi-lab/Superfiltering f0764af,
        # code_ifd/put_analysis_to_data.py and select_data.py. The same with the ratio of
        # perplexities, below 1.
        "superfiltering": Rule(
            score="where(at(loss) < at(answer_loss), -1, 1) * exp(at(loss) - at(answer_loss))",
        ),
        "medoid": Rule(group="cluster", score="distance"),
        # XMAS, 2025.
        "stable_in_cluster": Rule(group="cluster", score="sum(abs(diff(after(loss))))"),
        # Varshney et al. 2022 order rows by a model's confidence. Our reading: confidence is the
        # mean probability over training, as in data maps. The budget goes to the most confident,
        # and the column `score` keeps their order.
        "confidence_curriculum": Rule(score="-mean(after(mean_probability))"),
    }
)


FACILITY_LOCATION = (
    # the one rule that is no expression: what it takes depends on what it took
    "facility_location"
)


class Subset(Section):
    budget: int | float = Field(
        0.11,
        description="rows to choose: a count (an integer) or a share of the scored rows (a decimal "
        "number up to 1.0)",
    )
    rule: Annotated[
        Annotated[str, Tag("(name)")] | Annotated[Rule, Tag("(own)")],
        Discriminator(lambda value: "(name)" if isinstance(value, str) else "(own)"),
    ] = Field(
        "s2l",
        description=f"how rows are chosen: {', '.join([*RULES, FACILITY_LOCATION])}, or your own "
        "{group, score, take}",
    )
    at: Literal["early", "late"] | int = Field(
        "late",
        description="the step that at() in a rule means: the first or last one stored after "
        "step 0, or a step's number",
    )
    small_last: int = Field(
        0,
        ge=0,
        description="groups of at most so many rows are only used when all others are exhausted",
    )
    seed: Seed = Field(0, description="seed of the draw inside groups")
    paired: bool = Field(
        False,
        description="draw alike under all rules that have this and an equal seed, so that their "
        "subsets differ only where the rules do; otherwise every rule has draws of its own",
    )
    rows_per_file: int = Field(
        16_384, ge=1, le=MAX_ROWS_PER_PART, description="rows of one output file"
    )

    @field_validator("budget", mode="before")
    @classmethod
    def _count_or_share(cls, value: Any) -> Any:
        count = type(value) is int and value >= 1
        share = type(value) is float and 0 < value <= 1
        if not count and not share:
            raise ValueError(
                "expected a count (an integer from 1) or a share (a decimal number above 0, up to "
                f"1.0), got {value!r}"
            )
        return value

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, value: str | Rule) -> str | Rule:
        if isinstance(value, str) and value not in (*RULES, FACILITY_LOCATION):
            raise ValueError(expressions.unknown("rule", value, [*RULES, FACILITY_LOCATION]))
        return value
