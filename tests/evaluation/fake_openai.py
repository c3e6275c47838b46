"""A server of OpenAI's streaming protocol, as far as a client measures it, at a set pace."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fake:
    """Each answer is ``chunks`` chunks of ``per_chunk`` tokens: the first after ``first`` seconds,
    the others ``gap`` apart. What a request's text names goes wrong: refuse, break, silent."""

    chunks: int = 4
    per_chunk: int = 3
    first: float = 0.05
    gap: float = 0.03
    usage: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    now: int = 0
    most: int = 0
    rounds: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def metrics(self) -> str:
        labels = 'model_name="fake",engine="0"'
        lines = [
            "# TYPE vllm:spec_decode_num_drafts_total counter",
            f"vllm:spec_decode_num_drafts_total{{{labels}}} {float(self.rounds)}",
            f"vllm:spec_decode_num_drafts_created{{{labels}}} 1.7e9",
            f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} {float(3 * self.rounds)}",
            f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} {float(2 * self.rounds)}",
        ]
        for position, share in enumerate((1.0, 0.75, 0.25)):
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines.append(f'{name}{{{labels},position="{position}"}} {share * self.rounds}')
        return "\n".join(lines)

    def events(self, body: dict[str, Any], chat: bool) -> Iterator[object]:
        text = json.dumps(body.get("messages") or body.get("prompt"))
        if chat:
            yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        time.sleep(self.first)
        for number in range(0 if "silent" in text else self.chunks):
            time.sleep(self.gap if number else 0)
            said = {"delta": {"content": "a b c"}} if chat else {"text": "a b c"}
            yield {"choices": [{"index": 0, **said}], "usage": None}
            if "break" in text:
                yield {"error": {"message": "the engine died"}}
                return
        if self.usage:
            count = self.chunks * self.per_chunk
            yield {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}}
        yield "[DONE]"


def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            pages = {
                "/v1/models": json.dumps({"data": [{"id": "fake-1"}]}),
                "/metrics": fake.metrics(), "/version": '{"version": "9.9"}',
            }  # fmt: skip
            self._whole(200 if self.path in pages else 404, pages.get(self.path, "nothing"))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.bodies.append(body)
                fake.headers.append(dict(self.headers))
                fake.now += 1
                fake.most = max(fake.most, fake.now)
                fake.rounds += 4
            try:
                if "refuse" in json.dumps(body):
                    self._whole(400, '{"error": "top_q: no such field"}')
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for event in fake.events(body, self.path.endswith("chat/completions")):
                    text = event if isinstance(event, str) else json.dumps(event)
                    if text == "[DONE]":  # where a client may go on to its next request
                        with fake.lock:
                            fake.now -= 1
                    self._chunk(f"data: {text}\n\n".encode())
                self._chunk(b"")
            except BaseException:
                with fake.lock:
                    fake.now -= 1
                raise

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def _whole(self, status: int, text: str) -> None:
            if self.command == "POST":
                with fake.lock:
                    fake.now -= 1
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

    return Handler


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """``fake`` at ``fake.url`` while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
