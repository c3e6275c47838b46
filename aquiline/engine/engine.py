"""The heart: schedule, launch, settle."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence as Tokens
from functools import cached_property, partial

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import StructuredOutput
from aquiline.core.outputs import RequestOutput
from aquiline.core.params import MAX_SEED, SamplingParams
from aquiline.core.request import Request
from aquiline.engine.admission import admit, end_tokens
from aquiline.engine.choices import Choices
from aquiline.engine.config import EngineConfig
from aquiline.engine.loader import LoadedModel
from aquiline.engine.runner import Runner
from aquiline.engine.scheduler import Scheduler
from aquiline.engine.sequence import Said, Sequence, StepTokens
from aquiline.engine.ticket import Ticket
from aquiline.guided.grammar import Grammars, xgrammar_installed
from aquiline.kvcache.pages import PageAllocator
from aquiline.kvcache.prefix import PrefixCache
from aquiline.kvcache.table import PageTable
from aquiline.text.detokenizer import Detokenizer


class Engine:
    """Continuous batching: requests join and leave between steps.

    Attributes:
        warm_up: graphs captured at start, with their time and memory.
    """

    def __init__(self, config: EngineConfig, loaded: LoadedModel) -> None:
        self.config, self.tokenizer = config, loaded.tokenizer
        self.max_model_len = loaded.max_model_len
        chooser, page_size = loaded.chooser, config.page_size
        pages = config.pages(self.max_model_len, loaded.room, loaded.kv_cache_tokens)
        self.allocator = PageAllocator(pages)
        retrieving = any(tree.retrieved for tree in chooser.candidates)
        planes = loaded.models.planes(pages, page_size, retrieving)
        cache = PrefixCache(self.allocator, page_size) if config.enable_prefix_caching else None
        self.scheduler = Scheduler(config.max_num_seqs, chooser, loaded.prefill_budget, cache)
        columns = -(-(self.max_model_len + loaded.room) // page_size)
        self.runner = Runner(
            loaded.models, planes, chooser.candidates, loaded.rule, config.max_num_seqs, columns
        )
        self.warm_up = self.runner.warm_up(chooser, forms=xgrammar_installed())
        self._flight: deque[Ticket] = deque()
        self._next_id = 0

    def step(self) -> list[RequestOutput]:
        """One prefill or one round; the tokens that are due, request by request."""
        batch = self.scheduler.schedule()
        ticket = self.runner.launch(batch)
        return self.scheduler.settle(self.swap(ticket))

    def swap(self, ticket: Ticket | None) -> list[StepTokens]:
        """Put a step's work in flight and return the tokens that are due: on the CPU, where nothing
        overlaps, its own; on CUDA those of the step before, read while this one runs."""
        ahead = self.runner.ahead if ticket is not None else 0
        if ticket is not None:
            self._flight.append(ticket)
        if len(self._flight) <= ahead:
            return []
        return list(self._flight.popleft().collect())

    @cached_property
    def grammars(self) -> Grammars:
        """Compiled forms; made when a request first has one: a large vocabulary takes a second.

        Another thread may ``compile`` a form ahead of ``add_request``, which then finds it done.
        """
        tokenizer, vocab = self.tokenizer, self.runner.models.target.config.vocab_size
        spell = partial(tokenizer.encode, add_special_tokens=False)
        return Grammars(tokenizer.token_bytes(), vocab, tokenizer.eos_token_ids, spell)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add_request(
        self, prompt_token_ids: Tokens[int], params: SamplingParams, said: Tokens[Said] = ()
    ) -> int:
        """Queue a prompt and return its id; raises AquilineError on what cannot run.

        ``said`` is what each choice has said already, in an engine that is gone: under the coupled
        rule, for the same seed, the text goes on as it would have there.
        """
        count, limit = len(prompt_token_ids), self.max_model_len
        vocab = self.runner.models.target.config.vocab_size
        if count == 0:
            raise AquilineError("prompt: it is empty; give at least one token")
        if count >= limit:
            raise AquilineError(
                f"prompt: {count} tokens leave no room in the context of {limit}; shorten it or "
                "raise max_model_len"
            )
        if not all(0 <= token < vocab for token in prompt_token_ids):
            raise AquilineError(f"prompt_token_ids: a token is outside the vocabulary of {vocab}")
        params = admit(params, self.tokenizer, vocab, limit - count)
        form = params.structured_outputs
        grammar = self.grammars.compile(form) if isinstance(form, StructuredOutput) else None
        self._next_id += 1
        seed = secrets.randbelow(MAX_SEED) if params.seed is None else params.seed
        request = Request(self._next_id, tuple(prompt_token_ids), params, seed)
        sequences = tuple(
            Sequence(
                request,
                index,
                PageTable(self.allocator, self.config.page_size),
                Detokenizer(
                    self.tokenizer, params.skip_special_tokens, params.stop, params.min_tokens
                ),
                end_tokens(params, self.tokenizer),
                min(params.max_tokens or limit, limit - count),
                grammar,
            )
            for index in range(params.n)
        )
        for sequence, one in zip(sequences, said, strict=False):
            sequence.resume(one)
        self.scheduler.add(Choices(request, sequences, self.tokenizer))
        return request.id

    def abort(self, request_id: int) -> RequestOutput | None:
        """End a request now; its pages are free at once."""
        return self.scheduler.abort(request_id)
