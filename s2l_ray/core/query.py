"""Queries to data that is spread over processes: what a shard answers, how answers become one."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

Shard = TypeVar("Shard", contravariant=True)
Answer = TypeVar("Answer")


class Query(Protocol[Shard, Answer]):
    """A query as a value: it travels to every shard; answers are merged in any order, along any tree.

    For shards a and b of rows that make up c, `merge([of(a), of(b)])` equals `of(c)`.
    """

    def of(self, shard: Shard) -> Answer:
        """The answer of one shard."""
        ...

    def merge(self, answers: Iterable[Answer]) -> Answer:
        """The answer of all rows, from at least one answer; merged ones may be merged again."""
        ...
