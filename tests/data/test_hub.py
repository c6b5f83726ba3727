"""The hub's own client against a small hub on this machine that knows, refuses, stalls or is gone."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from probekit.data import hub
from probekit.data.hub import Source
from probekit.errors import ProbekitError

SHA = "0123456789abcdef0123456789abcdef01234567"
OLD_SHA = "fedcba9876543210fedcba9876543210fedcba98"


@dataclass
class FakeHub:
    """What the hub on this machine answers to every request, and what it was asked."""

    status: int = 200
    answer: dict = field(default_factory=lambda: {"sha": SHA})
    asked: list[str] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in place of the user's."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, offline_cache: Path) -> Iterator[FakeHub]:
    state = FakeHub()
    state.hold.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if "/someone/" in path:  # the client may make requests of its own
                state.asked.append(path)
            state.hold.wait(10)
            body = json.dumps({"id": "someone/something", **state.answer}).encode()
            self.send_response(state.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "*")
        yield state
        state.hold.set()
        server.shutdown()
        thread.join()


def cache(folder: Path, name: str, commits: dict[str, list[str]], kind: str = "model") -> None:
    """Fills a cache as the hub's client does: snapshots by commit, and names that stand for commits."""
    repository = folder / f"{kind}s--{name.replace('/', '--')}"
    for commit, refs in commits.items():
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (repository / "refs").mkdir(exist_ok=True)
        for ref in refs:
            (repository / "refs" / ref).write_text(commit)


def refusal(name: str, **arguments: object) -> str:
    with pytest.raises(ProbekitError) as raised:
        hub.find(name, setting="some.setting", **arguments)
    message = str(raised.value)
    assert message.startswith(f"some.setting is {name!r}")
    assert "\n" not in message
    return message


def test_a_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert hub.find(str(tmp_path), setting="x") == Source(str(tmp_path), None, local_only=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.find("~/gpt2", setting="x") == Source(str(tmp_path / "gpt2"), None, local_only=True)
    for name in (".", "gpt2", "./gpt2"):
        assert hub.find(name, setting="x", revision="ignored") == Source(name, None, local_only=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *(
            (name, "no such folder")
            for name in ("./model", "../model", "/no/such", "~/model", "a/b/c", "a_file")
        ),
        *((name, "neither a folder") for name in ("two words", "a--b", "-x", "ümlaut", "a..b")),
    ],
)
def test_what_can_be_no_name_on_the_hub_is_not_looked_up(
    name: str, said: str, fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    assert said in refusal(name)
    assert fake.asked == []


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("revision", [None, "main", "step1000", SHA])
def test_a_name_is_pinned_to_the_commit_that_it_stands_for(kind: str, revision: str | None, fake: FakeHub):
    source = hub.find("someone/something", setting="x", revision=revision, kind=kind)
    assert source == Source("someone/something", SHA, local_only=False)
    assert source.arguments == {"revision": SHA, "local_files_only": False}
    suffix = f"/revision/{revision}" if revision else ""
    assert fake.asked == [f"/api/{kind}s/someone/something{suffix}"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_name_that_the_hub_does_not_give(status: int, fake: FakeHub):
    fake.status = status
    message = refusal("someone/something", revision="v2")
    assert str(status) in message
    assert "'v2'" in message
    assert len(fake.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_like_no_hub(status: int, fake: FakeHub, offline_cache: Path):
    fake.status = status
    assert "cannot be reached" in refusal("someone/something")
    cache(offline_cache, "someone/something", {OLD_SHA: ["main"]})
    assert hub.find("someone/something", setting="x") == Source("someone/something", OLD_SHA, local_only=True)


def test_a_hub_that_stalls_is_given_up(fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    """It would answer, but too late."""
    assert hub.TIMEOUT_SECONDS <= 5
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.2)
    fake.hold.clear()
    assert "cannot be reached" in refusal("someone/something")


def nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_PROXY", "*")


def no_such_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror("no name service")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("NO_PROXY", "*")


def kept_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


Cut = Callable[[pytest.MonkeyPatch], None]
no_network = pytest.mark.parametrize("cut", [nobody_listens, no_such_host, kept_offline])


@no_network
def test_without_a_network_or_a_cache(cut: Cut, offline_cache: Path, monkeypatch: pytest.MonkeyPatch):
    cut(monkeypatch)
    assert "nothing of it" in refusal("someone/something")
    offline_cache.rmdir()
    assert "nothing of it" in refusal("gpt2")


@no_network
def test_without_a_network_the_cache_answers(cut: Cut, offline_cache: Path, monkeypatch: pytest.MonkeyPatch):
    cut(monkeypatch)
    cache(offline_cache, "someone/something", {SHA: ["main", "v2"], OLD_SHA: ["v1"]})
    expected = {None: SHA, "main": SHA, "v2": SHA, SHA: SHA, "v1": OLD_SHA, OLD_SHA: OLD_SHA}
    for revision, commit in expected.items():
        source = hub.find("someone/something", setting="x", revision=revision)
        assert source == Source("someone/something", commit, local_only=True)
        assert source.arguments == {"revision": commit, "local_files_only": True}


def test_the_cache_answers_for_the_name_kind_and_revision_asked_for(
    offline_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    kept_offline(monkeypatch)
    cache(offline_cache, "someone/something", {OLD_SHA: ["main"]}, kind="dataset")
    cache(offline_cache, "someone/else", {OLD_SHA: ["main"]})
    assert "nothing of it" in refusal("someone/something")
    assert hub.find("someone/something", setting="x", kind="dataset").revision == OLD_SHA
    assert OLD_SHA in refusal("someone/else", revision="v2")
