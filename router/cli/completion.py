"""`mlxspec completion`: scripts that complete verbs and options, made from the parser itself."""

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from router.cli.output import ExitStatus, Output
from router.cli.verbs import SETUP, Parser, Verbs


@dataclass(frozen=True, slots=True)
class Option:
    """An option with all its names. `values` are those it may have, if they are few."""

    names: tuple[str, ...]
    help: str
    takes_value: bool
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """The program or one verb: the words that lead to it, its own verbs (with help) or words, and its options."""

    words: tuple[str, ...]
    verbs: tuple[tuple[str, str], ...]
    options: tuple[Option, ...]

    @property
    def name(self) -> str:
        return " ".join(self.words)


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add(
        "completion",
        topic=SETUP,
        help="print a script that completes commands in your shell",
        description="Print a script that completes verbs and options in a shell.",
        examples='eval "$(mlxspec completion bash)"      # in ~/.bashrc\n'
        'eval "$(mlxspec completion zsh)"       # in ~/.zshrc, after compinit\n'
        "mlxspec completion fish | source       # in ~/.config/fish/config.fish",
        run=run,
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="the shell to write for")


def run(options: argparse.Namespace, output: Output) -> int:
    output.write(SCRIPTS[options.shell](list(places(options.parser))))
    return ExitStatus.OK


def places(parser: argparse.ArgumentParser, words: tuple[str, ...] = ("mlxspec",)) -> Iterator[Place]:
    """The program, and every verb below it."""
    verbs: dict[str, argparse.ArgumentParser] = {}
    offered: list[tuple[str, str]] = []
    options: list[Option] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            verbs |= action.choices
            offered += parser.verbs.helps() if isinstance(parser, Parser) and parser.verbs else []
        elif action.option_strings:
            values = tuple(map(str, action.choices or ()))
            options.append(Option(tuple(action.option_strings), action.help or "", action.nargs != 0, values))
        else:
            offered += [(str(value), "") for value in action.choices or ()]
    yield Place(words, tuple((name, _brief(text)) for name, text in offered), tuple(options))
    for name, inner in verbs.items():
        yield from places(inner, (*words, name))


def bash(known: Sequence[Place]) -> str:
    """For bash 3.2 and newer. Where nothing is known, file names are offered."""
    words = [f'        "{place.name}") words="{" ".join(_all_words(place))}" ;;' for place in known]
    return f"""\
# bash completion of mlxspec
_mlxspec() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}} place=mlxspec words="" i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$place ${{COMP_WORDS[i]}}" in
            {_known_places(known)}) place="$place ${{COMP_WORDS[i]}}" ;;
        esac
    done
    case "$place $previous" in
{_lines("        ", _value_cases(known, 'COMPREPLY=($(compgen -W "{}" -- "$current")); return'))}
    esac
    case "$place" in
{_lines("", words)}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _mlxspec mlxspec
"""


def zsh(known: Sequence[Place]) -> str:
    """With descriptions. `$path` is zsh's own, hence `place`."""
    cases = []
    for place in known:
        verbs = " ".join(_described(name, text) for name, text in place.verbs)
        options = " ".join(_described(name, option.help) for option in place.options for name in option.names)
        cases.append(f'        "{place.name}") verbs=({verbs}); options=({options}) ;;')
    return f"""\
#compdef mlxspec
_mlxspec() {{
    local place=mlxspec word
    local -a verbs options
    for word in ${{words[2,CURRENT-1]}}; do
        case "$place $word" in
            {_known_places(known)}) place="$place $word" ;;
        esac
    done
    case "$place ${{words[CURRENT-1]}}" in
{_lines("        ", _value_cases(known, "compadd -- {}; return"))}
    esac
    case "$place" in
{_lines("", cases)}
    esac
    if [[ $PREFIX == -* ]]; then
        _describe -o option options
    elif (( $#verbs )); then
        _describe command verbs
    else
        _files
    fi
}}
if [ "$funcstack[1]" = "_mlxspec" ]; then _mlxspec "$@"; else compdef _mlxspec mlxspec; fi
"""


def fish(known: Sequence[Place]) -> str:
    """With descriptions."""
    lines = ["# fish completion of mlxspec"]
    for place in known:
        when = _fish_condition(place)
        lines += [
            f"complete -c mlxspec -n {shlex.quote(when)} -f -a {shlex.quote(name)} -d {shlex.quote(text)}"
            for name, text in place.verbs
        ]
        lines += [_fish_option(option, when) for option in place.options]
    return "\n".join(lines) + "\n"


SCRIPTS: dict[str, Callable[[Sequence[Place]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def _all_words(place: Place) -> list[str]:
    return [name for name, _ in place.verbs] + [name for option in place.options for name in option.names]


def _known_places(known: Sequence[Place]) -> str:
    return " | ".join(f'"{place.name}"' for place in known if len(place.words) > 1)


def _value_cases(known: Sequence[Place], offer: str) -> list[str]:
    """A case for each option with few values. `offer` is the command, with {} for them."""
    cases = []
    for place in known:
        for option in place.options:
            if option.values:
                pattern = " | ".join(f'"{place.name} {name}"' for name in option.names)
                cases.append(f"{pattern}) {offer.format(' '.join(option.values))} ;;")
    return cases


def _described(name: str, text: str) -> str:
    escaped = name.replace(":", "\\:")
    return shlex.quote(f"{escaped}:{_brief(text)}")


def _fish_condition(place: Place) -> str:
    seen = [f"__fish_seen_subcommand_from {word}" for word in place.words[1:]]
    inner = " ".join(name for name, _ in place.verbs)
    if not seen:
        return "__fish_use_subcommand"
    if inner:
        seen.append(f"not __fish_seen_subcommand_from {inner}")
    return "; and ".join(seen)


def _fish_option(option: Option, when: str) -> str:
    names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
    value = f" -x -a {shlex.quote(' '.join(option.values))}" if option.values else " -r" if option.takes_value else ""
    return f"complete -c mlxspec -n {shlex.quote(when)} {names}{value} -d {shlex.quote(_brief(option.help))}"


def _brief(text: str) -> str:
    """The first line, without its full stop."""
    return text.partition("\n")[0].partition(". ")[0].rstrip(".")


def _lines(indent: str, lines: Sequence[str]) -> str:
    return "\n".join(f"{indent}{line}" for line in lines)
