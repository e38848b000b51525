"""Whether the commands on the pages exist, with the options that they are given."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise

import click

from sdtpu_worker.settings_table import SETTINGS
from tests.docs.pages import Block
from tests.support.paths import ROOT

OUTSIDE = {
    ".", "cd", "curl", "django-admin", "docker", "export", "flask", "journalctl", "kubectl", "mkdir", "nvidia-smi",
    "pip", "redis-cli", "systemctl",
}  # fmt: skip
"""Programs of others, whose options are not looked at here."""
OTHER_VARIABLES = {
    "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "HF_HOME", "HF_TOKEN", "MALLOC_ARENA_MAX",
    "GLIBC_TUNABLES", "REDIS_PORT", "FLOWER_PORT", "REDIS_MAXMEMORY",
    "FORWARDED_ALLOW_IPS",  # of uvicorn
    "OPENAI_BASE_URL", "OPENAI_API_KEY",  # of OpenAI's client
    "CUDA_VISIBLE_DEVICES", "XLA_CLIENT_MEM_FRACTION", "XLA_FLAGS",  # of JAX, for GPUs
    "SDTPU_TARGET", "SDTPU_PRIVILEGED",  # read by docker/compose.yaml
    "SDTPU_TEST_COMPILE_CACHE",  # read by the tests
}  # fmt: skip
"""Variables of the environment that the pages name, and that are no settings."""
_ASSIGNMENT = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*)=")
_SEPARATORS = {"&&", "||", ";", "|"}


class NoSuchCommand(AssertionError):
    """A page names a command, an option, a file or a setting that does not exist."""


def commands_in(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block."""
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        line = line.strip().removeprefix("$ ")
        if line.startswith("$("):  # a command whose output is the command
            line = line[2:].removesuffix(")")
        yield from split_commands(line)


def split_commands(line: str) -> Iterator[list[str]]:
    """Yield the words of each command of a line."""
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        if word in _SEPARATORS:
            yield words
            words = []
        else:
            words.append(word)
    if words:
        yield words


def check_command(words: list[str]) -> None:
    """Check one command.

    Raises:
        NoSuchCommand: something in it does not exist.
    """
    while words and (match := _ASSIGNMENT.match(words[0])):
        check_variable(match[1])
        words = words[1:]
    if not words:
        return
    program, *arguments = words
    program = program.rpartition("/")[2]
    if program == "celery":
        _check_celery(arguments)
    elif program == "sdtpu":
        from sdtpu_worker.cli import sdtpu

        check_click(sdtpu, arguments)
    elif program == "mkdocs":
        from mkdocs.__main__ import cli

        check_click(cli, arguments)
    elif program == "sh":
        _check_script(arguments)
    elif program in ("python", "python3"):
        _check_python(arguments)
    elif program not in OUTSIDE:
        raise NoSuchCommand(f"{program}: no program that the pages are known to use; add it to tests/docs/commands.py")
    if program == "export":
        for word in arguments:
            check_variable(word.partition("=")[0])
    if program == "pip":
        _check_extras(arguments)
    if program == "docker":
        _check_files(arguments)


def check_variable(name: str) -> None:
    """Check that a variable of the environment means something."""
    if name not in OTHER_VARIABLES and name.lower() not in {setting.name for setting in SETTINGS}:
        raise NoSuchCommand(f"{name} is no setting")


def check_click(command: click.Command, arguments: list[str]) -> None:
    """Follow the words of a command line through a click command and its subcommands."""
    words = iter(arguments)
    for word in words:
        if word.startswith("-") and word != "-":
            name = word.partition("=")[0]
            options = [
                p for p in command.params if name in (*p.opts, *p.secondary_opts) and isinstance(p, click.Option)
            ]
            if not options and name != "--help":
                raise NoSuchCommand(f"{command.name} has no option {name}")
            if options and "=" not in word and not (options[0].is_flag or options[0].count):
                next(words, None)
        elif isinstance(command, click.Group):
            found = command.get_command(click.Context(command), word)
            if found is None:
                raise NoSuchCommand(f"{command.name} has no command {word}")
            command = found


def _check_celery(arguments: list[str]) -> None:
    from celery.bin.celery import celery
    from celery.worker.control import Panel

    if "flower" in arguments:  # a package of its own
        return
    check_click(celery, arguments)
    for group in ("inspect", "control"):
        if group in arguments[:-1]:
            method = arguments[arguments.index(group) + 1]
            if method not in Panel.meta:
                raise NoSuchCommand(f"celery {group} has no method {method}")


def _check_python(arguments: list[str]) -> None:
    match arguments:
        case ["-c", code, *_]:
            compile(code, "-c", "exec")
        case ["-m", module, *_]:
            if importlib.util.find_spec(module) is None:
                raise NoSuchCommand(f"there is no module {module}")
        case [script, *_] if script != "manage.py" and not (ROOT / script).is_file():  # Django's own
            raise NoSuchCommand(f"there is no file {script}")


def _check_script(arguments: list[str]) -> None:
    script = ROOT / arguments[0]
    if not script.is_file():
        raise NoSuchCommand(f"there is no file {arguments[0]}")


def _check_extras(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        for name in re.findall(r"^(?:sdtpu_worker|\.|~/sdtpu_worker)\[(.+)\]$", word):
            if unknown := set(name.split(",")) - set(extras):
                raise NoSuchCommand(f"pyproject.toml has no extra {', '.join(unknown)}")


def _check_files(arguments: list[str]) -> None:
    for option, value in pairwise(arguments):
        if option == "-f" and not (ROOT / value).is_file():
            raise NoSuchCommand(f"there is no file {value}")
