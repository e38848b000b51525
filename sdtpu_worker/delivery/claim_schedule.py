"""When a channel claims next: a pure state machine, without clock and socket.

A claim that is sent sees everything that was written before Redis runs it. What is written later is told by a notice,
on another connection, so the notice may overtake the claim's own, empty reply. A notice that is read while a claim is
in flight therefore outlives that reply: the next claim follows at once.
"""

from __future__ import annotations

POLL_S = 0.01
"""Seconds between two claims on empty lists where Redis does not say when they are written to."""
SAFETY_POLL_S = 1.0
"""Seconds between two claims on empty lists where Redis does say it."""
REFUSED_PAUSE_S = 1.0
"""Seconds until the next claim when Redis answered the last one with an error."""


class ClaimSchedule:
    """Says when the next claim is due. All times are monotonic seconds. The worker's main thread."""

    def __init__(self) -> None:
        self._at = self._not_before = 0.0
        self._noticed = False  # since the last claim was sent

    def is_due(self, now: float) -> bool:
        """Return whether to claim now, if no claim is in flight."""
        return now >= max(self._at, self._not_before)

    def on_send(self) -> None:
        """A claim is sent: it will see what earlier notices told of."""
        self._noticed = False

    def on_notice(self) -> None:
        """Redis says that a list was written to."""
        self._noticed, self._at = True, 0.0

    def on_message(self) -> None:
        """The claim brought a message; there may be more."""
        self._at = 0.0

    def on_empty(self, now: float, is_told: bool) -> float:
        """The claim found every list empty.

        Args:
            now: the time.
            is_told: Redis will say when one of the lists is written to.

        Returns:
            The seconds until the next claim.
        """
        pause_s = 0.0 if self._noticed else SAFETY_POLL_S if is_told else POLL_S
        self._at = now + pause_s
        return pause_s

    def on_refusal(self, now: float) -> float:
        """Redis answered the claim with an error; no notice makes the next one earlier.

        Args:
            now: the time.

        Returns:
            The seconds until the next claim.
        """
        self._not_before = now + REFUSED_PAUSE_S
        return REFUSED_PAUSE_S
