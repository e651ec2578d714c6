"""Files that crash, hang or starve their decoder cost no other file."""

import errno
import itertools
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import sha256
from multiprocessing.connection import Connection

import numpy as np
import psutil
import pytest

from lungopacity.archive.content import ReadSettings, content_rows
from lungopacity.archive.decoder import Decoder, DecoderStartError, borrowed_decoder
from lungopacity.archive.inventory import take_inventory
from lungopacity.archive.stream import counted_images
from lungopacity.cli import main
from lungopacity.errors import TRANSIENT, ErrorCode
from lungopacity.radiograph import DecodeLimits, Preprocessing
from lungopacity.storage import open_store
from tests.films import dicom, encoded, grey_film

SETTINGS = ReadSettings(Preprocessing(image_size=32), DecodeLimits(max_seconds=1))
CRASHING = (sys.executable, "-m", "tests.archive.crashing_decoder")
FILM = encoded(grey_film())


@pytest.fixture
def crashing():
    decoder = Decoder(SETTINGS, CRASHING)
    yield decoder
    decoder.close()


def codes(decoder: Decoder, files: list[bytes]) -> list[str | None]:
    found = list(decoder.rows(enumerate(files)))
    assert [ticket for ticket, _ in found] == list(range(len(files)))
    assert all(len(rows) == 1 for _, rows in found)
    return [rows[0].get("error_code") for _, rows in found]


def test_the_rows_are_the_same_as_without_a_process():
    frames = np.stack([grey_film(seed).astype(np.uint16) * 16 for seed in range(3)])
    cine = dicom(frames[0], NumberOfFrames=3, PixelData=frames.astype("<u2").tobytes())
    files = [FILM, b"junk", b"", cine, encoded(grey_film(4), "JPEG"), FILM]
    with borrowed_decoder(SETTINGS) as decoder:
        found = list(decoder.rows(enumerate(files)))
    assert found == [
        (number, list(content_rows(data, SETTINGS))) for number, data in enumerate(files)
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_cpu_time_of_decoding_is_reported():
    def used(process: int) -> float:
        with open(f"/proc/{process}/schedstat") as file:
            return int(file.read().split()[0]) / 1e9

    film = encoded(grey_film(height=448, width=448))
    with borrowed_decoder(SETTINGS) as decoder:
        list(decoder.rows([(0, film)]))
        told, taken = decoder.cpu_seconds, used(decoder._process.pid)
        list(decoder.rows((number, film) for number in range(300)))
        told, taken = decoder.cpu_seconds - told, used(decoder._process.pid) - taken
    assert 0.7 * taken < told < taken


@pytest.mark.parametrize("data", [FILM, b"CRASH"])
def test_tickets_without_bytes_keep_their_place(crashing, data):
    files = [("a", None), ("b", data), ("c", None), ("d", None), ("e", FILM)]
    found = [(ticket, len(rows)) for ticket, rows in crashing.rows(files)]
    assert found == [("a", 0), ("b", 1), ("c", 0), ("d", 0), ("e", 1)]


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_file_that_crashes_its_decoder_costs_no_other_file(crashing, place):
    files = [FILM] * 8
    files[place] = b"CRASH"
    expected = [None] * 8
    expected[place] = "decoder_crash"
    assert codes(crashing, files) == expected


@pytest.mark.usefixtures("core_dumps")
def test_a_crash_leaves_no_image_of_a_film_in_memory(crashing, tmp_path):
    store = open_store(str(tmp_path))
    store.write("a.png", FILM)
    objects = take_inventory(str(tmp_path)).objects
    assert len(list(counted_images(store, objects, SETTINGS))) == 1
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
    list(crashing.rows([(0, FILM)]))  # its process starts here
    assert resource.prlimit(crashing._process.pid, resource.RLIMIT_CORE)[0] == 0


@pytest.mark.usefixtures("core_dumps")
def test_nor_do_the_other_processes_of_a_command():
    main(["models", "no-such-network"])
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0


def test_a_large_file_that_crashes_its_decoder_costs_no_other_file(crashing):
    # More than a quarter of the bytes under way: its memory is released as soon as it is done.
    large = 17 << 20
    files = [FILM, b"CRASH" + bytes(large), b"1" * large, FILM, b"2" * large, b"3" * large]
    found = [rows[0] for _, rows in crashing.rows(enumerate(files))]
    assert found[1]["error_code"] == "decoder_crash"
    del files[1], found[1]
    assert [row.get("error_code") for row in found] == [
        None, "not_an_image", None, "not_an_image", "not_an_image",
    ]  # fmt: skip
    assert [row["content_sha256"] for row in found] == [sha256(data).hexdigest() for data in files]


def test_an_order_for_more_bytes_than_there_are_ends_the_process(crashing):
    list(crashing.rows([(0, FILM)]))
    os.ftruncate(crashing._files[0], 0)
    crashing._connection.send_bytes(pickle.dumps((0, 0, 10)))
    assert crashing._process.wait(timeout=10) == 0


def test_each_of_many_crashing_files_is_found(crashing):
    files = [FILM, b"CRASH", b"CRASH", FILM, b"LATE", b"CRASH", FILM, b"LATE"]
    assert codes(crashing, files) == [
        None, "decoder_crash", "decoder_crash", None, "decoder_crash", "decoder_crash", None,
        "decoder_crash",
    ]  # fmt: skip


def test_the_message_names_the_signal_and_what_codecs_write_is_not_shown(crashing, capfd):
    ((_, (row,)),) = list(crashing.rows([(0, b"CRASH")]))
    assert capfd.readouterr() == ("", "")
    assert row["error_message"] == f"the decoder's process died (signal {int(signal.SIGSEGV)})"
    assert (row["status"], row["error_stage"]) == ("failed", "decode")


def test_a_process_that_is_killed_from_outside_costs_no_file(crashing, tmp_path):
    files = [FILM, b"ONCE" + str(tmp_path / "mark").encode(), FILM]
    assert codes(crashing, files) == [None, "not_an_image", None]
    before = crashing._process.pid
    os.kill(before, signal.SIGINT)  # Ctrl-C is for the one who started it
    assert codes(crashing, [FILM]) == [None]
    assert crashing._process.pid == before
    os.kill(before, signal.SIGKILL)
    assert codes(crashing, files) == [None, "not_an_image", None]


@pytest.mark.parametrize(
    ("how", "patience", "code", "told"),
    [
        (b"SPIN", 60, "decoder_timeout", "took more than 1 s of CPU time"),
        (b"HANG", 5, "unavailable", "no answer in 5 s, with less than 1 s of CPU time"),
    ],
)
def test_a_decoder_that_does_not_return_is_killed(crashing, monkeypatch, how, patience, code, told):
    """If it used up its CPU time, it is the file's fault; by the clock, maybe the node's."""
    monkeypatch.setattr("lungopacity.archive.decoder._PATIENCE", patience)
    started = time.monotonic()
    found = [rows for _, rows in crashing.rows(enumerate([FILM, how, FILM]))]
    assert [len(rows) for rows in found] == [1, 1, 1]
    assert [rows[0].get("error_code") for rows in found] == [None, code, None]
    assert found[1][0]["error_message"] == told
    assert time.monotonic() - started < 60


def test_a_file_whose_decoder_the_node_kills_is_tried_another_night(crashing):
    assert codes(crashing, [FILM, b"KILLED", FILM]) == [None, "unavailable", None]
    assert ErrorCode.UNAVAILABLE in TRANSIENT


def test_frames_before_one_that_crashes_keep_their_rows(crashing):
    frames = np.stack([grey_film(seed).astype(np.uint16) * 16 for seed in range(4)])
    elements = {"NumberOfFrames": 4, "PixelData": frames.astype("<u2").tobytes()}
    data = dicom(frames[0], ImageComments="THIRD", **elements)
    found = [rows for _, rows in crashing.rows(enumerate([FILM, data, FILM]))]
    assert [len(rows) for rows in found] == [1, 3, 1]
    assert found[1][:2] == list(content_rows(data, SETTINGS))[:2]
    assert found[1][2]["error_code"] == "decoder_crash"
    assert found[1][2]["error_message"].endswith("; later frames were not tried")
    assert (found[1][2]["frame"], found[1][2]["content_sha256"]) == (2, sha256(data).hexdigest())


@pytest.mark.parametrize("again", [False, True], ids=["at first", "after a crash"])
def test_a_file_that_cannot_be_passed_on_does_not_mix_up_the_rows(crashing, monkeypatch, again):
    files = [encoded(grey_film(seed)) for seed in range(4)]
    if again:
        files[1] = b"CRASH"
    real, calls = os.pwrite, itertools.count()

    def full(*arguments):
        if next(calls) == (4 if again else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    found = [rows for _, rows in crashing.rows(enumerate(files))]
    assert [row.get("error_code") for (row,) in found] == [None, "unavailable", None, None]
    assert [row["content_sha256"] for (row,) in found] == [
        sha256(data).hexdigest() for data in files
    ]


def test_a_lost_order_does_not_mix_up_the_rows(monkeypatch):
    files = [encoded(grey_film(seed)) for seed in range(4)]
    with borrowed_decoder(SETTINGS) as decoder:
        list(decoder.rows([(0, FILM)]))
        real, calls = Connection.send_bytes, itertools.count()

        def losing(connection, order):
            if next(calls) == 1:
                raise OSError(errno.ENOBUFS, "No buffer space available")
            real(connection, order)

        monkeypatch.setattr(Connection, "send_bytes", losing)
        found = [rows for _, rows in decoder.rows(enumerate(files))]
    assert [row["content_sha256"] for (row,) in found] == [
        sha256(data).hexdigest() for data in files
    ]
    assert all(row["status"] == "ok" for (row,) in found)


def test_memory_is_limited_by_the_operating_system():
    small = ReadSettings(
        Preprocessing(image_size=32), DecodeLimits(max_memory_bytes=300 << 20, max_megapixels=500)
    )
    giant = encoded(np.zeros((20_000, 20_000), np.uint8))
    with borrowed_decoder(small) as decoder:
        assert codes(decoder, [giant, FILM]) == ["too_large", None]


def test_large_files_go_one_at_a_time_and_arrive_whole():
    noise = np.random.default_rng(0).integers(0, 4096, (5000, 5000), dtype=np.uint16)
    files = [dicom(noise), FILM, dicom(noise), dicom(noise)]
    patient = ReadSettings(Preprocessing(image_size=32))  # 25 megapixels may need a second
    with borrowed_decoder(patient) as decoder:
        found = [rows[0] for _, rows in decoder.rows(enumerate(files))]
        kept = sum(os.fstat(file).st_size for file in decoder._files)
    assert kept < 1_000_000  # of memory, which would stay with the process for a night
    assert [row["rows"] for row in found] == [5000, 120, 5000, 5000]
    assert found[0]["content_sha256"] == next(content_rows(files[0], patient))["content_sha256"]


def test_a_reader_that_stops_early_leaves_no_rows_for_the_next():
    def stop_early():
        with borrowed_decoder(SETTINGS) as decoder:
            next(decoder.rows(enumerate([FILM] * 10)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stop_early()
    with borrowed_decoder(SETTINGS) as decoder:
        assert codes(decoder, [b"junk"]) == ["not_an_image"]


def test_one_idle_decoder_is_kept_and_for_its_own_settings_only():
    with borrowed_decoder(SETTINGS) as decoder:
        list(decoder.rows([(0, FILM)]))
    with borrowed_decoder(SETTINGS) as again:
        assert again is decoder
    process = decoder._process
    assert process.poll() is None
    with borrowed_decoder(ReadSettings(Preprocessing(image_size=64))) as other:
        assert other is not decoder
    assert process.poll() is not None


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ((sys.executable, "-c", "raise SystemExit(7)"), "exit code 7"),
        (("sleep", "60"), "signal 9"),
        (("/no/such/command",), "No such file or directory"),
    ],
)
def test_a_process_that_cannot_start_is_an_error(command, why, monkeypatch):
    if "sleep" in command:
        monkeypatch.setattr("lungopacity.archive.decoder._START_SECONDS", 0.2)
    decoder = Decoder(SETTINGS, command)
    with pytest.raises(DecoderStartError, match=rf"does not start \({why}\)"):
        list(decoder.rows([(0, FILM)]))
    decoder.close()


def test_the_process_ends_with_its_owner():
    script = (
        "import os, time\n"
        "from lungopacity.archive.decoder import Decoder\n"
        "from tests.archive.test_decoder import FILM, SETTINGS\n"
        "decoder = Decoder(SETTINGS)\n"
        "list(decoder.rows([(0, FILM)]))\n"
        "print(decoder._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    owner = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    pid = int(owner.stdout)
    for _ in range(100):
        if not _runs(pid):
            return
        time.sleep(0.1)
    pytest.fail("the decoder outlived its owner")


def _runs(pid: int) -> bool:
    """It stays as a zombie where process 1 takes no notice of it, as in many containers."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_the_limits_do_not_apply_to_this_process():
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
