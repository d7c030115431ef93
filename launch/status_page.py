"""The status as a web page that refreshes itself: one process, read-only, nothing loaded from elsewhere."""

import hmac
import ipaddress
import secrets
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from data_prep.errors import EXIT_DONE, ConfigError, DataError
from launch.status import RANK_HEADS, Status, event_lines, rank_rows
from train.charts import Series, line_chart
from train.page import chart_grid, header, section, table_card, tile_row, whole_page

REFRESH_SECONDS = 5
POINTS = 700
"""Points of a line that are drawn."""


def page(status: Status) -> str:
    """The document of one moment."""
    summary = dict(status.summary())
    troubled = [row for row in rank_rows(status) if row[2] not in ("ok", "ended")]
    state = f"{len(troubled)} ranks in trouble" if troubled else summary["state"]
    charts = [
        line_chart(title, [Series(title, _points(status, key), color=0)], unit=unit)
        for title, key, unit in (
            ("Loss", "loss", "nats"),
            ("Tokens a second", "tokens_per_second", ""),
            ("Gradient norm", "grad_norm", ""),
            ("Step time", "step_seconds", "s"),
        )
    ]
    startup = [[name, f"{seconds:.1f}"] for name, seconds in status.startup().items()]
    events = [[line] for line in event_lines(status)]
    text = whole_page(
        f"{status.run_dir.name} · status",
        [
            header(status.run_dir.name, summary["state"], str(status.run_dir), state, warn=bool(troubled)),
            tile_row([(name, value, "") for name, value in status.summary() if name != "state"]),
            section("Events", table_card(["newest first"], events, numbers=False)),
            section("Training", chart_grid([chart for chart in charts if chart])),
            section("Ranks", table_card(list(RANK_HEADS), rank_rows(status), numbers=False)),
            section("Start-up", table_card(["phase", "seconds"], startup)),
        ],
        f"read from {status.run_dir}; refreshes every {REFRESH_SECONDS} s",
    )
    return text.replace("<head>", f'<head><meta http-equiv="refresh" content="{REFRESH_SECONDS}">', 1)


def serve(run_dir: Path, host: str, port: int) -> int:
    """Serve until Ctrl-C. Beyond loopback, requests need the token in the link that is printed."""
    token = "" if _is_loopback(host) else secrets.token_urlsafe(16)
    server = make_server(run_dir, host, port, token)
    query = f"/?token={token}" if token else "/"
    print(f"http://{host}:{server.server_address[1]}{query}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return EXIT_DONE
    finally:
        server.server_close()
    return EXIT_DONE


def make_server(run_dir: Path, host: str, port: int, token: str) -> ThreadingHTTPServer:
    """The server, listening. token: empty asks for none. Raises ConfigError where the address cannot be used."""
    try:
        return ThreadingHTTPServer((host, port), partial(_Handler, run_dir, token))
    except OSError as error:
        raise ConfigError(f"host={host} port={port} cannot be used ({error.strerror}); choose another port") from error


class _Handler(BaseHTTPRequestHandler):
    """GET / and nothing else."""

    def __init__(self, run_dir: Path, token: str, *rest: Any) -> None:
        self._run_dir, self._token = run_dir, token
        super().__init__(*rest)

    def do_GET(self) -> None:
        """The page, if the token is right."""
        parts = urlsplit(self.path)
        given = parse_qs(parts.query).get("token", [""])[0]
        if not hmac.compare_digest(given.encode(), self._token.encode()) and self._token:
            self._answer(403, "the link's token is missing or wrong")
        elif parts.path != "/":
            self._answer(404, "only / is here")
        else:
            try:
                self._answer(200, page(Status.read(self._run_dir)))
            except DataError as error:
                self._answer(503, str(error))

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"text/{'html' if status == 200 else 'plain'}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: a page that refreshes itself would fill the terminal."""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _points(status: Status, key: str) -> list[tuple[float, float | None]]:
    records = [(record["step"], record.get(key)) for record in status.metrics]
    stride = max(1, len(records) // POINTS)
    return records[::stride]
