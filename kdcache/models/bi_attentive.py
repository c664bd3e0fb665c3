"""The bi-attentive BiLSTM: two texts, or one beside itself, as one vector.

A transformers model, so that students of it are saved and loaded like any other: once this module
is imported, transformers' Auto classes know its model_type.
"""

# B samples, S positions of a batch, S_x and S_y of each side, E embedding, F feed-forward,
# H hidden units of a direction, D output

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

MODEL_TYPE = "bi_attentive"


class BiAttentiveConfig(PreTrainedConfig):
    """Sizes of a bi-attentive BiLSTM.

    The paper states 256 units of the LSTMs and no other size of the encoder; the others are chosen
    here so that the model with the heads of its seven tasks has about its 10.2 M parameters beside
    the embeddings.

    Args:
        vocab_size: ids that it reads.
        embedding_size: E.
        feed_forward_size: F, of the layer between embeddings and first LSTM.
        lstm_size: H; an LSTM's states have both directions, 2 H.
        hidden_size: D, of what a head reads.
        bi_attention: whether each side is compared with the other; without it the second LSTM
            reads the first one's states alone.
        dropout: of embeddings, and of what the last layer reads.
        initializer_range: standard deviation of embeddings and matrices; those of LSTMs are
            Glorot-uniform.
        pad_token_id: whose embedding is zero and stays so; None: no such id.
        keys: others of transformers.

    Raises:
        ValueError: a size is below 1, or dropout no share.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        vocab_size: int = 30522,
        embedding_size: int = 300,
        feed_forward_size: int = 384,
        lstm_size: int = 256,
        hidden_size: int = 768,
        bi_attention: bool = True,
        dropout: float = 0.1,
        initializer_range: float = 0.05,
        pad_token_id: int | None = 0,
        **keys: Any,
    ) -> None:
        sizes = {
            "vocab_size": vocab_size,
            "embedding_size": embedding_size,
            "feed_forward_size": feed_forward_size,
            "lstm_size": lstm_size,
            "hidden_size": hidden_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; expected 0 or more, and less than 1")
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.feed_forward_size = feed_forward_size
        self.lstm_size = lstm_size
        self.hidden_size = hidden_size
        self.bi_attention = bi_attention
        self.dropout = dropout
        self.initializer_range = initializer_range
        super().__init__(**{**keys, "pad_token_id": pad_token_id})


class BiLSTM(nn.Module):
    """A layer of LSTMs in both directions, each from its own end of a sample.

    The second one reads every sample turned around by itself, padding still behind it. So neither
    needs packed sequences, which on CPU take torch's slow path.

    Args:
        reads: features of a position.
        units: H, of each direction.
    """

    def __init__(self, reads: int, units: int) -> None:
        super().__init__()
        self.ahead = nn.LSTM(reads, units, batch_first=True)
        self.back = nn.LSTM(reads, units, batch_first=True)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """[B, S, 2H] states, zero outside the mask.

        Args:
            inputs: [B, S, features].
            mask: [B, S] bool, of each sample the first positions.
        """
        at = torch.arange(mask.shape[1], device=mask.device)[None]  # [1, S]
        lengths = mask.sum(1, keepdim=True)
        turned = torch.where(mask, lengths - 1 - at, at)[:, :, None]  # [B, S, 1], its own inverse
        back, _ = self.back(inputs.take_along_dim(turned, 1))
        states = torch.cat([self.ahead(inputs)[0], back.take_along_dim(turned, 1)], dim=2)
        return states * mask[:, :, None]


class BiAttentive(PreTrainedModel):
    """The model without a head, a body of `kdcache.models.multi_task` models.

    Source: Liu et al. 2019, MKD, section 3.2; McCann et al. 2017, sections 5.2 and 5.3.
    """

    config_class = BiAttentiveConfig
    config: BiAttentiveConfig
    base_model_prefix = "body"

    def __init__(self, config: BiAttentiveConfig) -> None:
        super().__init__(config)
        states = 2 * config.lstm_size
        self.embeddings = nn.Embedding(
            config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id
        )
        self.feed_forward = nn.Linear(config.embedding_size, config.feed_forward_size)
        self.encoder = BiLSTM(config.feed_forward_size, config.lstm_size)
        reads = 3 * states if config.bi_attention else states
        self.integrator = BiLSTM(reads, config.lstm_size)
        self.pool_score = nn.Linear(states, 1)
        self.output = nn.Linear(2 * 3 * states, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """[vocab_size, E]."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Others in their place."""
        self.embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """[B, D], one vector of every text or pair.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 on padding; None: all are tokens.
            token_type_ids: [B, S], 1 on the second text of a pair; a sample that has none there,
                as all without them, is compared with itself.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        tokens = attention_mask.bool()
        second = tokens & (token_type_ids == 1)
        first = tokens & ~second
        # One side alone, whichever it is, stands for both.
        first, second = (
            torch.where(one.any(1, keepdim=True), one, tokens) for one in (first, second)
        )
        x, x_mask = self._encoded(input_ids, first)
        y, y_mask = self._encoded(input_ids, second)
        pooled = torch.cat(
            [self._pooled(states, mask) for states, mask in self._integrated(x, x_mask, y, y_mask)],
            dim=1,
        )  # [B, 2 * 3 * 2H]
        found: Tensor = self.output(self.dropout(pooled))
        return found

    def _encoded(self, ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S_x, 2H] states of one side, tokens moved to the front, and [B, S_x] their mask."""
        order = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)
        longest = max(1, int(chosen.sum(1).max()))
        ids, mask = (of.gather(1, order)[:, :longest] for of in (ids, chosen))
        embedded = self.dropout(self.embeddings(ids))  # [B, S_x, E]
        return self.encoder(self.feed_forward(embedded).relu(), mask), mask

    def _integrated(
        self, x: Tensor, x_mask: Tensor, y: Tensor, y_mask: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Both sides' states by the second LSTM, the same for both, with their masks."""
        if self.config.bi_attention:
            affinity = x @ y.transpose(1, 2)  # [B, S_x, S_y], A
            weights_x = _softmax(affinity, x_mask[:, :, None], 1)  # A_x, over the tokens of x
            weights_y = _softmax(affinity, y_mask[:, None, :], 2)  # A_y transposed, over y's
            context_x = weights_x.transpose(1, 2) @ x  # [B, S_y, 2H], C_x
            context_y = weights_y @ y  # [B, S_x, 2H], C_y
            x = torch.cat([x, x - context_y, x * context_y], dim=2)
            y = torch.cat([y, y - context_x, y * context_x], dim=2)
        return [(self.integrator(side, mask), mask) for side, mask in ((x, x_mask), (y, y_mask))]

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """[B, 3 * 2H] maximum, mean and self-attentive mean of [B, S_x, 2H] states."""
        on = mask[:, :, None]
        most = states.masked_fill(~on, torch.finfo(states.dtype).min).amax(1)
        mean = (states * on).sum(1) / on.sum(1).clamp(min=1)
        weights = _softmax(self.pool_score(states), on, 1)  # [B, S_x, 1]
        return torch.cat([most, mean, (weights * states).sum(1)], dim=1)


def _softmax(scores: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Softmax over what the mask has of a dimension."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim)


AutoConfig.register(MODEL_TYPE, BiAttentiveConfig)
AutoModel.register(BiAttentiveConfig, BiAttentive)
