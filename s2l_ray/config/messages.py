"""What is said of the config: what is wrong with it, and for --help every field."""

import difflib
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from s2l_ray.config.job import Config
from s2l_ray.config.section import short


def explain(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        # without the tags of unions
        loc = [piece for piece in item["loc"] if not str(piece).startswith("(")]
        dotted = ".".join(str(piece) for piece in loc)
        if item["type"] == "extra_forbidden":
            known = _fields_at(loc[:-1])
            close = difflib.get_close_matches(str(loc[-1]), known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            lines.append(f"{dotted}: unknown key.{hint} Known here: {', '.join(sorted(known))}")
        elif item["type"] == "missing":
            lines.append(f"{dotted}: expected a value, got none")
        elif item["type"] == "value_error":
            text = str(item["ctx"]["error"])
            lines += [f"{dotted}: {text}"] if dotted else text.split("; ")
        else:
            lines.append(
                f"{dotted}: {item['msg'][0].lower()}{item['msg'][1:]}, got {short(item['input'])}"
            )
    return lines


def _fields_at(loc: list[int | str]) -> list[str]:
    section: type[BaseModel] | None = Config
    for piece in loc:
        info = section.model_fields.get(str(piece)) if section else None
        section = _section_of(info) if info else None
    return [*(section.model_fields if section else []), *(["variants"] if not loc else [])]


def _section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, be it one of several kinds of value."""
    open_: list[Any] = [info.annotation]
    while open_:
        kind = open_.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        # of a union, or what Annotated is about
        open_ += getattr(kind, "__args__", ())
    return None


def describe(names: Sequence[str] | None = None) -> str:
    """Fields with their defaults, choices and meanings, for --help.

    Args:
        names: of the fields or sections, as `clusters.k`; None: every field.
    """
    entries = _describe(Config, "")
    return "\n".join(text for name, text in entries.items() if names is None or name in names)


def _describe(section: type[BaseModel], prefix: str) -> dict[str, str]:
    entries = {}
    for name, info in section.model_fields.items():
        inner, full = _section_of(info), f"{prefix}{name}"
        # A rule is a name or a section.
        if inner is None or isinstance(info.default, str):
            default = (
                info.get_default(call_default_factory=True)
                if not info.is_required()
                else "required"
            )
            choices = ", ".join(map(str, _choices(info)))
            entries[full] = (
                f"  {full} = {short(default)}{f'  (one of: {choices})' if choices else ''}\n"
                f"      {info.description}"
            )
        elif info.description:
            entries[full] = f"  {full}: {info.description}"
        if inner is not None:
            entries |= _describe(inner, f"{full}.")
    return entries


def _choices(info: FieldInfo) -> tuple[Any, ...]:
    """The values of a field that has a few to choose from."""
    return get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
