"""How long computing takes, by length and prefix: measured as forward passes end, followed as it changes.

All is thread-safe, and telling costs a lock and an append.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.fitting import Floats, OnlineFit

Ints = npt.NDArray[np.int64]

LEAST_KNOWN_TOKENS = 64
"""A pass of so many tokens has to be seen before passes count as known: a short one tells nothing of long ones."""


@dataclasses.dataclass(frozen=True)
class PrefillModel:
    """How long computing takes: ``pass_s`` for each forward pass, and for n tokens after p others
    ``token_s * n + pair_s * n * (p + n / 2)``, the second being attention; and ``whole_s * (p + n)**2`` with a backend
    whose attention asks for all tokens again in each pass (SGLang's ``torch_native``, ``_run_sdpa_forward_extend``).

    Attributes:
        pass_s: of a forward pass, whatever is in it.
        token_s: of a token.
        pair_s: of a token that looks at another.
        pass_tokens: computed by one forward pass at most; 0 for no bound.
        whole_s: of a pair of any two tokens that a pass knows.
        restored_s: of a token that is restored beside the pass that uses it. Nothing where decoders and model share
            nothing; without a GPU they share cores.
    """

    pass_s: float
    token_s: float
    pair_s: float
    pass_tokens: int = 0
    whole_s: float = 0.0
    restored_s: float = 0.0

    def seconds(self, new_tokens: int, prefix_tokens: int) -> float:
        """To compute ``new_tokens`` after ``prefix_tokens`` that are there."""
        return float(self.seconds_of(np.array([new_tokens]), np.array([prefix_tokens]))[0])

    def seconds_of(self, new_tokens: Ints, prefix_tokens: Ints) -> Floats:
        """The same of each of several, int64."""
        chunk = np.minimum(new_tokens, self.pass_tokens) if self.pass_tokens else new_tokens
        # The passes before the last, which are full ones.
        full = np.maximum(0, -(-new_tokens // np.maximum(1, chunk)) - 1)
        pairs = new_tokens * (prefix_tokens + new_tokens / 2)
        # The sum of (p + i * c) ** 2 for i from 1 to the number of full passes, and the last one.
        wholes = (prefix_tokens + new_tokens) ** 2.0
        wholes += full * prefix_tokens**2.0 + prefix_tokens * chunk * full * (full + 1.0)
        wholes += chunk**2.0 * full * (full + 1.0) * (2.0 * full + 1.0) / 6
        seconds: Floats = (
            (full + 1) * self.pass_s + self.token_s * new_tokens + self.pair_s * pairs + self.whole_s * wholes
        )
        return np.where(new_tokens > 0, seconds, 0.0)


class PrefillMeter:
    """What forward passes of prompts take."""

    def __init__(self, pass_tokens: int = 0) -> None:
        """Knows nothing. ``pass_tokens`` as in :class:`PrefillModel`."""
        self._pass_tokens = pass_tokens
        self._most_tokens = 0
        self._fit = OnlineFit(5, primary=1)

    def forward_pass(
        self, new_tokens: Sequence[int], prefix_tokens: Sequence[int], seconds: float, restored_tokens: int = 0
    ) -> None:
        """A pass over one or several requests has ended.

        Args:
            new_tokens: of each.
            prefix_tokens: of each, before them.
            seconds: that it took, without waiting for what was restored.
            restored_tokens: of all prefixes together, those that were restored beside it.
        """
        pairs = sum(new * (prefix + new / 2) for new, prefix in zip(new_tokens, prefix_tokens, strict=True))
        wholes = sum((prefix + new) ** 2 for new, prefix in zip(new_tokens, prefix_tokens, strict=True))
        self._fit.add((1.0, sum(new_tokens), pairs, wholes, restored_tokens), seconds)
        self._most_tokens = max(self._most_tokens, max(new_tokens, default=0))

    @property
    def is_known(self) -> bool:
        """Whether a pass has told how long longer ones take."""
        return self._most_tokens >= LEAST_KNOWN_TOKENS

    def model(self, refit: bool = True) -> PrefillModel | None:
        """What is known; None before the first pass that tells. ``refit`` as of ``OnlineFit``."""
        if not self.is_known:
            return None
        fitted = self._fit.coefficients(refit)
        if fitted is None:
            return None
        pass_s, token_s, pair_s, whole_s, restored_s = fitted
        model = PrefillModel(pass_s, token_s, pair_s, self._pass_tokens, whole_s, restored_s)
        if refit:
            metrics.PREFILL_TOKENS_PER_SECOND.set(1024 / max(1e-9, model.seconds(1024, 0)))
        return model
