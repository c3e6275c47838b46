"""What a user asks of the form of a text: one grammar, given in one of five ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from aquiline.core.errors import AquilineError

MAX_GRAMMAR = 2**20  # characters of a schema, expression or grammar


@dataclass(frozen=True)
class StructuredOutput:
    """The form that a whole text must have; exactly one field is given.

    Two of the same content are equal and hash alike, so that one grammar is compiled once.

    Attributes:
        json: a JSON schema, as a mapping or as text; kept as text, keys in their order, since
            properties are written in that order.
        json_object: any JSON object.
        regex: an expression that matches the whole text.
        choice: one of these texts.
        grammar: an EBNF grammar; its rule ``root`` matches the whole text.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise AquilineError(f"json_object={self.json_object!r}: give true or false")
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            known = ", ".join(f.name for f in fields(self))
            raise AquilineError(
                f"structured output: {' and '.join(given) or 'nothing'} given; give exactly one "
                f"of {known}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _texts(self.choice))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise AquilineError(f"{name}={value!r}: give a text that is not empty")
        size = max(map(len, (str(self.json), str(self.regex), str(self.grammar))))
        if size > MAX_GRAMMAR:
            raise AquilineError(f"{given[0]}: {size} characters; give at most {MAX_GRAMMAR}")

    @classmethod
    def of(cls, value: object) -> StructuredOutput:
        """The same, or from a mapping of its fields; an unknown one is refused by name."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise AquilineError(
                f"structured_outputs={value!r}: give a StructuredOutput, or a mapping such as "
                "{'json': schema}"
            )
        known = [f.name for f in fields(cls)]
        for name in value:
            if name not in known:
                raise AquilineError(
                    f"structured_outputs: unknown field {name!r}; known are {known}"
                )
        return cls(**value)

    @property
    def field(self) -> str:
        """The name of the field that is given."""
        return next(f.name for f in fields(self) if getattr(self, f.name) not in (None, False))


def _schema_text(schema: object) -> str:
    """The schema as JSON text, its keys in the order given."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(value, Mapping):
            raise AquilineError("json: give a JSON schema: an object")
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_refuse)
    except RecursionError:
        raise AquilineError("json: the schema is nested too deeply; flatten it") from None
    except AquilineError:
        raise
    except (TypeError, ValueError) as error:
        raise AquilineError(f"json: not valid JSON ({error}); correct it") from None


def _refuse(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _texts(choice: object) -> tuple[str, ...]:
    texts = tuple(choice) if isinstance(choice, list | tuple) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise AquilineError(f"choice={choice!r}: give a list of texts, at least one")
    return texts
