"""Which address a request goes to."""

from __future__ import annotations

from collections import Counter

import pytest

from service.engines.errors import EngineUnavailable
from service.engines.remote.breaker import BreakerLimits
from service.engines.remote.replicas import Replica, Replicas

URLS = tuple(f"http://replica-{number}/v1" for number in range(4))
LIMITS = BreakerLimits(consecutive=1, open_s=5.0)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replicas(clock: Clock) -> Replicas:
    return Replicas(URLS, LIMITS, clock)


def fail(replica: Replica) -> None:
    replica.breaker.failed(replica.breaker.admit())


def test_without_affinity_the_least_loaded_is_chosen(replicas: Replicas) -> None:
    chosen: Counter[str] = Counter()
    for _ in range(20):
        replica = replicas.choose()
        replica.running += 1
        chosen[replica.url] += 1
    assert set(chosen.values()) == {5}


def test_what_has_a_key_in_common_goes_to_one_address_and_keys_are_spread(replicas: Replicas) -> None:
    keys = [f"prompt {number}" for number in range(400)]
    first = {key: replicas.choose(key).url for key in keys}
    assert {key: replicas.choose(key).url for key in keys} == first
    assert all(60 < count < 140 for count in Counter(first.values()).values())


def test_where_an_address_goes_only_its_own_keys_move(replicas: Replicas) -> None:
    keys = [f"prompt {number}" for number in range(100)]
    first = {key: replicas.choose(key).url for key in keys}
    replicas.drain(URLS[2])
    moved = {key for key in keys if replicas.choose(key).url != first[key]}
    assert moved == {key for key in keys if first[key] == URLS[2]}
    replicas.undrain(URLS[2])
    assert {key: replicas.choose(key).url for key in keys} == first


def test_affinity_gives_way_where_its_address_has_clearly_more_to_do(replicas: Replicas) -> None:
    affine = replicas.choose("prompt")
    affine.running = 4
    assert replicas.choose("prompt") is affine
    affine.running = 5
    assert replicas.choose("prompt") is not affine


def test_an_address_that_is_down_is_left_out_until_it_is_back(replicas: Replicas, clock: Clock) -> None:
    affine = replicas.choose("prompt")
    replicas.mark(affine, down_for_s=10.0)
    assert replicas.choose("prompt") is not affine
    assert replicas.healthy() == 3
    clock.now = 10.0
    assert replicas.choose("prompt") is affine
    replicas.mark(affine, down_for_s=10.0)
    replicas.mark(affine, down_for_s=0.0)
    assert replicas.choose("prompt") is affine


def test_an_address_whose_breaker_is_open_is_left_out(replicas: Replicas, clock: Clock) -> None:
    affine = replicas.choose("prompt")
    fail(affine)
    assert replicas.choose("prompt") is not affine
    assert replicas.breaker_state() == "closed"
    clock.now = 5.0
    assert replicas.choose("prompt") is affine


def test_where_all_are_down_they_are_tried_all_the_same(replicas: Replicas) -> None:
    for replica in replicas.all:
        replicas.mark(replica, down_for_s=10.0)
    assert replicas.choose() in replicas.all
    assert replicas.healthy() == 0


def test_an_address_to_avoid_is_chosen_only_where_there_is_no_other(replicas: Replicas) -> None:
    affine = replicas.choose("prompt")
    assert replicas.choose("prompt", avoid=affine) is not affine
    assert replicas.another(affine)
    for url in URLS:
        if url != affine.url:
            replicas.drain(url)
    assert replicas.choose("prompt", avoid=affine) is affine
    assert not replicas.another(affine)


def test_all_drained_is_said_and_an_unknown_address_too(replicas: Replicas) -> None:
    for url in URLS:
        replicas.drain(url)
    with pytest.raises(EngineUnavailable, match="undrain"):
        replicas.choose()
    with pytest.raises(KeyError):
        replicas.drain("http://elsewhere/v1")


def test_a_single_address_can_be_drained_too(clock: Clock) -> None:
    replicas = Replicas(URLS[:1], LIMITS, clock)
    assert not replicas.another(replicas.all[0])
    replicas.drain(URLS[0])
    with pytest.raises(EngineUnavailable):
        replicas.choose()


def test_paths_stand_behind_the_base_and_health_at_the_root(clock: Clock) -> None:
    (replica,) = Replicas(("https://host:8/some/v1/",), LIMITS, clock).all
    assert str(replica.target("/chat/completions?api-version=1")) == (
        "https://host:8/some/v1/chat/completions?api-version=1"
    )
    assert str(replica.health("/health")) == "https://host:8/health"
