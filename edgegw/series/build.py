"""Builds what windows are from the configuration, which has been checked."""

from math import inf

from edgegw.config.schema import STALE_PERIODS, AnyDevice, Config, OpcUaDevice
from edgegw.series.window import Input, Spec


def specs(config: Config) -> dict[str, Spec]:
    """Return each window by its name."""
    made = {}
    for name, window in config.window.items():
        inputs = tuple(_input(config, full) for full in window.of)
        made[name] = Spec(
            name, inputs, int(window.size), int(window.period), int(window.lateness), window.agg
        )
    return made


def _input(config: Config, full: str) -> Input:
    device, _, tag = full.partition(".")
    return Input(device, tag, _hold_ms(config.device[device]), _sourced(config.device[device]))


def _hold_ms(device: AnyDevice) -> float:
    """Return how long a reading stands for the time after it.

    A subscribed device would say if a value changed, and a source's time is when it last did: that stands until the
    device is lost.
    """
    if isinstance(device, OpcUaDevice) and (device.mode == "subscribe" or _sourced(device)):
        return inf
    return STALE_PERIODS * device.every + (device.heartbeat if device.report == "change" else 0)


def _sourced(device: AnyDevice) -> bool:
    return isinstance(device, OpcUaDevice) and device.timestamp == "source"
