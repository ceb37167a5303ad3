"""`target`: the large model, trained on the subset, as a Hugging Face folder with its tokenizer."""

import os
import tempfile

from s2l_ray.config import Training
from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.model.loading import load_tokenizer
from s2l_ray.core.model.schedule import TrainingSetup
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import TargetInfo
from s2l_ray.core.storage.manifest import FileEntry
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
    return Outcome(
        files=[*training.files(), *_save_tokenizer(work.artifact, folder, section)],
        info=TargetInfo(model=folder, **vars(training.summary(work))),
    )


def _save_tokenizer(artifact: Artifact, folder: str, section: Training) -> list[FileEntry]:
    entries = []
    with tempfile.TemporaryDirectory() as scratch:
        load_tokenizer(section).save_pretrained(scratch)
        for name in sorted(os.listdir(scratch)):
            with open(os.path.join(scratch, name), "rb") as file:
                entries.append(artifact.write_named(f"{folder}/{name}", file.read()))
    return entries
