"""Few lengths from many: what compiled layers need of a data collator."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_IGNORED = -100  # what the loss leaves out


class BucketCollator:
    """Pads the batches of another collator on the right to the next of a few lengths.

    `accelerate(compile=...)` compiles and records every shape it meets, so real data, where almost
    every batch has a length of its own, needs it:

        trainer.data_collator = lorapar.BucketCollator(trainer.data_collator, [256, 512, 1024])

    Args:
        collator: returns a dict with `input_ids` [batch, T]; every tensor [batch, T, ...] in it is
            padded: labels by -100, input_ids by `pad_token_id`, all others by 0.
        lengths: of the buckets, at least one. A longer batch stays as it is.
        pad_token_id: None: the collator's, or that of its tokenizer, else 0. What it is does not
            matter, since labels and mask leave it out.

    Raises:
        ValueError: lengths are empty or not positive; in a call: the batch is padding-free (several
            examples in a row, told apart by cu_seq_lens), which fills a row instead
            (`packing=True`, all rows of one length).
    """

    def __init__(
        self,
        collator: Callable[[Sequence[Any]], Mapping[str, Any]],
        lengths: Sequence[int],
        *,
        pad_token_id: int | None = None,
    ):
        if not lengths or min(lengths) < 1:
            raise ValueError(f"BucketCollator: lengths must be positive, got {list(lengths)}")
        self.collator, self.lengths = collator, sorted(lengths)
        owners = (collator, getattr(collator, "tokenizer", None))
        known = [getattr(owner, "pad_token_id", None) for owner in owners]
        self.pad_token_id = next((n for n in (pad_token_id, *known) if n is not None), 0)

    def __call__(self, features: Sequence[Any]) -> Mapping[str, Any]:
        batch = self.collator(features)
        if any(key.startswith("cu_seq_lens") for key in batch):
            raise ValueError(
                "BucketCollator: the batch is padding-free; give the trainer packing=True or "
                "padding_free=False"
            )
        tokens = batch["input_ids"].shape[1]
        more = next((n for n in self.lengths if n >= tokens), tokens) - tokens
        if more:
            for key, value in batch.items():
                if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == tokens:
                    batch[key] = self._padded(key, value, more)
        return batch

    def _padded(self, key: str, value: Tensor, more: int) -> Tensor:
        fill = {"input_ids": self.pad_token_id, "labels": _IGNORED}.get(key, 0)
        room = value.new_full((value.shape[0], more, *value.shape[2:]), fill)
        return torch.cat([value, room], dim=1)
