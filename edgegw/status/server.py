"""A small read-only HTTP server for the status: /api/status, /metrics and /healthz."""

import asyncio
import logging
from http import HTTPStatus
from urllib.parse import urlsplit

import msgspec

from edgegw.status.service import StatusService

log = logging.getLogger(__name__)

REQUEST_BYTES = 8 * 1024
REQUEST_S = 5.0
CONNECTIONS = 16
RETRY_S = 10.0


class StatusServer:
    """Answers GET and HEAD requests by the status service, one a connection."""

    def __init__(self, address: str, status: StatusService) -> None:
        parts = urlsplit(f"http://{address}")
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 8077
        self._status = status
        self._open = 0

    async def run(self) -> None:
        """Serve until cancelled; a port in use is said once and tried again."""
        said = False
        while True:
            try:
                server = await asyncio.start_server(self._serve, self._host, self._port, limit=REQUEST_BYTES)
            except OSError as error:
                if not said:
                    log.error(
                        "status.http (%s:%d): %s; no status page until it is free",
                        self._host,
                        self._port,
                        error.strerror,
                    )
                said = True
                await asyncio.sleep(RETRY_S)
                continue
            async with server:
                await server.serve_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= CONNECTIONS:
                async with asyncio.timeout(REQUEST_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(await self._answer(head))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked is gone or asks nonsense
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET\n")
        response = await self._page(path)
        return response[: response.index(b"\r\n\r\n") + 4] if method == b"HEAD" else response

    async def _page(self, path: bytes) -> bytes:
        match path:
            case b"/api/status":
                body = msgspec.json.encode(await self._status.snapshot())
                return _response(HTTPStatus.OK, "application/json", body)
            case b"/healthz":
                health = await self._status.health()
                failing = health.state == "failing"
                code = HTTPStatus.SERVICE_UNAVAILABLE if failing else HTTPStatus.OK
                return _response(code, "application/json", msgspec.json.encode(health))
            case b"/metrics":
                from edgegw.status.metrics import render

                kind, body = render(await self._status.snapshot(), self._status.acknowledged_s)
                return _response(HTTPStatus.OK, kind, body)
        return _response(HTTPStatus.NOT_FOUND, "text/plain", b"/api/status, /metrics, /healthz\n")


def _response(status: HTTPStatus, kind: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
