"""The physics of a small microgrid: grid connection, solar, consumers, battery and genset.

Powers are in kW. The grid's is positive when the site takes from it, the battery's when it discharges. With
the breaker closed the grid balances: `grid = load - solar - battery - genset`. With it open the battery does,
whatever its setpoint; what it cannot give is shed and what it cannot take is curtailed.
"""

import math
from dataclasses import dataclass, replace
from enum import IntEnum

from edgegw.sim import weather

SOLAR_KW = 80.0
BATTERY_KW = 50.0
BATTERY_KWH = 100.0
BATTERY_EFFICIENCY = 0.95
BATTERY_RAMP_KW_S = 100.0
GENSET_KW = 60.0
GENSET_START_S = 5.0
GENSET_RAMP_KW_S = 10.0
GENSET_KWH_PER_FUEL = 400.0
DIP_HZ = 0.4
"""How far the grid's frequency falls when a large plant elsewhere is lost."""


class Genset(IntEnum):
    """What the genset is doing."""

    STOPPED = 0
    STARTING = 1
    RUNNING = 2


@dataclass(frozen=True, slots=True)
class State:
    """The plant at one moment; `time_s` counts from the plant's midnight."""

    time_s: float
    day_s: float
    seed: int = 1
    irradiance_w_m2: float = 0.0
    module_c: float = 15.0
    load_kw: float = 0.0
    solar_kw: float = 0.0
    solar_limit: float = 1.0
    solar_kwh: float = 0.0
    battery_kw: float = 0.0
    battery_setpoint_kw: float = 0.0
    battery_c: float = 25.0
    stored_kwh: float = 60.0
    genset: Genset = Genset.STOPPED
    genset_start: bool = False
    genset_wait_s: float = 0.0
    genset_kw: float = 0.0
    genset_setpoint_kw: float = 30.0
    genset_h: float = 1204.0
    fuel: float = 0.9
    breaker: bool = True
    grid_kw: float = 0.0
    voltage_v: float = 230.0
    frequency_hz: float = 50.0
    dip_s: float = 0.0
    import_kwh: float = 0.0
    export_kwh: float = 0.0

    @property
    def soc(self) -> float:
        """The battery's state of charge, 0 to 1."""
        return self.stored_kwh / BATTERY_KWH

    @property
    def cloudy(self) -> bool:
        """Whether clouds take more than a third of the light."""
        return weather.clouds(self.seed, self.time_s) > 1 / 3


def dip(state: State, lasts_s: float) -> State:
    """Return the plant on a grid whose frequency has just dipped, for so long."""
    return replace(state, dip_s=lasts_s)


def start(*, day_s: float = weather.DAY_S, hour: float = 10.0, seed: int = 1) -> State:
    """Return a plant at an hour of a day that takes `day_s` seconds from midnight to midnight."""
    return step(State(time_s=day_s * hour / 24.0, day_s=day_s, seed=seed), 0.0)


def step(state: State, dt_s: float) -> State:
    """Return the plant `dt_s` seconds later."""
    moved = _genset(_sky(replace(state, time_s=state.time_s + dt_s), dt_s), dt_s)
    return _meter(_balance(moved, dt_s), dt_s)


def _sky(state: State, dt_s: float) -> State:
    day = state.time_s / state.day_s % 1.0
    irradiance = weather.CLEAR_SKY_W_M2 * weather.sun(day) * (1.0 - weather.clouds(state.seed, state.time_s))
    ambient = 15.0 + 7.0 * math.sin(2.0 * math.pi * (day - 0.375))
    module = ambient + irradiance * 0.03
    derating = 1.0 - 0.004 * (module - 25.0)
    available = SOLAR_KW * irradiance / weather.CLEAR_SKY_W_M2 * derating
    return replace(
        state,
        irradiance_w_m2=irradiance,
        module_c=module,
        solar_kw=min(available, SOLAR_KW * state.solar_limit),
        load_kw=weather.demand_kw(state.seed, state.time_s, day),
        battery_c=_toward(state.battery_c, 25.0 + 0.2 * abs(state.battery_kw), 0.05 * dt_s),
    )


def _genset(state: State, dt_s: float) -> State:
    if not state.genset_start or state.fuel <= 0.0:
        return replace(state, genset=Genset.STOPPED, genset_wait_s=0.0, genset_kw=0.0)
    wait_s = state.genset_wait_s + dt_s
    if wait_s < GENSET_START_S:
        return replace(state, genset=Genset.STARTING, genset_wait_s=wait_s, genset_kw=0.0)
    return replace(
        state,
        genset=Genset.RUNNING,
        genset_wait_s=wait_s,
        genset_kw=_toward(state.genset_kw, state.genset_setpoint_kw, GENSET_RAMP_KW_S * dt_s),
        genset_h=state.genset_h + dt_s / 3600.0,
        fuel=max(0.0, state.fuel - state.genset_kw * dt_s / 3600.0 / GENSET_KWH_PER_FUEL),
    )


def _balance(state: State, dt_s: float) -> State:
    if state.breaker:
        target = _toward(state.battery_kw, state.battery_setpoint_kw, BATTERY_RAMP_KW_S * dt_s)
    else:
        target = state.load_kw - state.solar_kw - state.genset_kw
    battery_kw = _battery_can(state, target, dt_s)
    given_kw = battery_kw if battery_kw > 0.0 else 0.0
    taken_kw = battery_kw - given_kw
    flow_kwh = (given_kw / BATTERY_EFFICIENCY + taken_kw * BATTERY_EFFICIENCY) * dt_s / 3600.0
    state = replace(
        state, battery_kw=battery_kw, stored_kwh=min(BATTERY_KWH, max(0.0, state.stored_kwh - flow_kwh))
    )
    over_kw = state.solar_kw + state.genset_kw + battery_kw - state.load_kw
    if state.breaker:
        return replace(state, grid_kw=-over_kw)
    shed_kw = max(0.0, -over_kw)
    curtailed_kw = min(state.solar_kw, max(0.0, over_kw))
    unloaded_kw = max(0.0, over_kw - curtailed_kw)
    return replace(
        state,
        grid_kw=0.0,
        load_kw=state.load_kw - shed_kw,
        solar_kw=state.solar_kw - curtailed_kw,
        genset_kw=state.genset_kw - unloaded_kw,
    )


def _battery_can(state: State, target_kw: float, dt_s: float) -> float:
    """Keep a power within the inverter's limits and what is stored or has room."""
    most, least = BATTERY_KW, -BATTERY_KW
    if dt_s > 0.0:
        most = min(most, state.stored_kwh * BATTERY_EFFICIENCY * 3600.0 / dt_s)
        least = max(least, (state.stored_kwh - BATTERY_KWH) / BATTERY_EFFICIENCY * 3600.0 / dt_s)
    return min(most, max(least, target_kw))


def _meter(state: State, dt_s: float) -> State:
    hours = dt_s / 3600.0
    unrest = weather.noise(state.seed + 4, state.time_s, 2.0)
    if state.breaker:
        voltage = 230.0 - 0.03 * state.grid_kw + 0.8 * unrest
        frequency = 50.0 + 0.02 * weather.noise(state.seed + 5, state.time_s, 4.0)
        frequency -= DIP_HZ if state.dip_s > 0.0 else 0.0
    elif state.load_kw > 0.0:
        voltage = 230.0 + 0.2 * unrest
        frequency = 50.0 - 0.4 * state.battery_kw / BATTERY_KW
    else:
        voltage = frequency = 0.0
    return replace(
        state,
        voltage_v=voltage,
        frequency_hz=frequency,
        dip_s=max(0.0, state.dip_s - dt_s),
        import_kwh=state.import_kwh + max(0.0, state.grid_kw) * hours,
        export_kwh=state.export_kwh + max(0.0, -state.grid_kw) * hours,
        solar_kwh=state.solar_kwh + state.solar_kw * hours,
    )


def _toward(value: float, target: float, most: float) -> float:
    """Move a value to a target, by no more than `most`."""
    return value + min(most, max(-most, target - value))
