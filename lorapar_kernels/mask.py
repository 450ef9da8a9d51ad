"""Which elements of one adapter may be updated, and which rank columns take part in the forward."""

import torch
from torch import Tensor


class LoraMask:
    """The trainable elements of one adapter, fixed for a stage.

    Args:
        a: bool [r, K], elements of A that may be updated; None means all of them.
        b: bool [N, r], elements of B that may be updated; None means all of them.
        live: bool [r], rank columns that take part in the forward; None means all. A dead column
            must contribute exactly zero and have no trainable element (`check_dead`).

    Raises:
        TypeError: a mask is not a bool tensor.
        ValueError: a mask has the wrong number of dimensions, the ranks disagree, or a dead
            column has trainable elements.
    """

    def __init__(self, a: Tensor | None, b: Tensor | None, *, live: Tensor | None = None):
        for name, mask, dims in (("a", a, 2), ("b", b, 2), ("live", live, 1)):
            if mask is None:
                continue
            if mask.dtype != torch.bool:
                raise TypeError(f"LoraMask: {name} must be a bool tensor, got {mask.dtype}")
            if mask.dim() != dims:
                raise ValueError(
                    f"LoraMask: {name} needs {dims} dimensions, got shape {list(mask.shape)}; "
                    f"expected a [r, K], b [N, r], live [r]"
                )
        ranks = {
            name: mask.shape[dim]
            for name, mask, dim in (("a", a, 0), ("b", b, 1), ("live", live, 0))
            if mask is not None
        }
        if len(set(ranks.values())) > 1:
            raise ValueError(f"LoraMask: a, b and live disagree about the rank: {ranks}")
        self._a, self._b, self._live = a, b, live
        # Index lists and counts are made once, so that no call waits for the device.
        self._a_rows = None if a is None else _indices(a.any(1))
        self._b_columns = None if b is None else _indices(b.any(0))
        self._live_columns = None if live is None else _indices(live)
        if live is not None:
            self._refuse_trainable_dead_columns()
        self._tensors = (
            *_lists(a, len(a) if a is not None else 0, self._a_rows, self._live_columns),
            *_lists(b, b.shape[1] if b is not None else 0, self._b_columns, self._live_columns),
        )

    def _refuse_trainable_dead_columns(self) -> None:
        dead = ~self.live
        rows = dead if self.a is None else self.a.any(1) & dead
        columns = dead if self.b is None else self.b.any(0) & dead
        if (rows | columns).any():
            where = torch.nonzero(rows | columns).flatten().tolist()
            raise ValueError(
                f"LoraMask: dead columns {where[:8]} have trainable elements; a column that trains "
                f"must be live"
            )

    @property
    def a(self) -> Tensor | None:
        """bool [r, K], trainable elements of A; None means all."""
        return self._a

    @property
    def b(self) -> Tensor | None:
        """bool [N, r], trainable elements of B; None means all."""
        return self._b

    @property
    def live(self) -> Tensor | None:
        """bool [r], rank columns that take part in the forward; None means all."""
        return self._live

    @property
    def a_rows(self) -> Tensor | None:
        """int32, the rows of A with a trainable element, in order; None means all."""
        return self._a_rows

    @property
    def b_columns(self) -> Tensor | None:
        """int32, the columns of B with a trainable element, in order; None means all."""
        return self._b_columns

    @property
    def live_columns(self) -> Tensor | None:
        """int32, the live rank columns, in order; None means all."""
        return self._live_columns

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the kernels read: for A, then for B, the bool mask, and two int32 lists: where the
        trained columns stand among the live ones, and the place of each of the r columns in that
        list (-1: not there). A list is None where it would be 0, 1, 2 …"""
        return self._tensors

    @property
    def trains_a(self) -> bool:
        """Whether any element of A is trainable."""
        return self._a_rows is None or len(self._a_rows) > 0

    @property
    def trains_b(self) -> bool:
        """Whether any element of B is trainable."""
        return self._b_columns is None or len(self._b_columns) > 0

    def to(self, device: torch.device | str) -> "LoraMask":
        """The same mask on another device (itself if it is there already)."""
        masks = [m for m in (self.a, self.b, self.live) if m is not None]
        if all(m.device == torch.device(device) for m in masks):
            return self
        a, b, live = (None if m is None else m.to(device) for m in (self.a, self.b, self.live))
        return LoraMask(a, b, live=live)

    def check(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Raises ValueError unless the mask has the shapes of this adapter."""
        pairs = (("a", self.a, lora_a.shape), ("b", self.b, lora_b.shape))
        for name, mask, shape in (*pairs, ("live", self.live, lora_a.shape[:1])):
            if mask is not None and mask.shape != shape:
                raise ValueError(
                    f"LoraMask: {name} is {list(mask.shape)}, the adapter needs {list(shape)} "
                    f"(A {list(lora_a.shape)}, B {list(lora_b.shape)})"
                )

    def check_dead(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Raises ValueError unless every dead column contributes exactly zero."""
        if self.live is None:
            return
        silent = (lora_b == 0).all(0) | (lora_a == 0).all(1)  # [r]
        wrong = torch.nonzero(~self.live & ~silent).flatten().tolist()
        if wrong:
            raise ValueError(
                f"LoraMask: columns {wrong[:8]} are marked dead but contribute to the output; zero "
                f"their column of B first, or keep them live"
            )


def _lists(
    mask: Tensor | None, rank: int, trained: Tensor | None, live: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if mask is None:
        return None, None, None
    mask = mask.contiguous()
    if live is None and len(trained) == rank:
        return mask, None, None
    trained = trained.long()
    slot = torch.full((rank,), -1, dtype=torch.int32, device=mask.device)
    slot[trained] = torch.arange(len(trained), dtype=torch.int32, device=mask.device)
    if live is not None and len(live) == len(trained) > 0:  # all that is live trains
        return mask, None, slot
    where = trained if live is None else torch.searchsorted(live.long(), trained)
    return mask, where.to(torch.int32), slot


def _indices(flags: Tensor) -> Tensor:
    return torch.nonzero(flags).flatten().to(torch.int32)
