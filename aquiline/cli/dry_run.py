"""``aquiline train --dry-run``: what a run would take, printed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from aquiline.core.errors import AquilineError
from aquiline.models.config import LlamaConfig
from aquiline.training.budget import CARDS, plan
from aquiline.training.config import TrainConfig
from aquiline.training.corpus import Corpus


@dataclass(frozen=True)
class Rent:
    """``gpus`` cards by name, the share of their peak that is reached, dollars an hour and card."""

    card: str
    gpus: int
    utilisation: float
    price: float

    def __post_init__(self) -> None:
        if self.card not in CARDS:
            raise AquilineError(f"--card {self.card}: one of {', '.join(CARDS)}")


def print_budget(
    config: TrainConfig, target: LlamaConfig, console: Console, rent: Rent
) -> dict[str, Any]:
    """Print it; the same figures by name. A corpus says how much of it is the assistant's."""
    scored, epochs = 1.0, ""
    if Path(config.data).is_dir():
        info = Corpus.open(config.data).info
        scored = info.assistant_tokens / info.tokens
        epochs = f", {config.tokens / info.tokens:.2f} epochs"
    budget, card = plan(config, target, rent.gpus, scored), CARDS[rent.card]
    hours = budget.hours(card, rent.gpus, rent.utilisation)
    cost = hours * rent.gpus * rent.price
    flops = "  ".join(f"{name} {value / 1e6:,.0f}M" for name, value in budget.flops.items())
    memory = "  ".join(f"{name} {value / 1e9:.2f}" for name, value in budget.memory.items())
    fits = budget.bytes_per_rank <= card.memory
    lines = (
        f"parameters   teacher {budget.teacher:,}  draft {budget.draft:,}"
        + (f"  its head {budget.head:,}" if budget.head else ""),
        f"tokens       {budget.tokens:,} in {budget.steps:,} steps of "
        f"{budget.tokens // budget.steps:,}{epochs}",
        f"FLOPs/token  {budget.flops_per_token / 1e6:,.0f}M  ({flops})",
        f"GB per rank  {budget.bytes_per_rank / 1e9:.1f} of {card.memory / 1e9:.0f}  ({memory})",
        f"time         {hours:.2f} h on {rent.gpus} x {rent.card} at {rent.utilisation:.0%} of "
        "the bf16 peak",
        f"cost         ${cost:,.2f} at ${rent.price:.2f} an hour and card",
    )
    for line in lines:
        console.print(line, soft_wrap=True)
    if not fits:
        console.print(
            "it does not fit: lower tokens_per_batch, set recompute or shard, or add GPUs"
        )
    return dataclasses.asdict(budget) | dataclasses.asdict(rent) | {
        "scored": scored, "hours": hours, "cost": cost, "fits": fits,
    }  # fmt: skip
