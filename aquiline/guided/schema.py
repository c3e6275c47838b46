"""JSON schemas: what would not be enforced is refused by name, with the place where it stands.

Every keyword is either enforced or an annotation; the compiler ignores many others without a word
(found by trying each on xgrammar 0.2.8), so a keyword that is not listed here is an error. Of what
a schema admits a text may have less, never more:

    object   properties come in the order of the schema; one that lists properties is closed
    space    at most 16 white characters in a row
    string   with a length, a pattern or a format: no escapes
    number   with a range: no exponent
    format   the shape alone: a date may be the 31st of any month

Why objects are closed: an undeclared key may spell a declared one with escapes ("\\u0061" is "a"),
and then its value would escape the declared schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from aquiline.core.errors import AquilineError
from aquiline.guided.pattern import check_pattern, whole_string

_ANNOTATIONS = frozenset({
    "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly",
    "discriminator", "$schema", "$id", "$comment", "$defs", "definitions",
})  # fmt: skip
_RANGE = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_LENGTHS = frozenset({"minLength", "maxLength"})
_ASSERTIONS: Mapping[str, frozenset[str]] = {
    "null": frozenset(),
    "boolean": frozenset(),
    "integer": _RANGE | {"multipleOf"},
    "number": _RANGE,
    "string": _LENGTHS | {"pattern", "format"},
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}),
    "object": frozenset(
        {"properties", "required", "additionalProperties", "minProperties", "maxProperties"}
    ),
}
# What the value of a keyword is, where this module reads it.
_VALUES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("$defs", "definitions", "properties"), (Mapping,)),
    **dict.fromkeys(("enum", "required", "prefixItems", "anyOf", "oneOf", "allOf"), (list,)),
    "$ref": (str,), "format": (str,), "type": (str, list),
}  # fmt: skip
_COMBINERS = ("anyOf", "oneOf", "allOf")
_KNOWN = _ANNOTATIONS.union({"$ref", "type", "enum", "const"}, _COMBINERS, *_ASSERTIONS.values())
_FORMATS = frozenset({
    "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri",
    "uri-reference", "uri-template", "uuid",
})  # fmt: skip


def checked(schema: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The schema as it is compiled, and the JSON pointers of its parts, outermost first.

    Raises:
        AquilineError: a keyword, or a combination, that would not be enforced exactly.
    """
    walk = _Walk()
    try:
        root = walk.visit(schema, "#")
    except RecursionError:
        raise AquilineError("json: the schema is nested too deeply; flatten it") from None
    for where, reference in walk.references:
        if reference not in walk.parts or "~" in reference:
            _refuse(where, "$ref", f"{reference!r} is not a part of this schema", "put it in $defs")
    for where, branches in walk.choices:
        for index, branch in enumerate(branches):
            for other in branches[:index]:
                if not walk.disjoint(branch, other):
                    _refuse(
                        f"{where}/{index}", "oneOf", "a value may fit two of the branches",
                        "use anyOf, or tell them apart by a required const",
                    )  # fmt: skip
    return root, tuple(walk.parts)


def _refuse(where: str, keyword: str, fault: str, remedy: str) -> NoReturn:
    raise AquilineError(f"json: {where}: {keyword}: {fault}; {remedy}")


class _Walk:
    """One pass over a schema: its parts by JSON pointer, and what can be judged only afterwards."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}
        self.references: list[tuple[str, str]] = []
        self.choices: list[tuple[str, list[Any]]] = []

    def visit(self, node: object, where: str) -> Any:
        """A part as it is compiled."""
        if node is True:
            self.parts[where] = True
            return True
        if not isinstance(node, Mapping):
            raise AquilineError(f"json: {where}: {node!r} admits no value; give a schema")
        self.parts[where] = out = dict(node)
        for keyword in node:
            if keyword not in _KNOWN and not keyword.startswith("x-"):
                _refuse(where, keyword, "the keyword is not supported", "remove it")
            kinds = _VALUES.get(keyword, (object,))
            names = node[keyword] if keyword in ("type", "required") else ()
            if not isinstance(node[keyword], kinds) or any(type(name) is not str for name in names):
                _refuse(where, keyword, f"{node[keyword]!r} is malformed", "see its definition")
        for keyword in ("$defs", "definitions"):
            if keyword in node:
                out[keyword] = self._each(node, keyword, where)
        asserted = [k for k in node if k not in _ANNOTATIONS and not k.startswith("x-")]
        heads = [k for k in ("$ref", *_COMBINERS, "enum", "const") if k in asserted]
        if not heads:
            self._typed(out, set(asserted), where)
            return out
        head = heads[0]
        others = set(asserted) - {head, "type" if head in ("enum", "const") else head}
        if others:
            _refuse(
                where, min(others), f"not enforced beside {head}", "move it into a part of its own"
            )
        if head == "$ref":
            self.references.append((where, node["$ref"]))
        elif head in _COMBINERS:
            out[head] = self._branches(node[head], head, where)
        elif "type" in node:
            _check_values(out, _types(out, where), where)
        return out

    def _branches(self, branches: list[Any], head: str, where: str) -> list[Any]:
        if not branches:
            _refuse(where, head, "the list is empty", "give at least one schema")
        if head == "allOf" and len(branches) > 1:
            _refuse(where, head, "several parts are not enforced together", "merge them into one")
        found = [self.visit(b, f"{where}/{head}/{i}") for i, b in enumerate(branches)]
        if head == "oneOf":
            self.choices.append((f"{where}/{head}", found))
        return found

    def _each(self, node: Mapping[str, Any], keyword: str, where: str) -> dict[str, Any]:
        """The schemas of a mapping by name."""
        named = node[keyword]
        names = {name: name.replace("~", "~0").replace("/", "~1") for name in named}
        return {n: self.visit(s, f"{where}/{keyword}/{names[n]}") for n, s in named.items()}

    def _typed(self, out: dict[str, Any], asserted: set[str], where: str) -> None:
        """A part without combiners: every keyword must belong to a type that is given."""
        types = _types(out, where)
        allowed = frozenset().union(*(_ASSERTIONS[name] for name in types))
        for keyword in sorted(asserted - {"type"} - allowed):
            owner = next(name for name, own in _ASSERTIONS.items() if keyword in own)
            _refuse(where, keyword, f"it constrains only type {owner!r}", "give that type")
        self._object(out, where)
        self._array(out, where)
        if "multipleOf" in out and ("number" in types or _RANGE & asserted):
            _refuse(where, "multipleOf", "enforced only for integers without a range", "remove it")
        shapes = [set(shape) & asserted for shape in (_LENGTHS, {"pattern"}, {"format"})]
        if len([shape for shape in shapes if shape]) > 1:
            _refuse(where, " and ".join(sorted(set().union(*shapes))), "not enforced together",
                    "say it all in one pattern")  # fmt: skip
        _string(out, where)

    def _object(self, out: dict[str, Any], where: str) -> None:
        if "properties" in out:
            out["properties"] = self._each(out, "properties", where)
            if out.setdefault("additionalProperties", False) is not False:
                _refuse(where, "additionalProperties", "not enforced beside properties",
                        "list every property, or none")  # fmt: skip
        elif isinstance(out.get("additionalProperties", True), Mapping):
            part = out["additionalProperties"]
            out["additionalProperties"] = self.visit(part, f"{where}/additionalProperties")
        declared = out.get("properties", {})
        for name in out.get("required", ()):
            if name not in declared:
                _refuse(where, "required", f"{name!r} is not declared", "add it to properties")
        for keyword in ("minProperties", "maxProperties"):
            if keyword in out and "properties" not in out:
                _refuse(where, keyword, "enforced only beside properties", "list the properties")

    def _array(self, out: dict[str, Any], where: str) -> None:
        if isinstance(out.get("items"), list):
            _refuse(where, "items", "a list is the old form", "use prefixItems")
        if out.get("items", True) not in (True, False):
            out["items"] = self.visit(out["items"], f"{where}/items")
        if "prefixItems" in out:
            out["prefixItems"] = [
                self.visit(part, f"{where}/prefixItems/{i}")
                for i, part in enumerate(out["prefixItems"])
            ]
        if out.get("uniqueItems", False) is not False:
            _refuse(where, "uniqueItems", "not enforced", "remove it")

    def disjoint(self, a: Any, b: Any) -> bool:
        """Whether it is plain that no value fits both parts."""
        a, b = self._resolved(a), self._resolved(b)
        values = _values(a), _values(b)
        if values[0] is not None and values[1] is not None:
            return not any(_same(x, y) for x in values[0] for y in values[1])
        types = set(_value_types(a)), set(_value_types(b))
        if not types[0] & types[1]:
            return True
        if types != ({"object"}, {"object"}):
            return False
        tags = set(a.get("required", ())) & set(b.get("required", ()))
        return any(self.disjoint(a["properties"][t], b["properties"][t]) for t in tags)

    def _resolved(self, part: Any) -> Mapping[str, Any]:
        """The part that a chain of references ends at; one that never ends admits everything."""
        for _ in self.parts:
            if part is True or "$ref" not in part:
                break
            part = self.parts[part["$ref"]]
        return {} if part is True else part


def _string(out: dict[str, Any], where: str) -> None:
    """Lengths become a pattern: as lengths they would let control characters through."""
    if "format" in out and out["format"] not in _FORMATS:
        _refuse(where, "format", f"{out['format']!r} is not known", f"one of {sorted(_FORMATS)}")
    if "pattern" in out:
        check_pattern(out["pattern"], f"json: {where}: pattern", in_json=True)
        out["pattern"] = whole_string(out["pattern"])
    if _LENGTHS & set(out):
        low, high = out.pop("minLength", 0), out.pop("maxLength", None)
        for name, value in (("minLength", low), ("maxLength", high)):
            if not (value is None or (type(value) is int and value >= 0)):
                _refuse(where, name, f"{value!r} is not a count", "give an integer from 0")
        if high is not None and low > high:
            _refuse(where, "minLength", f"{low} is greater than maxLength {high}", "lower it")
        out["pattern"] = rf'^[^"\\\x00-\x1f]{{{low},{"" if high is None else high}}}$'


def _types(node: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = node.get("type", ())
    types = (given,) if isinstance(given, str) else tuple(given)
    for name in types:
        if name not in _ASSERTIONS:
            _refuse(where, "type", f"{name!r} is not known", f"one of {sorted(_ASSERTIONS)}")
    return types


def _values(node: Mapping[str, Any]) -> list[Any] | None:
    return [node["const"]] if "const" in node else node.get("enum")


def _same(a: object, b: object) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _types_of(value: object) -> Iterator[str]:
    """The types that a value has."""
    if value is None or isinstance(value, bool):
        yield "null" if value is None else "boolean"
    elif isinstance(value, int | float):
        yield "number"
        if value == int(value):
            yield "integer"
    else:
        yield (
            "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"
        )


def _value_types(node: Mapping[str, Any]) -> Iterator[str]:
    """The types that a value of a part may have."""
    values = _values(node)
    if values is not None:
        for value in values:
            yield from _types_of(value)
        return
    types = _types(node, "#") if "type" in node else tuple(_ASSERTIONS)
    yield from types
    if "number" in types:
        yield "integer"
    if "integer" in types:
        yield "number"


def _check_values(node: Mapping[str, Any], types: tuple[str, ...], where: str) -> None:
    for value in _values(node) or ():
        if not set(types) & set(_types_of(value)):
            _refuse(
                where,
                "type",
                f"{value!r} is not of type {list(types)}",
                "remove the one or the other",
            )
