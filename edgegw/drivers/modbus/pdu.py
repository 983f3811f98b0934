"""Requests and the check of their answers, as the bytes of a protocol data unit (PDU)."""

import struct

from edgegw.errors import BadAnswer, Refused

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


def read_answer(request: bytes, answer: bytes) -> bytes:
    """Return the data bytes of the answer to a read request.

    Raise Refused for an exception response, BadAnswer for anything that does not answer this very request.
    """
    function = request[0]
    _check_function(function, answer)
    count = int.from_bytes(request[3:5], "big")
    size = (count + 7) // 8 if function in (1, 2) else count * 2
    if len(answer) == size + 2 and answer[1] == size:
        return answer[2:]
    raise BadAnswer("wrong-length", f"an answer of {len(answer)} bytes; expected {size + 2}")


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
        raise Refused(reason, f"exception {answer[1]} ({reason})")
    raise BadAnswer(
        "wrong-function", f"an answer to function {answer[0] if answer else None}; expected {function}"
    )
