"""Logs: one JSON object a line on stderr; no prompt or answer in it unless asked for."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from aquiline.core.outputs import RequestOutput

log = logging.getLogger("aquiline.server")


class JsonFormatter(logging.Formatter):
    """``extra={"fields": {...}}`` adds fields to a record."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure() -> None:
    """Everything that aquiline and uvicorn say goes to stderr in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in ("aquiline", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def request_ended(
    request_id: str, prompt: int, output: RequestOutput | None, first: float | None, whole: float
) -> None:
    """A request's sizes and times; without a last output it was aborted before its first."""
    outputs = output.outputs if output is not None else ()
    fields = {
        "id": request_id, "prompt_tokens": prompt,
        "tokens": sum(len(one.token_ids) for one in outputs),
        "finish_reasons": [one.finish_reason or "abort" for one in outputs] or ["abort"],
        "tokens_per_call": round(output.speculation.tokens_per_call, 3) if output else None,
        "first_token_seconds": first and round(first, 4), "seconds": round(whole, 4),
    }  # fmt: skip
    log.info("request ended", extra={"fields": fields})


def request_texts(request_id: str, prompt: str, output: RequestOutput) -> None:
    """What was asked and answered; only if the settings ask for it."""
    fields = {"id": request_id, "prompt": prompt, "texts": [one.text for one in output.outputs]}
    log.info("request texts", extra={"fields": fields})
