"""Swapping a resource while it is in use: leases, refusals, fallbacks and polling."""

import threading

import pytest

from ragtune_ray.serving.hot_swap import HotSwap


class World:
    """Published and broken versions, and which were loaded and released."""

    def __init__(self) -> None:
        self.latest, self.broken, self.loaded, self.released = "1", set(), [], []

    def load(self, name: str, previous: str | None) -> str:
        self.loaded.append((name, previous))
        if name in self.broken:
            raise ValueError(f"{name} is broken")
        return f"held {name}"

    def hot_swap(self, **others) -> HotSwap[str]:
        return HotSwap("thing", lambda: self.latest, self.load, self.released.append, **others)


def test_a_new_version_is_loaded_and_then_replaces_the_old() -> None:
    world = World()
    current = world.hot_swap()
    world.latest = "2"
    assert current.refresh()
    with current.lease() as lease:
        assert (lease.name, lease.resource) == ("2", "held 2")
    assert world.loaded == [("1", None), ("2", "held 1")]
    assert world.released == ["held 1"]
    assert not current.refresh()
    assert len(world.loaded) == 2


def test_a_resource_is_released_when_its_last_lease_ends() -> None:
    world = World()
    current = world.hot_swap()
    with current.lease() as first:
        with current.lease():
            world.latest = "2"
            current.refresh()
        assert (first.name, current.name, world.released) == ("1", "2", [])
    assert world.released == ["held 1"]


def test_a_broken_version_is_refused_and_the_old_one_stays() -> None:
    world = World()
    current = world.hot_swap()
    world.latest, world.broken = "2", {"2"}
    assert not current.refresh()
    assert current.refused is not None
    assert (current.name, current.refused.name, world.released) == ("1", "2", [])
    assert "2 is broken" in current.refused.reason
    current.refresh()
    assert len(world.loaded) == 2, "no immediate retry"
    world.broken.clear()
    assert current.refresh(retry=True)
    assert (current.name, current.refused) == ("2", None)


def test_a_rollback_to_the_old_version_clears_the_refusal() -> None:
    world = World()
    current = world.hot_swap()
    world.latest, world.broken = "2", {"2"}
    current.refresh()
    world.latest = "1"
    current.refresh()
    assert current.refused is None


def test_a_broken_latest_version_at_the_start_uses_a_fallback() -> None:
    world = World()
    world.latest, world.broken = "3", {"3", "2"}
    current = world.hot_swap(fallbacks=lambda: ["3", "2", "1"])
    assert current.name == "1"
    assert current.refused is not None
    assert current.refused.name == "3"
    with pytest.raises(ValueError, match="3 is broken"):
        world.hot_swap()


def test_an_unreadable_name_is_reported_and_not_raised() -> None:
    world = World()
    current = world.hot_swap()

    def unreadable() -> str:
        raise OSError("CURRENT cannot be read")

    current._latest = unreadable
    assert not current.refresh()
    assert current.refused is not None
    assert "CURRENT" in current.refused.reason


def test_polling_swaps_and_stopping_releases_everything() -> None:
    world = World()
    taken = threading.Event()
    current = world.hot_swap()
    release = current._release
    current._release = lambda resource: (release(resource), taken.set())
    current.poll(0.01)
    world.latest = "2"
    assert taken.wait(120)
    current.stop()
    assert world.released == ["held 1", "held 2"]


class UnforeseenError(Exception):
    """An exception without a common base class, as stores, formats and templates raise."""


def test_any_exception_while_loading_keeps_the_old_version() -> None:
    world = World()

    def load(name: str, previous: str | None) -> str:
        if name == "2":
            raise UnforeseenError("torn")
        return world.load(name, previous)

    current = HotSwap("thing", lambda: world.latest, load)
    world.latest = "2"
    assert not current.refresh()
    assert current.refused is not None
    assert (current.name, current.refused.reason) == ("1", "torn")


def test_an_unreachable_store_stops_neither_polling_nor_a_start() -> None:
    reachable = True

    def latest() -> str:
        if not reachable:
            raise UnforeseenError("no route to the store")
        return "1"

    world = World()
    current = HotSwap("thing", latest, world.load)
    reachable = False
    assert not current.refresh()
    current.check_health()
    assert HotSwap("thing", latest, world.load, fallbacks=lambda: ["1"]).name == "1"
