"""What steps cost here, as measured while they run: how large a piece of a prompt can be before decoding stalls."""

from __future__ import annotations

WEIGHT = 0.2
"""How much one measurement moves an estimate."""

RENEW = 16
"""Steps in a row with prompt tokens beside decodes, after which one without shows what decoding costs by now."""

OUTLIER = 1.25
"""A decode step that took so many times what was expected, as when a kernel was compiled, counts as no longer one."""


def moved(estimate: float | None, measured: float) -> float:
    """``estimate`` after a measurement."""
    if estimate is None:
        return measured
    return estimate + WEIGHT * (min(measured, OUTLIER * estimate) - estimate)


class StepCosts:
    """Seconds of a step that only decodes, by about how many sequences, and of a prompt token, alone or beside them.

    Beside decoding, few tokens at a time cost more each than many alone. How much follows from the sums of many steps,
    since the times of single ones differ by more than that.
    """

    def __init__(self) -> None:
        self.decode: dict[int, float] = {}
        self.alone, self.beside = PromptCost(), PromptCost()
        self.num_mixed = 0  # steps since one that only decoded

    def observe(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """A step of ``decodes`` sequences and ``prompt_tokens`` more tokens took ``seconds``."""
        if prompt_tokens == 0:
            size = decodes.bit_length()
            self.decode[size] = moved(self.decode.get(size), seconds)
            self.num_mixed = 0
        elif decodes == 0:
            self.alone.observe(prompt_tokens, 0.0, seconds)
        elif (base := self.decode_seconds(decodes)) is not None:
            self.beside.observe(prompt_tokens, base, seconds)
            self.num_mixed += 1

    def decode_seconds(self, decodes: int) -> float | None:
        """A step of ``decodes`` sequences: the measurement of the nearest number."""
        size, sizes = decodes.bit_length(), list(self.decode)  # others ask while the engine measures more
        if not sizes or size in sizes:
            return self.decode.get(size)
        return self.decode[min(sizes, key=lambda known: abs(known - size))]

    def step_seconds(self, decodes: int, prompt_tokens: int) -> float | None:
        """A step of ``decodes`` sequences and ``prompt_tokens`` more tokens; None before any has decoded."""
        base = self.decode_seconds(decodes)
        return None if base is None else base + self.prompt_seconds(prompt_tokens)

    def prompt_seconds(self, tokens: int) -> float:
        """What it takes to compute so many tokens of a text again, 0 before anything was measured."""
        return (self.alone.per_token or self.beside.per_token or 0.0) * tokens

    def prompt_tokens(self, decodes: int, stall: float) -> int:
        """Prompt tokens that a step of ``decodes`` sequences can take in and last longer by a part ``stall`` at most.

        Few different numbers, since a device may prepare a step of each size once. At least one, so that none starves,
        but now and then none, since contexts grow and with them what decoding costs. At most twice as many as of late,
        since what that would cost is not known well, and no more than so many tokens could be, decodes too, in a step
        of prompts alone: times of single steps differ by more than what a few tokens cost.
        """
        if self.num_mixed >= RENEW:
            return 0
        base, few = self.decode_seconds(decodes), max(1, decodes // 2)
        if base is None or self.beside.per_token is None:
            return few  # a token of a prompt costs at most what one of a sequence does
        count = min(stall * base / self.beside.per_token, 2 * self.beside.tokens)
        if self.alone.per_token is not None:
            count = min(count, (1 + stall) * base / self.alone.per_token - decodes)
        return round_down(int(count))


class PromptCost:
    """What prompt tokens cost: moving sums of the seconds beyond those of decoding, and of tokens."""

    def __init__(self) -> None:
        self.seconds, self.tokens = 0.0, 0.0
        self.per_token: float | None = None

    def observe(self, tokens: int, base: float, seconds: float) -> None:
        """A step with ``tokens`` prompt tokens took ``seconds``, without them it would take ``base``."""
        if self.per_token is not None:
            seconds = min(seconds, 2 * (base + self.per_token * tokens))
        weight = WEIGHT if self.tokens else 1.0
        self.seconds += weight * (seconds - base - self.seconds)
        self.tokens += weight * (tokens - self.tokens)
        self.per_token = max(self.seconds, 0.01 * base) / self.tokens


def round_down(count: int) -> int:
    """The largest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at most ``count``; 1 for less."""
    if count < 2:
        return 1
    power = 1 << (count.bit_length() - 1)
    return power + power // 2 if count >= power + power // 2 else power
