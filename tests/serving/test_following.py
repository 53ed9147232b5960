import threading

import pytest

from ragtune_ray.serving.following import Follower


class World:
    """Names that are published, what was loaded and released, and which names are broken."""

    def __init__(self) -> None:
        self.latest, self.broken, self.loaded, self.released = "1", set(), [], []

    def load(self, name: str, before: str | None) -> str:
        self.loaded.append((name, before))
        if name in self.broken:
            raise ValueError(f"{name} is broken")
        return f"held {name}"

    def follower(self, **others) -> Follower[str]:
        return Follower("thing", lambda: self.latest, self.load, self.released.append, **others)


def test_a_new_name_is_loaded_beside_the_old_one_and_taken() -> None:
    world = World()
    follower = world.follower()
    world.latest = "2"
    assert follower.refresh()
    with follower.lease() as lease:
        assert (lease.name, lease.held) == ("2", "held 2")
    assert world.loaded == [("1", None), ("2", "held 1")]
    assert world.released == ["held 1"]
    assert not follower.refresh()
    assert len(world.loaded) == 2


def test_what_is_leased_is_released_only_when_its_last_lease_ends() -> None:
    world = World()
    follower = world.follower()
    with follower.lease() as first:
        with follower.lease():
            world.latest = "2"
            follower.refresh()
        assert (first.name, follower.name, world.released) == ("1", "2", [])
    assert world.released == ["held 1"]


def test_a_broken_name_is_refused_and_reported_and_the_old_one_stays() -> None:
    world = World()
    follower = world.follower()
    world.latest, world.broken = "2", {"2"}
    assert not follower.refresh()
    assert follower.refused is not None
    assert (follower.name, follower.refused.name, world.released) == ("1", "2", [])
    assert "2 is broken" in follower.refused.reason
    follower.refresh()
    assert len(world.loaded) == 2, "not tried again at once"
    world.broken.clear()
    assert follower.refresh(again=True)
    assert (follower.name, follower.refused) == ("2", None)


def test_going_back_to_the_old_name_clears_the_refusal() -> None:
    world = World()
    follower = world.follower()
    world.latest, world.broken = "2", {"2"}
    follower.refresh()
    world.latest = "1"
    follower.refresh()
    assert follower.refused is None


def test_where_the_latest_is_broken_at_the_start_the_next_best_serves() -> None:
    world = World()
    world.latest, world.broken = "3", {"3", "2"}
    follower = world.follower(fallbacks=lambda: ["3", "2", "1"])
    assert follower.name == "1"
    assert follower.refused is not None
    assert follower.refused.name == "3"
    with pytest.raises(ValueError, match="3 is broken"):
        world.follower()


def test_a_mistake_in_the_name_itself_is_reported_and_not_raised() -> None:
    world = World()
    follower = world.follower()

    def unreadable() -> str:
        raise OSError("CURRENT cannot be read")

    follower._latest = unreadable
    assert not follower.refresh()
    assert follower.refused is not None
    assert "CURRENT" in follower.refused.reason


def test_it_looks_by_itself_and_releases_everything_at_the_end() -> None:
    world = World()
    taken = threading.Event()
    follower = world.follower()
    release = follower._release
    follower._release = lambda held: (release(held), taken.set())
    follower.follow(0.01)
    world.latest = "2"
    assert taken.wait(120)
    follower.stop()
    assert world.released == ["held 1", "held 2"]


class UnforeseenError(Exception):
    """As stores, formats and templates raise them: of no class that others share."""


def test_whatever_loading_raises_the_old_one_stays() -> None:
    world = World()

    def load(name: str, before: str | None) -> str:
        if name == "2":
            raise UnforeseenError("torn")
        return world.load(name, before)

    follower = Follower("thing", lambda: world.latest, load)
    world.latest = "2"
    assert not follower.refresh()
    assert follower.refused is not None
    assert (follower.name, follower.refused.reason) == ("1", "torn")


def test_a_store_that_cannot_be_reached_stops_neither_who_follows_nor_a_start() -> None:
    reachable = True

    def latest() -> str:
        if not reachable:
            raise UnforeseenError("no route to the store")
        return "1"

    world = World()
    follower = Follower("thing", latest, world.load)
    reachable = False
    assert not follower.refresh()
    follower.check()
    assert Follower("thing", latest, world.load, fallbacks=lambda: ["1"]).name == "1"
