"""Where a command's answer is published. Pure.

The broker checks the gateway's rights, not those of who asked: an answer must not go wherever a message says.
"""

OWN_LEVELS = frozenset({
    "data", "event", "backfill", "summary", "status", "meta", "health", "latest", "cmd", "ack", "config",
})  # fmt: skip
"""The gateway's own topics: nobody may have an answer published there."""
MAX_TOPIC_BYTES = 1024


def reply_topics(base: str, response_topic: str | None, prefix: str) -> list[str]:
    """Return the topics of an answer: TOPIC/reply, and an MQTT 5 response topic if that is allowed.

    Allowed is what lies below TOPIC/, but for the gateway's own topics, or begins with `uplink.reply_prefix`.
    """
    topics = [f"{base}/reply"]
    if response_topic and response_topic != topics[0] and _allowed(base, response_topic, prefix):
        topics.append(response_topic)
    return topics


def _allowed(base: str, topic: str, prefix: str) -> bool:
    if any(c in topic for c in "+#\0") or len(topic.encode("utf-8", "replace")) > MAX_TOPIC_BYTES:
        return False
    if topic.startswith(f"{base}/"):
        return topic.removeprefix(f"{base}/").partition("/")[0] not in OWN_LEVELS
    return bool(prefix) and topic.startswith(prefix)
