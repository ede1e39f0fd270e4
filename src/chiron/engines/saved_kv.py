"""KV of interrupted requests in an engine's host memory: a request that resumes here is copied in, not prefilled."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable


class SavedKv:
    """By request: tokens generated and tokens of KV. The longest forgotten goes first."""

    def __init__(self, tokens_max: int) -> None:
        self._tokens_max = tokens_max
        self._saved: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._saved)

    def generated(self, key: Hashable) -> int:
        """Output tokens of this request whose KV is here; 0: none."""
        return self._saved.get(key, (0, 0))[0]

    def save(self, key: Hashable, generated: int, kv_tokens: int) -> None:
        self.forget(key)
        self._saved[key] = (generated, kv_tokens)
        self.tokens += kv_tokens
        while self.tokens > self._tokens_max:
            self.forget(next(iter(self._saved)))

    def forget(self, key: Hashable) -> None:
        saved = self._saved.pop(key, None)
        if saved is not None:
            self.tokens -= saved[1]
