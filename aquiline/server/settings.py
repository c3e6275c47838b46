"""Settings: how the server behaves towards its clients."""

from __future__ import annotations

from dataclasses import dataclass

from aquiline.core.errors import AquilineError
from aquiline.server.tools.formats import FORMATS


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        model_names: what requests may call the model; the first is the one it calls itself.
        api_keys: one of them must come as a bearer token; none lets everybody in.
        max_body_bytes: of a request.
        log_requests: put prompts and answers' texts into the log.
        allowed_origins, ...: CORS; no origin leaves it off.
        tool_call_parser: "auto" goes by the chat template.
        shutdown_timeout: seconds that running requests get after SIGTERM; None is for ever.
    """

    model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    log_requests: bool = False
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    tool_call_parser: str = "auto"
    shutdown_timeout: int | None = None

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise AquilineError("served_model_name: give at least one name")
        if not 0 <= self.port < 2**16:
            raise AquilineError(f"port={self.port}: give 0 (any free one) to 65535")
        if not all(self.api_keys):
            raise AquilineError("api_key: it is empty; give a key, or leave it out")
        if self.max_body_bytes < 1:
            raise AquilineError(f"max_body_bytes={self.max_body_bytes}: give a positive number")
        if self.tool_call_parser not in ("auto", *FORMATS):
            raise AquilineError(
                f"tool_call_parser={self.tool_call_parser!r}: one of auto, {', '.join(FORMATS)}"
            )
