"""The one training loop of the project: fits a causal language model to encoded examples with DeepSpeed ZeRO
1, 2 or 3.

Proxy and target differ only in their `TrainingPlan`. From batches in a given order it makes checkpoints at
given steps, and a training state now and then from which any number of workers continues. The caller has set
up torch.distributed.
"""

import contextlib
import io
import logging
import math
import os
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import distributed, nn

from s2l_ray.core.model.allocation import keep_freed_memory
from s2l_ray.core.model.losses import token_losses
from s2l_ray.core.model.state import (
    DTYPES,
    Files,
    Worker,
    checkpoint_files,
    from_worker,
    newest_state,
    restore_state,
    save_checkpoint,
    save_state,
    stored_tensors,
    total_numel,
)
from s2l_ray.core.text.batching import pad
from s2l_ray.core.text.encoding import Encoded
from s2l_ray.errors import UserError

# Gradients reduced at once. Buffers of this size are allocated, so a smaller model lowers it to its own size.
BUCKET_ELEMENTS = 200_000_000


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides what is learned, beside the model, the batches and the number of workers.

    `checkpoint_steps` counts steps taken (0: the initial weights). `global_batch` is examples a step over all
    workers, `micro_batch` examples of one worker in one forward pass. `gradient_clipping` is a global norm, 0
    for none. `state_every` is steps between saves of the training state, 0 for never.
    """

    total_steps: int
    checkpoint_steps: tuple[int, ...]
    global_batch: int
    micro_batch: int
    learning_rate: float
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    gradient_clipping: float = 0.0
    dtype: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[1, 2, 3] = 1
    state_every: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Sums:
    """Totals over the global batch of a step: examples, tokens (padding left out) and learned tokens."""

    examples: int
    tokens: int
    learned: int


def learning_rate_at(step: int, plan: TrainingPlan) -> float:
    """Learning rate of the step taken after `step` steps, by the schedules of transformers.

    Linear warm-up from 0 over ceil(total_steps * warmup_ratio) steps, then the decay to 0 that `schedule` names.
    """
    warmup = math.ceil(plan.total_steps * plan.warmup_ratio)
    if step < warmup:
        return plan.learning_rate * step / warmup
    if plan.schedule == "constant":
        return plan.learning_rate
    progress = (step - warmup) / max(1, plan.total_steps - warmup)
    left = 1 - progress if plan.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return plan.learning_rate * max(0.0, left)


def checkpoint_steps(total_steps: int, count: int) -> tuple[int, ...]:
    """`count` steps equally far apart: i * total_steps / count, rounded half up, for i = 1..count.

    Raises:
        UserError: more checkpoints than steps.
    """
    if not 1 <= count <= total_steps:
        raise UserError(
            f"Planning the checkpoints of a training: {count} checkpoints were asked for, and {total_steps} steps "
            f"allow 1 to {total_steps}. Ask for fewer checkpoints, or train for more epochs or with a smaller batch."
        )
    return tuple((2 * i * total_steps + count) // (2 * count) for i in range(1, count + 1))


def accumulation(plan: TrainingPlan, world_size: int) -> int:
    """Forward passes of a worker in a step: global_batch / world_size / micro_batch.

    Raises:
        UserError: this is not a whole number.
    """
    if plan.global_batch % (world_size * plan.micro_batch):
        raise UserError(
            f"Preparing a training: a global batch of {plan.global_batch} examples cannot be cut into equal "
            f"micro-batches of {plan.micro_batch} on {world_size} workers. Choose a batch that is a multiple of "
            f"{world_size * plan.micro_batch}, a smaller micro-batch, or another number of workers."
        )
    return plan.global_batch // (world_size * plan.micro_batch)


def train(
    build_model: Callable[[], nn.Module],
    load_weights: Callable[[str], torch.Tensor] | None,
    plan: TrainingPlan,
    batches: Callable[[int], Iterator[list[Encoded]]],
    files: Files,
    rank: int,
    world_size: int,
    device: torch.device,
    on_step: Callable[[dict[str, float]], None],
) -> None:
    """Train from the newest complete state, or from step 0, to the end. The same arguments again resume.

    All workers call it together.

    Args:
        build_model: makes the causal LM, in fp32. Without `load_weights` its random weights count: they are
            drawn on the CPU under plan.seed, whole on every worker, so that they depend on neither workers
            nor ZeRO stage.
        load_weights: reads one initial weight (or stored buffer) by its name in the model; called on worker
            0, one at a time.
        batches: `batches(step)`, called before the engine is built, yields, for each step after `step`, this
            worker's examples of the global batch, at most global_batch / world_size. Examples without a learned
            token change nothing.
        files: the artifact's files; get `checkpoint/step-NNNNNN/` and `state/`. Shared by all workers.
        on_step: on worker 0 gets, after each step: step, loss (mean over the learned tokens of the global
            batch), learning_rate, grad_norm, examples, tokens, learned_tokens, seconds, wait_seconds (of the
            seconds, waited for `batches`), parameters (how many the model has).

    Raises:
        UserError: sizes that do not divide, batches that end early, a loss that is not finite, a training
            state that is broken.
    """
    if device.type == "cpu":
        keep_freed_memory()
    worker = Worker(rank, world_size, device)
    passes = accumulation(plan, world_size)
    if from_worker(0, worker, lambda: _finished(plan, files)):
        return
    state = from_worker(0, worker, lambda: newest_state(files))
    # before the engine is built, so that what makes the batches starts meanwhile
    step = 0 if state is None else state["step"]
    shares = batches(step)
    engine = _engine(build_model, load_weights, plan, passes, worker, resuming=state is not None)
    if state is not None:
        restore_state(engine, state, files, worker, lambda: _blank_step(engine, device))
    elif 0 in plan.checkpoint_steps:
        save_checkpoint(engine.module, 0, plan.dtype, files, worker)
    parameters = total_numel(engine.module.parameters())
    while step < plan.total_steps:
        began = time.perf_counter()
        share = _next_share(shares, step, plan, world_size)
        waited = time.perf_counter() - began
        metrics = _step(engine, share, step, passes, plan, worker)
        step += 1
        if rank == 0:
            seconds = {"seconds": time.perf_counter() - began, "wait_seconds": waited}
            on_step({"step": step, **metrics, **seconds, "parameters": parameters})
        if step in plan.checkpoint_steps:
            save_checkpoint(engine.module, step, plan.dtype, files, worker)
        if plan.state_every and step % plan.state_every == 0 and step < plan.total_steps:
            save_state(engine, step, metrics["loss"], files, worker)
    engine.destroy()


def _finished(plan: TrainingPlan, files: Files) -> bool:
    """Whether every checkpoint is complete already."""
    if plan.checkpoint_steps[-1:] != (plan.total_steps,):
        raise UserError(
            f"Preparing a training of {plan.total_steps} steps: the last checkpoint was expected at the last step, "
            f"and the checkpoint steps are {plan.checkpoint_steps}. What is learned after the last one would be "
            f"lost: end them with {plan.total_steps}."
        )
    return all(checkpoint_files(files, step) is not None for step in plan.checkpoint_steps)


def _next_share(
    shares: Iterator[list[Encoded]], step: int, plan: TrainingPlan, world_size: int
) -> list[Encoded]:
    share = next(shares, None)
    most = plan.global_batch // world_size
    if share is None or len(share) > most:
        came = "none" if share is None else str(len(share))
        raise UserError(
            f"Training step {step + 1} of {plan.total_steps}: at most {most} examples were expected for each worker "
            f"and {came} came. The order of the data and the number of steps do not belong together."
        )
    return share


# --------------------------------------------------------------------------------------------------- one step


def _step(
    engine: Any, share: list[Encoded], step: int, passes: int, plan: TrainingPlan, worker: Worker
) -> dict[str, float]:
    """One optimisation step on this worker's share of the global batch; metrics of the whole of it."""
    # A model with dropout draws from the global generator: seeding it here makes a step the same after a
    # resume.
    torch.manual_seed(plan.seed * 1_000_003 + step * 8_191 + worker.rank)
    learning_rate = learning_rate_at(step, plan)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    sums = _sums(share, worker)
    micro_batches = _micro_batches(share, plan.micro_batch, passes)
    # DeepSpeed averages gradients over workers; the sum over all of them is wanted, divided by the learned
    # tokens of all.
    scale = worker.world_size / max(sums.learned, 1)
    parts = []
    for number, micro_batch in enumerate(micro_batches, 1):
        engine.set_gradient_accumulation_boundary(number == passes)
        loss = token_losses(engine, *_tensors(micro_batch, worker.device)).sum()
        engine.backward(loss * (scale if micro_batch else 0.0), scale_wrt_gas=False)
        parts.append(loss.detach() if micro_batch else torch.zeros_like(loss))
    total = _finite_total(torch.stack(parts).double(), micro_batches, step, worker)
    engine.step()
    norm = engine.get_global_grad_norm()
    return {
        "loss": total / max(sums.learned, 1),
        "learning_rate": learning_rate,
        "grad_norm": float("nan") if norm is None else float(norm),
        "examples": sums.examples,
        "tokens": sums.tokens,
        "learned_tokens": sums.learned,
    }


def _sums(share: Sequence[Encoded], worker: Worker) -> Sums:
    own = [
        len(share),
        sum(len(e.input_ids) for e in share),
        sum(int(e.learned.sum()) for e in share),
    ]
    if worker.world_size == 1:
        return Sums(*own)
    totals = torch.tensor(own, device=worker.device)
    distributed.all_reduce(totals)
    return Sums(*totals.tolist())


def _micro_batches(share: Sequence[Encoded], size: int, passes: int) -> list[list[Encoded]]:
    """Cut a share into `passes` micro-batches of examples of similar length, to pad little.

    Some are empty when examples are few: every worker runs equally many passes, since ZeRO communicates in
    each.
    """
    useful = sorted(
        (e for e in share if e.learned.any()), key=lambda e: (len(e.input_ids), e.example_id)
    )
    return [useful[i * size : (i + 1) * size] for i in range(passes)]


def _tensors(
    micro_batch: Sequence[Encoded], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids int64 [B, L] and learned bool [B, L], right-padded; two tokens to run idly on when there is
    no example."""
    ids_BL, learned_BL = pad(micro_batch, 0)
    if not micro_batch:
        learned_BL[0, 1] = True  # its loss is multiplied by zero
    return torch.from_numpy(ids_BL).to(device), torch.from_numpy(learned_BL).to(device)


def _finite_total(
    parts: torch.Tensor, micro_batches: Sequence[Sequence[Encoded]], step: int, worker: Worker
) -> float:
    """Sum of the micro-batches' losses over all workers.

    Raises:
        UserError: on every worker, with the examples concerned, before the weights are touched.
    """
    total = parts.sum()
    if worker.world_size > 1:
        distributed.all_reduce(total)
    if math.isfinite(value := total.item()):
        return value
    own = [
        e.example_id
        for part, batch in zip(parts.tolist(), micro_batches, strict=True)
        for e in batch
        if not math.isfinite(part)
    ]
    everybody: list[Any] = [None] * worker.world_size
    distributed.all_gather_object(everybody, own)
    ids = [example_id for some in everybody for example_id in some]
    raise UserError(
        f"Training step {step + 1}: a finite loss was expected and {value} came, from a micro-batch of the examples "
        f"with example_id {', '.join(map(str, ids[:16]))}{' and others' if len(ids) > 16 else ''}. Look at these "
        "rows; if they are in order, lower learning_rate or set gradient_clipping."
    )


def _blank_step(engine: Any, device: torch.device) -> None:
    """One optimiser step that changes no weight: learning rate 0 and gradients of zero."""
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(token_losses(engine, *_tensors([], device)).sum() * 0.0, scale_wrt_gas=False)
    engine.step()


# ------------------------------------------------------------------------------------------------- the engine


def _engine(
    build_model: Callable[[], nn.Module],
    load_weights: Callable[[str], torch.Tensor] | None,
    plan: TrainingPlan,
    passes: int,
    worker: Worker,
    resuming: bool,
) -> Any:
    deepspeed = _deepspeed(worker.device)
    module = _module(
        build_model,
        load_weights,
        plan,
        _config(plan, passes, worker, BUCKET_ELEMENTS),
        worker,
        resuming,
    )
    module.train()
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=plan.learning_rate,
        betas=(plan.adam_beta1, plan.adam_beta2),
        eps=plan.adam_eps,
        weight_decay=plan.weight_decay,
        fused=True,
    )
    bucket = min(BUCKET_ELEMENTS, total_numel(module.parameters()))
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # it reports its memory by print, at whatever log level
        engine, *_ = deepspeed.initialize(
            args=Namespace(device_rank=worker.device.index or 0),
            model=module,
            optimizer=optimizer,
            config=_config(plan, passes, worker, bucket),
            dist_init_required=False,
        )
    return engine


def _deepspeed(device: torch.device) -> Any:
    """The library, set up for this device and kept from printing and from compiling."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = (
            "cpu"  # read at import; a machine with a GPU may train on the CPU
        )
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed takes its device number from here
    # The library still calls collectives by names that torch has begun to replace, and each call would warn.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # An empty table of compatible ops keeps it from building a shared-memory op with g++: gloo serves.
        deepspeed.ops.__compatible_ops__ = {}
    # An earlier training in this process may have had process groups that are gone; the library still
    # remembers them.
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = None
    deepspeed.init_distributed()
    return deepspeed


def _config(plan: TrainingPlan, passes: int, worker: Worker, bucket: int) -> dict[str, Any]:
    """DeepSpeed's settings, with every key that changes numbers written out."""
    return {
        "train_batch_size": plan.micro_batch * passes * worker.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": plan.gradient_clipping,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "fp16": {"enabled": False},
        "bf16": {"enabled": plan.dtype == "bf16"},
        # Gradients of several micro-batches and workers are summed in fp32, so that the sum depends little on
        # their number.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": plan.zero_stage,
            "contiguous_gradients": True,
            # gloo sums all gradients of two workers together in less time than it takes for each one's part
            "reduce_scatter": worker.device.type != "cpu",
            "overlap_comm": False,
            "round_robin_gradients": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }


def _module(
    build_model: Callable[[], nn.Module],
    load_weights: Callable[[str], torch.Tensor] | None,
    plan: TrainingPlan,
    config: dict[str, Any],
    worker: Worker,
    resuming: bool,
) -> nn.Module:
    """The model with its initial weights; under ZeRO-3 a given model is never whole on a worker."""
    torch.manual_seed(plan.seed)
    if load_weights is None:
        module = build_model()
    else:
        from deepspeed.runtime import zero
        from transformers.initialization import no_init_weights

        # Init would make buffers in bf16 too, and rotary frequencies need fp32: it decides the device, and
        # _cast the type.
        overrides = [zero.DeepSpeedTensorOverride.device]
        cut = (
            zero.Init(config_dict_or_path=config, tensor_overrides=overrides)
            if plan.zero_stage == 3
            else worker.device
        )
        with cut, no_init_weights():
            module = build_model()
    for parameter in module.parameters():
        _cast(parameter, DTYPES[plan.dtype])
    if load_weights is not None:
        _fill(module, load_weights, resuming, worker)
    return module


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    parameter.data = parameter.data.to(dtype)
    if hasattr(parameter, "ds_tensor"):
        parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)


def _fill(
    module: nn.Module, load_weights: Callable[[str], torch.Tensor], resuming: bool, worker: Worker
) -> None:
    """Give every parameter and stored buffer its value on worker 0, one at a time; DeepSpeed spreads them from there.

    With a training state to come, parameters are only made finite.
    """
    from deepspeed.runtime.zero import GatheredParameters

    parameters = dict(module.named_parameters())
    for name, tensor in stored_tensors(module).items():

        def put(name: str = name, tensor: torch.Tensor = tensor) -> None:
            if resuming and name in parameters:
                tensor.data.zero_()
                return
            value = load_weights(name)
            if value.shape != tensor.shape:
                raise UserError(
                    f"Loading the initial weights: {name} was expected with shape {tuple(tensor.shape)} and came "
                    f"with {tuple(value.shape)}. The weights and config.json of the model do not belong together."
                )
            tensor.data.copy_(value)

        with GatheredParameters([tensor], modifier_rank=0):
            from_worker(0, worker, put)
        if name not in parameters:
            distributed.broadcast(tensor, src=0)
