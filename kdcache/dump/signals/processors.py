"""What stands between a teacher's logits and the tokens that generation picks.

transformers calls each of these once a step, with the tokens so far [R, L] and a score for every
token that may come next [R, V], and passes on what comes back.
"""

# B samples, R rows (the beams or draws of a sample together), L tokens so far, P of them prompt,
# V vocabulary, K members

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.dump.codecs.fixed_point import FIXED_BITS, GROUP, group_sums, locate
from kdcache.dump.teachers.model import parameters

#: Probabilities worked on at a time while tokens are drawn.
DRAW_ENTRIES = 1 << 24

NEVER = np.iinfo(np.int64).max


class Watch:
    """Remembers where the scores of a row stopped being finite; comes before any are ruled out."""

    def __init__(self, prompt: int) -> None:
        """Args: prompt: P."""
        self._prompt = prompt
        self._first: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are."""
        # The largest is NaN where any is, and -inf where all are.
        wrong = ~scores.amax(dim=-1).isfinite()  # [R]
        step = input_ids.shape[1] - self._prompt
        if self._first is None:
            self._first = torch.full_like(wrong, NEVER, dtype=torch.int64)
        self._first.clamp_(max=torch.where(wrong, step, NEVER))
        return scores

    def first(self) -> np.ndarray:
        """[R] int64 first token of each row whose scores were not finite; NEVER for none."""
        assert self._first is not None, "asked after generation"
        found: np.ndarray = self._first.cpu().numpy()
        return found


class ForceFirst:
    """Every hypothesis begins with one token."""

    def __init__(self, prompt: int, token: int) -> None:
        """Args: prompt: P; token: its id."""
        self._prompt, self._token = prompt, token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-prob 0 for the token in the first step."""
        if input_ids.shape[1] > self._prompt:
            return scores
        return _only(scores, [self._token])


class ForceLast:
    """A hypothesis that comes to its longest length ends with the end token, as in transformers.

    transformers' own has one length for a batch; here every sample has its own.
    """

    def __init__(self, prompt: int, limits: Tensor, tokens: Sequence[int]) -> None:
        """Args: prompt: P; limits: [B] most tokens; tokens: ids of the end."""
        self._prompt, self._limits, self._tokens = prompt, limits, list(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-prob 0 for the end tokens in each sample's last step."""
        limits = of_rows(self._limits, len(input_ids))
        last = limits == input_ids.shape[1] - self._prompt + 1  # [R]
        return torch.where(last[:, None], _only(scores, self._tokens), scores)


class OwnLength:
    """Stops every sample at its own longest length, whatever stands in the batch beside it."""

    def __init__(self, prompt: int, limits: Tensor) -> None:
        """Args: prompt: P; limits: [B] most tokens."""
        self._prompt, self._limits = prompt, limits

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """[R] bool, whether a row is as long as it may become."""
        return of_rows(self._limits, len(input_ids)) <= input_ids.shape[1] - self._prompt


class Draw:
    """Makes greedy search draw: all but one drawn token are out of question.

    The token is where the running sum of the probabilities, in whole numbers, reaches a hash
    of the sample, the draw and the step. So a draw depends on no batch and no generator's state.
    """

    def __init__(self, prompt: int, hashes: Tensor) -> None:
        """Args: prompt: P; hashes: [R, steps] int64, uniform below 2 to FIXED_BITS."""
        self._prompt, self._hashes = prompt, hashes

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Score 0 for the token that is drawn by its probability."""
        point = self._hashes[:, input_ids.shape[1] - self._prompt]
        rows = max(1, DRAW_ENTRIES // scores.shape[1])
        chosen = [
            draw(some, where)
            for some, where in zip(torch.split(scores, rows), torch.split(point, rows), strict=True)
        ]
        return torch.full_like(scores, -math.inf).scatter_(1, torch.cat(chosen)[:, None], 0)


def draw(scores: Tensor, point: Tensor) -> Tensor:
    """One id a row, drawn with the probabilities that its scores are logits of.

    Args:
        scores: [R, V].
        point: [R] int64, uniform below 2 to FIXED_BITS.

    Returns:
        [R] int64.
    """
    num_rows, vocab_size = scores.shape
    width = -(-vocab_size // GROUP) * GROUP
    fixed = scores.new_zeros((num_rows, width), dtype=torch.float32)  # [R, W]
    probs = torch.softmax(scores.float(), dim=-1)  # [R, V]
    lost = probs[:, :1].isnan()  # such a row must not spoil the running sums of those after it
    probs.masked_fill_(lost, 0)[:, :1] += lost
    torch.mul(probs, 1 << FIXED_BITS, out=fixed[:, :vocab_size]).trunc_()
    sums = group_sums(fixed)  # [R, G]
    # A row sums to 1 but for rounding; stretch [0, 1) to [0, sum) without leaving 64 bits.
    half = FIXED_BITS // 2
    point = point + (((point >> half) * (sums.sum(dim=-1) - (1 << FIXED_BITS))) >> half)
    rows = torch.arange(num_rows, device=scores.device)
    places = locate(fixed, sums, rows, point.clamp_(min=0) + 1)
    return (places - rows * width).clamp_(0, vocab_size - 1)


class MeanOfMembers:
    """The scores of an ensemble: logarithms of its members' mean probabilities."""

    def __init__(self, others: Sequence[Follower]) -> None:
        """Args: others: the members beside the one that generates."""
        self._others = others

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V] float32 log-probs; scores: those of the first member."""
        total = torch.log_softmax(scores.float(), dim=-1)
        for other in self._others:
            log_probs = torch.log_softmax(other(input_ids).to(total.device), dim=-1)
            total = torch.logaddexp(total, log_probs)
        return total - math.log(len(self._others) + 1)


class Follower:
    """A member of an ensemble that reads what another one writes, with a cache of its own.

    Search reorders its rows between steps and tells nobody: a row goes on from whichever row of
    its sample had the same tokens one step before.
    """

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, start: int | None) -> None:
        """Read the source or hold the prompt.

        Args:
            model: the member, of transformers.
            ids: [B, S] what is read; prompts end in the last column.
            mask: [B, S] bool.
            start: what its decoder begins with; None for a causal model.
        """
        self._model, self._start = model, start
        self._num_samples = len(ids)
        self._mask = mask.to(model.device).long()
        self._names = parameters(model)
        self._seen: Tensor | None = None  # [R, L - 1]
        self._cache: Any = None
        self._inputs: dict[str, Any] = {}
        if start is not None:
            encoder = model.get_encoder()
            self._source = encoder(input_ids=ids.to(model.device), attention_mask=self._mask)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """[R, V] float32 logits of the next token; input_ids: [R, L], one more a call."""
        input_ids = input_ids.to(self._model.device)
        if self._seen is None:
            self._begin(len(input_ids))
            new = input_ids if self._start is None else torch.full_like(input_ids, self._start)
        else:
            self._cache.reorder_cache(self._parents(input_ids))
            new = input_ids[:, -1:]
        self._seen = input_ids
        side = {"input_ids": new} if self._start is None else {"decoder_input_ids": new}
        outputs = self._model(
            **side,
            **self._inputs,
            **self._causal(input_ids, new.shape[1]),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = outputs.past_key_values
        logits: Tensor = outputs.logits[:, -1].float()
        return logits

    def _begin(self, num_rows: int) -> None:
        """What is read, for every row."""
        self._mask = of_rows(self._mask, num_rows)
        if self._start is not None:
            self._source.last_hidden_state = of_rows(self._source.last_hidden_state, num_rows)
            self._inputs = {"encoder_outputs": self._source, "attention_mask": self._mask}
        elif "logits_to_keep" in self._names:
            self._inputs = {"logits_to_keep": 1}

    def _causal(self, input_ids: Tensor, num_new: int) -> dict[str, Tensor]:
        """Mask and positions of the tokens so far; an encoder-decoder's decoder needs none."""
        if self._start is not None:
            return {}
        more = input_ids.shape[1] - self._mask.shape[1]
        mask = torch.nn.functional.pad(self._mask, (0, more), value=1)  # [R, L]
        inputs = {"attention_mask": mask}
        if "position_ids" in self._names:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -num_new:]
        return inputs

    def _parents(self, input_ids: Tensor) -> Tensor:
        """[R] the row of the step before that each row goes on from."""
        assert self._seen is not None, "the first step has none"
        shape = self._num_samples, -1, self._seen.shape[1]
        now, before = input_ids[:, :-1].reshape(shape), self._seen.reshape(shape)  # [B, n, L - 1]
        same = (now[:, :, None] == before[:, None]).all(dim=-1)  # [B, n, n]
        assert bool(same.any(dim=-1).all()), "a row goes on from a row of its sample"
        parent = same.int().argmax(dim=-1)  # [B, n]
        first = torch.arange(len(parent), device=parent.device) * parent.shape[1]
        return (parent + first[:, None]).flatten()


def of_rows(values: Tensor, num_rows: int) -> Tensor:
    """[B, ...] as [R, ...], every sample's value for each of its rows."""
    return values.repeat_interleave(num_rows // len(values), dim=0)


def _only(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """[R, V] log-prob 0 for some tokens, none for all others."""
    only = torch.full_like(scores, -math.inf)
    only[:, list(tokens)] = 0
    return only
