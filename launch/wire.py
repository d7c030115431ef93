"""Messages between the supervisor and the nodes: one JSON object a line over TCP, with a token in the first.

Nodes connect to the supervisor, so that only its machine needs an open port. The token keeps other users of the
network out; nothing is encrypted, as nothing is between the ranks.
"""

import contextlib
import hmac
import json
import os
import select
import socket
import sys
from collections.abc import Iterator
from typing import Any

from data_prep.errors import ConfigError

TOKEN_VARIABLE = "TIANKONG_TOKEN"
"""Holds the token where the launcher can hand an environment on; else it is the first line of standard input."""
LARGEST_MESSAGE = 64 << 20
"""Bytes after which a line is not one of ours."""
_CHUNK = 1 << 16

Message = dict[str, Any]


class Link:
    """One end of a connection. Sending never blocks for long; a link that fails is `closed` and says nothing more."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.closed = False
        self.peer = str(connection.getpeername()[0])
        """Address of the other end."""
        self._received = bytearray()
        self._unsent = bytearray()

    def fileno(self) -> int:
        """For `select`."""
        return self.connection.fileno()

    def send(self, message: Message) -> None:
        """Queue a message and send what the connection takes now; `flush` goes on."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what is left."""
        try:
            while self._unsent and not self.closed:
                sent = self.connection.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            if len(self._unsent) > LARGEST_MESSAGE:
                self.close()
        except OSError:
            self.close()

    def receive(self) -> Iterator[Message]:
        """Messages that have arrived. Closes the link at its end, or at a line that is no message."""
        try:
            while not self.closed:
                chunk = self.connection.recv(_CHUNK)
                self._received += chunk
                if not chunk or len(self._received) > LARGEST_MESSAGE:
                    self.close()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
        *lines, rest = bytes(self._received).split(b"\n")
        self._received[:] = rest
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):
                self.close()
                return
            yield message

    def close(self) -> None:
        """End the connection; a second call does nothing."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.connection.close()


class Switchboard:
    """The supervisor's end: a listening port, and the links of nodes that gave the right token."""

    def __init__(self, port: int, token: str) -> None:
        """Listen on every address; port 0 takes a free one. Raises ConfigError when it is in use."""
        self._token = token
        self._unknown: list[Link] = []
        self.links: list[Link] = []
        """Links whose token was right, closed ones until `poll` has told of their end."""
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._listener.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"cluster.supervisor_port={port} cannot be used on {socket.gethostname()} ({error.strerror}); "
                "end what listens there, or set 0 for a free port"
            ) from error
        self._listener.listen(4096)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])

    def poll(self, seconds: float) -> list[tuple[Link, Message | None]]:
        """Wait at most so long for messages; None in place of one tells that a link has ended."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        for link in (*self._unknown, *self.links):
            if not link.closed:
                poller.register(link, select.POLLIN)
        poller.poll(seconds * 1000)
        self._accept()
        events: list[tuple[Link, Message | None]] = []
        for link in list(self._unknown):
            events += self._greet(link)
        for link in list(self.links):
            events += [(link, message) for message in link.receive()]
            link.flush()
            if link.closed:
                self.links.remove(link)
                events.append((link, None))
        return events

    def close(self) -> None:
        """End everything."""
        for link in (*self.links, *self._unknown):
            link.close()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._listener.accept()
                self._unknown.append(Link(connection))

    def _greet(self, link: Link) -> list[tuple[Link, Message | None]]:
        messages = list(link.receive())
        if not messages and not link.closed:
            return []
        self._unknown.remove(link)
        token = messages[0].pop("token", None) if messages else None
        if not isinstance(token, str) or not hmac.compare_digest(token, self._token):
            link.close()
            return []
        self.links.append(link)
        return [(link, message) for message in messages]


def connect(address: str, port: int, seconds: float = 5.0) -> Link:
    """A node's end. Raises OSError where nobody answers."""
    return Link(socket.create_connection((address, port), timeout=seconds))


def read_token() -> str:
    """The token that this node was started with."""
    return os.environ.get(TOKEN_VARIABLE) or sys.stdin.readline().strip()
