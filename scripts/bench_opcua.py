"""OPC UA at speed: servers that answer as fast as one core can, and what asyncua alone makes of them.

`bench_opcua.py serve PORT SERVERS TAGS` runs servers on neighbouring ports that speak just enough of the protocol:
no security, Read, and one subscription a session. Their values are Float, Double, Int32 and Boolean in turns, wander
as measurements do, and have the time of the moment as their source's. Each answer is the next of a few made
beforehand by asyncua, so that answering costs little more than copying. `bench_opcua.py bare MODE PORT SECONDS TAGS`
prints how many values a second asyncua's own client gets from one of them.
"""

import asyncio
import logging
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvloop
from asyncua import Client, ua
from asyncua.common.utils import Buffer
from asyncua.ua.ua_binary import nodeid_from_binary, struct_from_binary, struct_to_binary

ANSWERS = 32
SERVERS, TAGS = 10, 1000
KINDS = (
    ("Float", "float32"),
    ("Double", "float64"),
    ("Float", "float32"),
    ("Int32", "int32"),
    ("Boolean", "bool"),
)
SUBSCRIPTION = 1
TOKEN = ua.NodeId(7, 0, ua.NodeIdType.FourByte)
NOW = 0x01DC5A5A5A5A5A5A // 10 * 10
"""Stands in a prepared answer for the time of sending."""
EPOCH = 116_444_736_000_000_000
REQUEST_HANDLE = 16
READ_COUNT = 47
"""Where a ReadRequest's count of nodes stands, given TOKEN and neither an audit entry nor an additional header."""


def filetime() -> int:
    """Return the time as OPC UA tells it: 100 ns since 1601."""
    return time.time_ns() // 100 + EPOCH


def data_values(count: int, walk: random.Random) -> list[ua.DataValue]:
    """Return values of all kinds in turns, with the resolution of a tenth that transducers have."""
    at = ua.win_epoch_to_datetime(NOW)
    made = []
    for i in range(count):
        kind = ua.VariantType[KINDS[i % len(KINDS)][0]]
        value: Any = round(walk.uniform(10.0, 500.0), 1)
        if kind is ua.VariantType.Int32:
            value = int(value)
        elif kind is ua.VariantType.Boolean:
            value = value > 250.0
        made.append(ua.DataValue(ua.Variant(value, kind), StatusCode=None, SourceTimestamp=at))
    return made


class Prepared:
    """Answers made beforehand, by the number of values."""

    def __init__(self) -> None:
        self._reads: dict[int, list[bytes]] = {}
        self._notifications: dict[range, list[bytes]] = {}
        self._turn = 0

    def _next(self, made: list[bytes], handle: bytes) -> bytes:
        self._turn += 1
        now = struct.pack("<q", filetime())
        body = made[self._turn % ANSWERS].replace(struct.pack("<q", NOW), now)
        return body[:4] + now + handle + body[16:]

    def read(self, count: int, handle: bytes) -> bytes:
        """Return the answer to a read of so many nodes."""
        if count not in self._reads:
            walk = random.Random(count)
            self._reads[count] = [
                struct_to_binary(ua.ReadResponse(Results=data_values(count, walk))) for _ in range(ANSWERS)
            ]
        return self._next(self._reads[count], handle)

    def notification(self, items: range, handle: bytes, sequence: int) -> bytes:
        """Return a publish response with a value of each item."""
        if items not in self._notifications:
            walk = random.Random(len(items))
            self._notifications[items] = [self._publish(items, walk) for _ in range(ANSWERS)]
        body = self._next(self._notifications[items], handle)
        # the response's header has 28 bytes, the subscription 4, an empty list 4, and MoreNotifications 1
        return body[:37] + struct.pack("<I", sequence) + body[41:]

    @staticmethod
    def _publish(items: range, walk: random.Random) -> bytes:
        values = data_values(len(items), walk)
        changed = [ua.MonitoredItemNotification(*pair) for pair in zip(items, values, strict=True)]
        message = ua.NotificationMessage(NotificationData=[ua.DataChangeNotification(changed)])
        result = ua.PublishResult(SUBSCRIPTION, MoreNotifications=False, NotificationMessage=message)
        return struct_to_binary(ua.PublishResponse(Parameters=result))


class Session(asyncio.Protocol):
    """One connection; a message may come in pieces, a request is one chunk."""

    answers: Prepared

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._data = b""
        self._sent = 0
        self._wanted: deque[tuple[bytes, bytes]] = deque()
        self._items = range(0)
        self._sequence = self._due = 0
        self._ticking: asyncio.TimerHandle | None = None

    def connection_lost(self, error: Exception | None) -> None:
        if self._ticking is not None:
            self._ticking.cancel()

    def data_received(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= 8:
            size = int.from_bytes(self._data[4:8], "little")
            if len(self._data) < size:
                break
            message, self._data = self._data[:size], self._data[size:]
            self._message(message)

    def _message(self, message: bytes) -> None:
        match message[:3]:
            case b"HEL":
                # protocol 0, buffers of 64 KiB, no limits
                self._transport.write(b"ACKF" + struct.pack("<IIIIII", 28, 0, 65535, 65535, 0, 0))
            case b"OPN":
                body = Buffer(message[12:])
                asked = struct_from_binary(ua.AsymmetricAlgorithmHeader, body)
                security = struct_to_binary(ua.AsymmetricAlgorithmHeader(asked.SecurityPolicyURI))
                request_id = body.read(8)[4:]
                body.read(4)
                lifetime = struct_from_binary(ua.RequestHeader, body) and 3_600_000
                token = ua.ChannelSecurityToken(1, 1, RevisedLifetime=lifetime)
                result = ua.OpenSecureChannelResult(0, token, b"")
                self._send(
                    b"OPN",
                    security,
                    request_id,
                    struct_to_binary(ua.OpenSecureChannelResponse(Parameters=result)),
                )
            case b"MSG":
                self._request(message[20:24], message[24:])
            case b"CLO":
                self._transport.close()

    def _send(self, kind: bytes, security: bytes, request_id: bytes, body: bytes) -> None:
        self._sent += 1
        size = 12 + len(security) + 8 + len(body)
        head = kind + b"F" + struct.pack("<II", size, 1) + security + struct.pack("<I", self._sent)
        self._transport.write(head + request_id + body)

    def _answer(self, request_id: bytes, body: bytes) -> None:
        self._send(b"MSG", struct.pack("<I", 1), request_id, body)

    def _request(self, request_id: bytes, body: bytes) -> None:
        kind = int.from_bytes(body[2:4], "little")
        if kind == ua.ObjectIds.ReadRequest_Encoding_DefaultBinary:
            count = int.from_bytes(body[READ_COUNT : READ_COUNT + 4], "little")
            if count > 1:
                self._answer(request_id, self.answers.read(count, body[REQUEST_HANDLE : REQUEST_HANDLE + 4]))
            else:
                self._answer(request_id, struct_to_binary(self._attribute(body)))
        elif kind == ua.ObjectIds.PublishRequest_Encoding_DefaultBinary:
            self._wanted.append((request_id, body[REQUEST_HANDLE : REQUEST_HANDLE + 4]))
            self._publish()
        else:
            self._answer(request_id, struct_to_binary(self._rare(kind, Buffer(body))))

    @staticmethod
    def _attribute(body: bytes) -> Any:
        """Return the answer to a read of one node: the server's state, or a limit, of which there is none."""
        node = nodeid_from_binary(Buffer(body[READ_COUNT + 4 :]))
        running = node.Identifier == ua.ObjectIds.Server_ServerStatus_State
        value = ua.Variant(0, ua.VariantType.Int32 if running else ua.VariantType.UInt32)
        return ua.ReadResponse(Results=[ua.DataValue(value)])

    def _rare(self, kind: int, body: Buffer) -> Any:
        ids = ua.ObjectIds
        if kind == ids.CreateSessionRequest_Encoding_DefaultBinary:
            endpoint = ua.EndpointDescription(
                "opc.tcp://127.0.0.1/",
                SecurityMode=ua.MessageSecurityMode.None_,
                SecurityPolicyUri="http://opcfoundation.org/UA/SecurityPolicy#None",
                UserIdentityTokens=[ua.UserTokenPolicy("anonymous", ua.UserTokenType.Anonymous)],
            )
            return ua.CreateSessionResponse(
                Parameters=ua.CreateSessionResult(
                    SessionId=ua.NodeId(1, 1), AuthenticationToken=TOKEN, RevisedSessionTimeout=60_000.0,
                    ServerNonce=bytes(32), ServerEndpoints=[endpoint],
                )
            )  # fmt: skip
        if kind == ids.ActivateSessionRequest_Encoding_DefaultBinary:
            return ua.ActivateSessionResponse(Parameters=ua.ActivateSessionResult(ServerNonce=bytes(32)))
        if kind == ids.CreateSubscriptionRequest_Encoding_DefaultBinary:
            asked = struct_from_binary(ua.CreateSubscriptionRequest, body).Parameters
            self._every_s = asked.RequestedPublishingInterval / 1000.0
            self._tick_at_s = asyncio.get_running_loop().time()
            self._tick()
            return ua.CreateSubscriptionResponse(
                Parameters=ua.CreateSubscriptionResult(
                    SUBSCRIPTION,
                    asked.RequestedPublishingInterval,
                    asked.RequestedLifetimeCount,
                    asked.RequestedMaxKeepAliveCount,
                )
            )
        if kind == ids.CreateMonitoredItemsRequest_Encoding_DefaultBinary:
            items = struct_from_binary(ua.CreateMonitoredItemsRequest, body).Parameters.ItemsToCreate
            handles = [item.RequestedParameters.ClientHandle for item in items]
            self._items = range(self._items.start or handles[0], handles[-1] + 1)
            results = [ua.MonitoredItemCreateResult(MonitoredItemId=handle + 1) for handle in handles]
            return ua.CreateMonitoredItemsResponse(Results=results)
        if kind == ids.CloseSessionRequest_Encoding_DefaultBinary:
            return ua.CloseSessionResponse()
        refused = ua.ResponseHeader(ServiceResult=ua.StatusCode(ua.StatusCodes.BadServiceUnsupported))
        return ua.ServiceFault(ResponseHeader=refused)

    def _tick(self) -> None:
        """Have a value of each item to publish; what nobody asked for in time is not sent later."""
        self._tick_at_s += self._every_s
        self._ticking = asyncio.get_running_loop().call_at(self._tick_at_s, self._tick)
        if self._items:
            self._due = min(self._due + 1, 3)
            self._publish()

    def _publish(self) -> None:
        while self._due and self._wanted:
            self._due -= 1
            self._sequence += 1
            request_id, handle = self._wanted.popleft()
            self._answer(request_id, self.answers.notification(self._items, handle, self._sequence))


async def serve(port: int, servers: int, tags: int) -> None:
    loop = asyncio.get_running_loop()
    kind = type("Session", (Session,), {"answers": Prepared()})
    kind.answers.read(tags, bytes(4))
    kind.answers.notification(range(tags), bytes(4), 1)
    for i in range(servers):
        await loop.create_server(kind, "127.0.0.1", port + i)
    print("ready", flush=True)
    await asyncio.Event().wait()


class Count:
    """asyncua's handler of a subscription, which is called for each value."""

    def __init__(self) -> None:
        self.values = 0
        self.begun = asyncio.Event()

    def datachange_notification(self, node: object, value: object, data: object) -> None:
        self.values += 1
        self.begun.set()


async def bare(mode: str, port: int, seconds: float, tags: int) -> None:
    """Print the values a second that asyncua's client gets, and its CPU microseconds a value."""
    logging.getLogger("asyncua").setLevel(logging.ERROR)
    async with Client(f"opc.tcp://127.0.0.1:{port}") as client:
        nodes = [client.get_node(ua.NodeId(f"Plant.Area.Tag{i:05}", 2)) for i in range(tags)]
        count = Count()
        if mode == "subscribe":
            subscription = await client.create_subscription(tags / 200, count)
            await subscription.subscribe_data_change(nodes)
            await count.begun.wait()
        before, began, used = count.values, time.monotonic(), time.process_time()
        while time.monotonic() - began < seconds:
            if mode == "subscribe":
                await asyncio.sleep(0.1)
            else:
                count.values += len(
                    await client.uaclient.session.read_attributes(
                        [node.nodeid for node in nodes], ua.AttributeIds.Value
                    )
                )
        got, took = count.values - before, time.monotonic() - began
        print(got / took, (time.process_time() - used) / max(1, got) * 1e6, flush=True)


def config(folder: Path, port: int, broker_port: int, mode: str, readings_s: float) -> tuple[Path, float]:
    """Write a configuration that asks for so many readings a second; return it and what it really asks for."""
    every_ms = max(1, round(1000 * SERVERS * TAGS / readings_s))
    text = '[gateway]\nid = "bench"\n[journal]\nmax_size = "8GiB"\n[status]\nhttp = ""\n'
    text += f'[uplink]\nurl = "mqtt://127.0.0.1:{broker_port}"\nreconnect_jitter = "0s"\n'
    for i in range(SERVERS):
        text += f'[device.p{i}]\ndriver = "opcua"\nurl = "opc.tcp://127.0.0.1:{port + i}/"\n'
        text += f'mode = "{mode}"\nevery = "{every_ms}ms"\n[device.p{i}.tags]\n'
        for j in range(TAGS):
            kind = KINDS[j % len(KINDS)][1]
            text += f't{j:04} = {{ address = "ns=2;s=Plant.Area.Tag{j:05}", type = "{kind}" }}\n'
    path = folder / "config.toml"
    path.write_text(text)
    return path, SERVERS * TAGS * 1000 / every_ms


def after_commit(counter: Any) -> tuple[float, int]:
    """Return time and readings when all that one commit brought has been counted; commits come each half second."""
    seen = [counter.now() for _ in range(7)]
    while seen[-1][1] != seen[-2][1] or seen[-1][1] == seen[-7][1]:
        seen.append(counter.now())
        if seen[-1][0] - seen[0][0] > 3.0:
            break  # it never pauses any more
    return seen[-1][:2]


def at(mode: str, readings_s: float, seconds: float, folder: Path) -> dict[str, float]:
    """Measure the gateway at one demand, after five seconds to warm up."""
    from bench_run import Counter, cpu_s, free_port, mosquitto, process, rss_mb, run, wait

    with ExitStack() as stack:
        port, broker_port = free_port(SERVERS), free_port(1)
        stack.enter_context(mosquitto(folder, broker_port))
        command = (sys.executable, __file__, "serve", str(port), str(SERVERS), str(TAGS))
        server = stack.enter_context(process(*command, wait_for="ready", stdout=subprocess.PIPE))
        counter = Counter(broker_port, TAGS)
        stack.callback(counter.close)
        path, demand = config(folder, port, broker_port, mode, readings_s)
        gateway = stack.enter_context(run(path))
        while not counter.now()[1]:
            pass
        wait(counter, 5.0)
        began, readings = after_commit(counter)
        cpu, serving, early = cpu_s(gateway.pid), cpu_s(server.pid), rss_mb(gateway.pid)
        wait(counter, seconds)
        later, more = after_commit(counter)
        used, got, took = cpu_s(gateway.pid) - cpu, max(1, more - readings), later - began
        return {
            "demand": round(demand),
            "arrived": round(got / took),
            "share": round(got / took / demand, 4),
            "cpu_us_per_reading": round(used / got * 1e6, 2),
            "cores": round(used / took, 2),
            "server_cores": round((cpu_s(server.pid) - serving) / took, 2),
            "rss_early_mb": round(early, 1),
            "rss_mb": round(rss_mb(gateway.pid), 1),
        }


def ceiling(mode: str, seconds: float) -> tuple[float, float]:
    """Return the values a second that asyncua alone gets from one server, and its CPU microseconds a value."""
    from bench_run import free_port, process

    port = str(free_port(1))
    me = (sys.executable, __file__)
    with (
        process(*me, "serve", port, "1", str(TAGS), wait_for="ready", stdout=subprocess.PIPE),
        process(*me, "bare", mode, port, str(seconds), str(TAGS), stdout=subprocess.PIPE) as client,
    ):
        assert client.stdout
        values_s, cpu_us = client.stdout.readline().split()
        return float(values_s), float(cpu_us)


def opcua(seconds: float, demands: list[float]) -> dict[str, list[dict[str, float]]]:
    """Raise the demand by each mode until less than 97 % arrives; compare with asyncua alone."""
    found = {}
    for mode in ("poll", "subscribe"):
        values_s, cpu_us = ceiling(mode, seconds)
        rows: list[dict[str, float]] = []
        for demand in demands:
            with tempfile.TemporaryDirectory(prefix="edgegw-bench-") as folder:
                rows.append(at(mode, demand, seconds, Path(folder)))
            if rows[-1]["share"] < 0.97:
                break
        best = max(row["arrived"] for row in rows)
        alone = {"asyncua_alone": round(values_s), "asyncua_cpu_us": round(cpu_us, 2)}
        found[f"opcua {mode}"] = [*rows, alone | {"ratio": round(best / values_s, 2)}]
    return found


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "serve":
        uvloop.run(serve(*map(int, arguments)))
    else:
        uvloop.run(bare(arguments[0], int(arguments[1]), float(arguments[2]), int(arguments[3])))
