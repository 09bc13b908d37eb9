from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from cpm_edge.exporter.configs.reader import IGNORED, LARGEST, ConfigReader
from cpm_edge.exporter.errors import ConfigError

Read = Callable[[ConfigReader], Any]


@pytest.mark.parametrize(
    ("value", "read", "message"),
    [
        (None, lambda r: r.get("k", int), "expected an integer, got nothing"),
        (True, lambda r: r.get("k", int), "expected an integer, got True"),
        (2.0, lambda r: r.get("k", int), "expected an integer, got 2.0"),
        ("2", lambda r: r.get("k", float), "expected a number, got '2'"),
        (math.nan, lambda r: r.get("k", float), "expected a number, got nan"),
        (math.inf, lambda r: r.get("k", float), "expected a number, got inf"),
        (5, lambda r: r.get("k", str), "expected a string, got 5"),
        (0, lambda r: r.get("k", bool), "expected true or false, got 0"),
        ([], lambda r: r.get("k", dict), "expected an object, got []"),
        ({}, lambda r: r.get("k", list), "expected an array, got {}"),
        (0, lambda r: r.positive("k"), "expected a positive integer, got 0"),
        (-1, lambda r: r.positive("k"), "expected a positive integer, got -1"),
        (LARGEST + 1, lambda r: r.positive("k"), f"expected at most {LARGEST}, got {LARGEST + 1}"),
        (0, lambda r: r.positive_number("k"), "expected a positive number, got 0.0"),
        (-0.5, lambda r: r.positive_number("k"), "expected a positive number, got -0.5"),
        ("b", lambda r: r.only("k", ("a", False)), "expected a or false, got b"),
        (None, lambda r: r.only("k", (True,)), "expected true, got nothing"),
        (0, lambda r: r.only("k", (False,), False), "expected false, got 0"),
        (1.0, lambda r: r.only("k", (1,)), "expected 1, got 1.0"),
        (None, lambda r: r.numbers("k", 2), "expected 2 positive numbers, got None"),
        ([1], lambda r: r.numbers("k", 2), "expected 2 numbers, got 1"),
        ([1, 0], lambda r: r.numbers("k", 2), "expected 2 positive numbers, got [1, 0]"),
        ([1, math.inf], lambda r: r.numbers("k", 2), "expected 2 positive numbers, got [1, inf]"),
        ([1, True], lambda r: r.numbers("k", 2), "expected 2 positive numbers, got [1, True]"),
        (["x" * 80], lambda r: r.numbers("k", 1), "expected 1 positive numbers, got ['" + "x" * 55 + "..."),
        ("</s>", lambda r: r.token_ids("k"), "expected token ids, got '</s>'"),
        ([1, "2"], lambda r: r.token_ids("k"), "expected token ids, got [1, '2']"),
        (True, lambda r: r.token_ids("k"), "expected token ids, got True"),
        (5, lambda r: r.section("k"), "expected an object, got 5"),
    ],
)
def test_what_is_refused_names_key_expectation_and_value(value: Any, read: Read, message: str) -> None:
    for reader, name in ((ConfigReader({"k": value}), "k"), (ConfigReader({"k": value}, "part"), "part.k")):
        with pytest.raises(ConfigError) as caught:
            read(reader)
        assert caught.value.message == f"{name}: {message}"


def test_a_config_must_be_an_object() -> None:
    with pytest.raises(ConfigError, match=r"^config.json: expected an object, got \[1\]$"):
        ConfigReader([1])  # type: ignore[arg-type]


def test_what_is_taken() -> None:
    reader = ConfigReader({"i": LARGEST, "n": 2, "none": None, "l": [1, 2.5], "id": 7, "ids": [1, -1, 2]})
    assert reader.positive("i") == LARGEST
    assert (reader.get("n", float), type(reader.get("n", float))) == (2.0, float)
    assert reader.get("none", int, 3) == reader.get("missing", int, 3) == 3
    assert reader.numbers("l", 2) == (1.0, 2.5)
    assert (reader.token_ids("id"), reader.token_ids("ids"), reader.token_ids("none")) == ([7], [1, 2], [])
    assert reader.section("none") is None
    assert (reader.has("n"), reader.has("none"), reader.has("missing")) == (True, False, False)
    reader.finish(strict=True)


def test_keys_that_nobody_read_are_refused_or_told() -> None:
    known = dict.fromkeys(IGNORED, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConfigReader(known).finish(strict=False)
    with pytest.warns(UserWarning, match=r"^config.json: keys without effect here: a, b$"):
        ConfigReader(known | {"b": 1, "a": 2}).finish(strict=False)
    with pytest.raises(ConfigError, match=r"^part: unknown keys a; they may change"):
        ConfigReader({"a": 1}, "part").finish(strict=True)
