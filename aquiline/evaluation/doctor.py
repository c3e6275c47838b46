"""The doctor: why a draft's acceptance is what it is, by measuring it and its suspects.

All measurements decode the same prompts with the real prefill and round. Greedy text is the
target's whatever the draft, so two drafts are compared on the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aquiline.core.errors import CheckpointError
from aquiline.core.params import DraftMethod, SamplingParams
from aquiline.decoding.loop import decode_prompts
from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.evaluation.suspects import suspects
from aquiline.models.draft_checkpoint import build_draft
from aquiline.models.draft_files import DraftFiles
from aquiline.models.llama import Llama
from aquiline.speculation.tree import TreeShape

# Tokens per call of public one-layer drafts of 7B to 8B targets on MT-Bench, greedy, chain of 3.
EXPECTED: dict[DraftMethod, float] = {"eagle": 2.2, "eagle3": 2.6}
EXPECTED_CHAIN = 3
LOW = 0.5  # of what is expected beyond the bonus token
# A suspect counts if it adds this much to TPC, and this share of what the draft has.
CLEAR_GAIN, CLEAR_SHARE = 0.12, 0.15
HOLDS_ON = 0.5  # a later token, given the one before, against the first
COVERED = 0.9  # of the text, by a reduced vocabulary


@dataclass(frozen=True)
class Measurement:
    """Acceptance on the prompts.

    Attributes:
        by_depth: share of rounds that accepted a draft token at depth 1, 2, ...
        covered: share of the text's tokens that the draft's vocabulary has.
    """

    temperature: float
    rounds: int
    by_depth: tuple[float, ...]
    covered: float

    @property
    def tokens_per_call(self) -> float:
        return 1 + sum(self.by_depth)


@dataclass(frozen=True)
class Tried:
    """A suspect that loaded, measured greedily; ``found`` if it accepts clearly more."""

    cause: str
    remedy: str
    tokens_per_call: float
    found: bool


@dataclass(frozen=True)
class Acceptance:
    """What running the draft has shown.

    Attributes:
        greedy, sampled: at temperatures 0 and 1; None for a draft that does not load.
        tried: every suspect that loads.
        complaints: what is wrong with the acceptance itself; empty if it is as expected.
    """

    greedy: Measurement | None
    sampled: Measurement | None
    tried: tuple[Tried, ...]
    complaints: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        return self.greedy is not None and not self.complaints and not self.causes

    @property
    def causes(self) -> list[Tried]:
        """What was found, the likeliest first."""
        return sorted((t for t in self.tried if t.found), key=lambda t: -t.tokens_per_call)


@dataclass(frozen=True)
class Examination:
    """What to measure on: token ids of prompts, tokens of each answer, the length of the chain."""

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    chain: int
    end_tokens: frozenset[int]

    @property
    def positions(self) -> int:
        """What target and draft must have room for."""
        return max(map(len, self.prompts)) + self.max_tokens + 2 * (self.chain + 1)


def examine(
    files: DraftFiles,
    target: Llama,
    examination: Examination,
    report: Callable[[str], None] = lambda _: None,
) -> Acceptance:
    """Measure the draft, greedy and sampled, then each suspect; ``report`` hears what is next."""
    report("the draft, T=0")
    greedy = _try(files, target, examination, 0.0)
    report("the draft, T=1")
    sampled = None if greedy is None else _try(files, target, examination, 1.0)
    base = 1.0 if greedy is None else greedy.tokens_per_call
    needed = base + max(CLEAR_GAIN, CLEAR_SHARE * (base - 1))
    tried = []
    for suspect in suspects(files, target.config):
        report(suspect.cause)
        other = _try(suspect.files, target, examination, 0.0)
        if other is not None:
            tpc = other.tokens_per_call
            tried.append(Tried(suspect.cause, suspect.remedy, tpc, tpc >= needed))
    complaints = () if greedy is None else tuple(_complaints(greedy, files.method))
    return Acceptance(greedy, sampled, tuple(tried), complaints)


def _try(
    files: DraftFiles, target: Llama, examination: Examination, temperature: float
) -> Measurement | None:
    """None if the files do not make a draft."""
    try:
        loaded = build_draft(files, target, examination.positions)
    except CheckpointError:
        return None
    drafter = Drafter(loaded.draft, loaded.head)
    return measure(DecoderModels(target, drafter), examination, temperature)


def measure(models: DecoderModels, examination: Examination, temperature: float) -> Measurement:
    """Decode the prompts as one batch with a chain."""
    shape = TreeShape.chain(examination.chain)
    params = SamplingParams(temperature=temperature)
    reached, said = [0] * (shape.depth + 1), list[int]()
    for one in decode_prompts(
        models, examination.prompts, shape, examination.max_tokens, examination.end_tokens, params
    ):
        accepted, tokens = one.verdict.accepted.tolist(), one.verdict.tokens.tolist()
        for depth, row in zip(accepted, tokens, strict=True):
            said += row[: depth + 1]
            for level in range(depth + 1):
                reached[level] += 1
    rounds = reached[0]
    by_depth = tuple(count / max(rounds, 1) for count in reached[1:])
    ids = models.drafter.head.token_ids if models.drafter is not None else None
    known = None if ids is None else set(ids.tolist())
    covered = 1.0 if known is None else sum(t in known for t in said) / max(len(said), 1)
    return Measurement(temperature, rounds, by_depth, covered)


def _complaints(greedy: Measurement, method: DraftMethod) -> list[str]:
    found = []
    first, *later = greedy.by_depth
    if method == "eagle3" and greedy.covered < COVERED:  # EAGLE-1's is a suspect
        found.append(
            f"the draft's vocabulary misses {1 - greedy.covered:.0%} of the text: enlarge it, or "
            "choose its tokens by their counts in such text"
        )
    low = 1 + LOW * (EXPECTED[method] - 1)
    if len(greedy.by_depth) == EXPECTED_CHAIN and greedy.tokens_per_call < low:
        found.append(
            f"low: {greedy.tokens_per_call:.2f} tokens per call, public drafts of its kind reach "
            f"{EXPECTED[method]}"
        )
    elif later and later[0] / max(first, 1e-9) < HOLDS_ON * first:
        found.append(
            "accepted once, it rarely goes on: it does not carry on from its own hidden states; "
            "train it on them (several steps unrolled)"
        )
    return found
