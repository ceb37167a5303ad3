"""The section `scaling`: where and how fast; recorded with an artifact, never part of its name."""

from pydantic import Field

from s2l_ray.config.section import Section


class Scaling(Section):
    proxy_workers: int = Field(1, ge=1, description="data-parallel workers per proxy")
    proxy_micro_batch: int = Field(
        16, ge=1, description="examples per worker and forward pass; the accumulation follows"
    )
    target_workers: int = Field(1, ge=1, description="data-parallel workers of the target")
    target_micro_batch: int = Field(4, ge=1, description="examples per worker and forward pass")
    gpus_per_worker: float = Field(
        0.0, ge=0, description="GPUs of one training worker, scorer or evaluator"
    )
    cpus_per_worker: float | None = Field(
        None,
        gt=0,
        description="CPUs of one training worker, scorer or evaluator; default: one, or what leaves room for reading",
    )
    threads: int = Field(1, ge=1, description="CPU threads of torch in a worker")
    side_by_side: int = Field(
        1,
        ge=1,
        description="artifacts made at the same time where none needs another, such as the targets of several variants; trainings "
        "share the CPUs and GPUs equally",
    )
    readers: int = Field(
        2, ge=1, description="tasks that read and tokenise for one training worker"
    )
    scorers: int = Field(
        2,
        ge=1,
        description="actors that score, and that evaluate; fewer start when the cluster is smaller",
    )
    shards: int = Field(2, ge=1, description="k-means shard actors")
    shard_memory: int | None = Field(
        None,
        ge=1,
        description="bytes that one shard actor may use for rows; where its parts need more, it reads them again every round. "
        "Default: it holds all",
    )
    max_failures: int = Field(
        3, ge=0, description="worker or node losses that a training survives before the run stops"
    )
    local_cpus: int | None = Field(
        None, ge=1, description="CPUs of a Ray started on this machine; default: all"
    )
    local_object_store: int = Field(
        500_000_000,
        ge=80_000_000,
        description="bytes of shared memory of a Ray started on this machine",
    )
