"""Runner: turns a scheduled batch into device work, and the device's answer into tokens.

On CUDA a round is one replay of a captured graph and nothing waits for it: the tokens are copied to
pinned memory behind it and read one step later. On the CPU the same round runs eagerly.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.decoding.graph import RoundGraph
from aquiline.decoding.models import DecoderModels, Planes
from aquiline.decoding.prefill import prefill
from aquiline.decoding.rows import DeviceRows, advance
from aquiline.engine.scheduler import Batch
from aquiline.engine.sequence import Sequence, StepTokens
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.dispatch.dispatcher import BATCH_BUCKETS, TreeChooser
from aquiline.speculation.dispatch.paths import BANDS
from aquiline.speculation.tree import TreeShape, TreeTables
from aquiline.speculation.verification.rules import RuleFactory

WARM_CONTEXTS = (512, 8192)
IN_FLIGHT = 3  # host buffers in turn: one being read, one under way, one being filled


@dataclass(frozen=True)
class Ticket:
    """Work in flight.

    Attributes:
        sequences: with the epoch each had at launch; one that was preempted since is not served.
        emitted: [B, 1 + D + 1] in host memory, see decoding.rows; a prefill accepted -1.
        tree: what was verified; None for a prefill.
        done: on CUDA, recorded behind the copy to ``emitted``.
    """

    sequences: tuple[tuple[Sequence, int], ...]
    emitted: Tensor
    tree: TreeShape | None
    done: torch.cuda.Event | None


@dataclass(frozen=True)
class WarmUp:
    """What it took to be ready: graphs captured, seconds, and bytes of device memory."""

    graphs: int
    seconds: float
    memory: int


class Runner:
    """The models, their cache, and the rows of the running requests.

    Attributes:
        ahead: tickets that may be in flight while the next one is launched.
    """

    def __init__(
        self,
        models: DecoderModels,
        planes: Planes,
        trees: Items[TreeShape],
        rule: RuleFactory,
        rows: int,
        columns: int,
    ) -> None:
        self.models, self.planes, self.rule = models, planes, rule
        self.trees: tuple[TreeTables, ...] = tuple(tree.tables(models.device) for tree in trees)
        self._room = columns, max(tree.depth for tree in trees) + 1
        self.rows = DeviceRows.empty(rows, *self._room, models)
        self.cuda = models.device.type == "cuda"
        self.ahead = 1 if self.cuda else 0
        self._pool = torch.cuda.graph_pool_handle() if self.cuda else None
        self._batches: dict[int, DeviceRows] = {}
        self._graphs: dict[tuple[int, int], RoundGraph] = {}
        self._resident: tuple[int, tuple[int, ...]] | None = None
        self._buffers: dict[tuple[str, tuple[int, ...]], list[Tensor]] = {}
        self._sampling: tuple[tuple[Sequence, ...], SamplingBatch] | None = None

    def warm_up(self, chooser: TreeChooser) -> WarmUp:
        """Capture the graphs that ``chooser`` would ask for at short and long contexts, so that no
        request waits for them; another one is captured when it is first needed."""
        if not self.cuda:
            return WarmUp(0, 0.0, 0)
        started, before = time.perf_counter(), torch.cuda.memory_reserved()
        sizes = {*(size for size in BATCH_BUCKETS if size < self.max_rows), self.max_rows}
        for size, context, band in itertools.product(sorted(sizes), WARM_CONTEXTS, BANDS):
            self._graph(size, chooser.choose(size, size * context, band))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return WarmUp(len(self._graphs), seconds, torch.cuda.memory_reserved() - before)

    @property
    def max_rows(self) -> int:
        """Requests that can run at once."""
        return len(self.rows.active)

    def launch(self, batch: Batch) -> Ticket | None:
        """Enqueue the batch's work; nothing is read back. None if there is none."""
        if batch.prefills:
            return self._prefill(batch.prefills, batch.twins)
        return self._round(batch.decodes, batch.tree) if batch.decodes else None

    def collect(self, ticket: Ticket) -> list[StepTokens]:
        """Wait for a ticket, and commit what it did for the sequences that still want it."""
        if ticket.done is not None:
            ticket.done.synchronize()
        served = []
        for (sequence, epoch), (accepted, *tokens) in zip(
            ticket.sequences, ticket.emitted.tolist(), strict=False
        ):
            if sequence.epoch != epoch:
                continue
            if ticket.tree is None:  # the prompt is committed, one token was drawn
                sequence.arrived(len(sequence.tokens))
                served.append(StepTokens(sequence, (tokens[0],), (0,)))
                continue
            sequence.arrived(accepted + 1, ticket.tree.depth + 1)
            sequence.record_round(accepted, ticket.tree.size - 1, ticket.tree.depth)
            depths = (*range(1, accepted + 1), 0)
            served.append(StepTokens(sequence, tuple(tokens[: accepted + 1]), depths))
        return served

    # ---------------------------------------------------------------------------------- launching

    def _prefill(
        self, prompts: tuple[Sequence, ...], twins: tuple[tuple[Sequence, int], ...]
    ) -> Ticket:
        self._put_back()
        sequences = (*prompts, *(twin for twin, _ in twins))
        rows = self._tensor([sequence.row for sequence in sequences])
        for sequence in sequences:
            assert sequence.row is not None
            self.rows.sampling.set(
                sequence.row, sequence.request.params, sequence.request.seed, sequence.index
            )
            sequence.launched(len(sequence.tokens))
        tokens = [sequence.tokens for sequence in prompts]
        sources = [*range(len(prompts)), *(leader for _, leader in twins)] if twins else None
        state = prefill(
            self.models, self.planes, self._tensor(_padded([s.table.pages for s in prompts])),
            self._tensor(_padded(tokens)), self._tensor([len(prompt) for prompt in tokens]),
            self._sampling_of(sequences, rows), None if sources is None else self._tensor(sources),
        ).state  # fmt: skip
        for twin, leader in twins:
            self._copy_last_page(prompts[leader], twin)
        self.rows.state.store(rows, state)
        emitted = torch.stack((torch.full_like(state.roots, -1), state.roots), dim=1)
        return self._ticket(sequences, emitted, None)

    def _copy_last_page(self, leader: Sequence, twin: Sequence) -> None:
        """The page of the prompt's last token, the only one that the two do not share."""
        last = (len(leader.tokens) - 1) // leader.table.page_size
        for plane in (self.planes.target, self.planes.draft):
            if plane is not None:
                plane.copy_page(leader.table.pages[last], twin.table.pages[last])

    def _round(self, sequences: tuple[Sequence, ...], tree: int) -> Ticket:
        tables = self.trees[tree]
        for sequence in sequences:
            sequence.launched(tables.shape.depth + 1)
        index = tuple(sequence.row for sequence in sequences if sequence.row is not None)
        if self.cuda:
            size = bucket_of(len(index), self.max_rows)
            graph = self._graph(size, tree)
            self._make_resident(size, index, sequences)
            emitted = graph.replay().tokens
        else:
            rows = self._tensor(index)
            pages = self._tensor(_padded([sequence.table.pages for sequence in sequences]))
            batch = DeviceRows(
                self.rows.state.select(rows), self._sampling_of(sequences, rows), pages,
                torch.ones_like(rows, dtype=torch.bool),
            )  # fmt: skip
            emitted = advance(self.models, self.planes, tables, self.rule, batch).tokens
            self.rows.state.store(rows, batch.state)
        return self._ticket(sequences, emitted, tables.shape)

    def _make_resident(
        self, size: int, index: tuple[int, ...], sequences: tuple[Sequence, ...]
    ) -> None:
        """Have the rows of the coming round, and their pages, in the batch of ``size``."""
        batch, moved = self._batches[size], self._resident != (size, index)
        if moved:
            self._put_back()
            batch.take(self.rows, self._tensor(index))
            self._resident = size, index
        changed = [sequence for sequence in sequences if sequence.pages_changed()]
        if changed or moved:
            host = self._buffer("pages", *batch.page_table.shape)
            host.zero_()
            for row, sequence in enumerate(sequences):
                pages = sequence.table.pages
                host[row, : len(pages)] = torch.tensor(pages)
            batch.page_table.copy_(host, non_blocking=True)

    def _put_back(self) -> None:
        """Rows that a batch holds return to the set of all."""
        if self._resident is not None:
            size, index = self._resident
            rows = torch.arange(len(index), device=self.models.device)
            state = self._batches[size].state.select(rows)
            self.rows.state.store(self._tensor(index), state)
            self._resident = None

    def _graph(self, size: int, tree: int) -> RoundGraph:
        if (size, tree) not in self._graphs:
            if size not in self._batches:
                self._batches[size] = DeviceRows.empty(size, *self._room, self.models)
            self._put_back()
            batch = self._batches[size]
            batch.take(self.rows, self._tensor([]))  # all padding
            batch.page_table.zero_()
            self._graphs[size, tree] = RoundGraph(
                lambda: advance(self.models, self.planes, self.trees[tree], self.rule, batch),
                self._pool,
            )
        return self._graphs[size, tree]

    def _ticket(
        self, sequences: tuple[Sequence, ...], emitted: Tensor, tree: TreeShape | None
    ) -> Ticket:
        entries = tuple((sequence, sequence.epoch) for sequence in sequences)
        if not self.cuda:
            return Ticket(entries, emitted, tree, None)
        host = self._buffer("emitted", *emitted.shape)
        host.copy_(emitted, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return Ticket(entries, host, tree, done)

    # ------------------------------------------------------------------------------ host to device

    def _sampling_of(self, sequences: tuple[Sequence, ...], rows: Tensor) -> SamplingBatch:
        """The batch's parameters. On the CPU with flags that let it skip work; kept while the batch
        is the same."""
        if self.cuda:
            return self.rows.sampling.select(rows)
        if self._sampling is None or self._sampling[0] != sequences:
            params = [sequence.request.params for sequence in sequences]
            seeds = [sequence.request.seed for sequence in sequences]
            choices = [sequence.index for sequence in sequences]
            batch = SamplingBatch.of(params, seeds, self.models.device, choices)
            self._sampling = sequences, batch
        return self._sampling[1]

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """A pinned tensor that no work in flight uses."""
        ring = self._buffers.setdefault((name, shape), [])
        if len(ring) < IN_FLIGHT:
            ring.append(torch.zeros(shape, dtype=torch.int64, pin_memory=True))
        else:
            ring.append(ring.pop(0))
        return ring[-1]

    def _tensor(self, values: object) -> Tensor:
        host = torch.tensor(values, dtype=torch.int64, pin_memory=self.cuda)
        return host.to(self.models.device, non_blocking=True)


def bucket_of(count: int, largest: int) -> int:
    """The batch size that serves ``count`` rows; ``largest`` is the engine's own limit."""
    return next((size for size in BATCH_BUCKETS if count <= size < largest), largest)


def _padded(lists: list[list[int]]) -> list[list[int]]:
    width = max(map(len, lists))
    return [row + [0] * (width - len(row)) for row in lists]
