"""`mlxspec completion`: what a shell needs to complete verbs and options, made from the parser itself."""

import argparse
import shlex
from dataclasses import dataclass

from router.cli.output import ExitStatus, Output
from router.cli.verbs import SETUP, Parser, Verbs

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, slots=True)
class Word:
    """A verb ("groups list") with what may follow it: words with their help."""

    path: str
    follow: list[tuple[str, str]]


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add(
        "completion",
        topic=SETUP,
        help="print a completion script for bash, zsh or fish",
        examples='eval "$(mlxspec completion bash)"      # in ~/.bashrc\n'
        'eval "$(mlxspec completion zsh)"       # in ~/.zshrc, after compinit\n'
        "mlxspec completion fish | source       # in ~/.config/fish/config.fish",
        run=run_completion,
    )
    parser.add_argument("shell", choices=SHELLS)


def run_completion(options: argparse.Namespace, output: Output) -> int:
    from router.cli.main import build_parser  # which imports this file

    words = _words(build_parser(), "")
    scripts = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    output.write(scripts[options.shell](words))
    return ExitStatus.OK


def _words(parser: argparse.ArgumentParser, path: str) -> list[Word]:
    follow: list[tuple[str, str]] = []
    inner: list[Word] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            follow += parser.verbs.helps() if isinstance(parser, Parser) and parser.verbs else []
            for name, child in action.choices.items():
                inner += _words(child, f"{path} {name}".strip())
        elif action.option_strings:
            follow.append((action.option_strings[-1], action.help or ""))
        elif action.choices:
            follow += [(str(choice), "") for choice in action.choices]
    return [Word(path, follow), *inner]


def _bash(words: list[Word]) -> str:
    cases = "\n".join(
        f"        {shlex.quote(word.path)}) words={shlex.quote(' '.join(name for name, _ in word.follow))} ;;"
        for word in words
    )
    return f"""\
_mlxspec() {{
    local path="" word words="" i
    for ((i = 1; i < COMP_CWORD; i++)); do
        word="${{COMP_WORDS[i]}}"
        case "$word" in -*) continue ;; esac
        case " {" ".join(sorted({part for w in words for part in w.path.split()}))} " in
            *" $word "*) path="${{path:+$path }}$word" ;;
        esac
    done
    case "$path" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
    [ ${{#COMPREPLY[@]}} -gt 0 ] || COMPREPLY=($(compgen -f -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -F _mlxspec mlxspec
"""


def _zsh(words: list[Word]) -> str:
    return "autoload -U +X bashcompinit && bashcompinit\n" + _bash(words)


def _fish(words: list[Word]) -> str:
    lines = ["complete -c mlxspec -f"]
    for word in words:
        first = word.path.split()
        when = " && ".join(f"__fish_seen_subcommand_from {part}" for part in first) or "__fish_use_subcommand"
        for name, help_text in word.follow:
            what = f"-l {name[2:]}" if name.startswith("--") else f"-a {name}"
            if not name.startswith("-") or name.startswith("--"):
                lines.append(f"complete -c mlxspec -n {shlex.quote(when)} {what} -d {shlex.quote(help_text)}")
    return "\n".join(lines) + "\n"
