"""From a recipe and options to a TrainConfig and the shape of its target."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

from aquiline.core.errors import AquilineError, CheckpointError
from aquiline.models.checkpoint import open_checkpoint, read_json
from aquiline.models.config import LlamaConfig
from aquiline.models.registry import resolve
from aquiline.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A Python file with ``recipe()``, and ``target_shape()`` if it knows that."""

    path: Path
    config: TrainConfig
    shape: LlamaConfig | None

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Run the file; AquilineError for whatever goes wrong in it."""
        spec = importlib.util.spec_from_file_location("recipe", path)
        if spec is None or spec.loader is None or not path.exists():
            raise AquilineError(f"--recipe {path}: no such Python file; see recipes/")
        module: ModuleType = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            config = module.recipe()
            shape = module.target_shape() if hasattr(module, "target_shape") else None
        except Exception as error:  # a recipe is the user's code: any error in it is theirs to see
            raise AquilineError(f"--recipe {path}: {type(error).__name__}: {error}") from None
        if not isinstance(config, TrainConfig):
            raise AquilineError(f"--recipe {path}: recipe() must return a TrainConfig")
        if shape is not None and not isinstance(shape, LlamaConfig):
            raise AquilineError(f"--recipe {path}: target_shape() must return a LlamaConfig")
        return cls(path, config, shape)


def configure(
    recipe: Recipe | None, target: str | None, data: str | None, changes: list[str]
) -> TrainConfig:
    """The recipe's configuration, or the defaults, with the options on top."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    values = {} if recipe is None else dataclasses.asdict(recipe.config)
    for name, value in (("target", target), ("data", data)):
        if value is not None:
            values[name] = value
        elif name not in values:
            raise AquilineError(f"--{name}: give it, or a --recipe")
    for change in changes:
        name, separator, text = change.partition("=")
        if name not in fields or not separator:
            raise AquilineError(f"--set {change}: give name=value with one of {sorted(fields)}")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    try:
        return TrainConfig(**values)
    except TypeError as error:
        raise AquilineError(f"--set: {error}") from None


def target_shape(config: TrainConfig, recipe: Recipe | None) -> LlamaConfig:
    """From the target's own config, or what the recipe says of a target that is not at hand."""
    try:
        path = resolve(config.target)
    except CheckpointError:
        if recipe is None or recipe.shape is None or config.target != recipe.config.target:
            raise
        return recipe.shape
    if config.teacher == "transformers":
        from aquiline.training.transformers_teacher import read_shape

        return read_shape(path)
    if path.suffix == ".gguf":
        return open_checkpoint(path).config
    return LlamaConfig.from_hf(read_json(path / "config.json"))
