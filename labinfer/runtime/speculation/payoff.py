"""Whether speculation pays: the tokens that it won against the time that it took, as measured while it runs."""

from __future__ import annotations

WINDOW = 8
"""Steps that are judged together."""

FIRST, SHORTEST, LONGEST = 4, 16, 1024
"""Steps without speculation: to learn what they cost, after a window that did not pay, and after many of them."""


class Payoff:
    """Says when to pause. ``always`` never does; what steps cost is compared with the same steps without guesses."""

    def __init__(self, always: bool) -> None:
        self.always = always
        self.pause = FIRST
        self.next_pause = SHORTEST
        self.clear()

    @property
    def paused(self) -> bool:
        """Whether the next step goes without guesses."""
        return self.pause > 0 and not self.always

    def clear(self) -> None:
        """Begin a window."""
        self.steps, self.won, self.lost = 0, 0.0, 0.0

    def plain_step(self) -> None:
        """A step went without guesses."""
        self.pause = max(0, self.pause - 1)

    def step(self, sequences: int, accepted: int, seconds: float, plain_seconds: float) -> None:
        """A step of ``sequences`` took ``seconds`` and kept ``accepted`` guesses; without them, ``plain_seconds``."""
        self.steps += 1
        self.won += accepted * plain_seconds / sequences  # the time that others would take to make those tokens
        self.lost += seconds - plain_seconds
        if self.steps == WINDOW:
            if self.won < self.lost:
                self.pause, self.next_pause = self.next_pause, min(2 * self.next_pause, LONGEST)
            else:
                self.next_pause = SHORTEST
            self.clear()
