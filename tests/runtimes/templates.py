"""Chat templates in the shape of the released ones, written for these tests."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer

from tests.runtimes.fakes import CHATML, byte_level_tokenizer

# Closes an empty thought when thinking is off; the model decides otherwise.
MINICPM41 = CHATML.replace(
    "assistant\n",
    "assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n{% endif %}",
)

# Prints BOS itself, opens or closes the thought in the prompt, drops the thoughts of turns before the last
# question, and writes tool calls as XML whose strings stand in CDATA.
MINICPM5 = """\
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- '<tools>\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}
{{- '</tools><|im_end|>\\n' }}
{%- endif %}
{%- macro value(given) %}
{%- if given is string %}{{ '<![CDATA[' + given + ']]>' }}{% else %}{{ given | tojson }}{% endif %}
{%- endmacro %}
{%- for message in messages %}
{%- if message.role == 'system' and tools %}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- set thought = message.reasoning_content or '' %}
{%- set content = message.content or '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}
{%- set content = content.split('</think>')[-1].lstrip() %}
{%- endif %}
{%- if thought and loop.index0 > last.question %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call><function name="' + call.function.name + '">' }}
{%- for name, given in call.function.arguments.items() %}
{{- '<param name="' + name + '">' + value(given) + '</param>' }}
{%- endfor %}
{{- '</function></tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined %}
{{- '<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""

MARKUP = [
    "</think>", "<tool_call>", "</tool_call>", "<function", "</function>", "<param", "</param>",
    "/think", "/no_think",
]  # fmt: skip


def minicpm5_tokenizer() -> Tokenizer:
    """Markup is one token each, and none of it special: it must stay in the text."""
    backend = byte_level_tokenizer()
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    return backend
