import json
import os
import threading
import time
from datetime import timedelta

import pytest

from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.storage import ConflictError, open_store
from lungopacity.storage.lease import Lease


def short_s(store_uri: str) -> float:
    """Seconds of a lease that a test waits out. S3 gives times of objects in whole seconds."""
    return 2.0 if store_uri.startswith("s3:") else 0.8


def lease(store_uri: str, seconds: float | None = None) -> Lease:
    return Lease(open_store(store_uri), "nightly", "a night", seconds or short_s(store_uri))


def test_a_second_job_is_told_who_holds_the_lease(store_uri):
    with lease(store_uri) as held:
        with pytest.raises(UserError, match=rf"a night, process {os.getpid()} on "):
            lease(store_uri).__enter__()
        held.check()
    # Released: nothing is left, and the next job need not wait.
    assert list(open_store(store_uri).list()) == []
    with lease(store_uri):
        pass


def test_a_lease_is_renewed_while_its_holder_lives(store_uri):
    with lease(store_uri) as held:
        time.sleep(2 * short_s(store_uri))
        held.check()
        with pytest.raises(UserError, match="another job is at work"):
            lease(store_uri).__enter__()


def test_a_killed_holders_lease_is_taken_over_once_it_expires_and_not_before(store_uri):
    dead = lease(store_uri)
    dead._take()  # and never renewed, as after a kill
    began = time.monotonic()
    with pytest.raises(UserError, match="last sign of life"):
        lease(store_uri)._take()
    while True:
        try:
            with lease(store_uri) as held:
                held.check()
                break
        except UserError:
            time.sleep(0.1)
    imprecise_s = 1.1 if store_uri.startswith("s3:") else 0.1
    assert time.monotonic() - began > short_s(store_uri) - imprecise_s
    with pytest.raises(UserError, match="was lost"):
        dead.check()


def test_a_patient_job_waits_for_a_killed_holders_lease_and_stops_for_a_living_holder(
    store_uri, monkeypatch
):
    def patient(seconds: float) -> Lease:
        return Lease(open_store(store_uri), "nightly", "a night", seconds, patient=True)

    lease(store_uri)._take()
    with patient(short_s(store_uri)) as held:
        held.check()
    monkeypatch.setattr("lungopacity.storage.lease._RENEWALS", 200)
    with patient(60.0) as held:
        began = time.monotonic()
        with pytest.raises(UserError, match="another job is at work"):
            patient(60.0).__enter__()
        assert time.monotonic() - began < 40  # it saw a renewal, and did not wait for the end
        held.check()


def test_a_race_for_an_expired_lease_has_one_winner(store_uri):
    store = open_store(store_uri)
    store.write("_lock/nightly.json", b"{}")
    time.sleep(2.5 if store_uri.startswith("s3:") else 1.1)
    got: list[Lease] = []
    gate = threading.Barrier(8)

    def take() -> None:
        mine = lease(store_uri, 1.0)
        gate.wait()
        try:
            mine._take()
            got.append(mine)
        except UserError:
            pass

    for thread in (threads := [threading.Thread(target=take) for _ in range(8)]):
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].check()


def test_a_job_that_lost_its_lease_may_not_publish(store_uri):
    store, others = open_store(store_uri), json.dumps({"token": "x"}).encode()
    with lease(store_uri) as held:
        store.write("_lock/nightly.json", others)
        with pytest.raises(UserError, match="another job has taken it over"):
            held.check()
        held._thread.join(20)  # the renewing thread notices, too
        assert held.taken_over
    # And the job does not remove the other's lease, nor if it notices only as it ends.
    assert store.head("_lock/nightly.json") is not None
    store.delete("_lock/nightly.json")
    with lease(store_uri, 60.0):
        store.write("_lock/nightly.json", others)
    assert store.head("_lock/nightly.json") is not None


def test_a_job_whose_lease_is_gone_may_not_publish(tmp_path):
    """Another job took it for dead, and has not written its own lease yet."""
    with lease(str(tmp_path), 60.0) as held:
        held.store.delete(held.key)
        with pytest.raises(UserError, match="another job has taken it over"):
            held.check()


def test_a_clock_that_was_set_back_does_not_lock_for_ever(tmp_path):
    """The lease of a killed holder is dated hours ahead; a living holder renews its lease."""
    store = open_store(str(tmp_path))
    with lease(str(tmp_path)):
        path = tmp_path / "_lock" / "nightly.json"
        later = (store.now() + timedelta(hours=3)).timestamp()
        os.utime(path, (later, later))
        with pytest.raises(UserError, match="another job is at work"):
            lease(str(tmp_path)).__enter__()
    dead = lease(str(tmp_path))
    dead._take()
    os.utime(path, (later, later))
    with lease(str(tmp_path)) as held:
        held.check()


@pytest.mark.parametrize("content", [b"[]", b'"x"', b"5", b"null", b"{"])
def test_a_damaged_lease_is_still_held(tmp_path, content):
    open_store(str(tmp_path)).write("_lock/nightly.json", content)
    with pytest.raises(UserError, match=r"another job is at work there: unknown, process \? on"):
        lease(str(tmp_path))._take()


def test_a_takeover_that_another_job_wins_is_refused(tmp_path, monkeypatch, caplog):
    """Both found the lease expired, and the other job was quicker."""
    store = open_store(str(tmp_path))
    store.write("_lock/nightly.json", b"{}")
    os.utime(tmp_path / "_lock" / "nightly.json", (0, 0))
    second = lease(str(tmp_path))

    def put(*, if_absent: bool = False, if_match: str | None = None) -> None:
        raise ConflictError(second.key)

    monkeypatch.setattr(second, "_put", put)
    with pytest.raises(UserError, match="another job is at work there: unknown"):
        second._take()
    assert "is taken over" in caplog.text


def test_a_lease_that_is_released_and_taken_again_is_refused(tmp_path):
    """The waiting job looked for it in between."""
    first, second, third = (lease(str(tmp_path), 60.0) for _ in range(3))
    first._take()

    def in_between(key: str) -> None:
        del second.store.head
        second.store.delete(key)
        assert second.store.head(key) is None
        third._take()

    second.store.head = in_between
    with pytest.raises(UserError, match="another job is at work"):
        second._take()
    third.check()


def test_a_holder_that_renews_at_the_last_moment_keeps_its_lease(tmp_path):
    """The waiting job looked for a sign of life a moment too early."""
    held, patient = lease(str(tmp_path)), lease(str(tmp_path))
    held._take()
    patient.patient = True
    write, delete = patient.store.write, patient.store.delete

    def late(key: str, data: bytes, **condition) -> None:
        if data == b"{}":
            held._renew()
        write(key, data, **condition)

    def later(key: str) -> None:
        held._renew()
        delete(key)

    patient.store.write, patient.store.delete = late, later
    with pytest.raises(UserError, match="another job is at work"):
        patient._take()
    held.check()


def test_a_lease_lasts_from_the_start_of_its_renewal(tmp_path):
    """The storage may date it then, however late it answers."""
    held = lease(str(tmp_path), 60.0)
    held._take()
    write = held.store.write

    def slow(*content: object, **condition) -> None:
        write(*content, **condition)
        time.sleep(0.3)

    held.store.write = slow
    began = time.monotonic()
    held.check()
    assert 0 <= held._renewed - began < 0.2


def failing(*_: object, **__: object) -> None:
    raise UserError("no server answers")


def test_a_storage_failure_longer_than_the_lease_does_not_lose_it(tmp_path, caplog):
    """Hours of work are not thrown away as long as no other job has started."""
    with lease(str(tmp_path), 0.3) as held:
        write, held.store.write = held.store.write, failing
        deadline = time.monotonic() + 10
        while held.held() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(UserError, match=r"was lost \(it could not be renewed in time\)$"):
            held.check()
        held.store.write = write
        time.sleep(0.3)
        before = held.store.head(held.key)
        held.check()
        # It is renewed again, by its thread and by `check`.
        assert held.store.head(held.key) != before
        with pytest.raises(UserError, match="another job is at work"):
            lease(str(tmp_path), 60.0).__enter__()
        # But a job that started meanwhile keeps it.
        held.store.write = failing
        while held.held():
            time.sleep(0.05)
        write(held.key, json.dumps({"token": "x"}).encode())
        held.store.write = write
        with pytest.raises(UserError, match="another job has taken it over"):
            held.check()
    assert "the lease could not be renewed: no server answers" in caplog.text


def test_a_lease_that_cannot_be_released_stops_nothing(tmp_path, caplog):
    with lease(str(tmp_path)) as held:
        held.store.delete = failing
    assert "the lease could not be released: no server answers" in caplog.text


def unreadable(*_: object, **__: object) -> None:
    raise ImageError(ErrorCode.UNAVAILABLE, Stage.FETCH, "storage answered 503")


def test_a_lease_that_cannot_be_read_is_held_until_it_expires(tmp_path):
    with lease(str(tmp_path), 60.0) as held:
        read, held.store.read = held.store.read, unreadable
        held.store.write = failing
        held.check()
        held._renewed -= 61
        with pytest.raises(UserError, match=r"was lost \(it could not be renewed in time\)"):
            held.check()
        held.store.read = read
        del held.store.write
        held.check()
    assert list(open_store(str(tmp_path)).list()) == []


def test_a_renewal_without_answer_is_tried_again_if_the_lease_cannot_be_read(tmp_path, caplog):
    with lease(str(tmp_path), 0.5) as held:
        write, read, conflicts = held.store.write, held.store.read, []

        def landing(key: str, data: bytes, **condition) -> None:
            write(key, data, **condition)
            if len(conflicts) < 2:
                conflicts.append(key)
                raise ConflictError(key)

        held.store.write, held.store.read = landing, unreadable
        deadline = time.monotonic() + 10
        while "could not be renewed" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        held.store.read = read
        time.sleep(0.5)
        held.check()
    assert "_lock/nightly.json cannot be read (storage answered 503)" in caplog.text


def test_a_renewal_after_one_whose_etag_is_unknown_is_written(tmp_path):
    """The etag could not be read, so the next renewal meets what the last one wrote."""
    with lease(str(tmp_path), 60.0) as held:
        head, held.store.head = held.store.head, failing
        assert held.held()
        held.store.head = head
        before = held.store.head(held.key)
        assert held.held()
        assert held.store.head(held.key) != before


def test_a_lost_answer_is_not_taken_for_another_holder(tmp_path):
    """The client asks again after a broken connection, and meets its own first request."""
    store = open_store(str(tmp_path))
    real, broken = store.write, []

    def write(key: str, data: bytes, **condition) -> None:
        real(key, data, **condition)
        if not broken:
            broken.append(key)
            raise ConflictError(key)

    store.write = write
    with Lease(store, "nightly", "a night", short_s(str(tmp_path))) as held:
        held.check()
    assert broken
