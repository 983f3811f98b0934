"""Requests and the check of their answers, as the bytes of a protocol data unit (PDU)."""

import struct

from edgegw.errors import BadAnswer, DeviceError, Refused

EXCEPTIONS = {
    1: "illegal-function",
    2: "illegal-address",
    3: "illegal-value",
    4: "device-failure",
    5: "acknowledge",
    6: "busy",
    8: "memory-parity",
    10: "gateway-path-unavailable",
    11: "gateway-target-silent",
}
"""Exception codes (Modbus Application Protocol 1.1b3, 7) as reasons."""
FINAL = frozenset({1, 2, 3})
"""Exception codes that say that the same request would be refused again."""


def read_request(function: int, start: int, count: int) -> bytes:
    """Return the PDU that reads `count` registers or bits from `start` (6.1 to 6.4)."""
    return struct.pack(">BHH", function, start, count)


def write_coil_request(address: int, on: bool) -> bytes:
    """Return the PDU that writes one coil (6.5)."""
    return struct.pack(">BHH", 5, address, 0xFF00 if on else 0)


def write_registers_request(start: int, data: bytes) -> bytes:
    """Return the PDU that writes the bytes of one register (6.6) or of several (6.12)."""
    if len(data) == 2:
        return struct.pack(">BH", 6, start) + data
    return struct.pack(">BHHB", 16, start, len(data) // 2, len(data)) + data


def answer_head(request: bytes) -> bytes:
    """Return what the answer to a read request begins with: its function, and how many bytes of data follow."""
    count = int.from_bytes(request[3:5], "big")
    return bytes((request[0], (count + 7) // 8 if request[0] in (1, 2) else count * 2))


def not_an_answer(request: bytes, answer: bytes) -> DeviceError:
    """Return the error that says what came instead of the answer to a read request: Refused or BadAnswer."""
    try:
        _check_function(request[0], answer)
    except DeviceError as error:
        return error
    return BadAnswer(
        "wrong-length", f"an answer of {len(answer)} bytes; expected {answer_head(request)[1] + 2}"
    )


def gateway_reason(answer: bytes) -> str | None:
    """Return why a gateway says that it has no answer of a unit (7, exceptions 10 and 11), None if it is the unit's."""
    if answer[0] & 0x80 and len(answer) == 2 and answer[1] in (10, 11):
        return EXCEPTIONS[answer[1]]
    return None


def check_written(request: bytes, answer: bytes) -> None:
    """Return if an answer is the echo of this very write: function, address, and value or count.

    Raise Refused for an exception response, BadAnswer for anything else.
    """
    _check_function(request[0], answer)
    if answer != request[:5]:
        raise BadAnswer("wrong-echo", f"an answer of {answer.hex(' ')}; expected {request[:5].hex(' ')}")


def _check_function(function: int, answer: bytes) -> None:
    if answer[:1] == bytes((function,)):
        return
    if len(answer) == 2 and answer[0] == function | 0x80:
        reason = EXCEPTIONS.get(answer[1], f"exception-{answer[1]}")
        raise Refused(reason, f"exception {answer[1]} ({reason})", final=answer[1] in FINAL)
    raise BadAnswer(
        "wrong-function", f"an answer to function {answer[0] if answer else None}; expected {function}"
    )
