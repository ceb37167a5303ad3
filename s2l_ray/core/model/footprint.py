"""How much memory one worker of a training takes at most, without making any weight.

What ZeRO keeps is counted. What a pass holds is measured: the model runs forward and backward on
fake tensors, which have a shape and a type but no content, under the memory tracker of torch
(`torch.distributed._tools.mem_tracker`). It takes seconds and no GPU, and knows every family that
transformers can build.
"""

import contextlib
import copy
import functools
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from s2l_ray.config import Model, Training, TrainingWorkers
from s2l_ray.config.training import PRESETS
from s2l_ray.core.model.architecture import build, load_config, parameters
from s2l_ray.core.model.cost import BYTES_OF_DTYPE, CUDA_CONTEXT, GPU_MEMORY
from s2l_ray.core.model.places import at_hand
from s2l_ray.core.model.zero import BUCKET_ELEMENTS, offloads, settings_of, zero_stage
from s2l_ray.errors import UserError

# A deep model is measured at two depths, and its other layers are taken to need as much each.
SHALLOW, DEEPER = 4, 8
# DeepSpeed's defaults: elements that ZeRO 1 sums over the workers at once, and weights that ZeRO 3
# has gathered at the same time.
ELEMENTS_SUMMED, ELEMENTS_GATHERED = 500_000_000, 1_000_000_000

# A weight of 4 bits, with its share of the scales that 64 of them have in common.
BYTES_OF_4_BIT = 0.56


@dataclass(frozen=True)
class Footprint:
    """Bytes of one training worker.

    Attributes:
        state: weights, gradients, master weights and AdamW's moments, while the training lasts.
        activations: of one pass, logits included; 0 where they are not known.
        exchange: gradients of a pass, buffers and gathered weights, which come and go.
    """

    state: int
    activations: int
    exchange: int

    @property
    def peak(self) -> int:
        """Activations are highest before the first gradient is there, the rest after the last."""
        return self.state + max(self.activations, self.exchange)


def footprint(section: Training, scaling: TrainingWorkers, tokens: int) -> Footprint | None:
    """What one worker's device holds.

    The counts were read from the storages that DeepSpeed 0.19 allocates, for each ZeRO stage, one
    and two workers, and two sizes of buckets (tests/bench/bench_memory.py).

    Args:
        tokens: of the longest rows.

    Returns:
        None where the model is not at hand.
    """
    whole_model = parameters(section.model)
    size = whole_model if section.adapter is None else adapter_size(section)
    if whole_model is None or size is None:
        return None
    stage, workers = zero_stage(section), scaling.workers
    weight, kept = BYTES_OF_DTYPE[section.dtype], BYTES_OF_DTYPE[section.state_dtype]
    bucket, summed, gathered = (
        min(size, most) for most in (BUCKET_ELEMENTS, ELEMENTS_SUMMED, ELEMENTS_GATHERED)
    )
    # Sums of gradients, or under ZeRO 2 the gradients of a pass, stand beside the weights.
    whole = {1: weight + kept, 2: 2 * weight, 3: 0}[stage] * size
    optimizer = 0 if offloads({"zero_optimization": {}, **settings_of(section)}) else 3 * kept
    shared = (optimizer + {1: 0, 2: 0, 3: weight + kept}[stage]) * size / workers
    halves = section.dtype == "bf16"
    exchange = {
        1: weight * size + 4 * (summed if halves else size / workers + bucket),
        2: (kept if halves else 8) * size / workers + (6 if halves else 4) * bucket,
        3: max(kept * size / workers, 2 * weight * gathered if workers > 1 else 0),
    }[stage]
    if stage == 3:
        shared += 4 * bucket
    if section.adapter is not None:
        each = BYTES_OF_4_BIT if section.adapter.kind == "qlora" else weight
        shared += each * whole_model / (workers if stage == 3 else 1)
    measured = None
    if at_hand(section.model):
        rows, again = scaling.micro_batch_of(section), scaling.activation_checkpointing
        measured = activation_bytes(section.model, section.dtype, rows, tokens, again)
    return Footprint(int(whole + shared), measured or 0, int(exchange))


def adapter_size(section: Training) -> int | None:
    """Parameters of a low-rank adapter: rank x (inputs + outputs) of each layer that has one.

    None where the model's config is not at hand.
    """
    import torch

    if section.adapter is None or not at_hand(section.model):
        return None
    with torch.device("meta"):
        model = build(load_config(section.model))
    output, wanted = model.get_output_embeddings(), section.adapter.modules
    return sum(
        section.adapter.rank * sum(module.weight.shape)
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None
        and module.weight.ndim == 2
        and module is not output
        and not isinstance(module, torch.nn.Embedding)
        and (not wanted or name.rpartition(".")[2] in wanted)
    )


def check_fits(section: Training, scaling: TrainingWorkers, name: str) -> None:
    """Refuse a training that the GPUs which it names cannot hold.

    Args:
        name: of the section, such as target.

    Raises:
        UserError: with what is needed, what there is, and the settings that fit.
    """
    memory = GPU_MEMORY.get(scaling.accelerator_type or "")
    if memory is None or not scaling.gpus:
        return
    usable, needed = memory - CUDA_CONTEXT, footprint(section, scaling, section.max_length)
    if needed is None or needed.peak <= usable:
        return
    what = (
        f"planning the {name}: one worker needs about {_gib(needed.peak)} (weights, gradients and "
        f"AdamW's state {_gib(needed.state)}, activations of {scaling.micro_batch_of(section)} "
        f"rows of {section.max_length:,} tokens {_gib(needed.activations)}, gradients and weights "
        f"on their way {_gib(needed.exchange)}), and an {scaling.accelerator_type} has "
        f"{_gib(usable)}."
    )
    changed: list[str] = []
    least = needed.peak
    for field, value in _savings(section, scaling):
        tried_section, tried_scaling, shown = section, scaling, f"{name}.{field}"
        if field in TrainingWorkers.model_fields:
            tried_scaling = scaling.model_copy(update={field: value})
            shown = f"scaling.{shown}"
        else:
            tried_section = section.model_copy(update={field: value})
        found = footprint(tried_section, tried_scaling, section.max_length)
        if found is None or found.peak >= least:
            continue
        section, scaling, least = tried_section, tried_scaling, found.peak
        changed = [each for each in changed if not each.startswith(f"{shown} = ")]
        changed.append(f"{shown} = {str(value).lower()}")
        if least <= usable:
            raise UserError(f"{what} It fits, with {_gib(least)}, if you set {', '.join(changed)}.")
    raise UserError(
        f"{what} Even {', '.join(changed) or 'the smallest settings'} would need {_gib(least)}: "
        f"raise scaling.{name}.workers, lower {name}.max_length, or choose another GPU or model."
    )


def _savings(section: Training, scaling: TrainingWorkers) -> Iterator[tuple[str, Any]]:
    """Fields and values that need less memory, those that cost least first."""
    yield "activation_checkpointing", True
    rows = scaling.micro_batch
    while rows > 1 and rows % 2 == 0:
        rows //= 2
        yield "micro_batch", rows
    if section.deepspeed in PRESETS:
        later = list(PRESETS)[list(PRESETS).index(section.deepspeed) + 1 :]
        yield from (("deepspeed", preset) for preset in later)
    if section.dtype == "bf16":
        yield "state_dtype", "bf16"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def activation_bytes(
    model: Model, dtype: str, rows: int, tokens: int, checkpointing: bool = False
) -> int | None:
    """Most bytes that a forward and backward pass holds beside weights, gradients and buffers.

    All tokens are taken to be learned, so it is the most for rows of this length: activations,
    logits of all positions and their gradients.

    Args:
        dtype: of the weights, bf16 or fp32.
        rows, tokens: of the micro-batch.
        checkpointing: activations of a layer are computed again in the backward pass.

    Returns:
        None where the family has a step whose shapes depend on numbers, such as experts that get
        as many tokens as are sent to them.
    """
    one_row = _of_one_row(model.model_dump_json(), dtype, tokens, checkpointing)
    return None if one_row is None else one_row * rows


@functools.lru_cache(maxsize=64)
def _of_one_row(model: str, dtype: str, tokens: int, checkpointing: bool) -> int | None:
    config = load_config(Model(**json.loads(model)))
    layers = int(config.num_hidden_layers)
    if layers <= DEEPER:
        return _measured(config, dtype, tokens, checkpointing)
    shallow, deeper = (
        _measured(_with_layers(config, depth), dtype, tokens, checkpointing)
        for depth in (SHALLOW, DEEPER)
    )
    if shallow is None or deeper is None:
        return None
    each = (deeper - shallow) / (DEEPER - SHALLOW)
    return int(deeper + each * (layers - DEEPER))


def _with_layers(config: Any, layers: int) -> Any:
    """The config of the same model with fewer layers; lists that have an entry a layer are cut."""
    fewer, before = copy.deepcopy(config), config.num_hidden_layers
    fewer.num_hidden_layers = layers
    for name, value in vars(fewer).items():
        if isinstance(value, list) and len(value) == before:
            setattr(fewer, name, value[:layers])
    return fewer


@contextlib.contextmanager
def _without_packed_masks() -> Iterator[None]:
    """Have transformers take rows for whole ones.

    It looks at the values of position ids for rows that are packed. Fake tensors have none, and so
    it would make a mask of all positions, which real rows do without.
    """
    from transformers import masking_utils

    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


def _measured(config: Any, dtype: str, tokens: int, checkpointing: bool) -> int | None:
    import torch
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.nn import functional as F

    from s2l_ray.core.model.output_layer import training_logits

    with warnings.catch_warnings(), FakeTensorMode(), _without_packed_masks():
        warnings.simplefilter("ignore")
        model = build(config, dtype, dropout=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        ids_BL = torch.zeros(1, tokens, dtype=torch.int64)
        where_M = torch.arange(tokens - 1)
        tracker = MemTracker()
        tracker.track_external(model)
        try:
            with tracker:
                logits_MV = training_logits(model, ids_BL, where_M).float()
                targets_M = ids_BL.flatten()[where_M]
                F.cross_entropy(logits_MV, targets_M, reduction="none").sum().backward()
        except (DataDependentOutputException, DynamicOutputShapeException):
            return None
        peak = tracker.get_tracker_snapshot("peak")
    held = 0
    for of_device in peak.values():
        kinds = {str(getattr(kind, "value", kind)): size for kind, size in of_device.items()}
        lasting = sum(kinds.get(name, 0) for name in ("Parameter", "Buffer", "Gradient"))
        held += kinds["Total"] - lasting
    return held
