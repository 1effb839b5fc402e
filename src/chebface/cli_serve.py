"""`chebface serve`: the server kept alive, opened, checked; and the files for running it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from chebface.command import FILE, FOLDER, guarded

if TYPE_CHECKING:
    from chebface.server import Server


@click.command()
@click.option("--repository", type=FOLDER, default=Path("triton_models"), show_default=True, help="What to serve.")
@click.option("--grpc-port", type=int, default=8001, show_default=True, help="For Client.")
@click.option("--http-port", type=int, default=8000, show_default=True, help="For everything else that speaks KServe.")
@click.option("--metrics-port", type=int, default=8002, show_default=True, help="Prometheus; on 127.0.0.1 always.")
@click.option("--bind", metavar="ADDRESS", help="Open it there, behind nginx with TLS, tokens and limits.")
@click.option("--certificate", type=FILE, help="PEM chain for TLS. With --bind.")
@click.option("--key", type=FILE, help="PEM key for TLS. With --bind.")
@click.option(
    "--token-file", type=FILE, help="Who may come in, a token on each line; else CHEBFACE_TOKEN. With --bind."
)
@click.option("--insecure", is_flag=True, help="--bind without TLS or tokens: something else in front sees to them.")
@click.option("--rate", type=int, default=100, show_default=True, help="Requests/s of one address. With --bind.")
@click.option("--max-body-mb", type=int, default=16, show_default=True, help="Largest request. With --bind.")
@click.option("--upstream", multiple=True, metavar="HOST:GRPC:HTTP", help="One more server behind --bind; repeatable.")
@click.option("--access-log", type=FILE, help="A line of JSON for each request. With --bind.")
@click.option(
    "--check",
    is_flag=False,
    flag_value="here",
    metavar="[URL]",
    help=(
        "Send a known face, compare the answer and end: to a server at URL, or to one that is started for it. "
        "Exit code 6 without an answer, 3 with a wrong one."
    ),
)
@click.option(
    "--canary-s", type=float, default=10.0, show_default=True, help="Seconds from one face that is sent to the next."
)
@click.option("--cores", type=click.IntRange(1), help="Models at work at the same time. As many as there are requests.")
@click.option("--ca-file", type=FILE, help="Certificates to trust. With --check URL.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Of events.")
@click.option(
    "--show",
    type=click.Choice(["nginx", "docker", "compose", "kubernetes", "prometheus", "grafana"]),
    help="Only print the file for running there.",
)
@click.option("--ngc", is_flag=True, help="Only print the command that serves the same models in NVIDIA's container.")
@guarded
def serve(
    repository: Path,
    grpc_port: int,
    http_port: int,
    metrics_port: int,
    bind: str | None,
    certificate: Path | None,
    key: Path | None,
    token_file: Path | None,
    insecure: bool,
    rate: int,
    max_body_mb: int,
    upstream: tuple[str, ...],
    access_log: Path | None,
    check: str | None,
    canary_s: float,
    cores: int | None,
    ca_file: Path | None,
    log_format: str,
    show: str | None,
    ngc: bool,
) -> None:
    """Serve the models with the Triton server of the nvidia-pytriton wheel, until Ctrl-C or SIGTERM.

    On 127.0.0.1 alone, unless --bind opens it. A face goes through every ten seconds: a server that fails is started
    anew, five times in ten minutes at most. With --bind, SIGHUP brings in what the repository has now, without one
    failed request: the new server is checked before the old one ends.
    """
    from threading import Event

    from chebface import proxy as front
    from chebface.server import Server, stop_signals
    from chebface.supervise import supervise, write_event
    from chebface.wheel import ngc_command

    if ngc:
        click.echo(ngc_command(repository))
        return
    if check:
        _check_server(check, repository, front.read_tokens(token_file), ca_file)
        return
    proxy = None
    if bind or show == "nginx":
        proxy = front.Proxy(
            bind or "127.0.0.1",
            grpc_port=grpc_port,
            http_port=http_port,
            upstreams=[front.Upstream.parse(one) for one in upstream],
            certificate=certificate,
            key=key,
            tokens=front.read_tokens(token_file),
            insecure=insecure or show == "nginx",
            metrics_port=metrics_port,
            rate=rate,
            max_body_mb=max_body_mb,
            access_log=access_log,
        )
    elif certificate or key or token_file or upstream or access_log or insecure:
        raise click.UsageError("--certificate, --key, --token-file, --upstream, --access-log, --insecure: with --bind")
    if show:
        click.echo(front.show(show, proxy), nl=False)
        return
    if canary_s <= 0:
        raise click.UsageError(f"--canary-s: expected seconds above 0, got {canary_s}")
    server = Server(repository, cores=cores)  # with a proxy the ports are that one's
    if proxy is None:
        server = Server(repository, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port, cores=cores)
    renew = Event()
    report = write_event(click.echo, log_format == "json")
    try:
        with stop_signals(renew.set if proxy else None):
            supervise(server, proxy, report=report, every_s=canary_s, renew=renew, prove=_prove)
    except KeyboardInterrupt:
        report("stopped")


def _prove(server: Server) -> None:
    from chebface.canary import check_answer
    from chebface.client.connection import open_transport
    from chebface.client.wire import parse_url

    check_answer(open_transport(parse_url(server.url)), server.repository)


def _check_server(url: str, repository: Path, tokens: tuple[str, ...], ca_file: Path | None) -> None:
    from chebface.canary import check_answer
    from chebface.client.connection import open_transport
    from chebface.client.wire import parse_url

    if url == "here":
        from chebface.server import Server, stop_signals

        with stop_signals(), Server(repository) as server:
            _check_server(server.url, repository, (), None)
        return
    token = tokens[0] if tokens else None
    found = check_answer(open_transport(parse_url(url), token=token, ca_file=ca_file), repository)
    click.echo(f"{url}: the known face came back in {found['round_trip_ms']:.1f} ms, {found['worst_mm']:.2g} mm apart")
