"""``cpm-run``: ask a bundle something, or chat with it."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from typing import Any

import click

from cpm_edge.runtimes.console import report_errors
from cpm_edge.runtimes.errors import PromptError
from cpm_edge.runtimes.generate import Result, Stream
from cpm_edge.runtimes.model import Model
from cpm_edge.runtimes.tokenizer import check_text

EPILOG = """\b
Examples:
  cpm-run bundle/                                      chat
  cpm-run bundle/ --prompt "Why is the sky blue?"      one answer
  cpm-run bundle/ --prompt "Once upon" --raw --max-new-tokens 50
  cpm-run bundle/ --think --hide-thought               chat with a thinking model
  cat question.txt | cpm-run bundle/ --json            one JSON object
  cpm-run bundle/ --build-only                         build the engine on a Jetson, run later
  cpm-run bundle/ --temperature 0.8 --top-p 0.8 --seed 1 --stats
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path())
@click.option("-p", "--prompt", metavar="TEXT", help="One question; '-' reads it from stdin.")
@click.option("--chat", is_flag=True, help="Chat line by line. The default on a terminal.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands, without the chat template.")
@click.option("--system", metavar="TEXT", help="A system message.")
@click.option("--think/--no-think", default=None, help="Switch thinking, for models that have the switch.")
@click.option("--hide-thought", is_flag=True, help="Print answers without the thought before them.")
@click.option("--device", help="CPU, GPU, NPU or cuda.  [default: cuda for jetson and rtx bundles, else CPU]")
@click.option("--flavour", type=click.Choice(["native", "stock"]), help="Where the bundle holds both.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the engine's choice]")
@click.option("--max-context", type=click.IntRange(min=1), help="A smaller context than the bundle's.")
@click.option(
    "-n", "--max-new-tokens", type=click.IntRange(min=1), help="Longest answer.  [default: to its end]"
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be repeated.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), help="Sample among the k most likely tokens; 0: all.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample within this probability mass."
)
@click.option("--min-p", type=click.FloatRange(0, 1), help="Drop tokens below this share of the best one.")
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), help="1 is off.")
@click.option("--seed", type=click.IntRange(min=0), help="Makes sampling repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end of the answer (with -n).")
@click.option("--special", is_flag=True, help="Show special tokens such as <|im_end|>.")
@click.option("--stats", is_flag=True, help="Print times, rates and memory on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--build-only", is_flag=True, help="Build and keep the engine of a jetson or rtx bundle.")
@click.option("--check", is_flag=True, help="Hash every file of the bundle again.")
@report_errors
def main(
    bundle: str,
    prompt: str | None,
    chat: bool,
    raw: bool,
    system: str | None,
    think: bool | None,
    hide_thought: bool,
    device: str | None,
    flavour: str | None,
    threads: int | None,
    max_context: int | None,
    stats: bool,
    as_json: bool,
    build_only: bool,
    check: bool,
    **sampling: Any,
) -> None:
    """Run a BUNDLE made by cpm-export.

    Without --prompt it chats on a terminal, and otherwise takes stdin as the prompt. Options left out come
    from the bundle's generation_config.json.
    """
    if build_only:
        if chat or prompt is not None:
            raise click.UsageError("--build-only runs nothing: leave --chat and --prompt out")
        _build(bundle, check, as_json)
        return
    interactive = chat or (prompt is None and sys.stdin.isatty())
    _check_usage(interactive, prompt=prompt, raw=raw, system=system, as_json=as_json, think=think)
    _keep_printing()
    text = None if interactive else _read_prompt(prompt)
    from cpm_edge.runtimes import load
    from cpm_edge.runtimes.repl import NO_SWITCH

    options = _chosen(sampling)
    with load(
        bundle, device=device, threads=threads, max_context=max_context, check=check, flavour=flavour
    ) as model:
        if think is not None and model.template is not None and not model.template.has_thinking_switch:
            click.echo(NO_SWITCH, err=True)
        if text is None:
            _chat(model, system, {**options, "enable_thinking": think}, stats, hide_thought)
        else:
            stream = _ask(model, text, system, raw, think, options)
            _print_answer(stream, as_json, stats, hide_thought)


def _build(bundle: str, check: bool, as_json: bool) -> None:
    from cpm_edge.runtimes import build

    report = build(bundle, check=check)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(report), "path": str(report.path)}))
        return
    done = f"built in {report.seconds:.0f} s" if report.new else "there already"
    click.echo(f"engine: {report.path} ({report.nbytes / 1e6:.0f} MB, {done})")


def _check_usage(
    interactive: bool, *, prompt: str | None, raw: bool, system: str | None, as_json: bool, think: bool | None
) -> None:
    if interactive and prompt is not None:
        raise click.UsageError("--chat and --prompt exclude each other")
    if interactive and as_json:
        raise click.UsageError("--json needs --prompt, or a prompt on stdin")
    if interactive and raw:
        raise click.UsageError("--raw needs --prompt, or a prompt on stdin")
    if raw and (system is not None or think is not None):
        raise click.UsageError("--raw uses no chat template, so --system and --think have no effect with it")


def _chosen(sampling: dict[str, Any]) -> dict[str, Any]:
    """What the user gave; the rest is left to the bundle's defaults."""
    for stop in sampling["stop"]:
        check_text(stop, "--stop")
    # By identity: 0 is a value, and equal to False.
    return {k: v for k, v in sampling.items() if v is not None and v is not False and v != ()}


def _read_prompt(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return str(prompt)
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"the prompt on stdin: expected UTF-8 text: {error}", hint="Save the text as UTF-8."
        ) from error
    return text[:-1] if text.endswith("\n") else text


def _ask(
    model: Model, text: str, system: str | None, raw: bool, think: bool | None, options: dict[str, Any]
) -> Stream:
    if raw or model.template is None:
        return model.stream(text, **options)
    if not text.strip():
        raise PromptError("the prompt is empty", hint='Give one with --prompt "TEXT", or on stdin.')
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return model.chat(messages, stream=True, enable_thinking=think, **options)


def _print_answer(stream: Stream, as_json: bool, stats: bool, hide_thought: bool) -> None:
    from cpm_edge.runtimes.printer import show

    if as_json:
        for _ in stream:
            pass
        result = stream.result
        report = {
            "text": result.text,
            "thought": result.thought,
            "answer": result.answer,
            "finish_reason": result.finish_reason,
            "token_ids": result.token_ids,
            "stats": result.stats.to_json(),
        }
        click.echo(json.dumps(report, ensure_ascii=False))
    else:
        show(stream, hide_thought=hide_thought)
    if stats and not as_json:
        _print_stats(stream.result)
    if stream.result.finish_reason == "interrupted":
        sys.exit(1)


def _chat(model: Model, system: str | None, options: dict[str, Any], stats: bool, hide_thought: bool) -> None:
    from cpm_edge.runtimes.repl import Repl, line_reader

    if model.template is None:
        raise PromptError(
            "this bundle has no chat template, so it cannot chat", hint="Continue a text with --prompt TEXT."
        )
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        click.echo("Ask something; /help lists the commands, Ctrl-D leaves.", err=True)
    Repl(
        model,
        system=system,
        options=options,
        read=line_reader() if on_terminal else _next_line,
        show_stats=_print_stats,
        always_stats=stats,
        hide_thought=hide_thought,
    ).run()


def _next_line(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _print_stats(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in result.stats.rows():
        table.add_row(name, value)
    table.add_row("finish", result.finish_reason)
    Console(stderr=True, highlight=False).print(table)


def _keep_printing() -> None:
    # An answer in any script must not end in a UnicodeEncodeError on a terminal of another one.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


if __name__ == "__main__":
    main()
