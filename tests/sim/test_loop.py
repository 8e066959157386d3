"""The simulated clock: it never runs past the end that a test gave it."""

from __future__ import annotations

from dlmfs.sim.loop import SimLoop


def test_the_clock_stops_at_its_end_behind_a_cancelled_timer() -> None:
    """A cancelled timer that is due lets `run_for` begin a step, which must not run the next live
    timer, however late that one is: every test's idea of time would be wrong from there on.
    """
    loop = SimLoop()
    ran: list[str] = []
    loop.call_later(0.5, ran.append, "cancelled").cancel()
    loop.call_later(3.0, ran.append, "late")
    loop.run_for(1.0)
    assert loop.time() == 1.0
    assert not ran
    loop.run_for(2.0)
    assert ran == ["late"]
