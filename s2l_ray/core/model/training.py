"""The one training loop: fits a causal LM to encoded examples with DeepSpeed ZeRO 1, 2 or 3.

Proxy and target differ only in their `TrainingSetup`. From batches in a given order the loop makes
checkpoints at given steps, and a training state now and then from which any number of workers
resumes. The caller has set up torch.distributed.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed

from s2l_ray.core.hashing import DROPOUT, keyed_hash
from s2l_ray.core.memory import give_back_freed_memory, keep_freed_memory
from s2l_ray.core.model.checkpoint import checkpoint_files, checkpoint_folder, save_checkpoint
from s2l_ray.core.model.engine import BuildModel, LoadWeight, make_engine
from s2l_ray.core.model.lookahead import check_causal, check_packing
from s2l_ray.core.model.losses import token_losses
from s2l_ray.core.model.micro_batches import cut, tensors
from s2l_ray.core.model.schedule import TrainingSetup, accumulation, learning_rate_at
from s2l_ray.core.model.state import StateWriter, newest_state, restore_state
from s2l_ray.core.model.tensor_files import Files
from s2l_ray.core.model.tensors import total_numel
from s2l_ray.core.model.validation import Judgement, best_step, history, last_step, validate
from s2l_ray.core.model.workers import Worker, from_worker
from s2l_ray.core.text.encoding import Encoded
from s2l_ray.errors import UserError

# Asking costs a call to another process.
SECONDS_BETWEEN_NOTICES = 5.0

OnStep = Callable[[dict[str, float]], None]


def train(
    build_model: BuildModel,
    load_weight: LoadWeight | None,
    setup: TrainingSetup,
    batches: Callable[[int], Iterator[list[Encoded]]],
    files: Files,
    worker: Worker,
    on_step: OnStep,
    preempted: Callable[[], bool] = lambda: False,
) -> None:
    """Train from the newest complete state, or from step 0, to the end.

    All workers call it together. The same call again resumes.

    Args:
        build_model: makes the causal LM, in fp32. Without `load_weight` its random weights count:
            they are drawn on the CPU under the section's seed, whole on every worker, so that they
            depend on neither workers nor ZeRO stage.
        load_weight: reads one initial weight (or stored buffer) by its name in the model; called on
            worker 0, one at a time.
        batches: `batches(step)`, called before the engine is built, yields, for each step after
            `step`, this worker's examples of the global batch, at most global_batch / world_size.
            Examples without a learned token change nothing.
        files: the artifact's files, shared by all workers; get `checkpoint/` and `state/`.
        on_step: on worker 0 gets, after each step: step, loss (mean over the learned tokens of the
            global batch), learning_rate, grad_norm, examples, tokens, learned_tokens, seconds,
            wait_seconds (of the seconds, waited for `batches`), parameters (of the model), and
            state: whether one is saved next.
        preempted: whether a machine will be taken away soon, so that a state is saved at once; all
            workers call it together, now and then.

    Raises:
        UserError: sizes that do not divide, batches that end early, a loss that is not finite, a
            training state that is broken.
    """
    if worker.device.type == "cpu":
        keep_freed_memory()
    accumulation(setup, worker.world_size)
    if from_worker(0, worker, lambda: _is_complete(setup, files)):
        return
    state = newest_state(files, worker)
    step = 0 if state is None else state["step"]
    # Before the engine is built, so that what makes the batches starts meanwhile.
    shares = batches(step)
    with memory_told("setting up the training", setup):
        engine = make_engine(build_model, load_weight, setup, worker, resuming=state is not None)
        _begin(engine, state, setup, files, worker)
    with StateWriter(files, worker) as states:
        _train_from(step, engine, shares, setup, files, states, on_step, preempted)
    engine.destroy()


def _is_complete(setup: TrainingSetup, files: Files) -> bool:
    """Whether every checkpoint is complete already."""
    steps, total_steps = setup.checkpoint_steps, setup.total_steps
    if steps[-1:] != (total_steps,):
        raise UserError(
            f"Preparing a training of {total_steps} steps: the last checkpoint was expected at the "
            f"last step, and the checkpoint steps are {steps}. What is learned after the last one "
            f"would be lost: end them with {total_steps}."
        )
    return all(checkpoint_files(files, step) is not None for step in kept_steps(setup, files))


def kept_steps(setup: TrainingSetup, files: Files) -> list[int]:
    """Steps whose checkpoints stay: those of the setup up to the last, and the best, in order."""
    if setup.validation is None:
        return list(setup.checkpoint_steps)
    measured = history(files)
    last = last_step(measured, setup)
    best = best_step(measured)
    return sorted(
        {
            last if best is None else best,
            last,
            *(step for step in setup.checkpoint_steps if step < last),
        }
    )


def _begin(
    engine: Any, state: dict[str, Any] | None, setup: TrainingSetup, files: Files, worker: Worker
) -> None:
    """Load the state, or else store the weights before any step where they are due.

    Raises:
        UserError: the model looks ahead, or sees packed rows that are not its own.
    """
    device, what = worker.device, "the model to train"
    if state is not None:
        restore_state(engine, state, files, worker, lambda: _blank_step(engine, setup, device))
    else:
        check_causal(engine, device, what)
        if 0 in setup.checkpoint_steps:
            save_checkpoint(engine.module, 0, setup.section, files, worker)
    if setup.scaling.packing:
        check_packing(engine, device, what)
    if device.type == "cpu":
        # Of the model as it was before DeepSpeed moved it into buffers of its own.
        give_back_freed_memory()


def _train_from(
    step: int,
    engine: Any,
    shares: Iterator[list[Encoded]],
    setup: TrainingSetup,
    files: Files,
    states: StateWriter,
    on_step: OnStep,
    preempted: Callable[[], bool],
) -> None:
    """All steps after `step`, with the checkpoints and states that are due."""
    section, worker, total_steps = setup.section, states.worker, setup.total_steps
    parameters = total_numel(engine.module.parameters())
    asked, leaves = time.monotonic(), False
    while step < total_steps:
        began = time.perf_counter()
        share = _next_share(shares, step, setup, worker)
        waited = time.perf_counter() - began
        asks = worker.rank == 0 and time.monotonic() - asked >= SECONDS_BETWEEN_NOTICES
        totals = _totals(share, asks, worker)
        with memory_told(f"training step {step + 1}", setup):
            metrics = _step(engine, share, totals, step, setup, worker)
        step += 1
        saves = step % section.state_every == 0
        if totals.asks and not leaves:
            asked, leaves = time.monotonic(), preempted()
            saves = saves or leaves
        judged = _judged(engine, step, setup, files, worker)
        if judged.stops:
            total_steps = step
        saves = saves and step < total_steps
        if worker.rank == 0:
            found = {} if judged.loss is None else {"held_out_loss": judged.loss}
            found |= {"seconds": time.perf_counter() - began, "wait_seconds": waited}
            found |= {"parameters": parameters, "state": saves}
            on_step({"step": step, **metrics, **found})
        if step in setup.checkpoint_steps or judged.is_best or judged.stops:
            save_checkpoint(engine.module, step, section, files, worker)
        if judged.worse is not None and worker.rank == 0:
            files.delete(checkpoint_folder(judged.worse))
        if saves:
            states.save(engine, step, metrics["loss"])


def _judged(
    engine: Any, step: int, setup: TrainingSetup, files: Files, worker: Worker
) -> Judgement:
    """What held-out rows say after a step; nothing where none are due."""
    section = setup.validation
    if section is None or (step % section.every and step != setup.total_steps):
        return Judgement()
    with memory_told(f"held-out rows after step {step}", setup):
        return validate(engine, step, setup, files, worker)


@contextlib.contextmanager
def memory_told(doing: str, setup: TrainingSetup) -> Iterator[None]:
    """Tell of a device without enough memory what would fit; another attempt would not help.

    Raises:
        UserError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = setup.micro_batch
        smaller = max((n for n in range(1, size // 2 + 1) if size % n == 0), default=None)
        less = [] if smaller is None else [f"set micro_batch of this stage's scaling to {smaller}"]
        less += [] if setup.scaling.activation_checkpointing else ["set activation_checkpointing"]
        less += ["choose deepspeed: zero3 or zero3_offload", "lower max_length"]
        raise UserError(
            f"{doing} with micro-batches of {size} examples: the GPU has not enough memory "
            f"({str(error).splitlines()[0]}) One of these helps: {', or '.join(less)}."
        ) from error


def _next_share(
    shares: Iterator[list[Encoded]], step: int, setup: TrainingSetup, worker: Worker
) -> list[Encoded]:
    share = next(shares, None)
    most = setup.section.global_batch // worker.world_size
    if share is None or len(share) > most:
        came = "none" if share is None else str(len(share))
        raise UserError(
            f"Training step {step + 1} of {setup.total_steps}: at most {most} examples were "
            f"expected for each worker and {came} came. The order of the data and the number of "
            "steps do not belong together."
        )
    return share


# -------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class Totals:
    """Of the global batch of a step: examples, tokens without padding, and learned tokens.

    `asks` is 1 where all workers ask for notices.
    """

    examples: int
    tokens: int
    learned: int
    asks: int


def _step(
    engine: Any,
    share: list[Encoded],
    totals: Totals,
    step: int,
    setup: TrainingSetup,
    worker: Worker,
) -> dict[str, float]:
    """One optimiser step on this worker's share of the global batch; metrics of the whole batch."""
    learning_rate = learning_rate_at(step, setup)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    micro_batches = cut(share, setup, worker)
    # DeepSpeed averages gradients over workers; the sum over all of them is wanted, divided by the
    # learned tokens of all.
    scale = worker.world_size / max(totals.learned, 1)
    losses = []
    for number, micro_batch in enumerate(micro_batches, 1):
        engine.set_gradient_accumulation_boundary(number == len(micro_batches))
        if setup.section.draws and micro_batch:
            _seed_dropout(setup.section.seed, step, micro_batch[0])
        loss = token_losses(engine, *tensors(micro_batch, setup, worker.device)).sum()
        engine.backward(loss * (scale if micro_batch else 0.0), scale_wrt_gas=False)
        losses.append(loss.detach() if micro_batch else torch.zeros_like(loss))
    total = _finite_total(torch.stack(losses).double(), micro_batches, step, worker)
    engine.step()
    norm = engine.get_global_grad_norm()
    return {
        "loss": total / max(totals.learned, 1),
        "learning_rate": learning_rate,
        "grad_norm": float("nan") if norm is None else float(norm),
        "examples": totals.examples,
        "tokens": totals.tokens,
        "learned_tokens": totals.learned,
    }


def _seed_dropout(seed: int, step: int, example: Encoded) -> None:
    """Let the dropout of an example depend on nothing but the seed, the step and the example."""
    purpose, ids = f"{DROPOUT} of step {step}", np.array([example.example_id])
    torch.manual_seed(int(keyed_hash(purpose, seed, ids)[0]))


def _totals(share: Sequence[Encoded], asks: bool, worker: Worker) -> Totals:
    own = [
        len(share),
        sum(len(e.input_ids) for e in share),
        sum(int(e.learned.sum()) for e in share),
        int(asks),
    ]
    if worker.world_size == 1:
        return Totals(*own)
    totals = torch.tensor(own, device=worker.device)
    distributed.all_reduce(totals)
    return Totals(*totals.tolist())


def _finite_total(
    losses: torch.Tensor, micro_batches: Sequence[Sequence[Encoded]], step: int, worker: Worker
) -> float:
    """Sum of the micro-batches' losses over all workers.

    Raises:
        UserError: on every worker, with the examples concerned, before the weights are touched.
    """
    total = losses.sum()
    if worker.world_size > 1:
        distributed.all_reduce(total)
    if math.isfinite(value := total.item()):
        return value
    own = [
        e.example_id
        for loss, batch in zip(losses.tolist(), micro_batches, strict=True)
        for e in batch
        if not math.isfinite(loss)
    ]
    everybody: list[Any] = [None] * worker.world_size
    distributed.all_gather_object(everybody, own)
    ids = [example_id for some in everybody for example_id in some]
    named = ", ".join(map(str, ids[:16])) + (" and others" if len(ids) > 16 else "")
    raise UserError(
        f"Training step {step + 1}: a finite loss was expected and {value} came, from a "
        f"micro-batch of the examples with example_id {named}. Look at these rows; if they are "
        "in order, lower learning_rate or set gradient_clipping."
    )


def _blank_step(engine: Any, setup: TrainingSetup, device: torch.device) -> None:
    """One optimiser step that changes no weight: learning rate 0 and gradients of zero."""
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(
        token_losses(engine, *tensors([], setup, device)).sum() * 0.0, scale_wrt_gas=False
    )
    engine.step()
