"""Tiny checkpoints with known text: a target that recites the alphabet, and drafts for it.

The target's head is its embedding, permuted: after token t comes ``successors()[t]``, and the
layers disturb that by ``mix``. With ``mix`` 0 the text is a .. z <|im_end|> a .. for ever; with
some mix it depends on the whole context. The draft that copies the next token's embedding is
perfect for the first and sometimes right for the second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from aquiline.models.config import LlamaConfig
from aquiline.models.draft import EagleDraft, draft_config
from aquiline.models.draft_checkpoint import save_draft
from aquiline.models.eagle3 import Eagle3Draft, Eagle3Head, random_eagle3
from aquiline.models.llama import Llama, llama_views

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIALS = ("<|end|>", "<|im_start|>", "<|im_end|>")
END, IM_START, IM_END = range(len(ALPHABET), len(ALPHABET) + len(SPECIALS))
VOCAB = 264  # padded beyond the tokenizer's, as in real checkpoints
LETTERS = [ALPHABET.index(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
CYCLE = [*LETTERS, IM_END]


def token(letter: str) -> int:
    """The id of a one-byte character."""
    return ALPHABET.index(letter)


def tiny_config(context: int = 256, layers: int = 2, **changes: Any) -> LlamaConfig:
    """4 query heads, 2 key heads, width 32."""
    fields = {
        "architecture": "LlamaForCausalLM", "vocab_size": VOCAB, "hidden_size": 32,
        "intermediate_size": 48, "num_layers": layers, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None,
        "max_position_embeddings": context, "tie_word_embeddings": False, "attention_bias": False,
    }  # fmt: skip
    return LlamaConfig(**{**fields, **changes})


def successors() -> torch.Tensor:
    """[VOCAB] the token after each: the cycle goes round, the rest leads into it."""
    after = torch.tensor([CYCLE[i % len(CYCLE)] for i in range(VOCAB)])
    after[CYCLE] = torch.tensor([*CYCLE[1:], CYCLE[0]])
    return after


def write_tokenizer(folder: Path) -> None:
    """Bytes and three special tokens; ChatML; <|im_end|> ends a turn."""
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(ALPHABET)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    backend.save(str(folder / "tokenizer.json"))
    saved = {"eos_token": "<|im_end|>", "chat_template": CHATML, "tokenizer_class": "Any"}
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))


@torch.no_grad()
def write_target(folder: Path, mix: float = 0.0, **config: Any) -> Path:
    """A Hugging Face folder; ``mix`` scales what the layers add to the embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = tiny_config(**config)
    generator = torch.Generator().manual_seed(1)
    model = Llama(shape, 1)
    tensors = {}
    for name, view in llama_views(model).items():
        noise = torch.randn(view.tensor.shape, generator=generator)
        tensors[name] = torch.ones_like(noise) if noise.dim() == 1 else 0.3 * noise
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= mix
    embedding = torch.nn.functional.normalize(
        torch.randn(shape.vocab_size, shape.hidden_size, generator=generator), dim=-1
    )
    tensors["model.embed_tokens.weight"] = embedding
    head = torch.zeros_like(embedding)
    # Several tokens lead to one: only the cycle's own predecessor is its head row.
    head[successors()[CYCLE]] = 4.0 * embedding[CYCLE]
    tensors["lm_head.weight"] = head
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    eos = {"eos_token_id": IM_END}
    (folder / "config.json").write_text(json.dumps(shape.to_hf() | eos))
    write_tokenizer(folder)
    return folder


@torch.no_grad()
def make_draft(layers: int = 1, copies: bool = True, **config: Any) -> EagleDraft:
    """A draft that copies the next token's embedding, or (``copies`` False) a random one."""
    shape = draft_config(tiny_config(**config), layers, None)
    torch.manual_seed(7)
    draft = EagleDraft(shape, 1024)
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if copies:
        draft.fc.weight.copy_(torch.cat((torch.eye(shape.hidden_size),) * 2, dim=1))
        draft.fc.weight[:, shape.hidden_size :] = 0.0
        for layer in draft.layers:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return draft


def write_draft(folder: Path, layers: int = 1, copies: bool = True, **config: Any) -> Path:
    """A draft folder in the public layout, without the embedding."""
    save_draft(folder, make_draft(layers, copies, **config), None, None, torch.float32)
    return folder


TAPS = (0, 1, 2)  # of the tiny target's two layers: embedding, between, output


@torch.no_grad()
def make_eagle3(
    layers: int = 1, draft_vocab: int = VOCAB, foresees: Path | None = None, **config: Any
) -> tuple[Eagle3Draft, Eagle3Head]:
    """A random EAGLE-3 draft, or one that foresees a clean target's text, one token deep.

    The last tap of a clean target is the embedding of token i and ``head`` answers it with token
    i + 2. Handed on unchanged it is a step behind, so the second level is always wrong.
    """
    target = Llama(tiny_config(**config), 1024).requires_grad_(False)
    draft, head = random_eagle3(target, draft_vocab, layers, TAPS, seed=7)
    for module in (draft, head):
        for parameter in module.parameters():
            parameter.mul_(15) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    if foresees is not None:
        assert draft_vocab == VOCAB
        size = draft.config.hidden_size
        draft.fc.weight.copy_(torch.cat((torch.zeros(size, 2 * size), torch.eye(size)), dim=1))
        for layer in (draft.midlayer, *draft.layers):
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        torch.nn.init.ones_(head.norm.weight)
        torch.nn.init.zeros_(head.lm_head.weight)
        embedding = load_file(foresees / "model.safetensors")["model.embed_tokens.weight"]
        after = successors()
        head.lm_head.weight[after[after[CYCLE]]] = 4.0 * embedding[CYCLE]
    return draft, head


def write_eagle3(folder: Path, **options: Any) -> Path:
    """An EAGLE-3 folder in the public layout, without the embedding."""
    save_draft(folder, *make_eagle3(**options), None, torch.float32)
    return folder
