"""Runs whose pipeline does not finish, without Ray."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lungopacity
from lungopacity.archive.decoder import DecoderStartError
from lungopacity.cli import main
from lungopacity.errors import NOTICE, UserError
from lungopacity.models.compiled import CompiledNetwork, to_bytes
from lungopacity.results.folder import read_run
from lungopacity.results.query import query, runs
from lungopacity.screening import screen
from lungopacity.screening.plan import unfinished_runs
from lungopacity.screening.screen import as_run
from lungopacity.storage import open_store
from tests.models.tiny import tiny_model


def test_lost_objects_are_read_again_and_then_reported(place, monkeypatch, caplog):
    from ray.exceptions import NodeDiedError

    def lost(_job, _plan, todo, **_) -> set[str]:
        if todo["image"][0].as_py() == "Adams.png":
            raise NodeDiedError("gone")
        return set()

    monkeypatch.setattr(screen, "_run_pipeline", lost)
    # Two pieces of work. That one of them ends does not mean that the films of both crash readers.
    monkeypatch.setattr("lungopacity.results.workbench._ROWS_PER_FILE", 2)
    with pytest.raises(UserError, match="4 of 4 objects have no result after 3 rounds; nothing"):
        place.night()
    assert caplog.text.count("4 objects were lost with their task or node: reading them again") == 2
    assert not list(place.store.list("runs/"))


def test_an_object_that_is_lost_each_time_gets_a_row_and_keeps_no_other_waiting(
    place, monkeypatch, caplog
):
    rounds = []

    def dies(_job, plan, todo, *, losses, most, **_) -> set[str]:
        rounds.append((todo.num_rows, losses, most))
        if todo.num_rows > 1:
            place.write_parts(plan, todo.slice(1))
        return set()

    monkeypatch.setattr(screen, "_run_pipeline", dies)
    monkeypatch.setattr(screen, "_FEW_OBJECTS", 0)
    with pytest.raises(UserError, match="1 of 4 objects have no result"):
        place.night()
    assert rounds == [(4, 0, 1024), (1, 100, 64), (1, 100, 64)]
    monkeypatch.setattr(screen, "_FEW_OBJECTS", 1)
    place.archive.write("Evans.png", b"x")
    finished, own = place.night().runs
    assert (finished.ok, finished.failed) == (3, 1)
    assert (own.ok, own.failed, own.failed_again, own.exit_code) == (1, 1, 1, 1)
    assert rounds[-1] == (1, 100, 1)
    assert "1 object crashed every reader: error code reader_crash" in caplog.text
    lost = query(place.results, "SELECT image FROM latest WHERE error_code = 'reader_crash'")
    assert lost["image"].to_pylist() == ["Adams.png"]


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143)])
def test_a_stopped_run_says_how_to_resume_it(place, monkeypatch, caplog, capfd, end):
    def stopped(*_, **__):
        raise end

    place.failing["Adams.png"] = "timeout"
    place.night(max_failed_fraction=1.0)
    (done,) = runs(place.results)["run_id"].to_pylist()
    monkeypatch.setattr(screen, "_run_pipeline", stopped)
    monkeypatch.setattr(screen, "ray_ahead", nullcontext)
    with pytest.raises(type(end)):
        lungopacity.screen(place.archive.uri, place.model, place.results, run_id="mine")
    assert "stopped; resume it with --run-id mine and the same options" in caplog.text
    # Not by the night, which goes on by itself, nor where --run-id means another run.
    with pytest.raises(type(end)):
        place.night()
    with pytest.raises(type(end)):
        lungopacity.retry(place.results, done)
    assert "stopped; the next night continues run 2" in caplog.text
    assert "stopped; run the same command again to start over" in caplog.text
    assert [start.after for start in unfinished_runs(place.store)] == [1, 1, 1]
    assert main(["runs", "--results", place.results, "--unfinished"]) == 0
    _, _, *begun, notice = capfd.readouterr().out.splitlines()
    assert notice == NOTICE
    assert [line.split()[0] == "mine" for line in begun] == [True, False, False]


def test_a_lost_node_is_survived_and_an_error_of_ours_is_not(caplog):
    from ray.exceptions import ActorDiedError, NodeDiedError, RaySystemError, RayTaskError

    with screen._surviving_lost_nodes():
        raise NodeDiedError("gone")
    assert "Ray lost the work in progress (NodeDiedError: gone)" in caplog.text
    no_decoder = RaySystemError(DecoderStartError("the decoder's process does not start"))
    with screen._surviving_lost_nodes():
        raise RayTaskError("f", "a traceback", no_decoder)
    assert "the decoder's process does not start" in caplog.text
    of_an_actor = ActorDiedError(RayTaskError("__init__", "a traceback", ValueError()))
    for error in (RayTaskError("f", "a traceback", ValueError()), ValueError(), of_an_actor):
        with pytest.raises(type(error)), screen._surviving_lost_nodes():
            raise error


def test_a_resumed_run_says_that_it_keeps_its_objects(place, caplog, monkeypatch):
    monkeypatch.setattr(screen, "ray_ahead", nullcontext)
    place.killed()
    result = lungopacity.screen(
        place.archive.uri, place.model, place.results, run_id="killed", limit=2
    )
    assert result.images == 4
    assert read_run(place.store, "killed")["devices"] == []  # this attempt scored nothing
    assert "--limit and --inventory have no effect" in caplog.text


def test_results_that_links_lead_to_are_not_screened(place, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "results").mkdir()
    (tmp_path / "archive/of last year").symlink_to(tmp_path / "results")
    assert [place.night().runs[0].images for _ in range(2)] == [4, 0]
    assert f"are left out, which lie in {place.results}: what screening writes" in caplog.text


def test_a_folder_that_no_disk_can_have_gets_a_row(place, tmp_path):
    for item in place.archive.list():
        place.archive.delete(item.key)
    listed = pa.table({"image": ["a\0b/c.png"], "source_etag": [""], "source_size_bytes": [1],
                       "source_modified_at": [datetime.now(UTC)]})  # fmt: skip
    pq.write_table(listed, tmp_path / "list.parquet")
    place.failing = {"a\0b/c.png": "unsupported"}
    (run,) = place.night(inventory=str(tmp_path / "list.parquet")).runs
    assert (run.images, run.failed) == (1, 1)


def test_results_in_an_archive_that_a_link_leads_to_are_not_screened(place, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "archive")
    archive, place.archive = place.archive.uri, open_store(str(tmp_path / "link"))
    place.results = archive
    with pytest.raises(UserError, match="results cannot be written to the archive itself"):
        place.night()
    place.results = f"{archive}/results"
    place.store = open_store(place.results)
    assert [place.night().runs[0].images for _ in range(2)] == [4, 0]


def test_an_object_beside_the_results_of_its_run_is_screened(place):
    key = next(iter(place.archive.list())).key
    listed = screen.inventory_at(f"{place.archive.uri}/{key}", None, [place.archive.uri])
    assert [table["image"].to_pylist() for table in listed.tables] == [[key]]


def test_an_archive_in_the_folder_of_its_results_is_screened(place, tmp_path):
    place.results = str(tmp_path)
    place.store = open_store(place.results)
    assert [place.night().runs[0].images for _ in range(2)] == [4, 0]


def test_the_compiled_network_is_used_only_on_cpus(caplog):
    broken = to_bytes([CompiledNetwork(b"7767517\n1 1\nNoSuchLayer a 0 1 in0\n", b"")])
    model = replace(tiny_model(), compiled=broken)
    assert as_run(model, use_gpu=True).compiled is None
    assert not caplog.text
    assert as_run(model, use_gpu=None).compiled is None
    assert (
        "CPUs run it in torch, more slowly; `lungopacity compile` compiles it again" in caplog.text
    )
