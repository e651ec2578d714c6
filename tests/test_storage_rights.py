"""What a user of S3 has to be allowed: the policy of docs/inputs.md, tried on a real server."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

import lungopacity
from cluster.local_s3 import LocalS3
from lungopacity.errors import ImageError, UserError
from lungopacity.storage import Store, open_store
from lungopacity.storage.lease import Lease
from lungopacity.storage.probe import check_checkpoints, check_conditions

DOCS = Path(__file__).resolve().parents[1] / "docs" / "inputs.md"
BUCKETS = ("films", "results")

Become = Callable[[list[dict[str, Any]]], None]


def statements() -> list[dict[str, Any]]:
    """Those of the policy in the docs."""
    (policy,) = re.findall("```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    found: list[dict[str, Any]] = json.loads(policy)["Statement"]
    return found


@pytest.fixture
def become(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Become:
    """Makes this process a user who may do what some statements allow, and nothing else."""
    for name in BUCKETS:
        s3_server.create_bucket(name)
    with s3_server.as_environment():
        iam = boto3.client("iam", endpoint_url=s3_server.endpoint_url)

    def begin(allowed: list[dict[str, Any]]) -> None:
        user = uuid.uuid4().hex
        policy = json.dumps({"Version": "2012-10-17", "Statement": allowed})
        iam.create_user(UserName=user)
        iam.put_user_policy(UserName=user, PolicyName="p", PolicyDocument=policy)
        key = iam.create_access_key(UserName=user)["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])

    return begin


def places() -> tuple[Store, Store]:
    """A place of films, with one in it, and one of results."""
    films, results = (open_store(f"s3://{bucket}/{uuid.uuid4().hex}") for bucket in BUCKETS)
    films.write("a.png", b"film")
    return films, results


def test_the_documented_policy_suffices_and_keeps_the_films_from_being_changed(become):
    films, results = places()
    become(statements())
    films, results = open_store(films.uri), open_store(results.uri)
    assert [item.key for item in films.list()] == ["a.png"]
    assert films.read("a.png") == b"film"
    assert films.head("none") is None
    assert films.now()
    with pytest.raises(UserError, match=r"written: access denied .* need s3:PutObject$"):
        films.write("a.png", b"another")
    with pytest.raises(UserError, match=r"deleted: access denied .* need s3:DeleteObject$"):
        films.delete("a.png")
    check_conditions(results.uri)
    check_checkpoints(results.uri)
    with Lease(results, "nightly", "a test") as lease:
        assert lease.held()
    assert not list(results.list())
    # Ray Train keeps checkpoints through Arrow.
    arrow, root = results.arrow_filesystem()
    arrow.create_dir(f"{root}/run")
    with arrow.open_output_stream(f"{root}/run/a") as file:
        file.write(b"checkpoint")
    assert results.read("run/a") == b"checkpoint"
    arrow.delete_dir(f"{root}/run")
    assert not list(results.list())


@pytest.mark.parametrize("right", ["ListBucket", "GetObject", "PutObject", "DeleteObject"])
def test_the_right_that_is_missing_is_named(become, right: str):
    _, results = places()
    results.write("a", b"old")
    rights = ("ListBucket", "GetObject", "PutObject", "DeleteObject")
    actions = [f"s3:{name}" for name in rights if name != right]
    everywhere = ["arn:aws:s3:::results", "arn:aws:s3:::results/*"]
    become([{"Effect": "Allow", "Action": actions, "Resource": everywhere}])
    store = open_store(results.uri)
    asks = {
        "ListBucket": (lambda: list(store.list()), store.now),
        "GetObject": (lambda: store.head("a"),),
        "PutObject": (lambda: store.write("b", b""),),
        "DeleteObject": (lambda: store.delete("a"),),
    }
    for ask in asks[right]:
        with pytest.raises(UserError, match=rf"access denied .* need s3:{right}\b"):
            ask()
    if right == "GetObject":
        with pytest.raises(ImageError, match="access denied"):
            store.read("a")


def test_a_training_is_refused_before_it_reads_where_only_a_prefix_may_be_listed(
    become, tmp_path: Path
):
    """Arrow asks for the whole bucket before it writes a checkpoint."""
    _, results = places()
    _, _, bucket, prefix = results.uri.split("/")
    listed = {
        "Effect": "Allow",
        "Action": "s3:ListBucket",
        "Resource": f"arn:aws:s3:::{bucket}",
        "Condition": {"StringLike": {"s3:prefix": f"{prefix}/*"}},
    }
    become(
        [
            listed,
            {
                "Effect": "Allow",
                "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"],
                "Resource": f"arn:aws:s3:::{bucket}/{prefix}/*",
            },
        ]
    )
    assert not list(open_store(results.uri).list())
    labels = tmp_path / "labels.csv"
    rows = [
        f"{split}-{label},{label},{split}"
        for split in ("train", "validation")
        for label in ("Normal", "Lung_Opacity")
    ]
    labels.write_text("\n".join(["image,label,split", *rows]))
    told = rf"^{results.uri} cannot be listed: access denied \(403\); .* need s3:ListBucket on "
    with pytest.raises(UserError, match=told):
        lungopacity.train(["s3://films/none"], str(labels), results.uri)
