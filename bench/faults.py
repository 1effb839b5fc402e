"""Faults on purpose: what becomes of every request while servers die, drain, are renewed, starved or flooded."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import hostile
from bench.bed import TOKEN, Bed, Load, Outcome, Served, free_ports, serve
from chebface.client.wire import parse_url
from chebface.errors import ChebfaceError, ConfigError, MissingDependencyError, ServerError
from chebface.proxy import Proxy, Upstream
from chebface.repository import find_model
from chebface.server import Server
from chebface.signature import DECODE, LEAVES, MAX_BATCH, RECONSTRUCT, RECONSTRUCT_PHOTO, digest

WAITING = 6  # requests in Triton's queue when SIGTERM comes, at least; beside those at work
PENDING = "nv_inference_pending_request_count"
_ROOT = Path(__file__).resolve().parent.parent


def kill_server(bed: Bed, outcome: Outcome) -> None:
    """kill -9 of Triton under load; the supervisor starts it anew."""
    _kill(bed, outcome, lambda served: served.inner["pid"])


def kill_backend(bed: Bed, outcome: Outcome) -> None:
    """kill -9 of a Python stub under load, of photos and, where the network has one, of that: "ready" stays true."""
    _kill(bed, outcome, lambda served: served.stub(RECONSTRUCT_PHOTO.name))
    _kill(bed, outcome, lambda served: served.stub(RECONSTRUCT.name), python=True)


def _kill(bed: Bed, outcome: Outcome, pick: Callable[[Served], int], **settings: Any) -> None:
    times = bed.times(1, 4)
    with serve(bed, outcome, **settings) as served:
        with Load(bed, outcome, [[served.grpc], [served.http]] * 2) as load:
            for _ in range(times):
                load.more(bed.times(20, 200))
                os.kill(pick(served), signal.SIGKILL)
                outcome.tried += 1
                served.until("failed")
                served.until("ready")
            load.more(bed.times(20, 200))
        outcome.expect(served.said("ready") == times + 1, "started anew each time")
        _verify(bed, outcome, served.grpc, served.http)


def _verify(bed: Bed, outcome: Outcome, *urls: str) -> None:
    wrong = [text for url in urls if (text := bed.wrong(url, bed.right))]
    outcome.expect(not wrong, "correct afterwards", "; ".join(wrong))


def terminate(bed: Bed, outcome: Outcome) -> None:
    """SIGTERM while requests are inside: those are answered, later ones refused by name."""
    for _ in range(bed.times(1, 3)):
        inside, late = Outcome("inside"), Outcome("late")
        with serve(bed, outcome, "--canary-s", "1000") as served:  # so that its face is not among those that wait
            urls = [[served.grpc], [served.http]] * 8
            with Load(bed, inside, urls, batch=MAX_BATCH // 2, attempts=1) as load:
                waiting, deadline = 0, time.monotonic() + 60
                while waiting < WAITING and time.monotonic() < deadline:
                    waiting = served.metric(PENDING, RECONSTRUCT.name)
                load.rest()
                os.kill(served.pid, signal.SIGTERM)
                outcome.tried += 1
                served.until("draining")
                with Load(bed, late, urls[:8], attempts=1, each=5):
                    pass
        outcome.expect(waiting >= WAITING, f"at least {WAITING} waited at SIGTERM", f"{waiting} did")
        refused, outside = inside.errors.total(), len(urls) - waiting  # each caller has one request, if any
        outcome.expect(refused <= outside, "all that waited answered", f"{refused} of {outside}: {inside.told()}")
        outcome.absorb(inside)
        outcome.absorb(late)


def renew(bed: Bed, outcome: Outcome) -> None:
    """A new model version behind nginx, by SIGHUP, under load: not one request fails."""
    version, right = bed.next_version()
    with serve(bed, outcome, bind=True) as served:
        with Load(bed, outcome, [[served.grpc], [served.http]] * 2, rights=[bed.right, right]) as load:
            for k in range(bed.times(1, 4)):
                folder, wanted = ((version, right), (bed.first, bed.right))[k % 2]
                load.more(bed.times(20, 200))
                bed.bring_in(folder)
                os.kill(served.pid, signal.SIGHUP)
                outcome.tried += 1
                served.until("renewed")
                wrong = bed.wrong(served.grpc, wanted)
                outcome.expect(not wrong, "the new version answers", wrong)
            load.more(bed.times(20, 200))
        bed.bring_in(bed.first)
        outcome.expect(not outcome.errors, "no request failed", outcome.told())
        outcome.expect(served.said("ready") == 1, "never away")


def refuse(bed: Bed, outcome: Outcome) -> None:
    """A damaged new version behind nginx, by SIGHUP, under load: the old one stays, and not one request fails."""
    with serve(bed, outcome, bind=True) as served:
        with Load(bed, outcome, [[served.grpc], [served.http]]) as load:
            for damage in list(DAMAGES.values())[: bed.times(1, 4)]:
                load.more(bed.times(20, 100))
                damage(bed.live)
                os.kill(served.pid, signal.SIGHUP)
                outcome.tried += 1
                served.until("not renewed")
                bed.bring_in(bed.first)
            load.more(bed.times(20, 100))
        outcome.expect(not outcome.errors, "no request failed", outcome.told())
        _verify(bed, outcome, served.grpc, served.http)


@contextlib.contextmanager
def _two(bed: Bed) -> Iterator[tuple[Server, Server]]:
    with Server(bed.live, stop_timeout_s=10) as one, Server(bed.live, stop_timeout_s=10) as other:
        yield one, other


def renew_two(bed: Bed, outcome: Outcome) -> None:
    """A new model version in two servers behind one client, one after the other, under load: no request fails."""
    version, right = bed.next_version()
    with _two(bed) as (one, other):
        urls = [[one.url, other.url], [other.http_url, one.http_url]] * 2
        with Load(bed, outcome, urls, rights=[bed.right, right]) as load:
            for k in range(bed.times(1, 2)):
                folder, wanted = ((version, right), (bed.first, bed.right))[k % 2]
                bed.bring_in(folder)
                for server in (one, other):
                    load.more(bed.times(20, 200))
                    server.stop()
                    server.start()
                    outcome.tried += 1
                    wrong = bed.wrong(server.url, wanted)
                    outcome.expect(not wrong, "the new version answers", wrong)
            load.more(bed.times(20, 200))
        bed.bring_in(bed.first)
    outcome.expect(not outcome.errors, "no request failed", outcome.told())


def lose_one(bed: Bed, outcome: Outcome) -> None:
    """kill -9 of one of two servers behind one client, under load."""
    with _two(bed) as (one, other):
        _lose(bed, outcome, one, other, [[one.url, other.url], [one.http_url, other.http_url]] * 2)


def lose_one_behind_proxy(bed: Bed, outcome: Outcome) -> None:
    """kill -9 of one of two servers behind nginx, under load."""
    with _two(bed) as (one, other):
        grpc, http = free_ports(2)
        upstream = Upstream("127.0.0.1", other.ports["grpc"], other.ports["http"])
        proxy = Proxy("127.0.0.1", grpc_port=grpc, http_port=http, upstreams=[upstream], rate=100_000, drain_s=1)
        try:
            proxy.start(one.ports)
            urls = [[f"127.0.0.1:{grpc}"], [f"http://127.0.0.1:{http}"]] * 2
            _lose(bed, outcome, one, other, urls, settle_s=4.0)  # nginx leaves one that failed alone for two seconds
        finally:
            proxy.stop()


def _lose(
    bed: Bed, outcome: Outcome, one: Server, other: Server, urls: Sequence[Sequence[str]], settle_s: float = 0.0
) -> None:
    with Load(bed, outcome, urls) as load:
        for k in range(bed.times(1, 4)):
            dying = (one, other)[k % 2]
            load.more(bed.times(20, 200))
            os.kill(dying.pid or 0, signal.SIGKILL)
            outcome.tried += 1
            load.more(bed.times(20, 200))
            dying.stop()
            dying.start()
            time.sleep(settle_s)
        load.more(bed.times(20, 200))
    outcome.expect(not outcome.errors, "no request failed", outcome.told())
    _verify(bed, outcome, one.url, other.url)


def _model(folder: Path) -> Path:
    return find_model(folder, RECONSTRUCT.name)


def _config(folder: Path) -> Path:
    return folder / RECONSTRUCT.name / "config.pbtxt"


def _cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16  # of a weight, most likely: the graph stays a graph
    path.write_bytes(content)


def _edit(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated in the middle": lambda folder: _cut(_model(folder), 0.5),
    "another model's file": lambda folder: _model(folder).write_bytes(find_model(folder, DECODE.name).read_bytes()),
    "no graph": lambda folder: _model(folder).write_bytes(random.Random(1).randbytes(100_000)),
    "a bit changed": lambda folder: _flip(_model(folder)),
    "empty": lambda folder: _cut(_model(folder), 0),
    "truncated by a byte": lambda folder: _model(folder).write_bytes(_model(folder).read_bytes()[:-1]),
    "truncated to a header": lambda folder: _cut(_model(folder), 0.001),
    "first bytes zeroed": lambda folder: _model(folder).write_bytes(bytes(64) + _model(folder).read_bytes()[64:]),
    "missing": lambda folder: _model(folder).unlink(),
    "configuration truncated": lambda folder: _cut(_config(folder), 0.7),
    "configuration missing": lambda folder: _config(folder).unlink(),
    "configuration of another shape": lambda folder: _edit(_config(folder), "112", "224"),
    "configuration of another type": lambda folder: _edit(_config(folder), "TYPE_UINT8", "TYPE_FP32"),
    "configuration of another signature": lambda folder: _edit(_config(folder), digest(), 16 * "0"),
    "a model folder missing": lambda folder: shutil.rmtree(folder / list(LEAVES)[-1]),
}


def damage_files(bed: Bed, outcome: Outcome) -> None:
    """Model files damaged, `python -m export repository --check` before a server loads them."""
    damages: dict[str, Callable[[Path], object]] = {"sound": lambda folder: None}
    damages |= dict(list(DAMAGES.items())[: bed.times(2, len(DAMAGES))])
    for name, damage in damages.items():
        folder = Path(shutil.copytree(bed.first, bed.folder / "damaged"))
        damage(folder)
        outcome.tried += name != "sound"
        outcome.count(lambda name=name, folder=folder: _check(folder, name == "sound"))  # type: ignore[misc]
        shutil.rmtree(folder)
    outcome.expect(outcome.errors.total() == outcome.tried, "each refused with one line that names the file")


def _check(folder: Path, sound: bool) -> str | None:
    command = [sys.executable, "-m", "export", "repository", "--check", "--repository", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT, timeout=120)
    lines = done.stderr.strip().splitlines()
    if not sound and done.returncode == 1 and lines and lines[-1].startswith("error:") and str(folder) in lines[-1]:
        raise ChebfaceError(lines[-1])
    if sound and done.returncode == 0:
        return None
    return f"exit code {done.returncode}: {done.stderr[-200:]}"


def fill_disk(bed: Bed, outcome: Outcome) -> None:
    """The disk of the server's log and files is full, and then the server is killed; later there is room again."""
    with serve(bed, outcome, room=("temporary", 2048)) as served:
        with Load(bed, outcome, [[served.grpc], [served.http]]) as load:
            for _ in range(bed.times(1, 2)):
                load.more(bed.times(20, 100))
                filler = served.fill()
                outcome.tried += 1
                load.more(bed.times(20, 100))
                os.kill(served.inner["pid"], signal.SIGKILL)
                served.until("restarting")
                served.fill()  # what the old one had
                again = served.until("failed")
                outcome.expect("make room" in again["reason"], "a restart says that there is no room")
                filler.unlink()
                served.until("ready")
            load.more(bed.times(20, 100))
        _verify(bed, outcome, served.grpc, served.http)


def fill_memory(bed: Bed, outcome: Outcome) -> None:
    """/dev/shm is full while large batches want more of it; later there is room again."""
    with serve(bed, outcome, room=("shared", 64 * 1024)) as served:
        with Load(bed, outcome, [[served.grpc], [served.http]]) as load:
            for _ in range(bed.times(1, 2)):
                load.more(20)
                filler = served.fill()
                outcome.tried += 1
                with Load(bed, outcome, [[served.grpc], [served.http]] * 4, batch=MAX_BATCH, each=bed.times(3, 20)):
                    pass
                filler.unlink()
                with contextlib.suppress(ChebfaceError):
                    served.until("ready", 2)
                load.more(20)
        outcome.expect(True, f"{served.said('failed')} restart(s)")
        _verify(bed, outcome, served.grpc, served.http)


def _target(bed: Bed, ports: Mapping[str, int]) -> contextlib.closing[hostile.Target]:
    return contextlib.closing(hostile.Target(ports, TOKEN, bed.crops_u8[0], bed.live))


def _inner_ports(served: Served) -> dict[str, int]:
    return {name: parse_url(served.inner[name]).port for name in ("grpc", "http")}


def attack(bed: Bed, outcome: Outcome) -> None:
    """Hostile inputs beside good requests; the known faces after every hundred, and after each kind."""
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(serve(bed, outcome, bind=True))
        front, inner = (stack.enter_context(_target(bed, ports)) for ports in (served.ports, _inner_ports(served)))
        pid, good = served.inner["pid"], Outcome("good")
        with Load(bed, good, [[served.grpc]]) as load:
            for kind in hostile.KINDS:
                rng, before = random.Random(kind.name), outcome.lost
                count, wrong = bed.times(kind.small, kind.full), ""
                for k in range(count):
                    target = inner if kind.direct and k % 2 else front
                    outcome.count(lambda kind=kind, target=target, rng=rng: kind.send(target, rng))  # type: ignore[misc]
                    if k % 100 == 99 or k == count - 1:
                        wrong = wrong or bed.wrong(served.grpc, bed.right)
                outcome.tried += count
                lost = outcome.lost - before
                outcome.expect(not (lost or wrong), f"{count} {kind.name}", wrong or f"{lost} lost")
            load.more(10)
        _verify(bed, outcome, served.grpc, served.http)
        failed = good.told() or good.why
        outcome.expect(not failed, f"{good.answered} good requests meanwhile, none failed", str(failed))
        outcome.expect(served.inner["pid"] == pid and not served.said("failed"), "the server never died")
        outcome.absorb(good)
        grown = front.photo_memory_mb()
        outcome.expect(grown < hostile.MOST_MB, f"photos took at most {hostile.MOST_MB} MB", f"{grown:.0f} MB")


def slow_clients(bed: Bed, outcome: Outcome) -> None:
    """Clients that send a byte now and then, or do not read their answer, while others work."""
    with serve(bed, outcome, bind=True) as served, _target(bed, served.ports) as target:
        with Load(bed, outcome, [[served.grpc], [served.http]]) as load:
            count = bed.times(12, 60)
            ended, wanted = hostile.hold_slowly(target, count, bed.times(2, 40))
            outcome.tried += count
            load.more(20)
        outcome.expect(ended == wanted or not bed.full, f"{ended} of {wanted} that stopped or dawdled sent away")
        outcome.expect(not outcome.errors, "no other request failed", outcome.told())
        _verify(bed, outcome, served.grpc, served.http)


def vanishing_clients(bed: Bed, outcome: Outcome) -> None:
    """Clients that close or reset their connection in the middle of a request or an answer."""
    with serve(bed, outcome, bind=True) as served:
        open_before = hostile.count_handles(served.inner["pid"])
        with Load(bed, outcome, [[served.grpc], [served.http]]) as load:
            for ports in (served.ports, _inner_ports(served)):
                with _target(bed, ports) as target:
                    outcome.tried += hostile.vanish(target, bed.times(10, 300))
            load.more(20)
        outcome.expect(not outcome.errors, "no other request failed", outcome.told())
        _verify(bed, outcome, served.grpc, served.http)
        pending = [served.metric(PENDING, model) for model in LEAVES]
        outcome.expect(not any(pending), "nothing pending")
        more = hostile.count_handles(served.inner["pid"]) - open_before
        outcome.expect(more < 64, "no open files left behind", f"{more} more")


FAULTS: dict[str, Callable[[Bed, Outcome], None]] = {
    "server killed": kill_server,
    "backend killed": kill_backend,
    "SIGTERM": terminate,
    "new version behind nginx": renew,
    "damaged new version, nginx": refuse,
    "new version under load": renew_two,
    "one of two dies, client": lose_one,
    "one of two dies, nginx": lose_one_behind_proxy,
    "model files damaged": damage_files,
    "disk full": fill_disk,
    "shared memory full": fill_memory,
    "hostile inputs": attack,
    "slow clients": slow_clients,
    "vanishing clients": vanishing_clients,
}


def measure(
    repository: str | Path,
    faults: Sequence[str] = tuple(FAULTS),
    scale: str = "small",
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], object] = lambda row: None,
) -> list[dict[str, Any]]:
    """Try faults on real servers; a row for each.

    Args:
        repository: a model repository as `python -m export all` leaves it; it is copied.
        faults: of FAULTS.
        scale: "small" tries each once, "full" often.
        say: told each row as it comes, in words.
        keep: given each row as it comes: a later fault may end the run.

    Returns:
        Rows: tried, requests, answered, typed_errors, lost; `errors` by type, `checked` and `failed` are what else was
        looked at. A fault that cannot be tried here has `skipped`, which says why.

    Raises:
        ConfigError: an unknown fault or scale.
        AssetError, MissingDependencyError: the repository, nginx, or the server is not there.
        DisagreesError: two versions of the models could not be told apart.
    """
    unknown = [name for name in faults if name not in FAULTS]
    if unknown:
        raise ConfigError(f"fault: expected some of {', '.join(FAULTS)}, got {unknown[0]!r}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="chebface-faults-") as folder:
        bed = Bed(Path(repository), Path(folder), scale)
        for name in faults:
            outcome = Outcome(name)
            try:
                FAULTS[name](bed, outcome)
            except MissingDependencyError as error:
                if outcome.requests:
                    raise
                row = outcome.row() | {"skipped": str(error)}
            except (ServerError, ConnectionError) as error:  # a server is away; the other faults are tried all the same
                outcome.expect(False, "came back", str(error))
                row = outcome.row()
            else:
                row = outcome.row()
            rows.append(row | {"scale": scale})
            keep(rows[-1])
            say(spell(rows[-1]))
    return rows


def spell(row: dict[str, Any]) -> str:
    """A row of the table."""
    figures = "".join(f"{row[name]:>9}" for name in ("tried", "requests", "answered", "typed_errors", "lost"))
    if "skipped" in row:
        return f"{row['case']:28}{figures}  skipped: {row['skipped']}"
    words = [*(f"NOT {what}" for what in row["failed"]), *(f"lost: {why}" for why in row["why"])]
    return f"{row['case']:28}{figures}  {'; '.join(words + row['checked'])}"


HEADER = f"{'fault':28}" + "".join(f"{name:>9}" for name in ("tried", "requests", "answered", "errors", "lost"))
