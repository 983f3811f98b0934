"""OPC UA servers that send without measure: how much of it is kept, and what it costs the neighbours."""

import asyncio
import struct
from itertools import pairwise

import pytest
import test_modbus_hostile
from gateway_rig import until
from hostile import ACKNOWLEDGE, chunk, hostile
from hypothesis import given
from hypothesis import strategies as st
from test_opcua_driver import Field, config, error_of, field, free_port, scan, shared_field
from test_scanner import scanning

from edgegw.drivers.opcua import framing
from edgegw.drivers.opcua.driver import OpcUaDriver
from edgegw.drivers.opcua.framing import (
    MAX_ABORTED,
    MAX_CHUNK_BYTES,
    MAX_CHUNKS,
    MAX_MESSAGE_BYTES,
    BoundedProtocol,
    MessageBounds,
)

__all__ = ["field", "shared_field"]
KINDS = {
    "giant": f"found a chunk of 2147483647 bytes; expected {MAX_CHUNK_BYTES} at most",
    "endless": f"found a message of {MAX_CHUNKS + 1} chunks",
    "aborted": f"found {MAX_ABORTED + 1} messages in a row that are aborted",
    "lengthy": "found an answer of 1040000 bytes to a request of a few; expected 131072 at most",
    "unasked": "found an answer to request 77777, which was not made",
}


async def skipped_beside(url: str | None) -> int:
    """Return how many scans a healthy Modbus device skips while it does its scans, beside a server at this url."""
    if url is None:
        return await test_modbus_hostile.skipped_beside(None)
    async with scanning(config(url, every="100ms")):
        return await test_modbus_hostile.skipped_beside(None)


@pytest.mark.parametrize("kind", list(KINDS))
async def test_p6_a_server_that_sends_without_measure_costs_a_neighbour_nothing(kind: str) -> None:
    """Against a run without it, since the machine may be busy."""
    alone = await skipped_beside(None)
    async with hostile(kind) as made:
        beside = await skipped_beside(f"opc.tcp://127.0.0.1:{made.port}/")
    assert beside <= alone + test_modbus_hostile.SCANS // 3


@pytest.mark.parametrize("kind", list(KINDS))
async def test_the_connection_ends_with_the_reason_and_little_was_kept(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    receive = BoundedProtocol.data_received

    def counted(self: BoundedProtocol, data: bytes) -> None:
        receive(self, data)
        kept.append(len(self._received))

    monkeypatch.setattr(BoundedProtocol, "data_received", counted)
    async with (
        hostile(kind) as made,
        OpcUaDriver("plant", config(f"opc.tcp://127.0.0.1:{made.port}/", timeout="5s")) as driver,
    ):
        error = await error_of(driver)
        assert error.reason == "bad-answer"
        assert KINDS[kind] in str(error)
    assert max(kept) < MAX_CHUNK_BYTES


async def test_a_server_is_told_the_bounds_and_what_it_acknowledges_lifts_none(field: Field) -> None:
    heard: list[bytes] = []
    limits: list[object] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readexactly(28))
        writer.write(b"ACKF" + struct.pack("<6I", 28, 0, 2**32 - 1, 2**32 - 1, 0, 0))
        await reader.read(1)
        limits.append(None)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with OpcUaDriver("plant", config(f"opc.tcp://127.0.0.1:{port}/")):
        await until(lambda: heard and limits, "the request for a channel")
    assert struct.unpack_from("<5I", heard[0], 8) == (
        0, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES, MAX_CHUNKS,
    )  # fmt: skip
    server.close()


async def test_a_server_that_accepts_no_chunks_of_the_least_size_is_an_error() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(b"ACKF" + struct.pack("<6I", 28, 0, 0, 65535, 0, 0))
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with OpcUaDriver("plant", config(f"opc.tcp://127.0.0.1:{port}/")) as driver:
        error = await error_of(driver)
        assert "found a server that accepts chunks of 0 bytes; expected 8192 at least" in str(error)
    server.close()


async def test_an_answer_of_many_chunks_is_read() -> None:
    """A real server cuts what is longer than a chunk; a text of 300,000 bytes is five of them."""
    server = Field(free_port())
    await server.start()
    try:
        await server.set("Name", "é" * 150_000, "String")
        async with OpcUaDriver("plant", config(server.url)) as driver:
            (one,) = await scan(driver)
            assert one.values["name"] == "é" * 150_000
    finally:
        server.kill()


def fed(pieces: list[bytes]) -> tuple[bytes, list[ValueError]]:
    """Return what a protocol passes on of what comes in these pieces, and why it ended the connection."""
    passed: list[bytes] = []
    ended: list[ValueError] = []

    made = BoundedProtocol(1.0, None, ended.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing.UASocketProtocol, "data_received", lambda _, data: passed.append(data))
        for piece in pieces:
            made.data_received(piece)
    return b"".join(passed), ended


@given(bodies=st.lists(st.binary(max_size=40), max_size=8), cuts=st.lists(st.integers(0, 400), max_size=12))
def test_chunks_are_passed_on_whole_however_they_are_cut(bodies: list[bytes], cuts: list[int]) -> None:
    stream = ACKNOWLEDGE + b"".join(chunk(b"F", body) for body in bodies) + b"MSG"
    places = sorted({0, *(cut for cut in cuts if cut < len(stream)), len(stream)})
    pieces = [stream[a:b] for a, b in pairwise(places)]
    assert fed(pieces) == (stream[:-3], [])


def test_a_message_may_have_so_many_chunks_and_bytes_and_no_more() -> None:
    bounds = MessageBounds()
    for _ in range(MAX_CHUNKS):
        bounds.check(100)
        bounds.add(b"C", 100)
    with pytest.raises(ValueError, match="2049 chunks"):
        bounds.add(b"C", 100)
    bounds = MessageBounds()
    for _ in range(MAX_MESSAGE_BYTES // MAX_CHUNK_BYTES):
        bounds.check(MAX_CHUNK_BYTES)
        bounds.add(b"C", MAX_CHUNK_BYTES)
    with pytest.raises(ValueError, match="more than 16777216 bytes"):
        bounds.check(8)
    bounds.add(b"F", 0)
    bounds.check(MAX_CHUNK_BYTES)
    with pytest.raises(ValueError, match="a chunk of 7 bytes"):
        bounds.check(7)
