"""The embedded broker over a Unix socket: how worker processes and CLI share `brokertask dev`.

    frames  what is on the socket: length-prefixed msgpack lists, and errors by name
    server  `serve`: one `MemoryTransport` for each connection, so that a cut one gives back
    link    one connection of a client, until it is lost
    client  `SocketTransport`, which reconnects, declares again and consumes on

A frame of a client is `[number, call, arguments]`; the answer is `[number, error, value]`, and no
answer is sent for number 0. What the server sends by itself has number 0 too.
"""

from brokertask.transport.socket.client import SocketTransport
from brokertask.transport.socket.server import SocketServer, serve

__all__ = ["SocketServer", "SocketTransport", "serve"]
