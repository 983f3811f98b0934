"""The Modbus/TCP field of the benchmarks: bench_field.py PORT DEVICES REGISTERS.

Makes a few hundred answers for each device, compiles the program that gives them, and becomes it. The registers hold
float32 values that wander as measurements do, with the resolution of a tenth that common transducers have.
"""

import os
import random
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ANSWERS = 256
SOURCE = Path(__file__).with_name("bench_field.c")


def answers(registers: int, seed: int) -> list[bytes]:
    """Return answers with an open transaction id."""
    walk = random.Random(seed)
    values = [walk.uniform(10.0, 500.0) for _ in range(registers // 2)]
    made = []
    for _ in range(ANSWERS):
        values = [value + walk.gauss(0.0, 0.2) for value in values]
        data = struct.pack(f">{len(values)}f", *(round(value, 1) for value in values))
        made.append(struct.pack(">HHHBBB", 0, 0, len(data) + 3, 1, 3, len(data)) + data)
    return made


def main(port: int, devices: int, registers: int) -> None:
    """Compile, hand over the answers, and become the field."""
    with tempfile.TemporaryDirectory(prefix="edgegw-bench-") as folder, tempfile.TemporaryFile() as told:
        program = Path(folder) / "bench_field"
        subprocess.run(["cc", "-O2", "-o", program, SOURCE], check=True)
        for device in range(devices):
            told.writelines(answers(registers, device))
        told.seek(0)
        os.dup2(told.fileno(), 0)
        length = 9 + registers * 2
        running = os.open(program, os.O_RDONLY)
    os.execv(f"/proc/self/fd/{running}", ["bench_field", str(port), str(devices), str(length)])


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]))
