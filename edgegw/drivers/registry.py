"""Makes the driver that a device's configuration asks for; a protocol's library is loaded only if it is used."""

from typing import TYPE_CHECKING

from edgegw.config.schema import Device, ModbusDevice, OpcUaDevice
from edgegw.drivers.base import Driver

if TYPE_CHECKING:
    from edgegw.drivers.modbus.transport import Transport
    from edgegw.drivers.session import Sessions


class Drivers:
    """Makes drivers; those of one registry share their connections."""

    def __init__(self) -> None:
        self._modbus: Sessions[Transport] | None = None

    def make(self, name: str, config: Device) -> Driver:
        """Return the driver of a device."""
        match config:
            case ModbusDevice():
                from edgegw.drivers.modbus.driver import ModbusDriver

                return ModbusDriver(name, config, self._modbus_sessions())
            case OpcUaDevice():
                from edgegw.drivers.opcua.driver import OpcUaDriver

                return OpcUaDriver(name, config)
            case _:
                raise TypeError(f"no driver for {type(config).__name__}")

    def _modbus_sessions(self) -> "Sessions[Transport]":
        if self._modbus is None:
            from edgegw.drivers.modbus.transport import open_transport
            from edgegw.drivers.session import Sessions

            self._modbus = Sessions(open_transport)
        return self._modbus
