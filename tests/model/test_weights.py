"""Where base weights are looked for, how they are fetched, and what is said when they are not."""

from __future__ import annotations

import errno
import http.client
import io
import time
from pathlib import Path

import pytest

from hsrloop.errors import OutputError, WeightsError
from hsrloop.model import weights


class Answer(io.BytesIO):
    """A server's answer, with the length it promises."""

    def __init__(self, body: bytes, promised: int | None = None) -> None:
        super().__init__(body)
        self.headers = {"Content-Length": str(len(body) if promised is None else promised)}


@pytest.fixture(autouse=True)
def empty_place(tmp_path, monkeypatch) -> list[str]:
    """Work in an empty folder without a network; return the URLs that were asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HSRLOOP_WEIGHTS_DIR", raising=False)
    asked: list[str] = []

    def refuse(url: str, wait_s: float) -> Answer:
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(weights, "_open", refuse)
    return asked


def put(path: Path, nano_file: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(nano_file.read_bytes())
    return path


def test_places_are_searched_in_order(nano_file: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HSRLOOP_WEIGHTS_DIR", str(tmp_path / "own"))
    for place in ("yolov8s.pt", "models/finetuned", "models/pretrained", "own"):
        folder = "." if place == "yolov8s.pt" else place
        put(tmp_path / folder / "yolov8s.pt", nano_file)
        found = weights.find_weights("yolov8s.pt")
        assert found.resolve() == (tmp_path / folder / "yolov8s.pt").resolve()
    assert weights.find_weights("yolov8s").name == "yolov8s.pt"


def test_a_path_is_taken_as_it_is(nano_file: Path, tmp_path: Path) -> None:
    assert weights.find_weights(str(nano_file)) == nano_file
    with pytest.raises(WeightsError, match=r"models/none.pt does not exist"):
        weights.find_weights("models/none.pt")


def test_a_damaged_file_is_passed_over_and_named(nano_file: Path, tmp_path: Path) -> None:
    pointer = tmp_path / "models/pretrained/yolov8s.pt"
    put(pointer, nano_file).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="a Git LFS pointer"):
        weights.find_weights("yolov8s.pt")
    put(tmp_path / "yolov8s.pt", nano_file)
    assert weights.find_weights("yolov8s.pt") == Path("yolov8s.pt")


def test_missing_weights_say_where_and_how(empty_place: list[str], monkeypatch) -> None:
    monkeypatch.setenv("HSRLOOP_WEIGHTS_DIR", "/own")
    with pytest.raises(WeightsError) as caught:
        weights.find_weights("yolov8m.pt")
    text = str(caught.value)
    for words in ("/own, models/pretrained, models/finetuned, .", "no route", "weights fetch"):
        assert words in text
    assert "\n" not in text
    assert empty_place == [weights.URL + "yolov8m.pt"]


def test_other_names_and_offline_do_not_ask_the_network(empty_place: list[str]) -> None:
    with pytest.raises(WeightsError, match="not one of the official names"):
        weights.find_weights("ours.pt")
    with pytest.raises(WeightsError, match="not downloaded"):
        weights.find_weights("yolov8n.pt", download=False)
    assert empty_place == []


def test_download_lands_whole_in_models_pretrained(nano_file: Path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "_open", lambda url, wait_s: Answer(nano_file.read_bytes()))
    path = weights.find_weights("yolov8s.pt")
    assert path == Path("models/pretrained/yolov8s.pt")
    assert path.read_bytes() == nano_file.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["yolov8s.pt"]


def test_stalled_network_costs_the_wait_and_no_more(monkeypatch) -> None:
    monkeypatch.setattr(weights, "WAIT_S", 0.2)

    def stall(url: str, wait_s: float) -> Answer:
        time.sleep(0.6)
        return Answer(b"")

    monkeypatch.setattr(weights, "_open", stall)
    start = time.monotonic()
    with pytest.raises(WeightsError, match=r"no answer within 0.2 s"):
        weights.find_weights("yolov8m.pt")
    assert time.monotonic() - start < 0.55


def test_largest_smaller_model_at_hand(nano_file: Path, empty_place: list[str]) -> None:
    assert weights.largest_smaller("yolov8l.pt") is None
    put(Path("models/pretrained/yolov8n.pt"), nano_file)
    put(Path("yolov8s.pt"), nano_file)
    put(Path("yolov8x.pt"), nano_file)
    path, sentence = weights.largest_smaller("yolov8l.pt") or (None, "")
    assert path == Path("yolov8s.pt")
    assert "yolov8l.pt is not at hand" in sentence and "yolov8s.pt" in sentence
    assert weights.largest_smaller("yolov8n.pt") is None
    assert weights.largest_smaller("ours.pt") is None
    assert empty_place == []


def test_fetch_reports_each_file(nano_file: Path, monkeypatch, tmp_path: Path) -> None:
    body = nano_file.read_bytes()
    answers = {
        "yolov8n.pt": Answer(body),  # not the official bytes
        "yolov8s.pt": Answer(body),
        "yolov8m.pt": Answer(body[:-100], promised=len(body)),
        "yolov8l.pt": Answer(b"<!doctype html>"),
    }

    def serve(url: str, wait_s: float) -> Answer:
        name = url.rpartition("/")[2]
        if name not in answers:
            raise http.client.IncompleteRead(b"")
        return answers[name]

    monkeypatch.setattr(weights, "_open", serve)
    seen: list[tuple[str, int, int]] = []
    dest = tmp_path / "travel"
    got = {r.name: r for r in weights.fetch(dest=dest, progress=lambda *a: seen.append(a))}
    assert tuple(got) == weights.OFFICIAL
    assert "another sha256" in got["yolov8n.pt"].message
    assert got["yolov8s.pt"].path == dest / "yolov8s.pt"
    assert got["yolov8s.pt"].verified is None and "not known" in got["yolov8s.pt"].message
    assert "broke off" in got["yolov8m.pt"].message
    assert "a web page" in got["yolov8l.pt"].message
    assert "could not be reached" in got["yolov8x.pt"].message
    assert [p.name for p in dest.iterdir()] == ["yolov8s.pt"]
    assert ("yolov8s.pt", len(body), len(body)) in seen
    assert "already there" in weights.fetch(["yolov8s.pt"], dest=dest)[0].message


def test_known_sha256_is_verified(nano_file: Path, monkeypatch, tmp_path: Path) -> None:
    digest = weights._sha256(nano_file)
    monkeypatch.setattr(weights, "SHA256", {"yolov8n.pt": (digest,)})
    monkeypatch.setattr(weights, "_open", lambda url, wait_s: Answer(nano_file.read_bytes()))
    for words in ("fetched, sha256 right", "already there, sha256 right"):
        (result,) = weights.fetch(["yolov8n.pt"], dest=tmp_path)
        assert (result.verified, result.message) == (True, words)


def test_fetch_errors(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"ours.pt: not official weights"):
        weights.fetch(["ours.pt"], dest=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        weights.fetch(["yolov8n.pt"], dest=tmp_path / "file")


def test_a_disk_that_fills_while_fetching_is_not_called_the_network(
    nano_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "_open", lambda url, wait_s: Answer(nano_file.read_bytes()))
    monkeypatch.setattr(weights.os, "fsync", full)
    with pytest.raises(OutputError, match=r"travel cannot be written \(.*No space left"):
        weights.fetch(["yolov8n.pt"], dest=tmp_path / "travel")
    assert not (tmp_path / "travel").exists()
