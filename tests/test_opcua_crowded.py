"""OPC UA servers that take few monitored items a subscription, or few subscriptions: every tag is read all the same."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from test_opcua_driver import MANY, Field, config, error_of, free_port, scan, values_once

from edgegw.drivers.opcua.driver import OpcUaDriver
from edgegw.errors import DeviceError

TAGS = {f"n{i}": {"address": f"ns=2;s=N{i}"} for i in range(MANY)}
VALUES = {f"n{i}": float(i) for i in range(MANY)}


@asynccontextmanager
async def crowded(room: int, subscriptions: int = 0, items_limit: int = 0) -> AsyncIterator[Field]:
    """Run a server with room for so many items in each of so many subscriptions."""
    made = Field(free_port(), room=room, subscriptions=subscriptions, items_limit=items_limit)
    await made.start()
    try:
        yield made
    finally:
        made.kill()


@pytest.mark.parametrize("items_limit", [0, 7])
async def test_what_one_subscription_has_no_room_for_goes_to_further_ones(
    caplog: pytest.LogCaptureFixture, items_limit: int
) -> None:
    caplog.set_level(logging.INFO)
    async with (
        crowded(8, items_limit=items_limit) as field,
        OpcUaDriver("plant", config(field.url, tags=TAGS, mode="subscribe")) as driver,
    ):
        assert await values_once(driver, set(TAGS)) == VALUES
        assert await field.tell(subscriptions=True) == 4
        for node in (3, 12, 29):
            await field.set(f"N{node}", 100.0 + node)
            assert (await values_once(driver, {f"n{node}"}))[f"n{node}"] == 100.0 + node
    assert [line for line in caplog.messages if "subscription" in line] == [
        f"device.plant ({field.url}): 30 tags in 4 subscriptions"
    ]


async def test_what_no_subscription_has_room_for_is_polled(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        crowded(8, subscriptions=2) as field,
        OpcUaDriver("plant", config(field.url, tags=TAGS, mode="subscribe")) as driver,
    ):
        found: dict[str, object] = {}
        while len(found) < MANY:
            for one in await scan(driver):
                assert one.quality is None
                found |= one.values
        assert found == VALUES
        for node in (3, 12, 29):
            await field.set(f"N{node}", 100.0 + node)
            while (await values_once(driver, {f"n{node}"}))[f"n{node}"] != 100.0 + node:
                pass
        field.kill()
        await error_of(driver)
        await field.start()
        assert (await after(driver)) == VALUES
    line = f"device.plant ({field.url}): 14 of 30 tags are polled: the server has room for no more in 2 subscriptions"
    assert [message for message in caplog.messages if "polled" in message] == [line, line], "once a session"


async def after(driver: OpcUaDriver) -> dict[str, object]:
    """Return the value of each tag once the server is back."""
    found: dict[str, object] = {}
    while len(found) < MANY:
        try:
            for one in await scan(driver):
                found |= one.values
        except DeviceError:
            continue  # the attempts until then
    return found


async def test_an_unknown_node_among_too_many_is_bad_and_not_polled() -> None:
    tags = TAGS | {"gone": {"address": "ns=2;s=Gone"}}
    async with (
        crowded(8) as field,
        OpcUaDriver("plant", config(field.url, tags=tags, mode="subscribe")) as driver,
    ):
        qualities: dict[str, str] = {}
        found: dict[str, object] = {}
        while len(found) < len(tags):
            for one in await scan(driver):
                found |= one.values
                qualities |= one.quality or {}
        assert found == VALUES | {"gone": None}
        assert qualities == {"gone": "bad:node-id-unknown"}
        assert await field.tell(subscriptions=True) == 4
