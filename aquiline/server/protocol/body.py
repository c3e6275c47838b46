"""Body: what every request body has in common.

A field is honoured, or refused by name. ``null`` means that a field is not given, as clients that
dump their own objects mean it. ``no_ops`` are fields that other servers know and whose values
listed there ask for nothing: those are accepted, others refused.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

ANY: tuple[object, ...] = ()  # every value asks for nothing
NoOps = dict[str, tuple[object, ...]]


class Body(BaseModel):
    """A JSON object; wrong types and unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")
    no_ops: ClassVar[NoOps] = {}

    @model_validator(mode="before")
    @classmethod
    def _given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        given = {name: value for name, value in body.items() if value is not None}
        for name in cls.no_ops.keys() & given.keys():
            accepted, value = cls.no_ops[name], given.pop(name)
            if accepted is not ANY and (type(value), value) not in [(type(a), a) for a in accepted]:
                shown = " or ".join(map(repr, accepted))
                raise ValueError(f"{name}: not served beyond {shown}; leave it out")
        return given
