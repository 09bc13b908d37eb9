from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from cpm_edge.exporter.errors import ConfigError
from cpm_edge.exporter.registry import ARCHITECTURES, BY_KEY, architecture_label, find_architecture


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_entry_has_a_config_and_a_model(name: str) -> None:
    entry = find_architecture({"architectures": [name]})
    assert entry is ARCHITECTURES[name]
    model = entry.model_class()
    assert {"embed", "head", "forward"} <= set(dir(model))


@pytest.mark.parametrize(("name", "key"), BY_KEY)
def test_a_key_tells_architectures_of_one_name_apart(name: str, key: str) -> None:
    entry = find_architecture({"architectures": [name], key: 8})
    assert entry is BY_KEY[name, key] and entry.model_class() is not ARCHITECTURES[name].model_class()
    for nothing in (0, None, False):
        assert find_architecture({"architectures": [name], key: nothing}) is ARCHITECTURES[name]


def test_labels_say_what_a_config_must_hold() -> None:
    assert architecture_label("llama") == "LlamaForCausalLM"
    assert architecture_label("minicpm_moe") == "MiniCPMForCausalLM with num_experts"


def test_the_first_known_name_counts() -> None:
    assert find_architecture({"architectures": ["Future", "LlamaForCausalLM"]}).name == "llama"
    assert find_architecture({"architectures": "MiniCPMForCausalLM"}).name == "minicpm"


@pytest.mark.parametrize("names", [None, [], ["MiniCPM9ForCausalLM"]])
def test_an_unknown_architecture_is_named(names: Any) -> None:
    got = names[0] if names else "nothing"
    with pytest.raises(
        ConfigError, match=rf"architectures: expected one of LlamaForCausalLM.*{got}"
    ) as caught:
        find_architecture({"architectures": names})
    assert caught.value.hint is not None and "--list-models" in caught.value.hint


def test_it_is_read_without_torch() -> None:
    code = "import sys, cpm_edge.exporter.registry; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "False"
