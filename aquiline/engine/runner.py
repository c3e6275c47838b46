"""Runner: turns a scheduled batch into device work.

On CUDA a round is one replay of a captured graph and nothing waits for it: the tokens are copied to
pinned memory behind it and read one step later. On the CPU the same round runs eagerly.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from types import MappingProxyType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from aquiline.decoding.graph import RoundGraph, capture
from aquiline.decoding.guided import STAGES, GuidedRound
from aquiline.decoding.models import DecoderModels, Planes
from aquiline.decoding.prefill import prefill, prefill_chunk
from aquiline.decoding.prompt_scores import prompt_logprobs
from aquiline.decoding.rows import DeviceRows, Emitted, Forms, StagedRound, advance
from aquiline.engine.scheduler import Batch, Stretch
from aquiline.engine.sequence import Sequence
from aquiline.engine.ticket import Ticket
from aquiline.guided.batch import GuidedBatch
from aquiline.sampling.adjust import Adjustments
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.dispatch.dispatcher import BATCH_BUCKETS, TreeChooser
from aquiline.speculation.dispatch.paths import BANDS
from aquiline.speculation.tree import TreeShape, TreeTables
from aquiline.speculation.verification.rules import RuleFactory

WARM_CONTEXTS = (512, 8192)
IN_FLIGHT = 3  # host buffers in turn: one being read, one under way, one being filled


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
        vocab = models.target.config.vocab_size
        self.adjustments = Adjustments.empty(rows, vocab, models.device)
        self.rows = DeviceRows.empty(rows, *self._room, models, self.adjustments)
        self.cuda = models.device.type == "cuda"
        self.ahead = 1 if self.cuda else 0
        self._pool = torch.cuda.graph_pool_handle() if self.cuda else None
        self._batches: dict[int, DeviceRows] = {}
        self._graphs: dict[tuple[int, int], RoundGraph[Emitted]] = {}
        self._guided: dict[tuple[int, int], GuidedRound] = {}
        self._latest: Ticket | None = None  # the only one that may be in flight at a launch
        self._resident: tuple[int, tuple[int, ...]] | None = None
        self._buffers: dict[tuple[str, tuple[int, ...]], list[Tensor]] = {}
        self._sampling: tuple[tuple[Sequence, ...], SamplingBatch] | None = None
        self._prompt_scores: WeakKeyDictionary[Sequence, list[Tensor]] = WeakKeyDictionary()

    def warm_up(self, chooser: TreeChooser, forms: bool) -> WarmUp:
        """Capture the graphs that ``chooser`` would ask for at short and long contexts, those of
        batches with ``forms`` too if there can be any, so that no request waits for them; another
        one is captured when it is first needed."""
        if not self.cuda:
            return WarmUp(0, 0.0, 0)
        started, before = time.perf_counter(), torch.cuda.memory_reserved()
        sizes = {*(size for size in BATCH_BUCKETS if size < self.max_rows), self.max_rows}
        for size, context, band in itertools.product(sorted(sizes), WARM_CONTEXTS, BANDS):
            tree = chooser.choose(size, size * context, band)
            self._graph(size, tree)
            if forms:
                self._guided_graphs(size, tree)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        graphs = len(self._graphs) + STAGES * len(self._guided)
        return WarmUp(graphs, seconds, torch.cuda.memory_reserved() - before)

    @property
    def max_rows(self) -> int:
        """Requests that can run at once."""
        return len(self.rows.active)

    def launch(self, batch: Batch) -> Ticket | None:
        """Enqueue the batch's work; nothing is read back. None if there is none."""
        for source, target in batch.copies:
            self.planes.copy_page(source, target)
        ticket = None
        if batch.prefills:
            ticket = self._prefill(batch.prefills)
        elif batch.decodes:
            ticket = self._round(batch.decodes, batch.tree)
        self._latest = ticket or self._latest
        return ticket

    # ---------------------------------------------------------------------------------- launching

    def _prefill(self, stretches: tuple[Stretch, ...]) -> Ticket | None:
        """Feed prompts; None if they are not at their end, so that nothing is said."""
        width = max(stretch.length for stretch in stretches)
        ids = [one.sequence.tokens[one.start : one.start + one.length + 1] for one in stretches]
        tokens = self._tensor(_padded(ids))
        start = self._tensor([stretch.start for stretch in stretches])
        columns = max(-(-(one.start + width) // one.sequence.table.page_size) for one in stretches)
        pages = [stretch.sequence.table.pages for stretch in stretches]
        page_table = self._tensor(_padded(pages, columns))
        ticket = None
        if stretches[0].last:
            counts = self._tensor([stretch.length for stretch in stretches])
            ticket = self._first_tokens(stretches, page_table, tokens, counts, start)
        else:
            features = prefill_chunk(self.models, self.planes, page_table, tokens, start)
            self._score_prompts(stretches, tokens, features)
        for stretch in stretches:
            stretch.sequence.prefilled(stretch.length)
        return ticket

    def _first_tokens(
        self,
        stretches: tuple[Stretch, ...],
        page_table: Tensor,
        tokens: Tensor,
        counts: Tensor,
        start: Tensor,
    ) -> Ticket:
        """The last stretch of each prompt; the row of each request is filled."""
        self._put_back()
        sequences = tuple(stretch.sequence for stretch in stretches)
        rows = self._tensor([sequence.row for sequence in sequences])
        for sequence in sequences:
            assert sequence.row is not None
            request = sequence.request
            self.rows.sampling.set(sequence.row, request.params, request.seed, sequence.index)
            self.adjustments.set(
                sequence.row, request.params, request.prompt_token_ids, sequence.output,
                sequence.end_tokens,
            )  # fmt: skip
            sequence.launched(0)
            sequence.enter()
        self._sampling = None  # rows may have changed
        done = prefill(
            self.models, self.planes, page_table, tokens, counts,
            self._sampling_of(sequences, rows), start,
            self._first_masks(sequences),
        )  # fmt: skip
        self.rows.state.store(rows, done.state)
        said = torch.stack((torch.full_like(done.state.roots, -1), done.state.roots), dim=1)
        self._score_prompts(stretches, tokens, done.features)
        scores = {
            place: torch.cat(self._prompt_scores.pop(sequence))
            for place, sequence in enumerate(sequences)
            if sequence in self._prompt_scores
        }
        return self._ticket(sequences, Emitted(said, done.logprobs), None, scores)

    def _score_prompts(
        self, stretches: tuple[Stretch, ...], tokens: Tensor, features: Tensor
    ) -> None:
        """Log-probabilities of the prompts' tokens, where wanted, stretch after stretch."""
        for place, (sequence, start, length, last) in enumerate(stretches):
            if sequence.wants_prompt_scores:
                said = tokens[place, 1 : length + (not last)]
                found = prompt_logprobs(self.models.target, features[place], said)
                before = self._prompt_scores.get(sequence, []) if start else []
                self._prompt_scores[sequence] = [*before, found]

    def _first_masks(self, sequences: tuple[Sequence, ...]) -> Tensor | None:
        forms = self._forms(sequences, len(sequences))
        if forms is None:
            return None
        return forms.roots(pinned=self.cuda).to(self.models.device, non_blocking=True)

    def _forms(self, sequences: tuple[Sequence, ...], rows: int) -> GuidedBatch | None:
        """The forms of the texts, ``rows`` with the padding; None if no text has one."""
        matchers = [sequence.matcher for sequence in sequences]
        if not any(matchers):
            return None
        padding = [None] * (rows - len(matchers))
        return GuidedBatch([*matchers, *padding], self.adjustments.vocab)

    def _hear(self) -> None:
        """Have grammars follow what is in flight, which is waited for. The scheduler settles those
        tokens later, under the round that is about to be launched."""
        if self._latest is not None:
            for _, sequence, said in self._latest.said():
                if sequence.tickets:
                    sequence.hear(said)

    def _round(self, sequences: tuple[Sequence, ...], tree: int) -> Ticket:
        tables = self.trees[tree]
        size = bucket_of(len(sequences), self.max_rows) if self.cuda else len(sequences)
        forms = self._forms(sequences, size)
        if forms is not None:
            self._hear()
        for sequence in sequences:
            sequence.launched(tables.shape.depth + 1)
        index = tuple(sequence.row for sequence in sequences if sequence.row is not None)
        if self.cuda:
            emitted = self._replay(size, tree, index, sequences, forms)
        else:
            rows = self._tensor(index)
            pages = self._tensor(_padded([sequence.table.pages for sequence in sequences]))
            batch = DeviceRows(
                self.rows.state.select(rows), self._sampling_of(sequences, rows), pages,
                torch.ones_like(rows, dtype=torch.bool),
            )  # fmt: skip
            emitted = (
                advance(self.models, self.planes, tables, self.rule, batch)
                if forms is None
                else self._guided_round(tree, batch).run(forms)
            )
            self.rows.state.store(rows, batch.state)
        return self._ticket(sequences, emitted, tables.shape)

    def _replay(
        self,
        size: int,
        tree: int,
        index: tuple[int, ...],
        sequences: tuple[Sequence, ...],
        forms: GuidedBatch | None,
    ) -> Emitted:
        """The round as one graph, or under forms as three; captured if it is the first."""
        if forms is None:
            graph = self._graph(size, tree)
            self._make_resident(size, index, sequences)
            return graph.replay()
        guided = self._guided_graphs(size, tree)
        self._make_resident(size, index, sequences)
        return guided.run(forms)

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

    def _graph(self, size: int, tree: int) -> RoundGraph[Emitted]:
        if (size, tree) not in self._graphs:
            batch = self._padding(size)
            (self._graphs[size, tree],) = capture(
                lambda: advance(self.models, self.planes, self.trees[tree], self.rule, batch),
                pool=self._pool,
            )
        return self._graphs[size, tree]

    def _guided_graphs(self, size: int, tree: int) -> GuidedRound:
        if (size, tree) not in self._guided:
            self._guided[size, tree] = self._guided_round(tree, self._padding(size))
        return self._guided[size, tree]

    def _guided_round(self, tree: int, rows: DeviceRows) -> GuidedRound:
        tables, device = self.trees[tree], self.models.device
        forms = Forms.empty(len(rows.active), tables.shape, self.adjustments.vocab, device)
        stages = StagedRound(self.models, self.planes, tables, self.rule, rows, forms)
        return GuidedRound(stages, self._pool)

    def _padding(self, size: int) -> DeviceRows:
        """The batch of ``size``, all padding, for a graph to be captured on."""
        self._put_back()
        if size not in self._batches:
            self._batches[size] = DeviceRows.empty(size, *self._room, self.models, self.adjustments)
        batch = self._batches[size]
        batch.take(self.rows, self._tensor([]))
        batch.page_table.zero_()
        return batch

    def _ticket(
        self,
        sequences: tuple[Sequence, ...],
        emitted: Emitted,
        tree: TreeShape | None,
        prompts: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> Ticket:
        entries = tuple((sequence, sequence.epoch) for sequence in sequences)
        if not self.cuda:
            return Ticket(entries, emitted, prompts, tree, None)
        logprobs = None
        if any(sequence.request.params.logprobs is not None for sequence in sequences):
            assert emitted.logprobs is not None
            logprobs = self._to_host("logprobs", emitted.logprobs)
        said = Emitted(self._to_host("emitted", emitted.tokens), logprobs)
        scores = {
            place: torch.empty_like(rows, device="cpu", pin_memory=True).copy_(
                rows, non_blocking=True
            )
            for place, rows in prompts.items()
        }
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return Ticket(entries, said, scores, tree, done)

    def _to_host(self, name: str, values: Tensor) -> Tensor:
        return self._buffer(name, *values.shape, dtype=values.dtype).copy_(
            values, non_blocking=True
        )

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
            batch = SamplingBatch.of(
                params, seeds, self.models.device, choices, self.adjustments, rows.tolist()
            )
            self._sampling = sequences, batch
        return self._sampling[1]

    def _buffer(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """A pinned tensor that no work in flight uses."""
        ring = self._buffers.setdefault((name, shape), [])
        if len(ring) < IN_FLIGHT:
            ring.append(torch.zeros(shape, dtype=dtype, pin_memory=True))
        else:
            ring.append(ring.pop(0))
        return ring[-1]

    def _tensor(self, values: object) -> Tensor:
        host = torch.tensor(values, dtype=torch.int64, pin_memory=self.cuda)
        return host.to(self.models.device, non_blocking=True)


def bucket_of(count: int, largest: int) -> int:
    """The batch size that serves ``count`` rows; ``largest`` is the engine's own limit."""
    return next((size for size in BATCH_BUCKETS if count <= size < largest), largest)


def _padded(lists: Items[list[int]], width: int = 0) -> list[list[int]]:
    """With zeros, to ``width`` or the longest."""
    width = max(width, *map(len, lists))
    return [row + [0] * (width - len(row)) for row in lists]
