"""Faults of the network between the real server and our client."""

import itertools
import operator
import pickle
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lungopacity.errors import ErrorCode, ImageError, UserError
from lungopacity.results.folder import commit_run, read_run
from lungopacity.storage import S3Store, open_store
from lungopacity.storage.quick_get import QuickGet
from tests.fault_proxy import code_of
from tests.results.records import record_of

CONTENT = bytes(range(256)) * 300
LARGE = CONTENT * 150
"""Every part of an upload but the last must have at least 5 MiB."""


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "flip"])
def test_after_a_passing_fault_the_object_is_fetched_again(proxy, s3_uri, fault):
    store = open_store(s3_uri)
    store.write("a", CONTENT)
    proxy.fault, proxy.times = fault, 2
    assert store.read("a") == CONTENT
    assert sum(proxy.gets.values()) == 3
    proxy.gets.clear()
    with store.open_local("a") as file:
        assert file.read() == CONTENT
    assert sum(proxy.gets.values()) == 3


@pytest.mark.parametrize("fault", ["503", "reset", "lost answer"])
def test_a_write_that_was_refused_or_got_no_answer_is_tried_again(proxy, s3_uri, fault):
    proxy.choose_any = lambda method, _path, times: fault if (method, times) == ("PUT", 1) else None
    store = open_store(s3_uri)
    for key in "abcdef":
        store.write(key, CONTENT)
    assert [store.read(key) == CONTENT for key in "abcdef"] == [True] * 6
    store.write("metrics/one.parquet", b"")
    commit_run(store, "one", record_of("one"))  # the second try finds the record of the first
    assert read_run(store, "one") is not None


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("cut", ErrorCode.UNAVAILABLE, "connection broke|cut short"),
        ("flip", ErrorCode.DIGEST_MISMATCH, "differs from"),
    ],
)
def test_a_lasting_fault_has_its_code_and_gives_no_bytes(proxy, s3_uri, fault, code, message):
    store = open_store(s3_uri)
    store.write("a", CONTENT)
    proxy.fault, proxy.times = fault, 1000
    with pytest.raises(ImageError, match=message) as caught:
        store.read("a")
    assert caught.value.code is code
    # Once by obstore, the rest by boto3.
    assert sum(proxy.gets.values()) == 1 + 4


def test_no_bytes_of_a_failed_attempt_stay_behind_those_of_the_last(proxy, s3_uri, tmp_path):
    store = open_store(s3_uri)
    store.write("a", CONTENT)
    proxy.fault, proxy.times = "flip", 1

    def replace(method, path):
        if method == "GET" and proxy.gets[path] == 1:
            store.write("a", b"shorter")

    proxy.on_request = replace
    assert store.local_file("a", tmp_path / "a").read_bytes() == b"shorter"
    assert sum(proxy.gets.values()) == 2


def uploaded_in_parts(store: S3Store, *sizes: int) -> None:
    """Upload `LARGE` as the object `a`, in parts of these sizes and one with the rest."""
    of = {"Bucket": store.bucket, "Key": f"{store.prefix}a"}
    upload = store.client.create_multipart_upload(**of)["UploadId"]
    bounds = [0, *itertools.accumulate(sizes), len(LARGE)]
    parts = []
    for number, (first, end) in enumerate(itertools.pairwise(bounds), 1):
        part = store.client.upload_part(
            **of, UploadId=upload, PartNumber=number, Body=LARGE[first:end]
        )
        parts.append({"PartNumber": number, "ETag": part["ETag"]})
    store.client.complete_multipart_upload(**of, UploadId=upload, MultipartUpload={"Parts": parts})


@pytest.mark.parametrize("sizes", [(), (5_500_000, 5_500_000), (5_760_000,)])
def test_an_object_that_was_uploaded_in_parts_is_checked_by_their_md5s(proxy, s3_uri, sizes):
    store = open_store(s3_uri)
    uploaded_in_parts(store, *sizes)
    (listed,) = store.list()
    assert listed.etag.endswith(f"-{len(sizes) + 1}")
    for etag in (None, listed.etag):
        assert store.read("a", etag=etag) == LARGE
    proxy.fault, proxy.times = "flip", 3
    proxy.gets.clear()
    with store.open_local("a", etag=listed.etag) as file:
        assert file.read() == LARGE
    assert sum(proxy.gets.values()) == 4
    proxy.times = 1000
    assert code_of(lambda: store.read("a", etag=listed.etag)) is ErrorCode.DIGEST_MISMATCH
    # No digest of a range is known.
    assert sum(map(operator.ne, store.read_head("a", 100), LARGE[:100])) <= 1


def answering_with_etag(store, monkeypatch, etag):
    """Every answer has this ETag, which is not made of MD5s."""
    ask = S3Store._ask

    def with_etag(store, method, **arguments):
        arguments.pop("IfMatch", None)
        return ask(store, method, **arguments) | {"ETag": f'"{etag}"'}

    monkeypatch.setattr(S3Store, "_ask", with_etag)
    monkeypatch.setattr(store._ready.quick, "_store", None)


def test_an_etag_that_a_proxy_marked_as_weak_names_the_same_object(s3_uri, monkeypatch):
    store = open_store(s3_uri)
    store.write("a", CONTENT)
    ask = S3Store._ask

    def weak(store, method, **arguments):
        answer = ask(store, method, **arguments)
        return answer | ({"ETag": f"W/{answer['ETag']}"} if "ETag" in answer else {})

    monkeypatch.setattr(S3Store, "_ask", weak)
    (listed,) = store.list()
    assert store.head("a").etag == listed.etag
    assert store.read("a", etag=store.head("a").etag) == CONTENT
    store.write("a", b"another", if_match=store.head("a").etag)
    assert store.read("a") == b"another"


@pytest.mark.parametrize("sizes", [(), (5_500_000, 5_500_000)])
def test_two_fetches_are_compared_if_a_multipart_etag_is_not_made_of_md5s(
    proxy, s3_uri, monkeypatch, caplog, sizes
):
    """MinIO under `--no-compat`, Ozone and Alibaba's OSS make such ETags."""
    store = open_store(s3_uri)
    uploaded_in_parts(store, *sizes)
    etag = f"{'fab9' * 8}-{len(sizes) + 1}"
    answering_with_etag(store, monkeypatch, etag)
    assert store.read("a", etag=etag) == LARGE
    assert sum(proxy.gets.values()) == 2
    proxy.gets.clear()
    proxy.fault, proxy.times = "flip", 2
    with store.open_local("a", etag=etag) as file:
        assert file.read() == LARGE
    assert sum(proxy.gets.values()) == 4
    (told,) = caplog.messages
    assert re.match(rf"the ETags of .* in s3://{store.bucket} at http.* fetched twice", told)
    proxy.times = 1000
    assert code_of(lambda: store.read("a", etag=etag)) is ErrorCode.DIGEST_MISMATCH


@pytest.mark.parametrize("etag", ["fab9" * 8, f"{'fab9' * 8}-1"])
def test_opaque_etags_are_not_compared_with_md5s(proxy, s3_uri, monkeypatch, etag):
    """VAST makes such ETags for files that were written by NFS."""
    open_store(s3_uri).write("a", LARGE)
    monkeypatch.setenv("LUNGOPACITY_ETAGS", "opaque")
    store = open_store(s3_uri)
    monkeypatch.delenv("LUNGOPACITY_ETAGS")
    answering_with_etag(store, monkeypatch, etag)
    elsewhere = pickle.loads(pickle.dumps(store))  # on a node where the variable is not set
    assert elsewhere.read("a", etag=etag) == LARGE
    assert sum(proxy.gets.values()) == 1
    if "-" not in etag:
        with pytest.raises(ImageError, match="set LUNGOPACITY_ETAGS=opaque") as told:
            open_store(s3_uri).read("a", etag=etag)
        assert told.value.code is ErrorCode.DIGEST_MISMATCH


def test_small_objects_with_opaque_etags_are_fetched_once(proxy, s3_uri, monkeypatch):
    monkeypatch.setenv("LUNGOPACITY_ETAGS", "opaque")
    store = open_store(s3_uri)
    store.write("a", b"film")
    proxy.fault, proxy.times = "flip", 1
    assert store.read("a", etag=store.head("a").etag) != b"film"
    assert sum(proxy.gets.values()) == 1


def test_an_unknown_value_of_the_etags_variable_is_refused(monkeypatch):
    monkeypatch.setenv("LUNGOPACITY_ETAGS", "md4")
    with pytest.raises(UserError, match="LUNGOPACITY_ETAGS is 'md4'; set it to opaque, or unset"):
        open_store("s3://bucket")


@pytest.mark.parametrize(
    ("told", "is_md5"),
    [
        ({"ServerSideEncryption": "aws:kms"}, False),
        ({"ServerSideEncryption": "aws:kms:dsse"}, False),
        ({"SSECustomerAlgorithm": "AES256"}, False),
        ({"ServerSideEncryption": "AES256"}, True),  # S3's own keys
    ],
)
def test_the_etag_of_an_object_under_kms_or_customer_keys_is_not_taken_for_an_md5(
    proxy, s3_uri, monkeypatch, told, is_md5
):
    """Although it looks like one."""
    store = open_store(s3_uri)
    store.write("a", CONTENT)
    ask = S3Store._ask
    no_md5 = {"ETag": f'"{"fab9" * 8}"', **told}
    monkeypatch.setattr(S3Store, "_ask", lambda *of, **more: ask(*of, **more) | no_md5)
    monkeypatch.setattr(store._ready.quick, "_store", None)
    if is_md5:
        assert code_of(lambda: store.read("a")) is ErrorCode.DIGEST_MISMATCH
    else:
        assert store.read("a") == CONTENT
        assert sum(proxy.gets.values()) == 1


def test_parts_of_different_or_unknown_sizes_are_checked_by_length_only(proxy, s3_uri, monkeypatch):
    store = open_store(s3_uri)
    uploaded_in_parts(store, 5_600_000, 5_300_000)
    assert store.read("a") == LARGE
    uploaded_in_parts(store, 6_000_000, 5_300_000)  # two of the first size exceed the object
    assert store.read("a") == LARGE
    uploaded_in_parts(store, 5_500_000, 5_500_000)
    ask = S3Store._ask

    def without_part_numbers(store, method, **arguments):
        answer = ask(store, method, **arguments)
        answer.pop("PartsCount", None)
        return answer

    monkeypatch.setattr(S3Store, "_ask", without_part_numbers)
    proxy.fault, proxy.times = "flip", 1000
    assert len(store.read("a")) == len(LARGE)
    proxy.choose_any = lambda method, *_: "403" if method == "HEAD" else None
    assert len(store.read("a")) == len(LARGE)


@contextmanager
def room_of(size_bytes: int) -> Iterator[None]:
    """No file that this process writes may grow larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [5_000, len(CONTENT)])  # fits in the file's buffer, or does not
def test_a_full_disk_is_not_taken_for_a_broken_network(proxy, s3_uri, tmp_path, size):
    store = open_store(s3_uri)
    store.write("a", CONTENT[:size])
    with room_of(4096):
        with (
            pytest.raises(ImageError, match=r"^temporary files .* \(File too large\); free") as row,
            store.open_local("a"),
        ):
            pass
        with pytest.raises(UserError, match=rf"^{tmp_path}: temporary files cannot be written on "):
            store.local_file("a", tmp_path / "a")
    assert row.value.code is ErrorCode.UNAVAILABLE
    assert sum(proxy.gets.values()) == 2


def test_a_server_that_only_fails_is_unavailable(proxy, s3_uri, monkeypatch):
    monkeypatch.setattr("lungopacity.storage.s3_clients._REQUEST_ATTEMPTS", 2)
    store = open_store(s3_uri)
    store.write("a", CONTENT)
    proxy.fault, proxy.times = "503", 1000
    with pytest.raises(ImageError) as caught:
        store.read("a")
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert sum(proxy.gets.values()) == 1 + 2


def test_obstore_pauses_while_all_its_reads_fail(proxy, s3_uri, monkeypatch):
    store = open_store(s3_uri)
    for name in range(20):
        store.write(str(name), CONTENT)
    tried = []
    checked = QuickGet._checked
    monkeypatch.setattr(
        QuickGet,
        "_checked",
        lambda self, key, *more: tried.append(key) or checked(self, key, *more),
    )
    proxy.fault, proxy.times = "cut", 1
    for name in range(20):
        assert store.read(str(name)) == CONTENT
    assert len(tried) == 8
    monkeypatch.setattr("lungopacity.storage.quick_get._PAUSE_S", -1.0)
    monkeypatch.setattr("lungopacity.storage.s3_clients._known_clients", {})
    store = open_store(s3_uri)
    for name in range(20):
        assert store.read(str(name)) == CONTENT
    assert len(tried) == 8 + 20


def test_a_small_object_is_read_without_boto3(s3_uri, monkeypatch):
    store = open_store(s3_uri)
    store.write("2026/a=b/c.png", CONTENT)
    store.write("2026//c.png", b"another")
    store.write("2026/c d.png", b"of boto3")
    asked = []
    fetch = type(store)._fetch
    monkeypatch.setattr(
        type(store), "_fetch", lambda self, key, *more: asked.append(key) or fetch(self, key, *more)
    )
    etag = store.head("2026/a=b/c.png").etag
    assert store.read("2026/a=b/c.png", etag=etag) == store.read("2026/a=b/c.png") == CONTENT
    assert asked == []
    # obstore would normalise these names, and ask for another object.
    assert store.read("2026//c.png") == b"another"
    assert store.read("2026/c d.png") == b"of boto3"
    assert asked == ["2026//c.png", "2026/c d.png"]
    store.write("2026/a=b/c.png", b"replaced")
    with pytest.raises(ImageError) as caught:
        store.read("2026/a=b/c.png", etag=etag)
    assert caught.value.code is ErrorCode.CHANGED
