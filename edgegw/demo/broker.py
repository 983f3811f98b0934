"""The demo's broker: amqtt, made to acknowledge only what a subscriber has confirmed.

As it comes, amqtt confirms a QoS 1 message to its publisher when it has put it into a queue in memory. What
it has not delivered by then is lost when the broker stops, when nobody is subscribed, when the publisher says
goodbye, or when the subscriber takes more than five seconds to confirm. A broker without persistence may do
that; the demo is to show what the gateway does, so here a message is confirmed once every subscriber has
confirmed it, and waits until there is one. Then the broker may go at any moment, and what it took with it was
never confirmed and comes again from the journal.
"""

import asyncio
import logging
import signal
import sys
from typing import Any

from amqtt.broker import Broker
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.puback import PubackPacket

HOST = "127.0.0.1"
AGAIN_S = 0.05
"""How long to wait before another attempt at a message that nobody has confirmed."""


class ConfirmingBroker(Broker):  # type: ignore[misc]  # amqtt has no types
    """A broker whose acknowledgement means that the subscribers have the message."""

    async def _initialize_client_session(self, *connection: Any) -> tuple[BrokerProtocolHandler, Any]:
        """Give each connection our handler; the one that amqtt made is not yet attached to anything."""
        _, session = await super()._initialize_client_session(*connection)
        return _Handler(self), session

    async def deliver(self, topic: str, data: bytes) -> bool:
        """Send a message to all who want it now; True if there was someone and all have confirmed it."""
        clients = {
            session.client_id
            for wanted, subscribers in self.subscriptions.items()
            if self._matches(topic, wanted)
            for session, _ in subscribers
            if session.transitions.state == "connected"
        }
        handlers = [self.sessions[client][1] for client in clients if client in self.sessions]
        outcomes = await asyncio.gather(
            *(each.mqtt_publish(topic, data, 1, retain=False) for each in handlers), return_exceptions=True
        )
        return bool(outcomes) and not any(isinstance(outcome, BaseException) for outcome in outcomes)


class _Handler(BrokerProtocolHandler):  # type: ignore[misc]  # amqtt has no types
    """One connection; amqtt calls `handle_publish` in a task of its own, which ends with the connection."""

    def __init__(self, broker: ConfirmingBroker) -> None:
        super().__init__(broker.plugins_manager)
        self._broker = broker

    async def handle_publish(self, publish_packet: Any) -> None:
        """Deliver a QoS 1 message, then acknowledge it; leave others to amqtt."""
        if publish_packet.qos != 1 or publish_packet.data is None:
            await super().handle_publish(publish_packet)
            return
        topic, data = publish_packet.topic_name, bytes(publish_packet.data)
        if publish_packet.retain_flag:
            await self._broker.retain_message(self.session, topic, data, 1)
        while True:
            if await self._broker.deliver(topic, data):
                break
            await asyncio.sleep(AGAIN_S)
        await self._send_packet(PubackPacket.build(publish_packet.packet_id))


async def serve(port: int) -> None:
    """Listen on a port of the loopback until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    broker = ConfirmingBroker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"{HOST}:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await broker.start()
    print("ready", flush=True)
    await stop.wait()
    await broker.shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)
    asyncio.run(serve(int(sys.argv[1])))
