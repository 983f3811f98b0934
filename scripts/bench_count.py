"""Counts the readings that arrive at a broker: bench_count.py PORT TAGS; prints the total ten times a second.

It looks at a batch's head only: records times tags, for data batches on any topic. Each line begins with when the
last batch came, for batches come in bursts, a commit's at a time; as long as none has come, with the time of now.
"""

import re
import sys
import time

from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

HEAD = re.compile(rb'"count":(\d+),"kind":"data"')


def main(port: int, tags: int) -> None:
    seen = {"at": 0.0, "readings": 0, "bytes": 0, "batches": 0}

    def on_message(client: object, userdata: object, message: mqtt.MQTTMessage) -> None:
        found = HEAD.search(message.payload[:400])
        if found:
            seen["at"] = time.monotonic()
            seen["readings"] += int(found[1]) * tags
            seen["bytes"] += len(message.payload)
            seen["batches"] += 1

    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.on_connect = lambda *_: client.subscribe("edgegw/#", qos=1)
    client.on_message = on_message
    client.reconnect_delay_set(1, 1)
    while True:
        try:
            client.connect("127.0.0.1", port)
            break
        except OSError:
            time.sleep(0.05)
    client.loop_start()
    while True:
        at = seen["at"] or time.monotonic()
        print(f"{at} {seen['readings']} {seen['bytes']} {seen['batches']}", flush=True)
        time.sleep(0.1)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:3]))
