"""The DeepSpeed engine of a training: the library, its settings, and the initial weights."""

import contextlib
import functools
import io
import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn

from s2l_ray.config import Training
from s2l_ray.core.model.adapters import adapter_weights, add_adapter, check_adapter
from s2l_ray.core.model.fragments import set_full
from s2l_ray.core.model.schedule import TrainingSetup, accumulation
from s2l_ray.core.model.tensors import DTYPES, full_shape, stored_tensors, total_numel
from s2l_ray.core.model.workers import Worker, from_worker
from s2l_ray.core.model.zero import BUCKET_ELEMENTS, engine_settings, offloads, zero_stage
from s2l_ray.errors import UserError

BuildModel = Callable[[], nn.Module]
LoadWeight = Callable[[str], torch.Tensor]
# Of weights that the model's dtype rounds: what gives each of them as it was, on worker 0.
Unrounded = dict[str, Callable[[], torch.Tensor]]


def make_engine(
    build_model: BuildModel,
    load_weight: LoadWeight | None,
    setup: TrainingSetup,
    worker: Worker,
    resuming: bool,
) -> Any:
    """A DeepSpeed engine around the model with its initial weights. All workers call it together.

    Args:
        build_model: see `train`.
        load_weight: see `train`.
        resuming: a training state will be loaded into the engine, so no weight is read.
    """
    deepspeed = _deepspeed(worker.device)
    section = setup.section
    settings = _settings(setup, worker, BUCKET_ELEMENTS)
    is_bf16 = section.state_dtype == "bf16"
    # DeepSpeed takes no other AdamW for an offloaded state in bf16.
    if cpu_adam := offloads(settings) and (is_bf16 or worker.device.type != "cpu"):
        _build_operators(settings)
    # A state has only what is trained: weights beside an adapter are read again.
    skip = resuming and section.adapter is None
    module, unrounded = _module(build_model, load_weight, setup, worker, skip)
    if section.adapter is not None:
        unrounded = {}
        add_adapter(module, section.adapter, worker.device)
        for parameter in module.parameters():
            if parameter.requires_grad:
                _cast(parameter, DTYPES[section.dtype])
        if section.adapter.start is not None and not resuming:
            _begin_with(module, section.adapter.start, section, worker)
    module.train()
    if setup.scaling.activation_checkpointing:
        _checkpoint_activations(module)
    settings = _settings(setup, worker, min(BUCKET_ELEMENTS, total_numel(module.parameters())))
    engine = _initialize(deepspeed, module, _optimizer(module, section, cpu_adam), settings, worker)
    for name, parameter in engine.module.named_parameters():
        if name in unrounded and not is_bf16:
            value = unrounded.pop(name)().float() if worker.rank == 0 else None
            set_full(parameter, value, 0, worker)
    return engine


def _checkpoint_activations(module: Any) -> None:
    """Have each layer compute its activations again in the backward pass.

    Raises:
        UserError: the family knows no checkpoints.
    """
    try:
        with warnings.catch_warnings():
            # It has another name in newer releases, which older ones do not know.
            warnings.simplefilter("ignore", FutureWarning)
            module.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"setting up activation checkpointing: {error}. Set activation_checkpointing of this "
            "stage's scaling to false."
        ) from None


def _initialize(
    deepspeed: Any, module: nn.Module, optimizer: Any, settings: dict[str, Any], worker: Worker
) -> Any:
    """The engine.

    Raises:
        UserError: DeepSpeed refuses its settings.
    """
    try:
        # It prints how much memory it uses, at whatever log level.
        with contextlib.redirect_stdout(io.StringIO()):
            return deepspeed.initialize(
                args=Namespace(device_rank=worker.device.index or 0),
                model=module,
                optimizer=optimizer,
                config=settings,
                dist_init_required=False,
            )[0]
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"setting up DeepSpeed: {type(error).__name__}: {error}. Correct the file that "
            "`deepspeed` names."
        ) from error


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: weights that decay, and norms and biases, which do not.

    So does the Trainer of transformers. Its rule goes by names, such as bias and norm; ours also
    takes every vector as one of these, whatever its name.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = len(full_shape(parameter)) > 1 and "bias" not in name and "norm" not in name
        (decayed if is_matrix else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _deepspeed(device: torch.device) -> Any:
    """The library, set up for this device and kept from printing and from compiling."""
    if device.type == "cpu":
        # Read at import; a machine with a GPU may train on the CPU.
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed takes its device number from here.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    # The library still calls collectives by names that torch has begun to replace, and each call
    # would warn.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # An empty table of compatible ops keeps it from building a shared-memory op with g++: gloo
        # does the same.
        deepspeed.ops.__compatible_ops__ = {}
    # An earlier training in this process may have had process groups that are gone; the library
    # still remembers them.
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = None
    deepspeed.init_distributed()
    return deepspeed


def _settings(setup: TrainingSetup, worker: Worker, bucket: int) -> dict[str, Any]:
    passes, on_cpu = accumulation(setup, worker.world_size), worker.device.type == "cpu"
    return engine_settings(setup.section, setup.scaling, passes, on_cpu, bucket)


def _optimizer(module: nn.Module, section: Training, cpu_adam: bool) -> torch.optim.Optimizer:
    """AdamW: torch's on the model's device, or DeepSpeed's for CPUs beside a GPU."""
    options: dict[str, Any] = {
        "lr": section.learning_rate,
        "betas": (section.adam_beta1, section.adam_beta2),
        "eps": section.adam_epsilon,
    }
    groups = parameter_groups(module, section.weight_decay)
    if not cpu_adam:
        return torch.optim.AdamW(groups, fused=True, **options)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    is_fp32 = section.state_dtype == "fp32"
    return DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=is_fp32, **options)


def _build_operators(settings: dict[str, Any]) -> None:
    """Compile what DeepSpeed needs for a state that lies elsewhere, before any weight is read.

    Raises:
        UserError: a compiler or a library is missing.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    what, needed = "AdamW for CPUs", "a C++ compiler (g++) and ninja"
    try:
        CPUAdamBuilder().load(verbose=False)
        if settings["zero_optimization"]["offload_optimizer"]["device"] == "nvme":
            what, needed = "reading and writing of NVMe disks", "libaio (libaio-dev) and g++"
            AsyncIOBuilder().load(verbose=False)
    # A missing compiler, a missing library or its error: each raises something else.
    except Exception as error:
        lines = str(error).strip().splitlines()
        telling = [line for line in lines if "error:" in line or "not found" in line]
        raise UserError(
            f"compiling DeepSpeed's {what} for the offloaded optimizer state: "
            f"{[*telling, *lines][0]}. It needs {needed} on every machine; install them, or set "
            "deepspeed to zero3."
        ) from error


# ------------------------------------------------------------------------------- initial weights


def _module(
    build_model: BuildModel,
    load_weight: LoadWeight | None,
    setup: TrainingSetup,
    worker: Worker,
    resuming: bool,
) -> tuple[nn.Module, Unrounded]:
    """The model with its initial weights, and where they come from if its dtype rounds them.

    Under ZeRO-3 a given model is never whole on a worker.
    """
    torch.manual_seed(setup.section.seed)
    module = build_model() if load_weight is None else _empty_module(build_model, setup, worker)
    unrounded: Unrounded = {}
    for name, parameter in module.named_parameters():
        drawn = parameter.data
        _cast(parameter, DTYPES[setup.section.dtype])
        if load_weight is None and not resuming and parameter.dtype != drawn.dtype:
            unrounded[name] = functools.partial(torch.Tensor.cpu, drawn)
    if load_weight is not None:
        unrounded = _fill(module, load_weight, resuming, worker)
    return module, unrounded


def _empty_module(build_model: BuildModel, setup: TrainingSetup, worker: Worker) -> nn.Module:
    """The model without initial weights, on its device; under ZeRO-3 cut over the workers."""
    from deepspeed.runtime import zero
    from transformers.initialization import no_init_weights

    if zero_stage(setup.section) == 3:
        # Init would make buffers in bf16 too, and rotary frequencies need fp32: it decides the
        # device, and _cast the type.
        overrides = [zero.DeepSpeedTensorOverride.device]
        settings = _settings(setup, worker, BUCKET_ELEMENTS)
        placed = zero.Init(config_dict_or_path=settings, tensor_overrides=overrides)
    else:
        placed = worker.device
    with placed, no_init_weights():
        return build_model()


def _begin_with(module: nn.Module, start: str, section: Training, worker: Worker) -> None:
    """Put the weights of a stored adapter in place of the new ones; all workers read them."""
    from deepspeed.runtime.zero import GatheredParameters

    own = adapter_weights(module)
    stored = check_adapter(module, start, section.model)
    with GatheredParameters(list(own.values()), modifier_rank=0):
        for name, parameter in own.items():
            parameter.data.copy_(stored[name])


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    parameter.data = parameter.data.to(dtype)
    if hasattr(parameter, "ds_tensor"):
        parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)


def _fill(module: nn.Module, load_weight: LoadWeight, resuming: bool, worker: Worker) -> Unrounded:
    """Set every parameter and stored buffer on worker 0, one at a time; DeepSpeed broadcasts them.

    When resuming, parameters are only made finite.

    Returns:
        The parameters that are stored in another dtype than the model's.

    Raises:
        UserError: a weight has another shape than the model's.
    """
    from deepspeed.runtime.zero import GatheredParameters

    parameters = dict(module.named_parameters())
    unrounded: Unrounded = {}
    for name, tensor in stored_tensors(module).items():

        def put(name: str = name, tensor: torch.Tensor = tensor) -> bool:
            if resuming and name in parameters:
                tensor.data.zero_()
                return False
            value = load_weight(name)
            if value.shape != tensor.shape:
                raise UserError(
                    f"Loading the initial weights: {name} was expected with shape "
                    f"{tuple(tensor.shape)} and came with {tuple(value.shape)}. The weights and "
                    "config.json of the model do not belong together."
                )
            tensor.data.copy_(value)
            return value.dtype != tensor.dtype

        with GatheredParameters([tensor], modifier_rank=0):
            is_rounded = from_worker(0, worker, put)
        if name not in parameters:
            distributed.broadcast(tensor, src=0)
        elif is_rounded:
            unrounded[name] = functools.partial(load_weight, name)
    return unrounded
