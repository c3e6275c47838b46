"""FormCompiler: forms compiled beside the engine's loop, which goes on with other requests.

    loop      add(request) --> queue ---+                 +--> finished --> take(request)
    workers                             +--- Grammars ----+

A hard form takes seconds, the first use of a large vocabulary half of one. xgrammar works without
the interpreter's lock, so rounds go on meanwhile; on a CPU they come first, since workers, and the
threads that xgrammar starts in them, are nice. Workers are daemons: the process ends without them.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import Future
from multiprocessing import Pipe
from queue import SimpleQueue

from aquiline.core.guided_params import StructuredOutput
from aquiline.engine.engine import Engine
from aquiline.engine.messages import Submit
from aquiline.guided.grammar import Grammar

WORKERS = 2  # so that a quick form passes a slow one
NICENESS = 5


class FormCompiler:
    """The requests of one loop that wait for their form.

    Attributes:
        finished: the end of a pipe on which the loop reads whose form is done.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self.finished, self._finish = Pipe(duplex=False)
        self._waiting: dict[int, tuple[Submit, Future[Grammar]]] = {}
        self._queue: SimpleQueue[tuple[StructuredOutput, Future[Grammar]]] = SimpleQueue()
        for _ in range(WORKERS):
            threading.Thread(target=self._work, daemon=True).start()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Submit, form: StructuredOutput) -> None:
        """Begin to compile its form, which ``Engine.add_request`` will find done."""
        future: Future[Grammar] = Future()
        future.add_done_callback(lambda _: self._finish.send(request.request_id))
        self._waiting[request.request_id] = request, future
        self._queue.put((form, future))

    def take(self, request_id: int) -> Submit | None:
        """The request that ``finished`` names, no longer waiting; None if it was dropped.

        Raises:
            AquilineError: its form does not compile; names the place in it and the remedy.
        """
        if request_id not in self._waiting:
            return None
        request, future = self._waiting.pop(request_id)
        future.result()
        return request

    def drop(self, request_id: int) -> None:
        """Nobody wants it any more, if it is here; not begun, its form is not compiled."""
        if request_id in self._waiting:
            self._waiting.pop(request_id)[1].cancel()

    def _work(self) -> None:
        if sys.platform == "linux":  # where it is a thread's own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            form, future = self._queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with self._lock:
                    grammars = self._engine.grammars  # made by whoever comes first
                future.set_result(grammars.compile(form))
            except BaseException as error:
                future.set_exception(error)
