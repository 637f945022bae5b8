"""A TCP proxy on the loopback in front of a real server, which breaks connections at the places a test names."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

# What is done to one connection: ("reset" | "close" | "stall", after so many bytes of answers), ("answer", the bytes to
# send instead of asking the server), or None.
Fault = tuple[str, int] | tuple[str, bytes] | None


def error_answer(status: int, code: str) -> bytes:
    """An S3 error, as a store sends it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told by the proxy</Message></Error>".encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    return head.encode() + b"\r\n\r\n" + body


class FaultProxy:
    """Gives the next fault to each connection in the order they come; with no fault left it passes all on.

    Attributes:
        port: Where it listens.
        faults: How many connections it has broken.
        requests: First line and Range of each request it saw.
    """

    def __init__(self, port: int, faults: Iterator[Fault]):
        self._server_port, self._plan = port, faults
        self.faults = 0
        self.requests: list[tuple[str, str | None]] = []
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends all connections."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = next(self._plan, None)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            if fault and fault[0] == "answer":
                self._note(await reader.readuntil(b"\r\n\r\n"))
                self.faults += 1
                writer.write(fault[1])
                await writer.drain()
            else:
                await self._pass_on(reader, writer, fault)
        writer.close()

    async def _pass_on(self, reader, writer, fault) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
        asking = asyncio.create_task(self._ask(reader, to_server))
        try:
            passed = 0
            while data := await from_server.read(65536):
                if fault and passed + len(data) >= fault[1]:
                    self.faults += 1
                    writer.write(data[: fault[1] - passed])
                    await writer.drain()
                    if fault[0] == "stall":
                        await asking  # until the client has enough of it
                    elif fault[0] == "reset":
                        linger = struct.pack("ii", 1, 0)
                        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                        writer.transport.abort()
                    return
                passed += len(data)
                writer.write(data)
                await writer.drain()
        finally:
            asking.cancel()
            to_server.close()

    async def _ask(self, reader, to_server) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                self._note(data)
                to_server.write(data)
                await to_server.drain()

    def _note(self, data: bytes) -> None:
        if not data.startswith((b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")):
            return
        first, *headers = data.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        fields = {name.lower(): value for name, _, value in (header.partition(": ") for header in headers)}
        self.requests.append((first, fields.get("range")))
