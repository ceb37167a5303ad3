"""`target`: the large model, trained on the subset, as a Hugging Face folder with its tokenizer."""

from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.model.release import release_files
from s2l_ray.core.model.schedule import TrainingSetup
from s2l_ray.core.storage.info import TargetInfo
from s2l_ray.stages.training.feed import Rows
from s2l_ray.stages.training.place import Place
from s2l_ray.stages.training.run import OneTraining, check_first_rows, run


def make(work: Work) -> Outcome:
    """Train the target; its only checkpoint is that of the last step.

    Raises:
        UserError: the first rows leave nothing to learn, or the training refuses (see `run`).
    """
    section = work.config.target
    assert section is not None
    rows = Rows.of(work, "subset", "messages")
    check_first_rows(rows, [section], work.artifact.stage)
    order = rows.order(section)
    scaling = work.config.scaling.target
    training = OneTraining(
        setup=TrainingSetup(section, order.steps, (order.steps,), scaling),
        rows=rows,
        order=order,
        place=Place(work.artifact, ""),
    )
    run(work, training, remaining=0)
    folder = training.place.folder(order.steps)
    subset = work.manifests["subset"]
    beside = release_files(section, work.inputs["subset"].fingerprint, subset.rows)
    return Outcome(
        files=[
            *training.files(),
            *(work.artifact.write_named(f"{folder}/{name}", data) for name, data in beside.items()),
        ],
        info=TargetInfo(model=folder, **vars(training.summary(work))),
    )
