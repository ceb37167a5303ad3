"""`target`: the large model, trained on the subset, as a Hugging Face folder with its tokenizer."""

from s2l_ray.config import Target
from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.data.read import read_part
from s2l_ray.core.model.loading import load_encoder
from s2l_ray.core.model.release import release_files
from s2l_ray.core.model.schedule import TrainingSetup
from s2l_ray.core.model.validation import best_step, history
from s2l_ray.core.storage.info import TargetInfo
from s2l_ray.core.text.encoding import Encoded, check_some_learned
from s2l_ray.stages.training.feed import Rows
from s2l_ray.stages.training.place import Place
from s2l_ray.stages.training.run import OneTraining, check_first_rows, run


def make(work: Work) -> Outcome:
    """Train the target; it keeps the checkpoint of the last step, and of the best by held-out rows.

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
        setup=TrainingSetup(
            section,
            order.steps,
            (order.steps,),
            scaling,
            section.validation,
            _held_out(work, section),
        ),
        rows=rows,
        order=order,
        place=Place(work.artifact, ""),
    )
    run(work, training, remaining=0)
    measured = history(training.place)
    summary = training.summary(work)
    last, best = summary.total_steps, best_step(measured)
    folder = training.place.folder(last if best is None else best)
    subset = work.manifests["subset"]
    beside = release_files(section, work.inputs["subset"].fingerprint, subset.rows)
    return Outcome(
        files=[
            *training.files(),
            *(work.artifact.write_named(f"{folder}/{name}", data) for name, data in beside.items()),
        ],
        info=TargetInfo(
            model=folder,
            last=training.place.folder(last),
            held_out=[[float(step), loss] for step, loss in sorted(measured.items())],
            **vars(summary),
        ),
    )


def _held_out(work: Work, section: Target) -> tuple[Encoded, ...]:
    """The first rows of all parts of the held-out files alike, encoded as the target will.

    Raises:
        UserError: none of them has a learned token.
    """
    if section.validation is None:
        return ()
    evaluation = work.config.evaluation
    assert evaluation is not None
    encoder, wanted = load_encoder(section), section.validation.rows
    ranges = work.ranges[:wanted]
    found: list[Encoded] = []
    for part in ranges:
        rows = read_part(part, evaluation.columns, ignore=evaluation.ignore).table
        found += encoder.examples(rows.slice(0, -(-wanted // len(ranges))))
    check_some_learned(found, "target")
    return tuple(example for example in found[:wanted] if example.learned.any())
