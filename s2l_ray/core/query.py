"""Queries to data that is spread over processes: what a shard answers, how answers become one."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

Shard = TypeVar("Shard")
Queried = TypeVar("Queried", contravariant=True)
Asked = TypeVar("Asked", covariant=True)
Answer = TypeVar("Answer")


class Query(Protocol[Queried, Answer]):
    """A query as a value: it travels to every shard; answers are merged in any order and tree.

    For shards a and b of rows that make up c, `merge([of(a), of(b)])` equals `of(c)`.
    """

    def of(self, shard: Queried) -> Answer:
        """The answer of one shard."""
        ...

    def merge(self, answers: Iterable[Answer]) -> Answer:
        """The answer of all rows, from at least one answer; merged ones may be merged again."""
        ...


class Ask(Protocol[Asked]):
    """Puts a query to all shards, wherever they are, and returns their merged answer."""

    def __call__(self, query: Query[Asked, Answer]) -> Answer:
        """The answer of all rows."""
        ...


def ask_here(*shards: Shard) -> Ask[Shard]:
    """Asks shards of this process, one after the other."""

    def ask(query: Query[Shard, Answer]) -> Answer:
        return query.merge(query.of(shard) for shard in shards)

    return ask
