"""DeCLIP's step as the original code computes it, for `training.py --faithful`; written from what the code does.

Two image views one after the other; both texts padded to the context length; the vocabulary scored at every position;
three searches of the queue a step, each on a fresh copy that is normalized again; contrastive losses pair by pair; an
optimizer that takes one parameter at a time. Towers are OpenCLIP's, which are built like the original's
(`nn.MultiheadAttention`, QuickGELU in four passes). Tokenizing inside the step, as the original does, is left out.

Source: Sense-GVT/DeCLIP, prototype/model/declip.py and prototype/solver/declip_solver.py.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_cli.model.heads import SimSiamPredictor, SimSiamProjector

VOCABULARY_SIZE, QUEUE_SIZE, CONTEXT = 49409, 65536, 77


class OriginalDeClip(nn.Module):
    """Both towers, the heads and the queue."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.clip = open_clip.create_model(name)
        width = self.clip.positional_embedding.shape[1]
        dim = self.clip.text_projection.shape[1]
        self.mlm_head = nn.Linear(width, VOCABULARY_SIZE)
        self.projector, self.predictor = SimSiamProjector(dim), SimSiamPredictor()
        self.register_buffer("queue", F.normalize(torch.randn(QUEUE_SIZE, dim), dim=1))

    def text_states(self, tokens: Tensor) -> Tensor:
        """Run the text tower, (B, L) → (B, L, E)."""
        clip = self.clip
        states = clip.token_embedding(tokens) + clip.positional_embedding
        return clip.ln_final(clip.transformer(states, attn_mask=clip.attn_mask))

    def neighbors(self, texts: Tensor) -> Tensor:
        """Copy the queue, normalize it again and take the best row of each text, (B, D) → (B, D)."""
        with torch.no_grad():
            rows = F.normalize(self.queue.clone(), dim=1)
            best = (texts @ rows.t()).topk(1, dim=1).indices[:, 0]
        return rows[best]

    def forward(self, images: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of pixels (B, 2, 3, S, S), ids (B, 2, 77) and hidden ids (B, 77)."""
        scale = self.clip.logit_scale.exp().clamp(max=100)
        raw = [self.clip.encode_image(images[:, view]) for view in (0, 1)]
        states = [self.text_states(tokens[:, text]) for text in (0, 1)]
        ends = [tokens[:, text].argmax(1) for text in (0, 1)]
        rows = torch.arange(len(tokens), device=tokens.device)
        pooled = [state[rows, end] @ self.clip.text_projection for state, end in zip(states, ends, strict=True)]
        image, text = [F.normalize(x, dim=1) for x in raw], [F.normalize(x, dim=1) for x in pooled]
        clip = nn_loss = torch.zeros((), device=tokens.device)
        for one in image:
            for other in text:
                logits = scale * one @ other.t()
                clip = clip + (F.cross_entropy(logits, rows) + F.cross_entropy(logits.t(), rows)) / 8
        found = [self.neighbors(x) for x in text]
        self.neighbors(text[0])  # the third search, of which only the push is used
        for one in image:
            for other in found:
                nn_loss = nn_loss + F.cross_entropy(scale * one @ other.to(one.dtype).t(), rows) / 4
        logits = self.mlm_head(states[0])  # (B, 77, vocabulary): every position
        is_masked = labels != -100
        mlm = F.cross_entropy(logits[is_masked], labels[is_masked])
        z = [self.projector(x) for x in raw]
        p = [self.predictor(x) for x in z]
        cosine = F.cosine_similarity(p[0], z[1].detach()).mean() + F.cosine_similarity(p[1], z[0].detach()).mean()
        return 0.4 * clip + 0.2 * (nn_loss + mlm - cosine / 2)

    @torch.no_grad()
    def push(self, texts: Tensor) -> None:
        """Let the newest rows take the place of the oldest, (B, D)."""
        self.queue[: len(texts)] = texts
        self.queue.copy_(self.queue.roll(-len(texts), 0))


def original_step(
    name: str, batch_size: int, autocast: Callable[[], AbstractContextManager[None]], device: torch.device
) -> Callable[[], None]:
    """Build one whole step of the original on pairs of noise."""
    torch.manual_seed(0)
    model = OriginalDeClip(name).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    images = torch.randn(batch_size, 2, 3, 224, 224, device=device)
    tokens = torch.randint(1, 49000, (batch_size, 2, CONTEXT))
    tokens[:, :, 16:] = 0
    tokens[:, :, 15] = 49407
    labels = torch.full((batch_size, CONTEXT), -100)
    labels[:, 1:3] = tokens[:, 0, 1:3]
    tokens, labels = tokens.to(device), labels.to(device)

    def step() -> None:
        with autocast():
            loss = model(images, tokens, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.push(F.normalize(torch.randn(batch_size, model.queue.shape[1], device=device), dim=1))

    return step
