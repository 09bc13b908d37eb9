"""From a checkpoint like MiniCPM5's to a conversation: its template, tokens and ends arrive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpm_edge.exporter.export import export
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.exporter.progress import Progress
from cpm_edge.runtimes import load
from tests.runtimes.templates import MINICPM5, minicpm5_tokenizer
from tests.support.bundles import TARGETS, Bundles
from tests.support.checkpoints import VARIANTS, make_tensors, write_checkpoint

BACKEND = minicpm5_tokenizer()
BOS, EOS, END = (BACKEND.get_vocab()[token] for token in ("<s>", "</s>", "<|im_end|>"))
QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = VARIANTS["llama"] | {"bos_token_id": BOS, "eos_token_id": [EOS, END], "pad_token_id": EOS}
    folder = write_checkpoint(tmp_path_factory.mktemp("minicpm5"), config, make_tensors(config))
    BACKEND.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(MINICPM5)
    texts = {
        "generation_config.json": {"eos_token_id": [EOS, END], "do_sample": True, "temperature": 0.9},
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False},
    }
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_a_conversation(checkpoint: Path, target: str, bundles: Bundles, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    options = ExportOptions(str(checkpoint), target, output, weight_format="int8", verify=False)
    export(options, Progress(enabled=False))
    if target == "ort":
        genai = json.loads((output / "genai_config.json").read_text())["model"]
        assert (genai["bos_token_id"], genai["eos_token_id"]) == (BOS, [EOS, END])
    with load(output) as model:
        assert model.tokenizer.eos_ids == {EOS, END} and model.defaults.temperature == 0.9
        assert model.template is not None and model.template.has_thinking_switch
        prompt = model.encode(model.render(QUESTION, enable_thinking=True))
        assert prompt[0] == BOS and prompt.count(BOS) == 1
        stream = model.chat(QUESTION, enable_thinking=True, stream=True, max_new_tokens=20, seed=1)
        events = list(stream.events())
        result = stream.result
        assert stream.in_thought and result.stats.prompt_tokens == len(prompt)
        assert "".join(event.text for event in events) == result.thought + result.answer
        # The template opened it; random weights close it by chance, or never.
        thought, _, answer = result.text.partition("</think>")
        assert (result.thought, result.answer) == (thought.strip(), answer.lstrip())
