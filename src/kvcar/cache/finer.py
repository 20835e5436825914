"""Pages that would cost too much as codes: which they are, and which of their tokens are read exactly instead.

What a page costs is known when it is encoded: the errors of its tokens under the metric that its codecs were fitted to, in nats
a token. A page beyond the limit keeps its tokens exactly, beside the sinks, and attention passes over its codes. So does one with a
single token far beyond it: some tokens draw attention as the first one does, wherever they stand, and no mean over a page shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

COSTLIEST_TOKEN = 2.5
"""How many times what a page may cost on average a single token of it may cost. Of 23,000 tokens of many kinds of text at 8 times smaller
the costliest took 1.4 times the limit, one in 10,000 more than 0.7 times; a token like the first one took 4."""


def costs_too_much(mean: Tensor, costliest: Tensor, limit: float) -> Tensor:
    """Whether pages must be kept exactly whose tokens cost ``mean`` nats on average and ``costliest`` at most, bool of their shape."""
    return (mean > limit) | (costliest > COSTLIEST_TOKEN * limit)


@dataclass(frozen=True)
class FinerWrite:
    """Tokens that are kept exactly besides being coded.

    Attributes:
        place: of the first of them, among all finer tokens.
        first: the first of them, among those that leave the window.
        count: how many.
    """

    place: int
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class FinerPages:
    """The finer pages of a batch. A page that is finer in one sequence takes the same room in all of them.

    Attributes:
        page_tokens: tokens of a page.
        pages: indices of the finer pages, rising.
        shown: int64 ``[B, len(pages)]``: so many tokens at a page's beginning are read from its codes, the others exactly.
        open_cost: float32 ``[B]``, nats: what the tokens cost that are in a page not yet filled.
    """

    page_tokens: int
    pages: tuple[int, ...]
    shown: Tensor
    open_cost: Tensor

    @classmethod
    def none(cls, batch: int, page_tokens: int, device: torch.device) -> FinerPages:
        """No finer page in ``batch`` sequences."""
        shown = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        return cls(page_tokens, (), shown, torch.zeros(batch, device=device, dtype=torch.float32))

    @property
    def tokens(self) -> int:
        """Tokens that are kept exactly, or have room to be, of each sequence."""
        return len(self.pages) * self.page_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self.shown.nbytes + self.open_cost.nbytes

    @property
    def exact_tokens(self) -> Tensor:
        """Tokens of each sequence that are read exactly, int64 ``[B]``, those of the last page counted as if it were full."""
        return (self.page_tokens - self.shown).sum(-1)

    def after(
        self, costs: Tensor | None, start: int, leave: int, limit: float | None
    ) -> tuple[FinerPages, list[FinerWrite]]:
        """The finer pages after ``leave`` more tokens from token ``start`` on became codes, and what to keep of them.

        Args:
            costs: of those tokens, nats, float32 ``[B, leave]``; None where they are not known.
            start: tokens that were coded before.
            leave: how many were coded now.
            limit: nats a token, on average over a page, beyond which a page is finer; None for no limit.
        """
        if leave == 0 or ((costs is None or limit is None) and not self.pages):
            return self, []
        first, last = start // self.page_tokens, (start + leave - 1) // self.page_tokens
        bad, open_cost = self._judged(costs, start, leave, limit)
        pages, shown, writes = list(self.pages), self.shown, []
        costly = bad.any(0).tolist()
        for page in range(first, last + 1):
            low, high = max(start, page * self.page_tokens), min(start + leave, (page + 1) * self.page_tokens)
            place = low - page * self.page_tokens
            kept = torch.where(bad[:, page - first], place, self.page_tokens)
            if pages and pages[-1] == page:
                shown = torch.cat([shown[:, :-1], torch.minimum(shown[:, -1], kept)[:, None]], dim=1)
            elif costly[page - first]:
                pages.append(page)
                shown = torch.cat([shown, kept[:, None]], dim=1)
            else:
                continue
            writes.append(FinerWrite((len(pages) - 1) * self.page_tokens + place, low - start, high - low))
        return FinerPages(self.page_tokens, tuple(pages), shown, open_cost), writes

    def mapped(self, change: Callable[[Tensor], Tensor]) -> FinerPages:
        """The finer pages of other sequences: ``change`` of every table, which works on the batch axis (0)."""
        return replace(self, shown=change(self.shown), open_cost=change(self.open_cost))

    def cropped(self, tokens: int) -> FinerPages:
        """The finer pages where only the first ``tokens`` tokens are left in the pages."""
        kept = sum(page * self.page_tokens < tokens for page in self.pages)
        return FinerPages(
            self.page_tokens, self.pages[:kept], self.shown[:, :kept].contiguous(), torch.zeros_like(self.open_cost)
        )

    def from_page(self, page: int) -> FinerPages:
        """Those of ``page`` and later ones."""
        first = sum(own < page for own in self.pages)
        return self if first == 0 else replace(self, pages=self.pages[first:], shown=self.shown[:, first:])

    def token_index(self) -> Tensor:
        """Which tokens of a sequence there is room for, int64 ``[tokens]``."""
        place = torch.arange(self.page_tokens, device=self.shown.device)
        first = torch.tensor(self.pages, dtype=torch.int64, device=self.shown.device) * self.page_tokens
        return (first[:, None] + place).flatten()

    def filled_tokens(self, paged: int) -> int:
        """How many of ``tokens`` there are where ``paged`` tokens lie in the pages: all but those of a last page cut off."""
        if not self.pages:
            return 0
        return self.tokens - max(0, (self.pages[-1] + 1) * self.page_tokens - paged)

    def shown_tokens(self, pages: int, first: int = 0) -> Tensor | None:
        """Tokens at the beginning of every page that are read from its codes, int64 ``[B, pages]``; None for all.

        Args:
            pages: how many there are.
            first: the first of them.
        """
        if not self.pages:
            return None
        shown = torch.full((len(self.shown), pages), self.page_tokens, dtype=torch.int64, device=self.shown.device)
        shown[:, [page - first for page in self.pages]] = self.shown
        return shown

    def visible(self, first: Tensor, paged: int) -> Tensor:
        """Which of the tokens that are kept exactly are read, bool ``[B, tokens]``.

        Args:
            first: first token of each sequence that is no padding and no sink, int64 ``[B]``.
            paged: tokens in the pages.
        """
        place = torch.arange(self.page_tokens, device=self.shown.device)
        token = self.token_index().view(-1, self.page_tokens)
        there = (token < paged) & (token >= first[:, None, None])
        return (there & (place >= self.shown[..., None])).flatten(1)

    def _judged(self, costs: Tensor | None, start: int, leave: int, limit: float | None) -> tuple[Tensor, Tensor]:
        """Which pages cost too much, bool ``[B, pages]``, and what a page not yet filled costs so far, float32 ``[B]``."""
        before, batch = start % self.page_tokens, len(self.shown)
        after = -(start + leave) % self.page_tokens
        pages = (before + leave + after) // self.page_tokens
        if costs is None or limit is None:
            return torch.zeros(batch, pages, dtype=torch.bool, device=self.shown.device), self.open_cost
        by_page = torch.nn.functional.pad(costs, (before, after)).unflatten(1, (pages, -1))
        totals = by_page.sum(-1)
        if before:
            totals[:, 0] += self.open_cost
        bad = costs_too_much(totals / self.page_tokens, by_page.amax(-1), limit)
        return bad, totals[:, -1] if after else torch.zeros_like(self.open_cost)
