"""The engine in a process of its own: the loop inside it, and the handle outside.

    AsyncLLM --- Submit, Abort --->  EngineLoop: drain commands, step, report
             <-- Progress, ... ---

The two ends of one pipe. The process ends when its pipe does; signals meant for the server (Ctrl-C,
SIGTERM to a process group) do not reach it, so that running requests can be finished.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from aquiline.core.errors import AquilineError
from aquiline.core.guided_params import StructuredOutput
from aquiline.core.heap import settled_heap
from aquiline.core.outputs import RequestOutput
from aquiline.engine.config import EngineConfig
from aquiline.engine.engine import Engine
from aquiline.engine.form_compiler import FormCompiler
from aquiline.engine.loader import Loader
from aquiline.engine.messages import (
    Abort,
    Admitted,
    Command,
    Failed,
    Load,
    Progress,
    Ready,
    Refused,
    Report,
    Submit,
    Update,
)

CLOSE_SECONDS = 5.0  # for the process to end by itself


class EngineProcess:
    """A running engine process, seen from an event loop.

    Args:
        loader: makes the model, in the process; it can be pickled.
        on_report: called in the event loop with each report, in order.
        on_exit: called in the event loop once, when the process has ended by itself.
    """

    def __init__(
        self,
        config: EngineConfig,
        loader: Loader,
        on_report: Callable[[Report], None],
        on_exit: Callable[[], None],
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=run_engine, args=(theirs, config, loader), daemon=True)
        self._process.start()
        theirs.close()
        self._on_report, self._on_exit, self._heard = on_report, on_exit, False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._connection.fileno(), self._read)
        # A thread, since a pipe is full while the engine is busy with a long step.
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, daemon=True)
        self._sender.start()

    @property
    def pid(self) -> int:
        """Of the operating system's process."""
        assert self._process.pid is not None
        return self._process.pid

    def send(self, command: Command) -> None:
        """Pass a command on; lost if the process has ended."""
        self._commands.put(command)

    async def close(self) -> None:
        """End the process, whatever it is doing."""
        self._hang_up()
        if self._heard:  # it hears too; one that loads does not
            await asyncio.to_thread(self._process.join, CLOSE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)

    def _read(self) -> None:
        try:
            while self._connection.poll():
                self._heard = True
                self._on_report(self._connection.recv())
        except (EOFError, OSError):
            self._hang_up()
            self._on_exit()

    def _hang_up(self) -> None:
        if not self._connection.closed:
            self._loop.remove_reader(self._connection.fileno())
            self._commands.put(None)
            self._connection.close()

    def _send_all(self) -> None:
        try:
            while (command := self._commands.get()) is not None:
                self._connection.send(command)
        except OSError:  # the process has ended: the reader sees that too
            pass


def run_engine(connection: Connection, config: EngineConfig, loader: Loader) -> None:
    """Load and serve until the other end of the pipe is closed; the process's main function."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        loaded = loader(config)
        engine = Engine(config, loaded)
    except AquilineError as error:
        connection.send(Failed(str(error)))
        return
    vocab = loaded.models.target.config.vocab_size
    try:
        connection.send(Ready(engine.max_model_len, vocab, loaded.sampling_defaults))
        with settled_heap():
            EngineLoop(engine, connection).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class EngineLoop:
    """Commands in, steps, reports out; ids are those of the process above.

    A request whose text has a form is added once that is compiled; others go on meanwhile.
    """

    def __init__(self, engine: Engine, connection: Connection) -> None:
        self.engine, self.connection = engine, connection
        self._forms = FormCompiler(engine)
        self._ours: dict[int, int] = {}  # the engine's id by theirs
        self._theirs: dict[int, int] = {}
        self._owing: set[int] = set()  # whose prompt's scores have not been reported

    def run(self) -> None:
        """Until EOFError: nobody listens any more."""
        while True:
            changed = self.engine.has_work
            while self._listen(0 if self.engine.has_work else None):
                changed = True
                if not self.engine.has_work:
                    break
            updates = [self._update(output) for output in self.engine.step()]
            if changed:
                self.connection.send(Progress(tuple(updates), self._load()))

    def _listen(self, seconds: float | None) -> bool:
        """Wait so long for a command or a form, None for ever; whether there was one."""
        ready = wait([self.connection, self._forms.finished], seconds)
        if self._forms.finished in ready:
            self._compiled(self._forms.finished.recv())
        if self.connection in ready:
            self._obey(self.connection.recv())
        return bool(ready)

    def _obey(self, command: Command) -> None:
        match command:
            case Submit(_, _, params):
                form = params.structured_outputs
                if isinstance(form, StructuredOutput):
                    self._forms.add(command, form)
                else:
                    self._add(command)
            case Abort(theirs) if theirs in self._ours:
                self.engine.abort(self._ours[theirs])
                self._forget(self._ours[theirs])
            case Abort(theirs):
                self._forms.drop(theirs)

    def _compiled(self, theirs: int) -> None:
        """A form is done, or cannot be compiled."""
        try:
            request = self._forms.take(theirs)
        except AquilineError as error:
            self.connection.send(Refused(theirs, str(error)))
            return
        if request is not None:
            self._add(request)

    def _add(self, request: Submit) -> None:
        theirs, params = request.request_id, request.params
        try:
            ours = self.engine.add_request(request.prompt_token_ids, params, request.said)
        except AquilineError as error:
            self.connection.send(Refused(theirs, str(error)))
            return
        self._ours[theirs], self._theirs[ours] = ours, theirs
        if params.prompt_logprobs is not None:
            self._owing.add(ours)
        self.connection.send(Admitted(theirs))

    def _update(self, output: RequestOutput) -> Update:
        ours, prompt = output.request_id, None
        theirs = self._theirs[ours]
        if ours in self._owing and output.prompt_logprobs is not None:
            prompt = output.prompt_logprobs
            self._owing.discard(ours)
        if output.finished:
            self._forget(ours)
        cached = output.num_cached_tokens
        return Update(theirs, output.finished, output.deltas, cached, prompt)

    def _forget(self, ours: int) -> None:
        self._owing.discard(ours)
        del self._ours[self._theirs.pop(ours)]

    def _load(self) -> Load:
        scheduler, allocator = self.engine.scheduler, self.engine.allocator
        pages = allocator.count - 1  # page 0 is nobody's
        taken = (pages - allocator.free_count) / pages
        waiting = len(scheduler.waiting) + len(self._forms)
        return Load(len(scheduler.running), waiting, taken)
