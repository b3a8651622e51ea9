"""How a verb is added to the command line, and how its help reads.

A file of verbs has one function `add_verbs(verbs)`. Each verb's parser names the function that runs it:
`verbs.add(…, run=function)`, which is called with the options and an `Output` and returns an exit code.
"""

import argparse
import difflib
import math
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from router.cli.output import ExitStatus, Output

Run = Callable[[argparse.Namespace, Output], int]

SERVER, MODELS, HUB, SETUP = "server", "models", "Hugging Face", "setup"
WIDTH = 96  # of a help text, where the terminal is not narrower
TITLES = (SERVER, MODELS, HUB, SETUP)  # in the order of the help


class HelpFormatter(argparse.HelpFormatter):
    """A usage line that names the arguments and says of options only that there are some; indented lines stay."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(WIDTH, shutil.get_terminal_size().columns - 2))

    def _format_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable[Any], prefix: str | None
    ) -> str:
        if prefix is not None:  # argparse asks for the words before a verb
            return super()._format_usage(usage, actions, groups, prefix)
        arguments = self._format_actions_usage([action for action in actions if not action.option_strings], [])
        return f"usage: {self._prog} [options] {arguments}".rstrip() + "\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = [line if line.startswith(" ") else textwrap.fill(line, width) for line in text.splitlines()]
        return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes take one line, and whose help lists verbs by topic."""

    verbs: "Verbs | None" = None

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)
        self._positionals.title = "arguments"

    def error(self, message: str) -> NoReturn:
        """One line with the next step. Exits with 2."""
        self.exit(ExitStatus.USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")

    def format_help(self) -> str:
        text = super().format_help()
        return text if self.verbs is None else self.verbs.in_help(text)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """A verb that does not exist gets the nearest one that does, not all of them."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = difflib.get_close_matches(str(value), list(action.choices), n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise argparse.ArgumentError(None, f"there is no command {value!r}{hint}")
        super()._check_value(action, value)


class Verbs:
    """The verbs of one parser, grouped by topic in its help."""

    _MARK = "{verbs}"

    def __init__(self, parser: Parser, dest: str = "command", *, is_required: bool = False) -> None:
        parser.verbs = self
        self._prog = parser.prog
        self._lines: dict[str, list[tuple[str, str]]] = {}
        self._parsers = parser.add_subparsers(
            dest=dest, metavar="COMMAND", title=self._MARK, parser_class=Parser, required=is_required
        )

    def add(
        self,
        name: str,
        *,
        help: str,
        run: Run | None = None,
        topic: str = "commands",
        description: str | None = None,
        examples: str = "",
    ) -> Parser:
        """A verb's parser. `examples` has one command and what it does a line."""
        self._lines.setdefault(topic, []).append((name, help))
        parser: Parser = self._parsers.add_parser(
            name,
            description=description or f"{help[:1].upper()}{help[1:]}.",
            epilog=f"examples:\n{_indented(examples)}" if examples else None,
        )
        if run is not None:
            parser.set_defaults(run=run)
        return parser

    def helps(self) -> list[tuple[str, str]]:
        """Each verb with what it does."""
        return [line for lines in self._lines.values() for line in lines]

    def in_help(self, text: str) -> str:
        """The help with the list of verbs by topic, before the options, in place of argparse's own."""
        head, _, rest = text.partition(f"{self._MARK}:\n")
        _, _, tail = rest.partition("\n\n")
        start, mark, options = head.partition("\noptions:\n")
        width = max((len(name) for lines in self._lines.values() for name, _ in lines), default=0)
        blocks = [
            f"{topic}:\n" + "".join(f"  {name:<{width}}   {what}\n" for name, what in self._lines[topic])
            for topic in sorted(self._lines, key=_place)
        ]
        return start + "\n" + "\n".join(blocks) + mark + options + tail


def number(text: str) -> float:
    """A finite number, as argparse's `type`."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def add_choice(
    parser: argparse._ActionsContainer, name: str, default: str | None, choices: Sequence[str], what: str
) -> None:
    """An option with few values, all of which its help names."""
    preset = f" (default: {default})" if default else ""
    text = f"{what}: {', '.join(choices)}{preset}"
    parser.add_argument(name, metavar="WHICH", choices=choices, default=default, help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, which every verb with an answer has."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_server(parser: argparse.ArgumentParser) -> None:
    """Which server to talk to, and `--json`: the options of every verb that does."""
    where = parser.add_argument_group("server")
    where.add_argument("--url", metavar="URL", help="the server (default: MLXSPEC_URL, else the one of MLXSPEC_HOME)")
    add_json(parser)


def _place(topic: str) -> int:
    return TITLES.index(topic) if topic in TITLES else len(TITLES)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.strip().splitlines())
