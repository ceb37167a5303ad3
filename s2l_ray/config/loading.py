"""From a YAML file and overrides to a job: one message lists every problem of the config."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from s2l_ray.config.job import Config, Job
from s2l_ray.config.messages import explain
from s2l_ray.config.section import merge, short
from s2l_ray.errors import UsageError, UserError

# Deeper than any config, and not too deep for those who read it.
MOST_LEVELS = 50
# Values after all anchors are written out.
MOST_VALUES = 100_000


class JobYaml(yaml.SafeLoader):
    """YAML 1.2's numbers (1e-3 is one), and no key twice, which would silently drop the first."""

    level = 0

    def get_single_node(self) -> yaml.Node | None:
        """The text as nodes, unless it is deeper or larger than a config can be."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _values(node, {}) > MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"expected at most {MOST_VALUES:,} values; its anchors stand for more",
                problem_mark=node.start_mark,
            )
        return node

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.level += 1
        if self.level > MOST_LEVELS:
            raise yaml.MarkedYAMLError(
                problem=f"expected at most {MOST_LEVELS} levels of nesting",
                problem_mark=self.peek_event().start_mark,
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self.level -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; one that anchors lead to counts as often as they do."""
    if id(node) not in known:
        # One inside itself has no end.
        known[id(node)] = MOST_VALUES
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [each for item in inner for each in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_values(each, known) for each in flat)
    return known[id(node)]


JobYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load(path: str | None, overrides: list[str], base: dict[str, Any] | None = None) -> Job:
    """Read a job file (or take `base`), apply overrides, resolve and check every variant.

    Args:
        path: YAML file, or None to use `base`.
        overrides: `section.field=value`, values in YAML, changes the job below its variants, so
            what a variant sets itself stays; `variants.NAME.section.field=value` changes one
            variant.

    Raises:
        UserError: listing every unknown key, wrong type and impossible combination.
    """
    where = path or "the job"
    raw = merge({}, base or {}) if path is None else _read_yaml(path)
    variants = _variants(raw.pop("variants", None) or {"s2l": {}}, where)
    common, by_variant = _parse_overrides(overrides, variants)
    resolved: dict[str, Config] = {}
    problems: list[str] = []
    for name, changes in variants.items():
        tree = raw
        try:
            for dotted, value in [*common, *(changes or {}).items(), *by_variant.get(name, [])]:
                tree = merge(tree, _nest(str(dotted), value))
            resolved[name] = Config.model_validate(tree)
        except ValidationError as error:
            problems += [line for line in explain(error) if line not in problems]
    if problems:
        raise UserError(
            f"reading {where}: {len(problems)} problem(s) in the configuration.\n  - "
            + "\n  - ".join(problems)
        )
    shared = {
        config.run.model_dump_json() + config.scaling.model_dump_json()
        for config in resolved.values()
    }
    if len(shared) > 1:
        raise UserError(
            f"reading {where}: variants must not change run or scaling; set these for the whole "
            "job."
        )
    return Job(resolved)


def with_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A job's tree with `section.field=value` of a command line merged into it, unchecked."""
    common, _ = _parse_overrides(overrides, {})
    for dotted, value in common:
        tree = merge(tree, _nest(dotted, value))
    return tree


def _variants(given: Any, where: str) -> dict[str, dict[Any, Any] | None]:
    """The overrides of each variant, by names that folders can have too."""
    if not isinstance(given, dict) or not all(isinstance(v, dict | None) for v in given.values()):
        raise UserError(
            f"reading {where}: expected variants to map each name to overrides (section.field: "
            f"value), got {short(given)}."
        )
    variants = {str(name): changes for name, changes in given.items()}
    for name in variants:
        if not name.isprintable() or "/" in name or name in ("", ".", ".."):
            raise UserError(
                f"reading {where}: expected names of variants that can be names of folders, "
                f"without / and control characters, got {name!r}. Rename it."
            )
    return variants


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        # a SafeLoader
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), JobYaml)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"reading the job file {path}: {error}. Expected a YAML file that can be read."
        ) from None
    if not isinstance(raw, dict):
        raise UserError(
            f"reading the job file {path}: expected sections (a mapping), got {type(raw).__name__}."
        )
    return raw


def _parse_overrides(
    overrides: list[str], variants: dict[str, Any]
) -> tuple[list[tuple[str, Any]], dict[str, list[tuple[str, Any]]]]:
    common: list[tuple[str, Any]] = []
    by_variant: dict[str, list[tuple[str, Any]]] = {}
    for text in overrides:
        key, equals, value = text.removeprefix("--").partition("=")
        if not equals or "." not in key:
            raise UsageError(
                f"reading the command line: expected --section.field=value, got {text!r}. See "
                "--help."
            )
        try:
            parsed = yaml.load(value, JobYaml)
        except (ValueError, yaml.YAMLError):
            raise UsageError(
                f"reading the command line: the value of {text!r} is not YAML. Put it in quotes."
            ) from None
        if key.startswith("variants."):
            _, name, *rest = key.split(".", 2)
            if name not in variants or not rest:
                raise UsageError(
                    "reading the command line: expected variants.NAME.section.field with NAME one "
                    f"of {sorted(variants)}, got {key!r}."
                )
            by_variant.setdefault(name, []).append((rest[0], parsed))
        else:
            common.append((key, parsed))
    return common, by_variant


def _nest(dotted: str, value: Any) -> dict[str, Any]:
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value
