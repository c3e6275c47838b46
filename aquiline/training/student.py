"""The student: the draft under training and its loss on a packed batch.

A row r is where a chain of drafted tokens may begin. Step 0 reads what the target knew at r and
token r + 1, and predicts token r + 2; step s reads what step s - 1 predicted at the same row and
token r + s + 1, and predicts token r + s + 2, as in decoding, where the tokens drafted so far were
right. With more than one step this is HASS for EAGLE-1 and training-time test for EAGLE-3.

    step 0   fuse(h_r), embed(t_{r+1})          ->  x_0  ->  law of t_{r+2}
    step s   x_{s-1},   embed(t_{r+s+1})        ->  x_s  ->  law of t_{r+s+2}

In step s a position i = r + s is scored that would be scored in step 0, if r is of its document.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from aquiline.attention.unrolled import UnrolledAttention
from aquiline.core.errors import AquilineError, CheckpointError
from aquiline.models.config import LlamaConfig
from aquiline.models.draft import Draft, DraftHead, EagleDraft, Head, draft_config
from aquiline.models.draft_checkpoint import LoadedDraft, save_draft
from aquiline.models.draft_export import verify_draft
from aquiline.models.eagle3 import Eagle3Draft, Eagle3Head, default_taps
from aquiline.training.config import TrainConfig
from aquiline.training.objectives import Loss, Rows, objective_loss
from aquiline.training.packing import PackedBatch
from aquiline.training.teacher import LlamaTeacher, Teacher, TeacherOutput
from aquiline.training.vocabulary_loss import Heads

MARGIN = 64  # positions past the longest text, for the tree of its last round


class Student(nn.Module):
    """``parameters()`` are exactly what is optimised; embedding and features are the teacher's.

    Args:
        token_ids: [Vd] the reduced vocabulary of an EAGLE-3 draft, ascending, the same for the
            whole run since rows of its head belong to them; None for the whole vocabulary.
    """

    draft: Draft
    head: Head

    def __init__(self, config: TrainConfig, teacher: Teacher, token_ids: Tensor | None) -> None:
        super().__init__()
        self.config = config
        self._teacher = [teacher]  # in a list, so that it is not a submodule
        shape = draft_config(teacher.config, config.layers, config.intermediate_size)
        positions = config.tokens_per_batch + config.unroll + config.eval_tokens + MARGIN
        with torch.device(teacher.device):
            if config.method == "eagle":
                assert token_ids is None, "EAGLE-1 is trained over the whole vocabulary"
                self.draft = EagleDraft(shape, positions)
                self.head = DraftHead(teacher, None)
            else:
                self.draft = Eagle3Draft(shape, _taps(teacher.config), positions)
                rows = shape.vocab_size if token_ids is None else len(token_ids)
                ids = None if token_ids is None else token_ids.to(teacher.device)
                self.head = Eagle3Head(teacher, shape, rows, ids)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Matrices from N(0, 0.02^2), norms are ones, an EAGLE-3 head is the target's rows.

        The first layer reads what no layer of the target reads and is random whatever ``init``.
        """
        generator = torch.Generator(self._teacher[0].device).manual_seed(self.config.seed)
        for parameter in self.draft.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
        self.to(self._teacher[0].dtype)
        if isinstance(self.head, Eagle3Head):
            weight, ids = self._teacher[0].head_weight, self.head.token_ids
            self.head.lm_head.weight.copy_(weight if ids is None else weight[ids])
        if self.config.init == "target":
            self._copy_layers(self.config.layers - 1)

    def _copy_layers(self, count: int) -> None:
        """The last ``count`` layers are the target's last; what it has more, biases, is left."""
        teacher = self._teacher[0]
        if not isinstance(teacher, LlamaTeacher) or count > teacher.config.num_layers:
            raise AquilineError(
                f"init='target': copies {count} layers of a target that aquiline's own Llama runs; "
                "give init='random'"
            )
        layers = cast(nn.ModuleList, self.draft.layers)
        for own, theirs in zip(layers[-count:], teacher.target.layers[-count:], strict=True):
            for name, parameter in own.named_parameters():
                parameter.copy_(theirs.get_parameter(name))

    def forward(
        self,
        batch: PackedBatch,
        known: TeacherOutput,
        count: Tensor,
        index: Tensor | None = None,
    ) -> Loss:
        """This batch's share of the loss of an optimiser step.

        Args:
            batch: on the teacher's device; ``known`` is what the teacher said of it.
            count: scalar, scored positions of the whole optimiser step, over all its batches.
            index: ``scored_positions(batch)``; finding it here makes the host wait for the device.
        """
        index = scored_positions(batch) if index is None else index
        steps = torch.arange(self.config.unroll, device=index.device)[:, None]
        rows = (index - steps).clamp(min=0)  # [S, P]
        pairs = zip(self.unrolled(batch, known), rows, strict=True)
        hidden = torch.stack([x[0].index_select(0, row) for x, row in pairs])
        target = self._teacher[0].head_weight
        if isinstance(self.head, Eagle3Head):
            heads = Heads(self.head.lm_head.weight, target, self.head.token_ids)
            read: Tensor = self.head.norm(hidden)
        else:
            heads, read = Heads(target, target, None), hidden
        taken = batch.positions[index] >= steps
        features = known.features[0, index + 1]
        return objective_loss(self.config, Rows(hidden, read, features, taken), heads, count)

    def unrolled(self, batch: PackedBatch, known: TeacherOutput) -> list[Tensor]:
        """The hidden states [1, N, d] that each step predicts, by row (see the module)."""
        features = torch.cat(known.taps, dim=-1) if self.draft.taps else known.features
        x = self.draft.fuse(self._noisy(features))
        tokens, positions = batch.tokens[None], batch.positions[None]
        attention = UnrolledAttention(batch.cu_seqlens, batch.max_seqlen)
        found = []
        for step in range(self.config.unroll):
            # Past the end of its document a row is garbage, finite and never scored.
            embeddings = self._teacher[0].embed(tokens.roll(-1 - step, dims=1))
            x = self.draft(embeddings, x, positions + step, attention)
            attention = attention.after()
            found.append(x)
        return found

    def _noisy(self, features: Tensor) -> Tensor:
        """With uniform noise relative to their standard deviation, from torch's own generator."""
        if self.config.feature_noise == 0:
            return features
        scale = 2 * self.config.feature_noise * features.float().std()
        noise = (torch.rand_like(features, dtype=torch.float32) - 0.5) * scale
        return features + noise.to(features.dtype)

    def export(self, folder: Path, token_ids: Tensor | None = None) -> None:
        """Write the public layout in bf16, embedding included; it is read back and compared.

        ``token_ids`` go to EAGLE-1's side file and choose rows of the head when it serves; an
        EAGLE-3 draft has its own.
        """
        teacher, head = self._teacher[0], self.head
        if isinstance(self.draft, EagleDraft):
            head = DraftHead(teacher, token_ids)
        tokens = torch.arange(teacher.config.vocab_size, device=teacher.device)
        save_draft(folder, self.draft, head, teacher.embed(tokens), torch.bfloat16)
        if isinstance(teacher, LlamaTeacher):
            verify_draft(folder, LoadedDraft(self.draft, head), teacher.target, torch.bfloat16)


def _taps(target: LlamaConfig) -> tuple[int, ...]:
    try:
        return default_taps(target)
    except CheckpointError:
        raise AquilineError(
            f"method='eagle3': a target of {target.num_layers} layers has too few to tap three; "
            "give method='eagle'"
        ) from None


def scored_positions(batch: PackedBatch) -> Tensor:
    """Positions i [P] whose token i + 2 is the assistant's and in the same document, ascending."""
    scored = batch.loss_mask[2:] & (batch.positions[2:] >= 2)
    return scored.nonzero().squeeze(1)
