"""Fixed texts: what the target says to benchmark prompts, said once and kept in a file.

The same texts serve every draft and every tree (paired.py), so they are generated without one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aquiline.core.errors import DataError
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from aquiline.evaluation.tasks import TaskPrompt

OVERRUN = 8  # tokens kept behind the end of a text


@dataclass(frozen=True)
class FixedText:
    """What the target says after a prompt at one seed and temperature.

    Attributes:
        tokens: the text and, behind its end, what the target would have said next: a round that
            reaches the end may accept tokens past it. One less than the deepest tree is enough.
        length: tokens of the text itself, the end token included.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    length: int
    seed: int

    @property
    def roots(self) -> int:
        """Tokens that a round may start from: all but the last."""
        return max(0, self.length - 1)


def answer(
    llm: LLM, prompts: Sequence[TaskPrompt], temperature: float, max_tokens: int, seed: int = 0
) -> list[FixedText]:
    """The answers to every turn of every prompt, turn by turn; each has a seed of its own.

    ``max_tokens`` bounds a text's ``length``.
    """
    ends = llm.tokenizer.eos_token_ids
    talks: list[list[dict[str, str]]] = [[] for _ in prompts]
    texts: list[FixedText] = []
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        asked = [
            (talk, prompt.turns[turn])
            for prompt, talk in zip(prompts, talks, strict=True)
            if turn < len(prompt.turns)
        ]
        params: list[SamplingParams] = []
        for talk, question in asked:
            talk.append({"role": "user", "content": question})
            limit, one = max_tokens + OVERRUN, seed + len(texts) + len(params)
            params.append(
                SamplingParams(temperature=temperature, max_tokens=limit, seed=one, ignore_eos=True)
            )
        outputs = llm.chat([talk for talk, _ in asked], params)
        first_seed = seed + len(texts)
        for number, ((talk, _), output) in enumerate(zip(asked, outputs, strict=True), first_seed):
            tokens = output.outputs[0].token_ids
            length = _length(tokens, frozenset(ends), max_tokens)
            texts.append(FixedText(output.prompt_token_ids, tokens, length, number))
            said = tokens[: length - 1] if tokens[length - 1] in ends else tokens[:length]
            talk.append({"role": "assistant", "content": llm.tokenizer.decode(said)})
    return texts


def _length(tokens: Sequence[int], ends: frozenset[int], max_tokens: int) -> int:
    """Up to the first end token, itself included."""
    end = next((at for at, token in enumerate(tokens) if token in ends), max_tokens)
    return min(end + 1, max_tokens, len(tokens))


def stored_texts(
    path: Path, facts: dict[str, Any], make: Callable[[], list[FixedText]]
) -> list[FixedText]:
    """The texts in the file ``path``, which is made if it is not there.

    ``facts`` say what the texts were made from; JSON values.

    Raises:
        DataError: the file was made from other facts, or cannot be read.
    """
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"facts": facts, "texts": [asdict(text) for text in made]}))
        partial.replace(path)
        return made
    try:
        stored = json.loads(path.read_text())
        theirs, rows = stored["facts"], stored["texts"]
        texts = [
            FixedText(tuple(row["prompt"]), tuple(row["tokens"]), row["length"], row["seed"])
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: {type(error).__name__}: {error}; the file is damaged, delete it"
        ) from None
    for name in sorted({*facts, *theirs}):
        if theirs.get(name) != facts.get(name):
            raise DataError(
                f"{path}: made with {name}={theirs.get(name)!r}, asked for {facts.get(name)!r}; "
                "delete it or choose another folder"
            )
    return texts
