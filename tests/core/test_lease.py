"""Which renewals of a lease count (`core.lease.Renewal`)."""

from __future__ import annotations

from dlmfs.core.lease import Renewal


def test_a_renewal_counts_from_its_sending() -> None:
    renewal = Renewal(10.0, term=1, connection=1)
    assert renewal.confirmed(12.0, term=1, connection=1)
    assert renewal.renewed_at == 12.0


def test_a_former_leaders_renewal_does_not_count() -> None:
    """The read after it finds another leader: it may have been the former one that answered."""
    renewal = Renewal(10.0, term=1, connection=1)
    assert not renewal.confirmed(12.0, term=2, connection=1)
    assert renewal.renewed_at == 10.0
    assert renewal.confirmed(13.0, term=2, connection=1)


def test_a_renewal_through_another_member_does_not_count() -> None:
    """The right term, read from one member before and after; but another answered the renewal."""
    renewal = Renewal(10.0, term=2, connection=1)
    assert not renewal.confirmed(12.0, term=2, connection=None)
    assert not renewal.confirmed(13.0, term=2, connection=3)
    assert renewal.renewed_at == 10.0
    assert renewal.confirmed(14.0, term=2, connection=3)
    assert renewal.renewed_at == 14.0
