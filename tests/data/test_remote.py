"""Packs at a URL: a clip is one read of its span, and what a server may do wrong is said."""

import dataclasses
import errno
import fcntl
import gzip
import json
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from in_process import in_process

from mae_fast import cli, resume
from mae_fast.config import Config, DataConfig, TrainConfig
from mae_fast.data import VideoReader, build_index, make_loader, read_index, remote
from mae_fast.data.container import BadVideo
from mae_fast.data.pack import check_pack, write_pack
from mae_fast.data.packed import HOW, PackReader, packs_of
from mae_fast.errors import ConfigError, DataError
from mae_fast.train import pretrain

pytest.importorskip("fsspec", reason="fsspec is not installed")
pytest.importorskip("aiohttp", reason="aiohttp is not installed: fsspec reads no HTTP")
MADE = {"short_side": 40, "crf": 20, "gop": 1, "copy": False, "shard": 3}
DATA = DataConfig(workers=0, repeat_aug=2, sampling_rate=2, short_side=40)
DRAWN = dict(num_frames=8, batch_size=2, seed=3, steps=4)


class Server(ThreadingHTTPServer):
    """Files of a folder, in parts. `asked` is what was; `does`, a name's fault: an HTTP status,
    "short" (fewer bytes than it says), "cut" (of fewer bytes), "changed", "whole" (no parts),
    "squeezed" (the same, compressed), "gone" (hangs up), or "hang" (says nothing)."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.does, self.times = folder, [], {}, 10**9
        self.url = f"http://127.0.0.1:{self.server_port}/pack"
        self.free = threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def gone(self):
        """Nobody listens there; no connection that is open goes on."""
        self.does = dict.fromkeys(["", *os.listdir(self.folder)], "gone")
        self.free.set()
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, *_):
        """The client went away."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(b"", head=True)

    def do_GET(self):
        self.answer(None)

    def answer(self, body, head=False):
        server, name = self.server, self.path.removeprefix("/pack/")
        file, wanted = server.folder / name, self.headers.get("Range")
        server.asked.append((self.command, name, wanted))
        does = server.does.get(name) if server.times > 0 else None
        server.times -= does is not None
        if does in ("gone", "hang"):
            server.free.wait(10 if does == "hang" else 0)
            self.close_connection = True
            return
        if isinstance(does, int) or not file.is_file():
            self.send_response(does or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        length = len(data)
        squeezed = does == "squeezed" and "gzip" in self.headers["Accept-Encoding"]
        data = gzip.compress(data) if squeezed else data
        if wanted and does != "whole" and not squeezed:
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
            data = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{length}")
        else:
            self.send_response(200)
        data = data[:-5] if does == "cut" else data
        data = data[:-1] + b"x" if does == "changed" else data
        self.send_header("Content-Length", str(len(data)))
        if squeezed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if not head:
            self.wfile.write(data[:-5] if does == "short" else data)
        self.close_connection = does == "short"


@pytest.fixture(scope="module")
def pack(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    with in_process():
        build_index([folder], root / "i.jsonl", progress=False)
        write_pack(root / "i.jsonl", root / "pack", MADE, 1)
        build_index(sorted(folder.iterdir())[:2], root / "two.jsonl", progress=False)
        write_pack(root / "two.jsonl", root / "other", MADE, 1)
    return root / "pack"


@pytest.fixture
def server(pack, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_PAUSES", (0.0, 0.01))
    monkeypatch.setattr("mae_fast.data.loader._PAUSES", (0.0, 0.01))
    found = Server(pack)
    yield found
    if found.thread.is_alive():
        found.gone()


def batches(rows, **cfg):
    return list(make_loader(rows, dataclasses.replace(DATA, **cfg), **DRAWN))


def test_a_clip_is_one_read_of_its_span_and_the_batches_are_a_local_packs(server, pack):
    rows, local = read_index(server.url), read_index(pack)
    assert [r.path for r in rows] == [r.path.replace(str(pack), server.url) for r in local]
    assert resume.draws(rows) == resume.draws(local)
    del server.asked[:]
    got, want = batches(rows), batches(local)
    assert all(torch.equal(a.flat, b.flat) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a.table, b.table) for a, b in zip(got, want, strict=True))
    draws = DRAWN["steps"] * DRAWN["batch_size"]
    assert len(server.asked) == draws and not any(b.bad for b in got)
    read = [list(map(int, r[len("bytes=") :].split("-"))) for _, _, r in server.asked]
    assert {name for _, name, _ in server.asked} <= {"shard-00000.tar", "shard-00001.tar"}
    assert max(b - a for a, b in read) < max(r.bytes for r in rows)


def test_workers_read_it_too(server, pack):
    """Forked from a process that has read: its loop and connections are not theirs."""
    got, want = batches(read_index(server.url + "/"), workers=2), batches(read_index(pack))
    assert all(torch.equal(a.flat, b.flat) for a, b in zip(got, want, strict=True))


def test_what_is_small_is_fetched_once_and_again_where_it_changed(server, pack):
    read_index(server.url)
    index, table = ("GET", "index.jsonl", None), "packets.npy"
    assert index in server.asked and table in {name for _, name, _ in server.asked}
    del server.asked[:]
    assert read_index(server.url + "/index.jsonl") == read_index(server.url)
    assert index not in server.asked and table not in {name for _, name, _ in server.asked}
    kept = remote.kept(server.url)
    (kept / "index.jsonl").write_text("changed here")
    assert len(read_index(server.url)) == 5
    (kept / "packets.npy").write_bytes(b"cut")
    assert len(read_index(server.url)) == 5
    server.folder = pack.parent / "other"
    rows = read_index(server.url)
    assert len(rows) == 2 and not any(b.bad for b in batches(rows))


def test_json_may_be_compressed_on_its_way(server, pack):
    server.does = dict.fromkeys(("pack.json", "index.jsonl"), "squeezed")
    assert len(read_index(server.url)) == len(read_index(pack))


def test_a_file_system_without_locks_takes_packs(server, pack, tmp_path, monkeypatch, caplog):
    """As Lustre's are, unless it is told otherwise."""

    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert len(read_index(server.url)) == 5
    with in_process():
        write_pack(pack.parent / "two.jsonl", tmp_path / "made", MADE, 1)
    for folder in (remote.kept(server.url), tmp_path / "made" / ".partial"):
        assert f"{folder} cannot be locked (Function not implemented)" in caplog.text


def test_it_goes_wherever_a_pack_goes(server, pack, tmp_path, tiny_cfg, capsys, monkeypatch):
    assert check_pack(server.url).endswith("sound: 5 videos in 2 shards")
    row, local = read_index(server.url)[3], read_index(pack)[3]
    with VideoReader(row.path) as a, VideoReader(local.path) as b:
        assert torch.equal(a.read([3, 9]), b.read([3, 9]))
    with pytest.raises(BadVideo, match="missing: no such video in the pack"):
        VideoReader(f"{server.url}/shard-00000.tar/none.mp4")
    [(url, how)] = packs_of([row]).items()
    assert url == server.url and how["videos"] == 5
    train = TrainConfig(steps=1, warmup_steps=0)
    data = dataclasses.replace(DATA, index=server.url)
    pretrain(Config(output=str(tmp_path / "a"), model=tiny_cfg, data=data, train=train))
    assert server.url in json.loads((tmp_path / "a" / "config.json").read_text())["packs"]
    capsys.readouterr()
    monkeypatch.setattr("mae_fast.bench.data._STAGED", 2)
    quick = ["--seconds", "0.05", "--rounds", "1", "--short-side", "40", "--json"]
    assert cli.main(["bench", "data", server.url, *quick]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "pack" and found["bytes_a_clip"] > 1000
    # An index of another folder may name its videos, as the demo's does.
    (tmp_path / "some.jsonl").write_text(json.dumps(dataclasses.asdict(row)) + "\n")
    shutil.rmtree(remote.kept(server.url))
    assert read_index(tmp_path / "some.jsonl") == [row]
    assert not any(b.bad for b in batches([row]))


@pytest.mark.parametrize("fault", [500, 503, "short", "cut", "gone"])
def test_a_moments_trouble_is_tried_again(server, pack, fault):
    rows, want = read_index(server.url), batches(read_index(pack))
    shards = {"shard-00000.tar": fault, "shard-00001.tar": fault}
    server.does, server.times = shards, 2
    got = batches(rows)
    assert server.times == 0 and not any(b.bad for b in got)
    assert all(torch.equal(a.flat, b.flat) for a, b in zip(got, want, strict=True))
    if fault != "cut":  # of a whole file nobody knows how long it should be
        server.does, server.times = dict.fromkeys(os.listdir(pack), fault), 2
        assert len(read_index(server.url)) == 5


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (404, "missing: no shard http://"),
        (503, "cannot be read: .*shard-00001.tar: ClientResponseError: 503"),
        ("short", "cannot be read: .*shard-00001.tar: ClientPayloadError"),
        ("cut", r"cannot be read: .*shard-00001.tar: \d+ bytes came for bytes \d+ to \d+"),
        ("whole", "cannot be read: .*shard-00001.tar: .*its server gives no parts of files"),
    ],
)
def test_what_a_server_does_wrong_is_counted_and_said(server, fault, words):
    rows = read_index(server.url)
    server.does = {"shard-00001.tar": fault}
    found = [pair for b in batches(rows) for pair in b.bad]
    assert found and all(re.match(words, reason) for _, reason in found), found
    assert {os.path.basename(os.path.dirname(path)) for path, _ in found} == {"shard-00001.tar"}
    place = next(r for r in rows if "shard-00001" in r.path)
    with pytest.raises(DataError, match="draw 0: 20 bad videos in a row"):
        batches([place])


def test_a_server_that_says_nothing_is_waited_for_so_long(server, monkeypatch):
    monkeypatch.setattr(remote, "_SECONDS", 0.2)
    rows = read_index(server.url)
    server.does, server.times = {"shard-00000.tar": "hang"}, 3
    [row] = rows[:1]
    with pytest.raises(BadVideo, match=r"cannot be read: .*tar: FSTimeoutError$") as e:
        PackReader().read(place_of(row), [0])
    assert not e.value.lasting
    [batch] = make_loader([row], DATA, **{**DRAWN, "batch_size": 1, "steps": 1})
    assert not batch.bad and server.times == 0


def test_a_server_that_went_away_ends_a_run_in_one_line(server, tmp_path, tiny_cfg):
    rows = read_index(server.url)
    server.gone()
    words = (
        "cannot be read: .*(Server disconnected|Cannot connect)"  # an open connection, a new one
    )
    with pytest.raises(BadVideo, match=words):
        PackReader()._bytes(place_of(rows[0]), 0, 100)
    with pytest.raises(DataError, match="20 bad videos in a row:\n.*" + words):
        batches(rows)
    with pytest.raises(DataError, match=f"{server.url}/{HOW}: {words}"):
        read_index(server.url)


def place_of(row):
    from mae_fast.data.packed import Place

    return Place(row.path, row.at, row.bytes, row.first, row.packets, row.codec, row.setup)


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("pack.json", 404, "pack.json: missing from the pack, or no pack is there"),
        ("pack.json", 403, "pack.json: cannot be read: ClientResponseError: 403"),
        ("shard-00000.tar", "whole", "00000.tar: cannot be read: .*gives no parts of files"),
        ("index.jsonl", 404, "index.jsonl: missing from the pack"),
        ("index.jsonl", "cut", "index.jsonl is not what this pack was written with"),
        ("packets.npy", "cut", "packets.npy: cannot be read: .* bytes came for bytes 0 to"),
        ("packets.npy", "changed", "packets.npy is not what this pack was written with"),
        ("shard-00001.tar", 404, "shard-00001.tar: missing from the pack"),
        ("shard-00001.tar", 503, "shard-00001.tar: cannot be read: .*503"),
    ],
)
def test_a_pack_that_is_not_whole_is_refused_before_anything_starts(server, name, fault, words):
    server.does = {name: fault}
    for _ in range(2):
        with pytest.raises(DataError, match=words):
            read_index(server.url)
    server.does = {}
    assert len(read_index(server.url)) == 5  # nothing half is kept


def test_check_names_damage_by_byte(server, pack, tmp_path, capsys):
    server.folder = Path(shutil.copytree(pack, tmp_path / "copy"))
    row = read_index(server.url)[1]
    shard = server.folder / "shard-00000.tar"
    data = bytearray(shard.read_bytes())
    data[row.at + row.bytes // 2] ^= 1
    shard.write_bytes(data)
    assert cli.main(["pack", "--check", server.url]) == 65
    said = capsys.readouterr().err
    assert "1 damaged:\n  shard-00000.tar: bytes " in said and "of 00000001-v1.mp4" in said
    shard.write_bytes(data[:-100])
    (server.folder / "shard-00001.tar").unlink()
    assert cli.main(["pack", "--check", server.url]) == 65
    said = capsys.readouterr().err
    assert f"shard-00000.tar: byte {len(data) - 100}: " in said
    assert "shard-00001.tar: missing" in said
    with pytest.raises(DataError, match=f"{len(data) - 100} bytes, {len(data)} when packed: cut"):
        read_index(server.url)


def test_words_that_are_no_url_or_want_a_library(tmp_path, monkeypatch):
    assert not remote.is_remote("a/b://c") and not remote.is_remote(Path("http://x"))
    for url, words in (("nonsense://h/pack", "Protocol not known"), ("s3://b/pack", "s3fs")):
        with pytest.raises(ConfigError, match=rf"{url}/pack.json: .*{words}"):
            read_index(url)
    (tmp_path / "i.jsonl").write_text('{"path": "v.mp4", "frames": 9, "fps": 1.0}')
    with pytest.raises(ConfigError, match=r"is written to a local folder, .* got 's3://b/pack'"):
        write_pack(tmp_path / "i.jsonl", "s3://b/pack", MADE, 1)
