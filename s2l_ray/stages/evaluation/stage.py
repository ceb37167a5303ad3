"""`evaluation`: the target's losses and answers on held-out rows."""

from collections.abc import Sequence
from typing import Any

from s2l_ray.config import Config, Evaluation, Training
from s2l_ray.contract.stage import Facts, Request, Stage
from s2l_ray.core.answers.programs import Sandbox
from s2l_ray.core.answers.scores import check_installed
from s2l_ray.core.data.catalog import RawFiles
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.model import places


def identity(config: Config, assume: bool) -> dict[str, Any]:
    section = _section(config)
    made = section.model_dump(mode="json", exclude={"files", "root"})
    if section.bert_model is not None and not assume:
        made["bert_model"] = places.identity(section.bert_model, None)
    return made


def parts(config: Config, raw: RawFiles) -> list[PartRange]:
    return raw.ranges(_section(config), "evaluation")


def _section(config: Config) -> Evaluation:
    assert config.evaluation is not None
    return config.evaluation


def texts(config: Config) -> Sequence[tuple[Training, int, str]]:
    """A prompt, and the answer that the target makes to it."""
    if config.target is None:
        return ()
    tokens = config.target.max_length + _section(config).max_new_tokens
    return [(config.target, tokens, "target.max_length + evaluation.max_new_tokens")]


def check(config: Config, facts: Facts) -> None:
    """Refuse scores whose packages are missing, and programs that no sandbox could run.

    The hosts of a cluster are taken to be like this one; each looks again before it begins.
    """
    section = _section(config)
    check_installed(section.scores)
    if section.answers != "chain":
        with Sandbox() as sandbox:
            sandbox.check()


def request(config: Config) -> Request:
    return Request.of("actors", config.scaling.evaluation, "evaluation")


EVALUATION = Stage(
    name="evaluation",
    version=4,
    make="s2l_ray.stages.evaluation.make",
    identity=identity,
    inputs=lambda config: {"target": "target"},
    wanted=lambda config: config.evaluation is not None,
    parts=parts,
    check=check,
    texts=texts,
    request=request,
)
