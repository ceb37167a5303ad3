"""`proxy`: one or several small models, each trained on all examples, with checkpoints."""

from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.model.schedule import TrainingSetup, checkpoint_steps
from s2l_ray.core.storage.info import ProxyInfo, ProxyMember
from s2l_ray.stages.training.feed import Rows
from s2l_ray.stages.training.place import Place
from s2l_ray.stages.training.run import OneTraining, check_first_rows, run


def make(work: Work) -> Outcome:
    """Train the members of the ensemble one after the other.

    Raises:
        UserError: the first rows leave nothing to learn, there are fewer steps than checkpoints, or
            the training itself refuses (see `run`).
    """
    rows = Rows.of(work, "examples", "data")
    sections = work.config.proxy.each()
    check_first_rows(rows, sections, work.artifact.stage)
    scaling = work.config.scaling.proxy
    trainings = []
    for number, section in enumerate(sections):
        order = rows.order(section)
        steps = (0, *checkpoint_steps(order.steps, section.checkpoints))
        training = OneTraining(
            setup=TrainingSetup(section, order.steps, steps, scaling),
            rows=rows,
            order=order,
            place=Place(work.artifact, f"member-{number}/"),
        )
        run(work, training, remaining=len(sections) - 1 - number)
        trainings.append(training)
    members = [
        ProxyMember(
            steps=list(training.setup.checkpoint_steps),
            folders=[training.place.folder(step) for step in training.setup.checkpoint_steps],
            **vars(training.summary(work)),
        )
        for training in trainings
    ]
    flops = [member.flops or 0.0 for member in members]
    return Outcome(
        files=[file for training in trainings for file in training.files()],
        info=ProxyInfo(members=members, flops=sum(flops) if all(flops) else None),
    )
